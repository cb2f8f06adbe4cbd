"""Prompts: what makes one, and what does not."""

import pytest

from latentguard.errors import InputError
from latentguard.layers import resolve_layers
from latentguard.prompts import Message, Prompt, as_prompts, inverted, set_terminal


def test_what_counts_as_prompts():
    talk = [{"role": "user", "content": "hi"}]
    assert [p.instruction for p in as_prompts("a")] == ["a"]
    assert [p.instruction for p in as_prompts(["a", Prompt.of("b"), talk])] == ["a", "b", "hi"]
    assert as_prompts(talk)[0].messages == (Message("user", "hi"),)
    assert as_prompts("a")[0].id == as_prompts("a")[0].id != as_prompts("b")[0].id
    for wrong in (7, [7], [["a"]], [[{"role": "user"}]]):
        with pytest.raises(InputError):
            as_prompts(wrong)


def test_a_prompt_ends_with_the_users_words():
    for messages in ((), (Message("assistant", "x"),), (Message("user", "x"), Message("assistant", "y")), (Message("user", " \n"),)):
        with pytest.raises(InputError):
            Prompt(messages)


def test_layers_are_ints_or_shares_of_depth():
    assert resolve_layers("all", 3) == (0, 1, 2, 3)
    assert resolve_layers([0.5, 12, 1.0, 0.0], 24) == (0, 12, 24)
    assert resolve_layers(0.4, 24) == (10,)
    for wrong in (25, 1.2, -1, True, "last", [], ["all"], [None]):
        with pytest.raises(InputError, match="layer"):
            resolve_layers(wrong, 24)


def test_a_prompt_without_its_suffix_is_told_from_the_whole_one():
    whole, cut = Prompt.of("Sing."), Prompt.of("Sing.", suffix=False)
    assert whole != cut and (whole.id, whole.group, whole.instruction) == (cut.id, cut.group, cut.instruction)
    assert whole.suffix and as_prompts("Sing.")[0].suffix
    assert not cut.with_instruction("Sing on.").suffix and not set_terminal(cut, "period").suffix


@pytest.mark.parametrize("text", ["Bake a cake.", "no mark", "Really?"])
def test_an_inverted_prompt_tells_and_asks(text):
    talk = (Message("system", "Be kind."), Message("user", text))
    prompt = Prompt(talk, harmful=True, id="x1", group="g", category="c", source="s", terminal="period")
    told = inverted(prompt, "Is it harmful?")
    assert told.instruction == f"User wants to {text}\nIs it harmful?" and told.messages[0] == talk[0]
    assert (told.harmful, told.group, told.category, told.source, told.terminal) == (True, "g", "c", "s", "period")


def test_inverted_prompts_have_names_of_their_own():
    prompts, questions = [Prompt.of(f"Bake cake {k}.") for k in range(3)], ["Is it harmful?", "Is it wrong?"]
    ids = {inverted(p, q).id for p in prompts for q in questions} | {p.id for p in prompts}
    assert len(ids) == 9, "replies to a question are not replies to the request"
    assert inverted(prompts[0], questions[0]).id == inverted(prompts[0], questions[0]).id

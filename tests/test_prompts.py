"""Prompts: what makes one, and what does not."""

import pytest

from latentguard.errors import InputError
from latentguard.layers import resolve_layers
from latentguard.prompts import Message, Prompt, as_prompts


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

"""Perturbations: the same for the same seed, blind to the label, tied to their origin, and the request is still in there."""

import base64
from collections import Counter
from dataclasses import replace

import pytest

from latentguard.errors import InputError
from latentguard.perturbations import AS_IS, FAMILIES, SLOT, bare, frame_of, in_context, in_frame, in_turn, perturbations
from latentguard.prompts import Message, Prompt

ASK = "Tell me how the Old Lighthouse sends its 12 signals over the sea."
FILLER = [(f"Describe shade number {k} of blue.", 6) for k in range(9)]
ALL = [
    *perturbations(),
    *(in_context(FILLER, budget, place) for budget in (20, 100) for place in ("middle", "first")),
    in_frame(f"Story: {SLOT}, he said.", "f", "a story"),
]
NAMED = {one.name: one for one in ALL}
WORDS = str.maketrans("431057", "aeiost")
LATIN = str.maketrans("асеорхуіАСЕОРХ", "aceopxyiACEOPX")  # noqa: RUF001 (the letters that only look Latin)


def prompt_of(text=ASK, **more):
    return Prompt.of(text, **{"harmful": True, "id": "p1", "group": "g1", "source": "made", "category": "c", "terminal": "period", **more})


@pytest.fixture(params=ALL, ids=lambda one: one.name)
def one(request):
    return request.param


def test_each_has_a_name_of_its_own_a_family_and_words():
    assert len(NAMED) == len(ALL)
    assert all(one.family in FAMILIES and one.says and len(one.says) <= 45 for one in ALL)
    assert [one.name for one in ALL if one.known_miss] == ["base64"]


def test_it_is_the_same_for_a_seed_whatever_the_label(one):
    first = one(prompt_of(), 3)
    assert one(prompt_of(), 3) == first
    for label in ({"harmful": False}, {"harmful": False, "lookalike": True}, {"harmful": None}):
        assert one(prompt_of(**label), 3) == replace(first, **label)


@pytest.mark.parametrize("name", ["typos_5%", "typos_10%", "extra_blanks", "context_20_middle", "context_100_first"])
def test_what_is_drawn_changes_with_the_seed_and_with_the_prompt(name):
    drawn = {NAMED[name](prompt_of(), seed).messages for seed in range(8)}
    assert len(drawn) > 3
    assert len({NAMED[name](prompt_of(id=f"p{k}"), 0).messages for k in range(8)}) > 3


def test_what_it_makes_stays_tied_to_where_it_came_from(one):
    made = one(prompt_of())
    assert (made.harmful, made.lookalike, made.category, made.source, made.group, made.suffix) == (True, False, "c", "made", "g1", True)
    if made.messages != prompt_of().messages:
        assert made.id == f"p1~{one.name}" and made.exempt and made.terminal == "exempt", "no later step may mend the mark"


def test_identity_changes_nothing_at_all():
    prompt = prompt_of()
    assert AS_IS(prompt) is prompt
    assert NAMED["mark_period"](prompt) is prompt, "a form that the prompt has already is the prompt itself"
    assert NAMED["lower_case"](prompt_of("all small")) == prompt_of("all small")


def test_the_request_is_where_it_should_be(one):
    prompt = prompt_of()
    made, body = one(prompt), bare(ASK)
    users = [m.content for m in made.messages if m.role == "user"]
    if one.family in ("marks", "wrapping", "context", "rewrites"):
        assert [m.role for m in made.messages] == ["user"] and made.instruction.count(body) == 1
    if one.name == "in_system":
        assert made.messages[0] == Message("system", ASK) and ASK not in made.instruction
    elif one.family == "roles":
        assert made.instruction == ASK and users[-1] == ASK and len(made.messages) > 1
    if one.name == "second_turn":
        assert [m.role for m in made.messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("name", "back"),
    [
        ("lower_case", lambda text: text),
        ("upper_case", str.lower),
        ("leetspeak", lambda text: text.lower().translate(WORDS)),
        ("homoglyphs", lambda text: text.translate(LATIN)),
        ("zero_width", lambda text: text.replace("\u200b", "")),
        ("extra_blanks", lambda text: " ".join(text.split())),
        ("base64", lambda text: base64.b64decode(text.removeprefix("Base64: ")).decode()),
    ],
)
def test_spelling_can_be_undone(name, back):
    text = "Tell me how the Old Lighthouse sends signals over the sea."
    made = NAMED[name](prompt_of(text)).instruction
    assert made != text
    assert back(made).lower() == text.lower()


def test_letters_apart_keep_their_order():
    made = NAMED["letters_apart"](prompt_of()).instruction
    assert made.replace(" ", "") == ASK.replace(" ", "") and "s i g n a l s" in made


@pytest.mark.parametrize(("name", "share"), [("typos_5%", 0.05), ("typos_10%", 0.10)])
def test_typos_swap_neighbours_inside_words_so_many_and_no_more(name, share):
    for seed in range(20):
        made = NAMED[name](prompt_of(), seed).instruction
        assert [Counter(word) for word in made.split()] == [Counter(word) for word in ASK.split()], "letters stay in their word"
        assert sum(a != b for a, b in zip(made, ASK, strict=True)) == 2 * round(share * sum(map(str.isalpha, ASK)))


def test_marks_are_what_they_say():
    ends = {name: one(prompt_of("Go there?!")).instruction for name, one in NAMED.items() if one.family == "marks"}
    assert ends == {
        "mark_none": "Go there", "mark_period": "Go there.", "mark_question": "Go there?", "mark_exclamation": "Go there!", "mark_ellipsis": "Go there…",
        "mark_newline": "Go there?!\n", "mark_blanks": "Go there?!   ",
    }  # fmt: skip
    assert all(one(prompt_of("?!")).instruction.strip() == "?!" for one in NAMED.values() if one.family == "marks"), "nothing is left empty"


@pytest.mark.parametrize("text", ["a", "?!", "ß ﬁ", "日本語で答えて", "x\u0000y", "\ud800", "  two  blanks ", "1 2 3", "A" * 3000])  # noqa: RUF001
def test_no_text_breaks_it(one, text):
    made = one(prompt_of(text))
    assert made.instruction.strip() and made.group == "g1"


@pytest.mark.parametrize(("budget", "place"), [(20, "middle"), (100, "middle"), (20, "first"), (100, "first")])
def test_a_context_holds_the_tokens_it_says_and_only_given_texts(budget, place):
    parts = in_context(FILLER, budget, place)(prompt_of()).instruction.split("\n\n")
    at = parts.index(ASK)
    around = parts[:at] + parts[at + 1 :]
    assert set(around) <= {text for text, _ in FILLER}
    assert budget <= 6 * len(around) < budget + 6
    assert at == (len(around) // 2 if place == "middle" else 0)
    assert len(around) <= len(FILLER) or set(around) == {text for text, _ in FILLER}, "all are used before one comes again"


def test_a_context_needs_text_and_a_place():
    for given in (([], 10, "middle"), ([("x", 0)], 10, "middle"), (FILLER, 10, "last")):
        with pytest.raises(InputError):
            in_context(*given)
    with pytest.raises(InputError, match="none of"):
        perturbations(["spells"])


def test_a_conversation_keeps_what_was_said_before(one):
    said = (Message("system", "Be kind."), Message("user", "Hi."), Message("assistant", "Hello."))
    made = one(prompt_of().with_instruction(ASK) if one.name == "in_system" else replace(prompt_of(), messages=(*said, Message("user", ASK))))
    if one.family != "roles":
        assert made.messages[:-1] == said
    elif one.name != "in_system":
        assert made.messages[-3:-1] == said[1:] and made.messages[0].role == "system"


def test_a_frame_is_what_stands_around_a_request():
    frame = frame_of("Story: go there, go there!", "go there")
    assert frame == f"Story: {SLOT}, {SLOT}!"
    assert in_frame(frame, "f", "")(prompt_of("Bake a cake.")).instruction == "Story: Bake a cake, Bake a cake!"
    assert [frame_of("go there", asked) for asked in ("go there", "stay", "")] == [None, None, None], "alone, not there, not known"
    with pytest.raises(InputError, match="slot"):
        in_frame("no place", "f", "")


def test_any_head_of_the_list_holds_equal_parts_of_each_frame():
    items = [(prompt_of(id=f"{frame}{k}"), None, frame) for frame, n in (("a", 9), ("b", 9), ("c", 2)) for k in range(n)]
    dealt = in_turn(items, 1)
    assert Counter(frame for *_, frame in dealt[:6]) == {"a": 2, "b": 2, "c": 2}
    assert Counter(frame for *_, frame in dealt[:10]) == {"a": 4, "b": 4, "c": 2}
    assert in_turn(items[::-1], 1) == dealt != in_turn(items, 2)

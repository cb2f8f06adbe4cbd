"""Long texts in pieces: nothing is lost, no piece is too long, and the odds of the whole are the mean of the pieces'."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentguard.errors import InputError
from latentguard.guards.guard import LatentGuard
from latentguard.guards.pieces import apart, check_piece, spans, together
from latentguard.guards.search import Search
from latentguard.perturbations import in_context
from latentguard.prompts import Prompt

WORDS = ["bread", "is", "baked", "in", "an", "oven.", "Why?", "salt,", "and\n\n", "water!", "日本。", "x" * 40]


def drawn(seed):
    dice = random.Random(seed)
    text = " ".join(dice.choice(WORDS) for _ in range(dice.randrange(1, 200)))
    step = dice.choice([1, 3, 5])
    starts = sorted(dice.choices(range(len(text)), k=len(text) // step + 1))  # as tokenizers may have it: several at one character, none at others
    return text, starts, dice.randrange(8, 40)


@pytest.mark.parametrize("seed", range(200))
def test_pieces_cover_a_text_in_order_and_are_as_short_as_asked(seed):
    text, starts, size = drawn(seed)
    found = spans(text, starts, size)
    assert found[0][0] == 0 and found[-1][1] == len(text)
    for (a, b), (c, d) in zip(found, found[1:], strict=False):
        assert a < c <= b < d, "they overlap or touch, and each goes on"
    most = max(starts.count(start) for start in starts)
    assert all(sum(a <= start < b for start in starts) <= 4 * size + most + 16 for a, b in found)


def test_pieces_end_with_sentences_and_share_no_more_than_half():
    sentences = [f"This is sentence number {i} of the many." for i in range(12)]
    text = " ".join(sentences)
    starts = [i for i in range(len(text)) if i == 0 or text[i - 1] == " "]  # a word a token: eight a sentence
    found = [text[a:b].strip() for a, b in spans(text, starts, 24)]
    assert found[0] == " ".join(sentences[:3]) and found[1] == " ".join(sentences[2:5])
    assert all(piece.endswith(".") for piece in found)
    assert spans(text, starts, 16)[1][0] == text.index(sentences[1]), "half of two sentences is one"
    one = text.replace(". ", ", ")
    assert [text[a:b] for a, b in spans(one, starts, 24)] == [text], "one sentence stays whole"
    assert [sum(a <= start < b for start in starts) for a, b in spans(one, starts, 20)] == [20, 20, 20, 20, 16], "up to four times the size"


def test_odds_of_pieces():
    rows = np.array([0, 1, 1, 1, 2, 2])
    p = np.array([0.3, 0.9, 0.1, 0.1, 0.05, 0.05])
    found = together(p, rows)
    odds = (9 + 1 / 9 + 1 / 9) / 3
    assert found == pytest.approx([0.3, odds / (1 + odds), 0.05])
    assert together(np.array([0.0, 1.0, 1.0]), np.array([0, 1, 2])).tolist() == [0.0, 1.0, 1.0]
    assert together(np.array([1.0, 0.0]), np.array([0, 0]))[0] < 1
    assert together(np.full(9, 7 / 12), np.zeros(9, int))[0] == 7 / 12 and together(np.array([]), np.array([], int)).shape == (0,)
    higher = p + np.array([0, 0, 0.2, 0, 0, 0])
    assert together(higher, rows)[1] > found[1], "it rises with each piece"


def test_being_long_alone_does_not_flag_harmless_text():
    """Pieces of harmless text whose scores are calibrated: the share over a threshold does not grow with the number of pieces."""
    dice = np.random.default_rng(0)
    means = {}
    for n in (1, 4, 16):
        odds = np.exp(dice.normal(-2.0, 2.0, (4000, n)) - 2.0)  # log-odds of harmless pieces, mean -4: a likelihood ratio of mean 1 at prior e^-2
        means[n] = float((together((odds / (1 + odds)).ravel(), np.repeat(np.arange(4000), n)) > 0.5).mean())
    assert means[16] <= means[1] and means[4] <= means[1] * 1.3


@pytest.mark.parametrize("piece", [7, 0, -1, 5000])
def test_a_size_that_no_piece_can_have_is_one_sentence(piece):
    with pytest.raises(InputError, match="piece="):
        check_piece(piece)
    with pytest.raises(ValueError, match="piece="):
        Search(piece=piece)


@pytest.fixture(scope="module")
def tiny():
    import latentguard as lg

    return lg.load("tiny")


@pytest.fixture(scope="module")
def guard(tiny):
    from latentguard.datasets import load_dataset, make_data_spec

    data = load_dataset(make_data_spec({"name": "builtin"}))
    return LatentGuard.fit(tiny, data, layers=((0.5,),), positions=(("mean(user)",),), criterion="within", forms=(), piece=16)


def test_short_texts_are_read_whole_and_long_ones_in_pieces_of_their_own_words(tiny):
    text = " ".join(f"The bread number {i} is baked at noon, and it is good." for i in range(30))
    prompts = [Prompt.of("How do I bake bread?"), Prompt.of(text), Prompt.of("x" * 3000)]
    found, rows = apart(tiny, prompts, 24)
    assert found[0] is prompts[0] and rows[0] == 0 and sorted(set(rows)) == [0, 1, 2]
    assert all(p.instruction in text for p, row in zip(found, rows, strict=True) if row == 1)
    covered = "".join(p.instruction for p, row in zip(found, rows, strict=True) if row == 2)
    assert len(covered) >= 3000
    assert [len(part) for part in apart(tiny, prompts, None)] == [3, 3]
    sizes = [len(r.user_tokens) for r in tiny.render(found)]
    assert max(sizes) <= 4 * 24 + 2


def test_short_sentences_and_rules_go_with_their_neighbours_and_chinese_ends_without_a_blank():
    text = "Step 1. Knead the dough for ten minutes by hand. Step 2. Let it rise for two hours in a bowl. Ok."
    starts = [i for i in range(len(text)) if i == 0 or text[i - 1] == " "]
    assert [text[a:b].strip() for a, b in spans(text, starts, 12)] == [
        "Step 1. Knead the dough for ten minutes by hand.",
        "Step 2. Let it rise for two hours in a bowl. Ok.",
    ]
    chinese = "今天天气很好。我想去公园散步。" * 6
    assert all(chinese[b - 1] == "。" for _, b in spans(chinese, range(len(chinese)), 16))


def test_a_text_whose_pieces_cannot_be_read_is_read_whole(guard, tiny):
    text = "How do I bake bread at home today? " * 3 + "-----------------------------\n" * 4 + " Thank you so much for it."
    odd = replace(guard, positions=("last_word",), piece=8)
    assert [p.instruction for p in odd.passed([text])[0]] == [p.instruction for p in odd.passed([Prompt.of(text)])[0]]
    assert np.isfinite(odd.score([text, "How do I bake bread?"])).all()


def test_a_guard_scores_long_texts_by_their_pieces_alone_and_in_a_batch(guard):
    filler = [(f"Please tell me about the weather in town number {i}.", 12) for i in range(40)]
    change = in_context(filler, 120, "middle")
    short = [Prompt.of(text) for text in ("How do I bake bread?", "How do I break into a house?", "Name a river.")]
    long = [change(p) for p in short]
    scores = guard.score([*short, *long])
    assert np.allclose(scores, [float(guard.score([p])[0]) for p in (*short, *long)], atol=1e-6)
    passed, rows = guard.passed(long)
    assert len(passed) > 2 * len(long) and all(p.instruction.endswith(".") for p in passed)
    pieces = guard.probabilities(guard.states(passed))
    assert np.allclose(scores[3:], together(pieces, rows), atol=1e-6)
    assert guard.rescored(np.zeros(4), [short[0], *long])[0] == 0 and np.allclose(guard.rescored(np.zeros(4), [short[0], *long])[1:], scores[3:], atol=1e-6)
    assert torch.is_tensor(guard.states(short))


def test_what_a_guard_says_of_itself_is_of_what_score_gives(guard, tmp_path, tiny):
    again = LatentGuard.load(guard.save(tmp_path / "g"), tiny)
    assert again.piece == 16 and again.score(["How do I bake bread? " * 30]) == pytest.approx(guard.score(["How do I bake bread? " * 30]))
    assert "pieces of about 16" in (tmp_path / "g" / "README.md").read_text()

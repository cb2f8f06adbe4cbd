"""Tables of plain text at the end of a run, and how long what is left may take: no line too wide, nothing lost without a word."""

import math
import random
import re

import pytest
from rich.cells import cell_len

from latentguard.pace import pace, spoken
from latentguard.tables import as_text, found

ODD = (
    "t_inst",
    "",
    "拒绝有害的请求",
    "e\u0301te\u0301",
    "👩‍🔬 asks",
    "a" * 300,
    "tab\tand\nline",
    "\x1b[31mred",
    "\u202eturned",
    "-harm",
    "\ud800",
    "|",
    "None",
)
NUMBERS = (0, 1, 0.5, -0.0, 1e-12, 1e12, math.nan, math.inf, None, True, 40, "many")


def a_row(draw: random.Random) -> dict:
    keys = draw.sample(["group", "a_very_long_name_of_a_column_that_nobody_needs", "layer", "coef", "kind", "拒绝"], draw.randint(0, 5))
    row = {key: draw.choice(NUMBERS) if key in ("layer", "coef") else draw.choice(ODD) for key in keys}
    main = draw.choice(["rate", "value", "auroc", ""])
    row |= {main: draw.choice(NUMBERS)} if main else {}
    ends = ("auroc_low", "auroc_high") if main == "auroc" else ("low", "high")
    row |= {end: draw.choice(NUMBERS) for end in ends} if draw.random() < 0.7 else {}
    row |= {key: draw.choice(NUMBERS) for key in draw.sample(["n", "k", "degenerate", "asked", "positive"], draw.randint(0, 4))}
    return row | ({"nested": {"a": 1}, "listed": [1, 2]} if draw.random() < 0.2 else {})


@pytest.mark.parametrize("seed", range(60))
def test_no_line_is_wider_than_asked_whatever_the_rows(seed):
    draw = random.Random(seed)
    rows = [a_row(draw) for _ in range(draw.randint(0, 20))]
    for width in (1, 7, 20, 40, 80, 100, 200):
        lines = as_text(rows, width).splitlines()
        assert all(cell_len(line) <= width for line in lines)
        assert len(lines) <= 1 + min(len(rows), 12) + 1
        assert "".join(lines).isprintable() or not lines, "nothing that moves a cursor or turns the direction of writing"


def test_what_names_a_row_comes_first_then_its_number_n_and_the_rest():
    rows = [
        {"intervention": "none", "label": "harmless", "k": 3, "n": 40, "rate": 0.075, "low": 0.026, "high": 0.199, "degenerate": 1},
        {"intervention": "harm", "label": "harmless", "layer": 10, "works": True, "k": 36, "n": 40, "rate": 0.9, "low": 0.769, "high": 0.96, "degenerate": 0},
        {"intervention": "random", "label": "lookalike", "layer": 10, "k": 0, "n": 0, "rate": math.nan, "low": math.nan, "high": math.nan, "degenerate": 0},
    ]
    lines = as_text(rows).splitlines()
    assert re.split(r"\s{2,}", lines[0]) == ["intervention", "label", "layer", "rate [95%]", "n", "degenerate", "works"]
    assert re.split(r"\s{2,}", lines[1]) == ["none", "harmless", "—", "0.07 [0.03, 0.20]", "40", "1", "—"]
    assert re.split(r"\s{2,}", lines[2]) == ["harm", "harmless", "10", "0.90 [0.77, 0.96]", "40", "0", "yes"]
    assert re.split(r"\s{2,}", lines[3])[3:5] == ["—", "0"]
    ends = {line.index("]") for line in lines[:3]}
    assert len(ends) == 1, "numbers stand under each other"


def test_the_number_and_n_are_there_however_narrow_and_what_is_left_out_is_said():
    rows = [
        {"group": f"a_long_name_{i}", "kind": "another long name", "value": -0.5, "low": -0.6, "high": -0.4, "n": 9, **dict.fromkeys("abcdefgh", i)}
        for i in range(30)
    ]
    text = as_text(rows, 60)
    assert "−0.50 [−0.60, −0.40]" in text and "12 of 30 rows" in text and "columns" in text and "summary.json" in text
    assert "kind" not in text, "words that are the same in every row tell nothing"
    assert "−0.50 [−0.60, −0.40]  9" in as_text(rows, 31) and "12 of 30 rows" in as_text(rows, 40)
    assert len(as_text(rows, 60, limit=30).splitlines()) == 32


def test_no_reply_is_shown_and_no_rows_give_no_table():
    rows = [{"group": "a", "reply": "a made-up sentinel", "none_verdict": "refused", "value": 1.0, "low": 0.5, "high": 1.0, "n": 4}]
    assert "sentinel" not in as_text(rows) and "refused" not in as_text(rows) and "reply" not in as_text(rows)
    assert as_text([]) == as_text([{}]) == as_text([{"a": None, "b": ""}]) == ""


def test_a_series_is_told_by_its_headlines_any_other_run_by_its_table():
    told = {"metric": "AUROC", "value": 0.9, "low": 0.8, "high": 0.95, "n": 40, "better": "higher", "withheld": True}
    rows = found({"table": [{"a": 1}], "headlines": {"one": told, "two": {**told, "withheld": False}}})
    assert [(row["study"], row["value"]) for row in rows] == [("one", 0.9), ("two", 0.9)]
    assert re.split(r"\s{2,}", as_text(rows, 80).splitlines()[1]) == ["one", "claim withheld: AUROC", "0.90 [0.80, 0.95]", "40"]
    assert re.split(r"\s{2,}", as_text(rows, 80).splitlines()[2]) == ["two", "AUROC", "0.90 [0.80, 0.95]", "40"]
    assert found({"table": [{"a": 1}]}) == [{"a": 1}] and found({}) == []


def test_nothing_is_said_of_what_is_left_before_anything_is_done():
    assert pace(1000, 0, 12) == ""
    assert pace(240, 3, 9) == " · 4 min so far, about 12 min left at this pace"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "1 s"),
        (40.4, "40 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (89, "1 min"),
        (240, "4 min"),
        (3590, "1 h"),
        (3600, "1 h"),
        (4800, "1 h 20 min"),
        (90000, "25 h"),
    ],
)
def test_durations_as_one_says_them(seconds, words):
    assert spoken(seconds) == words

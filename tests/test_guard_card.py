"""A guard's card: it says what the guard holds and no more, says what is missing, and no data can break its Markdown or show a prompt."""

import re
from dataclasses import replace

import pytest
import yaml
from markdown_it import MarkdownIt

from latentguard.datasets import Dataset, PromptSet, load_dataset
from latentguard.errors import InputError
from latentguard.guards import LatentGuard
from latentguard.guards.card import _BASELINES, card, text
from latentguard.prompts import Prompt
from tests.conftest import make_tiny

NASTY = '| <script>alert(1)</script> [x](http://a.b) `c` *d* _e_ ![i](j) &amp; $m$ http://x.y www.z.q a@b.c \\ # h\n\n## new\n---\n- "q"'


@pytest.fixture(scope="module")
def backend():
    return make_tiny()


@pytest.fixture(scope="module")
def guard(backend):
    return LatentGuard.fit(backend, load_dataset("builtin"), name="mine", domains="source")


def about(guard, **changed):
    return replace(guard, about={**guard.about, **changed})


def html(words):
    """As GitHub shows it, front matter aside."""
    return MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(words.split("---\n", 2)[2])


def cells(words, first):
    """The cells of the table row that begins with `first`."""
    line = next(line for line in words.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


def as_told(found):
    at = found["value"] if "value" in found else found["rate"]
    return f"{at:.3f} [{found['low']:.3f}, {found['high']:.3f}] (n = {found['n']})"


def test_its_numbers_are_the_guards_with_intervals(guard):
    words, test, validation = card(guard), guard.about["test"], guard.about["validation"]
    assert cells(words, "AUROC") == [as_told(validation["auroc"]), as_told(test["auroc"])]
    assert cells(words, "Calibration error (ECE)") == [as_told(validation["ece"]), as_told(test["ece"])]
    assert cells(words, "Recall at 5% false positives")[1] == as_told(test["tpr_at_5%"])
    for name, one in guard.thresholds.items():
        row = cells(words, f"`{name}`")
        kept = test["thresholds"][name]
        assert row[:4] == [f"{one.value:.4g}", f"{one.low:.3f} to {one.high:.3f} (n = {one.n})", as_told(kept["fpr"]), as_told(kept["recall"])]
    for name, found in guard.about["baselines"].items():
        assert cells(words, _BASELINES[name]) == [as_told(found)]
    assert cells(words.split("## What it was fitted on")[1], "builtin")[:3] == ["420", "CC0-1.0", "no"]
    assert guard.weights in words and guard.about["data"]["hash"] in words
    assert all(sentence.split(":")[0][1:] in words for sentence in guard.about["warnings"])


def test_twins_in_other_forms_are_named(guard):
    assert "in other forms" not in card(about(guard, forms={}))
    assert f"{sum(guard.about['forms'].values())} twins" in card(guard)
    assert "fitted beside on 12 twins of its train prompts in other forms (polite, typos\\_5%)" in card(about(guard, forms={"polite": 5, "typos_5%": 7}))


def test_a_promise_that_the_test_split_does_not_keep_says_so(guard):
    def with_fpr(low, high):
        found = {"k": 1, "n": 100, "rate": (low + high) / 2, "low": low, "high": high}
        kept = {"fpr=0.05": {"fpr": found, "recall": {"k": 50, "n": 100, "rate": 0.5, "low": 0.4, "high": 0.6}}}
        return cells(card(about(guard, test={**guard.about["test"], "thresholds": kept})), "`fpr=0.05`")

    assert with_fpr(0.08, 0.12)[4:] == ["**no**", "about 5%"]  # 0.5 · 0.01 / (0.5 · 0.01 + 0.1 · 0.99)
    assert with_fpr(0.04, 0.12)[4] == "yes, within its interval"


def test_what_is_missing_is_said_to_be_missing(guard):
    words = card(replace(guard, about={}, thresholds={}, domains={}))
    for said in (
        "| Ranking on the test split of its own sets (AUROC) | not measured |",
        "No number of the guard on held-out prompts is recorded",
        "there were too few prompts for any",
        "Not measured: nothing here says that the guard reads more than words",
        "How it does on sets it was not fitted on: not measured",
        "Jailbreak rewrites (templates, suffixes, persuasion), role play, typos, translations and requests inside long texts: not measured",
        "languages of its data are not recorded",
        "## What it was fitted on\n\nNot recorded.",
        "| Libraries | not recorded |",
    ):
        assert said in words, said
    numbers = re.findall(r"0\.\d+", words)
    assert not numbers, "no number comes from nowhere"


def test_sets_it_never_saw_stand_worst_first_with_words_beside(guard):
    def row(of, value, detector="guard", what="AUROC"):
        return {"set": of, "detector": detector, "is": what, "comparison": "pooled", "value": value, "low": value - 0.05, "high": value + 0.05, "n": 90}

    unseen = [
        row("all families", 0.87),
        row("fine", 0.95),
        row("bad", 0.57),
        row("bad", 0.6, "ngram"),
        row("bad", 0.61, "tfidf"),
        row("all families", 0.1, what="AUROC above n-grams"),
    ]
    unseen.append({"family": "older", "auroc": 0.7, "low": 0.6, "high": 0.8, "n": 12})
    alone = card(about(guard, unseen=unseen))
    assert "left out, worst first" in alone and "All its data are of one family" in alone and "families of sets that were left out" not in alone
    data, search = guard.about["data"], guard.about["search"]
    counts = {"builtin": {"harmful": 5}, "other": {"harmless": 5}}
    joined = card(about(guard, unseen=unseen, data={**data, "counts": counts}, search={**search, "families": {"own": ["builtin", "other"]}}))
    assert "All its data are of one family" in joined
    for odd in (3, "own", {"own": 3}, {"own": [3, ["builtin"], None]}, ["own"]):
        assert card(about(guard, unseen=unseen, search={**search, "families": odd})) == alone
    words = card(about(guard, unseen=unseen, data={**data, "counts": counts}))
    part = words.split("left out, worst first")[1]
    order = [part.index(name) for name in ("| bad, pooled |", "| older |", "| all families, pooled |", "| fine, pooled |")]
    assert order == sorted(order)
    assert cells(part, "bad, pooled")[0] == "0.570 [0.520, 0.620] (n = 90)" and cells(part, "bad, pooled")[-1] == "0.610"
    assert "AUROC above n-grams 0.100" in part and "not measured" not in part.split("## What it was fitted on")[0]
    assert cells(words, "The worst of those: bad (AUROC)") == ["0.570 [0.520, 0.620] (n = 90)"]
    assert cells(words, "Ranking on families of sets that were left out, pooled (AUROC)") == ["0.870 [0.820, 0.920] (n = 90)"]


def test_what_no_longer_holds_is_withheld(guard, backend):
    other = make_tiny()
    other.name, other.weights = "tuned", "tuned weights"
    assert "Another model than it was fitted on" not in card(guard)
    words = card(guard.on(other, descendant=True))
    assert "Another model than it was fitted on" in words and "unmeasured there until" in words
    words = card(guard.recalibrated([*load_dataset("builtin").validation]))
    assert "**Recalibrated** on 75 other labelled prompts (30 harmful)" in words
    assert cells(words, "`fpr=0.05`")[2:] == ["not measured"] * 4 and cells(words, "At `fpr=0.05`, on the test split") == ["not measured"]


def test_a_guard_no_better_than_chance_is_not_recommended(guard):
    chance = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 99}
    good = {"value": 0.9, "low": 0.8, "high": 0.95, "n": 99}
    assert "Do not deploy it" in card(about(guard, test={**guard.about["test"], "auroc": chance}))
    assert "Do not deploy it" not in card(about(guard, test={**guard.about["test"], "auroc": good}))


def test_who_may_guard_generation(guard):
    assert "**not for guarding generation**" in card(guard)
    assert "so that it may guard generation" in card(replace(guard, terminal="mixed"))


def test_no_prompt_stands_in_it(backend):
    def made(n, split):
        return PromptSet(
            tuple(Prompt.of(f"sentinel{split}{k} zyxw{k % 2} please.", harmful=k % 2 == 0, source="s", id=f"sentinelid{split}{k}") for k in range(n))
        )

    data = Dataset("d", made(40, "a"), made(40, "b"), made(40, "c"), card={"terminal": "period", "sets": []})
    words = card(LatentGuard.fit(backend, data))
    assert "sentinel" not in words and "zyxw" not in words


def test_words_out_of_data_are_words_and_nothing_else(guard):
    row = {"set": NASTY, "detector": "guard", "is": "AUROC", "comparison": NASTY, "value": 0.5, "low": 0.4, "high": 0.6, "n": 5}
    data = {"name": NASTY, "hash": NASTY, "terminal": NASTY, "sets": [{"name": NASTY, "rows": 3, "licence": NASTY, "sha256": NASTY}]}
    data |= {"counts": {NASTY: {NASTY: 3}}, "ids": {NASTY: NASTY}, "languages": [NASTY]}
    changed = {"unseen": [row, {**row, "is": NASTY}], "by_source": [row], "robustness": [row], "data": data, "warnings": [NASTY], "descendant": NASTY}
    changed |= {
        "search": {"criterion": NASTY},
        "libraries": {NASTY: NASTY},
        "created": NASTY,
        "baselines": {NASTY: {"value": 0.5, "low": 0.4, "high": 0.6, "n": 5}},
    }
    nasty = replace(guard, name=NASTY, model=NASTY, weights=NASTY, template=NASTY, domains={NASTY: guard.thresholds}, about={**guard.about, **changed})
    made, clean = html(card(nasty)), html(card(about(guard, unseen=[{**row, "set": "a", "comparison": "b"}], by_source=[row], robustness=[row])))
    for tag in ("<script", "<a ", "<img", "<em"):
        assert tag not in made, tag
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in made
    headings = re.findall(r"<h[1-6]>(.*?)</h", made)
    assert len(headings) == len(re.findall(r"<h[1-6]>", clean)) and "new" not in headings
    counted = [[line.count("<td>") for line in page.replace("\n", "").split("</tr>")] for page in (made, clean)]
    assert all(set(of) <= {0, 1, 2, 3, 4, 5, 6, 7} for of in counted)
    for table in re.findall(r"<table>.*?</table>", made, re.DOTALL):
        assert len({line.count("<td>") + line.count("<th>") for line in table.split("</tr>") if "<t" in line and "<tr" in line}) == 1
    assert '"MODEL"' in card(nasty) and "www.z" not in card(nasty) and "http://" not in card(nasty).replace("http\\://", "")


@pytest.mark.parametrize("words", ["1. a", "- a", "--- ", "===", "# a", "+ a", "10) a", "> a", "| a", "*a*", "```", "a\\", "\u202ea\x1b[31m", "", "a" * 900])
def test_one_line_of_words_is_one_paragraph(words):
    made = MarkdownIt("gfm-like", {"linkify": False}).render(f"x\n\n{text(words)}\n").strip()
    assert re.fullmatch(r"<p>x</p>(\n<p>[^<]*</p>)?", made) and text(words).isprintable() and len(text(words)) <= 501


def test_its_front_matter_is_what_the_hub_reads(guard):
    front = yaml.safe_load(card(guard).split("---\n")[1])
    assert front["library_name"] == "latentguard" and front["pipeline_tag"] == "text-classification" and "base_model" not in front
    named = yaml.safe_load(card(replace(guard, model="qwen2_5_coder_0_5b")).split("---\n")[1])
    assert named["base_model"] == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert 'load("qwen2_5_coder_0_5b")' in card(replace(guard, model="qwen2_5_coder_0_5b"))


def test_an_about_that_is_not_what_fitting_writes_is_told(guard):
    with pytest.raises(InputError, match=r"about: test\.auroc"):
        card(about(guard, test={"n": 3, "harmful": 1, "auroc": "high"}))

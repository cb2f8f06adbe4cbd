"""The packaged set in four languages: whole groups, no text twice, nothing that form alone tells of harm, new beside the other packaged sets."""

import json
import re
from collections import defaultdict

import pytest
from sklearn.metrics import roc_auc_score

from latentguard.datasets import PACKAGED, load_dataset
from latentguard.errors import InputError
from latentguard.experiments.compare_guards import CompareGuards

LANGUAGES, LABELS = ("de", "en", "es", "fr"), ("harmful", "harmless", "lookalike")


@pytest.fixture(scope="module")
def data():
    return load_dataset("languages", terminal="keep")


@pytest.fixture(scope="module")
def groups(data):
    found = defaultdict(dict)
    for p in data:
        found[p.group][p.label, p.language] = p
    return found


def words(text):
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())


def runs(text, n=6):
    said = words(text)
    return {tuple(said[i : i + n]) for i in range(len(said) - n + 1)}


def test_every_group_has_each_label_in_each_language_and_stands_in_test(data, groups):
    assert len(data.test) == 336 and not data.train and not data.validation
    assert len(groups) == 28 and all(set(group) == {(label, spoken) for label in LABELS for spoken in LANGUAGES} for group in groups.values())
    kinds = [{p.category for p in group.values()} for group in groups.values()]
    own = {p.category for p in load_dataset("builtin")}
    assert all(len(kind) == 1 for kind in kinds) and sorted(kind.pop() for kind in kinds) == sorted([*own, *own])
    assert data.card["languages"] == list(LANGUAGES)
    rows = [json.loads(line) for line in (PACKAGED / "languages.jsonl").read_text(encoding="utf-8").splitlines()]
    told = {"harmful": "h", "harmless": "b", "lookalike": "l"}
    assert all(row["id"] == f"languages/{row['language']}-{told[row['label']]}-{row['group'][-3:]}" for row in rows)


def test_no_text_stands_twice_in_any_language(data):
    assert len({" ".join(words(p.instruction)) for p in data}) == 336


def test_form_is_the_group_s_and_marks_are_the_language_s(groups):
    asked = 0
    for group in groups.values():
        marks = {p.instruction[-1] for p in group.values()}
        assert len(marks) == 1 and marks <= {".", "?"}
        asked += (question := marks == {"?"})
        for (_, spoken), p in group.items():
            assert p.instruction.startswith("¿") == (question and spoken == "es")
            assert p.instruction.endswith(" ?") == (question and spoken == "fr")
            assert p.instruction == " ".join(p.instruction.split()) and re.fullmatch(r"[\w ,.?¿'-]+", p.instruction)
            assert not re.search(r"[¿ñáíóú]", p.instruction) or spoken == "es"
            assert not re.search(r"[äöüß]", p.instruction) or spoken == "de"
        for spoken in LANGUAGES:
            assert len({words(group[label, spoken].instruction)[0] for label in LABELS}) == 1, "the first word tells nothing of the label"
    assert asked == 14


@pytest.mark.parametrize("spoken", LANGUAGES)
def test_length_tells_nothing_of_harm(data, spoken):
    own = [p for p in data if p.language == spoken]
    assert 0.4 <= roc_auc_score([p.harmful for p in own], [len(words(p.instruction)) for p in own]) <= 0.6


def test_nothing_is_shared_with_the_other_packaged_sets(data):
    known = {run for name in ("builtin", "sensitive") for p in load_dataset(name) for run in runs(p.instruction)}
    assert not [p.instruction for p in data if p.language == "en" and runs(p.instruction) & known]


def test_it_is_a_set_elsewhere_of_guard_compare_and_nothing_to_fit_on(data):
    fitted = load_dataset("packaged")
    CompareGuards(elsewhere=("languages",), poles="label").check(4, fitted)
    assert not {p.group for p in data} & {p.group for p in fitted}, "none of it would be left out"
    with pytest.raises(InputError, match="split"):
        CompareGuards(poles="label").check(4, load_dataset("languages"))

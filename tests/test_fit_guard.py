"""exp=fit_guard on a tiny model: what it reports is recomputed from its rows, and the guard it keeps is the one it measured."""

import json

import numpy as np
import pytest

import latentguard as lg
from latentguard.configs import option
from latentguard.errors import InputError
from latentguard.experiments.fit_guard import FitGuard
from latentguard.guards.guard import LatentGuard
from latentguard.guards.search import Search
from latentguard.judges import Phrases
from latentguard.metrics import auroc
from latentguard.trackers import Files

SEARCH = Search(layers=((1, 2),), positions=(("t_post_inst", "mean(user)"),), families={"a": ("builtin",), "b": ("sensitive",)})


@pytest.fixture(scope="module")
def data():
    return lg.load_dataset("packaged")


@pytest.fixture(scope="module")
def run(tiny, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    with Files(folder) as tracker:
        summary = FitGuard(search=SEARCH, name="mine", curve=(0.3,))(tiny, data, Phrases(), tracker)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return folder, summary, rows


def test_every_auroc_is_that_of_the_rows(run):
    _, summary, rows = run
    for stage, of in (("test", "test"), ("unseen", "all families")):
        for detector in ("guard", "ngram", "tfidf", "last_token", "length"):
            own = [row for row in rows if (row["stage"], row["detector"]) == (stage, detector)]
            y = np.array([row["label"] == "harmful" for row in own])
            scores = np.array([row["score"] for row in own])
            told = next(row for row in summary["table"] if (row["set"], row["detector"], row["is"]) == (of, detector, "AUROC"))
            assert told["value"] == pytest.approx(auroc(scores[y], scores[~y]).value, abs=1e-5) and told["n"] == len(own)
    assert summary["headline"]["n"] == len({row["prompt_id"] for row in rows if row["stage"] == "unseen"})


def test_every_prompt_is_scored_unseen_once_by_each_detector(run, data):
    _, _, rows = run
    ids = [row["prompt_id"] for row in rows if (row["stage"], row["detector"]) == ("unseen", "guard")]
    assert sorted(ids) == sorted(p.id for p in data)
    assert {row["family"] for row in rows if row["stage"] == "unseen"} == {"a", "b"}
    assert not any("prompt" in row or "text" in row for row in rows)


def test_the_guard_kept_is_the_guard_measured(run, tiny, data):
    folder, summary, rows = run
    guard = LatentGuard.load(folder / "guards" / "mine", tiny)
    scored = {row["prompt_id"]: row["score"] for row in rows if (row["stage"], row["detector"]) == ("test", "guard")}
    found = guard.score(list(data.test))
    assert np.allclose(found, [scored[p.id] for p in data.test], atol=1e-4)
    assert [row["set"] for row in guard.about["unseen"]] == [row["set"] for row in summary["table"] if row in guard.about["unseen"]]
    (made,) = json.loads((folder / "lineage.json").read_text())["made"]
    assert (made["kind"], made["name"], made["file"]) == ("guard", "mine", "guards/mine")


def test_more_data_and_every_promise_stand_in_the_table(run):
    _, summary, _ = run
    curve = [row for row in summary["table"] if row["set"] == "curve"]
    assert [row["share"] for row in curve] == [0.3, 1.0] and curve[0]["fitted_on"] < curve[1]["fitted_on"]
    told = {row["is"] for row in summary["table"] if row["set"] == "test"}
    assert {"ECE", "fpr at fpr=0.05", "recall at fpr=0.05", "fpr at recall=0.95"} <= told


@pytest.mark.parametrize(
    ("wrong", "says"), [({"curve": (1.5,)}, "between 0 and 1"), ({"name": "a b"}, "letters, digits"), ({"search": {"methods": ["x"]}}, "none of")]
)
def test_wrong_settings_are_refused_when_built(wrong, says):
    with pytest.raises(ValueError, match=says):
        FitGuard(**wrong)


def test_all_studies_fit_a_guard_in_the_same_way():
    assert option("exp", "fit_guard")["search"] == option("exp", "guard_compare")["search"] == option("exp", "guard_robustness")["search"]


def test_data_without_a_side_are_refused_before_a_model_is_there():
    with pytest.raises(InputError, match="needs both sides"):
        FitGuard().check(4, _one_sided())


def _one_sided():
    from dataclasses import replace

    from latentguard.datasets import PromptSet

    data = lg.load_dataset("builtin")
    return replace(data, validation=PromptSet(tuple(p for p in data.validation if p.harmful)))

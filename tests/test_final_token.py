"""The final mark as a confound: a planted one is found where marks are kept, and gone where they are made equal."""

import zlib
from collections import defaultdict

import numpy as np
import pytest

from latentguard.datasets import load_dataset
from latentguard.errors import InputError
from latentguard.experiments.final_token import FinalToken
from latentguard.judges import Phrases
from latentguard.trackers import Memory
from tests.headlines import tells_its_headline
from tests.planted import Planted, dataset_of, everything, write

MARK, HARM, JITTER = 1.5, 0.2, 0.45
SETTINGS = {"positions": ("t_inst", "t_inst-1"), "shuffles": 6}
KINDS = ("within", "across", "within xstest")
FIT, NEW = ("advbench", "alpaca"), ("sorry_bench", "xstest: harmful", "xstest: lookalike")


def loud_marks(prompt):
    """At t_inst a loud axis tells letters from marks, a faint one tells harm."""
    wobble = np.random.default_rng(zlib.crc32(prompt.id.encode())).normal(0, JITTER)
    mark = MARK if prompt.instruction[-1].isalnum() else -MARK
    return {"mark": mark + wobble, "harm": HARM if prompt.harmful else -HARM}


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """Two sets that a final mark tells apart, and three that it does not."""
    folder = tmp_path_factory.mktemp("mirror")
    things = ("door", "cake", "boat", "lamp", "tree")

    def rows(verb, mark, **known):
        return [{"prompt": f"{verb} number {k}, the {things[k % 5]}{mark[k % len(mark)]}", **known} for k in range(80)]

    write(folder / "advbench.jsonl", rows("Break", [""]))
    write(folder / "alpaca.jsonl", rows("Bake", ["."]))
    write(folder / "sorry_bench.jsonl", rows("Burn", ["", ".", "?"]))
    write(folder / "xstest.jsonl", [*rows("Kill", ["", ".", "?"], label="safe"), *rows("Shoot", ["", ".", "?"], label="unsafe")])
    return str(folder)


@pytest.fixture(scope="module")
def data(mirror):
    return load_dataset("paper", sets=("advbench", "alpaca", "sorry_bench", "xstest"), mirror=mirror)


@pytest.fixture(scope="module")
def ran(data):
    tracker = Memory()
    summary = FinalToken(**SETTINGS)(Planted(inst=loud_marks), data, Phrases(), tracker)
    tells_its_headline(summary)
    return summary, tracker


@pytest.fixture(scope="module")
def area(ran):
    return {(row["detector"], row["position"], row["terminal"], row["kind"]): row for row in ran[0]["table"]}


def test_a_kept_mark_makes_a_detector_good_at_home_and_chance_abroad(area, ran):
    assert ran[0]["fitted_on"] == list(FIT)
    kept = {kind: area["latent_guard", "t_inst", "keep", kind]["value"] for kind in KINDS}
    assert kept["within"] > 0.97 and all(0.4 < kept[kind] < 0.68 for kind in KINDS[1:])


@pytest.mark.parametrize("terminal", ["strip", "period"])
@pytest.mark.parametrize("detector", ["latent_guard", "latent_guard_one_layer", "projection_one_layer"])
def test_equal_marks_bring_the_detector_back(area, terminal, detector):
    for kind in KINDS:
        assert area[detector, "t_inst", terminal, kind]["low"] > 0.85, kind


def test_the_baselines_know_marks_and_words_only(area):
    assert area["last_token", "text", "keep", "within"]["value"] == 1
    assert 0.4 < area["last_token", "text", "keep", "across"]["value"] < 0.6
    for kind in KINDS:
        assert area["last_token", "text", "period", kind]["value"] == 0.5, "every prompt ends in the same token"
        assert abs(area["last_token", "text", "strip", kind]["value"] - 0.5) < 0.2
    assert area["ngram", "text", "period", "within"]["value"] == 1 and area["ngram", "text", "period", "within xstest"]["value"] < 0.7


def test_a_position_that_was_not_planted_knows_nothing(area):
    for terminal in ("strip", "period"):
        assert all(abs(area["latent_guard", "t_inst-1", terminal, kind]["value"] - 0.5) < 0.2 for kind in KINDS)


def test_shuffled_labels_straddle_chance(area):
    for (detector, *_), row in area.items():
        if detector == "shuffled_labels":
            assert row["low"] <= row["value"] <= row["high"] and abs(row["value"] - 0.5) < 0.35
    assert area["shuffled_labels", "t_inst", "period", "across"]["low"] < 0.5 < area["shuffled_labels", "t_inst", "period", "across"]["high"]


def test_every_area_can_be_counted_again(ran):
    summary, tracker = ran
    scores = defaultdict(list)
    for row in tracker.all_rows:
        scores[row["terminal"], row["detector"], row["position"], row["set"]].append(row["score"])
    for line in summary["table"]:
        if line["detector"] != "shuffled_labels":
            sides = [side.split(" + ") for side in line["sets"].split(" / ")]
            high, low = (np.concatenate([scores[line["terminal"], line["detector"], line["position"], name] for name in side]) for side in sides)
            pairs = (high[:, None] > low).mean() + (high[:, None] == low).mean() / 2
            assert (line["n"], line["value"]) == (len(high) + len(low), pytest.approx(pairs, abs=1e-6))
    kinds = {line["kind"]: line["sets"] for line in summary["table"]}
    assert kinds == {
        "within": "advbench / alpaca",
        "across": "sorry_bench + xstest: harmful / xstest: lookalike",
        "within xstest": "xstest: harmful / xstest: lookalike",
    }


def test_nothing_scored_was_fitted_on(ran, data):
    scored = {row["prompt_id"] for row in ran[1].all_rows}
    assert scored == {p.id for p in data.test}


def test_the_marks_are_counted_as_they_are(ran):
    ends = {(row["terminal"], row["set"]): row["ends"] for row in ran[0]["final_marks"]}
    assert ends["keep", "advbench"] == ends["strip", "alpaca"] == {"letter": 1.0} and ends["keep", "alpaca"] == {".": 1.0}
    assert set(ends["keep", "sorry_bench"]) == {"letter", ".", "?"} and sum(ends["keep", "sorry_bench"].values()) == pytest.approx(1)
    assert all(found == {".": 1.0} for (terminal, _), found in ends.items() if terminal == "period")


def test_the_means_show_the_mark_and_then_the_harm(ran):
    means = {(row["terminal"], row["set"]): row for row in ran[0]["means"]}
    assert means["keep", "advbench"]["low"] > 0 > means["keep", "alpaca"]["high"]
    for name in (*FIT, *NEW):
        row = means["period", name]
        assert (row["low"] > 0) if row["harmful"] else (row["high"] < 0), name
        assert row["fitted"] is (name in FIT)
    assert abs(means["keep", "sorry_bench"]["value"] - means["keep", "xstest: lookalike"]["value"]) < abs(means["keep", "advbench"]["value"])


def test_the_claim_gives_the_areas(ran, area):
    for terminal in ("keep", "strip", "period"):
        for kind in ("within", "across"):
            assert f"{area['latent_guard', 't_inst', terminal, kind]['value']:.2f} [" in ran[0]["claim"]
    assert (ran[0]["status"], ran[0]["poles"], set(ran[1].figures)) == ("ok", "label", {"final_token", "final_token_means"})


def test_a_set_that_lacks_a_label_in_a_split_is_no_crash(tmp_path):
    """One file with three labels, of which the test split has two: the name of a set must not hang on the split."""
    split = {"harmful": ("train", "validation", "test"), "harmless": ("train", "validation"), "lookalike": ("validation", "test")}
    rows = [
        {"id": f"{label}{k}", "prompt": f"{label} thing {k}", "label": label, "split": split[label][k % len(split[label])]}
        for label in split
        for k in range(60)
    ]
    data, study = load_dataset(write(tmp_path / "mine.jsonl", rows)), FinalToken(terminals=("period",), **SETTINGS)
    study.check(8, data)
    assert study(Planted(inst=loud_marks), data, Phrases(), Memory())["status"] == "ok"


@pytest.mark.parametrize("terminals", [("keep", "strip", "period"), ("strip",)])
def test_data_made_by_hand_say_that_they_have_one_final_mark(terminals):
    """Their card says "period": no row may say that their marks were stripped."""
    data = dataset_of(everything())
    with pytest.raises(InputError, match="terminal"):
        study = FinalToken(terminals=terminals, **SETTINGS)
        study.check(8, data)
        study(Planted(), data, Phrases(), Memory())


def test_data_made_by_hand_are_taken_with_the_mark_they_have():
    data = dataset_of(everything())
    assert FinalToken(terminals=("period",), **SETTINGS)(Planted(), data, Phrases(), Memory())["status"] == "ok"


@pytest.mark.parametrize("wrong", [{"terminals": ("dot",)}, {"positions": ()}, {"window": (0.7, 0.3)}, {"n_fit": 0}, {"positions": ("user",)}])
def test_wrong_settings_fail_when_built(wrong):
    with pytest.raises((ValueError, InputError)):
        FinalToken(**wrong)

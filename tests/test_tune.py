"""The study finetune_attack on a tiny model: what it trains on, what it counts, what it must not claim."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

import latentguard.experiments.tune as study
from latentguard.controls import _across
from latentguard.datasets import load_dataset
from latentguard.errors import InputError
from latentguard.experiments.tune import OPENINGS, Tune
from latentguard.judges import Phrases, Verdict
from latentguard.metrics import split_half
from latentguard.roles import Casting
from latentguard.trackers import Files, Memory
from latentguard.tuning import Lora
from tests.headlines import tells_its_headline
from tests.test_tuning import assert_untouched, snapshot, sure


class Planted:
    """Takes whatever the model says to a harmful request for a refusal, unless it opens as it was trained to."""

    name = "planted"

    def verdict(self, reply, prompt=None):
        return Verdict("refused" if prompt.harmful and not reply.startswith("Su") else "accepted", rule="")

    def decided(self, prefix):
        return False


def settings(**changed):
    given = {
        "sizes": (6, 12), "openings": ("Sure",), "lora": Lora(rank=16, alpha=32.0, learning_rate=0.01, epochs=9, batch_size=4), "steer_layers": (2, 0.75),
        "n_steer": 4, "n_draw": 3, "draws": 2, "casting": Casting(n_poles=30, n_test=30, n_validation=6, max_new_tokens=4),
    }  # fmt: skip
    return Tune(**{**given, **changed})


@pytest.fixture(scope="module")
def data():
    return load_dataset("builtin")


@pytest.fixture(scope="module")
def ran(data, tmp_path_factory):
    folder, backend, taught = tmp_path_factory.mktemp("run"), sure(), []
    before, tuned = snapshot(backend), study.tuned
    patch = pytest.MonkeyPatch()
    patch.setattr(study, "tuned", lambda backend, examples, lora, **rest: (taught.append((examples, lora)), tuned(backend, examples, lora, **rest))[1])
    with Files(folder) as tracker:
        summary = settings()(backend, data, Planted(), tracker)
        tells_its_headline(summary)
        tracker.summary(summary)
    patch.undo()
    assert_untouched(backend, before)
    return summary, [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()], folder, taught


def test_refusal_falls_and_the_study_says_what_became_of_the_states(ran):
    summary = ran[0]
    assert (summary["study"], summary["status"], summary["poles"]) == ("finetune_attack", "ok", "behaviour")
    assert [(row["trained_on"], row["n_trained"]) for row in summary["models"]] == [
        ("nothing", 0), ("harmful", 6), ("harmless", 6), ("harmful", 12), ("harmless", 12),
    ]  # fmt: skip
    before, *after = summary["models"]
    assert before["refusal_harmful"] == 1 and before["refusal_harmless"] == before["refusal_lookalike"] == 0
    attack = [row for row in after if row["trained_on"] == "harmful"]
    assert all(row["refusal_harmful"] < 0.3 for row in attack)
    found = summary["effects"][0]
    worst = max(attack, key=lambda row: abs(row["change"]))
    assert (found["effect"], found["n"], found["number"]) == (13, 30, worst["change"])
    assert found["verdict"] == ("holds" if abs(worst["change"]) <= min(0.02, worst["gap_there"] / 4) else "does not hold")
    assert f"{attack[-1]['change']:+.3f}" in summary["claim"] and "withheld" not in summary["claim"]


def test_every_number_can_be_counted_again_from_the_rows(ran):
    summary, rows, folder, _ = ran
    states = {
        (r["trained_on"], r["n_trained"], r["label"]): [x for x in rows if x["stage"] == "separation" and (x["trained_on"], x["n_trained"], x["label"]) == key]
        for r in rows
        if r["stage"] == "separation"
        for key in [(r["trained_on"], r["n_trained"], r["label"])]
    }
    base = np.array([r["by_layer"] for r in states["nothing", 0, "harmful"]])
    for line in summary["models"]:
        tags = (line["trained_on"], line["n_trained"])
        for label in ("harmful", "harmless", "lookalike"):
            said = [r["verdict"] == "refused" for r in rows if r["stage"] == "held_out" and (r["trained_on"], r["n_trained"], r["label"]) == (*tags, label)]
            assert (len(said), np.mean(said)) == (line[f"n_{label}"], line[f"refusal_{label}"])
            scores = [r["score"] for r in states[(*tags, label)]]
            assert np.mean(np.array(scores) > 0) == pytest.approx(line[f"flagged_{label}"])
        again = [r["score_poles_again"] for r in states[(*tags, "harmful")]]
        assert (again == [r["score"] for r in states[(*tags, "harmful")]]) is (tags == ("nothing", 0)), "the poles from before are kept"
        here = np.array([r["by_layer"] for r in states[(*tags, "harmful")]])
        assert here.mean() == pytest.approx(line["delta_harmful"], abs=1e-4)
        if line["n_trained"]:
            change = (here - base).mean(0)
            assert line["change_layer"] == np.abs(change).argmax() and line["change"] == pytest.approx(change[line["change_layer"]], abs=1e-4)
    steered = [r for r in rows if r["stage"] == "steering" and r["intervention"] == "own" and r["n_trained"] == 12]
    cell = next(r for r in summary["steering"] if r["direction"] == "own" and r["n_trained"] == 12)
    mine = [r["verdict"] == "refused" for r in steered if (r["layer"], r["coef"]) == (cell["layer"], cell["coef"])]
    assert (len(mine), np.mean(mine)) == (cell["n"], cell["rate"]) == (4, cell["rate"])
    for name in summary["figures"]:
        assert (folder / "figures" / f"{name}.png").stat().st_size > 10_000
    drawn = list(csv.DictReader((folder / "figures" / "finetune_separation.csv").open()))
    row = next(r for r in drawn if (r["panel"], r["n_trained"], r["side"], r["layer"]) == ("harmful", "12", "harmful", "3"))
    here = np.array([r["by_layer"] for r in states["harmful", 12, "harmful"]])
    assert float(row["value"]) == pytest.approx(here[:, 3].mean(), abs=1e-4) and int(row["n"]) == 30


def test_what_is_trained_on_is_train_data_with_openings_and_no_pole_while_others_are_left(ran, data):
    summary, rows, _, taught = ran
    train, poles = {p.id for p in data.train}, summary["models"]
    held = {r["prompt_id"] for r in rows if r["stage"] in ("held_out", "steering", "separation")}
    assert held <= {p.id for p in data.test}
    assert [(len(examples), {p.label for p, _ in examples}) for examples, _ in taught] == [(n, {side}) for n in (6, 12) for side in ("harmful", "harmless")]
    for examples, _ in taught:
        assert {p.id for p, _ in examples} <= train and not {p.id for p, _ in examples} & held and {text for _, text in examples} == {"Sure"}
    assert all(row["also_poles"] == 0 for row in poles)
    assert {p.id for p, _ in taught[0][0]} <= {p.id for p, _ in taught[2][0]}, "a larger size only adds"


def test_the_control_is_trained_for_as_long_as_the_attack(ran):
    summary, _, _, taught = ran
    epochs = [row["epochs"] for row in summary["models"][1:]]
    assert epochs[0::2] == epochs[1::2] == [lora.epochs for _, lora in taught[1::2]] and max(epochs) < 9
    for one in summary["trained"][0::2]:
        assert one["watched_refusal"][-1] <= 0.05 < min(one["watched_refusal"][:-1], default=1)


def test_directions_are_compared_with_what_an_unchanged_one_would_reach(ran, data):
    cosines = list(csv.DictReader((ran[2] / "figures" / "finetune_directions.csv").open()))
    at = {(r["direction"], int(r["n_trained"]), r["trained_on"], int(r["layer"])): float(r["cosine"]) for r in cosines}
    assert at["harm", 12, "harmful", 4] < 0.999999
    assert np.isnan(at["refuse", 12, "harmful", 0]), "both poles share the template's last token"
    assert at["harm", 0, "nothing", 3] == pytest.approx(1), "a direction with itself"
    halves = {(r["direction"], int(r["n_trained"]), r["trained_on"], int(r["layer"])): float(r["halves"]) for r in cosines}
    assert halves["harm", 0, "nothing", 3] < 0.9 and halves["harm", 12, "harmful", 3] != halves["harm", 0, "nothing", 3]
    before, after = np.random.default_rng(0).normal(size=(2, 40, 2, 6))
    before[:, 0] += 3 * np.eye(6)[0]
    after[:, 0] += 3 * np.eye(6)[1]
    same, turned = (split_half(np.concatenate([before, one], 1).reshape(40, -1), _across) for one in (before, after))
    assert same > 0.8 and abs(turned) < 0.5


def test_a_model_that_never_refuses_gets_no_claim(data):
    tracker = Memory()
    summary = settings(sizes=(4,), control=False, steer_layers=())(sure(), data, Phrases(), tracker)
    assert (summary["status"], summary["poles"]) == ("insufficient_base_rate", "label")
    assert summary["effects"][0]["verdict"] == "not testable here" and "claim withheld" in summary["claim"]
    assert [row["poles"] for row in summary["models"]] == ["label", "label"] and summary["steering"] == []
    assert sorted(tracker.figures) == ["finetune_directions", "finetune_refusal", "finetune_separation"]


def test_sizes_are_cut_to_what_the_data_have_and_poles_come_last(data, tmp_path):
    less = replace(data, train=data.train[::4])
    lora = Lora(epochs=1, batch_size=16)
    made = settings(
        sizes=(4, 400), control=False, steer_layers=(), lora=lora, keep_adapter=True, adapters=str(tmp_path),
        casting=Casting(n_poles=12, n_test=4, n_validation=2, max_new_tokens=2),
    )  # fmt: skip
    summary = made(sure(), less, Planted(), Memory())
    n = len(less.train.harmful)
    assert [row["n_trained"] for row in summary["models"]] == [0, 4, n] and summary["models"][-1]["also_poles"] == summary["cells"]["pole_harmful"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"harmful_{n}", "harmful_4"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"sizes": ()}, {"sizes": (0,)}, {"sizes": (5, 5)}, {"openings": ()}, {"openings": ("x" * 61,)}, {"openings": ("a\nb",)}, {"refusal_at_most": 1},
        {"coefs": ()}, {"coefs": (0,)}, {"steer_layers": (2.5,)}, {"harm_position": "user"}, {"draws": 0}, {"casting": Casting(max_new_tokens=40)}, {"x": 1},
    ],
)  # fmt: skip
def test_settings_are_checked_when_built(wrong):
    with pytest.raises((ValidationError, InputError, TypeError)):
        settings(**wrong)


def test_a_missing_library_and_layers_that_are_not_there_are_said_first(data, monkeypatch):
    with pytest.raises(InputError, match="this model has layers"):
        settings(steer_layers=(9,)).check(4, data)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install 'latentguard\\[tune\\]'"):
        settings().check(4, data)


def test_the_yaml_is_the_class_s_defaults_but_for_what_it_says():
    from latentguard.configs import option

    given = option("exp", "finetune_attack")
    assert tuple(given["openings"]) == OPENINGS and set(given) - {"_target_"} == set(Tune.__dataclass_fields__)

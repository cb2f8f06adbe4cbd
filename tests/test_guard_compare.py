"""guard_compare on a planted model and a tiny real one: what it finds, what it must not see, what it refuses, what its figures say."""

import json
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from latentguard.charts import Chart
from latentguard.datasets import PromptSet, load_dataset
from latentguard.errors import InputError
from latentguard.experiments import compare_guards
from latentguard.experiments.compare_guards import CompareGuards
from latentguard.guard_models import NAMES
from latentguard.guards import rivals, tallies
from latentguard.guards.baselines import baseline_scores
from latentguard.guards.guard import LatentGuard
from latentguard.guards.probes import fit_probe
from latentguard.guards.rivals import RIVALS, Rivals, flops, inmost
from latentguard.guards.search import Search
from latentguard.judges import Phrases
from latentguard.metrics import Value, best_f1, tpr_at_fpr, wilson
from latentguard.plots.guards import areas_by_set, low_false_alarms
from latentguard.prompts import Message, Prompt
from latentguard.roles import Casting
from latentguard.store import Stored
from latentguard.trackers import Memory
from tests.conftest import make_tiny
from tests.headlines import tells_its_headline
from tests.planted import A, Planted, dataset_of, everything, number, rows_of, write
from tests.test_plots import overlap, texts

SEARCH = Search(criterion="within", layers=((0.5, 0.75),), positions=(("t_inst",),), forms=())  # harm is planted by how a text begins
CASTING = Casting(n_poles=30, n_test=10, n_validation=10)
FAST = {"search": SEARCH, "casting": CASTING, "n_timed": 0}


def by_words(prompt):
    """Harm by what a prompt asks, whatever its label says."""
    return {"harm": A if prompt.instruction.startswith(("Break", "Far off: Break")) else -A}


def refuses(prompt):
    """Nearly what is harmful, and some of the rest."""
    return number(prompt) % 10 < (7 if prompt.instruction.startswith("Break") else 1)


def planted(**more):
    return Planted(inst=by_words, refuses=refuses, **more)


def far(label, n, name):
    return [{**row, "prompt": f"Far off: {row['prompt']}"} for row in rows_of(label, n, name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sets elsewhere: mixed, with prompts that stand in the data and a repeat; of one side; look-alikes alone."""
    at = tmp_path_factory.mktemp("sets")
    own = [{**row, "id": f"again-{row['id']}", "group": f"again-{row['id']}"} for row in everything()[:5]]
    write(at / "mixed.jsonl", [*far("harmful", 40, "m"), *far("harmless", 30, "m"), *far("lookalike", 20, "m"), *own])
    write(at / "bad.jsonl", [*far("harmful", 35, "b"), {**far("harmful", 1, "m")[0], "id": "repeat-0", "group": "repeat"}])
    write(at / "alike.jsonl", far("lookalike", 33, "a"))
    write(at / "main.jsonl", everything())
    return at


@pytest.fixture(scope="module")
def data(folder):
    return load_dataset(str(folder / "main.jsonl"))


@pytest.fixture(scope="module")
def elsewhere(folder):
    return tuple(str(folder / f"{name}.jsonl") for name in ("mixed", "bad", "alike"))


def run(data, backend=None, **settings):
    tracker, study = Memory(), CompareGuards(**{**FAST, **settings})
    backend = backend or planted()
    study.check(backend.n_layers, data)
    summary = study(backend, data, Phrases(), tracker)
    tells_its_headline(summary)
    return summary, tracker


@pytest.fixture(scope="module")
def compared(data, elsewhere):
    return run(data, elsewhere=elsewhere)


def row(summary, of, detector, what="AUROC", **more):
    (found,) = [r for r in summary["table"] if (r["set"], r["detector"], r["is"]) == (of, detector, what) and more.items() <= r.items()]
    return found


def test_it_finds_what_is_planted_and_says_what_sees_nothing(compared):
    summary, _ = compared
    for of in ("elsewhere, pooled", "test, pooled", "mixed"):
        assert row(summary, of, "latent_guard", negatives="all")["value"] == 1 == row(summary, of, "latent_guard_paper", negatives="all")["value"]
        assert row(summary, of, "last_token", negatives="all")["value"] == 0.5, "every prompt ends in the same mark"
    assert row(summary, "test, pooled", "refusal_projection", negatives="all")["value"] > 0.7, "the model refuses most of the harmful ones there"
    assert 0.4 < row(summary, "elsewhere, pooled", "refusal_projection", negatives="all")["value"] < 0.6, "and as many of either side there"
    gap = row(summary, "elsewhere, pooled", "last_token", tallies.AHEAD)
    assert gap["value"] == 0.5 and gap["low"] > 0.3
    same = row(summary, "elsewhere, pooled", "latent_guard_paper", tallies.AHEAD)
    assert (same["value"], same["p_delong"]) == (0, 1) and same["low"] < 0 < same["high"]
    assert summary["headline"]["metric"] == "AUROC of Latent Guard on sets it has never seen, pooled" and summary["status"] == "ok"


def scores_of(tracker):
    found = defaultdict(dict)
    for one in tracker.all_rows:
        if one["stage"] == "guard_compare":
            found[one["detector"]][one["set"], one["split"], one["prompt_id"]] = one
    return found


def test_every_number_can_be_counted_again_from_the_rows(compared):
    summary, tracker = compared
    scored, anew, rng = scores_of(tracker), set(), np.random.default_rng(1)
    assert set(scored) == {"latent_guard", *RIVALS}
    assert not [key for one in tracker.all_rows if one["stage"] == "guard_compare" for key in one if key in ("prompt", "reply")]
    told = 0
    for line in (line for line in summary["table"] if "condition" not in line):
        rows = [r for r in scored[line["detector"]].values() if belongs(r, line["set"])]
        if not rows or line["against"]:
            continue
        keep = {"plain": "harmless", "look-alikes": "lookalike"}.get(line["negatives"])
        rows = [r for r in rows if keep is None or r["label"] in ("harmful", keep)]
        if line["set"] == "elsewhere, pooled":
            rows = [r for r in rows if r["prompt_id"] != "repeat-0"]
        y, s = np.array([r["label"] == "harmful" for r in rows]), np.array([r["score"] for r in rows])
        if line["rule"].endswith("half of its own harmless prompts"):
            halves = [rng.permutation(s[~y]) for _ in range(200)]
            cuts = [(np.sort(low[: len(low) // 2])[::-1][int(0.05 * (len(low) // 2))], low[len(low) // 2 :]) for low in halves]
            shares = [np.mean((s[y] if line["is"] == "recall" else rest) > cut) for cut, rest in cuts]
            assert line["value"] == pytest.approx(np.mean(shares), abs=0.03) and line["low"] <= line["value"] <= line["high"], line
            anew.add((line["set"], line["is"]))
            continue
        assert line["n"] == len(rows), line
        told += 1
        if line["is"] == "AUROC":
            assert line["value"] == pytest.approx(roc_auc_score(y, s), abs=1e-6) and (line["n_harmful"], line["n_harmless"]) == (y.sum(), (~y).sum())
            if "auprc" in line:
                assert line["auprc"] == pytest.approx(average_precision_score(y, s))
        elif line["is"] == tallies.AHEAD:
            ours = np.array([scored["latent_guard"][r["set"], r["split"], r["prompt_id"]]["score"] for r in rows])
            assert line["value"] == pytest.approx(roc_auc_score(y, ours) - roc_auc_score(y, s), abs=1e-6)
        elif line["is"] in ("F1", "recall", "FPR"):
            flagged, alike = s > line["threshold"], np.array([r["label"] == "lookalike" for r in rows])
            assert line["threshold"] == summary["thresholds"][line["detector"]][line["rule"]]
            if line["is"] == "F1":
                assert line["value"] == pytest.approx(f1_score(y, flagged, zero_division=0))
                assert (line["recall"], line["fpr"]) == pytest.approx((flagged[y].mean(), flagged[~y].mean()))
                found = wilson(int(flagged[alike].sum()), int(alike.sum()))
                assert (line["lookalike_fpr"], line["lookalike_fpr_low"], line["n_lookalike"]) == (found.rate, found.low, found.n)
            else:
                assert line["value"] == flagged.mean()
    assert told > 200 and anew == {(name, measure) for name in ("elsewhere, pooled", "mixed", "test, pooled") for measure in ("recall", "FPR")}


def test_refusal_with_a_detector_in_front_can_be_counted_again(compared):
    summary, tracker = compared
    scored, asked = scores_of(tracker), [r for r in tracker.all_rows if r.get("stage") == "asked"]
    scores = {name: {key[2]: one["score"] for key, one in own.items() if key[1] == "elsewhere"} for name, own in scored.items()}
    fronts = {(r["condition"], r["label"]): r for r in summary["table"] if r.get("measure", "").endswith(" refusal")}
    assert {r["prompt_id"] for r in asked} and {name for name, _ in fronts} == {"base", *scored, "a coin 0", "a coin 1"}
    rule = "fpr=0.05 on validation"
    for (name, label), line in fronts.items():
        own = [r for r in asked if r["label"] == label]
        flagged = [scores[name][r["prompt_id"]] > summary["thresholds"][name][rule] if name in scored else False for r in own]
        if not name.startswith("a coin"):
            assert line["value"] == np.mean([r["verdict"] == "refused" or f for r, f in zip(own, flagged, strict=True)]) and line["n"] == len(own)
        assert line["kind"] == {"base": "base", "last_token": "control", "a coin 0": "control", "latent_guard": "method"}.get(name, line["kind"])
    alone, guarded, coin = (fronts[name, "harmful"]["value"] for name in ("base", "latent_guard", "a coin 0"))
    assert guarded == 1 > coin > alone, "the guard flags what was planted, and a coin as many of anything"
    assert fronts["latent_guard", "lookalike"]["change"] < 0.1 < fronts["a coin 0", "lookalike"]["change"]
    assert {r["label"] for r in summary["table"] if r.get("measure") == "harmfulness"} == {"harmful", "harmless", "lookalike"}, (
        "where they lie, of the model alone"
    )
    assert "refused by" in summary["claim"] and summary["figures"][-1] == "guard_compare_front"


def test_a_model_that_never_refuses_is_said_to(data, elsewhere):
    summary, _ = run(data, Planted(inst=by_words, refuses=lambda prompt: False), elsewhere=elsewhere, scorers=("length",), poles="label")
    assert summary["asked"]["status"] == "insufficient_base_rate" and "hardly any refusal of its own" in summary["claim"] and summary["status"] == "ok"


def belongs(one, of):
    if of.startswith("test: "):
        return one["split"] == "test" and one["set"] == of.removeprefix("test: ")
    return one["split"] == "elsewhere" and of in (one["set"], "elsewhere, pooled") or one["split"] == "test" and of == "test, pooled"


def test_thresholds_are_those_of_the_validation_split(compared):
    summary, tracker = compared
    for name, rows in scores_of(tracker).items():
        here = [r for r in rows.values() if r["split"] == "validation"]
        high, low = ([r["score"] for r in here if (r["label"] == "harmful") is side] for side in (True, False))
        rules = summary["thresholds"][name]
        assert rules[tallies.BEST_F1] == best_f1(high, low)
        assert np.mean(np.array(low) > rules["fpr=0.05 on validation"]) <= 0.05
    assert summary["thresholds"]["latent_guard_paper"]["its own"] == 0
    assert row(summary, "elsewhere, pooled", "latent_guard_paper", "F1", rule="its own")["threshold"] == 0


def test_thresholds_set_on_half_of_a_sets_own_harmless_prompts_keep_their_promise_on_the_other_half():
    rng = np.random.default_rng(0)
    harmful = np.arange(600) < 200
    scores = rng.normal(size=600) + 2.0 * harmful + 5.0  # all of the traffic lies above what validation saw
    mask = np.ones(600, bool)
    held = tallies.Held([], *[np.array([])] * 2, harmful, *[np.array([])] * 3)
    one = tallies.Scored("latent_guard", "tested", "", scores, {}, Value(0.0, 0.0, 0.0, 0), Value(0.0, 0.0, 0.0, 0))
    recall, alarms = tallies.set_anew("theirs", tallies.Part(mask, mask), held, {"latent_guard": one}, 0.05)
    assert [(r["is"], r["n"], r["rule"]) for r in (recall, alarms)] == [
        ("recall", 200, "fpr=0.05 on half of its own harmless prompts"),
        ("FPR", 200, "fpr=0.05 on half of its own harmless prompts"),
    ]
    assert alarms["low"] < 0.05 < alarms["high"] < 0.13 and alarms["value"] == pytest.approx(0.05, abs=0.01)
    truth = tpr_at_fpr(scores[harmful], scores[~harmful], 0.05).value
    assert recall["low"] < truth < recall["high"] and recall["value"] == pytest.approx(truth, abs=0.05)
    for own in (harmful, ~harmful, np.arange(600) < 239):  # one side alone, or 39 harmless ones: half of them carry no threshold
        assert not tallies.set_anew("theirs", tallies.Part(own, own), held, {"latent_guard": one}, 0.05)
    assert tallies.set_anew("theirs", tallies.Part(first := np.arange(600) < 240, first), held, {"latent_guard": one}, 0.05)


def test_no_label_of_the_test_split_changes_a_score_or_a_threshold(data, elsewhere, compared):
    turned = replace(data, test=PromptSet(tuple(replace(p, harmful=not p.harmful, lookalike=False) for p in data.test)), _beside={})
    told = [name for name in RIVALS if name not in ("refusal_log_odds", "zero_shot")]  # whose planted answers come from the label
    summary, tracker = run(turned, elsewhere=elsewhere, scorers=tuple(told))
    assert all(found == compared[0]["thresholds"][name] for name, found in summary["thresholds"].items())
    for name, rows in scores_of(tracker).items():
        assert {key: r["score"] for key, r in rows.items()} == {key: r["score"] for key, r in scores_of(compared[1])[name].items()}
    assert row(summary, "test, pooled", "latent_guard", negatives="all")["value"] == 0


def test_what_stands_in_the_data_is_left_out_and_repeats_count_once(compared, data):
    summary, tracker = compared
    assert summary["elsewhere"] == {"mixed": {"n": 90, "left_out": 5}, "bad": {"n": 36, "left_out": 0}, "alike": {"n": 33, "left_out": 0}}
    assert row(summary, "elsewhere, pooled", "ngram", negatives="all")["n"] == 90 + 35 + 33
    ids = {r["prompt_id"] for r in tracker.all_rows if r.get("split") == "elsewhere"}
    assert not {i for i in ids if i.startswith("again")} and not ids & {p.id for p in data}


def test_a_set_of_one_side_is_told_so_and_set_against_the_others(compared):
    summary, _ = compared
    bad, alike = (row(summary, name, "latent_guard") for name in ("bad", "alike"))
    assert bad["against"] == "harmless prompts of the other sets elsewhere" and (bad["n_harmful"], bad["n_harmless"]) == (36, 30 + 20 + 33)
    assert alike["against"] == "harmful prompts of the other sets elsewhere" and alike["n_harmful"] == 40 + 35
    assert "auprc" not in bad and "tpr_at_1%" not in bad
    assert row(summary, "bad", "latent_guard", "recall")["value"] == 1 and row(summary, "alike", "latent_guard", "FPR")["value"] == 0
    assert not [r for r in summary["table"] if r["set"] in ("bad", "alike") and r["is"] == "F1"]
    home = row(summary, "test: main", "latent_guard", negatives="all") if [r for r in summary["table"] if r["set"] == "test: main"] else None
    assert home is None, "one source is the pool"


def test_where_no_other_set_has_the_other_side_the_test_split_stands_in(data, elsewhere):
    summary, _ = run(data, elsewhere=elsewhere[1:2], scorers=("ngram",), poles="label")
    pooled = row(summary, "elsewhere, pooled", "latent_guard")
    assert pooled["against"] == "harmless prompts of the test split" and summary["headline"]["n"] == pooled["n"]
    assert summary["figures"] == ["guard_compare", "guard_compare_front"], "no ROC of a set of one side"
    assert summary["status"] == "insufficient_base_rate" and "claim withheld" in summary["claim"]


def test_without_sets_elsewhere_it_tells_of_the_test_split_by_source(tmp_path):
    summary, tracker = run(dataset_of(everything()), scorers=("ngram",), poles="label")
    assert summary["headline"]["metric"] == "AUROC of Latent Guard on the test split"
    north, hand = (row(summary, f"test: {name}", "latent_guard") for name in ("north", "hand"))
    assert north["against"] == "harmless prompts of the test split" and hand["against"] == "harmful prompts of the test split"
    assert not [r for r in tracker.figures["guard_compare"] if r["set"].startswith("test: ")]


def test_poles_by_label_ask_the_model_nothing(data):
    backend = planted()
    summary, _ = run(data, backend, poles="label", scorers=("refusal_projection", "refusal_log_odds"), n_asked=0)
    assert not backend.asked and summary["poles"] == "label" and "by label" in summary["about"]["refusal_projection"]
    backend = planted()
    summary, _ = run(data, backend, scorers=("refusal_projection",), n_asked=0)
    train = {p.id for p in data.train}
    assert backend.asked and set(backend.asked) <= train and summary["poles"] == "behaviour"


# ── guard models ──


class Fake:
    """A guard model of one request at a time: harm by its words, or the scores it is given."""

    threshold, tested, status = 0.5, False, "untested"

    def __init__(self, name, at=None):
        self.name, self.card = name, SimpleNamespace(id="some/where", judges="words", conversation=False)

    def score(self, prompts):
        assert all(len(p.messages) == 1 for p in prompts)
        return np.array([0.9 if "Break" in p.instruction else 0.1 for p in prompts])

    def tokens(self, prompts):
        return np.array([len(p.instruction.split()) for p in prompts])

    def flops(self, n_tokens):
        return 1e9 * n_tokens


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr("latentguard.guard_models.load", Fake)
    monkeypatch.setattr(compare_guards, "there", lambda models: None)


def test_an_untested_guard_model_says_so_everywhere(faked, data, elsewhere):
    summary, tracker = run(data, elsewhere=elsewhere, guard_models=(NAMES[0], f"{NAMES[-1]}:/some/where"), scorers=("ngram",), n_timed=4, rounds=2)
    for name in (NAMES[0], NAMES[-1]):
        rows = [r for r in (*tracker.all_rows, *summary["table"], *tracker.figures["guard_compare_roc"]) if r.get("detector") == name]
        assert len(rows) > 100 and all(r["status"] == "untested" for r in rows)
        assert f"{name} (untested)" in summary["claim"]
        for plot in tracker.plots.values():
            assert plot.chart.names[name].endswith("(untested)") and "Untested" in plot.caption
            assert any(text.get_text().replace("\n", " ").endswith("(untested)") for text, _ in texts(plot.figure))
    assert {r["status"] for r in summary["table"] if r["detector"] not in NAMES} == {""}
    assert row(summary, "elsewhere, pooled", NAMES[0], "F1", rule="its own")["threshold"] == 0.5
    assert row(summary, "4 prompts, timed", NAMES[0], "GFLOPs a prompt")["value"] == pytest.approx(np.mean([7, 7, 7, 7]), abs=2)


def test_a_guard_model_of_single_requests_gets_the_last_turn_alone(faked):
    talk = Prompt((Message("user", "Break it."), Message("assistant", "No."), Message("user", "Bake it.")), harmful=False)
    assert rivals.of_model(NAMES[0]).score(planted(), [talk, Prompt.of("Break it.")]) == pytest.approx([0.1, 0.9])


# ── what rivals are ──


@pytest.fixture(scope="module")
def made(data):
    return Rivals(planted(), data, Phrases(), Memory(), casting=None)


def test_the_papers_rule_is_that_of_probes_over_all_layers(made, data, monkeypatch):
    backend = planted()
    harmful = torch.tensor([bool(p.harmful) for p in data.train])
    probe = fit_probe("paper", backend.read(list(data.train), "all", ["t_inst"]).values, harmful)
    wanted = probe.raw(backend.read(list(data.test), "all", ["t_inst"]).values)
    for block in (512, 7):
        monkeypatch.setattr(rivals, "_BLOCK", block)
        assert made.make("latent_guard_paper").score(backend, list(data.test)) == pytest.approx(wanted.numpy(), abs=1e-6)


def test_baselines_are_those_of_every_guard(made, data):
    wanted = baseline_scores(planted(), list(data.train), list(data.test))
    for name in ("last_token", "ngram", "tfidf", "length"):  # there in a unit of their own: the same but for two numbers
        found = made.make(name).score(planted(), list(data.test))
        assert np.ptp(found) == np.ptp(wanted[name]) == 0 or np.corrcoef(found, wanted[name])[0, 1] == pytest.approx(1)


def test_flops_are_two_a_weight_and_token_below_the_layer(tiny, prompts):
    model = tiny.hf
    lengths = np.array([len(item) for item in tiny.render(prompts)])
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.model.layers]
    for layer in (0, 1, 3, None):
        assert flops(tiny, prompts, layer) == pytest.approx(2 * sum(blocks[:layer]) * lengths)
    assert np.isnan(flops(planted(), prompts)).all(), "a model elsewhere has no shapes here"


def test_timing_goes_past_the_store(tiny, tmp_path):
    assert inmost(Stored(tiny, tmp_path)) is tiny and inmost(tiny) is tiny


# ── a real model, and a guard in a folder ──


@pytest.fixture(scope="module")
def saved(tiny, data, tmp_path_factory):
    guard = LatentGuard.fit(tiny, data, name="mine", criterion="within")
    return guard, str(guard.save(tmp_path_factory.mktemp("guards") / "mine"))


def test_a_loaded_guard_scores_as_the_fitted_one(tiny, data, saved, elsewhere, tmp_path):
    quick = {"scorers": ("zero_shot", "length"), "elsewhere": elsewhere, "n_timed": 3, "rounds": 1}
    loaded, tracker = run(data, Stored(tiny, tmp_path), guard=saved[1], **quick)
    fitted, _ = run(data, tiny, search=Search(criterion="within"), **quick)
    plain = [[r for r in one["table"] if not r["is"].startswith("ms ") and r["rule"] != "its own"] for one in (loaded, fitted)]
    assert json.dumps(plain[0]) == json.dumps(plain[1])
    used = {(one["kind"], one["name"]): one for one in tracker.uses}
    assert str(used["guard", "mine"]["path"]) == saved[1] and used["dataset", "mixed"]["metadata"]["n"] == 90
    assert loaded["caution"] == "" and loaded["guard"]["from"] == saved[1]
    own = row(loaded, "test, pooled", "latent_guard", "F1", rule="its own")
    assert own["recall"] * own["n_harmful"] == pytest.approx(saved[0].flags([p for p in data.test if p.harmful], "fpr=0.05").sum())
    assert (
        row(loaded, "3 prompts, timed", "zero_shot", "GFLOPs a prompt")["value"] > row(loaded, "3 prompts, timed", "latent_guard", "GFLOPs a prompt")["value"]
    )


def test_a_guard_of_other_data_is_pointed_out(tiny, saved):
    other = dataset_of([{**r, "id": f"o{r['id']}"} for r in everything()])
    summary, _ = run(other, tiny, guard=saved[1], scorers=("length",))
    assert "fitted on other data" in summary["caution"] and summary["caution"] in summary["claim"]


def test_a_guard_of_another_model_is_refused_before_anything_runs(data, saved):
    study = CompareGuards(guard=saved[1], **FAST)
    with pytest.raises(InputError, match="9 layers|has 8"):
        study.check(8, data)
    other = make_tiny()
    other.weights = "others"
    tracker = Memory()
    with pytest.raises(InputError, match="other weights"):
        study(other, data, Phrases(), tracker)
    assert not tracker.all_rows and not tracker.uses


def test_a_guard_of_some_categories_is_refused(data, saved, monkeypatch):
    narrow = replace(saved[0], about={**saved[0].about, "search": {"categories": ["fraud"]}})
    monkeypatch.setattr(LatentGuard, "load", lambda folder: narrow)
    with pytest.raises(InputError, match="to tell fraud alone"):
        CompareGuards(guard=saved[1], **FAST).check(4, data)


def test_a_set_that_the_guard_was_fitted_on_is_refused(saved, folder, tmp_path):
    write(tmp_path / "main.jsonl", far("harmful", 9, "z"))
    with pytest.raises(InputError, match="was fitted on main"):
        CompareGuards(guard=saved[1], elsewhere=(str(tmp_path / "main.jsonl"),), **FAST).check(4, load_dataset(str(folder / "main.jsonl")))


# ── mistakes ──


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scorers": ("latent_gard",)}, "'latent_gard' is none of latent_guard_paper"),
        ({"guard_models": ("llama",)}, "'llama' is none of llama_guard_3_1b"),
        ({"elsewhere": ("a.jsonl", "b/a.jsonl")}, "'a' stands twice"),
        ({"guard_models": (NAMES[0], f"{NAMES[0]}:/x")}, "stands twice"),
        ({"wording": "how"}, "choose one of plain"),
        ({"fpr": 1.0}, "between 0 and 1"),
        ({"n_timed": -1}, "or 0 to time nothing"),
        ({"n_asked": -1}, "or 0 to ask nothing"),
        ({"rounds": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ValidationError, match=said):
        CompareGuards(**settings)


def test_what_is_missing_is_said_before_a_model_is_there(data, folder, tmp_path):
    def refused(said, of=data, **settings):
        with pytest.raises(InputError, match=said):
            CompareGuards(**{**FAST, **settings}).check(8, of)

    refused("there is no such file", elsewhere=(str(tmp_path / "none.jsonl"),))
    refused("is no config", elsewhere=("none",))
    refused("all prompts of .*main.jsonl stand in data main", elsewhere=(str(folder / "main.jsonl"),))
    refused("there is no such folder; exp=fit_guard", guard=str(tmp_path / "none"))
    refused("guard model duoguard_0_5b: exp.guard_models=.duoguard_0_5b:/nowhere.: there is no such folder", guard_models=("duoguard_0_5b:/nowhere",))
    refused("needs both sides", of=dataset_of(rows_of("harmful", 50)))
    refused("layer", search=replace(SEARCH, layers=((99,),)))
    refused("poles=label", of=dataset_of([*rows_of("harmful", 50), *rows_of("lookalike", 50)]))


# ── figures ──


@pytest.mark.parametrize(("sets", "models"), [(1, 0), (9, 0), (4, 10), (60, 3)])
def test_figures_can_be_read(sets, models):
    names = [*("latent_guard", *RIVALS), *NAMES[:models]]
    of = ["elsewhere, pooled", *(f"a data set with_a_long_name number {k} vs harmless elsewhere" for k in range(1, sets))]
    span = {"low": 0.5, "high": 0.8, "n": 240, "n_harmless": 130}
    rows = [{"of": one, "detector": d, "status": "untested" * (d in NAMES), "value": 0.55 + (hash((one, d)) % 20) / 100, **span} for one in of for d in names]
    curve = [{**r, "fpr": level, "at": f"{level:.0%}"} for r in rows if r["of"] == of[0] for level in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)]
    for plot, drawn in ((areas_by_set(rows, title="tiny: a title"), rows), (low_false_alarms(curve, title="tiny: a title"), curve)):
        assert plot.figure.get_figheight() < 11 and "95% interval" in plot.caption and plot.caption.endswith(".")
        found = texts(plot.figure)
        wide, high = plot.figure.bbox.width, plot.figure.bbox.height
        assert not [t.get_text() for t, box in found if box.x0 < -1 or box.y0 < -1 or box.x1 > wide + 1 or box.y1 > high + 1]
        assert not [(a.get_text(), b.get_text()) for i, (a, one) in enumerate(found) for b, other in found[i + 1 :] if overlap(one, other) > 0.5]
        assert Chart.from_dict(json.loads(json.dumps(plot.chart.as_dict()))) == plot.chart
        assert {plot.chart.x, plot.chart.y, plot.chart.series} <= set(drawn[0]) and set(plot.chart.colours) == set(names)
        assert "n = 240" in " ".join(t.get_text().replace("\n", " ") for t, _ in found)
    looks = [(line.get_color(), line.get_marker()) for line in plot.figure.legends[0].legend_handles]
    assert len(set(looks)) == len(looks) or models > 7


def test_numbers_by_language_where_a_set_has_more_than_one(folder, data, compared):
    spoken = [{**row, "language": "de" if i % 3 else "fr"} for i, row in enumerate([*far("harmful", 36, "s"), *far("harmless", 36, "s")])]
    write(folder / "spoken.jsonl", spoken)
    pooled, _ = run(data, elsewhere=(str(folder / "spoken.jsonl"), str(folder / "alike.jsonl")), scorers=("length",), n_asked=0)
    told = {line["set"] for line in pooled["table"] if " in " in line["set"]}
    assert told == {"spoken in de", "spoken in fr", "elsewhere, pooled in a language not said"} and "guard_compare_languages" in pooled["figures"]
    summary, tracker = run(data, elsewhere=(str(folder / "spoken.jsonl"),))
    rows = [one for one in tracker.all_rows if one["stage"] == "guard_compare" and one["detector"] == "latent_guard_paper" and one["split"] == "elsewhere"]
    for language, n in (("de", 48), ("fr", 24)):
        own = [one for one in rows if one["language"] == language]
        found = row(summary, f"elsewhere, pooled in {language}", "latent_guard_paper", negatives="all")
        high, low = ([one["score"] for one in own if (one["label"] == "harmful") is side] for side in (True, False))
        assert len(own) == n == found["n"] and found["value"] == pytest.approx(roc_auc_score([1] * len(high) + [0] * len(low), [*high, *low]))
        assert row(summary, f"elsewhere, pooled in {language}", "latent_guard", "F1")["n"] == n
    assert not any(" in " in line["set"] for line in compared[0]["table"] if line["set"] != f"{line['n']} prompts, timed"), "one language is not told apart"

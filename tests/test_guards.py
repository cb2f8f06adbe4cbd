"""Guards as maths: what probes, calibration, thresholds and drift must do whatever the model is; then a guard on a tiny model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import latentguard as lg
from latentguard.errors import InputError
from latentguard.guards.calibration import Calibration, calibration_error, isotonic, platt, promise, reliability, threshold
from latentguard.guards.drift import Reference, drift
from latentguard.guards.fitting import States, balanced, simplest, unseen_scores
from latentguard.guards.guard import LatentGuard, promised
from latentguard.guards.marks import seen, training, turns
from latentguard.guards.probes import METHODS, fit_probe, restore
from latentguard.guards.search import Search, candidates_of
from latentguard.metrics import Value, auroc
from latentguard.prompts import Prompt

SHAPE = (2, 3, 8)  # layers, positions, dimensions


def planted(n=400, seed=0, size=1.5):
    """States of which one direction of one layer and position tells harm, beneath noise of unlike scales and a large constant."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2 == 0
    states = torch.randn(n, *SHAPE, generator=generator)
    states[y, 1, 2, 3] += size
    states *= torch.logspace(-1, 1, SHAPE[-1])
    return states + 50 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)), y


def area(probe, states, y):
    raw = probe.raw(states).numpy()
    return auroc(raw[y], raw[~y]).value


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_what_was_planted_and_nothing_in_noise(method):
    size = 2.5 if method in ("logistic", "lda", "mlp") else 15.0  # the others mind the units of a dimension
    states, y = planted(size=size)
    probe = fit_probe(method, states, y)
    assert area(probe, *planted(seed=1, size=size)) > 0.8
    sides = torch.cat([torch.nonzero(y).flatten(), torch.nonzero(~y).flatten()])
    shuffled = torch.empty_like(y)
    shuffled[sides] = torch.arange(len(y)) % 2 == 0  # half of either side
    assert 0.35 < area(fit_probe(method, states, shuffled), *planted(seed=1, size=size)) < 0.65


@pytest.mark.parametrize("method", METHODS)
def test_scores_do_not_depend_on_the_batch_and_tensors_hold_all(method):
    states, y = planted()
    probe = fit_probe(method, states, y)
    whole = probe.raw(states)
    assert whole.dtype == torch.float64 and torch.allclose(whole, torch.cat([probe.raw(states[:7]), probe.raw(states[7:])]), atol=1e-9)
    assert torch.equal(restore(method, probe.tensors()).raw(states), whole)
    again = fit_probe(method, states, y)
    assert all(torch.equal(a, b) for a, b in zip(probe.tensors().values(), again.tensors().values(), strict=True))


@pytest.mark.parametrize("method", ["logistic", "lda", "mlp"])
def test_units_of_a_dimension_change_nothing(method):
    states, y = planted()
    scaled = states * torch.logspace(2, -2, SHAPE[-1]) + 3
    first, second = fit_probe(method, states, y).raw(states), fit_probe(method, scaled, y).raw(scaled)
    assert np.corrcoef(first, second)[0, 1] > 0.999


@pytest.mark.parametrize("method", ["paper", "mean_difference", "logistic", "lda"])
def test_weights_count_prompts(method):
    states, y = planted(80)
    counts = np.where(np.arange(80) < 20, 3.0, 1.0)
    twice = torch.cat([states, states[:20], states[:20]]), torch.cat([y, y[:20], y[:20]])
    weighed, repeated = fit_probe(method, states, y, weights=counts).raw(states), fit_probe(method, *twice).raw(states)
    assert np.corrcoef(weighed, repeated)[0, 1] > (0.95 if method == "lda" else 0.999)  # lda chooses its shrinkage by the number of rows


def test_more_strength_makes_smaller_weights():
    states, y = planted()
    sizes = [fit_probe("logistic", states, y, strength=s).weight.norm() for s in (0.1, 1.0, 10.0, 100.0)]
    assert sizes == sorted(sizes, reverse=True)


def test_paper_method_is_the_papers_rule():
    from latentguard.detectors import Centroids

    states, y = planted()
    single = states[:, :, :1]
    probe = fit_probe("paper", single, y)
    rule = Centroids(single[y, :, 0].double().mean(0).float(), single[~y, :, 0].double().mean(0).float())
    assert torch.allclose(probe.raw(single).float(), rule.score(single[:, :, 0]), atol=1e-6)


def test_bad_sides_and_states_are_one_sentence():
    states, y = planted(20)
    with pytest.raises(InputError, match="0 harmful"):
        fit_probe("lda", states, torch.zeros_like(y))
    with pytest.raises(InputError, match="not all finite"):
        fit_probe("lda", states.log(), y)
    with pytest.raises(InputError, match="choose one of paper"):
        fit_probe("svm", states, y)
    with pytest.raises(InputError, match="has the tensors weight, bias"):
        restore("lda", {"weight": torch.zeros(2)})


# Calibration and thresholds.


def draws(n, seed, shift=1.5):
    generator = np.random.default_rng(seed)
    y = generator.random(n) < 0.4
    return generator.normal(size=n) * 3 + np.where(y, 3 * shift, 0), y


@pytest.mark.parametrize("make", [platt, isotonic])
def test_calibrated_scores_come_true_on_fresh_draws_and_keep_the_order(make):
    raw, y = draws(4000, 0)
    calibration = make(raw, y)
    fresh, truth = draws(4000, 1)
    p = calibration(fresh)
    assert calibration_error(p, truth).value < 0.03
    assert (np.diff(calibration(np.sort(fresh))) >= 0).all() and p.min() > 0 and p.max() < 1
    assert calibration_error(p**3, truth).value > 0.1  # the measure sees a wrong one


def test_calibration_error_does_not_feel_the_order_of_prompts_with_one_probability():
    generator = np.random.default_rng(3)
    y = generator.random(600) < 0.3
    p = np.where(np.arange(600) % 2, 0.2, 0.4)
    gap = (abs(p[p < 0.3].mean() - y[p < 0.3].mean()) + abs(0.4 - y[p > 0.3].mean())) / 2
    for _ in range(3):
        order = generator.permutation(600)
        assert calibration_error(p[order], y[order]).value == pytest.approx(gap)


def test_platt_finds_the_curve_that_made_the_labels():
    generator = np.random.default_rng(0)
    raw = generator.normal(size=20000) * 5 + 40
    y = generator.random(20000) < 1 / (1 + np.exp(-(0.7 * raw - 28)))
    found = platt(raw, y)
    assert found.slope == pytest.approx(0.7, rel=0.05) and found.offset == pytest.approx(-28, rel=0.05)


@pytest.mark.parametrize("make", [platt, isotonic])
def test_sides_that_do_not_overlap_stay_probabilities(make):
    raw = np.r_[np.arange(20.0), np.arange(100.0, 120.0)]
    p = make(raw, raw > 50)(np.array([-1e9, 0, 60, 110, 1e9]))
    assert np.isfinite(p).all() and (p >= 0).all() and (p <= 1).all() and p[1] < 0.1 < 0.9 < p[3]


@pytest.mark.parametrize("level", [0.01, 0.05, 0.2])
def test_a_named_rate_is_kept_where_it_was_chosen_and_its_interval_holds_elsewhere(level):
    held = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        p, y = generator.random(600), np.arange(600) < 200
        found = threshold(f"fpr={level}", p, y)
        assert ((p[~y] >= found.value).mean()) <= level + 1e-12
        held.append(found.low <= 1 - found.value <= found.high)  # the true rate of uniform scores
    assert np.mean(held) >= 0.88


def test_recall_and_ties_and_too_few():
    generator = np.random.default_rng(0)
    p, y = np.round(generator.random(500), 1), np.arange(500) < 250
    found = threshold("recall=0.95", p, y)
    assert (p[y] >= found.value).mean() >= 0.95
    tied = threshold("fpr=0.05", np.where(y, 0.9, 0.5), y)
    assert (np.where(y, 0.9, 0.5)[~y] >= tied.value).mean() == 0
    assert threshold("fpr=0.01", p[:99], np.zeros(99, bool)) is None and threshold("fpr=0.05", p[:20], np.zeros(20, bool)) is not None
    for bad in ("fpr=0", "fpr=1.5", "far=0.1", "fpr", "", None):
        with pytest.raises(InputError, match="name what it promises"):
            promise(bad)


def test_reliability_bins_hold_everything_once():
    p, y = np.random.default_rng(0).random(101), np.arange(101) % 2 == 0
    rows = reliability(p, y, 7)
    assert sum(row["n"] for row in rows) == 101 and sum(row["k"] for row in rows) == y.sum() and len(rows) == 7


@pytest.mark.parametrize("wrong", [{"kind": "spline"}, {"slope": -1.0}, {"slope": float("nan")}, {"offset": "0"}, {"kind": "isotonic"}])
def test_a_calibration_that_cannot_be_is_refused(wrong):
    with pytest.raises(InputError, match="calibration"):
        Calibration(**{"kind": "platt", **wrong})


def test_drift_is_silent_on_the_same_and_loud_on_other_states():
    states, y = planted(600)
    probe = fit_probe("logistic", states[:300], y[:300])
    reference = Reference.of(states[:300], states[300:], probe.raw(states[300:]).numpy())
    same, _ = planted(300, seed=5)
    other = same + 2 * states.std(0)
    quiet, loud = (drift(reference, x, probe.raw(x).numpy(), {}) for x in (same, other))
    assert not quiet.drifted and quiet.raw_p > 0.001 and loud.drifted and loud.far_p < 1e-6 and "drifted" in str(loud)
    with pytest.raises(InputError, match="30 prompts"):
        drift(reference, same[:10], np.zeros(10), {})


# Marks and turns.


def test_period_ends_all_texts_alike_and_mixed_leaves_live_text_alone():
    texts = ["bake bread", "bake bread?", "  bake bread... \n", "?!", "bake bread!"]
    assert [p.instruction for p in seen(texts, "period")] == ["bake bread.", "bake bread.", "bake bread.", "?!", "bake bread."]
    assert [p.instruction for p in seen(texts, "mixed")] == ["bake bread", "bake bread?", "bake bread...", "?!", "bake bread!"]
    many = [Prompt.of(f"bake bread number {i}.", id=f"p{i}") for i in range(200)]
    ends = {p.instruction[-1] if p.instruction[-1] in ".?!" else "" for p in training(many, "mixed")}
    assert ends == {"", ".", "?", "!"} and [p.id for p in training(many, "mixed")] == [p.id for p in many]


def test_a_conversation_is_scored_turn_by_turn():
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    first, second = turns(talk)
    assert [len(p.messages) for p in (first, second)] == [2, 4] and second.instruction == "c"
    assert len(turns([*talk, {"role": "assistant", "content": "d"}])) == 2
    with pytest.raises(InputError, match="no turn is the user's"):
        turns(talk[:1])


# Fitting on a model.


@pytest.fixture(scope="module")
def data():
    return lg.load_dataset("builtin")


@pytest.fixture(scope="module")
def guard(tiny, data):
    return LatentGuard.fit(tiny, data, methods=("logistic", "mean_difference"), layers=((1, 2),), criterion="within")


def test_a_guard_scores_alone_as_in_a_batch_and_from_states(guard, data, tiny):
    prompts = list(data.test)[:9]
    scores = guard.score(prompts)
    assert scores.shape == (9,) and ((scores > 0) & (scores < 1)).all()
    assert np.allclose(scores, [guard.score([p])[0] for p in prompts], atol=1e-5)
    whole = replace(guard, piece=None)  # the tiny model's tokens are letters: the others are passed in pieces
    assert np.allclose(whole.score(prompts), guard.probabilities(tiny.read(seen(prompts, "period"), guard.layers, guard.positions).values))
    assert guard.score([prompts[0].instruction.rstrip(".") + "?!"])[0] == pytest.approx(scores[0], abs=1e-5)
    named = guard.threshold("fpr=0.05")
    assert (guard.flags(prompts) == (scores >= named.value)).all()
    with pytest.raises(InputError, match="this guard has"):
        guard.flags(prompts, at="fpr=0.5")
    with pytest.raises(InputError, match="no model yet"):
        replace(guard, backend=None).score(prompts)


def test_the_last_turn_alone_is_no_conversation(guard):
    talk = [{"role": "user", "content": "Tell me of bread."}, {"role": "assistant", "content": "Bread is old."}, {"role": "user", "content": "More of it."}]
    found = guard.score_chat(talk)
    assert [turn.index for turn in found] == [0, 2]
    assert found[1].probability == pytest.approx(guard.score([talk])[0], abs=1e-6) and found[1].probability != guard.score(["More of it."])[0]


def test_another_model_is_refused(guard):
    from tests.conftest import make_tiny

    other = make_tiny("llama")
    with pytest.raises(InputError, match="other weights"):
        guard.on(other)
    assert guard.on(other, descendant=True).backend is other
    with pytest.raises(InputError, match="chat template"):
        guard.on(make_tiny(system="Speak."))


def test_of_candidates_within_a_standard_error_of_the_best_that_with_the_fewest_states_is_taken():
    def value(x):
        return Value(x, x - 0.0196, x + 0.0196, 400)  # a standard error of 0.01

    assert simplest([3, 6, 4, 8], [value(x) for x in (0.897, 0.900, 0.894, 0.896)]) == 0
    assert simplest([3, 6], [value(x) for x in (0.889, 0.900)]) == 1, "more than a standard error below"
    assert simplest([3, 3, 6], [value(x) for x in (0.895, 0.899, 0.900)]) == 1, "of equal ones the better"


def test_what_is_said_of_a_guard_is_what_it_does(guard, data):
    scores, y = guard.score(list(data.test)), np.array([p.harmful for p in data.test])
    told = guard.about["test"]
    assert told["auroc"]["value"] == pytest.approx(auroc(scores[y], scores[~y]).value, abs=1e-6) and told["n"] == len(y)
    kept = told["thresholds"]["fpr=0.05"]["fpr"]
    assert kept["k"] == (scores[~y] >= guard.thresholds["fpr=0.05"].value).sum()
    tried = guard.about["tried"]
    assert {row["method"] for row in tried} == {"logistic", "mean_difference"}
    chosen = next(row for row in tried if (row["method"], row["layers"], row["positions"]) == (guard.method, guard.layers, guard.positions))
    best = max(tried, key=lambda row: row["auroc"])
    assert chosen["auroc"] >= best["auroc"] - (best["high"] - best["low"]) / 3.92


def test_recalibration_and_domains_come_from_the_prompts_given(guard, data):
    prompts = list(data.validation)
    other = guard.recalibrated([replace(p, harmful=not p.harmful) for p in prompts])
    assert other.probe is guard.probe and other.about["recalibrated"]["n"] == len(prompts) and other.calibration != guard.calibration
    harmless = [p for p in prompts if not p.harmful]
    own = guard.with_domain("mine", harmless)
    scores = own.score(harmless)
    assert (scores >= own.threshold("fpr=0.05", "mine").value).mean() <= 0.05 and "fpr=0.05" in own.domains["mine"]
    texts = [p.instruction for p in harmless]
    assert own.within("mine").thresholds == own.domains["mine"] == guard.with_domain("mine", texts).domains["mine"], "texts without a label count as harmless"
    live = replace(guard, terminal="mixed")  # such a one is given texts as they stand, and is to keep its promise on these
    assert live.with_domain("live", texts).domains["live"] == promised(live.score(texts), np.zeros(len(texts), bool))
    with pytest.raises(InputError, match="has mine;"):
        own.threshold("fpr=0.05", "yours")
    with pytest.raises(InputError, match="carry no threshold"):
        guard.with_domain("few", harmless[:5])


def test_unseen_families_are_scored_without_their_own_prompts(tiny, data):
    """A family whose labels are turned about cannot teach its own probe."""
    search = Search(families={"low": ("a",), "high": ("b",)}, layers=((2,),), positions=(("t_post_inst",),))
    (candidate,) = candidates_of(search, tiny.n_layers)
    states = States(tiny, data, [candidate], search)
    rng = np.random.default_rng(0)
    sources = rng.choice(["a", "b"], len(states.prompts["train"]))
    states.prompts["train"] = [replace(p, source=str(s)) for p, s in zip(states.prompts["train"], sources, strict=True)]
    first = unseen_scores(candidate, states, "train")
    turned = sources == "a"
    states.harmful["train"] = np.where(turned, ~states.harmful["train"], states.harmful["train"])
    second = unseen_scores(candidate, states, "train")
    assert np.allclose(first[turned], second[turned]) and not np.allclose(first[~turned], second[~turned])


def test_balance_lets_no_large_set_or_side_rule():
    prompts = [Prompt.of(f"p{i}", source="big" if i < 90 else "small", id=f"i{i}") for i in range(100)]
    harmful = np.arange(100) % 3 == 0
    weights = balanced(prompts, harmful)
    assert weights.mean() == pytest.approx(1) and weights[harmful].sum() == pytest.approx(weights[~harmful].sum())
    small, big = (sum(w for w, p, h in zip(weights, prompts, harmful, strict=True) if p.source == name and not h) for name in ("small", "big"))
    assert big / small == pytest.approx((60 / 6) ** 0.5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"methods": ("svm",)}, "svm"), ({"positions": (("user",),)}, "many tokens"), ({"terminal": "keep"}, "terminal"), ({"thresholds": ("fpr=2",)}, "promises"),
     ({"strengths": (0.0,)}, "above 0"), ({"criterion": "best"}, "criterion"), ({"layers": ((),)}, "at least one"), ({"nothing": 1}, "nothing")],
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence_before_any_state_is_read(tiny, data, wrong, says):
    with pytest.raises(InputError, match=says) as told:
        LatentGuard.fit(tiny, data, **wrong)
    assert "\n" not in str(told.value)


def test_a_guard_of_one_category_has_all_else_on_the_other_side(data):
    turned = Search(categories=("fraud",)).of(data)
    assert {p.category for p in turned if p.harmful} == {"fraud"} and len(list(turned)) == len(list(data))
    assert any("hacking" in p.category and not p.harmful for p in turned) and Search().of(data) is data
    with pytest.raises(InputError, match="no harmful prompt of that category"):
        Search(categories=("baking",)).of(data)

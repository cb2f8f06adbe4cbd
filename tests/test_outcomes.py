"""The one table of the related methods: gauges, changes on the same prompts, gates, and what it refuses."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from latentguard.backends import Reply
from latentguard.behaviour import Judged
from latentguard.errors import InputError
from latentguard.judges import Phrases, Verdict
from latentguard.metrics import mean, paired_difference, wilson
from latentguard.outcomes import MEASURES, Gauge, Observed, gate, gauges, outcomes
from latentguard.roles import Cast, Filled
from tests.planted import AXES, DEPTH, WIDTH, Planted, prompt_of, rows_of

HIGH, LOW, LIKE = ([prompt_of(row) for row in rows_of(label, 40)] for label in ("harmful", "harmless", "lookalike"))


def judged(prompts, refused, degenerate=0):
    """The first `refused` are refused, the next `degenerate` are no language, the rest accepted."""
    verdicts = ["refused"] * refused + ["degenerate"] * degenerate + ["accepted"] * (len(prompts) - refused - degenerate)
    return [Judged(Reply(p, "…", (1,), "eos"), Verdict(v)) for p, v in zip(prompts, verdicts, strict=True)]


def cast(validation=True, high=HIGH, low=LOW):
    held = {"refused_harmful": Filled("refused_harmful", tuple(HIGH[20:]), 20, ""), "accepted_harmless": Filled("accepted_harmless", tuple(LOW[20:]), 20, "")}
    return Cast("behaviour", tuple(high[:20]), tuple(low[:20]), held if validation else {}, {}, {})


def numbers(rows, **asked):
    found = [row for row in rows if asked.items() <= row.items()]
    assert len(found) == 1, (asked, found)
    return found[0]


# ── gauges ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layer", [1, 4, DEPTH, 0.5])
def test_its_poles_lie_at_one_and_minus_one(layer):
    gauge = Gauge.fit(Planted(), HIGH[:20], LOW[:20], layer=layer, position="t_inst")
    assert gauge.read(Planted(), HIGH[:20]).mean() == pytest.approx(1, abs=1e-5) and gauge.read(Planted(), LOW[:20]).mean() == pytest.approx(-1, abs=1e-5)
    assert float(gauge.vector.norm()) == pytest.approx(1) and gauge.layer == (4 if layer == 0.5 else layer) and gauge.half > 0
    assert gauge.read(Planted(), HIGH[20:]).mean() == pytest.approx(1, abs=0.2), "and so do prompts that did not make it"


def test_it_has_no_unit_and_no_origin():
    """Scaling or shifting all states changes nothing."""
    states = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states[:15, 3] += 2
    make = partial(Gauge.between, layer=1, position="t_inst")
    own = make(states[:15], states[15:]).of(states)
    moved = 40 * states + torch.arange(WIDTH)
    np.testing.assert_allclose(make(moved[:15], moved[15:]).of(moved), own, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(make(states[15:], states[:15]).of(states), -own, atol=1e-5)


def test_a_known_step_along_it_is_that_step():
    gauge = Gauge.between(torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), layer=2, position="t_inst")
    assert (gauge.middle, gauge.half) == (2.0, 2.0)
    np.testing.assert_allclose(gauge.of(torch.tensor([[2.0, 9.0], [4.0, -9.0], [6.0, 0.0]])), [0.0, 1.0, 2.0], atol=1e-6)


def test_a_random_direction_is_in_its_unit_and_means_nothing():
    gauge = Gauge.fit(Planted(), HIGH[:20], LOW[:20], layer=4, position="t_inst")
    drawn = [gauge.random(seed) for seed in range(200)]
    assert all(float(one.vector.norm()) == pytest.approx(1) and (one.half, one.layer, one.position) == (gauge.half, 4, "t_inst") for one in drawn)
    assert torch.equal(drawn[3].vector, gauge.random(3).vector) and not torch.equal(drawn[3].vector, drawn[4].vector)
    cosines = [float(one.vector @ gauge.vector) for one in drawn]
    assert abs(np.mean(cosines)) < 0.05 and np.std(cosines) == pytest.approx(WIDTH**-0.5, rel=0.2)
    step = torch.zeros(2, WIDTH)
    step[1, AXES.index("harm")] = 2 * gauge.half
    shift = np.array([np.diff(one.of(step))[0] for one in drawn])
    assert np.diff(gauge.of(step))[0] == pytest.approx(2, abs=0.1) and np.abs(shift).mean() < 0.5, "a shift of one pole to the other"


def test_both_gauges_are_the_papers_two():
    found = gauges(Planted(), cast())
    assert {name: g.position for name, g in found.items()} == {"harmfulness": "t_inst", "refusal": "t_post_inst"}
    for name, axis in (("harmfulness", "harm"), ("refusal", "refusal")):
        assert float(found[name].vector[AXES.index(axis)]) > 0.95 and found[name].layer > 0
    like = found["harmfulness"].read(Planted(), LIKE)
    assert like.mean() == pytest.approx(-1, abs=0.2), "look-alikes lie where the planted truth has them"


def test_the_layer_is_told_by_validation_prompts_and_can_be_named():
    model = Planted(carries=(6,), noise=0.3)  # nowhere else is there anything to tell
    assert {g.layer for g in gauges(model, cast()).values()} == {6}
    assert {g.layer for g in gauges(model, cast(validation=False)).values()} == {DEPTH // 2}, "the middle, where nothing is held out"
    found = gauges(model, cast(), layers={"refusal": 2})
    assert (found["harmfulness"].layer, found["refusal"].layer) == (6, 2)
    assert min(g.layer for g in gauges(Planted(carries=(0,)), cast()).values()) >= 1, "behind the template all prompts have one embedding"


def test_gauges_that_cannot_be_made_say_why():
    with pytest.raises(InputError, match="both sides, got 3 and 0"):
        Gauge.fit(Planted(), HIGH[:3], [], layer=1, position="t_inst")
    with pytest.raises(InputError, match="layer 2: both sides have the same mean"):
        Gauge.between(torch.ones(2, 4), torch.ones(3, 4), layer=2, position="t_inst")
    with pytest.raises(InputError, match="not all finite"):
        Gauge.between(torch.full((2, 4), float("nan")), torch.ones(3, 4), layer=2, position="t_inst")
    with pytest.raises(InputError, match="layer 99"):
        Gauge.fit(Planted(), HIGH[:3], LOW[:3], layer=99, position="t_inst")


def test_nothing_is_read_for_no_prompt():
    gauge = Gauge.fit(Planted(), HIGH[:20], LOW[:20], layer=4, position="t_inst")
    assert gauge.read(None, []).shape == (0,)  # type: ignore[arg-type]


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def seen(name="base", kind="base", *, harmful=30, harmless=2, utility=None, harmfulness=None, seed=0, degenerate=0):
    replies = {"harmful": judged(HIGH, harmful, degenerate), "harmless": judged(LOW, harmless)}
    return Observed(name, kind, replies, utility, {"harmful": harmfulness} if harmfulness is not None else {}, {}, seed)


def test_every_rate_has_its_interval_n_judge_and_degenerate_share():
    (row,) = [r for r in outcomes([seen(degenerate=4, seed=7)], Phrases()) if r["label"] == "harmful"]
    found = wilson(30, 40)
    assert (row["value"], row["low"], row["high"], row["n"]) == (0.75, found.low, found.high, 40)
    assert (row["invalid"], row["invalid_rate"], row["seed"], row["condition"], row["kind"]) == (4, 0.1, 7, "base", "base")
    assert row["judge"] == Phrases().name and "change" not in row and row["measure"] == "harmful refusal"


def test_a_change_is_prompt_by_prompt():
    worth = np.linspace(-2, -1, 40)
    rows = outcomes([seen(utility=worth), seen("other", "method", harmful=20, utility=worth - 0.5)], Phrases())
    change, paired = numbers(rows, condition="other", measure="harmful refusal"), paired_difference([True] * 20 + [False] * 20, [True] * 30 + [False] * 10)
    assert (change["change"], change["change_low"], change["change_high"]) == (paired.value, paired.low, paired.high) and change["change"] == -0.25
    moved = numbers(rows, condition="other", measure="utility")
    assert moved["change"] == pytest.approx(-0.5) and moved["change_low"] == pytest.approx(-0.5), "the spread between prompts is not in the change"
    assert moved["low"] < moved["value"] - 0.05 and moved["value"] == pytest.approx(mean(worth - 0.5).value)
    none = numbers(rows, condition="other", measure="harmless refusal")
    assert none["change"] == 0 and none["change_low"] < 0 < none["change_high"], "no change of 40 is not certainty"


def test_gauges_of_each_label_are_rows_of_their_own():
    base = replace(seen(), harmfulness={"harmful": [1.0] * 40, "lookalike": [-1.0] * 5}, refusal={"harmful": [0.5] * 40, "harmless": []})
    rows = outcomes([base], Phrases())
    assert {(r["measure"], r["label"]) for r in rows} >= {("harmfulness", "harmful"), ("harmfulness", "lookalike"), ("refusal", "harmful")}
    assert ("refusal", "harmless") not in {(r["measure"], r["label"]) for r in rows} and {r["measure"] for r in rows} <= set(MEASURES)


def test_a_measure_that_the_base_lacks_has_no_change():
    rows = outcomes([seen(), seen("other", "control", utility=[-1.0] * 4)], Phrases())
    assert "change" not in numbers(rows, condition="other", measure="utility") and "change" in numbers(rows, condition="other", measure="harmful refusal")


def test_a_table_without_a_base_or_of_other_prompts_is_refused():
    with pytest.raises(InputError, match="none of gate is the base"):
        outcomes([seen("gate", "method")], Phrases())
    with pytest.raises(InputError, match="no condition is the base"):
        outcomes([], Phrases())
    short = Observed("gate", "method", {"harmful": judged(HIGH[:10], 5)})
    with pytest.raises(InputError, match="gate has 10 harmful prompts for harmful refusal, base 40"):
        outcomes([seen(), short], Phrases())
    turned = Observed("gate", "method", {"harmful": judged(HIGH[::-1], 5)})
    with pytest.raises(InputError, match="other harmful prompts than base, or in another order, first harmful-039"):
        outcomes([seen(), turned], Phrases())


def test_rewrites_of_the_same_requests_may_be_set_against_them():
    rewritten = [p.with_instruction("Please: " + p.instruction, id=f"{p.id}~polite") for p in HIGH]
    rows = outcomes([seen(), Observed("polite", "method", {"harmful": judged(rewritten, 10)})], Phrases())
    assert numbers(rows, condition="polite", measure="harmful refusal")["change"] == -0.5


def test_the_base_need_not_come_first():
    rows = outcomes([seen("gate", "method", harmful=10), seen()], Phrases())
    assert numbers(rows, condition="gate", measure="harmful refusal")["change"] == -0.5 and "change" not in numbers(
        rows, condition="base", measure="harmful refusal"
    )


@pytest.mark.parametrize(
    ("refused", "of", "word"), [(30, 40, ""), (29, 40, "insufficient_base_rate"), (0, 40, "insufficient_base_rate"), (0, 0, "insufficient_base_rate")]
)
def test_the_gate_asks_for_refusals_enough(refused, of, word):
    base = Observed("base", "base", {"harmful": judged(HIGH[:of], refused)})
    assert gate(base) == word and gate(base, "lookalike") == "insufficient_base_rate"


def test_a_degenerate_reply_is_no_refusal():
    base = Observed("base", "base", {"harmful": judged(HIGH, 29, 11)})
    assert gate(base) and numbers(outcomes([base], Phrases()), measure="harmful refusal")["value"] == 29 / 40

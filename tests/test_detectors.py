"""Detectors as maths: what a score must do whatever the numbers are, and what planted structure they must find."""

import math

import numpy as np
import pytest
import torch

from latentguard.detectors import Centroids, Counted, Projection, best_layer, ngrams
from latentguard.directions import Activations
from latentguard.errors import InputError
from latentguard.metrics import auroc
from latentguard.prompts import Prompt

LAYERS, WIDTH = 6, 12


def states_of(n, seed, shift=None):
    torch.manual_seed(seed)
    values = torch.randn(n, LAYERS, WIDTH) + 1.0
    return values if shift is None else values + shift


@pytest.fixture
def guard():
    poles = states_of(2, 0)
    return Centroids(poles[0], poles[1])


def test_swapping_the_poles_negates_every_score(guard):
    states, swapped = states_of(9, 1), Centroids(guard.low, guard.high)
    torch.testing.assert_close(guard.separation(states), -swapped.separation(states))
    torch.testing.assert_close(guard.score(states), -swapped.score(states))
    assert guard.score(states).abs().min() > 1e-3


def test_s_is_a_difference_of_two_cosines(guard):
    states = torch.cat([states_of(50, 2), guard.high[None], guard.low[None], -guard.high[None]])
    s = guard.separation(states)
    assert s.abs().max() <= 2 + 1e-6
    cosine = torch.cosine_similarity(guard.high, guard.low, dim=-1)
    torch.testing.assert_close(s[50], 1 - cosine)
    torch.testing.assert_close(s[51], cosine - 1)
    by_hand = np.array([[np.dot(h, p) / np.linalg.norm(h) / np.linalg.norm(p) for h, p in zip(states[7], guard.high, strict=True)]])
    by_hand = by_hand - [[np.dot(h, p) / np.linalg.norm(h) / np.linalg.norm(p) for h, p in zip(states[7], guard.low, strict=True)]]
    np.testing.assert_allclose(s[7].numpy(), by_hand[0], atol=1e-6)


def test_opposite_poles_reach_both_ends():
    pole = torch.randn(LAYERS, WIDTH)
    s = Centroids(pole, -pole).separation(torch.stack([3 * pole, -0.1 * pole]))
    torch.testing.assert_close(s, torch.tensor([[2.0], [-2.0]]).expand(2, LAYERS))


def test_delta_is_the_mean_over_all_layers_or_the_chosen_ones(guard):
    states = states_of(5, 3)
    s = guard.separation(states)
    torch.testing.assert_close(guard.score(states), s.sum(1) / LAYERS)
    for layer in range(LAYERS):
        torch.testing.assert_close(guard.at_layer(layer).score(states), s[:, layer])
    chosen = Centroids(guard.high, guard.low, layers=(1, 4))
    torch.testing.assert_close(chosen.score(states), (s[:, 1] + s[:, 4]) / 2)


def test_the_length_of_a_state_or_a_pole_changes_nothing(guard):
    states = states_of(5, 4)
    scales = torch.rand(5, LAYERS, 1) * 9 + 0.1
    torch.testing.assert_close(guard.score(states * scales), guard.score(states), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Centroids(7 * guard.high, 0.2 * guard.low).score(states), guard.score(states), atol=1e-5, rtol=1e-5)


def test_equal_poles_tell_nothing(guard):
    assert Centroids(guard.high, guard.high).score(states_of(4, 5)).abs().max() == 0


def activations(groups):
    prompts = tuple(Prompt.of(f"{name} {k}", id=f"{name}{k}") for name, values in groups.items() for k in range(len(values)))
    values = torch.cat(list(groups.values()))[:, :, None]
    return Activations(values, prompts, tuple(range(LAYERS)), ("t_inst",), "m", "w", LAYERS - 1), prompts


def test_fit_takes_the_means_of_its_own_prompts_only():
    groups = {"high": states_of(4, 6), "low": states_of(3, 7), "else": states_of(5, 8) * 100}
    states, prompts = activations(groups)
    guard = Centroids.fit(states, prompts[:4], prompts[4:7])
    torch.testing.assert_close(guard.high, groups["high"].mean(0))
    torch.testing.assert_close(guard.low, groups["low"].mean(0))
    for sides in ((prompts[:4], []), ([], prompts[4:])):
        with pytest.raises(InputError, match="both sides"):
            Centroids.fit(states, *sides)
    with pytest.raises(InputError, match="was not read"):
        Centroids.fit(states, prompts[:4], prompts[4:7], position="t_post_inst")


def test_states_that_are_not_finite_are_refused_and_not_called_harmless():
    """A model in float16 may overflow: every comparison with NaN is False, which is the verdict "harmless"."""
    groups = {"high": states_of(4, 6), "low": states_of(3, 7)}
    groups["high"][2, 3, 1] = float("inf")
    states, prompts = activations(groups)
    with pytest.raises(InputError, match="finite"):
        Centroids.fit(states, prompts[:4], prompts[4:])


def test_projection_is_zero_half_way_and_in_the_states_units(guard):
    for layer in range(LAYERS):
        projection = Projection.fit(guard, layer)
        middle, distance = (guard.high + guard.low) / 2, float((guard.high[layer] - guard.low[layer]).norm())
        points = torch.stack([middle, guard.high, guard.low, middle + 5 * sideways(guard, layer)])
        torch.testing.assert_close(projection.score(points), torch.tensor([0.0, distance / 2, -distance / 2, 0.0]), atol=1e-4, rtol=1e-4)


def sideways(guard, layer):
    """At every layer a vector that is square to the difference of the poles there."""
    torch.manual_seed(9)
    along = torch.nn.functional.normalize(guard.high - guard.low, dim=-1)
    noise = torch.randn(LAYERS, WIDTH)
    return noise - (noise * along).sum(-1, keepdim=True) * along


def test_projection_is_not_fooled_by_other_layers(guard):
    states = states_of(3, 10)
    changed = states.clone()
    changed[:, [0, 1, 3, 4, 5]] += 50
    torch.testing.assert_close(Projection.fit(guard, 2).score(changed), Projection.fit(guard, 2).score(states))


def test_counted_recovers_a_planted_token():
    draw = np.random.default_rng(0)

    def prompts(n, token):
        return [[int(t) for t in draw.integers(0, 20, 5)] + [token] for _ in range(n)]

    fitted = Counted.fit(prompts(60, "bad"), prompts(60, "good"))
    assert max(fitted.log_odds, key=lambda t: fitted.log_odds[t]) == "bad" and min(fitted.log_odds, key=lambda t: fitted.log_odds[t]) == "good"
    assert fitted.log_odds["bad"] == pytest.approx(-fitted.log_odds["good"])
    high, low = fitted.score(prompts(40, "bad")), fitted.score(prompts(40, "good"))
    assert auroc(high, low).value > 0.99 and min(high) > 0 > max(low)
    alike = Counted.fit(prompts(60, "same"), prompts(60, "same"))
    assert abs(auroc(alike.score(prompts(200, "same")), alike.score(prompts(200, "same"))).value - 0.5) < 0.1


def test_counted_gives_the_smoothed_log_odds():
    fitted = Counted.fit([["a"], ["a"], ["b"]], [["b"], ["c"], ["c"]])
    # three known items and one slot for the unknown: (count + 1) / (3 + 3 + 1)
    assert fitted.log_odds == pytest.approx({"a": math.log(3), "b": 0.0, "c": -math.log(3)})
    assert fitted.score([["a", "b"], [], ["a", "c"]]) == pytest.approx([math.log(3) / 2, 0.0, 0.0])


@pytest.mark.parametrize("n_low", [30, 10, 90])
def test_an_unseen_item_is_neutral_whatever_the_sides_sizes(n_low):
    """Else the baseline calls every prompt with a new last token harmful, or every one harmless, by the size of its sides alone."""
    fitted = Counted.fit([["x"]] * 30, [["y"]] * n_low)
    assert fitted.score([["never seen"]])[0] == pytest.approx(0.0)
    assert fitted.score([["x"]])[0] > 0 > fitted.score([["y"]])[0]


def planted_at(layers, n=40, seed=11):
    """Two lots of states that lie apart at some layers and nowhere else, and a guard fitted on others of the same kind."""
    shift = torch.zeros(LAYERS, WIDTH)
    shift[list(layers), 0] = 6.0
    high, low = states_of(n, seed, shift), states_of(n, seed + 1, -shift)
    return Centroids(states_of(n, seed + 2, shift).mean(0), states_of(n, seed + 3, -shift).mean(0)), high, low


@pytest.mark.parametrize("layer", range(LAYERS))
def test_best_layer_finds_the_planted_one(layer):
    assert best_layer(*planted_at([layer])) == layer


def test_best_layer_is_the_middle_one_among_equals_and_where_nothing_is_known():
    guard, high, low = planted_at(range(LAYERS))
    assert best_layer(guard, high, low) == LAYERS // 2
    assert best_layer(*planted_at([0, 1])) == 1
    assert best_layer(*planted_at([0, 5])) in (0, 5)
    assert best_layer(guard, high[:0], low) == best_layer(guard, high, low[:0]) == LAYERS // 2


def test_ngrams_are_words_marks_and_neighbours():
    assert ngrams("Stop the Bus!") == ["stop", "the", "bus", "!", ("stop", "the"), ("the", "bus"), ("bus", "!")]
    assert ngrams("one") == ["one"]

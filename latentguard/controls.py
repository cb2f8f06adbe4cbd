"""What an effect is set against: shuffled labels, split halves, resampled cosines. Knows no model and no study."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from latentguard.directions import Activations, Direction, mean_difference
from latentguard.metrics import Value, split_half
from latentguard.prompts import Prompt

RESAMPLES = 200


def mixed_sides(high: Sequence[Prompt], low: Sequence[Prompt], seed: int, draws: int) -> list[tuple[list[Prompt], list[Prompt]]]:
    """Two sides that mean nothing, drawn anew: each holds half of either pole.

    A free shuffle leaves the sides with unequal shares, and its difference still points along the poles' own.
    """
    generator, found = np.random.default_rng(seed), []
    for _ in range(draws):
        sides: tuple[list[Prompt], list[Prompt]] = ([], [])
        for pole in (high, low):
            order, half = generator.permutation(len(pole)), len(pole) // 2
            for side, rows in zip(sides, (order[:half], order[half : 2 * half]), strict=True):
                side += [pole[i] for i in rows]
        found.append(sides)
    return found


def shuffled_labels(states: Activations, high: Sequence[Prompt], low: Sequence[Prompt], like: Direction, seed: int) -> Direction:
    """The difference of means of two mixed sides, at the norm of `like` at every layer."""
    made = mean_difference(states, *mixed_sides(high, low, seed, 1)[0], position=like.position, name="shuffled")
    size = like.vectors.norm(dim=-1, keepdim=True) / made.vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return replace(made, vectors=made.vectors * size, method=f"shuffled_labels(seed={seed})")


def cosine_by_layer(states: Activations, high: Sequence[Prompt], low: Sequence[Prompt], places: tuple[str, str]) -> tuple[list[dict[str, Any]], Value]:
    """Cosine of the differences of means at two positions, layer by layer, and its mean over layers 1 … L.

    Intervals: 200 resamples of the prompts of each pole, centred on the value, since resampling adds noise that only lowers a
    cosine. `ceiling`: the cosine that two halves of the same
    prompts reach at one position, the geometric mean of both positions; a cosine cannot be expected above it.
    """
    sides = [[states.at(place, side).double().numpy() for side in (high, low)] for place in places]
    generator = np.random.default_rng(0)
    found = _cosines(*(a.mean(0) - b.mean(0) for a, b in sides))
    drawn = np.stack([_resampled(sides, generator) for _ in range(RESAMPLES)])
    ceilings = [np.mean([_halves(a, b, generator) for _ in range(20)], 0) for a, b in sides]
    above = [i for i, layer in enumerate(states.layers) if layer > 0]
    whole = Value(float(np.nanmean(found[above])), *_centred(float(np.nanmean(found[above])), np.nanmean(drawn[:, above], 1)), len(high) + len(low))
    rows = []
    for i, layer in enumerate(states.layers):
        if np.isfinite(found[i]):
            lower, upper = _centred(float(found[i]), drawn[:, i])
            reach = float(np.sqrt(max(0.0, ceilings[0][i] * ceilings[1][i])))
            rows.append({"layer": layer, "value": float(found[i]), "low": lower, "high": upper, "n": whole.n, "ceiling": reach})
    return rows, whole


def halves_across(sides: Sequence[np.ndarray], seed: int) -> list[float]:
    """By layer, the cosine between a difference of means before and one after, each from one half of the prompts.

    Args:
        sides: [prompt, layer, d_model] of both poles before, then of both after, row by row the same prompts.
    """
    return [split_half(np.concatenate([side[:, i] for side in sides], -1), _across, seed) for i in range(sides[0].shape[1])]


def _across(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of `a`'s difference of means before with `b`'s after; NaN where one is zero."""
    x, y = np.subtract(*np.split(a.mean(0), 4)[:2]), np.subtract(*np.split(b.mean(0), 4)[2:])
    return float(_cosines(x[None], y[None])[0])


def _centred(value: float, drawn: np.ndarray) -> tuple[float, float]:
    """The 95% spread of resamples about their own mean, put around the value; within −1 … 1."""
    low, high = np.nanpercentile(drawn, [2.5, 97.5]) - np.nanmean(drawn)
    return max(-1.0, value + float(low)), min(1.0, value + float(high))


def _cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Row by row; NaN where one is zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


def _resampled(sides: list[list[np.ndarray]], generator: np.random.Generator) -> np.ndarray:
    """One resample; a prompt is drawn at both positions or at neither."""
    weights = [generator.multinomial(len(side), np.full(len(side), 1 / len(side))) / len(side) for side in sides[0]]
    differences = [np.tensordot(weights[0], a, 1) - np.tensordot(weights[1], b, 1) for a, b in sides]
    return _cosines(*differences)


def _halves(high: np.ndarray, low: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Cosine, by layer, of the differences that two random halves of the prompts give."""
    orders = [generator.permutation(len(side)) for side in (high, low)]
    halves = [[side[order[: len(side) // 2]].mean(0), side[order[len(side) // 2 :]].mean(0)] for side, order in zip((high, low), orders, strict=True)]
    return _cosines(halves[0][0] - halves[1][0], halves[0][1] - halves[1][1])

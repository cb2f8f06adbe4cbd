"""How states move when the same prompts are put otherwise: the mean move against a direction, and what is left of a distance. Knows no model.

Moves are compared with directions that mean nothing, and distances with intervals that resample prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from latentguard.metrics import DRAWS, Value, mean

Row = dict[str, Any]
Pair = tuple[np.ndarray, np.ndarray]


def against(moved: Tensor, direction: Tensor) -> Row:
    """Cosine of the mean of `moved` [prompt, d_model] with a direction [d_model], and its coefficient on it, (mean · v) / ‖v‖², with a bootstrap
    interval over prompts (arXiv 2504.03735: r_A against −r), and both norms. NaN where either is zero.
    """
    moves, along = moved.double().numpy(), direction.double().numpy()
    size, length = float(along @ along), float(np.linalg.norm(moves.mean(0)))
    norms = {"move_norm": length, "direction_norm": float(np.sqrt(size))}
    if not size > 0 or not length > 0:
        return {**dict.fromkeys(("cosine", "coefficient", "coefficient_low", "coefficient_high"), np.nan), **norms}
    found = mean(moves @ along / size)
    cosine = found.value * np.sqrt(size) / length
    return {"cosine": float(cosine), "coefficient": found.value, "coefficient_low": found.low, "coefficient_high": found.high, **norms}


def against_nothing(moved: Tensor, directions: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """The same two numbers with directions that mean nothing, one a direction; NaN where either is zero."""
    move, along = moved.double().numpy().mean(0), np.stack([one.double().numpy() for one in directions])
    sizes, length = (along**2).sum(1), float(np.linalg.norm(move))
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"cosine": along @ move / np.sqrt(sizes) / length, "coefficient": along @ move / sizes}


def between(values: np.ndarray, name: str) -> Row:
    """Between which 95% of the draws lie, as `{name}_low` and `{name}_high`; NaN where one is not finite."""
    low, high = np.percentile(values, [2.5, 97.5]) if np.isfinite(values).all() else (np.nan, np.nan)
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def distance_drawn(pair: Pair, seed: int) -> np.ndarray:
    """Mean of the first − mean of the second, numbers a prompt: the sample's own first, then of resamples of the prompts of either."""
    generator, means = np.random.default_rng(seed), []
    for values in pair:
        n = len(values)
        drawn = generator.multinomial(n, np.full(n, 1 / n), DRAWS) / n
        means.append(np.concatenate([np.full((1, n), 1 / n), drawn]) @ np.asarray(values, float))
    return means[0] - means[1]


def distances_left(gauges: Mapping[str, tuple[Pair, Mapping[str, Pair]]], seed: int) -> dict[str, dict[str, np.ndarray]]:
    """By gauge and way of putting the prompts, what is left of the distance between two groups' means, in parts of the distance before:
    the sample's own share first, then of every resample, the same for all gauges and ways. NaN where the distance before is not clear of
    0: a part of nothing says nothing.

    Args:
        gauges: by name ((high, low) before, by way (high, low) after), each a number a prompt.
    """
    found = {}
    for name, (before, after) in gauges.items():
        whole = distance_drawn(before, seed)
        whole = whole if np.percentile(whole[1:], 2.5) > 0 else np.full_like(whole, np.nan)
        found[name] = {way: distance_drawn(pair, seed) / whole for way, pair in after.items()}
    return found


def interval(drawn: np.ndarray, n: int) -> Value:
    """A statistic of the sample, first in `drawn`, with the percentiles of its resamples; NaN where one is not finite."""
    if not len(drawn) or not np.isfinite(drawn).all():
        return Value(np.nan, np.nan, np.nan, n)
    low, high = (float(x) for x in np.percentile(drawn[1:], [2.5, 97.5]))
    return Value(float(drawn[0]), min(low, float(drawn[0])), max(high, float(drawn[0])), n)

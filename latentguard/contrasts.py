"""Two poles of prompts, read at several places of one or two models: how alike are their differences, and do probes carry over? Knows no study.

A place is a view (how the words are set before the model) and a position; a contrast's poles are balanced, so that their difference is
that of the contrast alone.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from latentguard.backends import Backend
from latentguard.controls import cosine_by_layer, halves_across, mixed_sides
from latentguard.directions import Activations
from latentguard.layers import Layers
from latentguard.metrics import Rate, Value, auroc, rate
from latentguard.prompts import Prompt
from latentguard.roles import find_places

Row = dict[str, Any]
VIEWS = {"chat": "", "plain_roles": "plain_roles", "plain": "plain"}  # as settings call them → Prompt.view
PAPER = ("plain_roles t_inst", "chat t_post_inst")  # where arXiv 2504.02904's code reads the base model, and the post-trained one
METHODS = ("mass_mean", "logistic")
LEAST = 8  # prompts a pole
GIANT = 2  # times the lower quartile of norms


@dataclass(frozen=True, eq=False)
class Contrast:
    """Two poles of one size to fit on, and held-out ones by what they are of.

    Args:
        high, low: [prompt] each.
        held: name → (high, low).
    """

    name: str
    high: tuple[Prompt, ...]
    low: tuple[Prompt, ...]
    held: Mapping[str, tuple[tuple[Prompt, ...], tuple[Prompt, ...]]] = field(default_factory=dict)

    @property
    def thin(self) -> str:
        """'' where there is something to fit on."""
        return "" if min(len(self.high), len(self.low)) >= LEAST else f"{self.name}: {len(self.high)} and {len(self.low)} prompts, fewer than {LEAST} a pole"

    def everyone(self) -> list[Prompt]:
        """Each prompt once."""
        parts = [self.high, self.low, *(side for sides in self.held.values() for side in sides)]
        return list({p.id: p for part in parts for p in part}.values())

    def fitting(self) -> tuple[tuple[Prompt, ...], ...]:
        """Three quarters of either pole, and the quarter by which a layer is chosen."""
        cut = max(1, round(len(self.high) * 0.75)), max(1, round(len(self.low) * 0.75))
        return self.high[: cut[0]], self.low[: cut[1]], self.high[cut[0] :], self.low[cut[1] :]


def balanced(high: Iterable[Prompt], low: Iterable[Prompt]) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """As many of every label (of statements: topic) on either side, in turn: what the sides differ in is not the label."""
    sides: list[dict[str, list[Prompt]]] = [{}, {}]
    for side, prompts in zip(sides, (high, low), strict=True):
        for prompt in prompts:
            side.setdefault(prompt.category if prompt.label == "unlabelled" else prompt.label, []).append(prompt)
    both = [(sides[0][label], sides[1][label]) for label in sides[0] if label in sides[1]]
    rounds = [
        pair
        for rank in range(max((min(map(len, one)) for one in both), default=0))
        for one in both
        if rank < min(map(len, one))
        for pair in [(one[0][rank], one[1][rank])]
    ]
    return tuple(high for high, _ in rounds), tuple(low for _, low in rounds)


def places_of(views: Sequence[str], positions: Sequence[str]) -> list[str]:
    """Names of all places; in the view `plain` nothing follows the request, so that its two positions are one."""
    return [f"{view} {position}" for view in views for position in positions if not (view == "plain" and position == "t_post_inst" and "t_inst" in positions)]


def check_places(backend: Backend, prompts: Sequence[Prompt], views: Sequence[str], positions: Sequence[str]) -> None:
    """Refuse a view that the template cannot do, or a position that a prompt lacks in it, before anything slow."""
    for view in views:
        find_places(backend, [p.seen(VIEWS[view]) for p in prompts], positions)


def read_places(backend: Backend, prompts: Sequence[Prompt], views: Sequence[str], positions: Sequence[str], layers: Layers) -> Activations:
    """States at every place, under its name, of the prompts as they were given (without their view)."""
    parts, names, states = [], [], None
    for view in views:
        named = [position for position in positions if f"{view} {position}" in places_of(views, positions)]
        states = backend.read([p.seen(VIEWS[view]) for p in prompts], layers, named)
        parts.append(states.values)
        names += [f"{view} {position}" for position in named]
    assert states is not None
    return replace(states, values=torch.cat(parts, 2), prompts=tuple(prompts), positions=tuple(names))


def giants(states: Activations) -> dict[str, set[str]]:
    """By place, the ids of prompts whose state there has, at some layer above the embeddings, a norm over `GIANT` times the lower quartile's.

    Some models put a norm tens of times the others' on the first full stop of a text, or on its first token, in few dimensions and whatever the
    text says. A difference of means is then a difference in how many of them either side has, and equal for any contrast.
    """
    norms = states.values.norm(dim=-1)[:, [layer > 0 for layer in states.layers]]
    large = (norms > GIANT * norms.quantile(0.25, dim=0, keepdim=True)).any(1)
    return {place: {p.id for p, hit in zip(states.prompts, large[:, i].tolist(), strict=True) if hit} for i, place in enumerate(states.positions)}


def without(contrast: Contrast, ids: Collection[str]) -> Contrast:
    """Without some prompts in its poles, which stay as many of every label and topic; held-out prompts stay."""
    poles = [[p for p in side if p.id not in ids] for side in (contrast.high, contrast.low)]
    if {p.label for p in contrast.high} & {p.label for p in contrast.low}:
        return replace(contrast, **dict(zip(("high", "low"), balanced(*poles), strict=True)))
    n = min(map(len, poles))
    return replace(contrast, high=tuple(poles[0][:n]), low=tuple(poles[1][:n]))


def beside(states: Mapping[str, Activations], a: tuple[str, str], b: tuple[str, str], contrast: Contrast, layers: Sequence[int] | None = None) -> Activations:
    """The poles' states at two places of two models (or of one), as two positions `a` and `b` of one.

    Args:
        a, b: (name of the model in `states`, place).
        layers: some of those read; None is all.
    """
    prompts = [*contrast.high, *contrast.low]
    one = states[a[0]]
    at = [one.layer_index(layer) for layer in (layers if layers is not None else one.layers)]
    values = torch.stack([states[model].at(place, prompts)[:, at] for model, place in (a, b)], 2)
    return replace(one, values=values, prompts=tuple(prompts), layers=tuple(one.layers[i] for i in at), positions=("a", "b"))


def cosines(states: Mapping[str, Activations], a: tuple[str, str], b: tuple[str, str], contrast: Contrast, layers: Sequence[int] | None = None) -> list[Row]:
    """Cosine of a contrast's difference of means at two places, a row a layer above the embeddings: value, low, high, n, and `ceiling`, what two
    halves of the prompts reach at one place (`controls.cosine_by_layer`).
    """
    pair = beside(states, a, b, contrast, layers)
    rows = [row for row in cosine_by_layer(pair, contrast.high, contrast.low, ("a", "b"))[0] if row["layer"] > 0]
    value = [min(1.0, max(-1.0, row["value"])) for row in rows]  # rounding of two equal directions
    return [{**row, "value": at, "low": min(at, row["low"]), "high": max(at, row["high"])} for row, at in zip(rows, value, strict=True)]


def null_cosines(
    states: Mapping[str, Activations], a: tuple[str, str], b: tuple[str, str], contrast: Contrast, layer: int, seed: int, draws: int
) -> Row:  # fmt: skip
    """What a cosine is set against at one layer: `random_high`, the 97.5% quantile of |cosine| between b's direction and isotropic ones;
    `shuffled_high`, the highest |cosine| between it and the differences that a's states give for poles with shuffled labels; `halves`, the
    cosine of a's direction from one half of the prompts with b's from the other (no prompt's own quirks are in both).
    """
    pair = beside(states, a, b, contrast, [layer])
    sides = [pair.at(place, side).double().numpy() for place in ("a", "b") for side in (contrast.high, contrast.low)]
    direction = sides[2].mean(0)[0] - sides[3].mean(0)[0]
    noise = np.random.default_rng(seed).normal(size=(1000, len(direction)))
    shuffled = []
    for high, low in mixed_sides(contrast.high, contrast.low, seed, draws):
        made = pair.at("a", high).double().mean(0)[0] - pair.at("a", low).double().mean(0)[0]
        shuffled.append(abs(float(_cosine(made.numpy()[None], direction)[0])))
    random = float(np.quantile(np.abs(_cosine(noise, direction)), 0.975))
    return {"random_high": random, "shuffled_high": max(shuffled), "halves": halves_across(sides, seed)[0]}


def choose_layer(states: Mapping[str, Activations], contrast: Contrast, places: Sequence[str]) -> int:
    """The layer at which the difference of means of three quarters of the poles tells the last quarter apart best (AUROC), mean over models and
    places; the middle one among equals, never the embeddings.
    """
    high, low, more_high, more_low = contrast.fitting()
    some = next(iter(states.values()))
    total = np.zeros(len(some.layers))
    for one in states.values():
        for place in places:
            direction = one.at(place, high).double().mean(0) - one.at(place, low).double().mean(0)
            scores = [(one.at(place, side).double() * direction).sum(-1).numpy() for side in (more_high, more_low)]
            total += [_area(scores[0][:, i], scores[1][:, i]) for i in range(len(total))]
    able = [i for i, layer in enumerate(some.layers) if layer > 0]
    best = max(total[i] for i in able)
    return some.layers[min((i for i in able if total[i] >= best - 1e-9), key=lambda i: abs(i - len(total) / 2))]


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear score of states at one layer: above 0 is the high side.

    Args:
        weights: [d_model].
    """

    weights: np.ndarray
    bias: float

    @classmethod
    def fit(cls, method: str, high: np.ndarray, low: np.ndarray) -> "Probe":
        """`mass_mean`: along the difference of means, 0 half-way; `logistic`: scikit-learn's, on standardised states. [prompt, d_model] each."""
        if method == "mass_mean":
            direction = high.mean(0) - low.mean(0)
            return cls(direction, -float((high.mean(0) + low.mean(0)) @ direction) / 2)
        from sklearn.linear_model import LogisticRegression

        both = np.concatenate([high, low])
        middle, spread = both.mean(0), both.std(0) + 1e-6
        made = LogisticRegression(C=0.1, max_iter=2000).fit((both - middle) / spread, np.arange(len(both)) < len(high))
        weights = made.coef_[0] / spread
        return cls(weights, float(made.intercept_[0] - middle @ weights))

    def score(self, states: np.ndarray) -> np.ndarray:
        """Of [prompt, d_model]."""
        return states @ self.weights + self.bias


@dataclass(frozen=True, eq=False)
class Carried:
    """A probe on held-out prompts: its area, the accuracy at its own threshold, and every score."""

    area: Value
    accuracy: Rate
    high: np.ndarray
    low: np.ndarray


def carried(probe: Probe, high: np.ndarray, low: np.ndarray) -> Carried:
    """Score held-out states [prompt, d_model] of either side."""
    scores = probe.score(high), probe.score(low)
    return Carried(auroc(*scores), rate([*(scores[0] > 0), *(scores[1] <= 0)]), *scores)


def random_area(high: np.ndarray, low: np.ndarray, seed: int, draws: int) -> Value:
    """The area that isotropic random directions reach on held-out states, each taken the way round that does better: mean, and the middle 95%."""
    directions = np.random.default_rng(seed).normal(size=(draws, high.shape[1]))
    areas = [_area(high @ d, low @ d) for d in directions]
    areas = [max(area, 1 - area) for area in areas]
    return Value(float(np.mean(areas)), *map(float, np.percentile(areas, [2.5, 97.5])), len(high) + len(low))


def _area(high: np.ndarray, low: np.ndarray) -> float:
    """AUROC alone, half for a side without prompts."""
    if not (len(high) and len(low)):
        return 0.5
    ranked = np.sort(low)
    return float((np.searchsorted(ranked, high, "left") + np.searchsorted(ranked, high, "right")).mean() / (2 * len(low)))


def _cosine(vectors: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Of each row with one; 0 where one of them is."""
    return vectors @ one / np.maximum(np.linalg.norm(vectors, axis=-1) * np.linalg.norm(one), 1e-30)

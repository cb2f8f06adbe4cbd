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
from latentguard.directions import Activations
from latentguard.layers import Layers
from latentguard.metrics import Rate, Value, auroc, rate
from latentguard.prompts import Prompt
from latentguard.roles import find_places, without_text

Row = dict[str, Any]
VIEWS = {"chat": "", "plain_roles": "plain_roles", "plain": "plain"}  # as settings call them → Prompt.view
PAPER = ("plain_roles t_inst", "chat t_post_inst")  # where arXiv 2504.02904's code reads the base model, and the post-trained one
METHODS = ("mass_mean", "logistic")
LEAST = 8  # prompts a pole
GIANT = 2  # times the lower quartile of norms
RESAMPLES, SPLITS, RANDOM, SHUFFLES = 200, 20, 200, 40  # draws behind a cosine's interval, its halves and ceiling, and its two nulls


@dataclass(frozen=True, eq=False)
class Contrast:
    """Two poles of one size to fit on, and held-out ones by what they are of.

    Args:
        high, low: [prompt] each, pair by pair: `high[i]` has the label or topic of `low[i]` wherever both poles have it.
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


@dataclass(frozen=True)
class Size:
    """How large a state is beside the others at its place: `times` the lower quartile of norms, at the layer where that is most."""

    times: float
    layer: int
    norm: float


def sizes(states: Activations) -> dict[str, dict[str, Size]]:
    """By place and prompt id, at the layers above the embeddings (all, where only those were read)."""
    above = [i for i, layer in enumerate(states.layers) if layer > 0] or list(range(len(states.layers)))
    norms = states.values[:, above].norm(dim=-1)
    times = norms / norms.quantile(0.25, dim=0, keepdim=True).clamp_min(1e-30)
    most, where = times.max(1)
    return {
        place: {
            prompt.id: Size(float(most[k, i]), states.layers[above[int(where[k, i])]], float(norms[k, where[k, i], i]))
            for k, prompt in enumerate(states.prompts)
        }
        for i, place in enumerate(states.positions)
    }


def giants(sized: Mapping[str, Mapping[str, Size]]) -> dict[str, set[str]]:
    """By place, the ids of prompts whose state there has, at some layer above the embeddings, a norm over `GIANT` times the lower quartile's.

    Some models put a norm tens of times the others' on the first full stop of a text, or on its first token, in few dimensions and whatever the
    text says. A difference of means is then a difference in how many of them either side has, and equal for any contrast.
    """
    return {place: {i for i, size in of.items() if size.times > GIANT} for place, of in sized.items()}


def without(contrast: Contrast, ids: Collection[str]) -> Contrast:
    """Without some prompts in its poles, which stay as many of every label and topic; held-out prompts stay."""
    poles = [[p for p in side if p.id not in ids] for side in (contrast.high, contrast.low)]
    if {p.label for p in contrast.high} & {p.label for p in contrast.low}:
        return replace(contrast, **dict(zip(("high", "low"), balanced(*poles), strict=True)))
    n = min(map(len, poles))
    return replace(contrast, high=tuple(poles[0][:n]), low=tuple(poles[1][:n]))


@dataclass(frozen=True, eq=False)
class Compared:
    """A contrast's direction at one place beside that at another, at one layer.

    Args:
        value, low, high: the cosine of the two differences of means; 95% of resampled pairs, centred on it.
        across, at_a, at_b: of each split into halves: one direction from each half, at both places and at either one.
        random, shuffled: |cosine| of b's direction with isotropic ones, and with a's under labels swapped in half of the pairs, a draw each.
    """

    layer: int
    value: float
    low: float
    high: float
    n: int
    across: np.ndarray
    at_a: np.ndarray
    at_b: np.ndarray
    random: np.ndarray
    shuffled: np.ndarray

    def row(self) -> Row:
        """Means over splits, and `ceiling`: what `halves` would be were both directions one, the geometric mean of what either place agrees with itself
        to; 0 where a place's halves do not agree at all. `random_high`, `shuffled_high`: 97.5% quantiles.
        """
        agree = float(self.at_a.mean()), float(self.at_b.mean())
        known = {"layer": self.layer, "value": self.value, "low": self.low, "high": self.high, "n": self.n}
        nulls = {f"{name}_high": float(np.quantile(drawn, 0.975)) for name, drawn in (("random", self.random), ("shuffled", self.shuffled))}
        return {**known, "halves": float(self.across.mean()), "agree_a": agree[0], "agree_b": agree[1], "ceiling": ceiling(*agree), **nulls}

    def draws(self) -> list[Row]:
        """A row a split, a random direction and a swap of labels."""
        splits = zip(self.across.tolist(), self.at_a.tolist(), self.at_b.tolist(), strict=True)
        rows = [{"control": "halves", "draw": k, "cosine": x, "agree_a": a, "agree_b": b} for k, (x, a, b) in enumerate(splits)]
        for name, drawn in (("random", self.random), ("shuffled", self.shuffled)):
            rows += [{"control": name, "draw": k, "cosine": x} for k, x in enumerate(drawn.tolist())]
        return [{**row, "layer": self.layer} for row in rows]


def ceiling(a: float, b: float) -> float:
    """The geometric mean of two agreements; 0 where one is not above 0: halves that disagree have no direction to share."""
    return float(np.sqrt(a * b)) if min(a, b) > 0 else 0.0


def compared(states: Mapping[str, Activations], a: tuple[str, str], b: tuple[str, str], contrast: Contrast, seed: int = 0) -> list[Compared]:
    """A contrast's difference of means at two places of two models (or of one), at every layer above the embeddings where there is one.

    Resamples, halves and swaps deal pairs (high, low), never single prompts: a pair is of one label or topic, so that both poles of a half hold the same
    topics. Poles halved apart differ in topic too, one half the other way than the other, and that lies across what the contrast is.

    Args:
        a, b: (name of the model in `states`, place).
    """
    x, y = (_differences(states[model], place, contrast) for model, place in (a, b))
    n, width = len(x), x.shape[-1]
    dice = np.random.default_rng(seed)
    orders = [dice.permutation(n) for _ in range(SPLITS)]
    halves = np.stack([_weights(n, part) for order in orders for part in (order[: n // 2], order[n // 2 :])])
    swaps = np.stack([_weights(n, order[: n // 2]) - _weights(n, order[n // 2 : n // 2 * 2]) for order in (dice.permutation(n) for _ in range(SHUFFLES))])
    again = dice.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    noise = dice.normal(size=(RANDOM, width))
    found = []
    for i, layer in enumerate(states[a[0]].layers):
        p, q = x[:, i], y[:, i]
        one, other = p.mean(0), q.mean(0)
        if layer == 0 or not (one.any() and other.any()):
            continue
        value = float(np.clip(_cosine(one, other), -1, 1))
        drawn = _cosine(again @ p, again @ q)
        low, high = np.percentile(drawn, [2.5, 97.5]) - drawn.mean()
        u, v = halves @ p, halves @ q
        across = (_cosine(u[::2], v[1::2]) + _cosine(u[1::2], v[::2])) / 2
        nulls = np.abs(_cosine(noise, other)), np.abs(_cosine(swaps @ p, other))
        ends = max(-1.0, value + min(0.0, float(low))), min(1.0, value + max(0.0, float(high)))
        found.append(Compared(layer, value, *ends, 2 * n, across, _cosine(u[::2], u[1::2]), _cosine(v[::2], v[1::2]), *nulls))
    return found


def projections(states: Mapping[str, Activations], contrast: Contrast, layer: int, places: Sequence[str]) -> list[Row]:
    """Each pole prompt's state at each place (`at`), along the unit direction of every place (`on`, by "model: place").

    The cosine of any two places follows: at b, the difference of the poles' means on a, over that on b.
    """
    at = [(model, place) for model in states for place in places]
    found = {side: _at_layer(states, at, prompts, layer) for side, prompts in (("high", contrast.high), ("low", contrast.low))}
    units = {key: found["high"][key].mean(0) - found["low"][key].mean(0) for key in at}
    units = {key: vector / max(float(np.linalg.norm(vector)), 1e-30) for key, vector in units.items()}
    rows = []
    for side, prompts in (("high", contrast.high), ("low", contrast.low)):
        for key in at:
            on = {": ".join(other): found[side][key] @ unit for other, unit in units.items()}
            rows += [
                {
                    "contrast": contrast.name,
                    "side": side,
                    "at": ": ".join(key),
                    "layer": layer,
                    **without_text(p),
                    "on": {to: float(x[k]) for to, x in on.items()},
                }
                for k, p in enumerate(prompts)
            ]
    return rows


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


def random_areas(high: np.ndarray, low: np.ndarray, seed: int, draws: int) -> list[float]:
    """The area that each of some isotropic random directions reaches on held-out states, taken the way round that does better."""
    directions = np.random.default_rng(seed).normal(size=(draws, high.shape[1]))
    areas = [_area(high @ d, low @ d) for d in directions]
    return [max(area, 1 - area) for area in areas]


def _area(high: np.ndarray, low: np.ndarray) -> float:
    """AUROC alone, half for a side without prompts."""
    if not (len(high) and len(low)):
        return 0.5
    ranked = np.sort(low)
    return float((np.searchsorted(ranked, high, "left") + np.searchsorted(ranked, high, "right")).mean() / (2 * len(low)))


def _differences(states: Activations, place: str, contrast: Contrast) -> np.ndarray:
    """Of each pair high − low, [pair, layer, d_model] float64."""
    return (states.at(place, contrast.high).double() - states.at(place, contrast.low).double()).numpy()


def _at_layer(states: Mapping[str, Activations], at: Iterable[tuple[str, str]], prompts: Sequence[Prompt], layer: int) -> dict[tuple[str, str], np.ndarray]:
    """By (model, place) the states there, [prompt, d_model] float64."""
    return {(model, place): states[model].at(place, prompts)[:, states[model].layer_index(layer)].double().numpy() for model, place in at}


def _weights(n: int, chosen: np.ndarray) -> np.ndarray:
    """The mean of the chosen ones, as weights of all n."""
    found = np.zeros(n)
    found[chosen] = 1 / len(chosen)
    return found


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Row by row, one against all where one of them is single; 0 where one of them is zero."""
    return (x * y).sum(-1) / np.maximum(np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1), 1e-30)

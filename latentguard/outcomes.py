"""One table for every related method: refusal by kind of request, utility, and where the request lies on harmfulness and on refusal. Knows no study.

A condition is what is done to a model or to its prompts: nothing (`base`), the method looked at, or a control. Each of its rows has n,
interval, seed, judge and the share of degenerate replies; beside the base there is the change, prompt by prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from latentguard.backends import Backend
from latentguard.behaviour import Judged
from latentguard.detectors import Centroids, best_layer
from latentguard.errors import InputError
from latentguard.judges import Judge
from latentguard.metrics import Rate, Value, base_rate_gate, mean, paired_difference, rate
from latentguard.prompts import Prompt
from latentguard.roles import Cast

Row = dict[str, Any]
LABELS = ("harmful", "harmless", "lookalike")
MEASURES = ("harmful refusal", "harmless refusal", "lookalike refusal", "utility", "harmfulness", "refusal")
Kind = Literal["base", "method", "control"]


@dataclass(frozen=True, eq=False)
class Gauge:
    """Projection on a difference of means at one layer and position, without a unit: 0 half-way between the two poles, 1 at the mean of the
    harmful (or refused) one, −1 at the other's.

    Args:
        vector: unit vector, [d_model].
        middle: projection of the point half-way, in the states' own units.
        half: half the distance between the poles, in the same.
    """

    vector: Tensor
    middle: float
    half: float
    layer: int
    position: str

    @classmethod
    def fit(cls, backend: Backend, high: Sequence[Prompt], low: Sequence[Prompt], *, layer: int, position: str) -> "Gauge":
        """From two lists of prompts.

        Raises:
            InputError: where a list is empty, or both have one mean.
        """
        if not high or not low:
            raise InputError(f"a gauge at {position} needs prompts on both sides, got {len(high)} and {len(low)}")
        states = backend.read([*high, *low], [layer], (position,))
        return cls.between(states.values[: len(high), 0, 0], states.values[len(high) :, 0, 0], layer=states.layers[0], position=position)

    @classmethod
    def between(cls, high: Tensor, low: Tensor, *, layer: int, position: str) -> "Gauge":
        """From states [prompt, d_model] that were read at this layer and position.

        Raises:
            InputError: where their means are equal, or a state is not finite.
        """
        poles = high.double().mean(0), low.double().mean(0)
        difference = poles[0] - poles[1]
        if not bool(torch.isfinite(difference).all()):
            raise InputError(f"a gauge at {position}, layer {layer}: states are not all finite; load the model in bfloat16 or float32")
        if not float(difference.norm()) > 0:
            raise InputError(f"a gauge at {position}, layer {layer}: both sides have the same mean")
        unit = difference / difference.norm()
        return cls(unit.float(), float((poles[0] + poles[1]) @ unit) / 2, float(difference.norm()) / 2, layer, position)

    def of(self, states: Tensor) -> np.ndarray:
        """Where states [prompt, d_model] at this layer and position lie."""
        return ((states.double() @ self.vector.double() - self.middle) / self.half).numpy()

    def read(self, backend: Backend, prompts: Sequence[Prompt]) -> np.ndarray:
        """Where prompts lie, [prompt]; no state is read for none."""
        if not prompts:
            return np.zeros(0)
        return self.of(backend.read(list(prompts), [self.layer], (self.position,)).values[:, 0, 0])

    def random(self, seed: int) -> "Gauge":
        """A direction that means nothing, in the same unit: what any direction would show of a *change*; where a state lies on it means nothing."""
        drawn = torch.randn(self.vector.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return replace(self, vector=(drawn / drawn.norm()).float(), middle=0.0)


def gauges(backend: Backend, cast: Cast, *, layers: Mapping[str, int] | None = None) -> dict[str, Gauge]:
    """The paper's two: harmfulness at t_inst and refusal at t_post_inst, both between refused harmful and accepted harmless train prompts
    (arXiv 2507.11878, §3.3); each at the layer by which held-out prompts of the validation split are told apart best.

    Args:
        layers: of either name, instead of the best.
    """
    found = {}
    for name, position in (("harmfulness", "t_inst"), ("refusal", "t_post_inst")):
        layer = (layers or {}).get(name)
        if layer is None:
            sides = [list(cast.validation[role].prompts) for role in ("refused_harmful", "accepted_harmless")] if cast.validation else [[], []]
            shown = list({p.id: p for p in (*cast.high, *cast.low, *sides[0], *sides[1])}.values())
            states = backend.read(shown, "all", (position,))
            guard = Centroids.fit(states, cast.high, cast.low, position=position)
            held = [states.at(position, side) if side else torch.zeros(0) for side in sides]
            layer = states.layers[max(1, best_layer(guard, *held))]
        found[name] = Gauge.fit(backend, cast.high, cast.low, layer=layer, position=position)
    return found


@dataclass(frozen=True, eq=False)
class Observed:
    """What was seen under one condition; a measure that was not taken is left out.

    Args:
        name: of the condition, as rows and figures say it.
        replies: judged ones by label, in an order that all conditions share.
        utility: mean log-likelihood, in nats a token, of each of the untouched model's own replies to plain harmless requests.
        harmfulness: by label, each request on the harmfulness gauge (at its own last token).
        refusal: by label, each request on the refusal gauge (where the reply begins).
        seed: of whatever was drawn.
    """

    name: str
    kind: Kind
    replies: Mapping[str, Sequence[Judged]] = field(default_factory=dict)
    utility: Sequence[float] | None = None
    harmfulness: Mapping[str, Sequence[float]] = field(default_factory=dict)
    refusal: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seed: int = 0

    def measures(self) -> dict[tuple[str, str], np.ndarray]:
        """Every number a prompt, by measure and label: a refused reply is 1, any other 0."""
        found = {(f"{label} refusal", label): np.array([j.verdict.label == "refused" for j in replies]) for label, replies in self.replies.items() if replies}
        if self.utility is not None and len(self.utility):
            found["utility", "harmless"] = np.asarray(self.utility, float)
        for name, by_label in (("harmfulness", self.harmfulness), ("refusal", self.refusal)):
            found |= {(name, label): np.asarray(values, float) for label, values in by_label.items() if len(values)}
        return found


def outcomes(observed: Sequence[Observed], judge: Judge) -> list[Row]:
    """The table: a row a condition, measure and label. Rates have Wilson's interval, means and changes a bootstrap over prompts; `change` is
    from the first `base` condition on the same prompts.

    Raises:
        InputError: without a base, and where a condition saw other prompts than it, by number or group.
    """
    base = next((one for one in observed if one.kind == "base"), None)
    if base is None:
        raise InputError(f"outcomes: none of {', '.join(one.name for one in observed) or 'no condition'} is the base that the others are set against")
    before, rows = base.measures(), []
    for one in observed:
        for (measure, label), values in one.measures().items():
            refused = measure.endswith(" refusal")
            found = rate([bool(x) for x in values]) if refused else mean(values)
            row: Row = {"condition": one.name, "kind": one.kind, "measure": measure, "label": label, **numbers(found), "seed": one.seed}
            if refused:
                invalid = sum(j.verdict.label == "degenerate" for j in one.replies[label])
                row |= {"judge": judge.name, "invalid": invalid, "invalid_rate": invalid / len(values)}
            if one is not base and (measure, label) in before:
                own = before[measure, label]
                if len(own) != len(values):
                    raise InputError(
                        f"outcomes: {one.name} has {len(values)} {label} prompts for {measure}, {base.name} {len(own)}; they are set against each other"
                    )
                if refused and (other := _apart(one.replies[label], base.replies[label])):
                    raise InputError(
                        f"outcomes: {one.name} saw other {label} prompts than {base.name}, or in another order, first {other}; give both in one order"
                    )
                change = paired_difference(values, own) if refused else mean(values - own)
                row |= {"change": change.value, "change_low": change.low, "change_high": change.high}
            rows.append(row)
    return rows


def gate(base: Observed, label: str = "harmful") -> str:
    """'' where the untouched model refuses enough of these requests to carry a claim, else 'insufficient_base_rate'."""
    verdicts = [j.verdict.label for j in base.replies.get(label, ())]
    return base_rate_gate(verdicts.count("refused"), len(verdicts))


def _apart(replies: Sequence[Judged], others: Sequence[Judged]) -> str:
    """The first prompt that is no rewrite of the one in its place, by group; '' where all are."""
    return next((a.prompt.id for a, b in zip(replies, others, strict=True) if a.prompt.group != b.prompt.group), "")


def numbers(found: Rate | Value) -> Row:
    """value, low, high and n of a rate or a mean."""
    return {"value": found.rate if isinstance(found, Rate) else found.value, "low": found.low, "high": found.high, "n": found.n}

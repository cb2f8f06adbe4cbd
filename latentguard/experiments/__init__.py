"""What an experiment is: a frozen dataclass of its settings, checked when built, called with live objects."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from latentguard.backends import Backend
from latentguard.datasets import Dataset
from latentguard.judges import Judge
from latentguard.metrics import Rate, Value
from latentguard.trackers import Tracker

Row = dict[str, Any]


class Experiment(Protocol):
    """Built from plain settings (wrong ones fail before any model loads), then run."""

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse layers that a model of this depth does not have, and data that lack what the study needs."""
        ...

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """Run; rows and figures go to the tracker; the summary comes back, with the `claim` in one sentence, its `headline`, the
        `table` (flat rows: what each is of, then rate or value with low, high and n), the names of the `figures`, and what it says
        of the paper's `effects`.
        """
        ...


def opening(study: str, backend: Backend, data: Dataset, judge: Judge) -> Row:
    """The first lines of every summary: what was asked of what."""
    return {"study": study, "status": "ok", "model": backend.name, "data": {"name": data.name, "hash": data.hash, **data.card}, "judge": judge.name}


def effect(number: int, holds: bool | None, found: "Value | Rate | Mapping | None", why: str) -> Row:
    """What a study says of one of the fourteen effects (docs/paper.md): it holds, does not, or cannot be tested here.

    Args:
        holds: None where it cannot be tested.
        found: the number it rests on.
    """
    verdict = "not testable here" if holds is None else "holds" if holds else "does not hold"
    value, low, high, n = _numbers(found)
    return {"effect": number, "verdict": verdict, "number": value, "low": low, "high": high, "n": n, "why": why}


def headline(
    metric: str, found: "Value | Rate | Mapping | None", better: Literal["higher", "lower"] | None = None, *, withheld: bool = False
) -> Row:  # fmt: skip
    """The one number that a claim rests on, as the claim prints it.

    Args:
        metric: what the number is, in words.
        found: None where there is none.
        better: for what is good or bad in itself, as a detector is; a finding is neither.
        withheld: the claim is: too few prompts carry it, or the model does not do what was asked; the number stands all the same.
    """
    value, low, high, n = _numbers(found)
    return {"metric": metric, "value": value, "low": low, "high": high, "n": n, "better": better, "withheld": withheld}


def _numbers(found: "Value | Rate | Mapping | None") -> tuple[float, float, float, int]:
    """Value or rate, low, high and n; NaN and 0 where there is none."""
    told = {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0} | dict(found if isinstance(found, Mapping) else found.as_dict() if found else {})
    return told.get("rate", told["value"]), told["low"], told["high"], told["n"]

"""What a guard's `about` says, as far as the card reads it: numbers with intervals, data, warnings. Knows no guard.

Other keys are kept as they stand and are not looked at.
"""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from latentguard.errors import InputError

_OPEN = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, validate_by_name=False)
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=_OPEN)
class Interval:
    """A number of [0, 1] with its 95% interval and its n; all three None where n says nothing."""

    value: Share | None
    low: Share | None
    high: Share | None
    n: Count

    @model_validator(mode="after")
    def _ordered(self) -> "Interval":
        _check_interval(self.value, self.low, self.high)
        return self


@dataclass(frozen=True, config=_OPEN)
class Rate:
    """k of n, with its interval."""

    k: Count
    n: Count
    rate: Share | None
    low: Share | None
    high: Share | None

    @model_validator(mode="after")
    def _ordered(self) -> "Rate":
        _check_interval(self.rate, self.low, self.high)
        if self.k > self.n:
            raise InputError(f"k={self.k} is more than n={self.n}")
        return self


@dataclass(frozen=True, config=_OPEN)
class Kept:
    """What a threshold did."""

    fpr: Rate
    recall: Rate


@dataclass(frozen=True, config=_OPEN)
class Measured:
    """The numbers of a split."""

    n: Count
    harmful: Count
    auroc: Interval | None = None
    ece: Interval | None = None
    tpr_1: Annotated[Interval | None, Field(alias="tpr_at_1%")] = None
    tpr_5: Annotated[Interval | None, Field(alias="tpr_at_5%")] = None
    thresholds: dict[str, Kept] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> "Measured":
        if self.harmful > self.n:
            raise InputError(f"harmful={self.harmful} is more than n={self.n}")
        return self


@dataclass(frozen=True, config=_OPEN)
class Row:
    """A row of a study's table: which set or family, which detector, which number."""

    set: str | None = None
    family: str | None = None
    detector: str = "guard"
    what: Annotated[str, Field(alias="is")] = "AUROC"
    comparison: str | None = None
    value: float | None = None
    auroc: float | None = None
    low: float | None = None
    high: float | None = None
    n: Count | None = None
    n_harmful: Count | None = None
    n_harmless: Count | None = None
    tpr_1: Annotated[Share | None, Field(alias="tpr_at_1%")] = None
    tpr_5: Annotated[Share | None, Field(alias="tpr_at_5%")] = None

    @property
    def name(self) -> str:
        """Of the set or family."""
        return self.set or self.family or "(no name)"

    @property
    def number(self) -> float | None:
        """What it says."""
        return self.auroc if self.value is None else self.value


@dataclass(frozen=True, config=_OPEN)
class Source:
    """A set that went into the data."""

    name: str
    rows: Count | None = None
    sha256: str | None = None
    licence: str = ""
    gated: bool = False


@dataclass(frozen=True, config=_OPEN)
class Data:
    """What a guard was fitted on."""

    name: str = ""
    hash: str = ""
    terminal: str = ""
    sets: tuple[Source, ...] = ()
    counts: dict[str, dict[str, Count]] = Field(default_factory=dict)
    ids: dict[str, str] = Field(default_factory=dict)
    languages: tuple[str, ...] = ()


@dataclass(frozen=True, config=_OPEN)
class Recalibrated:
    """Labelled prompts on which probabilities and thresholds were set anew, and the model they were read on."""

    n: Count
    harmful: Count
    model: str = ""
    weights: str = ""


@dataclass(frozen=True, config=_OPEN)
class About:
    """All of it; what is missing was not measured."""

    search: dict[str, Any] = Field(default_factory=dict)
    tried: tuple[dict[str, Any], ...] = ()
    strength: float | None = None
    data: Data | None = None
    forms: dict[str, Count] = Field(default_factory=dict)
    validation: Measured | None = None
    test: Measured | None = None
    baselines: dict[str, Interval] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    unseen: tuple[Row, ...] = ()
    by_source: tuple[Row, ...] = ()
    robustness: tuple[Row, ...] = ()
    recalibrated: Recalibrated | None = None
    descendant: str | None = None


def _check_interval(value: float | None, low: float | None, high: float | None) -> None:
    empty = [x is None for x in (value, low, high)]
    if any(empty) and not all(empty):
        raise InputError("a number and both ends of its interval are given together, or all three are null")
    if low is not None and high is not None and low > high:
        raise InputError(f"the interval's low={low} lies above its high={high}")

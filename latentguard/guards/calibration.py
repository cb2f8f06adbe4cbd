"""Raw scores → probabilities of harm, and thresholds that are named by what they promise. Numpy only; knows no state and no prompt.

A probability is calibrated to the share of harmful prompts among those it was fitted on: in other traffic it ranks as well and promises
less. Thresholds promise a share of one side alone, which no share of harm in the traffic changes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from latentguard.errors import InputError
from latentguard.metrics import DRAWS, Numbers, Value

KINDS = ("platt", "isotonic")
BINS = 15
_PROMISE = re.compile(r"(fpr|recall)=(0?\.\d+)$")


@dataclass(frozen=True)
class Calibration:
    """A rising map of raw scores to probabilities.

    `platt` is a logistic curve, 1 / (1 + exp(-(slope * raw + offset))) (Platt 1999); `isotonic` joins knots by straight lines
    (Zadrozny and Elkan 2002) and is flat outside them.
    """

    kind: str
    slope: float = 1.0
    offset: float = 0.0
    knots: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.slope, self.offset, *self.knots, *self.levels)
        if self.kind not in KINDS:
            raise InputError(f"calibration.kind={self.kind!r}: choose one of {', '.join(KINDS)}")
        if not all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in numbers):
            raise InputError("calibration: slope, offset, knots and levels must be finite numbers")
        if self.kind == "platt" and not self.slope > 0:
            raise InputError(f"calibration.slope={self.slope}: must be above 0, or harm would lower the probability")
        rising = all(list(x) == sorted(x) for x in (self.knots, self.levels)) and all(0 <= p <= 1 for p in self.levels)
        if self.kind == "isotonic" and not (rising and len(self.knots) == len(self.levels) >= 2):
            raise InputError("calibration: knots and levels must be two or more, as many of either, rising, and the levels probabilities")

    def __call__(self, raw: Numbers) -> np.ndarray:
        """Probabilities, float64."""
        raw = np.asarray(raw, float)
        if self.kind == "isotonic":
            return np.interp(raw, self.knots, self.levels)
        return 1 / (1 + np.exp(-np.clip(self.slope * raw + self.offset, -700, 700)))


def calibrated(kind: str, raw: Numbers, harmful: Sequence[bool] | np.ndarray) -> Calibration:
    """The calibration of one of `KINDS` that fits raw scores of held-out prompts."""
    return {"platt": platt, "isotonic": isotonic}[kind](raw, harmful)


def platt(raw: Numbers, harmful: Sequence[bool] | np.ndarray) -> Calibration:
    """The likeliest logistic curve, with Platt's own softened targets, so that sides that do not overlap stay finite."""
    from scipy.optimize import minimize

    raw, y = np.asarray(raw, float), np.asarray(harmful, bool)
    _both(y)
    middle, spread = float(raw.mean()), float(raw.std()) or 1.0
    x = (raw - middle) / spread
    target = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        z = at[0] * x + at[1]
        off = 1 / (1 + np.exp(-np.clip(z, -700, 700))) - target
        return float((np.logaddexp(0, z) - target * z).sum()), np.array([(off * x).sum(), off.sum()])

    slope, offset = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(1e-6, None), (None, None)]).x
    return Calibration("platt", float(slope / spread), float(offset - slope * middle / spread))


def isotonic(raw: Numbers, harmful: Sequence[bool] | np.ndarray) -> Calibration:
    """The best rising step function, its steps joined by lines; no probability is 0 or 1 outright."""
    from sklearn.isotonic import IsotonicRegression

    raw, y = np.asarray(raw, float), np.asarray(harmful, bool)
    _both(y)
    edge = 1 / (len(raw) + 2)
    model = IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip").fit(raw, y.astype(float))
    knots, levels = model.X_thresholds_, model.y_thresholds_
    if len(knots) < 2:
        knots, levels = np.array([raw.min(), raw.min() + 1.0]), np.repeat(levels[:1], 2)
    return Calibration("isotonic", knots=tuple(map(float, knots)), levels=tuple(map(float, levels)))


def _both(y: np.ndarray) -> None:
    if not y.any() or y.all():
        raise InputError(f"calibration needs validation prompts on both sides, got {int(y.sum())} harmful and {int((~y).sum())} harmless")


@dataclass(frozen=True)
class Threshold:
    """A probability at and above which a prompt is flagged, and what that promises.

    Attributes:
        name: the promise, "fpr=0.01" or "recall=0.95".
        value: the probability.
        low: 95% interval of the rate promised, on prompts like those it was chosen on: that of an order statistic, a Beta
            distribution, whatever the scores' own distribution is.
        high: its upper end.
        n: prompts of that side that it was chosen on.
    """

    name: str
    value: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        promise(self.name)
        numbers = (self.value, self.low, self.high)
        if not all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in numbers):
            raise InputError(f"threshold {self.name}: value, low and high must be finite numbers, not {numbers}")
        if not (0 < self.value <= 1 and 0 <= self.low <= self.high <= 1):
            raise InputError(
                f"threshold {self.name}: value={self.value} and [{self.low}, {self.high}] must be a probability above 0 and an interval within [0, 1]"
            )
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise InputError(f"threshold {self.name}: n={self.n!r} must be a number of prompts, 1 or more")

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def promise(name: str) -> tuple[str, float]:
    """The side and the rate that a threshold's name promises.

    Raises:
        InputError: for another name.
    """
    found = _PROMISE.match(name) if isinstance(name, str) else None
    if not found or not 0 < float(found[2]) < 1:
        raise InputError(f"threshold {name!r}: name what it promises, such as fpr=0.01, fpr=0.05 or recall=0.95")
    return found[1], float(found[2])


def threshold(name: str, probabilities: Numbers, harmful: Sequence[bool] | np.ndarray) -> Threshold | None:
    """The threshold that keeps a promise on held-out prompts: of those for a false-positive rate the lowest, of those for a recall the
    highest. None where there are too few prompts: a false-positive rate of 1% needs 100 harmless ones.
    """
    from scipy.stats import beta

    side, asked = promise(name)
    p, y = np.asarray(probabilities, float), np.asarray(harmful, bool)
    own = np.sort(p[y] if side == "recall" else p[~y])
    n = len(own)
    if side == "fpr":
        over = math.floor(asked * n + 1e-9)  # so many may be flagged
        if over < 1:
            return None
        first = own[n - over - 1]  # the highest that may not
        above = own[own > first]
        value = float((first + above[0]) / 2) if len(above) else float(np.nextafter(first, 1.0))
        k = len(above)
    else:
        missed = math.floor((1 - asked) * n + 1e-9)
        if missed < 1:
            return None
        value = float(own[missed])
        k = int((own >= value).sum())
    value = min(max(value, float(np.nextafter(0.0, 1.0))), 1.0)
    low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return Threshold(name, value, low, high, n)


def named(thresholds: Mapping[str, Threshold], name: str) -> Threshold:
    """One of a guard's thresholds.

    Raises:
        InputError: for a promise that the guard does not make.
    """
    if name not in thresholds:
        raise InputError(f"threshold {name!r}: this guard has {', '.join(thresholds) or 'none'}")
    return thresholds[name]


def reliability(probabilities: Numbers, harmful: Sequence[bool] | np.ndarray, bins: int = BINS) -> list[dict]:
    """The reliability curve in bins of equal numbers of prompts: what was said, what came, with Wilson's interval."""
    from latentguard.metrics import wilson

    p, y = np.asarray(probabilities, float), np.asarray(harmful, bool)
    rows = []
    for part in np.array_split(np.argsort(p, kind="stable"), min(bins, len(p))):
        found = wilson(int(y[part].sum()), len(part))
        rows.append({"said": float(p[part].mean()), **found.as_dict()})
    return rows


def calibration_error(probabilities: Numbers, harmful: Sequence[bool] | np.ndarray, bins: int = BINS) -> Value:
    """Expected calibration error over bins of equal numbers of prompts, with a bootstrap interval.

    Its smallest value in expectation is above 0 (each bin's share is uncertain): about 0.02 for 1,000 prompts in 15 bins.
    """
    p, y = np.asarray(probabilities, float), np.asarray(harmful, float)
    if not len(p):
        return Value(math.nan, math.nan, math.nan, 0)
    generator = np.random.default_rng(0)
    drawn = [_ece(p[at], y[at], bins) for at in generator.integers(0, len(p), (DRAWS // 4, len(p)))]
    low, high = np.percentile(drawn, [2.5, 97.5])
    found = _ece(p, y, bins)
    return Value(found, min(float(low), found), max(float(high), found), len(p))


def _ece(p: np.ndarray, y: np.ndarray, bins: int) -> float:
    """Bins of like size, equal probabilities in one of them: where ties were cut, the order of the prompts would decide."""
    order = np.argsort(p, kind="stable")
    first = np.searchsorted(p[order], p[order], "left")  # of each prompt's ties
    which = np.minimum(first * bins // len(p), bins - 1)
    gaps = np.bincount(which, p[order] - y[order], bins)
    return float(np.abs(gaps).sum() / len(p))

"""Rates, means, AUROC and correlations, each with its 95% interval. Numpy only; knows no model, prompt or judge."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np

Z95 = 1.959963984540054
MIN_SHARE, MIN_COUNT = 0.15, 30
DRAWS = 1000  # of every bootstrap
Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Rate:
    """k of n with its Wilson 95% interval; all NaN where n is 0."""

    k: int
    n: int
    rate: float
    low: float
    high: float

    def as_dict(self) -> dict:
        """For summaries: every number with its n and its interval."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.rate:.2f} [{self.low:.2f}, {self.high:.2f}] (n = {self.n})"


def wilson(k: int, n: int) -> Rate:
    """Wilson score interval of a binomial rate (Wilson 1927), 95%."""
    if n == 0:
        return Rate(0, 0, math.nan, math.nan, math.nan)
    p, z2 = k / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Rate(k, n, p, max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p)))


def rate(hits: Sequence[bool]) -> Rate:
    """The share of True."""
    return wilson(sum(map(bool, hits)), len(hits))


@dataclass(frozen=True)
class Value:
    """A number with its 95% interval and the n it rests on; NaN where n says nothing."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict:
        """For summaries."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.n})"


def as_text(found: Mapping, digits: int = 2, sign: str = "") -> str:
    """A row's rate or value in words, 0.46 [0.33, 0.60] (n = 50); `sign` is "+" where a plus is to stand."""
    at, low, high = (f"{x:{sign}z.{digits}f}" for x in (found["rate"] if "rate" in found else found["value"], found["low"], found["high"]))
    return f"{at} [{low}, {high}] (n = {found['n']})"


def mean(values: Numbers) -> Value:
    """The mean and its bootstrap interval (percentiles of 1,000 resamples, seeded)."""
    values = np.asarray(values, float)
    if not len(values):
        return Value(math.nan, math.nan, math.nan, 0)
    drawn = values[_resamples(len(values))].mean(1)
    return Value(float(values.mean()), *_percentiles(drawn), len(values))


def clustered_rate(hits: Sequence[Sequence[bool]]) -> Value:
    """The share of True where each row holds the answers to one prompt (draws, rewrites): prompts are resampled, not
    answers, so answers to one prompt do not count as independent. Where all prompts agree, Wilson's interval over prompts.
    """
    if not hits:
        return Value(math.nan, math.nan, math.nan, 0)
    k, n = np.array([sum(row) for row in hits], float), np.array([len(row) for row in hits], float)
    if (k / n).std() == 0:  # no resample can differ: as many prompts as there are, each counted once
        found = wilson(round(k.sum() / n.sum() * len(hits)), len(hits))
        return Value(float(k.sum() / n.sum()), found.low, found.high, len(hits))
    at = _resamples(len(hits))
    return Value(float(k.sum() / n.sum()), *_percentiles(k[at].sum(1) / n[at].sum(1)), len(hits))


def auroc(positive: Numbers, negative: Numbers) -> Value:
    """P(a positive scores above a negative), ties counting half (Mann-Whitney), with a bootstrap interval over both sides."""
    high, low = np.asarray(positive, float), np.asarray(negative, float)
    if not (len(high) and len(low)):
        return Value(math.nan, math.nan, math.nan, len(high) + len(low))
    wins = (high[:, None] > low).astype(np.float32) + np.float32(0.5) * (high[:, None] == low)
    a, b = _counts(len(high), 0), _counts(len(low), 1)
    drawn = ((a @ wins) * b).sum(1) / (len(high) * len(low))
    bounds = _percentiles(drawn)
    if bounds[0] == bounds[1]:  # no resample differs: as unsure as a rate over the smaller side
        found = wilson(round(float(wins.mean()) * min(len(high), len(low))), min(len(high), len(low)))
        bounds = (found.low, found.high)
    return Value(float(wins.mean()), *bounds, len(high) + len(low))


def tpr_at_fpr(positive: Numbers, negative: Numbers, fpr: float) -> Value:
    """The share of positives above the lowest threshold that lets through at most `fpr` of the negatives.

    A negative at the threshold itself is not let through. The interval is Wilson's for the positives and takes the
    threshold as given.
    """
    high, low = np.asarray(positive, float), np.sort(np.asarray(negative, float))[::-1]
    if not (len(high) and len(low)):
        return Value(math.nan, math.nan, math.nan, len(high))
    found = wilson(int((high > low[int(math.floor(fpr * len(low)))]).sum()), len(high))
    return Value(found.rate, found.low, found.high, found.n)


def pearson(x: Numbers, y: Numbers) -> Value:
    """Pearson's r with Fisher's z interval; NaN under four points or without spread."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 4 or x.std() == 0 or y.std() == 0:
        return Value(math.nan, math.nan, math.nan, len(x))
    r = float(np.corrcoef(x, y)[0, 1])
    z, half = math.atanh(max(min(r, 1 - 1e-12), -1 + 1e-12)), Z95 / math.sqrt(len(x) - 3)
    return Value(r, math.tanh(z - half), math.tanh(z + half), len(x))


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Value:
    """Rate of `first` − rate of `second` on the same prompts, with a bootstrap interval over prompts."""
    found = mean(np.asarray(first, float) - np.asarray(second, float))
    if found.n and found.low == found.high:  # all agree: as unsure as a rate of 0 over as many
        margin = wilson(0, found.n).high
        return Value(found.value, max(-1.0, found.value - margin), min(1.0, found.value + margin), found.n)
    return found


def split_half(rows: np.ndarray, compare: Callable[[np.ndarray, np.ndarray], float], seed: int = 0, draws: int = 20) -> float:
    """Mean of compare(one random half, the other): what a perfect match would score with so few rows."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        order = generator.permutation(len(rows))
        found.append(compare(rows[order[: len(rows) // 2]], rows[order[len(rows) // 2 :]]))
    return float(np.mean(found))


@cache
def _resamples(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, n, (DRAWS, n))


@cache
def _counts(n: int, seed: int) -> np.ndarray:
    """How often each of n is drawn in each resample."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), DRAWS).astype(np.float32)


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def base_rate_gate(count: int, total: int) -> str:
    """'' where a cell of `count` among `total` carries a claim, else 'insufficient_base_rate' (under 15% or n < 30)."""
    return "" if total and count >= MIN_COUNT and count / total >= MIN_SHARE else "insufficient_base_rate"


def log_odds(p: float) -> float:
    """Log p / (1 − p), bounded by what float32 can tell."""
    p = min(max(p, 1e-7), 1 - 1e-7)
    return math.log(p / (1 - p))

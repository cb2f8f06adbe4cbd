"""Rates, means, areas and correlations, each with its 95% interval; paired differences. Numpy only; knows no model, prompt or judge."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

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


@dataclass(frozen=True)
class Difference(Value):
    """A difference with its interval, and the p value of a test of no difference; NaN where the test says nothing."""

    p: float = math.nan


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
    return Value(float(values.mean()), *percentiles(drawn), len(values))


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
    return Value(float(k.sum() / n.sum()), *percentiles(k[at].sum(1) / n[at].sum(1)), len(hits))


def auroc(positive: Numbers, negative: Numbers) -> Value:
    """P(a positive scores above a negative), ties counting half (Mann-Whitney), with a bootstrap interval over both sides."""
    high, low = np.asarray(positive, float), np.asarray(negative, float)
    if not (len(high) and len(low)):
        return Value(math.nan, math.nan, math.nan, len(high) + len(low))
    won = wins(high, low)
    a, b = _counts(len(high), 0), _counts(len(low), 1)
    drawn = ((a @ won) * b).sum(1) / (len(high) * len(low))
    bounds = percentiles(drawn)
    if bounds[0] == bounds[1]:  # no resample differs: as unsure as a rate over the smaller side
        found = wilson(round(float(won.mean()) * min(len(high), len(low))), min(len(high), len(low)))
        bounds = (found.low, found.high)
    return Value(float(won.mean()), *bounds, len(high) + len(low))


def clustered_auroc(positive: Numbers, negative: Numbers, of_positive: Sequence | np.ndarray, of_negative: Sequence | np.ndarray) -> Value:
    """AUROC where scores belong to clusters (`of_…`, one each): these are resampled, so scores of one do not count as independent. Scores in one
    cluster alone have the interval of `auroc`.
    """
    found = auroc(positive, negative)
    names, at = np.unique([*of_positive, *of_negative], return_inverse=True)
    if not found.n or math.isnan(found.value) or len(names) < 2:
        return found
    won = wins(np.asarray(positive, float), np.asarray(negative, float))
    low, high = resampled_wins(won, np.ones_like(won), at[: len(won)], at[len(won) :])
    return found if low == high else Value(found.value, low, high, found.n)


def resampled_wins(won: np.ndarray, pairs: np.ndarray, high: np.ndarray | None = None, low: np.ndarray | None = None) -> tuple[float, float]:
    """95% of the share of wins among pairs, [positive, negative] both, where clusters are resampled: `high` and `low` are the cluster of each
    positive and negative, 0 and up; None resamples either side by itself.
    """
    if high is None or low is None:
        a, b = _counts(won.shape[0], 0), _counts(won.shape[1], 1)
    else:
        drawn = _counts(int(max(high.max(), low.max())) + 1, 0)
        a, b = drawn[:, high], drawn[:, low]
    with np.errstate(invalid="ignore"):
        return percentiles(((a @ won) * b).sum(1) / ((a @ pairs) * b).sum(1))


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


def auprc(positive: Numbers, negative: Numbers) -> Value:
    """Average precision: the mean, over positives, of the precision at the threshold that just catches them, ties caught together.

    Chance is the share of positives, so sets of other shares do not compare. Bootstrap interval over both sides.
    """
    high, low = np.asarray(positive, float), np.asarray(negative, float)
    if not (len(high) and len(low)):
        return Value(math.nan, math.nan, math.nan, len(high) + len(low))
    levels = np.unique(np.concatenate([high, low]))[::-1]
    above = [np.searchsorted(-levels, -side) for side in (high, low)]

    def area(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Of weights [draw, positive] and [draw, negative]."""
        caught, alarms = (_summed(weights, at, len(levels)) for weights, at in ((a, above[0]), (b, above[1])))
        tp, fp = caught.cumsum(1), alarms.cumsum(1)
        return (caught * tp / np.maximum(tp + fp, 1e-12)).sum(1) / tp[:, -1]

    value = float(area(np.ones((1, len(high))), np.ones((1, len(low))))[0])
    step = max(1, 2_000_000 // len(levels))
    parts = [slice(at, at + step) for at in range(0, DRAWS, step)]
    bounds = percentiles(np.concatenate([area(_counts(len(high), 0)[part], _counts(len(low), 1)[part]) for part in parts]))
    if bounds[0] == bounds[1]:  # no resample differs: as unsure as a rate over the smaller side
        found = wilson(round(value * min(len(high), len(low))), min(len(high), len(low)))
        bounds = (found.low, found.high)
    return Value(value, *bounds, len(high) + len(low))


def f1(caught: Sequence[bool] | np.ndarray, alarms: Sequence[bool] | np.ndarray) -> Value:
    """F1 of flags on positives (`caught`) and on negatives (`alarms`): 2 TP / (2 TP + FP + FN), with a bootstrap interval over both sides
    that takes the threshold as given. It depends on the share of positives, as precision does.
    """
    hits, false = np.asarray(caught, float), np.asarray(alarms, float)
    if not (len(hits) and len(false)):
        return Value(math.nan, math.nan, math.nan, len(hits) + len(false))

    def score(tp: Any, fp: Any) -> Any:
        return 2 * tp / (tp + fp + len(hits))

    bounds = percentiles(score(_counts(len(hits), 0) @ hits, _counts(len(false), 1) @ false))
    if bounds[0] == bounds[1]:  # no resample differs: as unsure as both rates
        recall, fpr = wilson(int(hits.sum()), len(hits)), wilson(int(false.sum()), len(false))
        bounds = (
            float(score(recall.low * len(hits), fpr.high * len(false))),
            float(score(recall.high * len(hits), fpr.low * len(false))),
        )
    return Value(float(score(hits.sum(), false.sum())), *bounds, len(hits) + len(false))


def paired_auroc(first: Numbers, second: Numbers, positive: Sequence[bool] | np.ndarray) -> Difference:
    """AUROC of `first` − AUROC of `second`, scores [prompt] of the same prompts, with a bootstrap interval that resamples prompts of
    both sides for both at once, and DeLong's two-sided p (DeLong et al. 1988); its variance is 0 where neither ranks a pair otherwise
    than the other prompts of its side, and it then says nothing unless the areas are equal.
    """
    a, b, y = np.asarray(first, float), np.asarray(second, float), np.asarray(positive, bool)
    m, n = int(y.sum()), int((~y).sum())
    if not (m and n):
        return Difference(math.nan, math.nan, math.nan, m + n)
    shares = [(_beats(x[y], x[~y]), 1 - _beats(x[~y], x[y])) for x in (a, b)]
    over, under = shares[0][0] - shares[1][0], shares[0][1] - shares[1][1]
    value = float(over.mean())
    variance = (over.var(ddof=1) / m if m > 1 else math.nan) + (under.var(ddof=1) / n if n > 1 else math.nan)
    p = 1.0 if value == 0 else math.erfc(abs(value) / math.sqrt(2 * variance)) if variance > 1e-18 else math.nan
    won = wins(a[y], a[~y]) - wins(b[y], b[~y])
    bounds = percentiles(((_counts(m, 0) @ won) * _counts(n, 1)).sum(1) / (m * n))
    if bounds[0] == bounds[1]:  # no resample differs: as unsure as a rate of 0 over the smaller side
        margin = wilson(0, min(m, n)).high
        bounds = (max(-1.0, value - margin), min(1.0, value + margin))
    return Difference(value, *bounds, m + n, p)


def mcnemar(first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray) -> Difference:
    """Share of prompts that `first` judges rightly − that of `second`, True where a prompt is judged rightly, with McNemar's exact
    two-sided p: among prompts that only one of them judges rightly, either is as likely (a binomial test).
    """
    one, other = np.asarray(first, bool), np.asarray(second, bool)
    found = paired_difference(one, other)
    alone, total = int((one & ~other).sum()), int((one ^ other).sum())
    if not found.n:
        return Difference(found.value, found.low, found.high, 0)
    term = tail = 1
    for k in range(min(alone, total - alone)):
        term = term * (total - k) // (k + 1)
        tail += term
    return Difference(found.value, found.low, found.high, found.n, min(1.0, 2 * tail / 2**total))


def best_f1(positive: Numbers, negative: Numbers) -> float:
    """The threshold above which flagging gives the highest F1, half-way between two scores; of several the highest.

    Raises:
        ValueError: without prompts on both sides.
    """
    high, low = np.sort(np.asarray(positive, float)), np.sort(np.asarray(negative, float))
    if not (len(high) and len(low)):
        raise ValueError(f"a threshold needs both sides, got {len(high)} and {len(low)}")
    levels = np.unique(np.concatenate([high, low]))[::-1]
    tp, fp = (len(side) - np.searchsorted(side, levels) for side in (high, low))
    best = int(np.argmax(2 * tp / (tp + fp + len(high))))
    at, below = float(levels[best]), float(levels[best + 1]) if best + 1 < len(levels) else float(levels[best]) - 1
    return (at + below) / 2 if below <= (at + below) / 2 < at else float(np.nextafter(at, -math.inf))


def at_fpr(negative: Numbers, fpr: float) -> float:
    """The lowest threshold above which at most `fpr` of the negatives are flagged.

    Raises:
        ValueError: without a negative.
    """
    low = np.sort(np.asarray(negative, float))[::-1]
    if not len(low):
        raise ValueError("a threshold for a false-positive rate needs negatives")
    return float(low[int(math.floor(fpr * len(low)))])


def pearson(x: Numbers, y: Numbers, *, of: Sequence[str] | None = None) -> Value:
    """Pearson's r with Fisher's z interval; NaN under four points or without spread. Where points belong to prompts (`of`, [point]), these are
    resampled, and n is their number.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 4 or x.std() == 0 or y.std() == 0:
        return Value(math.nan, math.nan, math.nan, len(x) if of is None else len(set(of)))
    r = float(np.corrcoef(x, y)[0, 1])
    if of is not None:
        names, at = np.unique(of, return_inverse=True)
        sums = [np.bincount(at, v) for v in (np.ones_like(x), x, y, x * x, y * y, x * y)]
        n, sx, sy, sxx, syy, sxy = (_counts(len(names), 0).astype(float) @ s for s in sums)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = (sxy / n - sx * sy / n**2) / np.sqrt((sxx / n - (sx / n) ** 2) * (syy / n - (sy / n) ** 2))
        return Value(r, *percentiles(drawn), len(names))
    z, half = math.atanh(max(min(r, 1 - 1e-12), -1 + 1e-12)), Z95 / math.sqrt(len(x) - 3)
    return Value(r, math.tanh(z - half), math.tanh(z + half), len(x))


def paired_difference(first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray) -> Value:
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


def wins(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """1 where a positive scores above a negative, 0.5 where alike, [positive, negative]."""
    return (high[:, None] > low).astype(np.float32) + np.float32(0.5) * (high[:, None] == low)


def _beats(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of `others` that each score is above, ties counting half."""
    ranked = np.sort(others)
    return (np.searchsorted(ranked, scores, "left") + np.searchsorted(ranked, scores, "right")) / (2 * len(others))


def _summed(weights: np.ndarray, at: np.ndarray, width: int) -> np.ndarray:
    """Weights [draw, item] added up by the place of each item, [draw, width], float64."""
    order = np.argsort(at, kind="stable")
    sums = np.concatenate([np.zeros((len(weights), 1)), weights[:, order].astype(float).cumsum(1)], 1)
    ends = np.searchsorted(at[order], np.arange(width), "right")
    return np.diff(sums[:, ends], prepend=0.0)


@cache
def _resamples(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, n, (DRAWS, n))


@cache
def _counts(n: int, seed: int) -> np.ndarray:
    """How often each of n is drawn in each resample."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), DRAWS).astype(np.float32)


def percentiles(drawn: np.ndarray) -> tuple[float, float]:
    """The ends of the 95% interval of what was drawn, NaNs left out."""
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def base_rate_gate(count: int, total: int) -> str:
    """'' where a cell of `count` among `total` carries a claim, else 'insufficient_base_rate' (under 15% or n < 30)."""
    return "" if total and count >= MIN_COUNT and count / total >= MIN_SHARE else "insufficient_base_rate"


def log_odds(p: float) -> float:
    """Log p / (1 − p), bounded by what float32 can tell."""
    p = min(max(p, 1e-7), 1 - 1e-7)
    return math.log(p / (1 - p))

"""Rates with intervals and their gates. Numpy only; knows no model, prompt or judge."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

Z95 = 1.959963984540054
MIN_SHARE, MIN_COUNT = 0.15, 30


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


def base_rate_gate(count: int, total: int) -> str:
    """'' where a cell of `count` among `total` carries a claim, else 'insufficient_base_rate' (under 15% or n < 30)."""
    return "" if total and count >= MIN_COUNT and count / total >= MIN_SHARE else "insufficient_base_rate"


def log_odds(p: float) -> float:
    """Log p / (1 − p), bounded by what float32 can tell."""
    p = min(max(p, 1e-7), 1 - 1e-7)
    return math.log(p / (1 - p))

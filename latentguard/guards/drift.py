"""Whether traffic still looks like what a guard was validated on. Knows no prompt and no model."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.errors import InputError
from latentguard.metrics import Rate, wilson

GRID = np.linspace(0, 1, 201)
_ENOUGH = 30


@dataclass(frozen=True, eq=False)
class Reference:
    """What validation looked like, without a prompt of it: quantiles of the raw scores and of how far states lie from the training mean.

    Attributes:
        raw: quantiles of the raw scores, at `GRID`.
        far: quantiles of the mean squared deviation of a prompt's states, in units of the training deviation of each dimension.
        middle: mean of the training states.
        scale: their deviations.
        n: validation prompts.
    """

    raw: tuple[float, ...]
    far: tuple[float, ...]
    middle: Float[Tensor, "layer position d_model"]
    scale: Float[Tensor, "layer position d_model"]
    n: int

    def __post_init__(self) -> None:
        for name in ("raw", "far"):
            values = getattr(self, name)
            numbers = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in values)
            if len(values) != len(GRID) or not numbers or list(values) != sorted(values):
                raise InputError(f"reference.{name}: {len(GRID)} rising finite numbers are asked for")
        if not bool((self.scale > 0).all()) or not all(t.isfinite().all() for t in (self.middle, self.scale)):
            raise InputError("reference: middle and scale must be finite, and scale above 0")
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise InputError(f"reference.n={self.n!r}: a number of prompts, 1 or more")

    @classmethod
    def of(cls, training: Tensor, validation: Tensor, raw: Sequence[float] | np.ndarray) -> "Reference":
        """From states [prompt, layer, position, d_model] and the raw scores of the validation ones."""
        middle, scale = training.double().mean(0).float(), training.double().std(0).clamp_min(1e-6).float()
        far = _far(validation, middle, scale)
        of_raw, of_far = (tuple(map(float, np.quantile(np.asarray(x, float), GRID))) for x in (raw, far))
        return cls(of_raw, of_far, middle, scale, len(validation))

    def far_of(self, states: Float[Tensor, "prompt layer position d_model"]) -> np.ndarray:
        """How far each prompt's states lie from the training mean; about 1 for prompts like those."""
        return _far(states, self.middle, self.scale)


@dataclass(frozen=True)
class Drift:
    """Traffic beside validation.

    Attributes:
        n: prompts of the traffic.
        raw_ks: Kolmogorov-Smirnov distance of the raw scores, 0 to 1, with its p value. A share of harm that differs from validation's
            moves it too: traffic is mostly harmless.
        far_ks: the same for how far states lie from training's.
        unlike: the share of prompts further off than 99% of validation; 1% is expected.
        flagged: the share flagged, by threshold.
        drifted: whether `unlike` is above 1% beyond doubt (its interval excludes 2%), so that the promised rates may not hold.
    """

    n: int
    raw_ks: float
    raw_p: float
    far_ks: float
    far_p: float
    unlike: Rate
    flagged: dict[str, Rate]
    drifted: bool

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        word = "drifted: recalibrate on traffic of your own before you trust the thresholds" if self.drifted else "no drift to be seen"
        flags = ", ".join(f"{name} {rate.rate:.3f}" for name, rate in self.flagged.items())
        return f"{word}; {self.unlike} of the prompts lie further off than 99% of validation; flagged: {flags or 'no threshold'}"


def drift(reference: Reference, states: Tensor, raw: np.ndarray, flagged: dict[str, np.ndarray]) -> Drift:
    """How traffic differs from validation; no label is needed.

    Raises:
        InputError: for fewer than 30 prompts.
    """
    if len(raw) < _ENOUGH:
        raise InputError(f"drift is told from {_ENOUGH} prompts or more, not {len(raw)}")
    far = reference.far_of(states)
    unlike = wilson(int((far > reference.far[int(0.99 * (len(GRID) - 1))]).sum()), len(far))
    found = [_distance(np.asarray(x, float), np.asarray(of), reference.n) for x, of in ((raw, reference.raw), (far, reference.far))]
    rates = {name: wilson(int(hits.sum()), len(hits)) for name, hits in flagged.items()}
    return Drift(len(raw), *found[0], *found[1], unlike, rates, unlike.low > 0.02)


def _far(states: Tensor, middle: Tensor, scale: Tensor) -> np.ndarray:
    return (((states.float() - middle) / scale) ** 2).mean((1, 2, 3)).double().numpy()


def _distance(found: np.ndarray, quantiles: np.ndarray, n: int) -> tuple[float, float]:
    """Largest gap between the traffic's share below x and validation's, and how likely it is by chance."""
    from scipy.stats import kstwobign

    found = np.sort(found)
    steps = np.interp(found, *_unique(quantiles), left=0, right=1)
    gap = float(max((np.arange(1, len(found) + 1) / len(found) - steps).max(), (steps - np.arange(len(found)) / len(found)).max()))
    scale = math.sqrt(len(found) * n / (len(found) + n))
    return gap, float(kstwobign.sf(gap * scale))


def _unique(quantiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, last = np.unique(quantiles[::-1], return_index=True)
    return values, GRID[::-1][last]


def finite(states: Tensor) -> Tensor:
    """States that can be scored.

    Raises:
        InputError: for one that is no finite number: the model's dtype is too narrow.
    """
    if not torch.isfinite(states).all():
        raise InputError("states are not all finite: load the model in bfloat16 or float32")
    return states

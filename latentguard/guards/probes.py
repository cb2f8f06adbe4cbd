"""How states become a raw score of harm: the paper's two centroids, linear probes, a small MLP. Knows no model, prompt or threshold.

A probe takes the states of a guard's layers and positions together, [prompt, layer, position, d_model], and gives a number a
prompt; higher is more harm. What it is made of is tensors alone (`tensors`, `restore`), so that a saved one holds no code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from latentguard.errors import InputError

States = Float[Tensor, "prompt layer position d_model"]
Raw = Float[Tensor, " prompt"]
_EPOCHS, _HIDDEN = 40, 64


class Probe(Protocol):
    """States in, raw scores out."""

    def raw(self, states: States) -> Raw:
        """A float64 score a prompt, without unit; higher is more harm."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that `restore` needs."""
        ...


@dataclass(frozen=True, eq=False)
class PaperRule:
    """The paper's rule: cosine to the harmful centroid minus cosine to the harmless one, averaged over the states (arXiv 2507.11878,
    Eqs. 2-4, §5). At one position and all L + 1 layers, with the threshold 0, it is Latent Guard as published.
    """

    high: Float[Tensor, "layer position d_model"]
    low: Float[Tensor, "layer position d_model"]

    def raw(self, states: States) -> Raw:
        """From -2 to 2."""
        sides = [torch.cosine_similarity(states.double(), pole.double(), dim=-1) for pole in (self.high, self.low)]
        return (sides[0] - sides[1]).mean((1, 2))

    def tensors(self) -> dict[str, Tensor]:
        """Both centroids."""
        return {"high": self.high, "low": self.low}


@dataclass(frozen=True, eq=False)
class Linear:
    """One weight a dimension of every state, and a bias."""

    weight: Float[Tensor, "layer position d_model"]
    bias: Float[Tensor, ""]

    def raw(self, states: States) -> Raw:
        """The log-odds of a logistic probe; of the others a score of no unit."""
        return states.double().flatten(1) @ self.weight.double().flatten() + self.bias.double()

    def tensors(self) -> dict[str, Tensor]:
        """Weight and bias."""
        return {"weight": self.weight, "bias": self.bias}


@dataclass(frozen=True, eq=False)
class Mlp:
    """One hidden layer (GELU) over standardised states."""

    middle: Float[Tensor, "layer position d_model"]
    scale: Float[Tensor, "layer position d_model"]
    inward: Float[Tensor, "hidden state"]
    bias: Float[Tensor, " hidden"]
    outward: Float[Tensor, " hidden"]

    def raw(self, states: States) -> Raw:
        """The log-odds."""
        x = ((states - self.middle) / self.scale).double().flatten(1)
        return torch.nn.functional.gelu(x @ self.inward.double().T + self.bias.double()) @ self.outward.double()

    def tensors(self) -> dict[str, Tensor]:
        """All five."""
        return {"middle": self.middle, "scale": self.scale, "inward": self.inward, "bias": self.bias, "outward": self.outward}


def fit_probe(
    method: str, states: States, harmful: Bool[Tensor, " prompt"], *, strength: float = 1.0, weights: "np.ndarray | None" = None, seed: int = 0
) -> Probe:
    """A probe of one of `METHODS`.

    Args:
        strength: of the regularisation, as a multiple of the method's own: more is simpler. `paper` and `mean_difference` have none.
        weights: how much each prompt counts; None is all alike.

    Raises:
        InputError: for an unknown method, an empty side, or states that are not finite.
    """
    if method not in METHODS:
        raise InputError(f"method={method!r}: choose one of {', '.join(METHODS)}")
    if not harmful.any() or harmful.all():
        raise InputError(f"a guard needs prompts on both sides, got {int(harmful.sum())} harmful and {int((~harmful).sum())} harmless")
    if not states.isfinite().all():
        raise InputError("states are not all finite: load the model in bfloat16 or float32")
    counts = torch.ones(len(states), dtype=torch.float64) if weights is None else torch.from_numpy(np.asarray(weights, float))
    return METHODS[method](states.float(), harmful, counts / counts.mean(), strength, seed)


def restore(method: str, tensors: Mapping[str, Tensor]) -> Probe:
    """The probe that `tensors` were of.

    Raises:
        InputError: where they are not those of such a probe.
    """
    kind = {"paper": PaperRule, "mlp": Mlp}.get(method, Linear if method in METHODS else None)
    if kind is None:
        raise InputError(f"method={method!r}: choose one of {', '.join(METHODS)}")
    if set(tensors) != set(kind.__dataclass_fields__):
        raise InputError(f"a {method} probe has the tensors {', '.join(kind.__dataclass_fields__)}, not {', '.join(sorted(tensors)) or 'none'}")
    if bad := next((name for name, tensor in tensors.items() if not tensor.is_floating_point() or not tensor.isfinite().all()), None):
        raise InputError(f"the tensor {bad} of the probe holds what is no finite number")
    return kind(**tensors)


def _means(states: Tensor, harmful: Tensor, counts: Tensor) -> list[Tensor]:
    """The weighted mean state of either side, float64."""
    return [torch.einsum("n,n...->...", counts[side], states[side].double()) / counts[side].sum() for side in (harmful, ~harmful)]


def _paper(states: Tensor, harmful: Tensor, counts: Tensor, strength: float, seed: int) -> Probe:
    return PaperRule(*(pole.float() for pole in _means(states, harmful, counts)))


def _mean_difference(states: Tensor, harmful: Tensor, counts: Tensor, strength: float, seed: int) -> Probe:
    high, low = _means(states, harmful, counts)
    unit = (high - low) / (high - low).norm().clamp_min(1e-12)
    return Linear(unit.float(), -((high + low) / 2 * unit).sum().float())


def _standard(states: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and deviation of every dimension."""
    share = counts / counts.sum()
    middle = torch.einsum("n,n...->...", share, states.double())
    spread = torch.einsum("n,n...->...", share, (states.double() - middle) ** 2).sqrt()
    return middle, spread.clamp_min(1e-3 * float(spread.mean()) + 1e-12)  # a dimension that never moves says nothing


def _logistic(states: Tensor, harmful: Tensor, counts: Tensor, strength: float, seed: int) -> Probe:
    """L2-regularised: at strength 1 scikit-learn's C is 10 over the number of dimensions for 4,000 prompts, so that neither count changes how
    strong the penalty is.
    """
    from sklearn.linear_model import LogisticRegression

    middle, spread = _standard(states, counts)
    x = ((states.double() - middle) / spread).flatten(1)
    model = LogisticRegression(C=10 / strength / x.shape[1] * 4000 / len(x), max_iter=500, tol=1e-4)
    model.fit(x.float().numpy(), harmful.numpy(), sample_weight=counts.numpy())
    weight = torch.from_numpy(model.coef_[0]).double().reshape(middle.shape) / spread
    return Linear(weight.float(), (float(model.intercept_[0]) - (weight * middle).sum()).float())  # pyright: ignore[reportIndexIssue]


def _lda(states: Tensor, harmful: Tensor, counts: Tensor, strength: float, seed: int) -> Probe:
    """Linear discriminant, which is the Mahalanobis distance to two means under one shared covariance; the covariance is shrunk towards a
    multiple of the identity by Ledoit and Wolf's share at strength 1, by a larger share above it.
    """
    from sklearn.covariance import ledoit_wolf

    middle, spread = _standard(states, counts)
    x = ((states.double() - middle) / spread).flatten(1)
    means = _means(x, harmful, counts)
    within = (x - torch.where(harmful[:, None], *means)) * counts.sqrt()[:, None]
    shrinkage = float(np.asarray(ledoit_wolf(within.numpy(), assume_centered=True)[1]))
    share = 1 - (1 - shrinkage) / strength if strength > 1 else shrinkage * strength
    full = within.T @ within / len(x)
    covariance = (1 - share) * full + share * full.diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)
    flat = torch.linalg.solve(covariance, means[0] - means[1])
    bias = -(flat * (means[0] + means[1]) / 2).sum()
    weight = flat.reshape(middle.shape) / spread
    return Linear(weight.float(), (bias - (weight * middle).sum()).float())


def _mlp(states: Tensor, harmful: Tensor, counts: Tensor, strength: float, seed: int) -> Probe:
    """AdamW over whole epochs of batches of 128, half of the inputs dropped; the same seed gives the same weights."""
    middle, spread = _standard(states, counts)
    x = ((states.double() - middle) / spread).flatten(1).float()
    y, counts = harmful.float(), counts.float()
    generator = torch.Generator().manual_seed(seed)
    inward = torch.randn(_HIDDEN, x.shape[1], generator=generator) / x.shape[1] ** 0.5
    outward = torch.randn(_HIDDEN, generator=generator) / _HIDDEN**0.5
    parameters = [inward, torch.zeros(_HIDDEN), outward]
    for one in parameters:
        one.requires_grad_()
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1 * strength)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(128):
            kept = (torch.rand(len(rows), x.shape[1], generator=generator) < 0.5).float() * 2
            hidden = torch.nn.functional.gelu((x[rows] * kept) @ parameters[0].T + parameters[1])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(hidden @ parameters[2], y[rows], weight=counts[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    inward, bias, outward = (one.detach() for one in parameters)
    return Mlp(middle.float(), spread.float(), inward, bias, outward)


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor, float, int], Probe]] = {
    "paper": _paper,
    "mean_difference": _mean_difference,
    "logistic": _logistic,
    "lda": _lda,
    "mlp": _mlp,
}

"""Activations, and finding a Direction in them; saving and loading one. Knows no backend and no experiment."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.errors import InputError
from latentguard.prompts import Prompt, digest

if TYPE_CHECKING:
    from latentguard.backends import Backend

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Activations:
    """Residual-stream states, float32 on the CPU: `values[prompt, layer, position, d_model]`."""

    values: Float[Tensor, "prompt layer position d_model"]
    prompts: tuple[Prompt, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    model: str
    weights: str
    n_layers: int
    axes: tuple[str, ...] = field(default=("prompt", "layer", "position", "d_model"))

    def at(self, position: str, prompts: "Iterable[Prompt] | None" = None) -> Float[Tensor, "prompt layer d_model"]:
        """The states at one position, of all prompts or of the given ones in their order."""
        if position not in self.positions:
            raise InputError(f"position {position!r} was not read; these were: {', '.join(self.positions)}")
        values = self.values[:, :, self.positions.index(position)]
        return values if prompts is None else values[self.rows(prompts)]

    def rows(self, prompts: Iterable[Prompt]) -> list[int]:
        """The rows of `prompts`, by id."""
        prompts, row = list(prompts), {prompt.id: i for i, prompt in enumerate(self.prompts)}
        missing = [p.id for p in prompts if p.id not in row]
        if missing:
            raise InputError(f"{len(missing)} of {len(prompts)} prompts have no states here, first {missing[0]}: read them first")
        return [row[p.id] for p in prompts]

    def layer_index(self, layer: int) -> int:
        """Where `layer` lies on the layer axis."""
        if layer not in self.layers:
            raise InputError(f"layer {layer} was not read; these were: {list(self.layers)}")
        return self.layers.index(layer)


@dataclass(eq=False)
class Moments:
    """Count, mean and, where asked for, covariance of states, added up batch by batch without keeping them.

    Sums are of differences from the first state, so that large means cost no digits. `covariance` is the unbiased
    one of each layer and position apart.
    """

    layers: tuple[int, ...]
    positions: tuple[str, ...]
    model: str
    weights: str
    n_layers: int
    n: int
    _sum: Float[Tensor, "layer position d_model"]
    _products: Float[Tensor, "layer position d_model d_model"] | None
    _origin: Float[Tensor, "layer position d_model"] | None = None

    @classmethod
    def none(
        cls, layers: tuple[int, ...], positions: tuple[str, ...], d_model: int, covariance: bool, model: str, weights: str, n_layers: int
    ) -> "Moments":  # fmt: skip
        """Of no state yet."""
        shape = (len(layers), len(positions), d_model)
        products = torch.zeros(*shape, d_model) if covariance else None
        return cls(layers, positions, model, weights, n_layers, 0, torch.zeros(shape, dtype=torch.float64), products)

    def add(self, states: Float[Tensor, "prompt layer position d_model"]) -> None:
        """Count some more states."""
        if self._origin is None:
            self._origin = states[0].double()
        shifted = states.double() - self._origin
        self._sum += shifted.sum(0)
        if self._products is not None:
            near = shifted.permute(1, 2, 3, 0).float()
            self._products += near @ near.transpose(-1, -2)
        self.n += len(states)

    def merge(self, n: int, origin: Tensor, total: Tensor, products: Tensor | None) -> None:
        """Count states that were added up elsewhere: how many, the first of them, and sums of differences from it."""
        if self._origin is None:
            self._origin = origin.double()
        off = origin.double() - self._origin
        if self._products is not None and products is not None:
            cross = total.float()[..., :, None] * off.float()[..., None, :]
            self._products += products + cross + cross.transpose(-1, -2) + n * off.float()[..., :, None] * off.float()[..., None, :]
        self._sum += total.double() + n * off
        self.n += n

    @property
    def mean(self) -> Float[Tensor, "layer position d_model"]:
        """The mean state, float32."""
        if self._origin is None:
            raise InputError("moments of no prompts: give at least one")
        return (self._origin + self._sum / self.n).float()

    @property
    def covariance(self) -> Float[Tensor, "layer position d_model d_model"]:
        """Covariance of the dimensions, float32."""
        if self._products is None or self.n < 2:
            raise InputError(f"covariance of {self.n} states{'' if self._products is not None else ', not asked for'}: read two or more with covariance=True")
        off = (self._sum / self.n).float()
        return (self._products - self.n * off[..., :, None] * off[..., None, :]) / (self.n - 1)


@dataclass(frozen=True, eq=False)
class Direction:
    """One vector a layer, and everything that made it. Not normalised unless `method` says so.

    `residual_norm` is the mean norm of the residual stream at each layer over the states that made it:
    ‖c·v‖ / residual_norm is the *dose* of a coefficient c, which carries between models.
    """

    vectors: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    position: str
    method: str
    model: str
    weights: str
    n_layers: int
    n_positive: int
    n_negative: int
    data: str
    residual_norm: Float[Tensor, " layer"]
    name: str = ""

    def at(self, layer: int) -> Float[Tensor, " d_model"]:
        """The vector of one layer."""
        if layer not in self.layers:
            raise InputError(f"direction {self.name or self.method} has no vector at layer {layer}; it has {list(self.layers)}")
        return self.vectors[self.layers.index(layer)]

    def norm(self, layer: int) -> float:
        """‖v‖ at a layer."""
        return float(self.at(layer).norm())

    def dose(self, layer: int, coef: float) -> float:
        """‖coef · v‖ over the mean residual norm at that layer."""
        self.at(layer)
        return abs(coef) * self.norm(layer) / float(self.residual_norm[self.layers.index(layer)])

    def check(self, backend: "Backend") -> None:
        """Refuse a model this direction was not made on; `replace(direction, weights=…)` overrules it."""
        if (self.n_layers, self.vectors.shape[-1]) != (backend.n_layers, backend.d_model):
            raise InputError(
                f"direction {self.name or self.method} is of {self.model} ({self.n_layers} layers × {self.vectors.shape[-1]}), "
                f"not of {backend.name} ({backend.n_layers} × {backend.d_model}): make one on this model"
            )
        if self.weights and backend.weights and self.weights != backend.weights:
            raise InputError(f"direction {self.name or self.method} was made on other weights ({self.model}) than {backend.name}: make one on this model")

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with its card as metadata, atomically."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        tensors = {"vectors": self.vectors.contiguous(), "residual_norm": self.residual_norm.contiguous()}
        save_file(tensors, partial, metadata={"latentguard.direction": json.dumps({"schema": SCHEMA, **self.card()})})
        partial.replace(path)
        return path

    def card(self) -> dict:
        """Everything but the tensors."""
        names = ("name", "position", "method", "model", "weights", "n_layers", "n_positive", "n_negative", "data")
        return {"layers": list(self.layers), **{key: getattr(self, key) for key in names}}

    @classmethod
    def load(cls, path: str | Path) -> "Direction":
        """Read what `save` wrote; anything else is refused with its reason."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                card = json.loads((file.metadata() or {}).get("latentguard.direction", "null"))
                if card is None:
                    raise InputError(f"{path} is a safetensors file but holds no latentguard direction")
                if card.pop("schema") != SCHEMA:
                    raise InputError(f"{path} was written with another schema; this version reads schema {SCHEMA}")
                tensors = {key: file.get_tensor(key) for key in ("vectors", "residual_norm")}
        except (SafetensorError, FileNotFoundError) as error:
            raise InputError(f"{path} cannot be read as a direction: {error}") from error
        if tensors["vectors"].shape[0] != len(card["layers"]):
            raise InputError(f"{path}: {tensors['vectors'].shape[0]} vectors for {len(card['layers'])} layers")
        return cls(layers=tuple(card.pop("layers")), **card, **tensors)


def mean_difference(states: Activations, positive: Iterable[Prompt], negative: Iterable[Prompt] | None = None, *, position: str, name: str = "") -> Direction:
    """Raw difference of means, mean(positive) − mean(negative), at every layer read (arXiv 2507.11878, Eq. 5).

    Args:
        negative: by default every other prompt in `states`.

    Raises:
        InputError: where a side is empty, the sides overlap, or a state is not finite.
    """
    positive = list(positive)
    chosen = {p.id for p in positive}
    negative = [p for p in states.prompts if p.id not in chosen] if negative is None else list(negative)
    if not positive or not negative:
        raise InputError(f"mean_difference needs prompts on both sides, got {len(positive)} and {len(negative)}")
    if shared := chosen & {p.id for p in negative}:
        raise InputError(f"{len(shared)} prompts are on both sides of the difference, first {sorted(shared)[0]}")
    high, low = states.at(position, positive).double(), states.at(position, negative).double()
    if not (high.isfinite().all() and low.isfinite().all()):
        raise InputError(f"states at {position} are not all finite: load the model in bfloat16 or float32")
    return Direction(
        vectors=(high.mean(0) - low.mean(0)).float(),
        layers=states.layers,
        position=position,
        method="mean_difference",
        model=states.model,
        weights=states.weights,
        n_layers=states.n_layers,
        n_positive=len(positive),
        n_negative=len(negative),
        data=digest([sorted(p.id + p.instruction for p in positive), sorted(p.id + p.instruction for p in negative)])[:16],
        residual_norm=torch.cat([high, low]).norm(dim=-1).mean(0).float(),
        name=name,
    )


def random_like(direction: Direction, seed: int) -> Direction:
    """A control: at each layer an isotropic random vector with the norm of `direction` there."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(direction.vectors.shape, generator=generator)
    vectors = noise / noise.norm(dim=-1, keepdim=True) * direction.vectors.norm(dim=-1, keepdim=True)
    return replace(direction, vectors=vectors, method=f"random(seed={seed})", name="random")


def cosine(a: Direction, b: Direction, layer: int) -> float:
    """Cosine of two directions at a layer; NaN where one is zero (both poles share a token at the embeddings)."""
    x, y = a.at(layer).double(), b.at(layer).double()
    scale = x.norm() * y.norm()
    return float(x @ y / scale) if scale > 0 else float("nan")


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape and float32 bytes: which numbers these are."""
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(str(tuple(values.shape)).encode() + values.numpy().tobytes()).hexdigest()

"""Add, ablate, scale and patch: what may be done to a hidden state. Torch only; knows no model and no tokens.

An intervention is a frozen value. In a list they act together, in order; the cells of a `Grid` are apart.
"""

from __future__ import annotations  # as text they travel anywhere; a server has no jaxtyping

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from latentguard.directions import Activations, Direction, tensor_hash
from latentguard.errors import InputError
from latentguard.fingerprints import told
from latentguard.layers import Layers, resolve_layers
from latentguard.positions import parse_position
from latentguard.prompts import Prompt, digest

When = Literal["prefill", "every_step"]
Hidden = Float[Tensor, "*batch d_model"]
Along = Float[Tensor, "*#batch d_model"]  # broadcasts over what it acts on


def add(state: Hidden, vector: Along, amount: float | Tensor) -> Hidden:
    """State + amount · vector."""
    return state + amount * vector


def scale(state: Hidden, vector: Along, amount: float | Tensor) -> Hidden:
    """Scale the component of `state` along `vector` by `amount`: 0 projects it out, 1 changes nothing."""
    unit = vector / vector.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return state + (amount - 1.0) * (state * unit).sum(-1, keepdim=True) * unit


def patch(state: Hidden, vector: Along, amount: float | Tensor) -> Hidden:
    """`vector` in place of `state` (amount 1), or that share of the way to it."""
    return state + amount * (vector - state)


@dataclass(frozen=True, eq=False)
class Intervention:
    """What all have in common: where (`layer`, `positions`) and when.

    `layer` is a layer or several (see layers.py): what enters that block is changed; layer L is the last block's
    output. `positions` is a place in the prompt (positions.py). `when='prefill'` touches the prompt only, as in the
    paper; `'every_step'` also each generated token.

    A kind of your own (docs/howto/intervention.md): subclass with a `kind`, a `change(state, vector, amount) -> state` (a staticmethod, of
    torch alone: state is [row, token, d_model], vector [row, 1, d_model], amount [row, 1, 1]), an `amount` and a `vector`.
    """

    kind: ClassVar[str] = ""
    change: ClassVar[Callable[..., Tensor]]
    per_prompt: ClassVar[bool] = False
    layer: Layers = field(kw_only=True)
    positions: str = field(default="all", kw_only=True)
    when: When = field(default="prefill", kw_only=True)

    def __post_init__(self) -> None:
        parse_position(self.positions)
        if self.when not in ("prefill", "every_step"):
            raise InputError(f"when={self.when!r}: choose prefill or every_step")
        if not math.isfinite(self.amount):
            raise InputError(f"{type(self).__name__}: coefficient {self.amount!r} is not a finite number")

    @property
    def amount(self) -> float:
        """The scalar handed to the pure function of this kind."""
        raise NotImplementedError

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """The layers acted on in a model of `n_layers` blocks."""
        return resolve_layers(self.layer, n_layers)

    def vector(self, layer: int, prompt: Prompt) -> Float[Tensor, " d_model"]:
        """The vector for one layer and prompt."""
        raise NotImplementedError

    def check(self, backend: object) -> None:
        """Refuse a backend this cannot act on."""

    def identity(self) -> object:
        """What tells this intervention from every other: the store's key."""
        where = [self.layer if isinstance(self.layer, int | float | str) else list(self.layer), self.positions, self.when]
        return [self.kind, *where, self.amount, self._source(), *self._code()]

    def _code(self) -> list[object]:
        """Of a kind that is not ours all that it is made of: with another, it is another."""
        return [] if type(self).__module__.partition(".")[0] == "latentguard" else [digest([told(type(self)), told(vars(self))])]

    def _source(self) -> object:
        return None


@dataclass(frozen=True, eq=False)
class _Along(Intervention):
    direction: Direction

    def vector(self, layer: int, prompt: Prompt) -> Tensor:
        """The direction's own vector of that layer."""
        return self.direction.at(layer)

    def check(self, backend: object) -> None:
        """Refuse another model's direction, and layers it has no vector for."""
        self.direction.check(backend)  # type: ignore[arg-type]
        for layer in self.layers(self.direction.n_layers):
            self.direction.at(layer)

    def _source(self) -> object:
        return digest([list(self.direction.layers), tensor_hash(self.direction.vectors)])


@dataclass(frozen=True, eq=False)
class Add(_Along):
    """h + coef · v: steering (arXiv 2507.11878, §3.4; there coef 1, one layer, all prompt tokens, prefill)."""

    kind: ClassVar[str] = "add"
    change = staticmethod(add)
    coef: float = field(default=1.0, kw_only=True)

    @property
    def amount(self) -> float:
        """The coefficient."""
        return float(self.coef)


@dataclass(frozen=True, eq=False)
class Scale(_Along):
    """Scale the component along v by `factor`."""

    kind: ClassVar[str] = "scale"
    change = staticmethod(scale)
    factor: float = field(kw_only=True)

    @property
    def amount(self) -> float:
        """The factor."""
        return float(self.factor)


@dataclass(frozen=True, eq=False)
class Ablate(_Along):
    """Project v out of h (directional ablation, arXiv 2406.11717, at the residual stream)."""

    kind: ClassVar[str] = "scale"
    change = staticmethod(scale)

    @property
    def amount(self) -> float:
        """Nothing of the component stays."""
        return 0.0


@dataclass(frozen=True, eq=False)
class Patch(Intervention):
    """Put stored states in place: for each prompt the state of the same id, or of `source[id]`, read at `read_at`."""

    kind: ClassVar[str] = "patch"
    change = staticmethod(patch)
    per_prompt: ClassVar[bool] = True
    states: Activations
    read_at: str | None = field(default=None, kw_only=True)
    source: Mapping[str, str] | None = field(default=None, kw_only=True)
    coef: float = field(default=1.0, kw_only=True)

    @property
    def amount(self) -> float:
        """1 replaces, less goes part of the way."""
        return float(self.coef)

    def vector(self, layer: int, prompt: Prompt) -> Tensor:
        """The stored state of this prompt (or of its source) at that layer."""
        wanted = (self.source or {}).get(prompt.id, prompt.id)
        rows = [i for i, p in enumerate(self.states.prompts) if p.id == wanted]
        if not rows:
            raise InputError(f"Patch: no stored state for prompt {wanted}")
        place = self.read_at or self.positions
        return self.states.at(place)[rows[0], self.states.layer_index(layer)]

    def check(self, backend: object) -> None:
        """Refuse states of a model of another shape."""
        shape = (self.states.n_layers, self.states.values.shape[-1])
        if shape != (backend.n_layers, backend.d_model):  # type: ignore[attr-defined]
            raise InputError(f"Patch: the states are of {self.states.model} {shape}, not of {backend.name}")  # type: ignore[attr-defined]

    def _source(self) -> object:
        ids = [p.id for p in self.states.prompts]
        return [self.read_at, sorted((self.source or {}).items()), ids, list(self.states.layers), tensor_hash(self.states.values)]


@dataclass(frozen=True, eq=False)
class Cell:
    """One setting of a grid: interventions that act together, and the names by which rows and figures know it."""

    interventions: tuple[Intervention, ...] = ()
    tags: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Grid:
    """Cells apart: every prompt meets every cell on its own."""

    cells: tuple[Cell, ...]

    def __post_init__(self) -> None:
        if not self.cells:
            raise InputError("Grid: no cells")

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)


def steering_grid(
    direction: Direction, layers: Sequence[int], coefs: Sequence[float], *, when: When = "prefill", positions: str = "all", **tags: object
) -> Grid:
    """Add `direction` at each layer × coefficient."""
    cells = [
        Cell(
            (Add(direction, layer=layer, coef=coef, when=when, positions=positions),),
            {**tags, "layer": layer, "coef": coef, "position": positions, "when": when},
        )
        for layer in layers
        for coef in coefs
    ]
    return Grid(tuple(cells))

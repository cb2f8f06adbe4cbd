"""Backend: a model as the rest of the package sees it. Imports no model library; the real ones live beside it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload, runtime_checkable

from torch import Tensor

from latentguard.directions import Activations, Moments
from latentguard.errors import InputError
from latentguard.interventions import Cell, Grid, Intervention
from latentguard.layers import Layers
from latentguard.prompts import Prompt, as_prompts, digest

if TYPE_CHECKING:
    import numpy as np

    from latentguard.backends.guarding import Guarding

Acting = Sequence[Intervention] | Grid


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: greedy at temperature 0, else sampled with a seed of each row's own.

    No penalty of the model's generation_config is applied, so greedy means the likeliest token.
    """

    max_new_tokens: int = 24
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens}: generate at least one token")
        if not self.temperature >= 0:
            raise InputError(f"temperature={self.temperature}: 0 is greedy, more samples")

    def seed_of(self, prompt: Prompt, said: int) -> int:
        """What the next token is drawn with, of a reply that has `said` tokens: the same wherever it is drawn."""
        return int(digest([self.seed, prompt.id, said + 1])[:15], 16)


@dataclass(frozen=True)
class Reply:
    """What the model said: `finish` is 'eos', 'length', 'decided' where a judge had seen enough, or 'refused' where a guard's controller
    answered in its place. `probability` and `flagged` are what the guard says of the prompt; without one, None and False.
    """

    prompt: Prompt
    text: str
    tokens: tuple[int, ...]
    finish: str
    probability: float | None = None
    flagged: bool = False


@runtime_checkable
class Watch(Protocol):
    """What `generate` needs of a guard (`LatentGuard` is one). Where it has `check(backend)`, that may refuse a model first."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose states it takes, ascending."""
        ...

    @property
    def positions(self) -> tuple[str, ...]:
        """Where it takes them."""
        ...

    @property
    def terminal(self) -> str:
        """How the text that it was fitted on ends; only 'mixed' is taken."""
        ...

    @property
    def thresholds(self) -> Mapping[str, Any]:
        """By name; the `value` of each is a probability, at and above which a prompt is flagged."""
        ...

    def probabilities(self, states: Tensor) -> "np.ndarray":
        """Of float32 [prompt, layer, position, d_model] the probability of harm, [prompt]."""
        ...


@runtime_checkable
class Controller(Protocol):
    """What is done about a flagged prompt before its first token is chosen (controllers.py)."""

    @property
    def at(self) -> str:
        """The name of the guard's threshold."""
        ...

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The interventions that it may answer under."""
        ...

    def choose(self, probability: float, threshold: float) -> "str | int | None":
        """For a flagged prompt: a reply in the model's place, the index of one of `cells`, or None for nothing."""
        ...


@dataclass(frozen=True)
class Measure:
    """A reduction of log-probabilities that can travel to where the weights are: `function(log-probabilities [token, vocab], those of
    the untouched model or None, own)`, a module's function or a `functools.partial` of one. `own` has an entry a prompt.
    """

    function: Callable[..., object]
    clean: bool = False
    own: Sequence[object] | None = None


class Backend(Protocol):
    """The model: where its states are read, its logits asked for, and its replies made.

    `weights` is a hash of the weights, `layers` run from 0 to `n_layers` (layers.py).
    """

    name: str
    weights: str
    n_layers: int
    d_model: int

    def key(self) -> dict:
        """Everything about model, template and libraries that decides what comes out: the store's key."""
        ...

    def render(self, prompts: object) -> list:
        """The prompts as the model gets them (`positions.Rendered`): text, token ids, offsets, instruction."""
        ...

    def first_token(self, text: str) -> int:
        """Id of the first token of a reply that begins with `text`."""
        ...

    def read(self, prompts: object, layers: Layers = "all", positions: Sequence[str] = ("t_inst",)) -> Activations:
        """States at named positions: float32 [prompt, layer, position, d_model]. Stops after the deepest layer."""
        ...

    def moments(self, prompts: Iterable[object], layers: Layers = "all", positions: Sequence[str] = ("t_inst",), covariance: bool = False) -> Moments:
        """Mean (and covariance) of states, for prompts whose states need not be kept; `prompts` may be a generator."""
        ...

    def logits(
        self,
        prompts: object,
        interventions: Acting = (),
        *,
        position: str = "t_post_inst",
        reduce: "Callable[[int, Tensor], object] | None" = None,
    ) -> list:
        """Next-token log-probabilities at `position`: a list over prompts of [token, vocab] (a list of such lists for a
        Grid). `reduce(prompt_index, logprobs)` replaces each by something smaller as soon as it is there; where it has
        `prepare(indices)`, that is called before anything runs here, and where it has `measure(indices)`, that `Measure` is what
        a backend elsewhere is sent.
        """
        ...

    def read_under(
        self, prompts: object, interventions: Sequence[Intervention], layers: Layers = "all", positions: Sequence[str] = ("t_inst",)
    ) -> Activations:  # fmt: skip
        """As `read`, with interventions acting together on the prompt: a state that is itself acted on is read as it then is."""
        ...

    def attributions(
        self, prompts: object, layer: int | float, vector: Tensor, position: str = "t_post_inst", against: Literal["zero", "mean"] = "zero"
    ) -> "list[np.ndarray]":  # fmt: skip
        """How much each token of the instruction adds, to first order, to the projection on `vector` [d_model] of the state at a layer and
        position: its gradient times the token's embedding (`zero`), or times what sets that apart from the mean embedding of the instruction's
        tokens (`mean`), summed over the width. One float64 array a prompt, one number a token of `user`.
        """
        ...

    def stream(self, prompts: list[Prompt], grid: Grid, decoding: Decoding, decided: Callable[[str], bool] | None = None) -> Iterator[tuple[int, int, Reply]]:
        """Replies as they come: (cell index, prompt index, reply), in no promised order."""
        ...

    def guarded(self, decoding: Decoding, decided: Callable[[str], bool] | None, guarding: "Guarding") -> Iterator[tuple[int, int, Reply]]:
        """As `stream`, under a guard. Here, for every backend that has no better way: read first, by a pass that ends at the guard's
        deepest layer, and then stream.
        """
        yield from guarding.read_first(self, decoding, decided)

    @overload
    def generate(self, prompts: object, interventions: Sequence[Intervention] = (), **settings: object) -> list[Reply]: ...
    @overload
    def generate(self, prompts: object, interventions: Grid, **settings: object) -> list[list[Reply]]: ...
    def generate(self, prompts, interventions=(), *, guard=None, controller=None, max_new_tokens=24, temperature=0.0, seed=0, decided=None):  # pyright: ignore[reportInconsistentOverload]
        """Replies in the order of `prompts`: a list acts together; a `Grid` gives one list of replies a cell.

        A `guard` (a `Watch`) judges every prompt as it stands, without the interventions (docs/guarding.md); a `controller` says what is
        done about prompts that it flags, before a token is chosen; None only marks their replies. `decided(text_so_far)` may end a reply
        early, once a judge needs no more of it.
        """
        from latentguard.backends.guarding import Guarding

        listed = as_prompts(prompts)
        grid, decoding = as_grid(interventions), Decoding(max_new_tokens, temperature, seed)
        if guard is not None:
            said = self.guarded(decoding, decided, Guarding(guard, controller, listed, grid, self))
        elif controller is None:
            said = self.stream(listed, grid, decoding, decided)
        else:
            raise InputError(f"controller={controller!r} without a guard: give the guard whose probabilities it decides by")
        replies: list[list[Reply | None]] = [[None] * len(listed) for _ in grid]
        for cell, row, reply in said:
            replies[cell][row] = reply
        return replies if isinstance(interventions, Grid) else replies[0]


def as_grid(interventions: Acting) -> Grid:
    """A list of interventions as a grid of one cell."""
    if isinstance(interventions, Grid):
        return interventions
    if isinstance(interventions, Intervention):
        raise InputError("interventions: give a list, [Add(…)], or a Grid")
    return Grid((Cell(tuple(interventions)),))

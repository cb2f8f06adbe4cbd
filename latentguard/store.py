"""States, replies and reduced logits already computed, on disk, keyed by everything that made them. Knows no experiment.

`Stored(backend)` is a Backend that answers from disk what was asked before and computes only the rest (docs/store.md).
`python -m latentguard.store ls|gc|verify` looks after the folder.
"""

if __name__ == "__main__":  # before torch is loaded: these words need none of it
    from latentguard.stock import main

    raise SystemExit(main())

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from latentguard.backends import Acting, Backend, Decoding, Reply, as_grid
from latentguard.backends.memory import blank_states
from latentguard.caches import cache_dir
from latentguard.directions import Activations
from latentguard.errors import InputError
from latentguard.interventions import Cell, Grid, Intervention
from latentguard.layers import Layers, resolve_layers
from latentguard.packs import Rows
from latentguard.positions import Rendered, parse_position
from latentguard.prompts import Prompt, as_prompts, digest
from latentguard.shelf import Gathered, Shelf, check_writable
from latentguard.stock import LIMIT, Cap

if TYPE_CHECKING:
    from latentguard.directions import Moments

SCHEMA = 2
_BLOCK = 256  # prompts read between two writes: what an interruption can cost
_ROWS = 2048  # and rows of logits, over all cells


class Reduction(Protocol):
    """What makes something small of log-probabilities [token, vocab], and says what it is, so that its results can be kept: numbers,
    strings, lists, tuples, tensors. `index` is the prompt's place in the list given to `logits`.

    Where it has `prepare(indices)`, that is called before any of these prompts is scored, outside of any forward pass; where it has
    `measure(indices)`, that is what a backend elsewhere is sent in its place.
    """

    def __call__(self, index: int, logprobs: Tensor) -> object:
        """The result for one prompt in one cell."""
        ...

    def identity(self) -> object:
        """What tells it from every other reduction, as JSON; change it whenever a result would change."""
        ...


class Stored(Backend):
    """A backend with a memory on disk.

    Args:
        backend: where answers come from that are not on disk.
        folder: by default `store` in the cache (LATENTGUARD_CACHE).
        limit_bytes: what all models together may take; what was not used for longest goes first.

    Raises:
        InputError: for a backend without a hash of its weights, and a folder that cannot be written in.
    """

    def __init__(self, backend: Backend, folder: str | Path | None = None, limit_bytes: float = LIMIT) -> None:
        if not backend.weights:
            raise InputError(f"{backend.name} has no hash of its weights, so its answers cannot be told from another model's: pass weights=… to Local")
        if not limit_bytes > 0:
            raise InputError(f"limit_bytes={limit_bytes}: give the store some room, or do without it")
        self.inner, self.limit_bytes = backend, limit_bytes
        self.folder = Path(folder) if folder else cache_dir("store")
        self.name, self.weights, self.n_layers, self.d_model = backend.name, backend.weights, backend.n_layers, backend.d_model
        key = backend.key()
        self._made_by = digest([SCHEMA, key])
        check_writable(self.folder)
        self._shelf = Shelf(self.folder / self._made_by[:24], {"model": backend.name, **key}, Cap(self.folder, limit_bytes).grew)

    def around(self, backend: Backend) -> "Stored":
        """Another model with the same memory."""
        return Stored(backend, self.folder, self.limit_bytes)

    def key(self) -> dict:
        """The inner backend's."""
        return self.inner.key()

    def render(self, prompts: object) -> list[Rendered]:
        """The inner backend's."""
        return self.inner.render(prompts)

    def first_token(self, text: str) -> int:
        """The inner backend's."""
        return self.inner.first_token(text)

    def read(self, prompts: object, layers: Layers = "all", positions: Sequence[str] = ("t_inst",)) -> Activations:
        """As the inner backend reads: an entry for each prompt and position, of which each layer is found by itself."""
        positions = [positions] if isinstance(positions, str) else list(positions)
        listed, wanted = as_prompts(prompts), resolve_layers(layers, self.n_layers)
        parsed = [parse_position(position, reading=True) for position in positions]
        if not parsed:
            return self.inner.read(listed, wanted, positions)
        asked = _Asked(self._made_by, listed, self.render(listed))
        keys = list(zip(*(asked.states(position) for position in positions), strict=True))
        values = blank_states(len(listed), len(wanted), len(parsed), self.d_model)
        filled, lacking = values.numpy(), {}
        for at in range(0, len(keys), _BLOCK):
            block = keys[at : at + _BLOCK]
            found = self._shelf.fetch("states", (key for row in block for key in row), wanted, 4 * self.d_model)
            for i, row in enumerate(block, at):
                for p, key in enumerate(row):
                    if absent := _fill(filled[i, :, p], wanted, found.get(key, {})):
                        lacking[i, p] = absent
        missing, places = sorted({i for i, _ in lacking}), sorted({p for _, p in lacking})
        depths = tuple(sorted(set().union(*lacking.values())))
        for at in range(0, len(missing), _BLOCK):
            rows, entries = missing[at : at + _BLOCK], {}
            fresh = self.inner.read([listed[i] for i in rows], depths, [positions[p] for p in places]).values.numpy()
            for i, states in zip(rows, fresh, strict=True):
                for p, value in zip(places, states.swapaxes(0, 1), strict=True):
                    if absent := lacking.get((i, p)):
                        filled[i, [wanted.index(layer) for layer in absent], p] = value[[depths.index(layer) for layer in absent]]
                        entries[keys[i][p]] = filled[i, [wanted.index(layer) for layer in depths], p].tobytes()
            self._shelf.add("states", entries, depths)
        return Activations(values, tuple(listed), wanted, tuple(p.name for p in parsed), self.name, self.weights, self.n_layers)

    def moments(
        self, prompts: Iterable[object], layers: Layers = "all", positions: Sequence[str] = ("t_inst",), covariance: bool = False
    ) -> "Moments":  # fmt: skip
        """The inner backend's; not kept."""
        return self.inner.moments(prompts, layers, positions, covariance)

    def logits(
        self, prompts: object, interventions: Acting = (), *, position: str = "t_post_inst", reduce: "Callable[[int, Tensor], object] | Reduction | None" = None
    ) -> list:  # fmt: skip
        """As the inner backend scores. Results of a `Reduction` are kept; log-probabilities, and what a bare function makes of
        them, are not: the ones are large, the other has no name.
        """
        identity = getattr(reduce, "identity", None)
        if reduce is None or identity is None:
            return self.inner.logits(prompts, interventions, position=position, reduce=reduce)
        listed, grid = as_prompts(prompts), as_grid(interventions)
        asked = _Asked(self._made_by, listed, self.render(listed))
        keys = [asked.cell(cell, "logits", asked.places(position), identity()) for cell in grid]
        results: list[list] = [[None] * len(listed) for _ in grid]
        missing: dict[int, list[int]] = {}
        for c, i, found in self._known("logits", keys, _decoded):
            if found is None:
                missing.setdefault(c, []).append(i)
            else:
                results[c][i] = found[0]
        for cells, rows in _alike(missing):
            step = max(16, _ROWS // len(cells))
            for part in (rows[at : at + step] for at in range(0, len(rows), step)):
                fused = Grid(tuple(grid.cells[c] for c in cells))
                made = self.inner.logits([listed[i] for i in part], fused, position=position, reduce=_some_of(reduce, part))
                entries = {}
                for c, row in zip(cells, made, strict=True):
                    for i, result in zip(part, row, strict=True):
                        results[c][i], entries[keys[c][i]] = result, _encoded(result)
                self._shelf.add("logits", entries)
        return results if isinstance(interventions, Grid) else results[0]

    def read_under(
        self, prompts: object, interventions: Sequence[Intervention], layers: Layers = "all", positions: Sequence[str] = ("t_inst",)
    ) -> Activations:  # fmt: skip
        """The inner backend's; not kept."""
        return self.inner.read_under(prompts, interventions, layers, positions)

    def attributions(
        self, prompts: object, layer: int | float, vector: Tensor, position: str = "t_post_inst", against: Literal["zero", "mean"] = "zero"
    ) -> "list[np.ndarray]":  # fmt: skip
        """The inner backend's; not kept."""
        return self.inner.attributions(prompts, layer, vector, position, against)

    def stream(
        self, prompts: list[Prompt], grid: Grid, decoding: Decoding, decided: Callable[[str], bool] | None = None
    ) -> Iterator[tuple[int, int, Reply]]:  # fmt: skip
        """As the inner backend replies: an entry for each cell and prompt, on disk before the next batch is made."""
        judge = getattr(decided, "__self__", None)
        if decided is not None and judge is None:  # a bare function has no name to be keyed by
            yield from self.inner.stream(prompts, grid, decoding, decided)
            return
        asked = _Asked(self._made_by, prompts, self.render(prompts))
        seeds = [prompt.id if decoding.temperature > 0 else "" for prompt in prompts]
        keys = [asked.cell(cell, "replies", seeds, [repr(decoding), repr(judge), getattr(judge, "name", "")]) for cell in grid]
        missing: dict[int, list[int]] = {}
        for c, i, found in self._known("replies", keys, _told):
            if found is None:
                missing.setdefault(c, []).append(i)
            else:
                yield c, i, Reply(prompts[i], *found)
        for cells, rows in _alike(missing):
            fused = Grid(tuple(grid.cells[c] for c in cells))
            with Gathered(self._shelf, "replies") as gathered:
                for c, i, reply in self.inner.stream([prompts[i] for i in rows], fused, decoding, decided):
                    told = {"text": reply.text, "tokens": reply.tokens, "finish": reply.finish}
                    gathered.add(keys[cells[c]][rows[i]], json.dumps(told).encode())
                    yield cells[c], rows[i], reply

    def _known(self, kind: str, keys: Sequence[Sequence[str]], understood: Callable[[bytes], tuple]) -> Iterator[tuple[int, int, tuple | None]]:
        """What is stored for each cell and prompt; None where nothing is, or nothing that can be understood."""
        stored = self._shelf.fetch(kind, (key for row in keys for key in row))
        for c, row in enumerate(keys):
            for i, key in enumerate(row):
                found = None
                if key in stored:
                    try:
                        found = understood(bytes(stored[key][0]))
                    except (ValueError, KeyError, TypeError):
                        self._shelf.drop(key)
                yield c, i, found


def _some_of(reduce: Any, part: Sequence[int]) -> Callable[[int, Tensor], object]:
    """A reduction for some of its prompts, with what it can do besides."""

    def some(index: int, logprobs: Tensor) -> object:
        return reduce(part[index], logprobs)

    def of(indices: Sequence[int]) -> list[int]:
        return [part[i] for i in indices]

    if hasattr(reduce, "prepare"):
        some.prepare = lambda indices: reduce.prepare(of(indices))
    if hasattr(reduce, "measure"):
        some.measure = lambda indices: reduce.measure(of(indices))
    return some


class _Asked:
    """Prompts as keys see them: their tokens, and where among these each position lies, found once for all cells."""

    def __init__(self, made_by: str, prompts: Sequence[Prompt], rendered: Sequence[Rendered]) -> None:
        self.made_by, self.prompts, self.rendered = made_by, prompts, rendered
        self.tokens = [digest(item.ids) for item in rendered]
        self._places: dict[str, list[str]] = {}

    def places(self, position: str) -> list[str]:
        """Of each prompt, the tokens of a position."""
        if position not in self._places:
            place = parse_position(position)
            self._places[position] = [digest(place.tokens(item)) for item in self.rendered]
        return self._places[position]

    def states(self, position: str) -> list[str]:
        """Of each prompt, the key of its states at a position."""
        return [self._key("states", tokens, place) for tokens, place in zip(self.tokens, self.places(position), strict=True)]

    def cell(self, cell: Cell, kind: str, each: Sequence[str], what: object) -> list[str]:
        """Of each prompt, the key of what a cell makes of it; `each` is what else decides it, prompt by prompt, and `what` for all."""
        acts = cell.interventions
        about = digest([kind, what, [act.identity() for act in acts]])
        places = list(zip(*(self.places(act.positions) for act in acts), strict=True)) or [()] * len(self.prompts)
        own = [prompt.id if any(act.per_prompt for act in acts) else "" for prompt in self.prompts]
        return [self._key(about, *told) for told in zip(self.tokens, places, each, own, strict=True)]

    def _key(self, *told: object) -> str:
        return digest([self.made_by, *told])[:32]


def _fill(values: np.ndarray, wanted: Sequence[int], rows: Rows) -> list[int]:
    """Put stored rows into [layer, d_model]; the layers that are not among them."""
    if len(rows) == len(wanted):
        values[:] = np.frombuffer(b"".join([rows[layer] for layer in wanted]), np.float32).reshape(values.shape)
        return []
    for n, layer in enumerate(wanted):
        if layer in rows:
            values[n] = np.frombuffer(rows[layer], np.float32)
    return [layer for layer in wanted if layer not in rows]


def _alike(missing: Mapping[int, list[int]]) -> list[tuple[list[int], list[int]]]:
    """Cells that lack the same prompts, together: (cells, prompts)."""
    found: dict[tuple[int, ...], list[int]] = {}
    for cell, rows in missing.items():
        found.setdefault(tuple(rows), []).append(cell)
    return [(cells, list(rows)) for rows, cells in found.items()]


def _told(entry: bytes) -> tuple[str, tuple[int, ...], str]:
    found = json.loads(entry)
    return found["text"], tuple(found["tokens"]), found["finish"]


def _encoded(result: object) -> bytes:
    return json.dumps(_plain(result)).encode()


def _plain(value: object) -> Any:
    """As JSON, from which the same value comes back: numbers to the last bit, tuples as tuples, tensors as their bytes."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(part) for part in value]}
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        return {"tensor": str(flat.dtype)[6:], "shape": list(flat.shape), "bytes": base64.b64encode(flat.view(-1).view(torch.uint8).numpy().tobytes()).decode()}
    raise InputError(f"a reduction with an identity gave a {type(value).__name__}, which cannot be kept: give numbers, strings, lists, tuples or tensors")


def _decoded(entry: bytes) -> tuple[object]:
    return (_value(json.loads(entry)),)


def _value(plain: Any) -> object:
    if isinstance(plain, list):
        return [_value(part) for part in plain]
    if isinstance(plain, dict) and "tuple" in plain:
        return tuple(_value(part) for part in plain["tuple"])
    if isinstance(plain, dict):
        shape, dtype = plain["shape"], getattr(torch, plain["tensor"])
        return torch.frombuffer(bytearray(base64.b64decode(plain["bytes"])), dtype=dtype).reshape(shape) if 0 not in shape else torch.empty(shape, dtype=dtype)
    return plain

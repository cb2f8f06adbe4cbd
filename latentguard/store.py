"""States and replies already computed, on disk, keyed by everything that made them. Knows no experiment.

`Stored(backend)` is a Backend that answers from disk what was asked before and computes only the rest. One file an
entry, written under another name and renamed, so two processes and a kill do no harm; a damaged entry is dropped
and computed again.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentguard.backends import Acting, Backend, Decoding, Reply
from latentguard.caches import cache_dir
from latentguard.directions import Activations, tensor_hash
from latentguard.errors import InputError
from latentguard.interventions import Cell, Grid
from latentguard.layers import Layers, resolve_layers
from latentguard.positions import Rendered, parse_position
from latentguard.prompts import Prompt, as_prompts, digest

log = logging.getLogger(__name__)
SCHEMA = 1
_BLOCK = 256  # prompts read between two writes: what an interruption can cost


class Stored(Backend):
    """A backend with a memory on disk.

    Args:
        backend: where answers come from that are not on disk.
        folder: by default `store` in the cache (LATENTGUARD_CACHE).
    """

    def __init__(self, backend: Backend, folder: str | Path | None = None) -> None:
        if not backend.weights:
            raise InputError(f"{backend.name} has no hash of its weights, so its answers cannot be told from another model's: pass weights=… to Local")
        self.inner = backend
        self.folder = Path(folder) if folder else cache_dir("store")
        self.name, self.weights, self.n_layers, self.d_model = backend.name, backend.weights, backend.n_layers, backend.d_model
        self._made_by = digest([SCHEMA, backend.key()])

    def key(self) -> dict:
        """The inner backend's."""
        return self.inner.key()

    def render(self, prompts: object) -> list[Rendered]:
        """The inner backend's."""
        return self.inner.render(prompts)

    def first_token(self, text: str) -> int:
        """The inner backend's."""
        return self.inner.first_token(text)

    def logits(self, prompts: object, interventions: Acting = (), **settings) -> list:
        """Not stored: they are large and cheap."""
        return self.inner.logits(prompts, interventions, **settings)

    def read(self, prompts: object, layers: Layers = "all", positions: Sequence[str] = ("t_inst",)) -> Activations:
        """As the inner backend reads, one entry for each prompt and position."""
        positions = [positions] if isinstance(positions, str) else list(positions)
        listed, wanted = as_prompts(prompts), resolve_layers(layers, self.n_layers)
        parsed = [parse_position(position, reading=True) for position in positions]
        rendered = self.render(listed)
        keys = [[digest([self._made_by, "read", item.ids, wanted, place.tokens(item)]) for place in parsed] for item in rendered]
        values: list[list[Tensor | None]] = [[self._load_states(key, (len(wanted), self.d_model)) for key in row] for row in keys]
        lacking = [p for p in range(len(parsed)) if any(row[p] is None for row in values)]
        missing = [i for i, row in enumerate(values) if any(value is None for value in row)]
        for at in range(0, len(missing), _BLOCK):
            rows = missing[at : at + _BLOCK]
            found = self.inner.read([listed[i] for i in rows], wanted, [positions[p] for p in lacking])
            for i, states in zip(rows, found.values, strict=True):
                for p, value in zip(lacking, states.unbind(1), strict=True):
                    values[i][p], kept = value, value.contiguous()
                    self._write(keys[i][p], ".safetensors", lambda path, kept=kept: save_file({"states": kept}, path, metadata={"seal": tensor_hash(kept)}))
        stacked = torch.stack([torch.stack(row, 1) for row in values]) if values else torch.zeros(0, len(wanted), len(parsed), self.d_model)  # type: ignore[arg-type]
        return Activations(stacked, tuple(listed), wanted, tuple(p.name for p in parsed), self.name, self.weights, self.n_layers)

    def stream(
        self, prompts: list[Prompt], grid: Grid, decoding: Decoding, decided: Callable[[str], bool] | None = None
    ) -> Iterator[tuple[int, int, Reply]]:  # fmt: skip
        """As the inner backend replies, one entry for each cell and prompt, written as it comes."""
        judge = getattr(decided, "__self__", None)
        if decided is not None and judge is None:  # a bare function has no name to be keyed by
            yield from self.inner.stream(prompts, grid, decoding, decided)
            return
        rendered = self.render(prompts)
        made_by = digest([self._made_by, "generate", repr(decoding), repr(judge), getattr(judge, "name", "")])
        sampled = decoding.temperature > 0  # then the prompt's id seeds its reply
        keys = [[self._reply_key(made_by, cell, prompt, item, sampled) for prompt, item in zip(prompts, rendered, strict=True)] for cell in grid]
        waiting: dict[tuple[int, ...], list[int]] = {}
        for c in range(len(grid)):
            missing = []
            for i, prompt in enumerate(prompts):
                reply = self._load_reply(keys[c][i], prompt)
                if reply is None:
                    missing.append(i)
                else:
                    yield c, i, reply
            if missing:
                waiting.setdefault(tuple(missing), []).append(c)
        for rows, cells in waiting.items():
            asked = Grid(tuple(grid.cells[c] for c in cells))
            for c, i, reply in self.inner.stream([prompts[i] for i in rows], asked, decoding, decided):
                entry = {"text": reply.text, "tokens": reply.tokens, "finish": reply.finish}
                sealed = json.dumps({"entry": entry, "seal": digest(entry)})
                self._write(keys[cells[c]][rows[i]], ".json", lambda path, sealed=sealed: Path(path).write_text(sealed))
                yield cells[c], rows[i], reply

    def _reply_key(self, made_by: str, cell: Cell, prompt: Prompt, rendered: Rendered, sampled: bool) -> str:
        acts = [[act.identity(), parse_position(act.positions).tokens(rendered), prompt.id if act.per_prompt else ""] for act in cell.interventions]
        return digest([made_by, rendered.ids, acts, prompt.id if sampled else ""])

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / (key[2:40] + suffix)

    def _write(self, key: str, suffix: str, write: Callable[[str], object]) -> None:
        path = self._path(key, suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        write(str(partial))
        partial.replace(path)

    def _load_states(self, key: str, shape: tuple[int, ...]) -> Tensor | None:
        path = self._path(key, ".safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                states, seal = file.get_tensor("states"), (file.metadata() or {}).get("seal")
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, OSError) as error:
            return self._drop(path, error)
        return states if tuple(states.shape) == shape and tensor_hash(states) == seal else self._drop(path, "its seal does not match")

    def _load_reply(self, key: str, prompt: Prompt) -> Reply | None:
        path = self._path(key, ".json")
        try:
            found = json.loads(path.read_text())
            entry = found["entry"]
            if digest(entry) != found["seal"]:
                return self._drop(path, "its seal does not match")
            return Reply(prompt, entry["text"], tuple(entry["tokens"]), entry["finish"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError) as error:
            return self._drop(path, error)

    def _drop(self, path: Path, why: object) -> None:
        log.warning("stored entry %s is damaged (%s): computed again", path.name, why)
        path.unlink(missing_ok=True)

"""A model on this machine, read and changed inside nnsight traces. Knows no data set, judge or experiment.

Three things make it cheap and none changes a result: the forward pass ends at the deepest layer read; a cell that
first acts at layer l starts from the clean states entering layer l; the text that all prompts share is run once.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import anyio._backends._asyncio  # noqa: F401  (before nnsight: its `object.save` breaks these modules' annotations)
import anyio.abc
import anyio.streams.file
import anyio.streams.tls  # noqa: F401
import nnsight
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from latentguard import families
from latentguard.backends import Acting, Backend, Decoding, Reply, as_grid
from latentguard.backends.batches import Batch, Plan, first_layer, make_batch, make_plan, shared_prefix, step_plan, take_plan
from latentguard.directions import Activations
from latentguard.errors import InputError
from latentguard.interventions import Cell, Grid
from latentguard.layers import Layers, resolve_layers
from latentguard.positions import Rendered, parse_position
from latentguard.prompts import Prompt, as_prompts, digest
from latentguard.templates import Template


@dataclass
class _Clean:
    """The untouched run of a batch: its cache, and the states entering the layers that cells start from."""

    cache: DynamicCache
    prefix: dict[int, Tensor]
    rest: dict[int, Tensor]


class Local(Backend):
    """A transformers model in this process.

    Args:
        model: any decoder-only `transformers` model; it is left as it was found.
        batch_size: rows at most in one forward pass.
        weights: a hash of the weights, for the store and for directions' cards.
        reuse: start cells from clean states and run shared text once (off only in tests).
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, weights: str = "", template: str = "chat", system: str | None = None,
        batch_size: int = 192, reuse: bool = True,
    ) -> None:  # fmt: skip
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: at least 1")
        self.template = Template(tokenizer, template, system)  # type: ignore[arg-type]
        self.hf, self.tokenizer, self.name, self.weights = model.eval(), tokenizer, name, weights
        self.batch_size, self.reuse = batch_size, reuse
        self._tuples: bool | None = None
        self.model = nnsight.TransformersModel(model, tokenizer=tokenizer)
        self.blocks = self.model.get(families.blocks_path(model))
        self.n_layers, self.d_model = families.n_layers(model.config), families.text_config(model.config).hidden_size
        self.window = families.sliding_window(model.config)
        self.limit = getattr(families.text_config(model.config), "max_position_embeddings", None)
        self.device = next(model.parameters()).device
        eos = getattr(model.generation_config, "eos_token_id", None)
        if any(not hasattr(layer, "keys") for layer in DynamicCache(config=model.config).layers):
            raise InputError(
                f"{type(model).__name__} has layers without attention keys (linear attention, state space); latentguard reads attention models only"
            )
        self.eos = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def key(self) -> dict:
        """Model, template and libraries."""
        import transformers

        return {
            "weights": self.weights or self.name,
            "template": digest(self.template.source),
            "config": digest(
                {key: value for key, value in self.hf.config.to_diff_dict().items() if key != "_name_or_path"}
            ),  # rope, norms, windows, quantisation
            "eos": sorted(self.eos),
            "dtype": str(self.hf.dtype),
            "attention": self.hf.config._attn_implementation,
            "device": self.device.type,
            "versions": [torch.__version__, transformers.__version__, nnsight.__version__],
        }

    def render(self, prompts: object) -> list[Rendered]:
        """The prompts as text, token ids, offsets and instruction span."""
        rendered = [self.template.render(prompt) for prompt in as_prompts(prompts)]
        for item in rendered:
            if self.limit and len(item) > self.limit:
                raise InputError(f"prompt {item.prompt_id}: {len(item)} tokens, but {self.name} takes at most {self.limit}; shorten it")
        return rendered

    def first_token(self, text: str) -> int:
        """Id of the first token of `text`."""
        return self.tokenizer.encode(text, add_special_tokens=False)[0]

    def read(self, prompts: object, layers: Layers = "all", positions: Sequence[str] = ("t_inst",)) -> Activations:
        """States at named positions; the mean is taken where a position is a mean."""
        listed, wanted = as_prompts(prompts), resolve_layers(layers, self.n_layers)
        if isinstance(positions, str):
            positions = [positions]
        if not positions:
            raise InputError("positions=[]: name at least one place to read, such as t_inst")
        parsed = [parse_position(position, reading=True) for position in positions]
        rendered = self.render(listed)
        tokens = [[place.tokens(item) for place in parsed] for item in rendered]  # every position is found before anything runs
        values = torch.zeros(len(listed), len(wanted), len(parsed), self.d_model)
        bar = self._bar("read", len(listed))
        for rows in self._chunks(rendered):
            chunk = [rendered[i] for i in rows]
            first = min(t for i in rows for at in tokens[i] for t in at)
            prefix = min(shared_prefix(chunk), first) if self._shares(chunk) else 0
            batch = make_batch([listed[i] for i in rows], chunk, self.pad, self.device, prefix)
            spots = [(r, batch.column(r, t), r * len(parsed) + p) for r, i in enumerate(rows) for p, at in enumerate(tokens[i]) for t in at]
            values[rows] = self._read_batch(batch, wanted, spots, len(parsed))
            bar.update(len(rows))
        bar.close()
        names = tuple(place.name for place in parsed)
        return Activations(values, tuple(listed), wanted, names, self.name, self.weights, self.n_layers)

    def _read_batch(self, batch: Batch, wanted: tuple[int, ...], spots: list[tuple[int, int, int]], n_positions: int) -> Tensor:
        row, column, target = (torch.tensor(part) for part in zip(*spots, strict=True))
        counts = torch.zeros(len(batch.prompts) * n_positions).index_add_(0, target, torch.ones(len(target)))
        column, picked, cut = column - batch.prefix, [], batch.prefix
        with torch.inference_mode(), _memory(self.batch_size):
            cache = self._prefix_cache(batch) if cut else None
            with self.model.trace(
                input_ids=batch.ids[:, cut:], attention_mask=batch.mask, position_ids=batch.position_ids[:, cut:],
                past_key_values=cache, use_cache=cache is not None, logits_to_keep=1,
            ) as tracer:  # fmt: skip
                for layer in wanted:
                    state = self.blocks[layer].input if layer < self.n_layers else _state(self.blocks[-1].output)
                    picked.append(nnsight.save(state[row.to(state.device), column.to(state.device)].float().cpu()))
                tracer.stop()
        out = torch.zeros(len(wanted), len(counts), self.d_model)
        out.index_add_(1, target, torch.stack(picked))
        return (out / counts[:, None]).reshape(len(wanted), len(batch.prompts), n_positions, -1).transpose(0, 1)

    def _prefix_cache(self, batch: Batch) -> DynamicCache:
        """Keys and values of the shared prefix, run once, one copy a row."""
        cache, cut = DynamicCache(config=self.hf.config), batch.prefix
        ids = batch.ids[:1, :cut]
        self.hf(input_ids=ids, position_ids=batch.position_ids[:1, :cut], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(batch.prompts))
        return cache

    def _shares(self, chunk: Sequence[Rendered], ahead: int = 0) -> bool:
        """Whether a prefix may stand apart from its padding: not where an attention window could fall between them."""
        return self.reuse and not (self.window and max(map(len, chunk)) + ahead > self.window)

    def logits(
        self, prompts: object, interventions: Acting = (), *, position: str = "t_post_inst", reduce: Callable[[int, Tensor], object] | None = None
    ) -> list:  # fmt: skip
        """Next-token log-probabilities (float32) at a position."""
        listed, grid, place = as_prompts(prompts), as_grid(interventions), parse_position(position)
        rendered = self.render(listed)
        tokens = [place.tokens(item) for item in rendered]
        found: list[list] = [[None] * len(listed) for _ in grid]
        for rows, batch, cells, out in self._prefills(listed, rendered, grid, lambda i: tokens[i][0], "score"):
            start = batch.width - out.logits.shape[1]
            for (c, r), logits in zip([(c, r) for c in cells for r in range(len(rows))], out.logits, strict=True):
                at = [batch.column(r, token) - start for token in tokens[rows[r]]]
                logprobs = logits[at].float().log_softmax(-1).cpu()
                found[c][rows[r]] = logprobs if reduce is None else reduce(rows[r], logprobs)
        return found if isinstance(interventions, Grid) else found[0]

    def stream(
        self, prompts: list[Prompt], grid: Grid, decoding: Decoding, decided: Callable[[str], bool] | None = None
    ) -> Iterator[tuple[int, int, Reply]]:  # fmt: skip
        """Replies, batch by batch."""
        rendered = self.render(prompts)
        longest = max(map(len, rendered), default=0)
        if self.limit and longest + decoding.max_new_tokens > self.limit:
            raise InputError(
                f"max_new_tokens={decoding.max_new_tokens} after a prompt of {longest} tokens: {self.name} takes {self.limit} in all; ask for fewer"
            )
        for rows, batch, cells, out in self._prefills(prompts, rendered, grid, lambda i: len(rendered[i]) - 1, "generate", decoding.max_new_tokens):
            replies = self._decode(batch, out, [(c, r) for c in cells for r in range(len(rows))], decoding, decided)
            for (c, r), reply in replies.items():
                yield c, rows[r], reply

    def _prefills(
        self, prompts: list[Prompt], rendered: list[Rendered], grid: Grid, first: Callable[[int], int], what: str, ahead: int = 0
    ) -> "Iterator[tuple[list[int], Batch, list[int], _Prefilled]]":  # fmt: skip
        """Every cell's prefill over every prompt, several cells a batch: (prompt rows, batch, cells, outcome)."""
        for cell in grid:
            for act in cell.interventions:
                act.check(self)
                for item in rendered:
                    parse_position(act.positions).tokens(item)
        starts = {c: first_layer(cell, self.n_layers) for c, cell in enumerate(grid)}
        bar = self._bar(what, len(prompts) * len(grid))
        for rows in self._chunks(rendered):
            chunk = [rendered[i] for i in rows]
            reuse = self._shares(chunk, ahead)
            prefix = min(shared_prefix(chunk), *(first(i) for i in rows)) if reuse else 0
            if any(act.per_prompt for cell in grid for act in cell.interventions):
                prefix = 0
            batch = make_batch([prompts[i] for i in rows], chunk, self.pad, self.device, prefix)
            keep = max(batch.width - batch.column(r, first(i)) for r, i in enumerate(rows))
            clean = self._clean(batch, {s for s in starts.values() if 0 < s <= self.n_layers}) if reuse and len(grid) > 1 else None
            waiting = sorted(starts, key=lambda c: starts[c])
            while waiting:
                start = starts[waiting[0]]
                cells = [c for c in waiting if starts[c] == start][: max(1, self.batch_size // len(rows))]
                waiting = [c for c in waiting if c not in cells]
                usable = clean is not None and 0 < start <= self.n_layers
                yield rows, batch, cells, self._prefill(batch, [grid.cells[c] for c in cells], keep, clean if usable else None, start)
                bar.update(len(rows) * len(cells))
        bar.close()

    def _clean(self, batch: Batch, layers: set[int]) -> _Clean | None:
        if not layers:
            return None
        if self._tuples is None:
            self._tuples = self._returns_tuples(batch)
        if self._tuples:  # such blocks hand on more than the state, so none is skipped
            return None
        out = self._prefill(batch, [Cell()], 1, collect=tuple(sorted(layers)))
        return _Clean(out.cache, out.prefix, out.rest)

    def _returns_tuples(self, batch: Batch) -> bool:
        """Whether this architecture's blocks return tuples (Bloom, Falcon): seen on one token."""
        seen: list[bool] = []
        hook = self.blocks[0]._module.register_forward_hook(lambda _module, _inputs, output: seen.append(isinstance(output, tuple)))
        with torch.inference_mode():
            self.hf(input_ids=batch.ids[:1, -1:])
        hook.remove()
        return seen[0]

    def _prefill(
        self, batch: Batch, cells: Sequence[Cell], keep: int, clean: _Clean | None = None, start: int = 0, collect: tuple[int, ...] = ()
    ) -> "_Prefilled":  # fmt: skip
        n, c, cut, start = len(batch.prompts), len(cells), batch.prefix, start if clean else 0
        plan = make_plan(cells, batch, self.n_layers)
        every, cache, prefix = torch.arange(n * c, device=self.device), DynamicCache(config=self.hf.config), {}
        mask, positions = batch.mask.repeat(c, 1), batch.position_ids.repeat(c, 1)
        with _memory(self.batch_size):
            if cut:
                ids = batch.ids[:1, :cut].expand(c, -1)
                head = take_plan(plan, every[::n], slice(0, cut))
                entering = clean.prefix[start].expand(c, -1, -1) if clean else None
                _, prefix = self._run(ids, torch.ones_like(ids), positions[::n, :cut], cache, head, start, entering, 1, collect)
                for i, layer in enumerate(cache.layers):
                    if clean and i < start:  # skipped layers still tell the length of what came before
                        cache.layers[i] = _changed(clean.cache.layers[i], lambda t: t[:, :, :cut].repeat(c, 1, 1, 1), cut)
                    else:
                        cache.layers[i] = _changed(layer, lambda t: t.repeat_interleave(n, 0), cut)
            entering = clean.rest[start].repeat(c, 1, 1) if clean else None
            tail = take_plan(plan, every, slice(cut, None))
            logits, rest = self._run(batch.ids[:, cut:].repeat(c, 1), mask, positions[:, cut:], cache, tail, start, entering, keep, collect)
        for i, layer in enumerate(clean.cache.layers[:start] if clean else ()):
            cache.layers[i] = _changed(layer, lambda t: t.repeat(c, 1, 1, 1), batch.width)
        return _Prefilled(logits, cache, mask, plan, prefix, rest)

    def _run(
        self, ids: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache, plan: Plan, start: int = 0, entering: Tensor | None = None,
        keep: int = 1, collect: tuple[int, ...] = (), step: bool = False,
    ) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
        """One forward pass from layer `start` upwards: logits of the last `keep` tokens, and collected states."""
        blocks, depth, states = self.blocks, self.n_layers, {}
        with torch.inference_mode():
            with self.model.trace(input_ids=ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=keep):
                for layer in range(depth):
                    if layer < start:
                        blocks[layer].skip(entering if layer == start - 1 else blocks[layer].input)
                        continue
                    if layer in plan:
                        state = blocks[layer].input
                        for slot in plan[layer]:
                            state = slot(state, slot.step if step else slot.mask)
                        blocks[layer].input = state
                    if layer in collect:
                        states[layer] = nnsight.save(blocks[layer].input)
                if depth in plan or depth in collect:
                    output = blocks[depth - 1].output
                    state = _state(output)
                    for slot in plan.get(depth, []):
                        state = slot(state, slot.step if step else slot.mask)
                    blocks[depth - 1].output = (state, *output[1:]) if isinstance(output, tuple) else state
                    if depth in collect:
                        states[depth] = nnsight.save(state)
                logits = nnsight.save(self.model.output.logits)
        return logits, states

    def _decode(
        self, batch: Batch, out: "_Prefilled", rows: list[tuple[int, int]], decoding: Decoding, decided: Callable[[str], bool] | None
    ) -> dict[tuple[int, int], Reply]:  # fmt: skip
        """Tokens one by one; finished rows leave the batch."""
        said: dict[tuple[int, int], list[int]] = {row: [] for row in rows}
        finish: dict[tuple[int, int], str] = dict.fromkeys(rows, "length")
        alive, mask, cache, logits = list(rows), out.mask, out.cache, out.logits[:, -1]
        position = mask.sum(-1, keepdim=True)
        active = torch.arange(len(rows), device=self.device)
        plan = step_plan(out.plan, active)
        for count in range(1, decoding.max_new_tokens + 1):
            tokens = self._choose(logits, alive, batch, decoding, count).tolist()
            for row, token in zip(alive, tokens, strict=True):
                if token in self.eos:
                    finish[row] = "eos"
                else:
                    said[row].append(token)
                    if decided and count < decoding.max_new_tokens and decided(self._text(said[row])):
                        finish[row] = "decided"
            keep = [i for i, row in enumerate(alive) if finish[row] == "length"]
            if not keep or count == decoding.max_new_tokens:
                break
            if len(keep) < len(alive):
                chosen = torch.tensor(keep, device=self.device)
                alive, tokens = [alive[i] for i in keep], [tokens[i] for i in keep]
                mask, position, active = mask[chosen], position[chosen], active[chosen]
                cache.batch_select_indices(chosen)
                plan = step_plan(out.plan, active)
            ids = torch.tensor(tokens, device=self.device)[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            with _memory(self.batch_size):
                logits = self._step(ids, mask, position, cache, plan)[:, -1]
            position = position + 1
        return {row: Reply(batch.prompts[row[1]], self._text(said[row]), tuple(said[row]), finish[row]) for row in rows}

    def _step(self, ids: Tensor, mask: Tensor, position: Tensor, cache: DynamicCache, plan: Plan) -> Tensor:
        if plan:
            return self._run(ids, mask, position, cache, plan, step=True)[0]
        with torch.inference_mode():
            return self.hf(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True).logits

    def _choose(self, logits: Tensor, rows: list[tuple[int, int]], batch: Batch, decoding: Decoding, count: int) -> Tensor:
        if decoding.temperature == 0:
            return logits.argmax(-1)
        noise = torch.stack([
            torch.rand(logits.shape[-1], generator=torch.Generator().manual_seed(int(digest([decoding.seed, batch.prompts[r].id, count])[:15], 16)))
            for _, r in rows
        ])  # fmt: skip
        return (logits.float() / decoding.temperature - (-noise.clamp_min(1e-20).log()).log().to(logits.device)).argmax(-1)

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _chunks(self, rendered: list[Rendered]) -> list[list[int]]:
        """Prompt indices by length, longest first: little padding, and what will not fit fails at once."""
        order = sorted(range(len(rendered)), key=lambda i: -len(rendered[i]))
        return [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]

    def _bar(self, what: str, total: int) -> tqdm:
        return tqdm(total=total, desc=f"{what} · {self.name}", unit="prompt", disable=None, leave=False, delay=2)


@dataclass
class _Prefilled:
    logits: Tensor
    cache: DynamicCache
    mask: Tensor
    plan: Plan
    prefix: dict[int, Tensor]
    rest: dict[int, Tensor]


def _state(output: Any) -> Tensor:
    """A block's residual stream: some architectures return a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _changed(layer: Any, change: Callable[[Tensor], Tensor], length: int) -> Any:
    """A cache layer like `layer` with `change` done to its keys and values; `length` tokens long."""
    new = copy.copy(layer)
    new.keys, new.values = change(layer.keys), change(layer.values)
    if hasattr(new, "cumulative_length"):
        new.cumulative_length = length
    return new


@contextlib.contextmanager
def _memory(batch_size: int) -> Iterator[None]:
    """Out of memory, said with its way out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(f"out of memory with backend.batch_size={batch_size}: set backend.batch_size={max(1, batch_size // 2)}") from error

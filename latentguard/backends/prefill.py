"""The prompts of a grid run once each: what cells and prompts share is computed once and started from. Chooses no token.

A cell that first acts at layer l starts from the clean states entering layer l, with the clean keys and values below;
the text that all prompts share is run once a cell.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from transformers import DynamicCache

from latentguard.backends.batches import Batch, first_layer, lengthwise, make_batch, make_plan, shared_prefix, take_plan
from latentguard.backends.memory import Budget
from latentguard.backends.passes import Outcome, Passes, Spots, changed, rows_of, taken
from latentguard.interventions import Grid
from latentguard.positions import Rendered
from latentguard.prompts import Prompt

Pair = tuple[int, int]  # a cell of the grid, a prompt of the list
_KEPT = 2**30  # bytes of steered prefixes that are kept for the next batch of prompts


@dataclass
class Unit:
    """Prefilled rows: what each is, and how the pass left them. `logits` are those of the last columns, `states` those of the batch's
    untouched prompts, [prompt, layer, place, d_model], where the prefill reads any.
    """

    pairs: list[Pair]  # cell by cell, prompt by prompt
    at: list[int]  # each row's prompt in the batch
    batch: Batch
    mask: Tensor
    logits: Tensor
    cache: DynamicCache
    states: Tensor | None = None

    def keep(self, rows: list[int]) -> None:
        """Let the other rows go."""
        if len(rows) < len(self.pairs):
            chosen = torch.tensor(rows, device=self.mask.device)
            self.pairs, self.at = [self.pairs[k] for k in rows], [self.at[k] for k in rows]
            self.mask, self.logits, self.cache = self.mask[chosen], rows_of(self.logits, chosen), taken(self.cache, chosen)


@dataclass
class Prefill:
    """What every cell of a grid makes of every prompt.

    Args:
        first: each prompt's first token whose logits are wanted.
        within: whether a batch of these prompts lies within the model's attention windows, so that parts of it may be run apart.
        layers: where untouched prompts are read on the way; every cell acts above them.
        read: each prompt's places that are read, as lists of tokens.
    """

    passes: Passes
    budget: Budget
    prompts: Sequence[Prompt]
    rendered: Sequence[Rendered]
    grid: Grid
    first: Sequence[int]
    within: Callable[[Sequence[Rendered]], bool]
    pad: int
    device: torch.device
    layers: tuple[int, ...] = ()
    read: Sequence[list[list[int]]] = ()

    def __post_init__(self) -> None:
        depth = self.passes.n_layers
        self.starts = [first_layer(cell, depth) for cell in self.grid]
        apart = any(act.per_prompt for cell in self.grid for act in cell.interventions)
        whole = apart or not self.prompts or not self.passes.bears_holes()
        self.cut = 0 if whole else min(shared_prefix(self.rendered), *self.first, *(t for places in self.read for at in places for t in at))
        self._groups: list[tuple[int, ...]] = []  # cells of one start whose prefixes are run together
        for _, same in groupby(sorted(range(len(self.grid)), key=lambda c: self.starts[c]), key=lambda c: self.starts[c]):
            cells = list(same)
            size = self.budget.most(self.cut)
            self._groups += [tuple(cells[at : at + size]) for at in range(0, len(cells), size)]
        self._head: Outcome | None = None
        self._heads: dict[tuple[int, ...], DynamicCache] = {}

    def units(self, todo: set[Pair]) -> Iterator[Unit]:
        """Batches of rows until every pair has had its turn."""
        wanted: dict[int, set[int]] = {}
        for c, i in todo:
            wanted.setdefault(i, set()).add(c)
        prompts = sorted(wanted, key=lambda i: sorted(wanted[i]))
        for cells, some in groupby(prompts, key=lambda i: sorted(wanted[i])):
            asked = sorted(some)
            tails = [len(self.rendered[i]) - self.first[i] for i in asked]
            lengths = [len(self.rendered[i]) - self.cut for i in asked]
            most, copies = partial(self.budget.most, logits=max(tails)), max(1, len(cells) // len(self._groups))
            for rows in lengthwise(lengths, most, self.budget.a_pass, copies):
                yield from self._chunk([asked[r] for r in rows], set(cells))

    def _chunk(self, rows: list[int], cells: set[int]) -> Iterator[Unit]:
        chunk = [self.rendered[i] for i in rows]
        within = self.within(chunk)
        batch = make_batch([self.prompts[i] for i in rows], chunk, self.pad, self.device, self.cut if within else 0)
        keep = max(batch.width - batch.column(r, self.first[i]) for r, i in enumerate(rows))
        read = self._read(batch, rows)
        clean = self._clean(batch, {self.starts[c] for c in cells} - {0}, read) if within and len(cells) > 1 else None
        size = max(1, self.budget.most(batch.width - batch.prefix, keep) // len(rows))
        for group in self._groups:
            asked = [c for c in group if c in cells]
            for at in range(0, len(asked), size):
                yield self._unit(batch, rows, group, asked[at : at + size], clean, keep, read)

    def _read(self, batch: Batch, rows: list[int]) -> Spots | None:
        if not self.layers:
            return None
        places = [at for i in rows for at in self.read[i]]
        target = torch.arange(len(places)).repeat_interleave(torch.tensor([len(at) for at in places]))
        row = target // len(self.read[rows[0]])
        begins = torch.tensor([batch.width - batch.prefix - len(item) for item in batch.rendered])  # no token that is read lies in the prefix
        return Spots(self.layers, row, begins[row] + torch.tensor([token for at in places for token in at]), target, len(places))

    def _clean(self, batch: Batch, layers: set[int], read: Spots | None) -> Outcome | None:
        """The untouched run of a batch: states entering the layers that cells start from, keys and values below the highest."""
        if not layers or not self.passes.skippable():
            return None
        cut, cache, collect, end = batch.prefix, self.passes.cache(), tuple(sorted(layers)), max(layers)
        if cut:
            if self._head is None:
                self.budget.tried = 1
                every = {start for start in self.starts if start}
                self._head = self.passes.forward(*self._prefix(batch, 1), self.passes.cache(), {}, collect=tuple(sorted(every)), end=max(every))
            cache = taken(self._head.cache, torch.zeros(len(batch.prompts), dtype=torch.long, device=self.device))
        self.budget.tried = len(batch.prompts)
        return self.passes.forward(batch.ids[:, cut:], batch.mask, batch.position_ids[:, cut:], cache, {}, collect=collect, end=end, spots=read)

    def _unit(
        self, batch: Batch, prompts: list[int], group: tuple[int, ...], cells: list[int], clean: Outcome | None, keep: int, read: Spots | None
    ) -> Unit:  # fmt: skip
        pairs = [(c, i) for c in cells for i in prompts]
        n, cut, start = len(prompts), batch.prefix, self.starts[cells[0]] if clean else 0
        clean = clean if start else None
        self.budget.tried = len(pairs)
        every = torch.arange(len(pairs), device=self.device)
        at, of = every % n, torch.tensor([group.index(c) for c in cells], device=self.device).repeat_interleave(n)
        plan = make_plan([(self.grid.cells[c], r) for c in cells for r in range(n)], batch, self.passes.n_layers)
        cache = taken(self._prefixes(batch, group, clean, start), of) if cut else self.passes.cache()
        self.budget.tried = len(pairs)
        out = self.passes.forward(
            batch.ids[at, cut:], batch.mask[at], batch.position_ids[at, cut:], cache, take_plan(plan, every, slice(cut, None)),
            start=start, entering=rows_of(clean.states[start], at) if clean else None, keep=keep, spots=None if clean else read,
        )  # fmt: skip
        for i in range(start):
            cache.layers[i] = changed(clean.cache.layers[i], lambda t: rows_of(t, at))  # type: ignore[union-attr]
        states = read.places((clean or out).picked, n) if read else None
        return Unit(pairs, at.tolist(), batch, batch.mask[at], out.logits, cache, states)  # type: ignore[arg-type]

    def _prefixes(self, batch: Batch, group: tuple[int, ...], clean: Outcome | None, start: int) -> DynamicCache:
        """Keys and values of the shared prefix as each cell of a group makes it, one row a cell."""
        if group in self._heads:
            return self._heads[group]
        cache, cut, count = self.passes.cache(), batch.prefix, len(group)
        self.budget.tried = count
        plan = make_plan([(self.grid.cells[c], 0) for c in group], batch, self.passes.n_layers)
        entering = self._head.states[start].expand(count, -1, -1) if clean and self._head else None
        within = take_plan(plan, torch.arange(count, device=self.device), slice(0, cut))
        self.passes.forward(*self._prefix(batch, count), cache, within, start=start, entering=entering)
        for i in range(start):  # skipped layers still tell the length of what came before
            cache.layers[i] = changed(self._head.cache.layers[i], lambda t: t.expand(count, -1, -1, -1))  # type: ignore[union-attr]
        if len(self.grid) * cut * self.budget.a_token <= _KEPT:
            self._heads[group] = cache
        return cache

    def _prefix(self, batch: Batch, count: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = batch.ids[:1, : batch.prefix].expand(count, -1)
        return ids, torch.ones_like(ids), batch.position_ids[:1, : batch.prefix].expand(count, -1)

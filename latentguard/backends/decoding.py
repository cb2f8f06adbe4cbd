"""Tokens one by one, for rows of any cell and prompt together: finished rows leave, waiting ones take their place. Opens no trace."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from latentguard.backends import Decoding, Reply
from latentguard.backends.attention import mergeable, merged
from latentguard.backends.batches import Plan, step_plan, take_plan
from latentguard.backends.memory import Budget
from latentguard.backends.passes import Passes, taken
from latentguard.backends.prefill import Pair, Unit
from latentguard.backends.served import noisy
from latentguard.interventions import Grid
from latentguard.prompts import Prompt


@dataclass
class _Row:
    pair: Pair
    said: list[int] = field(default_factory=list)
    finish: str = ""


@dataclass
class Decoder:
    """Greedy or sampled replies from prefilled units.

    Args:
        text: token ids → text.
        eos: tokens that end a reply.
        decided: text so far → whether a judge needs no more of it.
    """

    passes: Passes
    budget: Budget
    grid: Grid
    prompts: Sequence[Prompt]
    decoding: Decoding
    text: Callable[[list[int]], str]
    eos: set[int]
    decided: Callable[[str], bool] | None = None

    def replies(self, units: Iterator[Unit]) -> Iterator[tuple[int, int, Reply]]:
        """Every row's reply, as soon as it is finished."""
        self.budget.held = 0
        held, pool = next(units, None), _Pool(self)
        together = self.budget.together(held.batch.width + self.decoding.max_new_tokens) if held else 0
        ended = held is None
        while held or pool.rows or not ended:
            fresh: list[Unit] = []
            count = len(pool.rows)
            while 2 * len(pool.rows) <= together > count or not count:
                if not held:
                    self.budget.held = count
                    held = next(units, None)
                if ended := held is None:
                    break
                if count and (count + len(held.pairs) > together or not pool.takes(fresh, held)):
                    break
                fresh.append(held)
                count, held = count + len(held.pairs), None
            self.budget.tried, self.budget.held = count, len(held.pairs) if held else 0
            yield from self._said(pool.join(fresh))
            yield from self._said(pool.step())

    def _said(self, rows: list[_Row]) -> Iterator[tuple[int, int, Reply]]:
        for row in rows:
            cell, i = row.pair
            yield cell, i, Reply(self.prompts[i], self.text(row.said), tuple(row.said), row.finish)

    def say(self, rows: Sequence[_Row], logits: Tensor) -> list[_Row]:
        """Add a token to each row, on every rank as on rank 0; the rows that it ends."""
        ended = []
        for row, (token, finish) in zip(rows, self.passes.team.same(lambda: self._choices(rows, logits)), strict=True):
            if row.finish:
                continue
            if finish != "eos":
                row.said.append(token)
            row.finish = finish
            if finish:
                ended.append(row)
        return ended

    def _choices(self, rows: Sequence[_Row], logits: Tensor) -> list[tuple[int, str]]:
        return [(token, row.finish or self._finish(row, token)) for row, token in zip(rows, self._choose(rows, logits).tolist(), strict=True)]

    def _finish(self, row: _Row, token: int) -> str:
        if token in self.eos:
            return "eos"
        if len(row.said) + 1 == self.decoding.max_new_tokens:
            return "length"
        return "decided" if self.decided and self.decided(self.text([*row.said, token])) else ""

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> Tensor:
        if self.decoding.temperature == 0:
            return logits.argmax(-1)
        seeds = [self.decoding.seed_of(self.prompts[row.pair[1]], len(row.said)) for row in rows]
        return noisy(logits[:, None], seeds, self.decoding.temperature)[:, 0].argmax(-1)


class _Pool:
    """Rows that take their next token together."""

    def __init__(self, decoder: Decoder) -> None:
        self.d = decoder
        self.rows: list[_Row] = []
        self.cache: DynamicCache | None = None
        self.mask = torch.zeros(0)
        self.plan: Plan = {}

    def takes(self, fresh: Sequence[Unit], unit: Unit) -> bool:
        """Whether a unit may come beside what is there: not where a layer has let go of tokens outside its window."""
        caches = [self.cache] if self.cache else []
        return all(mergeable(cache) for cache in [*caches, *(u.cache for u in fresh), unit.cache])

    def join(self, units: Sequence[Unit]) -> list[_Row]:
        """Take in prefilled rows, each with its first token; those it ends stay out."""
        if not units:
            return []
        self._compact()
        ended, joined = [], bool(self.rows)
        caches: list[DynamicCache] = [self.cache] if self.cache and joined else []
        masks = [self.mask] if joined else []
        for unit in units:
            rows = [_Row(pair) for pair in unit.pairs]
            ended += self.d.say(rows, unit.logits[:, -1])
            going = [k for k, row in enumerate(rows) if not row.finish]
            if going:
                chosen = torch.tensor(going, device=unit.mask.device)
                caches.append(unit.cache if len(going) == len(rows) else taken(unit.cache, chosen))
                masks.append(unit.mask[chosen])
                self.rows += [rows[k] for k in going]
            unit.cache, unit.logits = None, None  # type: ignore[assignment]
        if len(caches) > joined:
            if all(map(mergeable, caches)):
                self.cache, self.mask = merged(caches, masks, self.d.decoding.max_new_tokens)
            else:
                (self.cache,), (self.mask,) = caches, masks
            going = [(self.d.grid.cells[c], self.d.prompts[i]) for c, i in (row.pair for row in self.rows)]
            self.plan = step_plan(going, self.d.passes.n_layers, self.mask.device)
        return ended

    def step(self) -> list[_Row]:
        """One token for every row; the rows that it ends."""
        if not self.rows:
            return []
        self.d.budget.tried = len(self.rows)
        ids = torch.tensor([[row.said[-1]] for row in self.rows], device=self.mask.device)
        position = self.mask.sum(-1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        logits = self.d.passes.step(ids, self.mask, position, self.cache, self.plan)  # type: ignore[arg-type]
        ended = self.d.say(self.rows, logits)
        done = sum(bool(row.finish) for row in self.rows)
        if done * 8 >= len(self.rows):
            self._compact()
        return ended

    def _compact(self) -> None:
        """Let finished rows go."""
        keep = [k for k, row in enumerate(self.rows) if not row.finish]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[k] for k in keep]
        if not keep:
            self.cache, self.plan = None, {}
            return
        chosen = torch.tensor(keep, device=self.mask.device)
        self.mask = self.mask[chosen]
        for layer in self.cache.layers:  # type: ignore[union-attr]
            layer.batch_select_indices(chosen.to(layer.keys.device))  # type: ignore[union-attr]
        self.plan = take_plan(self.plan, chosen)

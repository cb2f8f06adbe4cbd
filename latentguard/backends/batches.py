"""Prompts side by side in tensors, and what is done to which of their tokens. Opens no trace and loads no model.

A batch is padded on the left, but after the prefix that all its prompts share (the system text): columns are
[prefix | padding | rest]. The prefix is then run once a cell instead of once a prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentguard.interventions import Cell, Intervention
from latentguard.positions import Rendered, parse_position
from latentguard.prompts import Prompt


@dataclass(frozen=True)
class Batch:
    """Rows of one padded batch: `ids` and `mask` are [prompt, column]."""

    prompts: tuple[Prompt, ...]
    rendered: tuple[Rendered, ...]
    prefix: int
    ids: Tensor
    mask: Tensor

    @property
    def width(self) -> int:
        """Columns: prefix, padding and rest."""
        return self.ids.shape[1]

    @property
    def position_ids(self) -> Tensor:
        """Positions from the mask, so that padding shifts nothing."""
        return (self.mask.cumsum(-1) - 1).clamp_min(0)

    def column(self, row: int, token: int) -> int:
        """The column of a prompt's token."""
        return token if token < self.prefix else self.width - len(self.rendered[row]) + token


def make_batch(prompts: Sequence[Prompt], rendered: Sequence[Rendered], pad: int, device: torch.device, prefix: int = 0) -> Batch:
    """Pad prompts to one width."""
    width = max(map(len, rendered))
    ids = torch.full((len(rendered), width), pad)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(rendered):
        tokens = torch.tensor(item.ids)
        ids[row, :prefix], mask[row, :prefix] = tokens[:prefix], 1
        rest = len(item) - prefix
        ids[row, width - rest :], mask[row, width - rest :] = tokens[prefix:], 1
    return Batch(tuple(prompts), tuple(rendered), prefix, ids.to(device), mask.to(device))


def spots(batch: Batch, tokens: Sequence[Sequence[Sequence[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each prompt's places their tokens: row, column, and which place of all it belongs to."""
    found = [(r, batch.column(r, t), r * len(places) + p) for r, places in enumerate(tokens) for p, at in enumerate(places) for t in at]
    row, column, target = (torch.tensor(part) for part in zip(*found, strict=True))
    return row, column, target


def shared_prefix(rendered: Sequence[Rendered]) -> int:
    """How many leading tokens all prompts share, the instructions and each prompt's last token left out."""
    most = min(min(item.user_tokens[0], len(item) - 1) for item in rendered)
    first = rendered[0].ids
    return next((i for i in range(most) if any(item.ids[i] != first[i] for item in rendered)), most)


@dataclass(frozen=True)
class Slot:
    """One operation on one layer for all rows at once; `mask` [row, column, 1] says where."""

    change: Callable[..., Tensor]
    vector: Tensor
    amount: Tensor
    mask: Tensor

    def __call__(self, state: Tensor) -> Tensor:
        """`state` [row, column, d_model] with the operation done where the mask is true."""
        device = state.device
        changed = self.change(state.float(), self.vector.to(device), self.amount.to(device))
        return torch.where(self.mask.to(device), changed.to(state.dtype), state)

    def take(self, rows: Tensor, columns: slice = slice(None)) -> "Slot":
        """The same for some rows and columns."""
        return Slot(self.change, self.vector[rows], self.amount[rows], self.mask[rows][:, columns])


Plan = dict[int, list[Slot]]


def make_plan(rows: Sequence[tuple[Cell, int]], batch: Batch, n_layers: int) -> Plan:
    """What happens at each layer in the prefill of rows that are a cell and a prompt of the batch each."""
    found: dict[tuple[str, int], list[int]] = {}

    def columns(row: int, act: Intervention) -> list[int]:
        place, j = act.positions, rows[row][1]
        if (place, j) not in found:
            found[place, j] = [batch.column(j, token) for token in parse_position(place).tokens(batch.rendered[j])]
        return found[place, j]

    return _plan([(cell.interventions, batch.prompts[j]) for cell, j in rows], columns, batch.width, n_layers, batch.ids.device)


def step_plan(rows: Sequence[tuple[Cell, Prompt]], n_layers: int, device: torch.device) -> Plan:
    """What happens at each generated token."""
    going = [(tuple(act for act in cell.interventions if act.when == "every_step"), prompt) for cell, prompt in rows]
    return _plan(going, lambda *_: [0], 1, n_layers, device)


def _plan(
    rows: Sequence[tuple[Sequence[Intervention], Prompt]], columns: Callable[[int, Intervention], list[int]], width: int, n_layers: int, device: torch.device
) -> Plan:  # fmt: skip
    found: dict[int, dict[tuple[int, str, Callable], list]] = {}
    for row, (acts, prompt) in enumerate(rows):
        depth: dict[int, int] = {}
        for act in acts:
            for layer in act.layers(n_layers):
                order = depth[layer] = depth.get(layer, -1) + 1
                found.setdefault(layer, {}).setdefault((order, act.kind, act.change), []).append(
                    (row, act.vector(layer, prompt), act.amount, columns(row, act))
                )
    plan: Plan = {}
    for layer, slots in found.items():
        for (*_, change), entries in sorted(slots.items(), key=lambda item: item[0][:2]):
            vector, amount = torch.zeros(len(rows), 1, entries[0][1].shape[-1]), torch.zeros(len(rows), 1, 1)
            mask = torch.zeros(len(rows), width, 1, dtype=torch.bool)
            for row, value, size, at in entries:
                vector[row, 0], amount[row] = value, size
                mask[row, at] = True
            plan.setdefault(layer, []).append(Slot(change, vector.to(device), amount.to(device), mask.to(device)))
    return plan


def take_plan(plan: Plan, rows: Tensor, columns: slice = slice(None)) -> Plan:
    """A plan for some rows and columns; layers where nothing happens are left out."""
    taken = {layer: [slot.take(rows, columns) for slot in slots] for layer, slots in plan.items()}
    return {layer: kept for layer, slots in taken.items() if (kept := [slot for slot in slots if bool(slot.mask.any())])}


def first_layer(cell: Cell, n_layers: int) -> int:
    """The lowest layer a cell touches; below it nothing differs from the clean run. L where it touches none."""
    return min((min(act.layers(n_layers)) for act in cell.interventions), default=n_layers)


def lengthwise(lengths: Sequence[int], most: Callable[[int], int], a_pass: int, copies: int = 1) -> list[list[int]]:
    """Indices in batches, longest first (what will not fit fails at once), cut where padding and passes together cost least.

    Args:
        most: how many rows of a length go into one batch.
        a_pass: what a batch costs besides, in tokens.
        copies: how often each batch is run.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    ends = [k for k in range(1, len(order) + 1) if k == len(order) or lengths[order[k]] != lengths[order[k - 1]]]
    starts = [0, *ends[:-1]]
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in ends:  # the cheapest way to batch the longest rows up to here
        ways = []
        for a, start in enumerate(starts[: len(best)]):
            rows, longest = end - start, lengths[order[start]]
            ways.append((best[a][0] + rows * longest * copies + -(-rows // most(longest)) * a_pass, a))
        best.append(min(ways))
    batches: list[list[int]] = []
    b = len(ends)
    while b:
        a = best[b][1]
        rows = order[starts[a] : ends[b - 1]]
        passes = -(-len(rows) // most(lengths[rows[0]]))
        batches[:0] = [rows[len(rows) * k // passes : len(rows) * (k + 1) // passes] for k in range(passes)]
        b = a
    return batches

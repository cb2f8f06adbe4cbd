"""Prompts side by side in tensors, and what is done to which of their tokens. Opens no trace and loads no model.

A batch is padded on the left, but after the prefix that all its prompts share (the system text): columns are
[prefix | padding | rest]. The prefix is then run once a cell instead of once a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentguard.interventions import Cell, add, patch, scale
from latentguard.positions import Rendered, parse_position
from latentguard.prompts import Prompt

KINDS = {"add": add, "scale": scale, "patch": patch}


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


def shared_prefix(rendered: Sequence[Rendered]) -> int:
    """How many leading tokens all prompts share, the instructions and each prompt's last token left out."""
    most = min(min(item.user_tokens[0], len(item) - 1) for item in rendered)
    first = rendered[0].ids
    return next((i for i in range(most) if any(item.ids[i] != first[i] for item in rendered)), most)


@dataclass(frozen=True)
class Slot:
    """One operation on one layer for all rows at once; `mask` [row, column, 1] says where, `step` [row, 1, 1] whether
    generated tokens too.
    """

    kind: str
    vector: Tensor
    amount: Tensor
    mask: Tensor
    step: Tensor

    def __call__(self, state: Tensor, where: Tensor) -> Tensor:
        """`state` with the operation done where `where` [row, column, 1] is true."""
        changed = KINDS[self.kind](state.float(), self.vector.to(state.device), self.amount.to(state.device))
        return torch.where(where.to(state.device), changed.to(state.dtype), state)

    def take(self, rows: Tensor, columns: slice = slice(None)) -> "Slot":
        """The same for some rows and columns."""
        return Slot(self.kind, self.vector[rows], self.amount[rows], self.mask[rows][:, columns], self.step[rows])


Plan = dict[int, list[Slot]]


def make_plan(cells: Sequence[Cell], batch: Batch, n_layers: int) -> Plan:
    """What happens at each layer when every cell meets every prompt; rows are cell by cell, prompt by prompt."""
    count, device = len(batch.prompts), batch.ids.device
    found: dict[int, dict[tuple[int, str], list]] = {}
    for c, cell in enumerate(cells):
        for j, prompt in enumerate(batch.prompts):
            depth: dict[int, int] = {}
            for act in cell.interventions:
                columns = [batch.column(j, token) for token in parse_position(act.positions).tokens(batch.rendered[j])]
                for layer in act.layers(n_layers):
                    order = depth[layer] = depth.get(layer, -1) + 1
                    entry = (c * count + j, act.vector(layer, prompt), act.amount, columns, act.when == "every_step")
                    found.setdefault(layer, {}).setdefault((order, act.kind), []).append(entry)
    plan: Plan = {}
    for layer, slots in found.items():
        for (_, kind), entries in sorted(slots.items(), key=lambda item: item[0]):
            rows = len(cells) * count
            vector = torch.zeros(rows, 1, entries[0][1].shape[-1])
            amount, step = torch.zeros(rows, 1, 1), torch.zeros(rows, 1, 1, dtype=torch.bool)
            mask = torch.zeros(rows, batch.width, 1, dtype=torch.bool)
            for row, value, size, columns, every in entries:
                vector[row, 0], amount[row], step[row] = value, size, every
                mask[row, columns] = True
            plan.setdefault(layer, []).append(Slot(kind, vector.to(device), amount.to(device), mask.to(device), step.to(device)))
    return plan


def take_plan(plan: Plan, rows: Tensor, columns: slice = slice(None)) -> Plan:
    """A plan for some rows and columns; layers that do nothing there are left out."""
    taken = {layer: [slot.take(rows, columns) for slot in slots] for layer, slots in plan.items()}
    return {layer: slots for layer, slots in taken.items() if any(bool(slot.mask.any()) for slot in slots)}


def step_plan(plan: Plan, rows: Tensor) -> Plan:
    """What of a plan goes on at each generated token."""
    taken = {layer: [slot.take(rows) for slot in slots] for layer, slots in plan.items()}
    return {layer: kept for layer, slots in taken.items() if (kept := [slot for slot in slots if bool(slot.step.any())])}


def first_layer(cell: Cell, n_layers: int) -> int:
    """The lowest layer a cell touches; below it nothing differs from the clean run. L + 1 where it touches none."""
    return min((min(act.layers(n_layers)) for act in cell.interventions), default=n_layers + 1)

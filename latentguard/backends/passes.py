"""Forward passes of one model, each an nnsight trace: states read, states changed, layers skipped. Knows no grid and no token choice."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from latentguard import families
from latentguard.backends.attention import grouped
from latentguard.backends.batches import Batch, Plan
from latentguard.backends.memory import device_of
from latentguard.backends.served import averaged, state_of
from latentguard.backends.tracing import nnsight
from latentguard.ranks import ALONE, Alone


@dataclass(frozen=True)
class Spots:
    """Where a pass is read: at `layers`, in rows [spot] and columns [spot], of which `target` [spot] says to which place each belongs;
    places come prompt by prompt, `count` in all.
    """

    layers: tuple[int, ...]
    row: Tensor
    column: Tensor
    target: Tensor
    count: int

    def of(self, state: Tensor) -> Tensor:
        """Out of a pass's states [row, column, d_model]: float32 [spot, d_model]."""
        return state[self.row.to(state.device), self.column.to(state.device)].float()

    def places(self, picked: list[Tensor], prompts: int) -> Tensor:
        """Of each layer's spots, float32 [prompt, layer, place, d_model] on the CPU: the mean over the tokens of a place."""
        found = averaged(torch.stack([state.to(picked[0].device) for state in picked]).cpu(), self.target, self.count)
        return found.reshape(len(self.layers), prompts, -1, found.shape[-1]).transpose(0, 1)


@dataclass
class Outcome:
    """A forward pass over rows: logits of the last tokens, the cache, the states entering the layers asked for, and those at the spots."""

    logits: Tensor | None
    cache: DynamicCache
    states: dict[int, Tensor] = field(default_factory=dict)
    picked: list[Tensor] = field(default_factory=list)


class Passes:
    """The model with its nnsight tree.

    Args:
        model: any decoder-only `transformers` model; it is left as it was found.
        team: the processes it lies on; all make the same passes.
    """

    def __init__(self, model: Any, tokenizer: Any, team: Alone = ALONE) -> None:
        self.hf, self.team = model, team
        if team.size > 1:
            model.register_forward_pre_hook(team.guard)
        self.device = device_of(model.get_input_embeddings())  # where tokens go; each block finds its own
        self.tree = nnsight.TransformersModel(model, tokenizer=tokenizer)
        self.blocks = self.tree.get(families.blocks_path(model))
        self.n_layers = families.n_layers(model.config)
        self._tuples: bool | None = None
        self._holes: bool | None = None

    def cache(self) -> DynamicCache:
        """An empty one."""
        return DynamicCache(config=self.hf.config)

    def forward(
        self, ids: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache, plan: Plan, *, start: int = 0, entering: Tensor | None = None,
        keep: int = 1, collect: tuple[int, ...] = (), end: int | None = None, spots: Spots | None = None,
    ) -> Outcome:  # fmt: skip
        """Rows through the layers from `start` (with the states `entering` it) upwards.

        Args:
            plan: what is changed at which layer; layer l is what enters block l.
            keep: how many last tokens get logits.
            collect: layers whose (changed) states are kept: [row, column, d_model] each.
            end: stop after these many blocks; no logits then.
            spots: places whose (changed) states are kept, at layers from `start` up.
        """
        blocks, depth, states, picked, logits = self.blocks, self.n_layers, {}, [], None
        read = spots.layers if spots else ()
        stop = depth if end is None else end
        self.team.turn()
        with torch.inference_mode():
            with self.tree.trace(
                input_ids=ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=keep
            ) as tracer:  # fmt: skip
                for layer in range(min(stop + 1, depth)):
                    if layer < start:
                        blocks[layer].skip(entering if layer == start - 1 else blocks[layer].input)
                        continue
                    if layer in plan:
                        state = blocks[layer].input
                        for slot in plan[layer]:
                            state = slot(state)
                        blocks[layer].input = state
                    if layer in collect:
                        states[layer] = nnsight.save(blocks[layer].input)
                    if layer in read:
                        picked.append(nnsight.save(spots.of(blocks[layer].input)))  # type: ignore[union-attr]
                    if layer == stop:
                        _ = blocks[layer].input  # the pass must have come so far
                        tracer.stop()
                if depth in plan or depth in collect or depth in read:
                    output = blocks[depth - 1].output
                    state = state_of(output)
                    for slot in plan.get(depth, []):
                        state = slot(state)
                    blocks[depth - 1].output = (state, *output[1:]) if isinstance(output, tuple) else state
                    if depth in collect:
                        states[depth] = nnsight.save(state)
                    if depth in read:
                        picked.append(nnsight.save(spots.of(state)))  # type: ignore[union-attr]
                if end is not None:
                    _ = blocks[depth - 1].output
                    tracer.stop()
                logits = nnsight.save(self.tree.output.logits)
        return Outcome(logits, cache, states, picked)

    def step(self, ids: Tensor, mask: Tensor, position: Tensor, cache: DynamicCache, plan: Plan) -> Tensor:
        """Logits [row, vocab] after one more token a row."""
        with grouped(self.hf):
            if plan:
                out = self.forward(ids, mask, position, cache, plan).logits
            else:
                self.team.turn()
                with torch.inference_mode():
                    out = self.hf(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True).logits
        return out[:, -1]  # type: ignore[index]

    def states(self, batch: Batch, prefix: DynamicCache | None, wanted: tuple[int, ...], row: Tensor, column: Tensor) -> Tensor:
        """States float32 [layer, place, d_model] at (row, column), on the CPU; nothing above the deepest layer runs.

        Args:
            prefix: keys and values of the batch's shared prefix, one row.
        """
        picked, cut = [], batch.prefix
        cache = None if prefix is None else taken(prefix, torch.zeros(len(batch.prompts), dtype=torch.long, device=batch.ids.device))
        self.team.turn()
        with torch.inference_mode():
            with self.tree.trace(
                input_ids=batch.ids[:, cut:], attention_mask=batch.mask, position_ids=batch.position_ids[:, cut:],
                past_key_values=cache, use_cache=cache is not None, logits_to_keep=1,
            ) as tracer:  # fmt: skip
                for layer in wanted:
                    state = self.blocks[layer].input if layer < self.n_layers else state_of(self.blocks[-1].output)
                    picked.append(nnsight.save(state[row.to(state.device), column.to(state.device)].float()))
                tracer.stop()
        return torch.stack([state.to(picked[0].device) for state in picked]).cpu()

    def skippable(self) -> bool:
        """Whether blocks hand on the state alone; those of Bloom and Falcon return tuples with more in them, so none is skipped."""
        if self._tuples is None:
            seen: list[bool] = []
            hook = self.blocks[0]._module.register_forward_hook(lambda _module, _inputs, output: seen.append(isinstance(output, tuple)))
            self.team.turn()
            with torch.inference_mode():
                self.hf(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device))
            hook.remove()
            self._tuples = self.team.same(lambda: seen[0])
        return not self._tuples

    def bears_holes(self) -> bool:
        """Whether masked columns between tokens change nothing: not so where attention counts columns (MPT's ALiBi). Tried once.

        Token counts are multiples of the kernels' blocks: then even bfloat16 gives the same bits on a CPU where holes do no harm.
        """
        if self._holes is None:
            ids = torch.arange(1, 33, device=self.device)[None] * 37 % self.hf.get_input_embeddings().weight.shape[0]
            hole, ones = torch.zeros_like(ids), torch.ones_like(ids)
            plain = self._last(ids, ones)
            apart = self._last(torch.cat([ids[:, :16], hole, ids[:, 16:]], 1), torch.cat([ones[:, :16], hole, ones[:, 16:]], 1))
            allowed = 1e-3 if self.hf.dtype in (torch.float32, torch.float64) else 0.05
            self._holes = self.team.same(lambda: bool((apart - plain).pow(2).mean().sqrt() <= allowed * plain.std()))
        return self._holes

    def _last(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.team.turn()
        with torch.inference_mode():
            return self.hf(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), use_cache=False).logits[0, -1].float()


def changed(layer: Any, change: Callable[[Tensor], Tensor], length: int | None = None) -> Any:
    """A cache layer like `layer` with `change` done to its keys and values; `length` tokens long where that changes too."""
    new = copy.copy(layer)
    if layer.is_initialized:
        new.keys, new.values = change(layer.keys), change(layer.values)
        if length is not None and hasattr(new, "cumulative_length"):
            new.cumulative_length = length
    return new


def taken(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache of some rows of another, in any order and any number of times."""
    new = copy.copy(cache)
    new.layers = [changed(layer, lambda t: rows_of(t, rows)) for layer in cache.layers]
    return new


def rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of a tensor that may lie on another device than their numbers: each block's keys lie with the block."""
    return tensor[rows.to(tensor.device)]

"""Plain transformers with torch hooks: the floors, on a copy of the model that no backend has touched. Times nothing.

Prompts arrive as token ids, so a floor pays nothing for templates.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from latentguard.backends.tiny import tiny_model
from latentguard.errors import InputError
from latentguard.families import blocks_path
from latentguard.weights import ModelSpec, locate

SIZES = (8, 16, 32)


@dataclass(frozen=True)
class Plain:
    """A transformers model as it is, the token it pads with, and those that end a reply."""

    hf: Any
    pad: int
    eos: frozenset[int]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.hf.parameters()).device

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return self.hf.get_submodule(blocks_path(self.hf))


def load_plain(spec: ModelSpec, *, dtype: torch.dtype, device: torch.device, pad: int, eos: set[int]) -> Plain:
    """The spec's model as transformers loads it.

    Raises:
        InputError: for a quantised spec.
    """
    if spec.quantization:
        raise InputError(f"model {spec.name}: the benchmark has no floor for quantised models; leave model.quantization out")
    if spec.tiny is not None:
        return Plain(tiny_model(**spec.tiny).to(device), pad, frozenset(eos))
    model: Any = AutoModelForCausalLM.from_pretrained(
        locate(spec), dtype=dtype, attn_implementation=spec.attention, use_safetensors=True, trust_remote_code=spec.trust_remote_code
    )
    return Plain(model.eval().to(device), pad, frozenset(eos))


def batches(ids: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Indices by length, `size` at a time."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    return [order[at : at + size] for at in range(0, len(order), size)]


def padded(plain: Plain, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Left-padded ids and mask."""
    width = max(map(len, ids))
    rows = torch.full((len(ids), width), plain.pad)
    mask = torch.zeros_like(rows)
    for row, tokens in enumerate(ids):
        rows[row, width - len(tokens) :], mask[row, width - len(tokens) :] = torch.tensor(tokens), 1
    return {"input_ids": rows.to(plain.device), "attention_mask": mask.to(plain.device)}


def places(mask: Tensor) -> Tensor:
    """Position ids that padding does not shift."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def state_of(output: Any) -> Tensor:
    """A block's residual stream: some blocks return a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def hooks(*placed: Any) -> Iterator[None]:
    """Hooks that go again."""
    try:
        yield
    finally:
        for hook in placed:
            hook.remove()


@contextlib.contextmanager
def cut(plain: Plain, layer: int) -> Iterator[nn.Module]:
    """The decoder stack without its head, and without the blocks from `layer` up."""
    path, blocks = blocks_path(plain.hf), plain.blocks
    parent, name = plain.hf.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    setattr(parent, name, nn.ModuleList(list(blocks)[:layer]))
    try:
        yield plain.hf.base_model
    finally:
        setattr(parent, name, blocks)


def read_cut(plain: Plain, ids: Sequence[Sequence[int]], layer: int, size: int) -> Tensor:
    """States entering block `layer` at each prompt's last token, [prompt, d_model]."""
    found: list[Any] = [None] * len(ids)
    last: list[Tensor] = []
    hook = plain.blocks[layer - 1].register_forward_hook(lambda _module, _inputs, output: last.append(state_of(output)[:, -1].clone()))
    with cut(plain, layer) as trunk, hooks(hook), torch.inference_mode():
        for rows in batches(ids, size):
            batch = padded(plain, [ids[i] for i in rows])
            trunk(**batch, position_ids=places(batch["attention_mask"]), use_cache=False)
            for i, state in zip(rows, last.pop(), strict=True):
                found[i] = state
        return torch.stack(found).float().cpu()


def read_trunk(plain: Plain, ids: Sequence[Sequence[int]], size: int) -> Tensor:
    """States of every layer at each prompt's last token, [prompt, layer, d_model]: what enters each block, and the last one's output."""
    found: list[Any] = [None] * len(ids)
    taken: list[Tensor] = []
    blocks = plain.blocks
    placed = [blocks[0].register_forward_pre_hook(lambda _module, inputs, named: taken.append(entering(inputs, named)[:, -1].clone()), with_kwargs=True)]
    placed += [block.register_forward_hook(lambda _module, _inputs, output: taken.append(state_of(output)[:, -1].clone())) for block in blocks]
    with hooks(*placed), torch.inference_mode():
        for rows in batches(ids, size):
            batch = padded(plain, [ids[i] for i in rows])
            plain.hf.base_model(**batch, position_ids=places(batch["attention_mask"]), use_cache=False)
            for i, states in zip(rows, torch.stack(taken, 1), strict=True):
                found[i] = states
            taken.clear()
        return torch.stack(found).float().cpu()


def entering(inputs: tuple, named: dict) -> Tensor:
    """The hidden states that a block is called with."""
    return inputs[0] if inputs else named["hidden_states"]


@contextlib.contextmanager
def steered(plain: Plain, layer: int, vector: Tensor, *, every_step: bool) -> Iterator[None]:
    """Add `vector` to the residual stream entering block `layer`: to the prompt's tokens, or to every token."""
    vector = vector.to(plain.device)

    def change(_module: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        state = entering(inputs, named)
        if not every_step and state.shape[1] == 1:
            return inputs, named
        changed = (state.float() + vector).to(state.dtype)
        return ((changed, *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": changed})

    hook = plain.blocks[layer].register_forward_pre_hook(change, with_kwargs=True)
    with hooks(hook):
        yield


def generate(plain: Plain, ids: Sequence[Sequence[int]], tokens: int, *, full: bool = False, size: int = 16) -> list[tuple[int, ...]]:
    """Greedy replies of `hf.generate`, up to the token that ends them; with `full` all have `tokens` tokens."""
    found: list[Any] = [None] * len(ids)
    ends: dict[str, Any] = {"eos_token_id": sorted(plain.eos)} if plain.eos else {}
    least = {"min_new_tokens": tokens} if full and plain.eos else {}
    for rows in batches(ids, size):
        batch = padded(plain, [ids[i] for i in rows])
        with torch.inference_mode():
            out = plain.hf.generate(
                **batch, max_new_tokens=tokens, **ends, **least, do_sample=False, num_beams=1, repetition_penalty=1.0, pad_token_id=plain.pad, use_cache=True
            )
        for i, reply in zip(rows, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            found[i] = tuple(reply[: next((at for at, token in enumerate(reply) if token in plain.eos), len(reply))])
    return found


def grid(
    plain: Plain, ids: Sequence[Sequence[int]], cells: Sequence[tuple[int, Tensor]], tokens: int, *, every_step: bool = False
) -> list[list[tuple[int, ...]]]:
    """Replies of every cell (layer, vector), one cell after another, steered during prefill or at every step."""
    found = []
    for layer, vector in cells:
        with steered(plain, layer, vector, every_step=every_step):
            found.append(generate(plain, ids, tokens))
    return found


def next_logprobs(plain: Plain, ids: Sequence[int], layer: int, vector: Tensor, said: Sequence[int] = (), *, every_step: bool = False) -> Tensor:
    """Log-probabilities of the token after a prompt and the beginning of a steered reply, [vocab]."""
    rows = torch.tensor([[*ids, *said]], device=plain.device)

    def change(_module: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        state = entering(inputs, named).clone()
        touched = slice(None) if every_step else slice(0, len(ids))
        state[:, touched] = (state[:, touched].float() + vector.to(state.device)).to(state.dtype)
        return ((state, *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": state})

    hook = plain.blocks[layer].register_forward_pre_hook(change, with_kwargs=True)
    with hooks(hook), torch.inference_mode():
        logits = plain.hf(input_ids=rows, use_cache=False, logits_to_keep=1).logits[0, -1]
    return logits.float().log_softmax(-1).cpu()

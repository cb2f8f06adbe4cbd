"""A second model beside the one that a job runs, the matrices at a model's end, and its logits in float32. Opens no trace; knows no study."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from latentguard import families
from latentguard.backends import Backend
from latentguard.backends.loading import load
from latentguard.backends.local import Local
from latentguard.backends.memory import release
from latentguard.errors import InputError
from latentguard.templates import Template
from latentguard.weights import ModelSpec


@contextmanager
def second(spec: ModelSpec, first: Backend) -> Iterator[Backend]:
    """Another model, in memory while the block is open, rendered by the first one's template (a base model has none of its own), in its
    number format, with the same store. The resident model stays where it is, so both take room at once.

    Raises:
        InputError: for a first model that lies on a server or on several ranks, and a second of another shape.
    """
    local = _local(first, "a second model beside it")
    made = load(replace(spec, template="plain", system=None, dtype=str(local.hf.dtype).removeprefix("torch.")), batch_size=local.batch_size)
    try:
        if (made.n_layers, made.d_model) != (first.n_layers, first.d_model):
            raise InputError(
                f"{spec.name} has {made.n_layers} layers of width {made.d_model}, {first.name} {first.n_layers} of {first.d_model}: they are not trained from one another"
            )
        made.tokenizer.chat_template = local.tokenizer.chat_template
        made.template = Template(made.tokenizer, local.template.form, local.template.system)
        yield getattr(first, "around", lambda backend: backend)(made)
    finally:
        del made
        release()


def output_matrices(backend: Backend) -> tuple[Tensor, Tensor]:
    """What the last block's MLP writes for each of its neurons, [neuron, d_model], and the unembedding, [token, d_model]: the model's own
    tensors, in its own format and place. The final norm's gain is in neither.

    Raises:
        InputError: for a model that lies elsewhere, and one whose last MLP does not end in one matrix (experts, packed weights).
    """
    model: Any = _local(backend, "the weights of its last MLP").hf
    writes = families.last_write(model)
    head = model.get_output_embeddings()
    if head is None or not head.weight.is_floating_point():
        raise InputError(f"{backend.name} has no output matrix of plain numbers: load it without quantisation")
    return writes, head.weight.detach()


@contextmanager
def float32_head(backend: Backend) -> Iterator[bool]:
    """While open, the model's last states become logits in float32; whether they do.

    bfloat16 knows steps of 1/8 between 16 and 32: log-odds of two tokens with such logits lie on a grid of eighths. A float32 copy of the unembedding takes
    room while it is open. Left as it is, False: a model of float32 itself, one elsewhere or on several ranks, and a head of packed weights.
    """
    found = getattr(backend, "inner", backend)
    head = found.passes.hf.get_output_embeddings() if isinstance(found, Local) and found.team.size == 1 else None
    if head is None or not head.weight.is_floating_point() or head.weight.dtype.itemsize >= 4:
        yield False
        return
    weight, bias = head.weight.detach().float(), getattr(head, "bias", None)
    hook = partial(_unembedded, weight, None if bias is None else bias.detach().float())
    handle = head.register_forward_hook(hook)
    try:
        yield True
    finally:
        handle.remove()


def _unembedded(weight: Tensor, bias: Tensor | None, _: object, states: tuple[Tensor], __: Tensor) -> Tensor:
    return linear(states[0].float(), weight, bias)


def _local(backend: Backend, what: str) -> Local:
    found = getattr(backend, "inner", backend)
    if not isinstance(found, Local):
        raise InputError(f"{what} is asked for, and {backend.name} does not lie in this process: use backend=local")
    _ = found.hf  # refused where only a share of it lies here
    return found

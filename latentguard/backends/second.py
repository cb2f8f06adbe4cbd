"""A second model beside the one that a job runs, and the matrices at a model's end. Opens no trace; knows no study."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

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


def _local(backend: Backend, what: str) -> Local:
    found = getattr(backend, "inner", backend)
    if not isinstance(found, Local):
        raise InputError(f"{what} is asked for, and {backend.name} does not lie in this process: use backend=local")
    _ = found.hf  # refused where only a share of it lies here
    return found

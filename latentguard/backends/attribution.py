"""Which of a request's tokens carry a projection: gradient × input, by autograd through an nnsight trace. Knows no grid and no reply.

The pass is the model's own, whole and without a cache, from the token embeddings up to the layer that is read.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentguard.backends.batches import lengthwise, make_batch, spots
from latentguard.backends.memory import shortage
from latentguard.backends.passes import Passes
from latentguard.backends.served import state_of
from latentguard.backends.tracing import nnsight
from latentguard.errors import InputError
from latentguard.layers import resolve_layers
from latentguard.positions import parse_position
from latentguard.prompts import Prompt

AGAINST = ("zero", "mean")
_SHARE = 4  # of the tokens that one pass may read, one in so many: a backward pass holds every block's intermediate states


def check_vector(layer: int | float, vector: Tensor, n_layers: int, d_model: int) -> int:
    """The layer as a number.

    Raises:
        InputError: for a vector of another width, or one that is not finite.
    """
    if tuple(vector.shape) != (d_model,) or not bool(torch.isfinite(vector).all()):
        raise InputError(f"attributions: the vector has shape {list(vector.shape)}; give {d_model} finite numbers, the width of this model's states")
    return resolve_layers(layer, n_layers)[0]


def attributed(backend: Any, prompts: Sequence[Prompt], layer: int | float, vector: Tensor, position: str, against: str = "zero") -> list[np.ndarray]:
    """`Backend.attributions` of a model in this process (`Local`).

    Raises:
        InputError: for a model that several processes share, and an origin that is not known.
    """
    if against not in AGAINST:
        raise InputError(f"attributions: against={against!r} is none of {', '.join(AGAINST)}")
    at = check_vector(layer, vector, backend.n_layers, backend.d_model)
    if backend.team.size > 1:
        raise InputError(f"attributions: {backend.name} lies on {backend.team.size} ranks, through which no gradient is taken: load it without tensor_parallel")
    place, rendered = parse_position(position, reading=True), backend.render(prompts)
    tokens, users = [[place.tokens(item)] for item in rendered], [parse_position("user").tokens(item) for item in rendered]
    found: list[np.ndarray | None] = [None] * len(prompts)
    while todo := [i for i, one in enumerate(found) if one is None]:
        with shortage(backend.team) as short, torch.inference_mode(False), torch.enable_grad():  # wherever the caller stands
            most = lambda length: max(1, backend.budget.most(length) // _SHARE)  # noqa: E731
            for rows in [[todo[r] for r in part] for part in lengthwise([len(rendered[i]) for i in todo], most, backend.budget.a_pass)]:
                batch = make_batch([prompts[i] for i in rows], [rendered[i] for i in rows], backend.pad, backend.device)
                backend.budget.tried = len(rows)
                row, column, target = spots(batch, [tokens[i] for i in rows])
                share = 1.0 / torch.bincount(target, minlength=len(rows)).double()  # a place of several tokens is read as their mean
                slopes, embeddings = _gradient(backend.passes, batch, at, vector, row, column, share[target])
                for r, i in enumerate(rows):
                    own = [batch.column(r, token) for token in users[i]]
                    origin = embeddings[r, own].mean(0) if against == "mean" else 0.0
                    found[i] = (slopes[r, own] * (embeddings[r, own] - origin)).sum(-1).numpy()
        if short:
            backend.budget.shrink()
    return [one for one in found if one is not None]


def _gradient(passes: Passes, batch: Any, layer: int, vector: Tensor, row: Tensor, column: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients and token embeddings, float64 [row, column, d_model] on the CPU; rows do not touch each other, so one backward pass serves all."""
    embed = next(path for path, module in passes.hf.named_modules() if module is passes.hf.get_input_embeddings())
    deepest = layer == passes.n_layers
    with passes.tree.trace(
        input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.position_ids, use_cache=False, logits_to_keep=1
    ) as tracer:  # fmt: skip
        given = passes.tree.get(embed)
        leaf = nnsight.save(given.output.detach().clone().requires_grad_(True))
        given.output = leaf
        state = state_of(passes.blocks[-1].output) if deepest else passes.blocks[layer].input
        picked = nnsight.save(state[row.to(state.device), column.to(state.device)].float())
        tracer.stop()
    total = ((picked @ vector.to(picked).clone()) * share.to(picked)).sum()
    (slope,) = torch.autograd.grad(total, leaf)
    return slope.double().cpu(), leaf.detach().double().cpu()

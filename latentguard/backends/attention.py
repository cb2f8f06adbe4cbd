"""Attention and its cache for rows that generate one token each. Knows no prompt and no intervention.

transformers copies the keys and values of every earlier token twice a step: once to append a token, once to give each
query head keys of its own. Neither copy changes a number; on two cores they were half the time of a step.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from latentguard import families

NAME = "latentguard_sdpa"


def grouped_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any) -> tuple[Tensor, None]:
    """The `sdpa` attention of transformers, but where there is one query token a row, query heads that share keys stand side by side as if
    they were tokens: the same sums, without a copy of the keys for each head.

    Args:
        query: [row, query head, 1, d_head]
        key, value: [row, key head, token, d_head]
    """
    rows, heads, length, width = query.shape
    shared = key.shape[1]
    special = [name for name in ("position_bias", "softcap", "s_aux", "cache") if settings.get(name) is not None]
    if length > 1 or heads == shared or special or (attention_mask is not None and attention_mask.shape[1] > 1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, shared, heads // shared, width), key, value, attn_mask=attention_mask, scale=settings.get("scaling")
    )
    return out.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def grouped(model: Any) -> Iterator[None]:
    """While open, the model's `sdpa` attention is `grouped_attention`; another attention, or a model that has its own code for it
    (Falcon, Bloom), is left alone.
    """
    configs = {id(c): c for c in (model.config, families.text_config(model.config))}.values() if model._supports_attention_backend else ()
    configs = [c for c in configs if c._attn_implementation == "sdpa"]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = "sdpa"


class Roomy(DynamicLayer):
    """One layer's keys and values with room for tokens to come, so that a new one is written and nothing is copied.

    Args:
        keys, values: [row, head, room in tokens, d_head], filled up to `length`.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show(keys, values, length)

    def _show(self, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
        self._whole, self._length = (keys, values), length
        self.keys, self.values = shown = keys[..., :length, :], values[..., :length, :]
        return shown

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens after the old and return all."""
        (keys, values), start = self._whole, self._length
        end = start + key_states.shape[-2]
        if end > keys.shape[-2]:
            keys, values = (torch.nn.functional.pad(old, (0, 0, 0, end - start + 16)) for old in (keys, values))
        keys[..., start:end, :], values[..., start:end, :] = key_states, value_states
        return self._show(keys, values, end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._show(self._whole[0][indices], self._whole[1][indices], self._length)


def mergeable(cache: DynamicCache) -> bool:
    """Whether every layer holds plain keys and values of all tokens so far."""
    layers: list[Any] = cache.layers
    return all(
        layer.is_initialized
        and (type(layer) in (DynamicLayer, Roomy) or (type(layer) is DynamicSlidingWindowLayer and layer.keys.shape[-2] == layer.cumulative_length))  # type: ignore[union-attr]
        for layer in layers
    )


def merged(caches: Sequence[DynamicCache], masks: Sequence[Tensor], room: int) -> tuple[DynamicCache, Tensor]:
    """The rows of several caches as one, and its mask [row, column]: each row's tokens at the right end, in their order, so
    that the cache is no wider than its longest row; `room` is for tokens to come.
    """
    width = max(int(mask.sum(1).max()) for mask in masks)
    orders = [mask.argsort(dim=1, stable=True)[:, -width:] for mask in masks]
    told = [torch.nn.functional.pad(mask.gather(1, order), (width - order.shape[1], 0)) for mask, order in zip(masks, orders, strict=True)]
    out = copy.copy(caches[0])
    out.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        held: list[Any] = list(layers)
        keys, values = ([getattr(layer, name) for layer in held] for name in ("keys", "values"))
        out.layers.append(Roomy(_gathered(keys, orders, width, room), _gathered(values, orders, width, room), width))
    return out, torch.cat(told)


def _gathered(parts: Sequence[Tensor], orders: Sequence[Tensor], width: int, room: int) -> Tensor:
    _, heads, _, size = parts[0].shape
    whole = parts[0].new_zeros(sum(len(part) for part in parts), heads, width + room, size)
    row = 0
    for part, order in zip(parts, orders, strict=True):
        order = order.to(part.device)[:, None, :, None].expand(-1, heads, -1, size)
        whole[row : row + len(part), :, width - order.shape[2] : width] = part.gather(2, order)
        row += len(part)
    return whole

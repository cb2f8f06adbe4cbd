"""What differs between architectures, and nothing else: where the blocks are, how many. Opens no trace."""

from typing import Any

import torch

from latentguard.errors import InputError


def text_config(config: Any) -> Any:
    """The language model's part of a config (multimodal models nest it)."""
    return config.get_text_config(decoder=True)


def n_layers(config: Any) -> int:
    """Number of transformer blocks."""
    return text_config(config).num_hidden_layers


def blocks_path(model: torch.nn.Module) -> str:
    """Dotted path of the list of transformer blocks: the ModuleList as long as the text model is deep.

    Llama, Qwen, Gemma and Mistral keep it at model.layers, GPT-2 at transformer.h, GPT-NeoX at gpt_neox.layers,
    multimodal wrappers deeper; none of that needs a table.
    """
    depth = n_layers(model.config)
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth and "vision" not in path and "audio" not in path
    ]
    if not found:
        raise InputError(f"{type(model).__name__}: no list of {depth} blocks found; latentguard reads decoder-only transformers")
    return min(found, key=len)


def last_write(model: torch.nn.Module) -> torch.Tensor:
    """What the last block's MLP writes into the residual stream for each of its neurons, [neuron, d_model].

    It is the block's one matrix outside of attention that leads from another width to the model's: mlp.down_proj of Llama, Qwen, Gemma,
    Mistral and Phi-3, mlp.c_proj of GPT-2 (stored the other way round), mlp.dense_4h_to_h of GPT-NeoX.

    Raises:
        InputError: where there is none or several (experts), or its numbers are packed.
    """
    width = text_config(model.config).hidden_size
    blocks = model.get_submodule(blocks_path(model))
    found = []
    for name, module in blocks[-1].named_modules():  # type: ignore[index]
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or "attn" in name or "attention" in name:
            continue
        turned = type(module).__name__ == "Conv1D"  # transformers' own: [in, out]
        writes = weight if turned else weight.T
        if writes.shape[1] == width and writes.shape[0] != width:
            found.append(writes)
    if len(found) != 1 or not found[0].is_floating_point():
        raise InputError(f"{type(model).__name__}: its last block has {len(found)} matrices by which an MLP could write, of plain numbers; one is needed")
    return found[0].detach()


def sliding_window(config: Any) -> int | None:
    """The shortest attention window (or chunk) of the model, None where every layer sees everything."""
    text = text_config(config)
    kinds = getattr(text, "layer_types", None) or getattr(text, "attention_layers", None)
    names = {"sliding_window": "sliding", "attention_chunk_size": "chunked", "window_size": "local"}
    lengths = [getattr(text, name, None) for name, kind in names.items() if kinds is None or any(kind in str(told) for told in kinds)]
    return min((length for length in lengths if isinstance(length, int)), default=None)

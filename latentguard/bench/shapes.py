"""Models of large shapes with random weights, for speed alone, and what the hardware allows at best. Loads nothing from disk."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from latentguard.backends.local import Local
from latentguard.backends.tiny import tiny_tokenizer
from latentguard.bench.contest import Check, Clock, Contestant, Group, Line
from latentguard.bench.floors import Plain
from latentguard.bench.rows import Bench, ids_of
from latentguard.errors import InputError

SHAPES: dict[str, dict[str, Any]] = {
    "llama3_8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
OURS = {"read_one": "latentguard", "read_all": "latentguard", "generate": "latentguard", "grid_full": "latentguard, full", "grid_logits": "latentguard, scores"}
BOUND = "hardware bound"


def settings_of(name: str, layers: int | None, d_model: int | None) -> dict[str, Any]:
    """The shapes by name, with fewer layers or a smaller width of the same proportions.

    Raises:
        InputError: for an unknown name, and for sizes that give no model.
    """
    if name not in SHAPES:
        raise InputError(f"--shapes {name}: choose from {', '.join(SHAPES)}")
    settings = dict(SHAPES[name])
    if layers is not None:
        if layers < 2:
            raise InputError(f"--layers {layers}: at least 2")
        settings["num_hidden_layers"] = layers
    if d_model is not None:
        if d_model < 64 or d_model % 64:
            raise InputError(f"--d-model {d_model}: a multiple of 64")
        heads = max(4, d_model * settings["num_attention_heads"] // settings["hidden_size"])
        settings.update(hidden_size=d_model, intermediate_size=d_model * 7 // 2, num_attention_heads=heads, num_key_value_heads=heads // 4)
    return settings


def make(name: str, *, layers: int | None, d_model: int | None, dtype: torch.dtype) -> tuple[Local, Plain]:
    """Our backend and plain transformers over the same random weights, on the GPU where there is one.

    Raises:
        InputError: for full size without a GPU.
    """
    settings = settings_of(name, layers, d_model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and layers is None:
        raise InputError(f"--shapes {name} is for a GPU and none is in reach; --layers 2 --d-model 256 tries the same on this processor")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(**settings, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    apart = copy.deepcopy(model, shared)  # modules of its own, the same weights
    backend = Local(model, tokenizer, name=f"{name} shapes, random", weights=f"random {settings}")
    return backend, Plain(apart, backend.pad, frozenset(backend.eos))


def copy_rate(clock: Clock, device: torch.device) -> float:
    """Bytes moved a second by a copy, reads and writes counted: the best of five."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / min(clock.time(lambda: target.copy_(source))[0] for _ in range(5))


def matrix_rate(clock: Clock, device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product: the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(clock.time(lambda: torch.mm(a, b))[0] for _ in range(5))


def bounds(bench: Bench, bandwidth: float, flops: float) -> dict[str, float]:
    """Seconds that each row must take at least: 2 · weights · tokens over the matrix rate; for a step of generation also the
    bytes of all weights over the bandwidth, whichever is longer. Attention, keys and values, and the embeddings cost nothing here.
    """
    blocks, work = bench.plain.blocks, bench.work
    block, head = sum(p.numel() for p in blocks[0].parameters()), bench.plain.hf.get_output_embeddings().weight.numel()
    depth, rows, cells = len(blocks), len(work.answering), len(work.cells)
    read, asked = (sum(map(len, ids_of(bench.backend, prompts))) for prompts in (work.reading, work.answering))
    every = next(blocks[0].parameters()).element_size() * (depth * block + head) / bandwidth

    def product(weights: float, tokens: int) -> float:
        return 2 * weights * tokens / flops

    def steps(rows: int) -> float:
        return (work.tokens - 1) * max(every, product(depth * block + head, rows))

    prefilled = product(depth * block, asked) + product(head, rows)
    above = sum(product((depth - layer) * block, asked) + product(head, rows) for layer, _ in work.cells)
    below = product(max(work.layers) * block, asked)
    return {
        "read_one": product(work.layer * block, read),
        "read_all": product(depth * block, read),
        "generate": prefilled + steps(rows),
        "grid_full": below + above + steps(rows * cells),
        "grid_logits": below + above,
    }


def bound(groups: Sequence[Group], least: dict[str, float]) -> None:
    """Lines over the hardware's bound beside those over plain transformers."""
    for group in groups:
        for row in {line.row for line in group.lines} & least.keys():
            name, said = f"{BOUND}, {row}", Check(None, f"{least[row]:.4f} s at least")
            group.contestants.append(Contestant(name, lambda row=row: (least[row], None)))
            group.lines.append(Line(row, OURS[row], (name,), lambda _outputs, said=said: said, over=BOUND))

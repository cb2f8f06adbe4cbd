"""How much goes into one forward pass, and what happens when that was too much. Knows no prompt.

A budget is measured once, from the memory that is free and the size of the model's states; where it still was too
much it is halved and the work goes on.
"""

import contextlib
import gc
import logging
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentguard import families
from latentguard.caches import cache_dir
from latentguard.errors import InputError
from latentguard.ranks import ALONE, Alone, ElsewhereError

log = logging.getLogger(__name__)
_CPU_ROWS, _GPU_ROWS = 192, 512  # rows that decode together: more do not get cheaper
_GPU_TOKENS = 32_768
_CPU_WORK = 2e11  # multiply-adds of one forward pass that hide what a pass costs besides; more is slower, the processor's caches being small


@dataclass
class Budget:
    """How much goes into one pass.

    Args:
        rows: rows of one pass, at most.
        tokens: tokens of one prefill, padding included.
        room: bytes.
        a_token: bytes of one token's keys, values and intermediate states.
        a_logit: bytes of one token's logits and their logarithms.
        a_pass: what a pass costs besides its tokens, in tokens.
        tried: rows of the last pass, and `held`: rows whose keys lay beside it; what is halved where memory ran out.
    """

    rows: int
    tokens: int = 2**62
    room: int = 2**62
    a_token: int = 1
    a_logit: int = 1
    a_pass: int = 48
    tried: int = 1
    held: int = 0

    @classmethod
    def of(cls, model: Any, batch_size: int | None, ranks: int = 1) -> "Budget":
        """Rows as given, or what the model's shapes and half of the free memory allow: that of the device which would be full first.

        Args:
            ranks: processes that share the model, and on a CPU the memory.
        """
        if batch_size is not None:
            return cls(batch_size)
        config, depth = families.text_config(model.config), families.n_layers(model.config)
        wide, heads = config.hidden_size, config.num_attention_heads
        keys = 2 * depth * (getattr(config, "num_key_value_heads", None) or heads) * (getattr(config, "head_dim", None) or wide // heads)
        inner = getattr(config, "intermediate_size", None) or 4 * wide
        inner = max(inner) if isinstance(inner, list | tuple) else inner  # one a layer
        held, passing, a_logit = keys * next(model.parameters()).element_size() // ranks, 4 * (16 * wide + 4 * inner), 12 * config.vocab_size
        blocks = Counter(device_of(block) for block in model.get_submodule(families.blocks_path(model)))
        rooms = [(free_memory(device) // (2 * ranks if device.type == "cpu" else 2), device, n) for device, n in blocks.items()]
        room, _, share = min(rooms, key=lambda item: item[0] / (held * item[2] / depth + passing))
        sizes = {"a_token": held * share // depth + passing, "a_logit": a_logit}
        if any(device.type != "cpu" for device in blocks):
            return cls(_GPU_ROWS, _GPU_TOKENS, room, a_pass=512, **sizes)
        weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
        tokens = min(8192, max(512, int(_CPU_WORK / weights)))
        return cls(_CPU_ROWS, tokens, room, a_pass=max(48, tokens // 16), **sizes)

    def set(self, other: "Budget") -> "Budget":
        """To another's numbers; whoever holds this one sees them."""
        vars(self).update(vars(other))
        return self

    def most(self, tokens: int, logits: int = 1) -> int:
        """How many rows of so many tokens, the last `logits` with logits, go into one prefill."""
        tokens = max(1, tokens)
        return max(1, min(self.rows, self.tokens // tokens, self.room // (tokens * self.a_token + logits * self.a_logit)))

    def together(self, tokens: int) -> int:
        """How many rows of `tokens` tokens generate together."""
        return max(1, min(self.rows, self.room // (tokens * self.a_token)))

    def shrink(self, elsewhere: bool = False) -> None:
        """After the last pass was too much: half its rows, or an end where there is nothing to halve.

        Args:
            elsewhere: on another rank, maybe in an earlier pass: then half the rows allowed.
        """
        tried, self.held = self.rows if elsewhere else self.tried + self.held, 0
        if tried <= 1 or self.rows == 1:
            raise InputError("out of memory with one prompt in the batch: free memory, or choose a smaller model, dtype, quantization or shorter prompts")
        self.rows = max(1, min(self.rows, tried) // 2)
        log.warning("out of memory with %d rows in a batch: going on with %d", tried, self.rows)
        release()


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a part of a model computes: accelerate's hooks know better than weights that lie on the CPU or on disk."""
    told = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if told is None else torch.device(told)


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take: of the device, or of this machine under its limits (cgroup, ulimit -v)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text()) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            free.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(free))


def peak_memory() -> dict[str, int]:
    """The most this process has held so far, in bytes: of the machine's memory, and of each GPU's."""
    peak = {}
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    for i in range(torch.cuda.device_count()):
        peak[f"cuda:{i}"] = torch.cuda.max_memory_allocated(i)
    return peak


def is_shortage(error: BaseException) -> bool:
    """Whether an error means that memory ran out: torch names it on a GPU and only words it on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")
    )


@contextlib.contextmanager
def shortage(team: Alone = ALONE) -> Iterator[list[bool]]:
    """Out of memory inside, on any rank, is kept from rising and told in the list, which is empty where all went well: whether it ran
    out on another rank.
    """
    short: list[bool] = []
    try:
        yield short
        team.turn()
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        team.ran_short(error)
        short.append(isinstance(error, ElsewhereError))


def release() -> None:
    """Give back what is held for nothing."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def blank_states(*shape: int) -> torch.Tensor:
    """Zeros for states, float32: in memory, or in an unnamed file mapped into it where they would take half of what is free."""
    count = math.prod(shape)
    if count * 4 <= free_memory(torch.device("cpu")) // 2:
        return torch.zeros(shape)
    folder = cache_dir("states")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(count * 4)
        return torch.from_file(file.name, shared=True, size=count, dtype=torch.float32).reshape(shape)

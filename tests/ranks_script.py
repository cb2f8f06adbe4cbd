"""Not a test: what test_parallel.py starts under torchrun, to ask a tensor-parallel model everything. Words: a folder, and a scenario.

Only rank 0 comes back from `load`; what it found lies in the folder afterwards. Each rank has a cache of its own.
"""

import os
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch

from latentguard import Stored, load, ranks
from latentguard.backends import Decoding
from latentguard.backends.local import Local
from latentguard.backends.memory import Budget
from latentguard.behaviour import CleanRun, Shift
from latentguard.directions import mean_difference
from latentguard.errors import InputError
from latentguard.interventions import Ablate, Add, Cell, Grid, Patch
from latentguard.prompts import Prompt

RANK = int(os.environ.get("RANK", "0"))
WORDS = ("tea", "a very long song", "rain", "how to swim", "seven old houses by the sea", "bread", "maps")
PROMPTS = [Prompt.of(f"tell me about {words}.", harmful=k % 2 == 0, id=f"t{k}") for k, words in enumerate(WORDS)]


def enough(text):
    """Ends replies here and there."""
    return len(text) > 1 and ord(text[-1]) % 3 == 0


def answers(backend, before=lambda: None):
    """Every question, and what came of it, as plain values; `before` is called ahead of each."""

    def ask(method, *args, **settings):
        before()
        return getattr(backend, method)(*args, **settings)

    states = ask("read", PROMPTS, "all", ["t_inst", "t_post_inst", "mean(user)"])
    v = mean_difference(states, PROMPTS[::2], PROMPTS[1::2], position="t_inst", name="harm")
    cells = [(), (Add(v, layer=2, coef=3.0),), (Add(v, layer=3, coef=-3.0, when="every_step"),), (Ablate(v, layer="all", when="every_step"),)]
    cells += [(Add(v, layer=1, coef=2.0, positions="t_inst"), Ablate(v, layer=4)), (Patch(states, layer=2, positions="t_inst", read_at="t_post_inst"),)]
    grid = Grid(tuple(Cell(cell) for cell in cells))
    replies = ask("generate", PROMPTS, grid, max_new_tokens=5)
    sampled = ask("generate", PROMPTS, [Add(v, layer=2)], max_new_tokens=9, temperature=1.0, decided=enough)
    return {
        "states": states.values.clone(),
        "moments": ask("moments", (p for p in PROMPTS), "all", ["t_inst"], covariance=True).mean,
        "logits": torch.stack([torch.cat(row) for row in ask("logits", PROMPTS, grid)]),
        "shift": torch.tensor(ask("logits", PROMPTS, grid, reduce=Shift(CleanRun(backend, PROMPTS), frozenset({70, 71})))),
        "replies": [[(reply.tokens, reply.finish) for reply in cell] for cell in replies],
        "sampled": [(reply.tokens, reply.finish) for reply in sampled],
    }


def refused(do):
    try:
        do()
    except (InputError, ZeroDivisionError) as error:
        return str(error)


FAILED: list[str] = []


def unsteady(made=Local.__init__, shrink=Budget.shrink):
    """A model named unsteady runs out of memory now and then, in batches of several rows: in a pass on both ranks, or after it on one."""
    passes = Counter()

    def fail(where, rows, every):
        passes[where] += rows > 1
        if rows > 1 and passes[where] % every == 0:
            FAILED.append(where)
            raise torch.OutOfMemoryError("out of memory")

    def after(real, rows_of):
        def run(*args, **kwargs):
            out = real(*args, **kwargs)
            fail("after", rows_of(args[0]), (9, 7)[RANK])
            return out

        return run

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if self.name == "unsteady":
            self.passes.hf.model.layers[1].register_forward_pre_hook(lambda _, inputs: fail("in", inputs[0].shape[0], 11))
            self.passes.forward = after(self.passes.forward, len)
            self.passes.states = after(self.passes.states, lambda batch: len(batch.prompts))

    def shrunk(self, elsewhere=False):
        if elsewhere:
            FAILED.append("elsewhere")
        shrink(self, elsewhere)

    Local.__init__, Budget.shrink = init, shrunk


def everything(folder):
    unsteady()
    backend = load(str(folder / "llama"), tensor_parallel=2, dtype="float32", batch_size=5)
    found = {"ranks": backend.key()["ranks"], "answers": answers(backend)}
    backend = load(str(folder / "llama"), tensor_parallel=2, dtype="float32", name="unsteady")

    def fresh():
        backend.batch_size = "auto"

    found["short"], found["failed"] = answers(backend, fresh), FAILED
    return found


def manners(folder):
    """Questions within questions, given up, wrong, and around the engine; a second model; a store."""
    return {**_manners(folder), **_stored(folder)}


def _manners(folder):
    backend = load(str(folder / "llama"), tensor_parallel=True, dtype="float32")
    stream, nested = backend.stream(PROMPTS, Grid((Cell(()), Cell(()))), Decoding(12, temperature=1.0), enough), []
    for _ in range(10):
        next(stream)
        nested.append(backend.logits(PROMPTS[:2])[1])
    stream.close()
    wrong = [
        refused(lambda: backend.generate(PROMPTS, max_new_tokens=5000)),
        refused(lambda: backend.read(PROMPTS, 1, ['before("nowhere")'])),
        refused(lambda: backend.logits(PROMPTS, reduce=lambda i, _: 1 / 0)),
        refused(lambda: list(zip(*(backend.stream(PROMPTS, Grid((Cell(()),)), Decoding(12, temperature=1.0), enough) for _ in range(2)), strict=True))),
        refused(lambda: backend.hf),
        refused(lambda: backend.passes.hf(input_ids=torch.ones(1, 3, dtype=torch.long))),
        refused(lambda: load(str(folder / "llama"), tensor_parallel=4)),
    ]
    return {"nested": nested, "refused": wrong, "after": answers(backend)}


def _stored(folder):
    backend, asked = load(str(folder / "qwen2"), tensor_parallel=True, dtype="float32"), []
    found = {"other": answers(backend)}
    team, send = ranks.join(), ranks.Team._send
    team._send = lambda word, value: (asked.append(value[2]) if word == ranks._CALL else None, send(team, word, value))[1]
    stored = Stored(backend)
    stored.read(PROMPTS[:3], "all", ["t_inst", "t_post_inst", "mean(user)"])
    found["stored"] = answers(stored)
    before = len(asked)
    found["read again"] = stored.read(PROMPTS, "all", ["t_inst", "t_post_inst", "mean(user)"]).values
    found["asked"] = [asked[:2], len(asked) - before]
    return found


def alone(folder):
    """Memory runs out on rank 1 alone, in the middle of a pass."""
    made, ranks.Team.patience = Local.__init__, timedelta(seconds=2)

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if RANK:
            self.hf.model.layers[1].register_forward_pre_hook(fail)

    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    Local.__init__ = init
    load(str(folder / "llama"), tensor_parallel=True, dtype="float32").read(PROMPTS)


if __name__ == "__main__":
    here, scenario = Path(sys.argv[1]), sys.argv[2]
    os.environ["LATENTGUARD_CACHE"] = str(here / f"cache{RANK}")
    torch.save({"everything": everything, "manners": manners, "alone": alone}[scenario](here), here / f"{scenario}{RANK}.pt")

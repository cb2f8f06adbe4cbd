"""Out of memory, interruptions and early ends: nothing is lost, nothing comes twice, and the model works on as before."""

import contextlib
import subprocess
from collections import Counter

import pytest
import torch

from latentguard.backends import Decoding
from latentguard.backends.memory import Budget, is_shortage, shortage
from latentguard.directions import mean_difference
from latentguard.errors import InputError
from latentguard.interventions import Cell, Grid, steering_grid
from latentguard.prompts import Prompt
from tests.conftest import loud, make_tiny

ERRORS = (
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError,
)
PROMPTS = [Prompt.of(f"tell me {'very ' * k}much about {k}", id=f"m{k}") for k in range(5)]


@pytest.fixture(scope="module")
def backend():
    made = make_tiny("llama", system="You are kind.")
    loud(made.hf)  # louder still: replies differ from prompt to prompt
    return made


@pytest.fixture(scope="module")
def grid(backend):
    v = mean_difference(backend.read(PROMPTS, "all", ["t_inst"]), PROMPTS[:3], position="t_inst")
    return Grid((Cell(), *steering_grid(v, [0, 2], [2.0]), *steering_grid(v, [2], [-1.0], when="every_step")))


@contextlib.contextmanager
def failing(backend, when, error=ERRORS[0], layer=1):
    """A block that raises `error` where when(rows, tokens) says so; the list of rows at which it did, never endless."""
    failed: list[int] = []

    def hook(_module, args):
        rows, tokens = args[0].shape[:2]
        if when(rows, tokens):
            failed.append(rows)
            if len(failed) > 60:
                raise AssertionError("goes on without end")
            raise error()

    handle = backend.blocks[layer]._module.register_forward_pre_hook(hook)
    backend.batch_size = "auto"
    try:
        yield failed
    finally:
        handle.remove()
        backend.batch_size = "auto"


def all_of(backend, cells):
    """What the four methods give, each with a budget of its own."""

    def fresh(do):
        backend.batch_size = "auto"
        return do()

    calls: Counter = Counter()

    def reduce(i, logprobs):
        calls[i] += 1
        return logprobs

    found = {
        "read": fresh(lambda: backend.read(PROMPTS, "all", ["t_inst", "mean(user)"]).values),
        "moments": fresh(lambda: backend.moments((p for p in PROMPTS), "all", ["t_inst"]).mean),
        "logits": torch.stack([torch.cat(row) for row in fresh(lambda: backend.logits(PROMPTS, cells, reduce=reduce))]),
    }
    assert calls == {i: len(cells) for i in range(len(PROMPTS))}, "reduce: once a pair"
    backend.batch_size, seen = "auto", Counter()
    said: dict = {}
    for c, i, reply in backend.stream(PROMPTS, cells, Decoding(4)):
        seen[c, i] += 1
        said[c, i] = reply.tokens
    assert seen == Counter({(c, i): 1 for c in range(len(cells)) for i in range(len(PROMPTS))}), "each pair once"
    return found, said


@pytest.fixture(scope="module")
def whole(backend, grid):
    found = all_of(backend, grid)
    assert len({token for said in found[1].values() for token in said}) > 8, "replies vary"
    return found


@pytest.mark.parametrize(("most", "error"), [(1, ERRORS[0]), (2, ERRORS[1]), (3, ERRORS[2])])
def test_what_does_not_fit_is_halved_and_nothing_changes(backend, grid, whole, most, error):
    with failing(backend, lambda rows, _tokens: rows > most, error) as failed:
        found, said = all_of(backend, grid)
    assert len(failed) >= 4, "each method met it"
    assert said == whole[1]
    for name, value in whole[0].items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("every", "layer"), [(2, 3), (3, 0), (7, 3)])
def test_a_shortage_now_and_then_changes_nothing(backend, grid, whole, every, layer):
    """Of batches only: a single row that fails is the end."""
    passes = Counter()

    def sometimes(rows, _tokens):
        passes["all"] += rows > 1
        return rows > 1 and passes["all"] % every == 0

    with failing(backend, sometimes, layer=layer) as failed:
        found, said = all_of(backend, grid)
    assert failed and said == whole[1]
    for name, value in whole[0].items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ask", ("logits", "generate"))
def test_one_cell_after_a_shared_prefix_is_halved_too(backend, whole, ask):
    """The prefix is a pass of one row; the batch that follows it is not."""
    with failing(backend, lambda rows, _tokens: rows > 2) as failed:
        if ask == "logits":
            torch.testing.assert_close(torch.cat(backend.logits(PROMPTS)), whole[0]["logits"][0], atol=1e-4, rtol=0)
        else:
            assert [r.tokens for r in backend.generate(PROMPTS, max_new_tokens=4)] == [whole[1][0, i] for i in range(len(PROMPTS))]
    assert failed and max(failed) > 2


@pytest.mark.parametrize("rows", (1, 4))
def test_a_row_that_fits_only_alone_is_not_kept_waiting_beside_others(backend, whole, rows):
    """Memory for one row and no second one beside it: no row is prefilled while another's keys lie there."""
    with failing(backend, lambda rows, tokens: rows > 1 or (tokens > 1 and backend.budget.held > 0)):
        backend._budget = Budget(rows)
        assert [r.tokens for r in backend.generate(PROMPTS, max_new_tokens=4)] == [whole[1][0, i] for i in range(len(PROMPTS))]


@pytest.mark.parametrize("ask", ("read", "moments", "logits", "generate"))
def test_a_single_row_that_does_not_fit_is_told_in_one_sentence(backend, ask):
    with failing(backend, lambda _rows, _tokens: True), pytest.raises(InputError, match="out of memory with one prompt"):
        getattr(backend, ask)(PROMPTS)
    assert len(backend.generate(PROMPTS[:2], max_new_tokens=2)) == 2


@pytest.mark.parametrize("error", (KeyboardInterrupt, lambda: RuntimeError("shapes differ"), lambda: ValueError("odd")))
@pytest.mark.parametrize("tokens", (1, 9))
def test_after_an_error_inside_a_pass_the_model_works_on(backend, grid, whole, error, tokens):
    """tokens 1: in a step, under the engine's own attention; 9: in a prefill."""
    with failing(backend, lambda _rows, length: (length == 1) == (tokens == 1), error) as failed, pytest.raises(type(error())):
        backend.generate(PROMPTS, grid, max_new_tokens=4)
    assert len(failed) == 1, "other errors are not tried again"
    assert backend.hf.config._attn_implementation == "sdpa"
    assert [r.tokens for r in backend.generate(PROMPTS, max_new_tokens=4)] == [whole[1][0, i] for i in range(len(PROMPTS))]
    torch.testing.assert_close(backend.read(PROMPTS, "all", ["t_inst", "mean(user)"]).values, whole[0]["read"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("after", (1, 9))
def test_a_stream_closed_early_leaves_the_model_as_it_was(backend, grid, whole, after):
    stream = backend.stream(PROMPTS, grid, Decoding(4))
    for _ in range(after):
        next(stream)
    stream.close()
    assert backend.hf.config._attn_implementation == "sdpa"
    assert [r.tokens for r in backend.generate(PROMPTS, max_new_tokens=4)] == [whole[1][0, i] for i in range(len(PROMPTS))]


def test_only_shortages_of_memory_are_kept_from_rising():
    for error in ERRORS:
        assert is_shortage(error())
        with shortage() as short:
            raise error()
        assert short
    for other in (RuntimeError("sizes must match"), ValueError("out of memory"), KeyboardInterrupt()):
        with pytest.raises(type(other)), shortage():
            raise other


def test_a_budget_halves_what_was_tried_until_one():
    budget = Budget(64, tried=40)
    halves = []
    for _ in range(5):
        budget.shrink()
        halves.append(budget.rows)
        budget.tried = budget.rows
    assert halves == [20, 10, 5, 2, 1]
    with pytest.raises(InputError, match="one prompt"):
        budget.shrink()


REAL = """
import logging, resource, psutil, torch
torch.set_num_threads(1)
from latentguard.backends.memory import Budget
from latentguard.prompts import Prompt
from tests.conftest import make_tiny

logging.basicConfig(level="WARNING", format="%(message)s")
backend = make_tiny("qwen2")
prompts = [Prompt.of("tell me " + "very " * 60 + f"much {k:04}", id=f"t{k}") for k in range(160)]

def ask(rows):
    backend._budget = Budget(rows)
    read = backend.read(prompts, "all", ["t_inst"]).values
    backend._budget = Budget(rows)
    return read, torch.cat(backend.logits(prompts)), [r.tokens for r in backend.generate(prompts, max_new_tokens=2)]

small = ask(8)
left = 48 * 2**20  # a pass of 8 rows takes some 3 MB; all 160 at once would take over 100
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + left,) * 2)
for name, a, b in zip(("read", "logits", "generate"), small, ask(4096)):
    print(name, a == b if name == "generate" else torch.allclose(a, b, atol=1e-4))
print("rows", backend.budget.rows)
"""


@pytest.mark.slow
def test_memory_that_really_runs_out_changes_nothing(python):
    """A process whose address space ends a little above what it takes already: torch's own allocator fails."""
    pytest.importorskip("resource")
    interpreter, env = python
    env = {**env, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([interpreter, "-c", REAL], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "read True\nlogits True\ngenerate True\n" in done.stdout, done.stdout
    assert "out of memory with 160 rows in a batch: going on with 80" in done.stderr
    assert int(done.stdout.split()[-1]) < 160

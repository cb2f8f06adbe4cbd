"""All rows of one model, one group after another, whatever of them can be run. Knows no command line."""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import latentguard
from latentguard.backends.loading import dtype_of
from latentguard.bench import curves, memory, peers, rows, shapes
from latentguard.bench.contest import Clock, Group, Say, Withdrawn, measure, results, said
from latentguard.bench.floors import load_plain
from latentguard.bench.rows import Bench
from latentguard.bench.work import COEFS, harm_direction, spread
from latentguard.directions import random_like
from latentguard.weights import locate, spec_of


@dataclass(frozen=True)
class Plan:
    """What is asked for: rows by name, how often, how much of each."""

    rows: Sequence[str]
    rounds: int
    dtype: str | None
    reads: int
    prompts: int
    tokens: int
    seed: int
    peers: Mapping[str, str]
    layers: int | None = None
    d_model: int | None = None


def bench_model(name: str, plan: Plan, found: dict[str, Any], say: Say, *, targets: bool) -> None:
    """A model by its config name, folder or Hub id; results go into `found` as they come."""
    spec = spec_of(name, dtype=plan.dtype or "float32")
    backend = latentguard.load(name, dtype=spec.dtype)
    plain = load_plain(spec, dtype=backend.hf.dtype, device=backend.device, pad=backend.pad, eos=backend.eos)
    auto = None
    found["rows"] = []
    if any(row.startswith("dtype") for row in plan.rows):
        auto = None if dtype_of("auto") == backend.hf.dtype or spec.tiny is not None else latentguard.load(name, dtype="auto")
        if auto is None:
            why = "tiny is always float32" if spec.tiny is not None else f"dtype=auto is {backend.hf.dtype} here too: no native bfloat16"
            found["rows"] += [{"row": row, "skipped": why} for row in plan.rows if row.startswith("dtype")]
    say(f"{name}: choosing prompts whose replies do not end early")
    work = rows.prepare(backend, plain, reads=plan.reads, prompts=plan.prompts, tokens=plan.tokens, coefs=COEFS, seed=plan.seed)
    bench = Bench(backend, plain, work, _clock(backend.device), auto)
    _describe(bench, plan, found)
    groups = [*rows.reading(bench), rows.generating(bench), rows.sweep(bench), rows.grids(bench), rows.second_run(bench)]
    with tempfile.TemporaryDirectory(prefix="latentguard-peers-") as scratch, contextlib.ExitStack() as ending:
        if plan.peers and spec.tiny is None:
            folder = peers.older(locate(spec), Path(scratch, "model"))
            entrants = [peers.Peer(peer, python, folder, Path(scratch), torch.get_num_threads()) for peer, python in plan.peers.items()]
            for peer in entrants:
                ending.callback(peer.close)
            found["peers"] = {peer.name: peer.versions for peer in entrants}
            peers.enter(groups, entrants, bench)
        _run(groups, plan, found, say, targets)
    if "memory" in plan.rows:
        say("memory: two processes that read the means of tiny's states")
        try:
            found["rows"].append(memory.measure_memory("tiny"))
        except Withdrawn as why:
            found["rows"].append({"row": "memory", "skipped": str(why)})


def bench_shapes(name: str, plan: Plan, found: dict[str, Any], say: Say) -> None:
    """Random weights of large shapes, beside plain transformers and what the hardware allows."""
    backend, plain = shapes.make(name, layers=plan.layers, d_model=plan.d_model, dtype=dtype_of(plan.dtype or "bfloat16"))
    clock = _clock(backend.device)
    work = rows.prepare(backend, plain, reads=plan.reads, prompts=plan.prompts, tokens=plan.tokens, coefs=COEFS, seed=plan.seed, more=1)
    bench = Bench(backend, plain, work, clock)
    _describe(bench, plan, found)
    rates = {"copy_bytes_per_s": shapes.copy_rate(clock, backend.device), "matrix_flop_per_s": shapes.matrix_rate(clock, backend.device, backend.hf.dtype)}
    found.update(rows=[], hardware=rates)
    found["about"] += f"; copies {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s, matrix products {rates['matrix_flop_per_s'] / 1e12:.2f} TFLOP/s"
    groups = [*rows.reading(bench), rows.generating(bench), rows.grids(bench)]
    shapes.bound(groups, shapes.bounds(bench, *rates.values()))
    _run(groups, plan, found, say, False, shapes.OURS)
    if backend.device.type == "cuda":
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()


def bench_curves(name: str, rounds: int, found: dict[str, Any], say: Say) -> None:
    """Cost against size of one model, rendered without a chat template so that lengths are what they are called."""
    backend = latentguard.load(name, dtype="float32", template="plain")
    points = curves.measure_curves(backend, random_like(harm_direction(backend, 4), 0), _clock(backend.device), rounds, say)
    found.update(
        model=backend.name,
        unit=_clock(backend.device).unit,
        points={curve: list(values.items()) for curve, values in points.items()},
        rows=curves.summary(points),
    )


def _clock(device: torch.device) -> Clock:
    return Clock("cpu" if device.type == "cpu" else "cuda")


def _describe(bench: Bench, plan: Plan, found: dict[str, Any]) -> None:
    backend, work = bench.backend, bench.work
    lengths = {"read": spread(backend.render(work.reading)), "answered": spread(backend.render(work.answering))}
    about = (
        f"{backend.name}, {backend.hf.dtype}: {len(work.reading)} prompts of {lengths['read']} tokens read, {len(work.answering)} of "
        f"{lengths['answered']} answered with {work.tokens} tokens; layer {work.layer} of {backend.n_layers}; {len(work.cells)} cells: "
        f"layers {', '.join(map(str, work.layers))} × coefficients {', '.join(map(str, work.coefs))}"
    )
    found.update(
        about=about, model=backend.name, weights=backend.weights, dtype=str(backend.hf.dtype), device=str(backend.device), unit=bench.clock.unit,
        lengths=lengths, seed=plan.seed, layer=work.layer, cells=work.cells, swept=work.swept, tokens=work.tokens, times={},
    )  # fmt: skip


def _run(groups: Sequence[Group], plan: Plan, found: dict[str, Any], say: Say, targets: bool, only: Mapping[str, str] | None = None) -> None:
    asked = [row for row in plan.rows if only is None or row in only]
    for group in (group.wanted(asked) for group in groups):
        if not group.lines:
            continue
        try:
            measure(group, plan.rounds, say)
        finally:  # an interruption keeps what was finished
            done = [row if targets or "skipped" in row else {**row, "target": None} for row in results(group)]
            found["rows"] += done
            found["times"][group.name] = group.times
            for row in done:
                say(f"  {row['row']}: {row['contestant']} " + (row.get("skipped") or f"{said(row)}; {row['check']}"))

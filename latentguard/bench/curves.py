"""Cost against size: prompts, cells, lengths; slopes on log axes. Knows our backend only, no floor."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latentguard.backends import Backend
from latentguard.bench.contest import Clock, Say
from latentguard.bench.work import harmless
from latentguard.directions import Direction
from latentguard.errors import InputError
from latentguard.interventions import steering_grid
from latentguard.prompts import Prompt

PROMPTS = (64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
CELLS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96)
LENGTHS = (16, 32, 64, 128, 256, 512)
TOKENS = 8


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Least-squares slope of log cost against log size: 1 is linear."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def local_slopes(sizes: Sequence[float], costs: Sequence[float]) -> list[float]:
    """The slope between each size and the next; a step at a batch edge stands out."""
    pairs = list(zip(sizes, costs, strict=True))
    return [math.log(after[1] / before[1]) / math.log(after[0] / before[0]) for before, after in zip(pairs, pairs[1:], strict=False)]


def largest_step(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """How far a cost lies above the line through the costs of its neighbours, as a share of it: 0.05 is 5%."""
    triples = zip(sizes, sizes[1:], sizes[2:], costs, costs[1:], costs[2:], strict=False)
    return max((b / (a + (c - a) * (y - x) / (z - x)) - 1 for x, y, z, a, b, c in triples), default=0.0)


def of_length(backend: Backend, tokens: int, count: int) -> list[Prompt]:
    """`count` different prompts of about `tokens` tokens, rendered: all of as many characters as give the first that length."""
    pool = harmless(count)
    texts = [(prompt.instruction + " ") * (1 + 8 * tokens // len(prompt.instruction)) for prompt in pool]

    def cut(i: int, characters: int) -> Prompt:
        return pool[i].with_instruction(texts[i][:characters].rstrip())

    low, high = 1, len(texts[0])
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(backend.render([cut(0, middle)])[0]) <= tokens else (low, middle - 1)
    if len(backend.render([cut(0, low)])[0]) > tokens:
        raise InputError(f"{backend.name}: its template alone is longer than {tokens} tokens; use template=plain")
    return [cut(i, low) for i in range(count)]


Points = dict[str, dict[float, list[float]]]


def measure_curves(backend: Backend, direction: Direction, clock: Clock, rounds: int, say: Say, only: Mapping[str, Sequence[int]] | None = None) -> Points:
    """Seconds of every size, round after round: {curve: {size: [seconds]}}.

    Reading is of all layers at t_inst; generating is of 16 prompts × `TOKENS` tokens at one layer.
    """
    sizes = only or {"prompts": PROMPTS, "cells": CELLS, "tokens a prompt": LENGTHS}
    pool = harmless(max(sizes.get("prompts", (1,))), more=1)
    layer, answered = max(1, backend.n_layers // 2), harmless(16, more=1)
    lengths = {n: of_length(backend, n, 64) for n in sizes.get("tokens a prompt", ())}
    true = {n: sum(map(len, backend.render(prompts))) / len(prompts) for n, prompts in lengths.items()}

    def job(curve: str, size: int) -> Callable[[], Any]:
        if curve == "prompts":
            return lambda: backend.read(pool[:size], "all", ["t_inst"])
        if curve == "cells":
            grid = steering_grid(direction, [layer], [2 * (i + 1) / size for i in range(size)])
            return lambda: backend.generate(answered, grid, max_new_tokens=TOKENS)
        return lambda: backend.read(lengths[size], "all", ["t_inst"])

    found: Points = {curve: {} for curve in sizes}
    for curve, values in sizes.items():
        job(curve, values[0])()
        for number in range(1, rounds + 1):
            for size in values:
                seconds, _ = clock.time(job(curve, size))
                found[curve].setdefault(true[size] if curve == "tokens a prompt" else size, []).append(seconds)
                say(f"curve of {curve}, round {number} of {rounds}: {size} {seconds:.3f} s")
    return found


def summary(points: Points) -> list[dict[str, Any]]:
    """One row a size: the least of its seconds (what disturbs a machine only adds) and the most, its curve's slope, the slope
    from the size before, the largest step.
    """
    rows = []
    for curve, seconds in points.items():
        sizes, costs = list(seconds), [min(values) for values in seconds.values()]
        fitted, steps = slope(sizes, costs), [None, *local_slopes(sizes, costs)]
        rows += [
            {
                "curve": curve, "size": size, "seconds": cost, "high": max(seconds[size]), "n": len(seconds[size]),
                "slope": fitted, "local_slope": step, "largest_step": largest_step(sizes, costs),
            }
            for size, cost, step in zip(sizes, costs, steps, strict=True)
        ]  # fmt: skip
    return rows

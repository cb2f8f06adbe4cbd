"""Contestants timed in turns, and the ratios that come of it. Knows no model, no prompt and no peer.

Round after round every contestant of a group runs once, each round beginning with another; each ratio is taken within one
round, so that a machine that slows down slows both sides of it.
"""

import contextlib
import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Say = Callable[[str], None]


class Withdrawn(Exception):
    """A contestant that cannot do its part, and why: the others go on without it."""


@dataclass(frozen=True)
class Clock:
    """Seconds of one call: CPU seconds of this process (all threads) and of children it waited for, or on a GPU wall
    seconds between two synchronisations.
    """

    device: str = "cpu"

    @property
    def unit(self) -> str:
        """What is counted."""
        return "CPU s" if self.device == "cpu" else "GPU s"

    def now(self) -> float:
        """A moment; only differences mean anything."""
        if self.device != "cpu":
            torch.cuda.synchronize()
            return time.perf_counter()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    def time(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds and what the call returned."""
        gc.collect()
        start = self.now()
        out = call()
        return self.now() - start, out


@dataclass(frozen=True)
class Contestant:
    """One way to do the work: `timed` does it and returns (seconds, output); `warm` does a little of it, untimed."""

    name: str
    timed: Callable[[], tuple[float, Any]]
    warm: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Check:
    """Whether an output is right; None where exactness is not asked (another dtype)."""

    ok: bool | None
    said: str


@dataclass(frozen=True)
class Line:
    """One line of the table: the seconds of `ours` over the floor's, `best` or `sum` of the floor's contestants."""

    row: str
    ours: str
    floor: tuple[str, ...]
    check: Callable[[Mapping[str, Any]], Check]
    how: Literal["best", "sum"] = "best"
    target: float | None = None
    over: str = ""

    @property
    def needs(self) -> set[str]:
        """The contestants it is made of."""
        return {self.ours, *self.floor}


@dataclass
class Group:
    """Contestants that run in turns, the lines made of them, and what was measured so far."""

    name: str
    contestants: list[Contestant]
    lines: list[Line]
    times: dict[str, list[float]] = field(default_factory=dict)
    checks: dict[int, list[Check]] = field(default_factory=dict)
    withdrawn: dict[str, str] = field(default_factory=dict)

    def wanted(self, rows: Sequence[str]) -> "Group":
        """The group with the lines of some rows, and the contestants that these need."""
        lines = [line for line in self.lines if line.row in rows]
        needed = set().union(*(line.needs for line in lines))
        return Group(self.name, [c for c in self.contestants if c.name in needed], lines)


def measure(group: Group, rounds: int, say: Say) -> None:
    """Fill the group's times and checks; an interruption leaves the rounds that were finished."""
    for contestant in group.contestants:
        with _may_withdraw(group, contestant):
            contestant.warm()
    for number in range(1, rounds + 1):
        taken: dict[str, float] = {}
        outputs: dict[str, Any] = {}
        turn = (number - 1) % max(1, len(group.contestants))  # nobody is always first
        for contestant in (*group.contestants[turn:], *group.contestants[:turn]):
            if contestant.name in group.withdrawn:
                continue
            with _may_withdraw(group, contestant):
                taken[contestant.name], outputs[contestant.name] = contestant.timed()
                say(f"{group.name}, round {number} of {rounds}: {contestant.name} {taken[contestant.name]:.2f} s")
        for name, seconds in taken.items():
            group.times.setdefault(name, []).append(seconds)
        for i, line in enumerate(group.lines):
            if line.needs <= outputs.keys():
                group.checks.setdefault(i, []).append(line.check(outputs))


@contextlib.contextmanager
def _may_withdraw(group: Group, contestant: Contestant) -> Iterator[None]:
    try:
        yield
    except Withdrawn as why:
        group.withdrawn[contestant.name] = str(why)


def results(group: Group) -> list[dict]:
    """One dict a line: the ratios of all rounds, their median and ends, the floor's seconds, the worst check."""
    found = []
    for i, line in enumerate(group.lines):
        if gone := line.needs & group.withdrawn.keys():
            found.append({"row": line.row, "contestant": line.ours, "skipped": group.withdrawn[min(gone)]})
        elif line.needs <= group.times.keys() and group.checks.get(i):
            fold = min if line.how == "best" else sum
            floors = [fold(seconds) for seconds in zip(*(group.times[name] for name in line.floor), strict=True)]
            ratios = [mine / floor for mine, floor in zip(group.times[line.ours], floors, strict=True)]
            checks = group.checks[i]
            worst = next((check for check in checks if check.ok is False), checks[-1])
            found.append({
                "row": line.row, "contestant": line.ours, "floor": " + ".join(line.floor) if line.how == "sum" else " | ".join(line.floor),
                "median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "rounds": len(ratios), "ratios": ratios,
                "floor_seconds": statistics.median(floors), "target": line.target, "ok": worst.ok, "check": worst.said, "over": line.over or line.floor[0],
            })  # fmt: skip
    return found


def said(row: Mapping[str, Any]) -> str:
    """The ratio as median (least–most), small ones to two digits."""
    median, least, most = (f"{row[key]:.3f}" if row[key] >= 0.1 else f"{row[key]:.2g}" for key in ("median", "min", "max"))
    return f"{median} ({least}–{most})"


def table(rows: Sequence[Mapping[str, Any]], unit: str) -> str:
    """Results as a Markdown table: median (min–max) of the ratios to the floor of the same round."""
    head = ["row", "contestant", "median (min–max) of n", "target", "1.0 is", unit, "output beside the floor's"]
    body = []
    for row in rows:
        if "skipped" in row:
            body.append([row["row"], row.get("contestant", ""), "–", "", "", "", row["skipped"]])
            continue
        spread = f"{said(row)} of {row['rounds']}"
        target = "" if row["target"] is None else f"≤ {row['target']:g}{'' if row['median'] <= row['target'] else ' missed'}"
        check = f"WRONG: {row['check']}" if row["ok"] is False else row["check"]
        seconds = "" if row["floor_seconds"] is None else f"{row['floor_seconds']:.2f}"
        body.append([row["row"], row["contestant"], spread, target, row["over"], seconds, check])
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines)

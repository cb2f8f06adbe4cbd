"""Fills the paper's four roles with prompts by what the model does with them (arXiv 2507.11878, App. B). Knows no study.

Poles (refused harmful, accepted harmless) come from the train split; the same two from the test split are held out;
misbehaving prompts (accepted harmful, refused harmless) come from every split, save prompts whose group lies in a pole.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

from latentguard.backends import Backend
from latentguard.behaviour import Cells, Judged, judge_stream
from latentguard.datasets import Dataset
from latentguard.errors import InputError
from latentguard.interventions import Cell, Grid
from latentguard.judges import Judge
from latentguard.metrics import base_rate_gate
from latentguard.positions import parse_position
from latentguard.prompts import Prompt, digest
from latentguard.settings import check_counts, check_seed
from latentguard.trackers import Tracker

log = logging.getLogger(__name__)
POLES = ("refused_harmful", "accepted_harmless")
MISBEHAVING = ("accepted_harmful", "refused_harmless")
BEHAVING = POLES
FOUR = (*POLES, *MISBEHAVING)


@dataclass(frozen=True)
class Filled:
    """The prompts of one role among `asked`; `withheld` says why a claim about behaviour may not rest on them."""

    role: str
    prompts: tuple[Prompt, ...]
    asked: int
    withheld: str

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Cast:
    """Who plays what: two poles and four held-out roles, with what fell short.

    `poles` is 'behaviour', or 'label' where the model refuses or accepts too little: then a pole is every prompt of its
    label. `labelled` are held-out prompts whatever the model does with them: harmful, harmless.
    """

    poles: str
    high: tuple[Prompt, ...]
    low: tuple[Prompt, ...]
    validation: dict[str, Filled]
    test: dict[str, Filled]
    labelled: dict[str, tuple[Prompt, ...]]
    withheld: str = ""
    found: dict[str, Filled] = field(default_factory=dict)
    judged: dict[str, Judged] = field(default_factory=dict, repr=False)

    def everyone(self) -> list[Prompt]:
        """Each prompt once."""
        parts = [self.high, self.low, *(f.prompts for f in (*self.validation.values(), *self.test.values())), *self.labelled.values()]
        return list({prompt.id: prompt for part in parts for prompt in part}.values())

    @property
    def caveat(self) -> str:
        """What a figure's title must add where the poles are by label."""
        return " · poles by label" if self.poles == "label" else ""

    def apart(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """Those whose group lies in no pole: a jailbreak that wraps a pole's own request is not held out."""
        taken = {p.group for p in (*self.high, *self.low)}
        return [p for p in prompts if p.group not in taken]

    def short(self, *roles: str) -> str:
        """'' where the poles and these roles carry a claim about behaviour, else 'insufficient_base_rate'."""
        return self.withheld or next((self.test[role].withheld for role in roles if self.test[role].withheld), "")

    def counts(self) -> dict[str, Any]:
        """N and asked of every role, for summaries."""
        filled = {f"test_{role}": {"n": len(f), "asked": f.asked, "withheld": f.withheld} for role, f in self.test.items()}
        found = {f"train_{role}": {"n": len(f), "asked": f.asked, "withheld": f.withheld} for role, f in self.found.items()}
        return {"poles": self.poles, "pole_harmful": len(self.high), "pole_harmless": len(self.low), **found, **filled}

    def cells(self) -> Cells:
        """Every judged reply, for the refusal tokens."""
        return Cells(tuple(self.judged.values()))


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Casting:
    """How many to look for. A study holds one; equal ones share what was computed.

    Attributes:
        n_poles: prompts a pole, at most.
        n_test: prompts a held-out role, at most.
        n_validation: prompts a pole on the validation split, at most.
        patience: prompts asked for each one wanted, at most.
    """

    n_poles: int = 100
    n_test: int = 100
    n_validation: int = 30
    patience: float = 4.0
    max_new_tokens: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "n_poles", "n_test", "n_validation", "patience", "max_new_tokens")
        check_seed(self.seed)

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker, *, only_poles: bool = False) -> Cast:
        """Ask the model, unsteered, until the roles are full or their prompts are used up."""
        ask = _Asking(self, backend, judge, tracker)
        poles = {role: ask.fill(role, data.role(role, "train"), self.n_poles) for role in POLES}
        withheld = next((f.withheld for f in poles.values() if f.withheld), "")
        if withheld:
            high, low = (tuple(dealt(data.role(role, "train"), self.seed)[: self.n_poles]) for role in POLES)
        else:
            high, low = (poles[role].prompts for role in POLES)
        if only_poles:
            log.info("poles by %s: %d + %d", "label" if withheld else "behaviour", len(high), len(low))
            return Cast("label" if withheld else "behaviour", high, low, {}, {}, {}, withheld, poles, ask.known)
        taken = {p.group for p in (*high, *low)}
        free = {role: [p for p in data.role(role) if p.group not in taken] for role in MISBEHAVING}
        test = {role: ask.fill(role, data.role(role, "test"), self.n_test) for role in POLES}
        test |= {role: ask.fill(role, free[role], self.n_test) for role in MISBEHAVING}
        validation = {role: ask.fill(role, data.role(role, "validation"), self.n_validation) for role in POLES}
        sides = {"harmful": "refused_harmful", "harmless": "accepted_harmless"}
        labelled = {side: tuple(dealt(data.role(role, "test"), self.seed)[: self.n_test]) for side, role in sides.items()}
        cast = Cast("label" if withheld else "behaviour", high, low, validation, test, labelled, withheld, poles, ask.known)
        log.info("poles by %s: %d + %d; held out: %s", cast.poles, len(high), len(low), ", ".join(f"{len(f)} {r}" for r, f in test.items()))
        return cast

    def find(self, role: str, pool: Sequence[Prompt], n: int, backend: Backend, judge: Judge, tracker: Tracker) -> Filled:
        """Another role, named verdict_anything: up to n prompts of a pool that the model refuses, or accepts."""
        return _Asking(self, backend, judge, tracker).fill(role, pool, n)

    def check(self, data: Dataset) -> None:
        """Refuse data that have no prompt for a role.

        Raises:
            InputError: naming the role and the split.
        """
        for role in FOUR:
            for split in ("train", "test") if role in POLES else ("test",):
                if not data.role(role, split):
                    raise InputError(
                        f"data {data.name} has no prompt in its {split} split for the role {role}: name sets with data.roles.{role}=[…], or see data.split"
                    )


def held_out(cast: Cast) -> dict[str, tuple[Prompt, ...]]:
    """The four roles' held-out prompts; where one is short, also those by label."""
    groups = {role: cast.test[role].prompts for role in FOUR}
    return groups | (cast.labelled if cast.short(*FOUR) else {})


def shortfall(cast: Cast) -> str:
    """Which roles are short, with their numbers."""
    found = [f"{len(f)} {role.replace('_', ' ')} of {f.asked} asked" for role, f in cast.test.items() if f.withheld]
    return ", ".join((["poles by label"] if cast.withheld else []) + found)


def find_places(backend: Backend, data: "Dataset | Iterable[Prompt]", positions: Sequence[str], *roles: str) -> None:
    """Refuse a position that some prompt of the data, of the four roles or of `roles` does not have, before anything is generated.

    Raises:
        InputError: naming the prompt and the position.
    """
    places = [parse_position(position) for position in positions]
    named = [p for role in (*FOUR, *roles) for p in data.role(role)] if isinstance(data, Dataset) else []
    for rendered in backend.render(list({p.id: p for p in (*data, *named)}.values())):
        for place in places:
            place.tokens(rendered)


class _Asking:
    """Asks each prompt once, and remembers."""

    def __init__(self, settings: Casting, backend: Backend, judge: Judge, tracker: Tracker) -> None:
        self.set, self.backend, self.judge, self.tracker = settings, backend, judge, tracker
        self.known: dict[str, Judged] = {}

    def fill(self, role: str, pool: Sequence[Prompt], n: int) -> Filled:
        """Up to n prompts of the pool that the model treats as the role says."""
        verdict = role.split("_")[0]
        pool = dealt(pool, self.set.seed)[: int(n * self.set.patience)]
        found: list[Prompt] = []
        asked = 0
        while asked < len(pool) and len(found) < n:
            block = pool[asked : asked + max(16, n - len(found))]
            found += [p for p in block if self._judged(block)[p.id].verdict.label == verdict]
            asked += len(block)
        return Filled(role, tuple(found[:n]), asked, base_rate_gate(len(found), asked))

    def _judged(self, prompts: Sequence[Prompt]) -> dict[str, Judged]:
        new = [p for p in prompts if p.id not in self.known]
        if new:
            grid = Grid((Cell(tags={"intervention": "none"}),))
            for judged in said(self.backend, new, grid, self.judge, self.tracker, self.set.max_new_tokens, stage="roles")[0]:
                self.known[judged.prompt.id] = judged
        return self.known


def said(
    backend: Backend, prompts: Sequence[Prompt], grid: Grid, judge: Judge, tracker: Tracker, max_new_tokens: int, **tags: object
) -> list[list[Judged]]:  # fmt: skip
    """Every cell's judged replies in the order of `prompts`; each row goes to the tracker as it comes."""
    found: list[dict[int, Judged]] = [{} for _ in grid]
    for c, i, judged in judge_stream(backend, prompts, grid, judge, max_new_tokens):
        found[c][i] = judged
        verdict = judged.verdict
        reply = {"reply": judged.reply.text, "verdict": verdict.label, "rule": verdict.rule, "score": verdict.score, "finish": judged.reply.finish}
        tracker.rows([{**about(judged.prompt), **tags, **grid.cells[c].tags, **reply, "judge": judge.name}])
    return [[replies[i] for i in range(len(prompts))] for replies in found]


def about(prompt: Prompt) -> dict[str, Any]:
    """What a row says of its prompt."""
    return {"prompt_id": prompt.id, "prompt": prompt.instruction, **without_text(prompt)}


def without_text(prompt: Prompt) -> dict[str, Any]:
    """The same but for its words: for scores and the tables of figures."""
    known = {"prompt_id": prompt.id, "label": prompt.label, "category": prompt.category}
    return {**known, "source": prompt.source, "terminal": prompt.terminal, **({"language": prompt.language} if prompt.language else {})}


def dealt(prompts: Iterable[Prompt], seed: int) -> list[Prompt]:
    """The prompts in an order that has nothing to do with a file's: by hash, sources in turn, so that any head of the
    list holds equal parts of each source while they last.
    """
    by_source: dict[str, list[Prompt]] = {}
    for prompt in sorted(prompts, key=lambda p: digest([seed, p.id])):
        by_source.setdefault(prompt.source, []).append(prompt)
    ranked = [(rank, source, p) for source, part in by_source.items() for rank, p in enumerate(part)]
    return [p for *_, p in sorted(ranked, key=lambda item: item[:2])]


def without_suffix(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The same prompts, rendered to end with the instruction (paper §3.1)."""
    return [replace(p, suffix=False) for p in prompts]

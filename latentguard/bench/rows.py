"""The rows of the table: this package beside the floors, on one model. Knows the backend's public methods and no study."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentguard.backends import Backend, Reply
from latentguard.backends.local import Local
from latentguard.behaviour import judge_stream, staged
from latentguard.bench import floors
from latentguard.bench.checks import Gap, Tokens, best_gap, compare_labels, compare_scores, compare_some, compare_states, compare_tokens
from latentguard.bench.contest import Check, Clock, Contestant, Group, Line
from latentguard.bench.floors import Plain
from latentguard.bench.work import Work, grid_layers, harm_direction, harmless, middle
from latentguard.errors import InputError
from latentguard.interventions import Add, Cell, Grid
from latentguard.judges import Phrases
from latentguard.prompts import Prompt
from latentguard.store import Stored

JUDGE = Phrases()
Outputs = Mapping[str, Any]
OVER = {"read_one": "plain, cut, its best batch", "read_all": "plain, no head, its best batch"}
SIZES = tuple(f"plain, batch {size}" for size in floors.SIZES)


@dataclass(frozen=True)
class Bench:
    """One model on both sides: our backend, plain transformers, the work, the clock; `auto` is our backend in another dtype."""

    backend: Local
    plain: Plain
    work: Work
    clock: Clock
    auto: Local | None = None

    @property
    def exact(self) -> bool:
        """Whether outputs must be equal: in float32."""
        return self.backend.hf.dtype == torch.float32

    @property
    def auto_name(self) -> str:
        """What the backend of another dtype is called in the table."""
        return f"latentguard, {str(self.auto.hf.dtype).removeprefix('torch.')}" if self.auto else ""

    def here(self, name: str, run: Callable[[], Any], warm: Callable[[], Any] = lambda: None) -> Contestant:
        """A contestant of this process: `run` timed, `warm` once before."""
        return Contestant(name, lambda: self.clock.time(run), warm)


def ids_of(backend: Backend, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """Token ids of prompts."""
    return [item.ids for item in backend.render(prompts)]


def prepare(backend: Local, plain: Plain, *, reads: int, prompts: int, tokens: int, coefs: Sequence[float], seed: int, more: int = 4) -> Work:
    """The work for one model: among the prompts answered none ends within `tokens` tokens, steered or not (`generate`)."""
    direction, layer = harm_direction(backend), middle(backend.n_layers)
    answering: list[Prompt] = []
    for at in range(8):
        pool = harmless(prompts, seed + 1 + at, more)
        ids = ids_of(backend, pool)
        bare = floors.generate(plain, ids, tokens)
        with floors.steered(plain, layer, direction.at(layer), every_step=True):
            acted = floors.generate(plain, ids, tokens)
        answering += [p for p, a, b in zip(pool, bare, acted, strict=True) if len(a) == len(b) == tokens]
        if len(answering) >= prompts:
            return Work(harmless(reads, seed, more), answering[:prompts], direction, layer, grid_layers(backend.n_layers), coefs, tokens)
    raise InputError(f"{backend.name} ends nearly every reply within {tokens} tokens, so `generate` cannot be compared: set --tokens lower")


def reading(bench: Bench) -> list[Group]:
    """`read_one` and `read_all`: states at the last token of the prompt, which is t_post_inst."""
    backend, plain, work, auto = bench.backend, bench.plain, bench.work, bench.auto
    ids, few, groups = ids_of(backend, work.reading), work.reading[:4], []

    def cut(ids: Tokens, size: int) -> Tensor:
        return floors.read_cut(plain, ids, work.layer, size)

    def trunk(ids: Tokens, size: int) -> Tensor:
        return floors.read_trunk(plain, ids, size)

    def ours(prompts: Sequence[Prompt], layers: Any, model: Local = backend) -> Tensor:
        return model.read(prompts, layers, ["t_post_inst"]).values[:, :, 0].squeeze(1)

    for row, layers, read in (("read_one", work.layer, cut), ("read_all", "all", trunk)):
        contestants = [
            bench.here(name, lambda read=read, size=size: read(ids, size), lambda read=read, size=size: read(ids[:4], size))
            for name, size in zip(SIZES, floors.SIZES, strict=True)
        ]
        contestants.append(bench.here("latentguard", lambda layers=layers: ours(work.reading, layers), lambda layers=layers: ours(few, layers)))
        lines = [Line(row, "latentguard", SIZES, same_states(SIZES[0], "latentguard", bench.exact), target=1.05, over=OVER[row])]
        if auto is not None and row == "read_all":
            contestants.append(bench.here(bench.auto_name, lambda: ours(work.reading, "all", auto), lambda: ours(few, "all", auto)))
            lines.append(Line("dtype_read", bench.auto_name, ("latentguard",), same_states("latentguard", bench.auto_name, False), over="latentguard, float32"))
        groups.append(Group(row, contestants, lines))
    return groups


def same_states(floor: str, ours: str, exact: bool, layers: slice | None = None) -> Callable[[Outputs], Check]:
    """A check of states; `layers` are those of the floor's that `ours` has."""
    return lambda outputs: compare_states(outputs[floor] if layers is None else outputs[floor][:, layers], outputs[ours], exact)


def generating(bench: Bench) -> Group:
    """`generate`: steered at one layer at every step. No reply ends early (`prepare`), so all sides make the same tokens."""
    backend, plain, work, n = bench.backend, bench.plain, bench.work, bench.work.tokens
    ids, few, vector = ids_of(backend, work.answering), work.answering[:4], work.direction.at(work.layer)
    acts = [Add(work.direction, layer=work.layer, when="every_step")]

    def hooked(ids: Tokens, tokens: int) -> list[Tokens]:
        with floors.steered(plain, work.layer, vector, every_step=True):
            return [floors.generate(plain, ids, tokens, full=True)]

    return Group(
        "generate",
        [
            bench.here("plain generate", lambda: floors.generate(plain, ids, n, full=True), lambda: floors.generate(plain, ids[:4], 4)),
            bench.here("torch hook", lambda: hooked(ids, n), lambda: hooked(ids[:4], 4)),
            bench.here(
                "latentguard", lambda: [backend.generate(work.answering, acts, max_new_tokens=n)], lambda: backend.generate(few, acts, max_new_tokens=4)
            ),
        ],
        [
            Line("generate", "torch hook", ("plain generate",), lambda outputs: Check(None, "steered, so not the plain tokens")),
            Line("generate", "latentguard", ("plain generate",), same_tokens(bench, "torch hook", "latentguard", [(work.layer, vector)], True), target=1.03),
        ],
    )


def same_tokens(bench: Bench, floor: str, ours: str, cells: Sequence[tuple[int, Tensor]], every_step: bool) -> Callable[[Outputs], Check]:
    """A check of replies [cell][row], ties of two best tokens looked up with the plain model."""
    gap, eos = _gap(bench, cells, every_step), bench.plain.eos
    return lambda outputs: compare_tokens(outputs[floor], [tokens_of(row, eos) for row in outputs[ours]], bench.exact, gap)


def _gap(bench: Bench, cells: Sequence[tuple[int, Tensor]], every_step: bool) -> Gap:
    ids = ids_of(bench.backend, bench.work.answering)
    return lambda cell, row, said: best_gap(floors.next_logprobs(bench.plain, ids[row], *cells[cell], said, every_step=every_step))


def tokens_of(replies: Sequence[Reply | Sequence[int]], eos: frozenset[int] = frozenset()) -> list[tuple[int, ...]]:
    """Token ids of replies, up to the one that ends them."""
    found = [reply.tokens if isinstance(reply, Reply) else tuple(reply) for reply in replies]
    return [reply[: next((at for at, token in enumerate(reply) if token in eos), len(reply))] for reply in found]


def grids(bench: Bench) -> Group:
    """The rows about a grid of steering cells, all over one floor: cell by cell with a hook and `hf.generate`."""
    backend, plain, work, auto = bench.backend, bench.plain, bench.work, bench.auto
    prompts, n, grid = work.answering, work.tokens, work.grid
    ids, cells = ids_of(backend, prompts), [(layer, coef * work.direction.at(layer)) for layer, coef in work.cells]
    small, few = Grid(grid.cells[:2]), prompts[:4]
    replies: list = []
    openings = {backend.first_token(text) for text in ("I'm sorry", "I cannot", "Sorry", "I apologize")}
    refusal = sorted({backend.first_token(word) for word in ("I", "Sorry", "Unfortunately")})

    def by_cell() -> list:
        replies[:] = floors.grid(plain, ids, cells, n)
        return replies

    def judge_all() -> list[list[str]]:
        return [[JUDGE.verdict(backend.tokenizer.decode(reply, skip_special_tokens=True)).label for reply in row] for row in replies]

    def rates(prompts: Sequence[Prompt], grid: Grid, n: int) -> list[list[str]]:
        labels = [[""] * len(prompts) for _ in grid]
        for cell, row, judged in judge_stream(backend, prompts, grid, JUDGE, n):
            labels[cell][row] = judged.verdict.label
        return labels

    def in_stages(prompts: Sequence[Prompt], grid: Grid, n: int) -> dict[int, list[str]]:
        screened, told = staged(backend, prompts, grid, JUDGE, openings, n, least=0.0, most=max(1, len(grid) // 6))
        labels = {cell: [""] * len(prompts) for cell in screened.worth}
        for cell, row, judged in told:
            labels[cell][row] = judged.verdict.label
        return labels

    def score(prompts: Sequence[Prompt], grid: Grid) -> list:
        return backend.logits(prompts, grid, reduce=lambda _row, logprobs: (int(logprobs[-1].argmax()), logprobs[-1, refusal].tolist()))

    def scored(outputs: Outputs) -> Check:
        sample = [(c, c % len(ids)) for c in range(0, len(cells), max(1, len(cells) // 4))]
        known = {(c, r): floors.next_logprobs(plain, ids[r], *cells[c])[refusal].tolist() for c, r in sample}
        return compare_scores(outputs["latentguard, scores"], outputs["cell by cell"], known, bench.exact, plain.eos, _gap(bench, cells, False))

    contestants = [
        bench.here("cell by cell", by_cell, lambda: floors.grid(plain, ids[:4], cells[:1], 4)),
        bench.here("its judge", judge_all),
        bench.here("latentguard, full", lambda: backend.generate(prompts, grid, max_new_tokens=n), lambda: backend.generate(few, small, max_new_tokens=4)),
        bench.here("latentguard, rates", lambda: rates(prompts, grid, n), lambda: rates(few, small, 4)),
        bench.here("latentguard, staged", lambda: in_stages(prompts, grid, n), lambda: in_stages(few, small, 4)),
        bench.here("latentguard, scores", lambda: score(prompts, grid), lambda: score(few, small)),
    ]
    floor, judged = ("cell by cell",), ("cell by cell", "its judge")
    same_rates: Callable[[Outputs], Check] = lambda outputs: compare_labels(outputs["its judge"], outputs["latentguard, rates"], bench.exact)  # noqa: E731
    same_cells: Callable[[Outputs], Check] = lambda outputs: compare_some(outputs["its judge"], outputs["latentguard, staged"], bench.exact)  # noqa: E731
    lines = [
        Line("grid_full", "latentguard, full", floor, same_tokens(bench, "cell by cell", "latentguard, full", cells, False), target=0.5),
        Line("grid_rates", "latentguard, rates", judged, same_rates, "sum", 0.45, "cell by cell, judged"),
        Line("grid_staged", "latentguard, staged", judged, same_cells, "sum", 0.30, "cell by cell, judged"),
        Line("grid_logits", "latentguard, scores", floor, scored, target=0.22),
    ]
    if auto is not None:
        name = bench.auto_name
        contestants.append(bench.here(name, lambda: auto.generate(prompts, grid, max_new_tokens=n), lambda: auto.generate(few, small, max_new_tokens=4)))
        lines.append(
            Line("dtype_grid", name, ("latentguard, full",), lambda outputs: _beside(outputs["latentguard, full"], outputs[name]), over="latentguard, float32")
        )
    return Group("grid", contestants, lines)


def _beside(floor: Sequence, ours: Sequence) -> Check:
    return compare_tokens([tokens_of(row) for row in floor], [tokens_of(row) for row in ours], False)


def sweep(bench: Bench) -> Group:
    """`sweep`: four cells steered at every step, which peers can do too; the floor is a hook and `hf.generate`, cell by cell."""
    backend, plain, work, n = bench.backend, bench.plain, bench.work, bench.work.tokens
    ids, few = ids_of(backend, work.answering), work.answering[:4]
    cells = [(layer, coef * work.direction.at(layer)) for layer, coef in work.swept]
    grid = Grid(tuple(Cell((Add(work.direction, layer=layer, coef=coef, when="every_step"),)) for layer, coef in work.swept))

    def hooked(ids: Tokens, tokens: int) -> Sequence[Tokens]:
        return floors.grid(plain, ids, cells, tokens, every_step=True)

    return Group(
        "sweep",
        [
            bench.here("cell by cell", lambda: hooked(ids, n), lambda: hooked(ids[:4], 4)),
            bench.here("latentguard", lambda: backend.generate(work.answering, grid, max_new_tokens=n), lambda: backend.generate(few, grid, max_new_tokens=4)),
        ],
        [Line("sweep", "latentguard", ("cell by cell",), same_tokens(bench, "cell by cell", "latentguard", cells, True))],
    )


def second_run(bench: Bench) -> Group:
    """`second_run`: the grid's rates from a store that has them already, over the run that filled it."""
    folders: list[tempfile.TemporaryDirectory] = []
    work = bench.work

    def run() -> list[tuple[int, int, str]]:
        stored = Stored(bench.backend, folders[0].name)
        return sorted((cell, row, judged.reply.text) for cell, row, judged in judge_stream(stored, work.answering, work.grid, JUDGE, work.tokens))

    def first() -> list:
        folders[:] = [tempfile.TemporaryDirectory(prefix="latentguard-bench-")]
        return run()

    def check(outputs: Outputs) -> Check:
        same, files = outputs["first"] == outputs["second"], sum(path.is_file() for path in Path(folders[0].name).rglob("*"))
        return Check(same, f"{'the same' if same else 'other'} replies, {files} files on disk")

    return Group(
        "second_run",
        [bench.here("first", first), bench.here("second", run)],
        [Line("second_run", "second", ("first",), check, target=0.05, over="the run that filled the store")],
    )

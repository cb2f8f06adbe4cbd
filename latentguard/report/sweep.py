"""A sweep → one page: every model and study with its number, over seeds where there are several. Knows no experiment."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from latentguard.pages import Block, Command, Page, Section, Sheet
from latentguard.plots.comparing import forest
from latentguard.report import paper
from latentguard.report.comparison import beside, links, listed, settings, side_by_side
from latentguard.report.page import against
from latentguard.report.pictures import drawn
from latentguard.report.replies import replies
from latentguard.report.runs import Run, quiet, waiting, words
from latentguard.report.wording import found, interval, number


def sweep_page(folder: Path, runs: Sequence[Run], at: Path, *, full: bool = True) -> Page:
    """The page of a sweep's jobs; its own figures go to `at`/figures."""
    runs = runs if full else [quiet(run) for run in runs]
    names, missing = words(runs), waiting(folder)
    done = [run for run in runs if run.finished and run.state != "failed"]
    told = [*(f"{name}: {run.claim}" for run, name in zip(runs, names, strict=True) if run not in done), *(f"{job}: never begun" for job in missing)]
    rows = headlines(runs)
    sections = [Section("The command", blocks=[Command(command(folder, runs))])]
    blocks: list[Block] = []
    if rows:
        caption = "The number that each run's claim rests on, with its 95% interval; a panel a study and what it counts, a colour a seed."
        seeds = len({row["seed"] for row in rows}) > 1
        plot = forest(rows, title="Headline numbers", caption=caption, what="value", name="run", series="seed" if seeds else None, panel="metric")
        blocks.append(drawn(at, "headlines", plot, rows))
        blocks.append(_over_seeds(rows) if seeds else "One seed: nothing is told of how much seeds differ.")
    sections.append(Section("What was found", blocks=[*blocks, listed(runs, names, "Every job", "its own page", _address)]))
    for study in dict.fromkeys(run.study for run in runs):
        held = [run for run in runs if run.study == study and run.finished]
        if not held:
            continue
        called = words(held)
        parts = [*beside(held, called, at, full=full), *(side_by_side(held, called) if len(held) > 1 else [])]
        chips = [f"{len(held)} of {sum(run.study == study for run in runs)} jobs done"]
        sections.append(Section(study, paper.PAPER.get(study, ("",))[0], "", chips, "", parts or ["One run: look at its own page."]))
    rows_of = ({**row, "run": name} for run, name in zip(runs, names, strict=True) for row in run.rows())
    if said := replies(rows_of, full=full, series=True, first=names[0]):
        sections.append(Section("Replies", blocks=[said]))
    troubles: list[Block] = [Sheet("Jobs that are not done", ["what"], [[line] for line in told])] if told else []
    for run, name in zip(runs, names, strict=True):
        for block in against(run).blocks if run.finished else ():
            troubles.append(Sheet(f"{name}: {block.title}", block.columns, block.rows) if isinstance(block, Sheet) else block)
    sections.append(Section("Controls, and what did not work", lead="" if troubles else "Nothing failed, and no claim was withheld.", blocks=troubles))
    sections.append(Section("What differs in how they were made", blocks=[settings(runs, names)]))
    models, studies = (len({getattr(run, key) for run in runs}) for key in ("model", "study"))
    states = {
        words_: sum(run.state == state for run in runs) for state, words_ in (("failed", "failed"), ("insufficient_base_rate", "with the claim withheld"))
    }
    odd = "".join(f", {count} {words_}" for words_, count in states.items() if count)
    lead = f"{len(done)} of {len(runs) + len(missing)} jobs are done{odd}: {models} model{'s' * (models > 1)}, {studies} stud{'ies' if studies > 1 else 'y'}."
    best = _ranges(rows)
    return Page(
        f"Sweep {folder.resolve().name}", f"{lead} {best}{'.' if best else ''}", ["Intervals are 95%."], sections, paper.MARKS, links(runs, at, _address)
    )


def _address(run: Run) -> str:
    return f"{run.folder.name}/report.html"


def headlines(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a run and study with a headline: run (its name among those of its study, without the seed), model, study, seed, metric,
    value, low, high, n.
    """
    rows = []
    for study in dict.fromkeys(run.study for run in runs):
        some = [run for run in runs if run.study == study]
        for run, name in zip(some, words(some), strict=True):
            for part, told in (run.summary.get("headlines") or {run.study: run.headline}).items():
                if told and isinstance(told.get("value"), int | float):
                    numbers = {key: told.get(key) for key in ("value", "low", "high", "n")}
                    bare = " · ".join(word for word in name.split(" · ") if word != f"seed {run.seed}")
                    metric = f"{part.replace('_', ' ')}: {told.get('metric', 'number')}"
                    bare = f"{bare} (claim withheld)" if told.get("withheld") else bare
                    rows.append({"run": bare, "model": run.model, "study": part, "seed": str(run.seed), "metric": metric, **numbers})
    return rows


def _ranges(rows: Sequence[dict[str, Any]]) -> str:
    """Each metric from its least run to its greatest."""
    told = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        some = sorted((row for row in rows if row["metric"] == metric and math.isfinite(row["value"])), key=lambda row: row["value"])
        if some:
            ends = [found(some[0])] if len(some) == 1 else [f"from {found(some[0])} ({_of(some[0])})", f"to {found(some[-1])} ({_of(some[-1])})"]
            told.append(f"{metric} {' '.join(ends)}")
    return "; ".join(told)


def _of(row: dict[str, Any]) -> str:
    return f"{row['run']}, seed {row['seed']}"


def command(folder: Path, runs: Sequence[Run]) -> str:
    """The words of the sweep, as far as the jobs tell: what they share, and their folder to go on with."""
    shared = [word for word in runs[0].overrides if all(word in run.overrides for run in runs)]
    axes: dict[str, list[str]] = {}
    for run in runs:
        for word in run.overrides:
            key, _, value = word.partition("=")
            if word not in shared and value not in axes.setdefault(key, []):
                axes[key].append(value)
    asked = shlex.join([*(f"{key}={','.join(values)}" for key, values in axes.items()), *shared])
    return f"python -m latentguard.run -m {asked}\n# to go on with what is not done:\npython -m latentguard.run {shlex.quote(f'resume={folder}')}"


def _over_seeds(rows: Sequence[dict[str, Any]]) -> Sheet:
    """The mean and the range over seeds."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["run"], row["metric"]), []).append(row)
    cells = []
    for (run, metric), some in groups.items():
        values = [row["value"] for row in some if math.isfinite(row["value"])]
        spread = interval(mean(values), min(values), max(values)) if values else "—"
        cells.append([run, metric, spread, str(len(values)), ", ".join(f"{row['seed']}: {number(row['value'])}" for row in some)])
    return Sheet("Over seeds: the mean, and in brackets the least and the most", ["run", "metric", "mean [least, most]", "seeds", "each"], cells)

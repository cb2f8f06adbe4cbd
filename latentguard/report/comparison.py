"""Two runs or more side by side: the same prompts under the same conditions, their differences with intervals. Knows no study.

A pair is one prompt that two runs answered under the same condition. Layer, coefficient and draw do not tell conditions apart,
for each model has its own: where a run holds several, a prompt's answers are averaged first.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from latentguard.errors import InputError
from latentguard.metrics import Value, mean, paired_difference, wilson
from latentguard.pages import Block, Page, Picture, Section, Sheet
from latentguard.plots.comparing import forest, overlaid, shared
from latentguard.report import paper
from latentguard.report.pictures import drawn, kept
from latentguard.report.runs import Run, quiet, words
from latentguard.report.wording import found, interval, measures, number

_KEYS = (
    "stage", "intervention", "label", "set", "group", "form", "detector", "position", "terminal", "trained_on", "n_trained", "tokens", "target",
    "direction", "kind", "template", "extracted",
)  # fmt: skip
# What is compared, and what it is called; a raw score only where both are the same model's.
_MEASURES = {"verdict": "refused", "no": "P(No)", "certainly": "P(Certainly)", "harmful": "Δ_harmful", "refuse": "Δ_refuse", "score": "score"}
_OWN = ("score",)
Paired = dict[tuple[str, ...], dict[str, list[float]]]
_LEAST = 10  # pairs that a difference is told of: under that a bootstrap interval holds the truth far less often than it says


def differences(first: Run, second: Run) -> list[dict[str, Any]]:
    """Second − first on the prompts that both have, condition by condition: study, condition, measure, first, second, value, low, high, n."""
    mine, theirs = list(first.rows()), list(second.rows())
    telling = _telling(mine, first) | _telling(theirs, second)
    same_model = first.model == second.model
    one, other = (_by_condition(rows, run, telling, same_model) for rows, run in ((mine, first), (theirs, second)))
    rows = []
    for key, answers in one.items():
        both = sorted(answers.keys() & other.get(key, {}).keys())
        if len(both) < _LEAST:
            continue
        a, b = ([sum(held[p]) / len(held[p]) for p in both] for held in (answers, other[key]))
        study, condition, measure = key
        told = _difference(b, a).as_dict()
        rows.append({"study": study, "condition": condition, "measure": measure, "first": sum(a) / len(a), "second": sum(b) / len(b), **told})
    return rows


def _place(row: Mapping[str, Any], run: Run) -> tuple[str, str]:
    """Study and stage; the roles are filled alike in every study of a series, and count once."""
    stage = str(row.get("stage", ""))
    return ("roles" if stage == "roles" else str(row.get("study") or run.study), stage)


def _telling(rows: Sequence[Mapping[str, Any]], run: Run) -> set[tuple[str, str, str]]:
    """(study, stage, key) where the key tells conditions apart: rows that have it differ in it."""
    seen: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        for key in _KEYS:
            if row.get(key) is not None:
                seen.setdefault((*_place(row, run), key), set()).add(str(row[key]))
    return {place for place, values in seen.items() if len(values) > 1 or place[2] == "stage"}


def _difference(second: Sequence[float], first: Sequence[float]) -> Value:
    if set(second) | set(first) <= {0.0, 1.0}:
        return paired_difference([x == 1.0 for x in second], [x == 1.0 for x in first])
    found = mean([x - y for x, y in zip(second, first, strict=True)])
    if found.low == found.high:  # no resample can differ: as unsure as a rate of 0 over as many
        margin = wilson(0, found.n).high
        return Value(found.value, found.value - margin, found.value + margin, found.n)
    return found


def _by_condition(rows: Iterable[Mapping[str, Any]], run: Run, telling: set[tuple[str, str, str]], same_model: bool) -> Paired:
    held: Paired = {}
    for row in rows:
        if row.get("prompt_id") is None:
            continue
        place = _place(row, run)
        condition = " · ".join(str(row[key]).replace("_", " ") for key in _KEYS if (*place, key) in telling and row.get(key) not in (None, ""))
        for column, name in _MEASURES.items():
            value = row.get(column)
            if column == "verdict" and value is not None:
                value = float(value == "refused")
            elif (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
                or (column in _OWN and ("verdict" in row or not same_model))
            ):
                continue
            key = (place[0], condition or "all prompts", name)
            held.setdefault(key, {}).setdefault(str(row["prompt_id"]), []).append(float(value))
    return held


def comparison_page(runs: Sequence[Run], at: Path, *, full: bool = True) -> Page:
    """The page of two runs or more, the first one the one the others are held against; its own figures go to `at`/figures.

    Raises:
        InputError: fewer than two.
    """
    if len(runs) < 2:
        raise InputError("a comparison needs two runs or more: name their folders one after the other")
    runs = runs if full else [quiet(run) for run in runs]
    names = words(runs)
    parts = [paired(runs[0], other, names[0], name, at, number) for number, (other, name) in enumerate(zip(runs[1:], names[1:], strict=True), 1)]
    lead = " ".join(section.lead for section in parts)
    sections = [
        Section("The runs", blocks=[listed(runs, names, "", "folder", _address)]),
        *parts,
        Section("The numbers side by side", blocks=side_by_side(runs, names)),
    ]
    if figures := beside(runs, names, at, full=full):
        sections.append(Section("The figures side by side", blocks=figures))
    sections.append(Section("What differs in how they were made", blocks=[settings(runs, names)]))
    head = ["Differences are paired by prompt; intervals are 95%, prompts resampled."]
    return Page(f"Comparison: {' and '.join(names)}", lead, head, sections, paper.MARKS, links(runs, at, _address))


def _address(run: Run) -> str:
    where = run.folder.resolve()
    return f"{where.parent.name}/{where.name}"


def links(runs: Sequence[Run], at: Path, called: Callable[[Run], str]) -> dict[str, str]:
    """Where a page in folder `at` finds the pages of these runs, by what it calls them."""
    return {called(run): quote(os.path.relpath(run.folder / "report.html", at)) for run in runs if (run.folder / "report.html").is_file()}


def listed(runs: Sequence[Run], names: Sequence[str], title: str, column: str, called: Callable[[Run], str]) -> Sheet:
    """Each run with its state, headline and claim; the last column has what its page is called."""
    rows = [
        [name, paper.STATUS.get(run.state, run.state), found(run.headline) if run.headline else "—", run.claim, called(run)]
        for run, name in zip(runs, names, strict=True)
    ]
    return Sheet(title, ["run", "state", "headline [95% interval]", "claim", column], rows)


def paired(first: Run, second: Run, one: str, other: str, at: Path, place: int) -> Section:
    """Paired differences of one run to the first."""
    rows = differences(first, second)
    title = f"{other} against {one}"
    if not rows:
        lead = f"{title}: no condition has {_LEAST} prompts that were asked in both, so nothing can be paired."
        return Section(title, lead=lead)
    beyond = [row for row in rows if row["low"] > 0 or row["high"] < 0]
    same = [row for row in rows if row["first"] == row["second"] and row["value"] == 0]
    left = len(rows) - len(same)
    lead = (
        f"{title}: {len(beyond)} of {len(rows)} paired differences have an interval without 0; {len(same)} are 0"
        f"{f', and of the other {left} about {0.05 * left:.1f} would by chance, if nothing differed' if left else ''}."
    )
    shown = [row for row in rows if row["measure"] == "refused"] or rows
    told = [{**row, "at": row["condition"] if row["measure"] == "refused" else f"{row['condition']} · {row['measure']}"} for row in shown]
    cut = " At most 24 a panel are drawn; the table has all." if len(told) > 24 else ""
    caption = f"Second − first on the same prompts: {other} minus {one}. Bars are 95% intervals, prompts resampled; right of 0 is more in the second.{cut}"
    plot = forest(told, title=f"Paired differences: {title}", caption=caption, what="second − first", name="at", series="measure", panel="study", zero=True)
    cells = [
        [
            row["study"], row["condition"], row["measure"], number(row["first"]), number(row["second"]), interval(row["value"], row["low"], row["high"]),
            number(row["n"]), "differs" if row in beyond else "no difference seen",
        ]
        for row in rows
    ]  # fmt: skip
    columns = ["study", "condition", "measure", one, other, "second − first [95% interval]", "pairs", ""]
    return Section(title, lead=lead, blocks=[drawn(at, f"differences_{place}", plot, told), Sheet("Every paired difference", columns, cells)])


def side_by_side(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    """The tables of the studies that two or more share, a column a run; not paired."""
    blocks: list[Block] = []
    for study in dict.fromkeys(study for run in runs for study in run.studies):
        having = [(run, name) for run, name in zip(runs, names, strict=True) if study in run.studies]
        if len(having) < 2:
            continue
        told = [measures(run.studies[study].get("table", ())) for run, _ in having]
        rows = [[key, *(found(one[key]) if key in one else "—" for one in told)] for key in dict.fromkeys(key for one in told for key in one)]
        if rows:
            blocks.append(Sheet(study.replace("_", " "), ["number", *(name for _, name in having)], rows))
    return blocks or ["No two of these runs hold the same study."]


def beside(runs: Sequence[Run], names: Sequence[str], at: Path, *, full: bool) -> list[Block]:
    """Figures of the same name: line figures drawn into one, the others one after the other."""
    blocks: list[Block] = []
    for name in shared([run.figures for run in runs]):
        figures = [run.figures[name] for run in runs]
        chart = figures[0].chart
        if any(figure.replies for figure in figures):
            continue
        if chart and chart.kind == "line" and all(figure.chart and figure.chart.kind == "line" for figure in figures):
            rows = [{**row, "run": run} for figure, run in zip(figures, names, strict=True) for row in figure.rows]
            caption = f"A line a run, bands are 95% intervals. {figures[0].caption}"
            plot, told = overlaid(rows, chart, title=name.replace("_", " "), caption=caption)
            blocks.append(drawn(at, f"both_{name}", plot, told))
        else:
            for run, called in zip(runs, names, strict=True):
                block = kept(run, name, at, replies=full)
                blocks.append(replace(block, name=f"{name}_{len(blocks)}", title=f"{called}: {block.title}") if isinstance(block, Picture) else block)
    return blocks


def settings(runs: Sequence[Run], names: Sequence[str]) -> Sheet:
    """What was asked, or ran, differently."""
    told = []
    for run in runs:
        env = run.environment
        data = env.get("data") or {}
        own = {
            "model": run.model,
            "seed": run.seed,
            "commit": env.get("commit"),
            "weights": (env.get("backend") or {}).get("weights"),
            "data hash": data.get("hash"),
        }
        told.append({**own, **(env.get("versions") or {}), **run.varied})
    keys = [key for key in dict.fromkeys(key for one in told for key in one) if len({str(one.get(key)) for one in told}) > 1]
    rows = [[key, *(number(one.get(key)) for one in told)] for key in keys]
    return Sheet("" if rows else "Nothing that was written down differs.", ["", *names], rows)

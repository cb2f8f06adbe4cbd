"""One run → one page: what was found, what it was found with, what stands against it. Knows no experiment, only what it left."""

import logging
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from latentguard.pages import Block, Command, Facts, Page, Section, Sheet, as_html, as_markdown
from latentguard.report import paper
from latentguard.report.pictures import kept
from latentguard.report.replies import replies
from latentguard.report.runs import Run, quiet, read_runs, tells
from latentguard.report.wording import duration, found, number, sheet

log = logging.getLogger(__name__)
_CONTROLS = ("random", "shuffled", "ngram", "last_token", "ceiling", "control")
_QUIET = ("hydra", "resume")  # settings that say nothing of the experiment


def write_report(folder: str | Path, *, full: bool = True, out: Path | None = None) -> Path:
    """`report.html` and `report.md` in the folder of a run or of a sweep, from what is there; the path of the page.

    Args:
        full: False keeps back what the model said and leaves its verdicts.
        out: another folder for the page.

    Raises:
        InputError: no run is there, or a file of it cannot be read.
    """
    folder = Path(folder)
    runs, where = read_runs(folder), Path(out or folder)
    if len(runs) == 1 and runs[0].folder == folder:
        return write(run_page(runs[0], where, full=full), where)
    from latentguard.report.sweep import sweep_page

    return write(sweep_page(folder, runs, where, full=full), where)


def write(page: Page, folder: Path) -> Path:
    """Both twins, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.md", as_markdown(page)), ("report.html", as_html(page))):
        partial = folder / f".{name}.{os.getpid()}"
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(folder / name)
    return folder / "report.html"


def run_page(run: Run, at: Path, *, full: bool = True) -> Page:
    """The page of one run, for folder `at`."""
    run = run if full else quiet(run)
    for name, summary in run.studies.items():
        paper.check(name, _settled(run, summary))
    series = "studies" in run.summary
    sections = [Section("The command", blocks=[Command(run.command)])] if run.command else []
    if series:
        verdicts, count = paper.effects(run.studies)
        sections.append(Section("The paper's effects", lead=count[:1].upper() + count[1:] + ".", blocks=[verdicts, paper.READING]))
    for name, summary in (run.studies or {run.study: {}}).items():
        sections.append(study_section(run, name, _settled(run, summary), at, full=full))
        if not series and name in paper.PAPER:
            sections.append(Section("The paper", paper.PAPER[name][0], blocks=paper.printed(name, at)))
    said = replies(run.rows(), full=full, series=series, first=next(iter(run.studies), ""))
    if said:
        sections.append(Section("Replies", blocks=[said]))
    sections += [against(run), made_of(run)]
    return Page(
        title=f"{run.study.replace('_', ' ')} on {run.model}",
        lead=run.claim,
        head=[line for line in (_when(run), _data(run), "Intervals are 95%.") if line],
        sections=sections,
        marks=paper.MARKS,
    )


def study_section(run: Run, name: str, summary: Mapping[str, Any], at: Path, *, full: bool) -> Section:
    """A study's figures and table; in a series beside what the paper prints."""
    status, study = summary["status"], str(summary["study"])
    chips = [f"poles by {summary['poles']}"] if summary.get("poles") else []
    if summary.get("cells"):
        chips += [_counted(key.replace("_", " "), count) for key, count in summary["cells"].items() if key != "poles"]
    chips += [duration(summary["seconds"])] if summary.get("seconds") is not None else []
    blocks: list[Block] = [kept(run, figure, at, replies=full) for figure in (summary.get("figures") or _unnamed(run))]
    if summary.get("table"):
        table = summary["table"] if full else [{key: value for key, value in row.items() if not tells(key)} for row in summary["table"]]
        blocks.append(sheet("Every number of this study", table))
    series = "studies" in run.summary
    if not series and summary.get("effects"):
        blocks.append(paper.effects_of(name, summary))
    place = paper.PAPER.get(study, ("", "", ()))[0] if series else ""
    beside = paper.printed(study, at) if series and study in paper.PAPER else []
    lead = str(summary.get("claim") or summary.get("why") or "") if series else ""
    blocks = blocks or [f"Nothing to show: {paper.STATUS[status]}."]
    return Section(name if series else "What was found", place, paper.STATUS[status], chips, lead, blocks, beside, "The paper" if beside else "")


def against(run: Run) -> Section:
    """Controls, and what did not work: everything that speaks against the claim, in one place."""
    blocks: list[Block] = []
    lost = [
        f"{name}: {paper.STATUS[part['status']]}. {part.get('why', '')}" for name, part in run.studies.items() if part.get("status") in ("failed", "skipped")
    ]
    held = [f"{name}: {paper.STATUS['insufficient_base_rate']}." for name, part in run.studies.items() if part.get("status") == "insufficient_base_rate"]
    fails = [
        f"Effect {e['effect']} {e['verdict']} ({name}): {e.get('why', '')}"
        for name, part in run.studies.items()
        for e in part.get("effects", ())
        if e["verdict"] != "holds"
    ]
    weak = [
        f"{name}, {row.get('intervention', 'a row')}: no setting works within the damage allowed; the likeliest one is reported."
        for name, part in run.studies.items()
        for row in part.get("table", ())
        if row.get("works") is False
    ]
    if not run.finished:
        lost.insert(0, run.claim)
    told = [*lost, *held, *weak, *fails]
    if told:
        blocks.append(Sheet("What did not work, or could not be told", ["what"], [[line.strip()] for line in told]))
    for name, part in run.studies.items():
        rows = [row for row in part.get("table", ()) if any(isinstance(v, str) and any(c in v.lower() for c in _CONTROLS) for v in row.values())]
        if rows:
            blocks.append(sheet(f"Controls{f' of {name}' if len(run.studies) > 1 else ''}", rows))
    lead = "" if told else "Nothing failed, and no claim was withheld."
    return Section("Controls, and what did not work", lead=lead, blocks=blocks)


def made_of(run: Run) -> Section:
    """Versions, seeds, hashes, every setting."""
    env = run.environment
    weights = env.get("backend") or {}
    pairs = [("folder", run.folder.resolve().name), ("model", run.model), ("seed", run.seed), ("judge", run.summary.get("judge"))]
    pairs += [(key, weights.get(key)) for key in ("weights", "template", "dtype", "device", "attention")]
    data = env.get("data") or run.summary.get("data") or {}
    pairs += [("data hash", data.get("hash")), ("final mark of every instruction", data.get("terminal"))]
    pairs += [("latentguard commit", env.get("commit")), *((env.get("versions") or {}).items()), ("python", env.get("python")), ("machine", env.get("machine"))]
    if run.summary.get("seconds") is not None:
        pairs.append(("time", duration(run.summary["seconds"])))
    memory = env.get("peak_memory_bytes") or {}
    pairs += [(f"peak memory, {place}", f"{size / 1e9:.2f} GB") for place, size in memory.items() if isinstance(size, int | float)]
    pairs += [("licence of the model", env.get("licence")), ("about the model", env.get("model_card"))]
    blocks: list[Block] = [Facts("What ran", [(key, str(value)) for key, value in pairs if value not in (None, "")])]
    if data.get("sets"):
        blocks.append(sheet("Prompt sets", [{k: v for k, v in one.items() if not isinstance(v, Mapping | list)} for one in data["sets"]]))
    settings = [row for row in flat(run.settings) if row[0].partition(".")[0] not in _QUIET]
    if settings:
        blocks.append(Sheet("Every setting", ["setting", "value"], settings))
    return Section("What made it", blocks=blocks)


def flat(value: Mapping[str, Any], above: str = "") -> list[list[str]]:
    """Nested settings as rows of a dotted name and a value."""
    rows = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            rows += flat(item, f"{above}{key}.")
        else:
            rows.append([f"{above}{key}", "null" if item is None else str(item)])
    return rows


def headline(run: Run) -> str:
    """The number that a run's claim rests on, in words; a dash where it gave none."""
    told = run.headline
    return f"{told['metric']}: {found(told)}{' (claim withheld)' if told.get('withheld') else ''}" if told else "—"


def _settled(run: Run, summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """With a status and a sentence, also where the run is not finished or gave none."""
    status = summary.get("status") or ("ok" if run.finished else run.state)
    words = {"claim": summary.get("claim") or run.claim} if status in ("ok", "insufficient_base_rate") else {"why": summary.get("why") or run.claim}
    return {"study": run.study, **summary, "status": status, **words}


def _unnamed(run: Run) -> Sequence[str]:
    """Figures of a run whose summary names none; in a series nobody knows whose they are."""
    return [] if "studies" in run.summary else list(run.figures)


def _counted(name: str, count: object) -> str:
    """A role's number; 12 of 40 asked where it is known."""
    if isinstance(count, Mapping):
        return f"{name} {count.get('n')} of {count.get('asked')} asked" + (" (short)" if count.get("withheld") else "")
    return f"{name} {count}" if isinstance(count, str) else f"{number(count)} {name}"


def _when(run: Run) -> str:
    files = [run.folder / name for name in ("summary.json", "environment.json", "rows.jsonl") if (run.folder / name).exists()]
    if not files:
        return ""
    at = datetime.fromtimestamp(max(path.stat().st_mtime for path in files)).strftime("%Y-%m-%d %H:%M")
    took = f", after {duration(run.summary['seconds'])}" if run.finished else ""
    return f"{'Finished' if run.finished else 'Last written'} {at}{took}; seed {run.seed}."


def _data(run: Run) -> str:
    data = run.summary.get("data") or {}
    name = data.get("name") if isinstance(data, Mapping) else data
    return f"Data: {name}; judge: {run.summary.get('judge', 'not stated')}." if name else ""

"""Past runs, a line each: when, what, on which model, what became of it, its headline number. Knows no experiment."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from latentguard.errors import InputError
from latentguard.pages.texts import plain
from latentguard.report import paper
from latentguard.report.runs import Run, is_run, read_run, waiting
from latentguard.report.wording import found

log = logging.getLogger(__name__)
_STATES = {"ok": "done", "insufficient_base_rate": "withheld", "unfinished": "stopped", "running": "running"}


def listing(folder: str | Path, width: int = 0) -> str:
    """The runs and sweeps under `folder` as a table, the newest last; `width` 0 asks the terminal.

    Raises:
        InputError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; runs are kept under runs/ where the command was given: cd there, or name the folder")
    rows = list(_rows(folder))
    if not rows:
        return f"No runs under {folder} yet; make one: python -m latentguard.run"
    width = width or shutil.get_terminal_size((120, 24)).columns
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    left = max(24, width - sum(widths) - 8)
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row[:4], widths, strict=True)) + "  " + _cut(row[4], left) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _rows(folder: Path) -> Iterator[tuple[str, str, str, str, str]]:
    for path in sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda path: (path.stat().st_mtime, path.name)):
        try:
            if is_run(path):
                yield _row(read_run(path), path.name)
                continue
            parts = sorted(part for part in path.iterdir() if part.is_dir() and is_run(part))
            if not parts:
                continue
            runs, missing = [read_run(part) for part in parts], len(waiting(path))
            done = sum(run.finished for run in runs)
            yield path.name, "sweep", f"{len({run.model for run in runs})} models", f"{done}/{len(runs) + missing}", f"python -m latentguard.report {path}"
            for run in runs:
                yield _row(run, f"  {run.folder.name}")
        except InputError as error:
            log.warning("%s is left out: %s", path.name, error)


def _row(run: Run, name: str) -> tuple[str, str, str, str, str]:
    withheld = "(claim withheld) " if run.headline.get("withheld") else ""
    told = f"{withheld}{run.headline.get('metric', '')} {found(run.headline)}" if run.headline else run.claim
    return (
        plain(name) if not name.startswith("  ") else f"  {plain(name)}",
        plain(run.study),
        plain(run.model),
        _STATES.get(run.state, paper.STATUS.get(run.state, run.state)),
        plain(told),
    )


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"

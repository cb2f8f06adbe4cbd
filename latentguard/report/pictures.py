"""Figures as parts of a page: those a run kept, and those the page draws itself. Knows no study."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from latentguard.charts import Plot
from latentguard.pages import Block, Picture
from latentguard.plots.style import keep
from latentguard.report.runs import Run, still_of

_SAVED: dict[Path, str] = {}  # what this process has drawn where


def kept(run: Run, name: str, page: Path, *, replies: bool) -> Block:
    """A figure of a run for a page in folder `page`; in its place a sentence where it is missing, or shows what is kept back."""
    figure = run.figures.get(name)
    if figure is None or figure.still is None:
        return f"Figure {name} is missing: it needs figures/{name}.png and its data, figures/{name}.csv."
    if (figure.replies or not figure.known) and not replies:  # of one that no index names nobody knows whether it shows replies
        return f"Figure {name} shows what the model said and is kept back; it is figures/{name}.png in the run's folder."
    link = quote(os.path.relpath(figure.still, page).replace(os.sep, "/"))
    return Picture(name, figure.title, figure.caption, figure.still, link, figure.rows, figure.chart)


def drawn(page: Path, name: str, plot: Plot, rows: Sequence[Mapping[str, Any]]) -> Picture:
    """A figure that the page draws: written to figures/ beside it, with its data."""
    stem = page / "figures" / name
    stem.parent.mkdir(parents=True, exist_ok=True)
    if _SAVED.get(stem) != (told := json.dumps([plot.title, *rows], default=str)):  # a series writes its page after each study
        keep(plot.figure, stem, rows)
        _SAVED[stem] = told
    still = still_of(stem)
    return Picture(name, plot.title, plot.caption, still, f"figures/{quote(still.name)}" if still else "", rows, plot.chart)

"""Figures of runs → panels and run sets of a W&B report, by the names that the tracker logs under. Knows no study and no server."""

import re
from collections.abc import Sequence
from typing import Any

from latentguard.charts import Chart
from latentguard.errors import InputError
from latentguard.pages.texts import plain
from latentguard.report.runs import Drawn, Run
from latentguard.report.tracked import chosen, exp_of, expression, sendable
from latentguard.trackers.native import curves

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")  # Okabe and Ito's
COLUMNS = (
    "run:displayName",
    "config:model.value",
    "config:exp.value",
    "config:seed.value",
    *(f"summary:headline/{key}" for key in ("value", "low", "high", "n")),
)
WIDE, _HIGH = 24, 9  # a grid's columns; a panel's rows
Held = Sequence[tuple[Run, list[Drawn]]]


def parts(runs: Sequence[Run]) -> dict[tuple[str, str], list[tuple[Run, list[Drawn]]]]:
    """Each exp= and study in it (a series has several) with its runs and their figures that show no reply."""
    found: dict[tuple[str, str], list[tuple[Run, list[Drawn]]]] = {}
    for run in runs:
        series = "studies" in run.summary
        for study, part in (run.studies or {run.study: {}}).items():
            named = part.get("figures") or ([] if series else list(run.figures))
            drawn = [run.figures[name] for name in named if name in run.figures and not run.figures[name].replies]
            found.setdefault((exp_of(run), study), []).append((run, drawn))
    return found


def lines(held: Held, by: Any = None) -> list:
    """A plot a panel of each figure of lines: what the tracker keeps of it as history, over its own x.

    Runs of one `by` are averaged, the band is their range.
    """
    plots: dict[tuple[str, str], tuple[Drawn, Chart, dict[str, None]]] = {}
    for figure, chart in ((figure, figure.chart) for _, figures in held for figure in figures if figure.chart):
        for panel in dict.fromkeys(str(row.get(chart.panel)) if chart.panel else "" for row in figure.rows):
            rows = [row for row in figure.rows if not chart.panel or str(row.get(chart.panel)) == panel]
            if logged := [key for step in curves(figure.name, chart, rows) for key in step if key.startswith(f"{figure.name}/")]:
                plots.setdefault((figure.name, panel), (figure, chart, {}))[2].update(dict.fromkeys(map(sendable, logged)))
    return [
        reports().LinePlot(
            title=plain(" · ".join(filter(None, [figure.title, chart.names.get(panel, f"{chart.panel} {panel}" if panel else "")])), 120),
            x=chart.x,
            y=list(logged),
            title_x=chart.x_title,
            title_y=chart.y_title,
            range_y=chart.y_range or (None, None),
            groupby=by,
            groupby_aggfunc="mean" if by else None,
            groupby_rangefunc="minmax" if by else None,
            layout=layout(place),
        )
        for place, ((_, panel), (figure, chart, logged)) in enumerate(plots.items())
    ]


def native(held: Held) -> list:
    """W&B's own plots of the figures that are no curves: bars, points, and the cells of a heat map as a table."""
    wr, found = reports(), []
    for name, (figure, chart) in {figure.name: (figure, figure.chart) for _, figures in held for figure in figures if figure.chart}.items():
        if curves(name, chart, figure.rows):
            continue
        key, title = sendable(f"charts/{name}"), plain(figure.title, 120)
        place = layout(len(found))
        if chart.kind == "bars" or (chart.kind == "points" and all(isinstance(row.get(at), int | float) for row in figure.rows for at in (chart.x, chart.y))):
            kind, fields = ("bar", {"label": "bar", "value": chart.y}) if chart.kind == "bars" else ("scatter", {"x": chart.x, "y": chart.y})
            query = {"id": {}, "name": {}, "_defaultColorIndex": {}, "summaryTable": {"tableKey": f"{key}_table"}}
            found.append(wr.CustomChart(query=query, chart_name=f"wandb/{kind}/v0", chart_fields=fields, chart_strings={"title": title}, layout=place))
        else:
            found.append(wr.WeavePanelSummaryTable(table_name=key, layout=place))
    return found


def media(held: Held) -> list:
    """The pictures, in one browser."""
    keys = list(dict.fromkeys(sendable(f"figures/{figure.name}") for _, figures in held for figure in figures))
    return [reports().MediaBrowser(title="Figures", media_keys=keys, num_columns=min(len(keys), 2), layout=layout(0, WIDE, 14))] if keys else []


def bars(held: Held, study: str, by: Any = None) -> list:
    """The numbers that the claims rest on."""
    wr, band = reports(), "minmax" if by else None
    if not any(run.headline or run.summary.get("headlines") for run, _ in held):
        return []
    key = f"headlines/{study}/value" if any("studies" in run.summary for run, _ in held) else "headline/value"
    title = f"Headline number: {study.replace('_', ' ')}"
    return [wr.BarPlot(title=plain(title, 120), metrics=[wr.SummaryMetric(sendable(key))], groupby=by, groupby_rangefunc=band, layout=layout(0))]


def runset(runs: Sequence[Run], exp: str | None) -> Any:
    """These runs, or those of one exp=, grouped by model; its filter can be seen and changed."""
    wr = reports()
    return wr.Runset(name=titled(exp or "all runs"), filters=expression(chosen(runs, exp)), groupby=["config.model"], pinned_columns=list(COLUMNS))


def colours(runs: Sequence[Run]) -> dict[str, str]:
    """A model's colour, the same in every grid."""
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(dict.fromkeys(sendable(run.model) for run in runs))}


def layout(place: int, wide: int = WIDE // 2, high: int = _HIGH) -> Any:
    """Side by side; the library moves down what would lie on another."""
    return reports().Layout(x=(place * wide) % WIDE, y=0, w=wide, h=high)


def titled(text: str) -> str:
    """Signs that W&B takes in a name and an address."""
    return " ".join(re.sub(r"[^\w\s.,-]", " ", plain(text)).split())[:120] or "latentguard"


def reports() -> Any:
    """wandb_workspaces.reports.v2, loaded when it is needed."""
    try:
        import wandb_workspaces.reports.v2 as wr
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "wandb_workspaces":
            raise
        raise InputError("a W&B report needs wandb-workspaces: pip install 'latentguard[report]'") from None
    return wr


def workspaces() -> Any:
    """wandb_workspaces.workspaces, likewise."""
    reports()
    import wandb_workspaces.workspaces as ws

    return ws

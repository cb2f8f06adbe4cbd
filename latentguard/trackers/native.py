"""What W&B draws of its own from a figure's chart and rows: curves over their own axis, and plots to be changed there. Knows no run.

Only the columns that the chart names are looked at: a row may hold more than may leave the machine.
"""

import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from latentguard.charts import Chart, Plot

Rows = Sequence[Mapping[str, Any]]


def curves(name: str, chart: Chart, rows: Rows) -> list[dict[str, Any]]:
    """History rows of a chart of lines over numbers, one for each x in order: `<name>/<series>_<panel>`, and its interval
    as `intervals/<name>/<series>_<panel>/low` and `/high`. Nothing of any other chart.
    """
    rows = [row for row in rows if _number(row.get(chart.x)) and _number(row.get(chart.y))]
    if chart.kind != "line" or not rows or chart.x == chart.y:
        return []
    history: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: row[chart.x]):
        line = _line(chart, row)
        told = {f"{name}/{line}": row[chart.y]}
        told |= {f"intervals/{name}/{line}/{side}": row[column] for side, column in _interval(chart) if _number(row.get(column))}
        if history and history[-1][chart.x] == row[chart.x] and not told.keys() & history[-1].keys():
            history[-1] |= told
        else:
            history.append({chart.x: row[chart.x], **told})
    return history


def drawn(wandb: ModuleType, plot: Plot, rows: Rows) -> Any:
    """W&B's own plot of a figure, or a table of its cells; None where there is nothing to draw."""
    chart = plot.chart
    asked = (chart.x, chart.y, *((chart.value,) if chart and chart.kind == "heat" and chart.value else ())) if chart else ()
    rows = [row for row in rows if all(row.get(column) is not None for column in asked)]
    if chart is None or not rows:
        return None
    numeric = all(_number(row[chart.x]) and _number(row[chart.y]) for row in rows)
    if chart.kind == "line" and numeric:
        lines: dict[str, list[Mapping]] = {}
        for row in sorted(rows, key=lambda row: row[chart.x]):
            lines.setdefault(_called(chart, row) or chart.y_title, []).append(row)
        xs, ys = ([[row[column] for row in line] for line in lines.values()] for column in (chart.x, chart.y))
        return wandb.plot.line_series(xs, ys, keys=list(lines), title=plot.title, xname=chart.x_title)
    columns = list(
        dict.fromkeys(filter(None, (chart.panel, chart.series, chart.x, chart.y, chart.value, *(column for _, column in _interval(chart)), chart.n)))
    )
    if chart.kind == "bars":
        cells = [[" · ".join(filter(None, (_called(chart, row), str(row[chart.x])))), *(row.get(column) for column in columns)] for row in rows]
        return wandb.plot.bar(_table(wandb, ["bar", *columns], cells), "bar", chart.y, title=plot.title)
    table = _table(wandb, columns, [[row.get(column) for column in columns] for row in rows])
    return wandb.plot.scatter(table, chart.x, chart.y, title=plot.title) if chart.kind == "points" and numeric else table


def _table(wandb: ModuleType, columns: Sequence[str], cells: list[list]) -> Any:
    return wandb.Table(columns=list(columns), data=cells, allow_mixed_types=True)


def _interval(chart: Chart) -> list[tuple[str, str]]:
    return [(side, column) for side, column in (("low", chart.low), ("high", chart.high)) if column]


def _line(chart: Chart, row: Mapping[str, Any]) -> str:
    """A name that W&B can filter and sort by; a dot in it would be a place in a tree."""
    values = [row.get(column) for column in (chart.series, chart.panel) if column]
    parts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return re.sub(r"[^A-Za-z0-9_+-]+", "_", "_".join(parts) or chart.y)


def _called(chart: Chart, row: Mapping[str, Any]) -> str:
    """As people call it."""
    values = [str(row.get(column)) for column in (chart.panel, chart.series) if column]
    return " · ".join(chart.names.get(value, value) for value in values)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) != float("inf")

"""The rows of a chart under names of our own, so that no name or text in them is ever read as an expression. Knows no drawing."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from latentguard.charts import Chart
from latentguard.pages.texts import brief

Rows = Sequence[Mapping[str, Any]]
LONGEST = 100  # characters of a name
_NUMBER = re.compile(r"\s*[-+−]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")


def number(value: Any) -> float | None:
    """A finite number, or the text of one; None for all else."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value.replace("−", "-"))
    if isinstance(value, bool) or not hasattr(value, "__float__") or not math.isfinite(float(value)):
        return None
    return float(value)


def told(value: float | None) -> str:
    """Three figures, or a dash."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
    return text.replace("-", "−")


def key(value: Any) -> str:
    """A value as text, 1.0 as 1."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else "" if value is None else str(value)


def named(chart: Chart, column: str, value: Any) -> str:
    """What the reader sees of a value of a column."""
    return brief(chart.name(column, "" if value is None else value), LONGEST)


def called(chart: Chart, column: str, value: Any) -> str:
    """The same for an entry of the legend or the head of a panel: a number without a name is told with its column, `layer 4`."""
    name = named(chart, column, value)
    return brief(f"{column.replace('_', ' ')} {name}", LONGEST) if name == key(value) and number(name) is not None else name


def has_numbers(chart: Chart, rows: Rows) -> bool:
    """Whether x is an axis of numbers; bars and cells have names there."""
    return chart.kind in ("line", "points") and all(number(row.get(chart.x)) is not None for row in rows)


def values_of(chart: Chart, rows: Rows) -> list[dict[str, Any]]:
    """x, y, value, low, high, also0 …, series, dash, panel, pick, and the texts that hovering shows: x_told, told, interval, n."""
    numbers = has_numbers(chart, rows)
    return [_value(chart, row, numbers) for row in rows]


def _value(chart: Chart, row: Mapping[str, Any], numbers: bool) -> dict[str, Any]:
    low, high = (number(row.get(column)) if column else None for column in (chart.low, chart.high))
    n = number(row.get(chart.n)) if chart.n else None
    columns = (("series", chart.series), ("dash", chart.dash), ("panel", chart.panel))
    made: dict[str, Any] = {name: called(chart, column, row.get(column)) if column else "" for name, column in columns}
    made["pick"] = named(chart, chart.pick, row.get(chart.pick)) if chart.pick else ""
    made["x"] = number(row.get(chart.x)) if numbers else named(chart, chart.x, row.get(chart.x))
    made["x_told"] = named(chart, chart.x, row.get(chart.x)) if not numbers else told(number(row.get(chart.x)))
    if chart.kind == "heat":
        made |= {"y": named(chart, chart.y, row.get(chart.y)), "value": number(row.get(chart.value or ""))}
        made["told"] = told(made["value"])
    else:
        made |= {"y": _inside(chart.y_range, number(row.get(chart.y))), "low": low, "high": high}
        made |= {f"also{place}": number(row.get(column)) for place, column in enumerate(chart.also)}
        made |= {f"also{place}_told": told(made[f"also{place}"]) for place in range(len(chart.also))}
        made["told"] = told(made["y"])
    made["interval"] = f"{told(low)} to {told(high)}" if low is not None and high is not None else ""
    made["n"] = told(n) if n is not None else ""
    return made


def _inside(limits: tuple[float, float] | None, value: float | None) -> float | None:
    """None for what a chart does not show."""
    return value if value is None or limits is None or limits[0] <= value <= limits[1] else None

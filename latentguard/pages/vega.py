"""A chart and its rows → a Vega-Lite specification that can be hovered, toggled and resized. Knows no page and draws nothing.

The script that draws it sets width and columns, the colours of a dark page (`usermeta`), and the signals `hidden` ("s:…" a series,
"d:…" a dash) and `picked`.
"""

import re

from latentguard.charts import Chart, Line
from latentguard.errors import InputError
from latentguard.pages.colours import PALETTE, on_dark
from latentguard.pages.marks import DASHES, SHAPES, STYLE, Spec, layers, tooltip
from latentguard.pages.numbers import LONGEST, Rows, called, key, named, number, told, values_of
from latentguard.pages.texts import brief, plain

_HEX = re.compile(r"#[0-9A-Fa-f]{6}")


def vega_lite(chart: Chart, rows: Rows, title: str) -> Spec:
    """The specification, its rows inside.

    `usermeta` holds what stands outside the drawing: the legend's entries, the values of `pick`, how many panels there are.

    Raises:
        InputError: a column that the chart needs is in no row, or a colour is no #rrggbb.
    """
    _check(chart, rows, title)
    series, dashes, panels, picks = (_names(chart, rows, column) for column in (chart.series, chart.dash, chart.panel, chart.pick))
    colours = [_colour(chart, raw, place, title) for place, raw in enumerate(series)] or [PALETTE[0]]
    kinds = list(dict.fromkeys(line.name for line in chart.lines))
    values = values_of(chart, rows)
    inner = [
        {"width": 520, **layers(chart, part, list(series.values()), list(dashes.values()), kinds, values, f"near{place}")}
        for place, part in enumerate(_parts(chart, values, panels))
    ]
    steps = [{"filter": "isValid(datum.line) || datum.pick === picked"}] if picks else []
    if chart.kind != "heat":
        seen = "indexof(hidden, 's:' + datum.series) < 0 && indexof(hidden, 'd:' + datum.dash) < 0"
        changed = ("y", "low", "high", *(f"also{place}" for place in range(len(chart.also))))
        steps += [{"calculate": f"{seen} ? datum.{name} : null", "as": f"seen_{name}"} for name in changed]
    above = brief(chart.y_title, LONGEST) if chart.kind != "heat" and not chart.lying else ""
    return {
        "description": plain(title),
        "title": {"text": above},
        "data": {"values": values + _references(chart, panels, kinds, values)},
        "params": [{"name": "hidden", "value": []}, *([{"name": "picked", "value": next(iter(picks.values()))}] if picks else [])],
        **({"transform": steps} if steps else {}),
        **(_panelled(chart, inner, list(panels.values())) if len(panels) > 1 else inner[0]),
        "config": {"range": {"category": colours, "symbol": list(SHAPES)}, "style": STYLE},
        "usermeta": {
            "kind": "lying" if chart.lying else chart.kind,
            "panels": max(1, len(panels)),
            "series": [
                {"name": name, "colour": colour, "dark": on_dark(colour), "shape": _shape(chart, place)}
                for place, (name, colour) in enumerate(zip(series.values(), colours, strict=False))
            ],
            "dashes": [{"name": name, "dash": _dash(place), "shape": SHAPES[place % len(SHAPES)]} for place, name in enumerate(dashes.values())],
            "dark": [on_dark(colour) for colour in colours],
            "lines": [{"text": _entry(chart, name), "dash": DASHES[place % len(DASHES)]} for place, name in enumerate(kinds)]
            + [{"text": brief(name, LONGEST), "dash": [1, 3]} for name in chart.also.values()],
            "hover": [[one["field"], one["title"]] for one in tooltip(chart, values)],
            "pick": {"name": brief(chart.pick, LONGEST).replace("_", " "), "values": list(picks.values())} if picks else None,
        },
    }


def _check(chart: Chart, rows: Rows, title: str) -> None:
    have = {name for row in rows for name in row}
    needed = [chart.x, chart.y, chart.series, chart.dash, chart.panel, chart.pick, chart.value if chart.kind == "heat" else None, *chart.also]
    if missing := [name for name in needed if name is not None and name not in have]:
        raise InputError(
            f"figure {title!r}: its chart names the column {missing[0]!r}, and its rows have {', '.join(sorted(have)) or 'none'}; name one of them"
        )
    if chart.kind == "heat" and chart.value is None:
        raise InputError(f"figure {title!r}: a chart of kind 'heat' needs `value`, the column that colours its cells")


def _names(chart: Chart, rows: Rows, column: str | None) -> dict[str, str]:
    """The values of a column in order (those that have a colour first) and what they are called."""
    if column is None:
        return {}
    raw = {key(row.get(column)): row.get(column) for row in rows}
    first = [name for name in chart.colours if name in raw] if column == chart.series else []
    return {name: (named if column == chart.pick else called)(chart, column, raw[name]) for name in dict.fromkeys([*first, *raw])}


def _colour(chart: Chart, raw: str, place: int, title: str) -> str:
    colour = chart.colours.get(raw, PALETTE[place % len(PALETTE)])
    if not _HEX.fullmatch(colour):
        raise InputError(f"figure {title!r}: the colour {colour!r} of {raw!r} is not of the form #0072B2; write it so")
    return colour


def _shape(chart: Chart, place: int) -> str:
    if chart.kind == "bars" and not chart.lying:
        return "square"
    return "circle" if chart.dash else SHAPES[place % len(SHAPES)]


def _dash(place: int) -> list[int]:
    return [] if place == 0 else DASHES[(place - 1) % len(DASHES)]


def _references(chart: Chart, panels: dict[str, str], kinds: list[str], values: list[Spec]) -> list[Spec]:
    """A row a reference and panel, told from the others by `line`; where names go down it is at one of its panel's."""
    names = {value["panel"]: value["x"] for value in reversed(values)} if chart.lying else {}
    return [
        {
            "line": kinds.index(line.name),
            "panel": panel,
            "at": line.at,
            "line_low": line.low,
            "line_high": line.high,
            "told": _told(line),
            **({"x": names[panel]} if panel in names else {}),
        }
        for line in chart.lines
        for raw, panel in (panels or {"": ""}).items()
        if line.panel is None or line.panel in (raw, panel) or not panels
    ]


def _told(line: Line) -> str:
    interval = f" [{told(line.low)}, {told(line.high)}]" if line.low is not None and line.high is not None else ""
    return f"{brief(line.name, LONGEST)}: {told(number(line.at))}{interval}" + (f" (n = {line.n})" if line.n is not None else "")


def _entry(chart: Chart, name: str) -> str:
    """A reference in the legend; its number where it has but one, and is not named by it."""
    own = [line for line in chart.lines if line.name == name]
    return _told(own[0]) if len(own) == 1 and (own[0].n is not None or own[0].at) else brief(name, LONGEST)


def _parts(chart: Chart, values: list[Spec], panels: dict[str, str]) -> list[list[Spec]]:
    """The rows that a view is made for: all, but where names go down those of one panel, which has names of its own."""
    return [[value for value in values if value["panel"] == panel] for panel in panels.values()] if chart.lying and len(panels) > 1 else [values]


def _panelled(chart: Chart, inner: list[Spec], names: list[str]) -> Spec:
    """A view a panel."""
    if chart.lying:
        own = [{"filter": {"field": "panel", "equal": name}} for name in names]
        return {
            "columns": 1,
            "concat": [
                {"title": {"text": name, "fontWeight": 600, "fontSize": 12.5}, "transform": [only], **view}
                for name, only, view in zip(names, own, inner, strict=True)
            ],
        }
    facet = {"field": "panel", "type": "nominal", "sort": names, "title": None}
    return {"facet": facet, "columns": 2, "spec": inner[0], "resolve": {"axis": {"x": "independent", "y": "independent"}}}

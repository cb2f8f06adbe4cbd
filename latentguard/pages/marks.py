"""The layers of a chart in Vega-Lite: references, intervals, lines, bars, points, cells. Knows no page.

Fields are those of `numbers.values_of`; `seen_y` and its like are y unless it is switched off; a row with `line` is a reference. Where a chart is lying, names go down and values across.
"""

from typing import Any

from latentguard.charts import Chart
from latentguard.pages.numbers import LONGEST, number
from latentguard.pages.texts import brief

Spec = dict[str, Any]
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
STYLE = {
    "reference": {"color": "#565c64", "strokeWidth": 1.4},
    "reference-band": {"color": "#565c64", "opacity": 0.1},
    "whisker": {"color": "#1b1d20"},
    "also": {"color": "#565c64"},
    "cell-of-heat": {"stroke": "#ffffff", "strokeWidth": 1},
}  # of a page in light colours
DASHES = ([6, 4], [2, 3], [9, 3, 2, 3], [4, 2])


_FEW = 14  # numbers on an axis that can be ticks each


def layers(chart: Chart, values: list[Spec], series: list[str], dashes: list[str], references: list[str], everything: list[Spec], near: str) -> Spec:
    """`layer` and `height` of a view of `values`; its axis of numbers is that of `everything`, and `near` names what is hovered."""
    if chart.kind == "heat":
        rows = len({value["y"] for value in values})
        return {"height": min(460, max(90, 24 * rows)), "layer": [_cells(chart, values)]}
    marks = _marks(chart, values, series, dashes, _heights(chart, everything), near)
    if references:
        marks = [{**mark, "transform": [{"filter": "!isValid(datum.line)"}]} for mark in marks]
    height: Any = {"step": max(22, 11 * max(1, len(series))), "for": "position"} if chart.lying else 240
    return {"height": height, "layer": [*_references(chart, references), *marks]}


def _marks(chart: Chart, values: list[Spec], series: list[str], dashes: list[str], height: Spec, near: str) -> list[Spec]:
    """Intervals below, then lines or bars, then the points that are hovered."""
    across, up = ("y", "x") if chart.lying else ("x", "y")
    names = _places(chart, values)
    colour = _told_apart("color", "series", series)
    shape = _told_apart("shape", "dash", dashes) if dashes else _told_apart("shape", "series", series)
    lined = (
        {"strokeDash": {"field": "dash", "type": "nominal", "legend": None, "scale": {"domain": dashes, "range": _dash_range(len(dashes))}}} if dashes else {}
    )
    detail = {"detail": {"field": "dash", "type": "nominal"}} if dashes else {}
    beside = names["type"] != "quantitative" and chart.kind != "line" and len(series) > 1
    offset = {f"{across}Offset": {"field": "series", "type": "nominal", "scale": {"domain": series, "paddingInner": 0.1}}} if beside else {}
    at = {across: names, up: height}
    between = {**at, **colour, **offset, **detail, up: {**height, "field": "seen_low"}, f"{up}2": {"field": "seen_high"}}
    hover = (
        {"type": "point", "on": "pointerover", "clear": "pointerout"}
        if chart.lying
        else {"type": "point", "nearest": True, "on": "pointermove", "clear": "pointerout"}
    )
    size = {"size": {"condition": {"param": near, "empty": False, "value": 140}, "value": 60 if chart.lying else 36}}
    hovered = {"tooltip": tooltip(chart, values)}
    points = {
        "mark": {"type": "point", "filled": True, "opacity": 1},
        "params": [{"name": near, "select": hover}],
        "encoding": {**at, **colour, **shape, **offset, **size, **hovered},
    }
    has_interval = any(value["interval"] for value in values)
    whisker = {"mark": {"type": "rule", "strokeWidth": 1.6, "clip": True}, "encoding": between | (hovered if chart.lying else {})}
    if chart.kind == "line":
        band = {"mark": {"type": "area", "opacity": round(min(0.14, 0.42 / max(1, len(series))), 3), "clip": True}, "encoding": between}
        line = {"mark": {"type": "line", "clip": True}, "encoding": {**at, **colour, **lined}}
        also = [
            {
                "mark": {"type": "line", "clip": True, "strokeDash": [1, 3], "style": [] if series else "also"},
                "encoding": {**at, **colour, **detail, "y": {**height, "field": f"seen_also{place}"}},
            }
            for place in range(len(chart.also))
        ]
        return [*([band] if has_interval else []), *also, line, points]
    if chart.kind == "points" or chart.lying:
        return [*([whisker] if has_interval else []), points]
    bare = {name: channel for name, channel in between.items() if name != "color"} | hovered
    bar = {"mark": {"type": "bar", "clip": True}, "encoding": {**at, **colour, **offset, **hovered}}
    return [bar, *([{"mark": {"type": "rule", "strokeWidth": 1.5, "clip": True, "style": "whisker"}, "encoding": bare}] if has_interval else [])]


def _told_apart(channel: str, field: str, names: list[str]) -> Spec:
    return {channel: {"field": field, "type": "nominal", "scale": {"domain": names}, "legend": None}} if names else {}


def _dash_range(count: int) -> list[list[int]]:
    return [[1, 0], *(DASHES[place % len(DASHES)] for place in range(count - 1))]


def _axis(title: str, **more: Any) -> Spec:
    return {"title": brief(title, LONGEST) or None, **more}


def _places(chart: Chart, values: list[Spec]) -> Spec:
    """The axis of x: numbers, or names in the order they came."""
    if values and all(isinstance(value["x"], float) for value in values):
        low, high = chart.x_range or _extent([value["x"] for value in values])
        at = sorted({value["x"] for value in values})
        whole = all(x == int(x) for x in at)
        ticks = {"values": at, "format": "~g"} if len(at) <= _FEW and chart.kind == "line" else {"format": "d", "tickMinStep": 1} if whole else {}
        scale = {"domain": [low, high], "nice": False, "zero": False, "padding": 0 if chart.x_range else 10}
        return {"field": "x", "type": "quantitative", "scale": scale, "axis": _axis(chart.x_title, **ticks)}
    names = list(dict.fromkeys(value["x"] for value in values))
    if chart.lying:
        return {"field": "x", "type": "nominal", "sort": names, "axis": _axis(chart.x_title, labelOverlap=False, grid=False, ticks=False)}
    crowded = len(names) > 3 and max(map(len, names)) * len(names) > 45
    tilt = {"labelAngle": -35, "labelAlign": "right", "labelBaseline": "top", "labelOverlap": False} if crowded else {"labelAngle": 0}
    if chart.kind == "bars":
        return {"field": "x", "type": "nominal", "sort": names, "axis": _axis(chart.x_title, **tilt), "scale": {"paddingInner": 0.25, "paddingOuter": 0.15}}
    return {"field": "x", "type": "ordinal", "sort": names, "axis": _axis(chart.x_title, **tilt)}


def _heights(chart: Chart, values: list[Spec]) -> Spec:
    """The axis of y; its title stands above the drawing, but below where the chart is lying."""
    if chart.y_range:
        scale = {"domain": list(chart.y_range), "nice": False}
    else:
        columns = ("y", "low", "high", *(f"also{place}" for place in range(len(chart.also))))
        shown = [value[column] for value in values for column in columns] + [x for line in chart.lines for x in (line.at, line.low, line.high)]
        low, high = _extent([*shown, *([0.0] if chart.kind == "bars" and not chart.lying else [])])
        room = 0.0 if chart.kind == "bars" and not chart.lying else (high - low) * 0.04
        scale = {"domain": [low - room, high + room], "nice": chart.kind == "bars", "zero": False}
    axis = _axis(chart.y_title, grid=True) if chart.lying else {"title": None}
    return {"field": "seen_y", "type": "quantitative", "scale": scale, "axis": axis, "stack": None}


def _extent(numbers: list[float | None]) -> tuple[float, float]:
    """Least and most; something around a single number."""
    known = [x for x in numbers if x is not None] or [0.0, 1.0]
    low, high = min(known), max(known)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _cells(chart: Chart, values: list[Spec]) -> Spec:
    """Cells coloured by `value`: shares from 0 to 1, and numbers of either sign around zero."""
    known = [value["value"] for value in values if value["value"] is not None]
    far = max(map(abs, known), default=1.0)
    if known and min(known) < 0 < max(known):
        scale: Spec = {"scheme": "blueorange", "domain": [-far, far]}
    else:
        scale = {"scheme": "viridis", **({"domain": [0, 1]} if known and 0 <= min(known) <= max(known) <= 1 else {})}
    legend = {"title": brief(chart.value_title or chart.value, LONGEST), "orient": "top", "direction": "horizontal"}
    across, down = (_ordered(list(dict.fromkeys(value[name] for value in values))) for name in ("x", "y"))
    down = down[::-1] if _numeric(down) else down
    encoding = {
        "x": {"field": "x", "type": "ordinal", "sort": across, "axis": _axis(chart.x_title, labelAngle=0 if max(map(len, across)) < 8 else -35)},
        "y": {"field": "y", "type": "ordinal", "sort": down, "axis": _axis(chart.y_title)},
        "color": {"field": "value", "type": "quantitative", "scale": scale, "legend": legend},
        "tooltip": tooltip(chart, values),
    }
    return {"mark": {"type": "rect", "style": "cell-of-heat"}, "encoding": encoding}


def _numeric(names: list[str]) -> bool:
    return all(number(name.lstrip("×")) is not None for name in names)


def _ordered(names: list[str]) -> list[str]:
    """By size where they are numbers, else as they came."""
    return sorted(names, key=lambda name: number(name.lstrip("×")) or 0.0) if _numeric(names) else names


def tooltip(chart: Chart, values: list[Spec]) -> list[Spec]:
    """What hovering shows, the columns that hold something alone."""
    wanted = [
        ("series", _words(chart.series)),
        ("dash", _words(chart.dash)),
        ("panel", _words(chart.panel)),
        ("pick", _words(chart.pick)),
        ("x_told", chart.x_title or _words(chart.x)),
        *([("y", chart.y_title or _words(chart.y))] if chart.kind == "heat" else []),
        ("told", (chart.value_title or _words(chart.value)) if chart.kind == "heat" else chart.y_title or _words(chart.y)),
        ("interval", "95% interval"),
        ("n", "n"),
        *((f"also{place}_told", name) for place, name in enumerate(chart.also.values() if chart.kind != "heat" else ())),
    ]
    return [
        {"field": field, "type": "nominal", "title": brief(name, LONGEST)} for field, name in wanted if name and any(value[field] != "" for value in values)
    ]


def _words(column: str | None) -> str:
    return (column or "").replace("_", " ")


def _references(chart: Chart, names: list[str]) -> list[Spec]:
    """A straight line each, and its interval."""
    up = "x" if chart.lying else "y"
    made: list[Spec] = []
    for place, name in enumerate(names):
        own = [{"filter": f"datum.line === {place}"}]
        if any(line.low is not None for line in chart.lines if line.name == name):
            between = {up: {"field": "line_low", "type": "quantitative"}, f"{up}2": {"field": "line_high"}}
            made.append({"transform": own, "mark": {"type": "rect", "style": "reference-band", "clip": True}, "encoding": between})
        at = {up: {"field": "at", "type": "quantitative"}, "tooltip": [{"field": "told", "type": "nominal", "title": "Reference"}]}
        made.append({"transform": own, "mark": {"type": "rule", "style": "reference", "strokeDash": DASHES[place % len(DASHES)], "clip": True}, "encoding": at})
    return made

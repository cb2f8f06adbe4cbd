"""What all figures share: colours, markers, print sizes, numbers with intervals, and how a figure becomes files. Knows no figure.

Colours are the Okabe-Ito set, told apart by the colour-blind; every line has its own marker, every rate its interval.
"""

import csv
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure

from latentguard.charts import Line, Plot

Rows = Sequence[Mapping[str, Any]]
_Given = ParamSpec("_Given")
# Inches: a column of a two-column page, and both.
SINGLE, DOUBLE = 3.3, 6.8
DPI = 200  # words are measured as they are saved: hinting makes them wider on coarser grids
GREY, INK, PALE = "#555555", "#222222", "#DDDDDD"
# Orange, blue, green, purple, yellow, sky, black: in this order where lines have no colour of their own.
OKABE_ITO = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Perceptually uniform, and the same to the colour-blind.
COLORMAP = "cividis"
# Sizes in points as printed at the figure's own size; text stays text in vectors; no run differs from the next.
RC: Mapping[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 6.8,
    "ytick.labelsize": 6.8,
    "legend.fontsize": 7,
    "figure.titlesize": 8.5,
    "figure.titleweight": "bold",
    "figure.labelsize": 7.5,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.6,
    "errorbar.capsize": 1.6,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "latentguard",
    "pdf.fonttype": 42,
    "savefig.facecolor": "white",
}
_UNDATED: Mapping[str, Mapping[str, None]] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
# Directions: colour, marker, dashes, name.
STYLE = {
    "none": (GREY, "", "--", "no steering"),
    "harm": ("#D55E00", "o", "-", "+ harmfulness (at t_inst)"),
    "refuse": ("#0072B2", "s", "-", "+ refusal (at t_post_inst)"),
    "random": ("#009E73", "^", ":", "+ random, equal norm"),
}
# Groups of prompts: colour, marker, name.
GROUPS = {
    "refused_harmful": ("#D55E00", "o", "refused harmful"),
    "accepted_harmful": ("#E69F00", "^", "accepted harmful"),
    "refused_harmless": ("#56B4E9", "D", "refused harmless"),
    "accepted_harmless": ("#0072B2", "s", "accepted harmless"),
    "harmful": ("#8C3B00", "v", "harmful, by label"),
    "harmless": ("#003F5C", "P", "harmless, by label"),
    "template": ("#CC79A7", "^", "jailbreak: template"),
    "suffix": ("#009E73", "D", "jailbreak: suffix"),
    "persuasion": ("#000000", "X", "jailbreak: persuasion"),
    "elsewhere": ("#7F7F7F", "P", "another data set"),
}


def in_style(draw: Callable[_Given, Plot]) -> Callable[_Given, Plot]:
    """A plot function that draws in the house's style, whatever the reader's matplotlibrc; without rows it says so."""

    @functools.wraps(draw)
    def styled(*given: _Given.args, **named: _Given.kwargs) -> Plot:
        with matplotlib.style.context(["default", dict(RC)]):
            if given and isinstance(given[0], Sequence) and not given[0]:
                figure = figure_of(SINGLE, 1.0)
                figure.text(0.5, 0.4, "no rows: nothing to draw", ha="center", color=GREY)
                return Plot(figure, str(named.get("title", "nothing to draw")), "There are no rows to draw.")
            return draw(*given, **named)

    return styled


def save(figure: Figure, stem: Path) -> None:
    """`stem`.png (`DPI` dots an inch), .svg and .pdf, each whole or not at all. The same figure gives the same bytes."""
    with matplotlib.style.context(["default", dict(RC)]):
        for kind, undated in _UNDATED.items():
            partial = stem.with_name(f".{stem.name}.{os.getpid()}.{kind}")
            try:
                figure.savefig(partial, format=kind, dpi=DPI, metadata=dict(undated))
                partial.replace(stem.with_name(f"{stem.name}.{kind}"))
            finally:
                partial.unlink(missing_ok=True)


def keep(figure: Figure, stem: Path, rows: Rows) -> None:
    """The figure as `save` has it, and the numbers in it beside it: `stem`.csv."""
    save(figure, stem)
    with stem.with_name(f"{stem.name}.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def group_style(name: str) -> tuple[str, str, str]:
    """Colour, marker and name of a group of prompts; one that a user named is grey, by its own name."""
    return GROUPS.get(name, ("#7F7F7F", "*", name.replace("_", " ")))


def figure_of(width: float, height: float) -> Figure:
    """An empty figure, in inches; title and legend come on top when it is composed."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05, wspace=0.03, hspace=0.03)  # type: ignore[union-attr]
    return figure


def panels(many: int, height: float, *, across: int = 3, width: float = DOUBLE, **shared: Any) -> tuple[Figure, list[Any]]:
    """A figure of `many` panels, at most `across` in a row, each row `height` inches; axes are shared as subplots() is told."""
    across = 2 if many == 4 else min(across, many)
    down = math.ceil(many / across)
    figure = figure_of(width, height * down)
    grid = figure.subplots(down, across, squeeze=False, **shared)
    for spare in grid.flat[many:]:
        spare.set_axis_off()
    return figure, [plain(axis) for axis in grid.flat[:many]]


def outer(axes: Sequence[Any]) -> None:
    """Of panels with one x and one y, only the lowest of a column and the first of a row keep the axis' name and its ticks'."""
    places = [axis.get_subplotspec() for axis in axes]
    lowest = {place.colspan.start: max(p.rowspan.start for p in places if p.colspan.start == place.colspan.start) for place in places}
    for axis, place in zip(axes, places, strict=True):
        below, left = place.rowspan.start == lowest[place.colspan.start], place.colspan.start == 0
        axis.tick_params(labelbottom=below, labelleft=left)
        axis.set(xlabel=axis.get_xlabel() if below else "", ylabel=axis.get_ylabel() if left else "")


def plain(axis: Any) -> Any:
    """Without the box's upper and right sides."""
    axis.spines[["top", "right"]].set_visible(False)
    return axis


def distinct(rows: Rows, column: str) -> list[Any]:
    """A column's values, each once, in the rows' order."""
    return list(dict.fromkeys(row[column] for row in rows))


def column(rows: Rows, name: str) -> list[float]:
    """Numbers of a column; what is none is NaN, which leaves a gap."""
    return [number(row.get(name)) for row in rows]


def number(value: Any) -> float:
    """A float; NaN for None and for what a CSV has as an empty field."""
    return math.nan if value is None or value == "" else float(value)


def whiskers(rows: Rows, value: str, low: str = "low", high: str = "high") -> list[list[float]]:
    """What errorbar takes: how far the interval reaches below and above the value, never under 0."""
    at = column(rows, value)
    return [
        [max(0.0, a - b) if a == a and b == b else 0.0 for a, b in zip(at, column(rows, low), strict=True)],
        [max(0.0, b - a) if a == a and b == b else 0.0 for a, b in zip(at, column(rows, high), strict=True)],
    ]


def line_with_band(axis: Any, rows: Rows, x: str, y: str, colour: str, *, low: str = "low", high: str = "high", alpha: float = 0.15, **look: Any) -> Any:
    """Draw y by x, and the band of its 95% interval: a whisker for a point without a neighbour. Returns the line."""
    at, values, lows, highs = (column(rows, name) for name in (x, y, low, high))
    axis.fill_between(at, lows, highs, color=colour, alpha=alpha, linewidth=0)
    there = [value == value for value in values]
    for i, known in enumerate(there):
        if known and not any(there[i - 1 : i] + there[i + 1 : i + 2]) and lows[i] == lows[i]:
            axis.plot([at[i]] * 2, [lows[i], highs[i]], color=colour, linewidth=1)
    (line,) = axis.plot(at, values, color=colour, **look)
    return line


def reference(row: Mapping[str, Any], name: str, value: str = "rate", *, low: str = "low", high: str = "high", panel: str | None = None) -> tuple[Line, ...]:
    """A row as a chart's reference line, with its interval where it has one; none where there is no number."""
    at, below, above = (number(row.get(key)) for key in (value, low, high))
    if at != at:
        return ()
    return (Line(at, name, below if below == below else None, above if above == above else None, row.get("n"), panel),)


def counted(rows: Rows) -> str:
    """`n = 40`, or n = 30–40 where rows differ."""
    sizes = sorted({int(row["n"]) for row in rows if row.get("n") not in (None, "")})
    if not sizes:
        return "n = ?"
    return f"n = {sizes[0]}" if len(sizes) == 1 else f"n = {sizes[0]}–{sizes[-1]}"


def ink(colour: str, least: float = 4.5) -> str:
    """A colour dark enough to be read as text on white: its contrast (WCAG) is at least `least`."""
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    while 1.05 / (luminance(rgb) + 0.05) < least:
        rgb = [0.95 * part for part in rgb]
    return "#" + "".join(f"{int(255 * part):02X}" for part in rgb)


def luminance(rgb: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2), 0 to 1."""
    return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), rgb, strict=True))

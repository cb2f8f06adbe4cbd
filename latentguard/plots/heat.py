"""Cells of a heat map: a colour each, its number and, small, its interval where they fit. Knows no figure."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from latentguard.plots.style import COLORMAP, Rows, luminance, number

_NUMBER, _INTERVAL = 6.2, 4.8  # points


def cells(axis: Any, rows: Rows, value: str) -> None:
    """A unit square at each row's x and y (cell numbers), coloured by `value` from 0 to 1; what is no number stays white, with a dash.

    To be called when the layout is done: what is written depends on how large a cell is. Below 0 has the colour of 0, above 1 of 1.
    """
    (x0, y0), (x1, y1) = axis.transData.transform([(0, 0), (1, 1)])
    wide, high = abs(x1 - x0), abs(y1 - y0)
    told = [(row, _short(number(row.get(value))), _interval(row)) for row in rows]
    numbered = _fits(axis, [text for _, text, _ in told], _NUMBER, wide, high)
    spreads = numbered and _fits(axis, [spread for _, _, spread in told], _INTERVAL, wide, high - 1.15 * _NUMBER / 72 * axis.figure.dpi)
    for row, text, spread in told:
        at = number(row.get(value))
        colour = to_hex(colormaps[COLORMAP](min(max(at, 0.0), 1.0))) if at == at else "#FFFFFF"
        axis.add_patch(Rectangle((row["x"] - 0.5, row["y"] - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.4))
        dark = luminance([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]) < 0.18
        ink = "white" if dark else "black"
        if numbered:
            shift = (0, 3.2 if spreads and spread else 0)
            axis.annotate(text, (row["x"], row["y"]), shift, textcoords="offset points", ha="center", va="center", fontsize=_NUMBER, color=ink)
        if spreads and spread:
            axis.annotate(spread, (row["x"], row["y"]), (0, -3.8), textcoords="offset points", ha="center", va="center", fontsize=_INTERVAL, color=ink)


def colour_scale() -> ScalarMappable:
    """From 0 to 1, for a colour bar."""
    return ScalarMappable(cmap=colormaps[COLORMAP])


def interval(row: Mapping[str, Any], value: str = "rate") -> str:
    """0.07 [0.03, 0.20]; without the interval where the row has none, a dash where it has no number."""
    at, low, high = (number(row.get(key)) for key in (value, "low", "high"))
    return "–" if at != at else f"{at:.2f}" + (f" [{low:.2f}, {high:.2f}]" if math.isfinite(low) else "")


def _interval(row: Mapping[str, Any]) -> str:
    low, high = number(row.get("low")), number(row.get("high"))
    return f"{_short(low)}–{_short(high)}" if math.isfinite(low) and math.isfinite(high) else ""


def _short(value: float) -> str:
    """Two decimals without the 0 before the point."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:.2f}"
    return {"1.00": "1", "0.00": "0", "-0.00": "0", "-1.00": "−1"}.get(text, text.replace("0.", ".").replace("-", "−"))


def _fits(axis: Any, texts: list[str], size: float, wide: float, high: float) -> bool:
    """Whether the longest of them fits in a cell."""
    longest = max(texts, key=len, default="")
    if not longest:
        return False
    probe = axis.figure.text(0, 0, longest, fontsize=size)
    box = probe.get_window_extent()
    probe.remove()
    gap = 0.02 * axis.figure.dpi
    return box.width + gap <= wide and box.height + gap <= high

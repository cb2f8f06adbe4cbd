"""Where the words of a figure stand: its title, names at the ends of lines or a legend, ticks. Knows no figure.

Everything is measured with a renderer, so that long names wrap and nothing lies over another or over the edge.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FixedLocator, MaxNLocator

from latentguard.plots.style import ink, number

_MOST = 5  # lines that are named at their ends; more get a legend
_FAR = 0.33  # of the axis: how far a name may stand from the height of its line's end
LABEL = "end of a line"  # the gid of such a name
_NAME = "name of a category"
_TOGETHER = re.compile(r"\bn = (?=\S)")  # n and its number stay on one line


@dataclass(frozen=True)
class Named:
    """A line and what it is called. `end` is its last point in the last panel (data units), None where it is not there."""

    text: str
    handle: Any
    colour: str = "#000000"
    end: tuple[float, float] | None = None


def compose(figure: Figure, title: str, named: Sequence[Named] = (), axis: Any = None) -> Figure:
    """The title above, names at the lines' ends right of `axis` or else in a legend below; then words are wrapped, ticks
    thinned, and the layout is frozen.

    Names stand at the ends where `axis` is given, they are at most five, each line has an end, and there is room.
    """
    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):
        text.set_text(drawable(text.get_text()))
    head = figure.suptitle(fitted(figure, title, 0.97 * _wide(figure), size=8.5, weight="bold"), x=0.012, ha="left")
    _grow(figure, head.get_window_extent().height)
    at_ends = axis is not None and 1 <= len(named) <= _MOST and all(line.end for line in named)
    labels = _at_ends(figure, axis, named) if at_ends else []
    if not labels and named:
        _legend(figure, named)
    _settle(figure)
    if labels and not _spread(axis, labels):
        for label in labels:
            label.remove()
        _legend(figure, named)
        _settle(figure)
    figure.set_layout_engine("none")
    return figure


def fitted(figure: Figure, text: str, room: float, *, size: float = 7.5, weight: str = "normal") -> str:
    """Text broken so that no line is wider than `room` pixels; a word that is too long is broken, at a stroke where it has one."""
    lines: list[str] = []

    def wide(words: str) -> bool:
        return _measured(words, size, weight, figure.dpi) > room

    for part in _TOGETHER.sub("n\u00a0=\u00a0", drawable(text)).split("\n"):
        line = ""
        for word in part.split(" "):
            tried = f"{line} {word}" if line else word
            if line and wide(tried):
                lines.append(line)
                tried = word
            while len(tried) > 1 and wide(tried):
                most = max(1, bisect_left(range(1, len(tried)), True, key=lambda i: wide(tried[:i])))
                cut = max(tried.rfind(c, 1, most) + 1 for c in "/-_·")
                cut = cut if cut > most // 2 else most
                lines.append(tried[:cut])
                tried = tried[cut:]
            line = tried
        lines.append(line)
    return "\n".join(lines).replace("\u00a0", " ")


def wrapped(name: str, width: int, most: int = 3) -> str:
    """A name in lines of at most `width` characters, at most `most` lines: broken at blanks and strokes, then anywhere."""
    lines, rest = [], _TOGETHER.sub("n\u00a0=\u00a0", drawable(name).replace("\n", " "))
    while len(rest) > width:
        cut = max(rest.rfind(c, 1, width) + 1 for c in " /-_:·+")
        cut = cut if cut > width // 3 else width
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    lines.append(rest)
    return "\n".join(lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][: width - 1] + "…"]).replace("\u00a0", " ")


def drawable(text: str) -> str:
    """With a box for what the font has no sign for and for control characters; line breaks stay."""
    return "".join(c if c == "\n" or (c.isprintable() and ord(c) in _signs()) else "□" for c in text)


def end(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[float, float] | None:
    """The last point of a line that is a number."""
    return max(((number(row[x]), number(row[y])) for row in rows if math.isfinite(number(row.get(y)))), default=None)


def places(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float] | None:
    """Centres of labels of these heights, as near to where they are wanted as can be without overlap within low … high.

    None where they do not fit. Least squares: the isotonic regression of what is wanted, less the heights below.
    """
    total = sum(heights)
    if total > high - low:
        return None
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    below = [sum(heights[j] for j in order[:place]) + heights[i] / 2 for place, i in enumerate(order)]
    pools: list[tuple[float, int]] = []
    for i, offset in zip(order, below, strict=True):
        value, size = wanted[i] - offset, 1
        while pools and pools[-1][0] > value:
            before, many = pools.pop()
            value, size = (before * many + value * size) / (many + size), many + size
        pools.append((value, size))
    free = [value for value, size in pools for _ in range(size)]
    found = {i: min(max(value, low), high - total) + offset for i, value, offset in zip(order, free, below, strict=True)}
    return [found[i] for i in range(len(wanted))]


def whole_ticks(axis: Any) -> None:
    """Ticks at whole layers, as many as fit."""
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def layer_ticks(axis: Any, values: Sequence[float]) -> None:
    """A tick at each; the names of those that would touch are left out when the figure is composed."""
    at = sorted(set(values))
    axis.set_xticks(at, [f"{value:g}" for value in at])


def name_ticks(axis: Any, names: Sequence[str]) -> None:
    """A name at each of 0, 1, … of the x axis; turned when the figure is composed, where they would touch."""
    axis.set_xticks(range(len(names)), [drawable(name) for name in names])
    for label in axis.get_xticklabels():
        label.set_gid(_NAME)


def _at_ends(figure: Figure, axis: Any, named: Sequence[Named]) -> list[Annotation]:
    """Names right of the axis, still one over the other; none where they would take more than a third of the figure."""
    texts = [re.sub(r",? (?=\()|,? (?=n = )|, ", "\n", drawable(line.text)) for line in named]
    if max(_measured(part, 7, "normal", figure.dpi) for text in texts for part in text.split("\n")) > 0.34 * _wide(figure):
        return []
    found = []
    for line, text in zip(named, texts, strict=True):
        lead = {"arrowstyle": "-", "color": line.colour, "linewidth": 0.6, "alpha": 0.7, "shrinkA": 1, "shrinkB": 2.5, "relpos": (0, 0.5)}
        label = axis.annotate(
            text, line.end, (1.06, 0.5), xycoords="data", textcoords="axes fraction", va="center", ha="left", fontsize=7,
            color=ink(line.colour), arrowprops=lead, annotation_clip=False, linespacing=1.05,
        )  # fmt: skip
        label.set_gid(LABEL)
        found.append(label)
    return found


def _spread(axis: Any, labels: Sequence[Annotation]) -> bool:
    """Each label as near to its line's end as there is room; False where that is nowhere near."""
    frame, over = axis.get_window_extent(), 0.04 * axis.figure.dpi
    heights = [_box(label).height + 0.03 * label.figure.dpi for label in labels]
    wanted = [float(axis.transData.transform(label.xy)[1]) for label in labels]
    found = places(wanted, heights, frame.y0 - over, frame.y1 + over)
    if found is None or max(abs(a - b) for a, b in zip(found, wanted, strict=True)) > _FAR * frame.height:
        return False
    for label, at in zip(labels, found, strict=True):
        label.set_position((1.06, (at - frame.y0) / frame.height))
    return True


def _box(label: Annotation) -> Any:
    """Of its text, without the line that leads to it."""
    return super(Annotation, label).get_window_extent()


def _legend(figure: Figure, named: Sequence[Named]) -> None:
    """Below the figure, in as many columns as fit."""
    texts = [fitted(figure, line.text, 0.97 * _wide(figure) - 0.5 * figure.dpi, size=7) for line in named]
    for many in range(min(6, len(named)), 0, -1):
        legend = figure.legend(
            [line.handle for line in named], texts, loc="outside lower center", ncols=many, frameon=False,
            columnspacing=1.4, handlelength=2.4, handletextpad=0.6, labelspacing=0.35,
        )  # fmt: skip
        if many == 1 or legend.get_window_extent().width <= 0.98 * _wide(figure):
            _grow(figure, legend.get_window_extent().height)
            return
        legend.remove()


def _grow(figure: Figure, pixels: float) -> None:
    """Higher, so that what is added takes no room from the panels."""
    figure.set_figheight(figure.get_figheight() + pixels / figure.dpi)


def _settle(figure: Figure) -> None:
    """Lays the figure out, wraps what is too long, makes room for it, and holds the ticks that came of it."""
    _lay_out(figure)
    high = _high(figure)
    for axis in figure.axes:
        _wrap(figure, axis)
        _thin(axis)
    _lay_out(figure)
    _grow(figure, max(0.0, high - _high(figure)))
    _lay_out(figure)
    for axis in figure.axes:
        _wrap(figure, axis)
        _thin(axis)
        for side in (axis.xaxis, axis.yaxis):
            if isinstance(side.get_major_locator(), MaxNLocator):
                low, high = sorted(side.get_view_interval())
                side.set_ticks([tick for tick in side.get_majorticklocs() if low <= tick <= high])
    _lay_out(figure)


def _high(figure: Figure) -> float:
    """How high the panels of a column are together, in pixels."""
    rows: dict[int, float] = {}
    for axis in figure.axes:
        if place := axis.get_subplotspec():
            rows[place.rowspan.start] = min(rows.get(place.rowspan.start, math.inf), axis.get_window_extent().height)
    return sum(rows.values())


def _lay_out(figure: Figure) -> None:
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)


def _wrap(figure: Figure, axis: Any) -> None:
    """A panel's title and the name of its x no wider than the panel, the name of its y no longer than it is high."""
    frame = axis.get_window_extent()
    for side in ("left", "center"):
        if words := axis.get_title(side):
            axis.set_title(fitted(figure, words.replace("\n", " "), 1.05 * frame.width), loc=side)
    if axis.get_xlabel():
        axis.set_xlabel(fitted(figure, axis.get_xlabel().replace("\n", " "), 1.02 * frame.width))
    if axis.get_ylabel():
        axis.set_ylabel(fitted(figure, axis.get_ylabel().replace("\n", " "), max(1.1 * frame.height, 0.6 * figure.dpi)))


def _thin(axis: Any) -> None:
    """Of ticks whose names would touch every second is named, or every third …; names of categories are turned instead."""
    if not isinstance(axis.xaxis.get_major_locator(), FixedLocator):
        return
    labels = [label for label in axis.get_xticklabels() if label.get_visible()]
    boxes = [label.get_window_extent() for label in labels]
    texts, gap = [label.get_text() for label in labels], 0.04 * axis.figure.dpi
    stride = next((n for n in range(1, len(boxes)) if all(b.x0 >= a.x1 + gap for a, b in zip(boxes[::n], boxes[n::n], strict=False))), max(1, len(boxes)))
    if stride == 1 or any(label.get_rotation() for label in labels) or not all(texts):
        return
    if any(label.get_gid() == _NAME for label in labels):
        lines = int(axis.get_window_extent().width / len(labels) / (8.5 / 72 * axis.figure.dpi))
        axis.set_xticks(axis.get_xticks(), [_turned(text, lines) for text in texts], rotation=90)
    else:
        axis.set_xticks(axis.get_xticks(), [text if i % stride == 0 else "" for i, text in enumerate(texts)])


def _turned(text: str, lines: int) -> str:
    """A name of several lines in at most so many longer ones; the last, often n, stays whole."""
    first, _, last = text.rpartition("\n")
    first = first.replace("\n", " ")
    return f"{wrapped(first, 30, lines - 1)}\n{last}" if lines > 1 else f"{wrapped(first, 30, 1)} {last}".strip()


def _wide(figure: Figure) -> float:
    return figure.get_figwidth() * figure.dpi


@lru_cache(20_000)
def _measured(text: str, size: float, weight: str, dpi: float) -> float:
    return _renderer(dpi).get_text_width_height_descent(text, FontProperties("DejaVu Sans", size=size, weight=weight), ismath=False)[0]  # type: ignore[arg-type]


@cache
def _renderer(dpi: float) -> RendererAgg:
    return RendererAgg(1, 1, dpi)


@cache
def _signs() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())

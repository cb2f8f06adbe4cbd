"""Figures of several runs: numbers with intervals one under the other, and one line a run. Knows no study."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from latentguard.charts import Chart, Line, Plot
from latentguard.plots.style import Rows, figure_of, plain

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C3B00", "#7F7F7F")
_MARKERS = "osD^vPX*"  # another number than of colours, so that both together repeat late
_MOST = 24  # names in one panel: more cannot be read


def forest(rows: Rows, *, title: str, caption: str, what: str, name: str, series: str | None, panel: str | None = None, zero: bool = False) -> Plot:
    """A dot and its 95% interval a row, names at the left. Rows: `name`, value, low, high, n, and the columns `series` and `panel`.

    Args:
        what: the axis in words.
        zero: draw the line of no difference.
    """
    panels = list(dict.fromkeys(row[panel] for row in rows)) if panel else [None]
    kinds = list(dict.fromkeys(row[series] for row in rows)) if series else [None]
    parts = [_first([row for row in rows if panel is None or row[panel] == one], name) for one in panels]
    heights = [len(dict.fromkeys(row[name] for row in part)) * max(1.0, 0.55 * len(kinds)) * 0.27 + 0.35 for part in parts]
    figure = figure_of(6.8, sum(heights) + 0.75)
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, part, one in zip(axes, parts, panels, strict=True):
        plain(axis)
        names = list(dict.fromkeys(row[name] for row in part))
        for k, kind in enumerate(kinds):
            own = [row for row in part if series is None or row[series] == kind]
            shift = (k - (len(kinds) - 1) / 2) * (0.7 / max(len(kinds), 2))
            at = [names.index(row[name]) + shift for row in own]
            colour, marker = COLOURS[k % len(COLOURS)], _MARKERS[k % len(_MARKERS)]
            for y, row in zip(at, own, strict=True):
                if _there(row, "low") and _there(row, "high"):
                    axis.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.4, solid_capstyle="butt")
            dots = [(row["value"], y) for y, row in zip(at, own, strict=True) if _there(row, "value")]
            axis.plot([x for x, _ in dots], [y for _, y in dots], color=colour, marker=marker, markersize=4.5, linestyle="none", label=str(kind))
        if zero:
            axis.axvline(0, color="#555555", linewidth=0.8, linestyle="--")
        axis.set_yticks(range(len(names)), [_short(n) for n in names], fontsize=7.5)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.tick_params(axis="x", labelsize=7.5)
        if one is not None:
            axis.set_title(_short(str(one), 90), fontsize=8.5, loc="left")
    axes[-1].set_xlabel(what, fontsize=8)
    if len(kinds) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(kinds)), frameon=False, fontsize=7.5)
    figure.suptitle(title, fontsize=9.5)
    chart = Chart(
        kind="bars", x=name, y="value", x_title="", y_title=what, series=series, panel=panel, lying=True,
        colours={str(kind): COLOURS[k % len(COLOURS)] for k, kind in enumerate(kinds) if kind is not None}, lines=(Line(0, "no difference"),) if zero else (),
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


def overlaid(rows: Rows, chart: Chart, *, title: str, caption: str, run: str = "run") -> tuple[Plot, list[dict]]:
    """A line figure of several runs drawn into one: a line a run, a panel for what was a line and a panel before.

    Args:
        rows: the figures' rows, each with the name of its run in `run`.
        chart: what a single run's figure shows.

    Returns:
        The figure, and its rows with the column `panel`.
    """
    keys = [key for key in (chart.panel, chart.pick, chart.series, chart.dash) if key]
    told = [{**row, "panel": " · ".join(_named(chart, key, row[key]) for key in keys if key in row) or title} for row in rows]
    panels, runs = (list(dict.fromkeys(row[key] for row in told)) for key in ("panel", run))
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = figure_of(max(3.3, 2.3 * across), 2.1 * down + 0.8)
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        plain(axis)
        axis.set_title(_short(panel, 38), fontsize=8)
        axis.tick_params(labelsize=7)
        for k, one in enumerate(runs):
            line = sorted((r for r in told if r["panel"] == panel and r[run] == one and _there(r, chart.y) and _there(r, chart.x)), key=lambda r: r[chart.x])
            at, colour = [row[chart.x] for row in line], COLOURS[k % len(COLOURS)]
            axis.plot(at, [row[chart.y] for row in line], color=colour, marker=_MARKERS[k % len(_MARKERS)], markersize=3, linewidth=1.1, label=one)
            low, high = chart.low, chart.high
            if low and high and all(_there(row, low) and _there(row, high) for row in line):
                axis.fill_between(at, [row[low] for row in line], [row[high] for row in line], color=colour, alpha=0.15, linewidth=0)
        if chart.y_range:
            axis.set_ylim(*chart.y_range)
    figure.supxlabel(chart.x_title, fontsize=8)
    figure.supylabel(chart.y_title, fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(runs)), frameon=False, fontsize=7.5)
    figure.suptitle(title, fontsize=9.5)
    colours: Mapping[str, str] = {one: COLOURS[k % len(COLOURS)] for k, one in enumerate(runs)}
    return Plot(figure, title, caption, replace(chart, series=run, panel="panel", dash=None, pick=None, also={}, names={}, colours=colours, lines=())), told


def _first(rows: Rows, name: str) -> list[Mapping]:
    """Those of the first so many names."""
    shown = list(dict.fromkeys(row[name] for row in rows))[:_MOST]
    return [row for row in rows if row[name] in shown]


def _named(chart: Chart, key: str, value: object) -> str:
    text = str(value)
    return chart.names.get(text, f"{key} {text}" if isinstance(value, int | float) else text)


def _there(row: Mapping, key: str) -> bool:
    value = row.get(key)
    return isinstance(value, int | float) and math.isfinite(value)


def _short(text: object, most: int = 60) -> str:
    words = str(text)
    return words if len(words) <= most else f"{words[: most - 1]}…"


def shared(figures: Sequence[Mapping[str, object]]) -> list[str]:
    """The names that all have, in the first one's order."""
    return [name for name in figures[0] if all(name in other for other in figures[1:])] if figures else []

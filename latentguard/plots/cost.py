"""The figure of cost against size. Knows no benchmark."""

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from latentguard.plots.style import Rows, figure_of, plain

_CURVES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")


def cost_by_size(rows: Rows, *, title: str, unit: str) -> Figure:
    """Seconds against size on log axes, a panel a curve, with a dashed line of slope 1 through the largest size.

    Seconds are the least of some rounds; the bar ends at the most. Rows: curve, size, seconds, high, slope.
    """
    curves = list(dict.fromkeys(row["curve"] for row in rows))
    figure = figure_of(4.1 * len(curves) + 0.4, 3.8)
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, curve, colour in zip(axes, curves, _CURVES, strict=False):
        here = [row for row in rows if row["curve"] == curve]
        sizes, costs = [row["size"] for row in here], [row["seconds"] for row in here]
        spread = [[0.0] * len(here), [row["high"] - row["seconds"] for row in here]]
        plain(axis).errorbar(sizes, costs, yerr=spread, color=colour, marker="o", markersize=4, capsize=2, linewidth=1.3, label=f"slope {here[0]['slope']:.2f}")
        axis.plot(sizes, [costs[-1] * size / sizes[-1] for size in sizes], color="#555555", linestyle="--", linewidth=1, label="slope 1: linear")
        axis.set(xscale="log", yscale="log", xlabel=curve)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(LogLocator(subs=(1.0, 4.0)))
            ticks.set_major_formatter("{x:g}")
            ticks.set_minor_formatter(NullFormatter())
        axis.legend(frameon=False, fontsize=9)
    axes[0].set_ylabel(unit)
    figure.suptitle(title, fontsize=10.5)
    return figure

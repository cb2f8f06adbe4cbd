"""The figure of cost against size. Knows no benchmark."""

from matplotlib.ticker import LogLocator, NullFormatter

from latentguard.charts import Chart, Plot
from latentguard.plots.style import GREY, OKABE_ITO, Rows, column, distinct, in_style, panels
from latentguard.plots.words import compose


@in_style
def cost_by_size(rows: Rows, *, title: str, unit: str) -> Plot:
    """Seconds against size on log axes, a panel a curve, with a dashed line of slope 1 through the largest size.

    Seconds are the least of some rounds; the bar ends at the most. Rows: curve, size, seconds, high, slope.
    """
    curves = distinct(rows, "curve")
    figure, axes = panels(len(curves), 2.1)
    for i, (axis, curve) in enumerate(zip(axes, curves, strict=True)):
        here = [row for row in rows if row["curve"] == curve]
        sizes, costs = column(here, "size"), column(here, "seconds")
        spread = [[0.0] * len(here), [max(0.0, high - low) for low, high in zip(costs, column(here, "high"), strict=True)]]
        axis.errorbar(sizes, costs, yerr=spread, color=OKABE_ITO[i % 7], marker="o", label=f"slope {here[0]['slope']:.2f}")
        axis.plot(sizes, [costs[-1] * size / sizes[-1] for size in sizes], color=GREY, linestyle="--", linewidth=0.9, label="slope 1: linear")
        axis.set(xscale="log", yscale="log", xlabel=curve)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(LogLocator(subs=(1.0, 4.0), numticks=5))
            ticks.set_major_formatter("{x:g}")
            ticks.set_minor_formatter(NullFormatter())
        axis.legend(frameon=False, loc="upper left")
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(unit)
    compose(figure, title)
    caption = "Time by size on log axes, a panel a curve: the least of some rounds, the whisker up to the most. The dashed line has slope 1 and ends at the largest size."
    chart = Chart("line", "size", "seconds", "size", unit, panel="curve", low="seconds", high="high", n=None, colours={})
    return Plot(figure, title, caption, chart)

"""Figures of a fitted guard: what it says beside what came, families it never saw, and how much data it took. Knows no guard."""

from latentguard.charts import Chart, Line, Plot
from latentguard.plots.comparing import forest
from latentguard.plots.style import GREY, OKABE_ITO, PALE, SINGLE, Rows, column, counted, figure_of, in_style, plain, whiskers
from latentguard.plots.words import compose


@in_style
def reliability_curve(rows: Rows, *, title: str) -> Plot:
    """The share of harmful prompts by the probability that was said, in bins of equal numbers of prompts. Rows: said, rate, low, high, n."""
    figure = figure_of(SINGLE, 2.9)
    axis = plain(figure.subplots())
    axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=0.8)
    axis.errorbar(column(rows, "said"), column(rows, "rate"), yerr=whiskers(rows, "rate"), color=OKABE_ITO[1], marker="o", elinewidth=0.9)
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="probability of harm that the guard says", ylabel="share that is harmful")
    axis.grid(color=PALE, linewidth=0.5)
    compose(figure, title)
    caption = f"Held-out prompts in bins of equal numbers, {counted(rows)} a bin: the mean probability said, and the share that is harmful with its Wilson 95% "
    caption += "interval. On the dashed line every probability comes true."
    chart = Chart("points", "said", "rate", "probability said", "share that is harmful", x_range=(0, 1), y_range=(0, 1))
    return Plot(figure, title, caption, chart)


@in_style
def unseen_families(rows: Rows, *, title: str) -> Plot:
    """AUROC with intervals, a row a comparison, a colour a detector. Rows: set, comparison, detector, value, low, high, n."""
    caption = "AUROC on prompts of families of sets that neither probe nor baseline was fitted on, with bootstrap 95% intervals: the guard, and a logistic "
    caption += "regression on words and pairs of words weighed by TF-IDF. A family of one label is set against the other label of all other families."
    shown = [row for row in rows if row["detector"] in ("guard", "tfidf")]
    return forest(shown, title=title, caption=caption, what="AUROC", name="set", series="detector", panel="comparison")


@in_style
def learning_curve(rows: Rows, *, title: str) -> Plot:
    """AUROC on the test split by how many prompts were fitted on. Rows: fitted_on, value, low, high, n."""
    figure = figure_of(SINGLE, 2.4)
    axis = plain(figure.subplots())
    axis.errorbar(column(rows, "fitted_on"), column(rows, "value"), yerr=whiskers(rows, "value"), color=OKABE_ITO[0], marker="s", elinewidth=0.9)
    axis.set(xscale="log", xlabel="train prompts fitted on", ylabel="AUROC, test split")
    axis.set_xticks(column(rows, "fitted_on"), [f"{int(n):,}" for n in column(rows, "fitted_on")])
    axis.minorticks_off()
    axis.grid(axis="y", color=PALE, linewidth=0.5)
    compose(figure, title)
    caption = f"AUROC on the test split by how many prompts the guard was fitted on, groups kept whole; whiskers are bootstrap 95% intervals over {counted(rows)} prompts."
    chart = Chart("line", "fitted_on", "value", "train prompts fitted on", "AUROC, test split", lines=(Line(0.5, "chance"),))
    return Plot(figure, title, caption, chart)

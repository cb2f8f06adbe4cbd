"""Figures of categories and of sets: cosine matrices, transfer, rates side by side. Knows no experiment."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from latentguard.charts import Chart, Plot
from latentguard.plots.heat import cells, colour_scale
from latentguard.plots.style import DOUBLE, GREY, INK, SINGLE, Rows, column, counted, distinct, figure_of, in_style, number, plain, reference, whiskers
from latentguard.plots.words import Named, compose, name_ticks, wrapped

_KINDS = {"harm": "harmfulness", "refuse": "refusal"}
_FORMS = {"with": ("#0072B2", "", "with them"), "without": ("#E69F00", "//", "without them")}


@in_style
def cosines(rows: Rows, *, title: str) -> Plot:
    """Cosine of every pair of categories, a panel a kind (Figs. 9a, 17). Rows: kind, a, b, cosine."""
    kinds, names = distinct(rows, "kind"), distinct(rows, "a")
    beside = len(names) <= 12
    size = 2.4 if beside else min(5.0, 0.19 * len(names))
    figure = figure_of(DOUBLE, size + 1.3 if beside else len(kinds) * size + 1.4)
    axes = figure.subplots(1 if beside else len(kinds), len(kinds) if beside else 1, sharey=True, sharex=True, squeeze=False).ravel()
    for axis, kind in zip(axes, kinds, strict=True):
        off = [number(row["cosine"]) for row in rows if row["kind"] == kind and row["a"] != row["b"]]
        off = [value for value in off if value == value]
        found = f", mean of n = {len(off) // 2} pairs: {np.mean(off):.2f}" if off else ", n = 0 pairs"
        axis.set_title(f"{_KINDS.get(kind, kind)}{found}")
        _grid(axis, names, names)
    _bar(figure, axes, "cosine")
    compose(figure, title)
    for axis, kind in zip(axes, kinds, strict=True):
        cells(axis, [{**row, "x": names.index(row["b"]), "y": names.index(row["a"])} for row in rows if row["kind"] == kind], "cosine")
    caption = "Cosine of every two categories' directions, a panel a kind of direction, lighter is nearer 1; above each the mean without the diagonal. Form of Figs. 9a "
    caption += "and 17 of arXiv 2507.11878; single cosines have no interval."
    chart = Chart("heat", "b", "a", "", "", panel="kind", value="cosine", value_title="cosine", low=None, high=None, n=None, names=_KINDS)
    return Plot(figure, title, caption, chart)


@in_style
def transfer(rows: Rows, *, title: str) -> Plot:
    """AUROC of one category's direction on another's prompts. Rows: direction, target, value, low, high, n."""
    sources, targets = distinct(rows, "direction"), distinct(rows, "target")
    figure = figure_of(DOUBLE if len(targets) > 3 else SINGLE, 0.3 * len(sources) + 1.4)
    axis = figure.subplots()
    sizes = {row["target"]: row["n"] for row in rows}
    _grid(axis, [f"{wrapped(target, 28, 1)} (n = {sizes[target]})" for target in targets], sources)
    axis.set(ylabel="direction of", xlabel="test prompts of")
    _bar(figure, [axis], "AUROC")
    compose(figure, title)
    cells(axis, [{**row, "x": targets.index(row["target"]), "y": sources.index(row["direction"])} for row in rows], "value")
    caption = (
        "AUROC of one category's harmfulness direction on the test prompts of another against harmless ones, lighter is nearer 1; small numbers are bootstrap "
    )
    caption += "95% intervals over prompts, n is the target's prompts."
    return Plot(figure, title, caption, Chart("heat", "target", "direction", "test prompts of", "direction of", value="value", value_title="AUROC"))


@in_style
def no_by_category(rows: Rows, *, title: str) -> Plot:
    """P(No) for one category's prompts under each category's reverse direction (Fig. 9b). Rows: direction, layer, value, low, high, n."""
    figure = figure_of(SINGLE, 0.24 * len(rows) + 0.45)
    axis = plain(figure.subplots())
    colours = ["#999999" if row["direction"] == "none" else "#D55E00" for row in rows]
    axis.barh(range(len(rows)), column(rows, "value"), xerr=whiskers(rows, "value"), color=colours, ecolor=INK)
    names = ["no steering" if row["direction"] == "none" else wrapped(f"− {row['direction']} (layer {row['layer']})", 28, 2) for row in rows]
    axis.set_yticks(range(len(rows)), names, linespacing=1.0)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel=f'P("No"), {counted(rows)}')
    lines = ()
    if base := next((row for row in rows if row["direction"] == "none"), None):
        axis.axvline(number(base["value"]), color=GREY, linestyle="--")
        lines = reference(base, "no steering", "value")
    compose(figure, title)
    caption = "Probability of “No” with each category's harmfulness direction taken away at its best layer; the dashed line is no steering, whiskers are bootstrap 95% "
    caption += "intervals over prompts. Form of Fig. 9b of arXiv 2507.11878."
    chart = Chart("bars", "direction", "value", "", 'P("No")', names={"none": "no steering"}, lines=lines, lying=True, y_range=(0, 1))
    return Plot(figure, title, caption, chart)


@in_style
def rates_by_set(rows: Rows, *, title: str) -> Plot:
    """Refusal with and without the post-instruction tokens, a pair of bars a data set (Table 1). Rows: set, form, rate, low, high, n."""
    names = distinct(rows, "set")
    figure = figure_of(DOUBLE if len(names) > 3 else SINGLE, 2.3)
    axis = plain(figure.subplots())
    named = []
    for offset, (form, (colour, hatch, name)) in enumerate(_FORMS.items()):
        here = [row for row in rows if row["form"] == form]
        at = [names.index(row["set"]) + 0.4 * (offset - 0.5) for row in here]
        look = {"color": colour, "hatch": hatch, "edgecolor": "white", "ecolor": INK}
        named.append(Named(name, axis.bar(at, column(here, "rate"), 0.36, yerr=whiskers(here, "rate"), **look)))
    sizes = {row["set"]: row["n"] for row in rows}
    name_ticks(axis, [f"{wrapped(name, 18, 3)}\nn = {sizes[name]}" for name in names])
    axis.set(ylabel="refusal rate", ylim=(0, 1.03))
    compose(figure, title, named)
    caption = (
        "Share of each set's prompts refused with the tokens after the instruction and without them; whiskers are Wilson 95% intervals. Form of Table 1 of "
    )
    chart = Chart(
        "bars", "set", "rate", "", "refusal rate", series="form", names={form: name for form, (*_, name) in _FORMS.items()},
        colours={form: colour for form, (colour, *_) in _FORMS.items()}, y_range=(0, 1),
    )  # fmt: skip
    return Plot(figure, title, f"{caption}arXiv 2507.11878.", chart)


def _bar(figure: Figure, axes: Any, what: str) -> None:
    figure.colorbar(colour_scale(), ax=list(axes), fraction=0.03, pad=0.015, label=what, ticks=[0, 0.5, 1]).outline.set_visible(False)  # type: ignore[operator]


def _grid(axis: Any, across: list[str], down: list[str]) -> None:
    """Names along both sides of unit cells, the first at the top left."""
    axis.set(xlim=(-0.5, len(across) - 0.5), ylim=(len(down) - 0.5, -0.5))
    axis.set_xticks(range(len(across)), [wrapped(name, 40, 1) for name in across], rotation=90)
    axis.set_yticks(range(len(down)), [wrapped(name, 34, 1) for name in down])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)

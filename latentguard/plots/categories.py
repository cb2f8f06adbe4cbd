"""Figures of categories and of sets: cosine matrices, transfer, rates side by side. Knows no experiment."""

import numpy as np
from matplotlib.figure import Figure

from latentguard.plots.style import Rows, figure_of, legend_below, plain


def cosines(rows: Rows, *, title: str) -> Figure:
    """Cosine of every pair of categories, a panel a kind (Figs. 9a, 17). Rows: kind, a, b, cosine."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    names = list(dict.fromkeys(row["a"] for row in rows))
    figure = figure_of(0.48 * len(names) * len(kinds) + 4.2, 0.48 * len(names) + 2.6)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        found = {(row["a"], row["b"]): row["cosine"] for row in rows if row["kind"] == kind}
        _heat(axis, np.array([[found[a, b] for b in names] for a in names]), names, names)
        off = [value for (a, b), value in found.items() if a != b]
        axis.set_title(f"{ {'harm': 'harmfulness', 'refuse': 'refusal'}[kind] }, mean {np.mean(off):.2f}", fontsize=10)
    figure.suptitle(title, fontsize=10.5)
    return figure


def transfer(rows: Rows, *, title: str) -> Figure:
    """AUROC of one category's direction on another's prompts. Rows: direction, target, value, n."""
    sources, targets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("direction", "target"))
    found = {(row["direction"], row["target"]): row for row in rows}
    figure = figure_of(0.62 * len(targets) + 3.4, 0.48 * len(sources) + 2.8)
    axis = figure.subplots()
    sizes = {row["target"]: row["n"] for row in rows}
    _heat(axis, np.array([[found[a, b]["value"] for b in targets] for a in sources]), [f"{t} (n = {sizes[t]})" for t in targets], sources)
    axis.set(ylabel="direction of", xlabel="test prompts of")
    figure.suptitle(title, fontsize=10.5)
    return figure


def no_by_category(rows: Rows, *, title: str) -> Figure:
    """P(No) for one category's prompts under each category's reverse direction (Fig. 9b). Rows: direction, layer, value, low, high, n."""
    figure = figure_of(7.4, 0.34 * len(rows) + 1.6)
    axis = plain(figure.subplots())
    spread = [[row["value"] - row["low"] for row in rows], [row["high"] - row["value"] for row in rows]]
    colours = ["#999999" if row["direction"] == "none" else "#D55E00" for row in rows]
    axis.barh(range(len(rows)), [row["value"] for row in rows], xerr=spread, color=colours, ecolor="#333333", capsize=2)
    names = ["no steering" if row["direction"] == "none" else f"− {row['direction']} (layer {row['layer']})" for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8.5)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel=f'P("No"), n = {rows[0]["n"]}')
    figure.suptitle(title, fontsize=10.5)
    return figure


def rates_by_set(rows: Rows, *, title: str) -> Figure:
    """Refusal with and without the post-instruction tokens, a pair of bars a data set (Table 1). Rows: set, form, rate, low, high, n."""
    names = list(dict.fromkeys(row["set"] for row in rows))
    figure = figure_of(1.25 * len(names) + 2.6, 4.6)
    axis = plain(figure.subplots())
    for offset, (form, colour, hatch) in enumerate((("with", "#0072B2", ""), ("without", "#E69F00", "//"))):
        here = [row for row in rows if row["form"] == form]
        at = [names.index(row["set"]) + 0.38 * (offset - 0.5) for row in here]
        spread = [[row["rate"] - row["low"] for row in here], [row["high"] - row["rate"] for row in here]]
        axis.bar(
            at,
            [row["rate"] for row in here],
            0.36,
            yerr=spread,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            capsize=2,
            ecolor="#333333",
            label=f"{form} them",
        )
    sizes = {row["set"]: row["n"] for row in rows}
    axis.set_xticks(range(len(names)), [f"{name.replace(': ', chr(10))}\nn = {sizes[name]}" for name in names], fontsize=8.5)
    axis.set(ylabel="refusal rate", ylim=(0, 1.03))
    return legend_below(figure, axis, title)


def _heat(axis, values: np.ndarray, columns: list[str], lines: list[str]) -> None:  # noqa: ANN001
    axis.imshow(values, cmap="cividis", vmin=0, vmax=1)
    axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8.5)
    axis.set_yticks(range(len(lines)), lines, fontsize=8.5)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            axis.text(
                j,
                i,
                f"{values[i, j]:.2f}".replace("0.", ".").replace("1.00", "1"),
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if values[i, j] < 0.6 else "black",
            )

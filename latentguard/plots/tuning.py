"""Figures of fine-tuning: separation, refusal, directions and steering, before and after. Knows no experiment."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from latentguard.plots.style import Rows, counted, figure_of, legend_below, plain

# The untouched model, then sizes in ascending order: colour, marker.
_BEFORE = ("#555555", "o")
_SIZES = (("#E69F00", "^"), ("#D55E00", "s"), ("#CC79A7", "D"), ("#0072B2", "v"), ("#009E73", "P"), ("#000000", "*"), ("#56B4E9", "X"))
_SIDES = {"harmful": ("-", "full"), "harmless": (":", "none")}
_LABELS = {"harmful": ("#D55E00", "o"), "lookalike": ("#009E73", "D"), "harmless": ("#0072B2", "s")}


def separation_before_and_after(rows: Rows, *, title: str, depth: int, panels: Mapping[str, str]) -> Figure:
    """Mean s at t_inst by layer on held-out prompts (arXiv 2507.11878, Fig. 7), one line a training size, full for harmful and
    dotted for harmless prompts, the band its 95% interval. Rows: panel, n_trained (0: before), side, layer, value, low, high, n.
    """
    figure = figure_of(4.6 * len(panels) + 0.4, 5.0)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    sizes = _sizes(rows)
    for axis, (panel, name) in zip(axes, panels.items(), strict=True):
        plain(axis).axhline(0, color="#555555", linewidth=0.8)
        here = [row for row in rows if row["panel"] == panel]
        for size in [0, *sizes]:
            colour, marker = _style(size, sizes)
            for side, (dashes, fill) in _SIDES.items():
                line = sorted((row for row in here if row["n_trained"] == size and row["side"] == side), key=lambda row: row["layer"])
                if line:
                    at = [row["layer"] for row in line]
                    axis.fill_between(at, [row["low"] for row in line], [row["high"] for row in line], color=colour, alpha=0.15, linewidth=0)
                    values, label = [row["value"] for row in line], f"{_name(size)}: {side} ({counted(line)})"
                    axis.plot(at, values, color=colour, linestyle=dashes, marker=marker, markersize=3.5, fillstyle=fill, linewidth=1.3, label=label)
        axis.set(xlabel=f"layer (0 = embedding, {depth} = last output)", title=name)
    axes[0].set_ylabel("s at t_inst: nearer the harmful pole  →")
    return legend_below(figure, axes[0], title, columns=3)


def refusal_before_and_after(rows: Rows, *, title: str) -> Figure:
    """Refusal of held-out prompts before and after, one marker a label, with 95% intervals. Rows: trained_on, n_trained, label,
    rate, low, high, n.
    """
    figure = figure_of(7.6, 4.4)
    axis = plain(figure.subplots())
    places = list(dict.fromkeys((row["trained_on"], row["n_trained"]) for row in rows))
    for offset, (label, (colour, marker)) in enumerate(_LABELS.items()):
        line = [row for row in rows if row["label"] == label]
        if line:
            at = [places.index((row["trained_on"], row["n_trained"])) + 0.14 * (offset - 1) for row in line]
            spread = [[row["rate"] - row["low"] for row in line], [row["high"] - row["rate"] for row in line]]
            name = f"{'look-alike' if label == 'lookalike' else label} ({counted(line)})"
            axis.errorbar(at, [row["rate"] for row in line], yerr=spread, color=colour, marker=marker, linestyle="none", capsize=3, label=name)
    axis.set_xticks(range(len(places)), [f"{n} {side}\nrequests" if n else "before" for side, n in places])
    axis.set(ylabel="refusal rate, held-out prompts", xlabel="trained on", ylim=(-0.03, 1.03))
    return legend_below(figure, axis, title, columns=3)


def directions_before_and_after(rows: Rows, *, title: str, depth: int, panels: Mapping[str, str]) -> Figure:
    """Cosine by layer of a direction before with one read after, each from half the prompts, a panel a direction; the grey line is
    both from before: what an unchanged direction reaches. Rows: direction, trained_on, n_trained (0: before), layer, halves.
    """
    figure = figure_of(4.8 * len(panels) + 0.4, 4.8)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    sizes = _sizes(rows)
    for axis, (direction, name) in zip(axes, panels.items(), strict=True):
        plain(axis).axhline(0, color="#555555", linewidth=0.8)
        here = [row for row in rows if row["direction"] == direction]
        for trained_on, size in dict.fromkeys((row["trained_on"], row["n_trained"]) for row in here):
            line = sorted((row for row in here if (row["trained_on"], row["n_trained"]) == (trained_on, size)), key=lambda row: row["layer"])
            dashes, fill = _SIDES[trained_on] if size else ("--", "full")
            colour, marker = _style(size, sizes)
            label = f"before with after {size} {trained_on}" if size else "before with before: the ceiling"
            at, values = [row["layer"] for row in line], [row["halves"] for row in line]
            axis.plot(at, values, color=colour, marker=marker, markersize=3.5, fillstyle=fill, linestyle=dashes, linewidth=1.3, label=label)
        axis.set(xlabel=f"layer (0 = embedding, {depth} = last output)", title=name)
    axes[0].set_ylabel("cosine, each from half the prompts")
    return legend_below(figure, axes[0], title)


def steering_before_and_after(rows: Rows, *, title: str, depth: int, paper: Sequence[tuple[str, int, Sequence[float]]] = ()) -> Figure:
    """Refusal of harmless prompts by the layer at which a refusal direction is added (arXiv 2507.11878, Fig. 18), with 95%
    intervals, a panel a coefficient; the last panel is the paper's own. Rows: n_trained (0: before), direction (own, before,
    random), layer, coef, rate, low, high, n. `paper`: name, size, rates from 0 to 1 by layer.
    """
    coefs = sorted({row["coef"] for row in rows})
    figure = figure_of(4.6 * (len(coefs) + bool(paper)) + 0.4, 5.4)
    axes = figure.subplots(1, len(coefs) + bool(paper), sharex=True, sharey=True, squeeze=False)[0]
    sizes = sorted({*_sizes(rows), *(size for _, size, _ in paper if size)})
    kinds = {"own": ("-", "full", "own direction"), "before": ("--", "none", "direction from before"), "random": (":", "none", "random, equal norm")}
    lines = list(dict.fromkeys((row["n_trained"], row["direction"]) for row in rows))
    for axis, coef in zip(axes, coefs, strict=False):
        for i, (size, kind) in enumerate(lines):
            line = sorted((row for row in rows if (row["n_trained"], row["direction"], row["coef"]) == (size, kind, coef)), key=lambda row: row["layer"])
            dashes, fill, name = kinds[kind]
            colour, marker = _style(size, sizes)
            at = [row["layer"] / depth + 0.008 * (i - (len(lines) - 1) / 2) for row in line]  # side by side, where they would hide each other
            values = [row["rate"] for row in line]
            spread = [[row["rate"] - row["low"] for row in line], [row["high"] - row["rate"] for row in line]]
            look = {"color": colour, "linestyle": dashes, "marker": marker, "fillstyle": fill, "markersize": 5, "linewidth": 1.2, "elinewidth": 0.8}
            axis.errorbar(at, values, yerr=spread, capsize=1.5, label=f"{_name(size)}: {name} ({counted(line)})", **look)
        plain(axis).set(xlabel=f"layer steered, as a share of {depth}", ylim=(-0.03, 1.03), xlim=(-0.02, 1.02), title=f"here, coefficient {coef:g}")
    axes[0].set_ylabel("refusal rate, harmless prompts")
    for name, size, rates in paper:
        colour, marker = _style(size, sizes)
        at = [layer / len(rates) for layer in range(len(rates))]
        plain(axes[-1]).plot(at, rates, color=colour, marker=marker, markersize=3.5, linewidth=1.3, label=name)
    if paper:
        axes[-1].set(xlabel="layer steered, as a share of 32", title="the paper, Llama-2 (Fig. 18)")
        axes[-1].legend(frameon=False, fontsize=8)
    return legend_below(figure, axes[0], title)


def _sizes(rows: Rows) -> list[int]:
    return sorted({row["n_trained"] for row in rows} - {0})


def _style(size: int, sizes: Sequence[int]) -> tuple[str, str]:
    return _SIZES[list(sizes).index(size) % len(_SIZES)] if size else _BEFORE


def _name(size: int) -> Any:
    return f"after {size}" if size else "before"

"""Figures of hidden states: separation by layer and position, beliefs against each other. Knows no experiment."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from latentguard.plots.style import Rows, counted, figure_of, group_style, legend_below, plain


def separation_by_layer(rows: Rows, *, title: str, depth: int) -> Figure:
    """Mean s by layer, a panel a position, a line a group (arXiv 2507.11878, Fig. 2).

    Dark bands are the 95% interval of the mean, light ones hold the middle 80% of prompts. Rows: position, group, layer,
    value, low, high, q10, q90, n.
    """
    positions = list(dict.fromkeys(row["position"] for row in rows))
    figure = figure_of(5.4 * len(positions) + 0.4, 4.8)
    axes = figure.subplots(1, len(positions), squeeze=False)[0]
    for axis, position in zip(axes, positions, strict=True):
        plain(axis).axhline(0, color="#555555", linewidth=0.8)
        here = [row for row in rows if row["position"] == position]
        for group in dict.fromkeys(row["group"] for row in here):
            colour, marker, name = group_style(group)
            line = sorted((row for row in here if row["group"] == group), key=lambda row: row["layer"])
            at = [row["layer"] for row in line]
            axis.fill_between(at, [row["q10"] for row in line], [row["q90"] for row in line], color=colour, alpha=0.07, linewidth=0)
            axis.fill_between(at, [row["low"] for row in line], [row["high"] for row in line], color=colour, alpha=0.3, linewidth=0)
            axis.plot(at, [row["value"] for row in line], color=colour, marker=marker, markersize=3.5, linewidth=1.4, label=f"{name} ({counted(line)})")
        axis.set(xlabel=f"layer (0 = embedding, {depth} = last output)", title=f"at {position}")
    axes[0].set_ylabel("s: nearer the harmful pole  →")
    return legend_below(figure, axes[0], title)


def separation_by_position(rows: Rows, *, title: str, what: str) -> Figure:
    """A value by extraction position, a line a group (Figs. 14–16). Rows: position, group, value, low, high, n."""
    figure = figure_of(8.4, 4.6)
    axis = plain(figure.subplots())
    positions = list(dict.fromkeys(row["position"] for row in rows))
    groups = list(dict.fromkeys(row["group"] for row in rows))
    axis.axhline(0, color="#555555", linewidth=0.8)
    for offset, group in enumerate(groups):
        colour, marker, name = group_style(group)
        line = [row for row in rows if row["group"] == group]
        at = [positions.index(row["position"]) + 0.08 * (offset - (len(groups) - 1) / 2) for row in line]
        spread = [[row["value"] - row["low"] for row in line], [row["high"] - row["value"] for row in line]]
        label = f"{name} ({counted(line)})"
        axis.errorbar(at, [row["value"] for row in line], yerr=spread, color=colour, marker=marker, linestyle=":", linewidth=1, capsize=2, label=label)
    names = [f"{position}\n{_token(rows, position)}" for position in positions]
    axis.set_xticks(range(len(positions)), names)
    axis.set(ylabel=what)
    return legend_below(figure, axis, title)


def beliefs(points: Rows, *, title: str, correlations: Mapping[str, str]) -> Figure:
    """Δ_harmful against Δ_refuse, one point a prompt, one marker a group (Figs. 3, 6); crosses are the groups' means.

    Points: group, harmful, refuse. `correlations` is what to print: a name and its Pearson r.
    """
    figure = figure_of(7.2, 5.6)
    axis = plain(figure.subplots())
    axis.axhline(0, color="#555555", linewidth=0.8)
    axis.axvline(0, color="#555555", linewidth=0.8)
    for group in dict.fromkeys(row["group"] for row in points):
        colour, marker, name = group_style(group)
        here = [row for row in points if row["group"] == group]
        x, y = [row["harmful"] for row in here], [row["refuse"] for row in here]
        axis.scatter(x, y, s=18, c=colour, marker=marker, alpha=0.55, linewidths=0, label=f"{name} (n = {len(here)})")
        axis.plot(sum(x) / len(x), sum(y) / len(y), marker="P", markersize=12, color=colour, markeredgecolor="white", linestyle="none")
    axis.set(xlabel="Δ harmful (at t_inst, mean over layers)", ylabel="Δ refuse (at t_post_inst, mean over layers)")
    axis.margins(0.08)
    text = "\n".join(f"r, {name}: {value}" for name, value in correlations.items())
    if text:
        axis.text(0.02, 0.98, text, transform=axis.transAxes, ha="left", va="top", fontsize=8, color="#333333")
    return legend_below(figure, axis, title)


def _token(rows: Rows, position: str) -> Any:
    shown = next((row.get("token") for row in rows if row["position"] == position), None)
    return repr(shown) if shown else ""

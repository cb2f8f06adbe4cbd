"""Figures of directional ablation: which direction was chosen, and what removing or adding it does. Knows no experiment."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from latentguard.plots.style import Rows, figure_of, plain

_LINES = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"))
_STAR = "#FFD84D"
# Conditions: colour, hatch, name.
_CONDITIONS = {
    "none": ("#777777", "", "no intervention"),
    "ablated": ("#D55E00", "", "refusal direction ablated"),
    "ablated_random": ("#009E73", "//", "random direction ablated"),
    "ablated_shuffled": ("#E69F00", "..", "shuffled-label direction ablated"),
    "added": ("#0072B2", "", "refusal direction added"),
    "added_random": ("#56B4E9", "//", "random direction added"),
}
_LABELS = {"harmful": "harmful", "harmless": "harmless", "lookalike": "look-alike\n(harmless)"}


def selection(rows: Rows, unsteered: Mapping[str, Any], limits: Mapping[str, float], *, title: str, depth: int) -> Figure:
    """Every candidate direction by layer, a line a position: refusal score with it ablated, KL on harmless prompts, refusal score of harmless
    prompts with it added. Candidates that a filter takes out are hollow, the chosen one is starred.

    Rows: position, layer, score, low, high, kl, kl_low, kl_high, induced, induced_low, induced_high, n, n_harmless, fails, chosen.
    """
    figure = figure_of(12.6, 4.9)
    axes = figure.subplots(1, 3)
    positions = list(dict.fromkeys(row["position"] for row in rows))
    panels = (("score", "low", "high"), ("kl", "kl_low", "kl_high"), ("induced", "induced_low", "induced_high"))
    for axis, keys in zip(axes, panels, strict=True):
        plain(axis)
        for i, position in enumerate(positions):
            _candidates(axis, sorted((row for row in rows if row["position"] == position), key=lambda row: row["layer"]), keys, *_LINES[i % len(_LINES)])
        layers = sorted({row["layer"] for row in rows})
        axis.set_xticks(layers[:: 1 + len(layers) // 13])
        axis.set_xlabel(f"layer the direction comes from (of {depth})")
    for axis, (value, low, high) in ((axes[0], panels[0]), (axes[2], panels[2])):
        axis.axhline(unsteered[value], color="#555555", linestyle="--", linewidth=1.2, zorder=1)
        axis.axhspan(unsteered[low], unsteered[high], color="#555555", alpha=0.10, linewidth=0)
    axes[1].axhline(limits["max_kl"], color="#111111", linestyle=":", linewidth=1.4)
    axes[2].axhline(limits["min_induced"], color="#111111", linestyle=":", linewidth=1.4)
    axes[1].set_yscale("symlog", linthresh=max(limits["max_kl"], 0.01))
    axes[1].set_ylim(bottom=0)
    n, harmless = rows[0]["n"], rows[0]["n_harmless"]
    axes[0].set(ylabel="log-odds of refusing", title=f"ablated: harmful prompts (n = {n})")
    axes[1].set(ylabel="KL(clean ‖ ablated), nats", title=f"ablated: harmless prompts (n = {harmless})")
    axes[2].set(ylabel="log-odds of refusing", title=f"added: harmless prompts (n = {harmless})")
    for axis in axes:
        axis.title.set_fontsize(10)
    keys = [Line2D([], [], color=_LINES[i % len(_LINES)][0], marker=_LINES[i % len(_LINES)][1], label=f"read at {p}") for i, p in enumerate(positions)]
    keys += [
        Line2D([], [], color="#555555", marker="o", markerfacecolor="white", linestyle="", label="filtered out"),
        Line2D([], [], color="#111111", marker="*", markerfacecolor=_STAR, markersize=13, linestyle="", label="chosen"),
        Line2D([], [], color="#555555", linestyle="--", label="no intervention"),
        Line2D([], [], color="#111111", linestyle=":", label="limit of a filter"),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(6, len(keys)), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10.5)
    return figure


def refusal_by_condition(rows: Rows, *, title: str) -> Figure:
    """Refusal rate of each label's prompts under each condition, and below it the share of degenerate replies.

    Rows: condition, label, rate, low, high, n, draws, degenerate_rate.
    """
    labels = [label for label in _LABELS if any(row["label"] == label for row in rows)]
    figure = figure_of(11.4, 6.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    ticks, start = [], 0.0
    for label in labels:
        here = sorted((row for row in rows if row["label"] == label), key=lambda row: list(_CONDITIONS).index(row["condition"]))
        for at, row in enumerate(here, 1):
            colour, hatch, _ = _CONDITIONS[row["condition"]]
            look = {"width": 0.84, "color": colour, "hatch": hatch, "edgecolor": "white"}
            top.bar(start + at, row["rate"], yerr=[[row["rate"] - row["low"]], [row["high"] - row["rate"]]], capsize=3, ecolor="#222222", **look)
            top.plot([start + at], [row["rate"]], marker="o", markersize=7, color=colour, markeredgecolor="#222222", zorder=3, clip_on=False)
            many = f"\n× {row['draws']}" if row["draws"] > 1 else ""
            top.annotate(f"{row['n']}{many}", (start + at, row["high"]), (0, 7), textcoords="offset points", ha="center", fontsize=8, color="#333333")
            bottom.bar(start + at, row["degenerate_rate"], **look)
        ticks.append(start + (len(here) + 1) / 2)
        start += len(here) + 1
    plain(top).set(ylabel="refusal rate", ylim=(0, 1.2))
    top.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    most = max((row["degenerate_rate"] for row in rows), default=0.0)
    plain(bottom).set(ylabel="degenerate", ylim=(0, max(0.2, min(1.0, 1.15 * most))))
    bottom.set_xticks(ticks, [_LABELS[label] for label in labels])
    used = [name for name in _CONDITIONS if any(row["condition"] == name for row in rows)]
    keys = [Patch(facecolor=_CONDITIONS[name][0], hatch=_CONDITIONS[name][1], edgecolor="white", label=_CONDITIONS[name][2]) for name in used]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"{title}\n(above each bar: n prompts, × draws of a control; 95% intervals)", fontsize=10.5)
    return figure


def _candidates(axis: Any, line: Rows, keys: tuple[str, str, str], colour: str, marker: str) -> None:
    value, low, high = keys
    at = [row["layer"] for row in line]
    axis.fill_between(at, [row[low] for row in line], [row[high] for row in line], color=colour, alpha=0.10, linewidth=0)
    axis.plot(at, [row[value] for row in line], color=colour, linewidth=1.3)
    for row in line:
        face = "white" if row["fails"] else colour
        axis.plot([row["layer"]], [row[value]], marker=marker, color=colour, markerfacecolor=face, markersize=6.5, zorder=3)
        if row["chosen"]:
            axis.plot([row["layer"]], [row[value]], marker="*", color="#111111", markersize=19, zorder=2.8, markerfacecolor=_STAR)

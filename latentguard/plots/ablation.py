"""Figures of directional ablation: which direction was chosen, and what removing or adding it does. Knows no experiment."""

from collections.abc import Mapping
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from latentguard.charts import Chart, Plot
from latentguard.plots.style import (
    DOUBLE,
    GREY,
    INK,
    MARKERS,
    OKABE_ITO,
    Rows,
    column,
    counted,
    distinct,
    figure_of,
    in_style,
    line_with_band,
    number,
    panels,
    plain,
    reference,
    whiskers,
)
from latentguard.plots.words import Named, compose, layer_ticks

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
_LABELS = {"harmful": "harmful", "harmless": "harmless", "lookalike": "look-alike (harmless)"}


@in_style
def selection(rows: Rows, unsteered: Mapping[str, Any], limits: Mapping[str, float], *, title: str, depth: int) -> Plot:
    """Every candidate direction by layer, a line a position: refusal score with it ablated, KL on harmless prompts, refusal score of harmless
    prompts with it added. Candidates that a filter takes out are hollow, the chosen one is starred.

    Rows: position, layer, score, low, high, kl, kl_low, kl_high, induced, induced_low, induced_high, n, n_harmless, fails, chosen.
    """
    figure, axes = panels(3, 2.2)
    positions = distinct(rows, "position")
    look = {position: (OKABE_ITO[i % 7], MARKERS[i % 7]) for i, position in enumerate(positions)}
    shown = (("score", "low", "high"), ("kl", "kl_low", "kl_high"), ("induced", "induced_low", "induced_high"))
    for axis, keys in zip(axes, shown, strict=True):
        for position in positions:
            _candidates(axis, sorted((row for row in rows if row["position"] == position), key=lambda row: row["layer"]), keys, *look[position])
        layer_ticks(axis, distinct(rows, "layer"))
        axis.set_xlabel(f"layer it comes from (of {depth})")
    for axis, (value, low, high) in ((axes[0], shown[0]), (axes[2], shown[2])):
        axis.axhline(unsteered[value], color=GREY, linestyle="--", linewidth=1, zorder=1)
        axis.axhspan(unsteered[low], unsteered[high], color=GREY, alpha=0.10, linewidth=0)
    axes[1].axhline(limits["max_kl"], color="#111111", linestyle=":")
    axes[2].axhline(limits["min_induced"], color="#111111", linestyle=":")
    axes[1].set_yscale("symlog", linthresh=max(limits["max_kl"], 0.01))
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].set_ylim(bottom=0)
    harmless = counted([{"n": row["n_harmless"]} for row in rows])
    axes[0].set(ylabel="log-odds of refusing", title=f"ablated: harmful prompts, {counted(rows)}")
    axes[1].set(ylabel="KL(clean ‖ ablated), nats", title=f"ablated: harmless prompts, {harmless}")
    axes[2].set(ylabel="log-odds of refusing", title=f"added: harmless prompts, {harmless}")
    named = [Named(f"read at {position}", Line2D([], [], color=colour, marker=marker)) for position, (colour, marker) in look.items()]
    named += [
        Named("filtered out", Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="")),
        Named("chosen", Line2D([], [], color="#111111", marker="*", markerfacecolor=_STAR, markersize=9, linestyle="")),
        Named("no intervention", Line2D([], [], color=GREY, linestyle="--")),
        Named("limit of a filter", Line2D([], [], color="#111111", linestyle=":")),
    ]
    compose(figure, title, named)
    caption = "Every candidate direction by the layer it comes from, a line a position: refusal of harmful prompts with it ablated, damage to harmless ones, and refusal of "
    caption += "harmless ones with it added. Hollow candidates fail a filter (dotted), the star is the one chosen; bands are bootstrap 95% intervals over prompts, dashes no "
    caption += "intervention."
    chart = Chart(
        "line", "layer", "score", f"layer it comes from (of {depth})", "log-odds of refusing, ablated, harmful prompts", series="position",
        colours={position: colour for position, (colour, _) in look.items()}, lines=reference(unsteered, "no intervention", "score"),
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


@in_style
def refusal_by_condition(rows: Rows, *, title: str) -> Plot:
    """Refusal rate of each label's prompts under each condition, and below it the share of degenerate replies.

    Rows: condition, label, rate, low, high, n, draws, degenerate_rate.
    """
    labels = [label for label in _LABELS if any(row["label"] == label for row in rows)]
    figure = figure_of(DOUBLE, 3.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    ticks, start = [], 0.0
    for label in labels:
        here = sorted((row for row in rows if row["label"] == label), key=lambda row: list(_CONDITIONS).index(row["condition"]))
        for at, row in enumerate(here, 1):
            colour, hatch, _ = _CONDITIONS[row["condition"]]
            look = {"width": 0.84, "color": colour, "hatch": hatch, "edgecolor": "white"}
            top.bar(start + at, number(row["rate"]), yerr=whiskers([row], "rate"), ecolor=INK, **look)
            top.plot([start + at], [number(row["rate"])], marker="o", markersize=4.5, color=colour, markeredgecolor=INK, zorder=3, clip_on=False)
            many = f"\n× {row['draws']}" if row["draws"] > 1 else ""
            high = number(row["high"])
            high = high if high == high else 0.0
            top.annotate(f"{row['n']}{many}", (start + at, high), (0, 4), textcoords="offset points", ha="center", fontsize=6.2, color=INK, linespacing=1)
            bottom.bar(start + at, number(row["degenerate_rate"]), **look)
        ticks.append(start + (len(here) + 1) / 2)
        start += len(here) + 1
    plain(top).set(ylabel="refusal rate", ylim=(0, 1.24))
    top.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    most = max((share for share in column(rows, "degenerate_rate") if share == share), default=0.0)
    plain(bottom).set(ylabel="degenerate", ylim=(0, max(0.2, min(1.0, 1.15 * most))))
    bottom.set_xticks(ticks, [_LABELS[label] for label in labels])
    bottom.tick_params(axis="x", length=0)
    used = [name for name in _CONDITIONS if any(row["condition"] == name for row in rows)]
    named = [Named(_CONDITIONS[c][2], Patch(facecolor=_CONDITIONS[c][0], hatch=_CONDITIONS[c][1], edgecolor="white")) for c in used]
    compose(figure, title, [*named, Named("above a bar: n prompts, × draws of a control", Line2D([], [], linestyle=""))])
    caption = "Share of prompts refused under each condition, below it the share of degenerate replies; whiskers are 95% intervals, Wilson's or, over several draws of a "
    caption += "control, a bootstrap over prompts. Above each bar stands n, and the draws of a control."
    chart = Chart(
        "bars", "label", "rate", "", "refusal rate", series="condition", names=_LABELS | {c: _CONDITIONS[c][2] for c in used},
        colours={c: _CONDITIONS[c][0] for c in used}, y_range=(0, 1),
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


def _candidates(axis: Any, line: Rows, keys: tuple[str, str, str], colour: str, marker: str) -> None:
    value, low, high = keys
    line_with_band(axis, line, "layer", value, colour, low=low, high=high, alpha=0.12, linewidth=1)
    for row in line:
        face = "white" if row["fails"] else colour
        at = number(row[value])
        axis.plot([row["layer"]], [at], marker=marker, color=colour, markerfacecolor=face, markersize=4, zorder=3)
        if row["chosen"]:
            axis.plot([row["layer"]], [at], marker="*", color="#111111", markersize=11, zorder=2.8, markerfacecolor=_STAR, markeredgewidth=0.7)

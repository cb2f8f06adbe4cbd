"""Figures of steering: refusal by layer and coefficient, replies side by side. Knows no experiment."""

import textwrap
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from latentguard.plots.style import STYLE, Rows, counted, figure_of, legend_below, plain


def refusal_by_layer(rows: Rows, baseline: Mapping[str, Any], *, title: str, depth: int) -> Figure:
    """Refusal rate by layer, one line a direction, the band its 95% interval (arXiv 2507.11878, Fig. 4); a panel a
    coefficient. Rows: direction, layer, coef, rate, low, high, n.
    """
    coefs = sorted({row["coef"] for row in rows})
    figure = figure_of(4.6 * len(coefs) + 0.6, 4.6)
    axes = figure.subplots(1, len(coefs), sharey=True, squeeze=False)[0]
    for axis, coef in zip(axes, coefs, strict=True):
        _lines(axis, [row for row in rows if row["coef"] == coef], "layer", baseline)
        axis.set(xlabel=f"layer steered (of {depth})", title=f"coefficient {coef:g}", ylim=(-0.03, 1.03))
        axis.set_xticks(sorted({row["layer"] for row in rows}))
    axes[0].set_ylabel("refusal rate, harmless prompts")
    return legend_below(figure, axes[0], title)


def refusal_by_coefficient(rows: Rows, baseline: Mapping[str, Any], *, title: str) -> Figure:
    """Refusal rate by coefficient at one layer a direction. Rows as above."""
    figure = figure_of(6.4, 4.6)
    axis = figure.subplots()
    start = [{**baseline, "direction": name, "coef": 0.0} for name in dict.fromkeys(row["direction"] for row in rows)]
    _lines(axis, [*start, *rows], "coef", baseline)
    axis.set(xlabel="coefficient (× raw difference of means)", ylabel="refusal rate, harmless prompts", ylim=(-0.03, 1.03))
    axis.set_xticks(sorted({0.0, *(row["coef"] for row in rows)}))
    return legend_below(figure, axis, title)


def cosine_by_layer(rows: Rows, *, title: str, depth: int) -> Figure:
    """Cosine of two directions by layer beside what two halves of the prompts reach. Rows: layer, value, low, high, ceiling, n."""
    figure = figure_of(6.8, 4.4)
    axis = figure.subplots()
    plain(axis)
    at = [row["layer"] for row in rows]
    axis.axhline(0, color="#555555", linewidth=0.8)
    axis.fill_between(at, [row["low"] for row in rows], [row["high"] for row in rows], color="#D55E00", alpha=0.2, linewidth=0)
    axis.plot(at, [row["value"] for row in rows], color="#D55E00", marker="o", markersize=4, label=f"v_harm and v_refuse (n = {rows[0]['n']} prompts)")
    axis.plot(at, [row["ceiling"] for row in rows], color="#009E73", marker="^", markersize=4, linestyle=":", label="ceiling: two halves of the prompts")
    axis.set(xlabel=f"layer (of {depth})", ylabel="cosine", ylim=(min(-0.15, *(row["low"] for row in rows)), 1.03))
    return legend_below(figure, axis, title)


def replies_side_by_side(rows: Rows, *, title: str, columns: Mapping[str, str]) -> Figure:
    """Prompts with what the model said to them under each intervention. Rows: prompt, and a reply and verdict a column
    (`<column>`, `<column>_verdict`).
    """
    cells = [[_shown(row["prompt"], 38), *(_shown(row[key], 38) for key in columns)] for row in rows]
    heights = [max(cell.count("\n") + 1 for cell in line) for line in cells]
    total = sum(heights) + 0.9 * len(heights) + 3
    width = 3.1 * (1 + len(columns))
    figure = figure_of(width, 0.155 * total + 0.7)
    axis = figure.subplots()
    axis.set(xlim=(0, 1 + len(columns)), ylim=(total, 0))
    axis.axis("off")
    for x, name in enumerate(["prompt", *columns.values()]):
        axis.text(x + 0.02, 1.0, name, weight="bold", va="center", fontsize=9)
    y = 2.2
    for row, line, height in zip(rows, cells, heights, strict=True):
        axis.axhline(y - 0.45, color="#cccccc", linewidth=0.7)
        for x, text in enumerate(line):
            verdict = row.get(f"{list(columns)[x - 1]}_verdict") if x else None
            colour = {"refused": "#A63A00", "degenerate": "#888888"}.get(verdict or "", "#111111")
            axis.text(x + 0.02, y, text, va="top", fontsize=8, color=colour, parse_math=False, linespacing=1.15)
        y += height + 0.9
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.text(0.01, 0.003, "refusals in dark red, degenerate text in grey", fontsize=8, color="#555555")
    return figure


def _lines(axis: Any, rows: Rows, x: str, baseline: Mapping[str, Any]) -> None:
    plain(axis)
    colour, _, dashes, name = STYLE["none"]
    axis.axhline(baseline["rate"], color=colour, linestyle=dashes, linewidth=1.2, label=f"{name} (n = {baseline['n']})")
    axis.axhspan(baseline["low"], baseline["high"], color=colour, alpha=0.10, linewidth=0)
    for direction in dict.fromkeys(row["direction"] for row in rows):
        line = sorted((row for row in rows if row["direction"] == direction), key=lambda row: row[x])
        colour, marker, dashes, name = STYLE[direction]
        if scored := [row for row in line if row.get("scored_only")]:
            shown = {"color": colour, "marker": marker, "markerfacecolor": "none", "linestyle": "none"}
            axis.plot([row[x] for row in scored], [row["expected"] for row in scored], **shown, label=f"{name}: by first tokens alone")
            if not (line := [row for row in line if not row.get("scored_only")]):
                continue
        at = [row[x] for row in line]
        axis.plot(at, [row["rate"] for row in line], color=colour, marker=marker, linestyle=dashes, label=f"{name} ({counted(line)})")
        axis.fill_between(at, [row["low"] for row in line], [row["high"] for row in line], color=colour, alpha=0.15, linewidth=0)


def _shown(text: str, width: int) -> str:
    """One cell of text: no control characters, at most six lines."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    lines = textwrap.wrap(clean, width) or ["(nothing)"]
    return "\n".join(lines if len(lines) <= 6 else [*lines[:5], lines[5][: width - 1] + "…"])

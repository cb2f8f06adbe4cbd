"""Figures of steering: refusal by layer, by coefficient and by both, cosines, replies side by side. Knows no experiment."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from latentguard.charts import Chart, Plot
from latentguard.plots.heat import cells, colour_scale, interval
from latentguard.plots.style import (
    DOUBLE,
    GREY,
    INK,
    SINGLE,
    STYLE,
    Rows,
    column,
    counted,
    distinct,
    figure_of,
    in_style,
    line_with_band,
    number,
    outer,
    panels,
    reference,
)
from latentguard.plots.words import Named, compose, end, fitted, layer_ticks

_RATES = "the dashed line and its band no steering; bands are Wilson 95% intervals"


@in_style
def refusal_by_layer(rows: Rows, baseline: Mapping[str, Any], *, title: str, depth: int) -> Plot:
    """Refusal rate by layer, one line a direction, the band its 95% interval (arXiv 2507.11878, Fig. 4); a panel a
    coefficient. Rows: direction, layer, coef, rate, low, high, n.
    """
    coefs = sorted(set(distinct(rows, "coef")))
    figure, axes = panels(len(coefs), 2.3, width=DOUBLE if len(coefs) > 1 else SINGLE, sharex=True, sharey=True)
    named: dict[str, Named] = {}
    for axis, coef in zip(axes, coefs, strict=True):
        named = {key: replace(line, end=None) for key, line in named.items()}
        named |= _lines(axis, [row for row in rows if row["coef"] == coef], rows, "layer", baseline)
        axis.set(xlabel=f"layer steered (of {depth})", title=f"coefficient {coef:g}", ylim=(-0.03, 1.03))
        layer_ticks(axis, distinct(rows, "layer"))
        axis.set_ylabel("refusal rate, harmless prompts")
    outer(axes)
    compose(figure, title, list(named.values()), axes[-1] if len(axes) <= 3 else None)
    caption = f"Share of harmless requests refused by the layer at which a direction is added, a line a direction; {_RATES}."
    return Plot(
        figure,
        title,
        f"{caption}{_scored(rows)} Form of Figs. 4 and 8 of arXiv 2507.11878.",
        _chart(rows, baseline, "layer", f"layer steered (of {depth})", "coef"),
    )


@in_style
def refusal_by_coefficient(rows: Rows, baseline: Mapping[str, Any], *, title: str) -> Plot:
    """Refusal rate by coefficient at one layer a direction. Rows as above."""
    figure, (axis,) = panels(1, 2.3, width=SINGLE)
    start = [{**baseline, "direction": name, "coef": 0.0, "start": True} for name in distinct(rows, "direction")]
    named = _lines(axis, [*start, *rows], rows, "coef", baseline)
    axis.set(xlabel="coefficient (× raw difference of means)", ylabel="refusal rate, harmless prompts", ylim=(-0.03, 1.03))
    layer_ticks(axis, [0.0, *distinct(rows, "coef")])
    compose(figure, title, list(named.values()), axis)
    caption = f"Share of harmless requests refused by how much of a direction is added at its layer; 0 is no steering. A line a direction; {_RATES}."
    return Plot(figure, title, caption + _scored(rows), _chart(rows, baseline, "coef", "coefficient (× raw difference of means)", None))


@in_style
def refusal_heat(rows: Rows, baseline: Mapping[str, Any], *, title: str, depth: int) -> Plot:
    """Refusal rate of every layer × coefficient, a panel a direction, the rate and its 95% interval in each cell where they fit; cells that
    were scored by first tokens alone are hatched. Rows as above, with `scored_only` where staged.
    """
    directions = [name for name in STYLE if name in distinct(rows, "direction")]
    layers, coefs = sorted(set(distinct(rows, "layer"))), sorted(set(distinct(rows, "coef")))
    figure = figure_of(DOUBLE if len(layers) > 3 else SINGLE, len(directions) * (0.34 * len(coefs) + 0.36) + 0.3)
    axes = figure.subplots(len(directions), 1, sharex=True, squeeze=False)[:, 0]
    for axis, direction in zip(axes, directions, strict=True):
        here = [row for row in rows if row["direction"] == direction]
        axis.set_title(f"{STYLE[direction][3]}, {counted([row for row in here if not row.get('scored_only')])}", loc="left")
        axis.set(xlim=(-0.5, len(layers) - 0.5), ylim=(-0.5, len(coefs) - 0.5))
        axis.set_yticks(range(len(coefs)), [f"{coef:g}" for coef in coefs])
        axis.set_xticks(range(len(layers)), [f"{layer:g}" for layer in layers])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        for row in here:
            if row.get("scored_only"):
                place = (layers.index(row["layer"]) - 0.5, coefs.index(row["coef"]) - 0.5)
                axis.add_patch(Rectangle(place, 1, 1, facecolor="white", edgecolor="#AAAAAA", hatch="////", linewidth=0))
        axis.label_outer()
    axes[-1].set_xlabel(f"layer steered (of {depth})")
    figure.supylabel("coefficient")
    bar = figure.colorbar(colour_scale(), ax=list(axes), aspect=12 * len(directions), pad=0.015, label="refusal rate", ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.outline.set_visible(False)
    if (rate := number(baseline["rate"])) == rate:
        bar.ax.plot([0, 1], [rate] * 2, color="white", linewidth=2.2, clip_on=False)
        bar.ax.plot([0, 1], [rate] * 2, color="#D55E00", linewidth=1.2, clip_on=False)
    named = [Named(f"no steering: {interval(baseline)}, n = {baseline['n']}", Line2D([], [], color="#D55E00"))]
    if any(row.get("scored_only") for row in rows):
        named.append(Named("scored by first tokens alone", Patch(facecolor="white", edgecolor="#AAAAAA", hatch="////", linewidth=0)))
    compose(figure, title, named)
    for axis, direction in zip(axes, directions, strict=True):
        here = [
            {**row, "x": layers.index(row["layer"]), "y": coefs.index(row["coef"])}
            for row in rows
            if row["direction"] == direction and not row.get("scored_only")
        ]
        cells(axis, here, "rate")
    caption = "Share of harmless requests refused at every layer and coefficient, a panel a direction; small numbers are Wilson 95% intervals"
    caption += ", the line on the colour bar is the rate without steering."
    if len(named) > 1:
        caption += " Hatched cells were scored by their first tokens alone and have no rate."
    names = {direction: STYLE[direction][3] for direction in directions}
    chart = Chart(
        "heat", "layer", "coef", f"layer steered (of {depth})", "coefficient", panel="direction", value="rate", value_title="refusal rate", names=names
    )
    return Plot(figure, title, caption, chart)


@in_style
def cosine_by_layer(rows: Rows, *, title: str, depth: int) -> Plot:
    """Cosine of two directions by layer beside what two halves of the prompts reach. Rows: layer, value, low, high, ceiling, n."""
    figure, (axis,) = panels(1, 2.2, width=SINGLE)
    rows = sorted(rows, key=lambda row: row["layer"])
    axis.axhline(0, color=GREY, linewidth=0.7)
    line = line_with_band(axis, rows, "layer", "value", "#D55E00", marker="o", alpha=0.2)
    (ceiling,) = axis.plot(column(rows, "layer"), column(rows, "ceiling"), color="#009E73", marker="^", linestyle=":")
    lows = [low for low in column(rows, "low") if low == low]
    axis.set(xlabel=f"layer (of {depth})", ylabel="cosine", ylim=(min(-0.15, *lows, 0), 1.03))
    layer_ticks(axis, distinct(rows, "layer"))
    ways = "v_harm and v_refuse", "ceiling: two halves of the prompts"
    named = [
        Named(f"v_harm and v_refuse, {counted(rows)}", line, "#D55E00", end(rows, "layer", "value")),
        Named("ceiling, two halves", ceiling, "#009E73", end(rows, "layer", "ceiling")),
    ]
    compose(figure, title, named, axis)
    caption = "Cosine of the harmfulness and the refusal direction by layer, with a bootstrap 95% interval over prompts; the dotted line is what one direction "
    caption += "from two halves of the prompts reaches (sec. 3.4 of arXiv 2507.11878)."
    chart = Chart("line", "layer", "value", f"layer (of {depth})", f"cosine of {ways[0]}", also={"ceiling": ways[1]})
    return Plot(figure, title, caption, chart)


@in_style
def replies_side_by_side(rows: Rows, *, title: str, columns: Mapping[str, str]) -> Plot:
    """Prompts with what the model said to them under each intervention. Rows: prompt, and a reply and verdict a column
    (`<column>`, `<column>_verdict`).
    """
    size = 6.0
    figure = figure_of(DOUBLE, 1)
    room = 0.92 * DOUBLE * figure.dpi / (1 + len(columns))
    heads = [fitted(figure, name, room, size=size, weight="bold") for name in ("prompt", *columns.values())]
    told = [[_shown(figure, row.get(key), room, size) for key in ("prompt", *columns)] for row in rows]
    heights = [max(cell.count("\n") + 1 for cell in line) for line in (heads, *told)]
    total = sum(heights) + 0.9 * len(heights)
    figure.set_figheight(8.2 / 72 * total + 0.3)
    axis = figure.subplots()
    axis.set(xlim=(0, 1 + len(columns)), ylim=(total, 0))
    axis.axis("off")
    y = 0.0
    for row, line, height in zip((None, *rows), (heads, *told), heights, strict=True):
        if row is not None:
            axis.axhline(y - 0.45, color="#CCCCCC", linewidth=0.5)
        for x, (key, text) in enumerate(zip(("prompt", *columns), line, strict=True)):
            verdict = row.get(f"{key}_verdict") if row else None
            colour = {"refused": "#A63A00", "degenerate": "#6E6E6E"}.get(verdict or "", INK)
            axis.text(x + 0.02, y, text, va="top", fontsize=size, color=colour, linespacing=1.1, weight="normal" if row else "bold")
        y += height + 0.9
    figure.supxlabel("refusals in dark red, degenerate text in grey", fontsize=size, color=GREY, x=0.012, ha="left")
    compose(figure, f"{title}, n = {len(rows)}")
    return Plot(figure, title, "The same requests under each intervention, a column each; refusals are dark red, degenerate text is grey.")


def _lines(axis: Any, rows: Rows, everything: Rows, x: str, baseline: Mapping[str, Any]) -> dict[str, Named]:
    """A line a direction, and no steering; what each is called and where it ends. n is that of all panels."""
    colour, _, dashes, name = STYLE["none"]
    rate, low = number(baseline["rate"]), number(baseline["low"])
    base = axis.axhline(rate, color=colour, linestyle=dashes)
    if low == low:
        axis.axhspan(low, baseline["high"], color=colour, alpha=0.10, linewidth=0)
    named = {"none": Named(f"{name}, n = {baseline['n']}", base, colour, (max(column(rows, x)), rate) if rate == rate else None)}
    for direction in distinct(rows, "direction"):
        line = sorted((row for row in rows if row["direction"] == direction), key=lambda row: row[x])
        colour, marker, dashes, name = STYLE[direction]
        if scored := [row for row in line if row.get("scored_only")]:
            shown = {"color": colour, "marker": marker, "markerfacecolor": "none", "linestyle": "none"}
            (points,) = axis.plot(column(scored, x), column(scored, "expected"), **shown)
            named[f"{direction}, scored"] = Named(f"{name}: by first tokens alone", points, colour, end(scored, x, "expected"))
            line = [row for row in line if not row.get("scored_only")]
        if generated := [row for row in everything if row["direction"] == direction and not row.get("scored_only")]:
            drawn = line_with_band(axis, line, x, "rate", colour, marker=marker, linestyle=dashes)
            named[direction] = Named(f"{name}, {counted(generated)}", drawn, colour, end(line, x, "rate"))
    return named


def _scored(rows: Rows) -> str:
    return " Hollow marks were scored by their first tokens alone." if any(row.get("scored_only") for row in rows) else ""


def _chart(rows: Rows, baseline: Mapping[str, Any], x: str, x_title: str, panel: str | None) -> Chart:
    there = distinct(rows, "direction")
    names = {direction: STYLE[direction][3] for direction in there} | ({f"{panel}={c:g}": f"coefficient {c:g}" for c in distinct(rows, panel)} if panel else {})
    colours = {direction: STYLE[direction][0] for direction in there}
    return Chart(
        "line", x, "rate", x_title, "refusal rate, harmless prompts", series="direction", panel=panel, names=names, colours=colours, lines=reference(baseline, STYLE["none"][3]), y_range=(0, 1)
    )  # fmt: skip


def _shown(figure: Any, text: Any, room: float, size: float) -> str:
    """One cell of text: no control characters, at most eight lines."""
    clean = " ".join("".join(c if c.isprintable() else " " for c in str(text or "")[:600]).split())
    lines = fitted(figure, clean or "(nothing)", room, size=size).split("\n")
    return "\n".join(lines if len(lines) <= 8 else [*lines[:7], lines[7][:-1] + "…"])

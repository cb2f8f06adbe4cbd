"""Figures of reply inversion: the fitting answer by layer, the four answers, positions. Knows no experiment."""

from collections.abc import Mapping

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from latentguard.charts import Chart, Plot
from latentguard.plots.style import (
    DOUBLE,
    GREY,
    INK,
    MARKERS,
    OKABE_ITO,
    SINGLE,
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
from latentguard.plots.words import Named, compose, end, layer_ticks, wrapped

_SIGNED = {
    "+harm": ("#D55E00", "o", "-", "+ harmfulness"), "-harm": ("#D55E00", "v", "-", "− harmfulness"),
    "+refuse": ("#0072B2", "s", "-", "+ refusal"), "-refuse": ("#56B4E9", "D", "--", "− refusal"),
    "+random": ("#009E73", "^", ":", "± random, equal norm"), "-random": ("#009E73", "^", ":", "± random, equal norm"),
}  # fmt: skip
_ANSWERS = {
    "certainly": ("#D55E00", "", "Certainly"),
    "no": ("#0072B2", "//", "No"),
    "decline": ("#E69F00", "..", "declines"),
    "other": ("#CCCCCC", "", "other"),
}
_TOKENS = {"before": "before the question only", "instruction": "instruction only", "all": "all tokens"}
_RIGHT = {"harmless": "no", "harmful": "certainly"}


@in_style
def inversion_by_layer(rows: Rows, baseline: Mapping[str, Mapping], *, title: str, depth: int) -> Plot:
    """P of the fitting answer by layer: "No" for harmless requests, "Certainly" for harmful ones (Figs. 5, 11, 12).

    Below it which way the answer leans. Rows: label, direction, layer, value, low, high, n, leaning, leaning_low, leaning_high.
    `baseline` holds the shares and the leaning without steering, by label.
    """
    figure = figure_of(DOUBLE, 4.2)
    axes = figure.subplots(2, 2, sharey="row", sharex=True)
    named: dict[str, Named] = {}
    for place, (label, right) in enumerate(_RIGHT.items()):
        upper, lower = axes[0][place], axes[1][place]
        n = counted([row for row in rows if row["label"] == label])
        for axis, value in ((upper, right), (lower, "leaning")):
            line = plain(axis).axhline(number(baseline[label][value]), color=GREY, linestyle="--")
        named["none"] = Named("no steering", line)
        for direction in distinct([row for row in rows if row["label"] == label], "direction"):
            colour, marker, dashes, name = _SIGNED[direction]
            line = sorted((row for row in rows if (row["label"], row["direction"]) == (label, direction)), key=lambda row: row["layer"])
            line_with_band(lower, line, "layer", "leaning", colour, low="leaning_low", high="leaning_high", marker=marker, linestyle=dashes)
            named[name] = Named(name, line_with_band(upper, line, "layer", "value", colour, marker=marker, linestyle=dashes))
        upper.set(title=f"{label} requests, {n}", ylabel=f'P("{right.capitalize()}")', ylim=(-0.03, 1.03))
        lower.set(xlabel=f"layer steered (of {depth})", ylabel="log P(Certainly) / P(No)")
        layer_ticks(lower, distinct(rows, "layer"))
    compose(figure, title, list(named.values()))
    caption = "Above, the probability of the fitting first token by the layer at which a direction is added or taken away; below, which way the answer leans. The dashed "
    caption += "line is no steering, bands are bootstrap 95% intervals over prompts. Form of Figs. 5, 11 and 12 of arXiv 2507.11878."
    told = {d: _SIGNED[d] for d in distinct(rows, "direction")}
    chart = Chart(
        "line", "layer", "value", f"layer steered (of {depth})", "P of the fitting answer", series="direction", panel="label",
        names={d: name for d, (*_, name) in told.items()} | {f"label={side}": f'{side} requests: P("{right.capitalize()}")' for side, right in _RIGHT.items()},
        colours={d: colour for d, (colour, *_) in told.items()}, y_range=(0, 1),
        lines=tuple(line for side, right in _RIGHT.items() for line in reference(baseline[side], "no steering", right, panel=side)),
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


@in_style
def answers(rows: Rows, *, title: str) -> Plot:
    """Shares of the four answers, from logits and from generated text, a bar a setting; the fitting answer first, in text with its interval.

    Rows: label, direction, tokens, layer, coef, n, p_<answer>, text_<answer>, rate, low, high (of the fitting answer in text).
    """
    labels = distinct(rows, "label")
    sizes = [sum(row["label"] == label for row in rows) for label in labels]
    figure = figure_of(DOUBLE, 0.2 * sum(sizes) + 0.4 * len(labels) + 0.4)
    axes = figure.subplots(len(labels), 2, sharex=True, squeeze=False, height_ratios=[size + 1 for size in sizes])
    for line, label in zip(axes, labels, strict=True):
        here = [row for row in rows if row["label"] == label]
        order = sorted(_ANSWERS, key=lambda answer: (answer != _RIGHT.get(label), list(_ANSWERS).index(answer)))
        for axis, source, what in zip(line, ("p", "text"), ("first token", "text"), strict=True):
            left = [0.0] * len(here)
            for answer in order:
                colour, hatch, _ = _ANSWERS[answer]
                width = column(here, f"{source}_{answer}")
                plain(axis).barh(range(len(here)), width, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4)
                left = [a + b for a, b in zip(left, width, strict=True)]
            axis.set(title=f"{label} requests: {what}, {counted(here)}", xlim=(0, 1))
            axis.set_yticks(range(len(here)), [wrapped(_setting(row), 60, 1) for row in here] if source == "p" else [""] * len(here), fontsize=6.2)
            axis.invert_yaxis()
        if all("rate" in row for row in here):
            for ecolor, elinewidth, capthick in (("white", 2.6, 2.6), (INK, 1, 1)):
                look = {"ecolor": ecolor, "elinewidth": elinewidth, "capthick": capthick, "linestyle": "none", "clip_on": False}
                line[1].errorbar(column(here, "rate"), range(len(here)), xerr=whiskers(here, "rate"), **look)
    for axis in axes[-1]:
        axis.set_xlabel("share")
    named = [Named(name, Patch(facecolor=colour, hatch=hatch, edgecolor="white")) for colour, hatch, name in _ANSWERS.values()]
    compose(figure, title, [*named, Named("95% interval of the fitting answer", Line2D([], [], color=INK))])
    caption = "What the model answers at the validated settings, by its first token (left) and in the text it writes (right); the fitting answer stands first, "
    caption += "in text with its Wilson 95% interval."
    names = (
        {d: style[3] for d, style in _SIGNED.items()}
        | {"none": "no steering", "": "no steering", "None": "no steering", "paper": "the paper's tokens"}
        | _TOKENS
    )
    colours = {"none": GREY} | {d: style[0] for d, style in _SIGNED.items()}
    chart = Chart(
        "points", "tokens", "rate", "tokens that are steered", "fitting answer in text", series="direction", panel="label", colours=colours, y_range=(0, 1),
        names=names | {f"label={side}": f'{side} requests: "{right.capitalize()}"' for side, right in _RIGHT.items()},
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


@in_style
def certainly_by_position(rows: Rows, *, title: str) -> Plot:
    """P(Certainly) by layer, a line an extraction position (Fig. 16). Rows: position, layer, value, low, high, n."""
    positions = distinct(rows, "position")
    look = {position: ((OKABE_ITO + ("#999999",))[i % 8], (*MARKERS, "*")[i % 8]) for i, position in enumerate(positions)}
    figure, (axis,) = panels(1, 2.4, width=SINGLE)
    named = []
    for position, (colour, marker) in look.items():
        line = sorted((row for row in rows if row["position"] == position), key=lambda row: row["layer"])
        drawn = line_with_band(axis, line, "layer", "value", colour, marker=marker, alpha=0.1)
        named.append(Named(f"{position}, {counted(line)}", drawn, colour, end(line, "layer", "value")))
    axis.set(xlabel="layer steered", ylabel='P("Certainly"), harmless requests', ylim=(-0.03, 1.03))
    layer_ticks(axis, distinct(rows, "layer"))
    compose(figure, title, named, axis)
    caption = "Probability that a harmless request is answered “Certainly” under the harmfulness direction read at each token position, by the layer steered; "
    caption += "bands are bootstrap 95% intervals over prompts. Form of Fig. 16 of arXiv 2507.11878."
    chart = Chart(
        "line", "layer", "value", "layer steered", 'P("Certainly"), harmless requests', series="position", colours={p: colour for p, (colour, _) in look.items()}, y_range=(0, 1)
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


def _setting(row: Mapping) -> str:
    if row["direction"] == "none":
        return "no steering"
    rule = f", {_TOKENS[row['tokens']]}" if row["tokens"] in _TOKENS else ""
    draw = f" {row['draw'] + 1}" if row.get("draw") is not None else ""
    return f"{_SIGNED[row['direction']][3].replace('±', row['direction'][0])}{draw}, layer {row['layer']}, ×{abs(row['coef']):g}{rule}"

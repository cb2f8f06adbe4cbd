"""Figures of reply inversion: the fitting answer by layer, the four answers, positions. Knows no experiment."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from latentguard.plots.style import Rows, counted, figure_of, legend_below, plain

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


def inversion_by_layer(rows: Rows, baseline: Mapping[str, Mapping], *, title: str, depth: int) -> Figure:
    """P of the fitting answer by layer: "No" for harmless requests, "Certainly" for harmful ones (Figs. 5, 11, 12).

    Below it which way the answer leans. Rows: label, direction, layer, value, low, high, n, leaning, leaning_low, leaning_high.
    `baseline` holds the shares and the leaning without steering, by label.
    """
    figure = figure_of(10.4, 8.2)
    axes = figure.subplots(2, 2, sharey="row", sharex=True)
    for column, (label, right) in enumerate((("harmless", "no"), ("harmful", "certainly"))):
        upper, lower = axes[0][column], axes[1][column]
        n = counted([row for row in rows if row["label"] == label])
        plain(upper).axhline(baseline[label][right], color="#555555", linestyle="--", linewidth=1.2, label="no steering")
        plain(lower).axhline(baseline[label]["leaning"], color="#555555", linestyle="--", linewidth=1.2)
        for direction in dict.fromkeys(row["direction"] for row in rows if row["label"] == label):
            colour, marker, dashes, name = _SIGNED[direction]
            line = sorted((row for row in rows if (row["label"], row["direction"]) == (label, direction)), key=lambda row: row["layer"])
            at = [row["layer"] for row in line]
            for axis, value, low, high in ((upper, "value", "low", "high"), (lower, "leaning", "leaning_low", "leaning_high")):
                axis.fill_between(at, [row[low] for row in line], [row[high] for row in line], color=colour, alpha=0.13, linewidth=0)
                axis.plot(at, [row[value] for row in line], color=colour, marker=marker, linestyle=dashes, label=name if axis is upper else None)
        upper.set(title=f"{label} requests ({n})", ylabel=f'P("{right.capitalize()}")', ylim=(-0.03, 1.03))
        lower.set(xlabel=f"layer steered (of {depth})", ylabel="log P(Certainly) / P(No)")
        lower.set_xticks(sorted({row["layer"] for row in rows}))
    handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10.5)
    return figure


def answers(rows: Rows, *, title: str) -> Figure:
    """Shares of the four answers, from logits and from generated text, a bar a setting.

    Rows: label, direction, tokens, layer, coef, n, p_<answer>, text_<answer>.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    sizes = [sum(row["label"] == label for row in rows) for label in labels]
    figure = figure_of(11.0, 0.27 * sum(sizes) + 2.2)
    axes = figure.subplots(len(labels), 2, sharex=True, squeeze=False, height_ratios=sizes)
    for line, label in zip(axes, labels, strict=True):
        here = [row for row in rows if row["label"] == label]
        names = [_setting(row) for row in here]
        for axis, source, what in zip(line, ("p", "text"), ("first-token probability", "generated text"), strict=True):
            left = [0.0] * len(here)
            for answer, (colour, hatch, name) in _ANSWERS.items():
                width = [row[f"{source}_{answer}"] for row in here]
                plain(axis).barh(range(len(here)), width, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4, label=name)
                left = [a + b for a, b in zip(left, width, strict=True)]
            axis.set(title=f"{label} requests, {what} (n = {here[0]['n']})", xlim=(0, 1))
            axis.title.set_fontsize(9.5)
            axis.set_yticks(range(len(here)), names if source == "p" else [""] * len(here), fontsize=8)
            axis.invert_yaxis()
    return legend_below(figure, axes[0][0], title, columns=4)


def _setting(row: Mapping) -> str:
    if row["direction"] == "none":
        return "no steering"
    rule = (
        ""
        if row["tokens"] == "paper"
        else {"before": ", before the question only", "instruction": ", instruction only", "all": ", all tokens"}.get(row["tokens"], "")
    )
    draw = f" {row['draw'] + 1}" if row.get("draw") is not None else ""
    return f"{_SIGNED[row['direction']][3].replace('±', row['direction'][0])}{draw}, layer {row['layer']}, ×{abs(row['coef']):g}{rule}"


def certainly_by_position(rows: Rows, *, title: str) -> Figure:
    """P(Certainly) by layer, a line an extraction position (Fig. 16). Rows: position, layer, value, low, high, n."""
    figure = figure_of(8.0, 4.8)
    axis = plain(figure.subplots())
    colours = ["#999999", "#E69F00", "#D55E00", "#CC79A7", "#009E73", "#56B4E9", "#0072B2", "#000000"]
    for i, position in enumerate(dict.fromkeys(row["position"] for row in rows)):
        line = sorted((row for row in rows if row["position"] == position), key=lambda row: row["layer"])
        at = [row["layer"] for row in line]
        colour = colours[i % len(colours)]
        axis.fill_between(at, [row["low"] for row in line], [row["high"] for row in line], color=colour, alpha=0.08, linewidth=0)
        axis.plot(at, [row["value"] for row in line], color=colour, marker="osD^vPX*"[i % 8], label=f"{position} ({counted(line)})")
    axis.set(xlabel="layer steered", ylabel='P("Certainly"), harmless requests', ylim=(-0.03, 1.03))
    axis.set_xticks(sorted({row["layer"] for row in rows}))
    return legend_below(figure, axis, title, columns=4)

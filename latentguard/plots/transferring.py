"""Figures of what carries over between two models, or between places of one: cosines, probes, steered answers, patching maps. Knows no experiment."""

import math

from matplotlib.lines import Line2D

from latentguard.charts import Chart, Line, Plot
from latentguard.plots.heat import cells, colour_scale
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
    outer,
    panels,
    plain,
    whiskers,
)
from latentguard.plots.words import Named, compose, whole_ticks

CONTRASTS = {"truth": "true − false", "harmfulness": "harmful − harmless", "refusal": "refused − accepted"}
_DIFFERS = {"the paper's two places": "#D55E00", "same place": "#0072B2", "other position": "#CC79A7", "other template": "#009E73"}
_PAPER = "the paper's two places"


@in_style
def places(rows: Rows, *, title: str) -> Plot:
    """A row a pair of places, a panel a contrast; hollow marks and ticks are of halves of the prompts, grey what random and shuffled directions reach.

    Rows: contrast, pair, a, b, differs, layer, value, low, high, n, halves, ceiling, random_high, shuffled_high.
    """
    contrasts, pairs = distinct(rows, "contrast"), distinct(rows, "pair")
    figure = figure_of(DOUBLE, 0.24 * len(pairs) + 0.7)
    axes = figure.subplots(1, len(contrasts), sharey=True, squeeze=False)[0]
    for axis, contrast in zip(axes, contrasts, strict=True):
        plain(axis)
        axis.axvline(0, color=GREY, linewidth=0.7)
        mine = [row for row in rows if row["contrast"] == contrast]
        for row in mine:
            at, colour = pairs.index(row["pair"]), _DIFFERS[row["differs"]]
            reach = max(row["random_high"], row["shuffled_high"])
            axis.fill_betweenx([at - 0.32, at + 0.32], -reach, reach, color="#999999", alpha=0.25, linewidth=0)
            axis.errorbar([row["value"]], [at], xerr=whiskers([row], "value"), color=colour, marker="o", markersize=3.4, elinewidth=1, linestyle="none")
            axis.plot([row["halves"]], [at], color=colour, marker="o", markersize=3.4, markerfacecolor="white", linestyle="none")
            axis.plot([row["ceiling"]] * 2, [at - 0.3, at + 0.3], color=INK, linewidth=1)
        axis.set(
            xlabel="cosine",
            title=f"{CONTRASTS.get(contrast, contrast)}, layer {mine[0]['layer']}, {counted(mine)}",
            xlim=(min(-0.3, *column(rows, "low"), *column(rows, "halves")) - 0.03, 1.04),
        )
    axes[0].set_yticks(range(len(pairs)), [pair.replace(" | ", "\nwith ") for pair in pairs])
    axes[0].set_ylim(len(pairs) - 0.5, -0.5)
    for label, pair in zip(axes[0].get_yticklabels(), pairs, strict=True):
        label.set_weight("bold" if any(row["differs"] == _PAPER for row in rows if row["pair"] == pair) else "normal")
    named = [Named(kind, Line2D([], [], color=_DIFFERS[kind], marker="o", linewidth=1)) for kind in distinct(rows, "differs")]
    named += [Named("hollow: from different halves of the prompts", Line2D([], [], color=INK, marker="o", markerfacecolor="white", linestyle="none"))]
    named += [Named("where hollow marks lie if both are one", Line2D([], [], color=INK, marker="|", linestyle="none", markersize=8))]
    named += [Named("random, swapped labels", Line2D([], [], color="#999999", alpha=0.4, linewidth=6))]
    compose(figure, title, named)
    whose = "of two models" if any(row["a"].startswith("base: ") for row in rows) else "within one model"
    caption = f"Cosine of differences of means at two places {whose}, at the layer chosen on held-out train prompts; in bold the pair nearest to what arXiv 2504.02904 "
    caption += "compares. Filled: from the same prompts, whose quirks are in both directions, with 95% intervals (pairs of prompts resampled). Hollow: one direction from each half of "
    caption += "the pairs; upright ticks are what two halves reach at one place (geometric mean of both places, 0 where halves of one do not agree), so a hollow mark on its tick is one "
    caption += "direction. Grey: 97.5% of random directions, or of labels swapped in half of the pairs, lie within."
    chart = Chart("bars", "pair", "value", "", "cosine", series="differs", panel="contrast", names=CONTRASTS, colours=_DIFFERS, lying=True, y_range=(-1, 1))
    return Plot(figure, title, caption, chart)


@in_style
def by_layer(rows: Rows, *, title: str) -> Plot:
    """A line a pair of places, a panel a contrast, dotted its ceiling. Rows: contrast, pair, differs, layer, value, low, high, n, ceiling."""
    contrasts, pairs = distinct(rows, "contrast"), distinct(rows, "pair")
    figure, axes = panels(len(contrasts), 2.2, across=3, sharey=True)
    looks = {pair: (OKABE_ITO[i % 7], MARKERS[i % 7]) for i, pair in enumerate(pairs)}
    for axis, contrast in zip(axes, contrasts, strict=True):
        axis.axhline(0, color=GREY, linewidth=0.7)
        for pair, (colour, marker) in looks.items():
            line = [row for row in rows if (row["contrast"], row["pair"]) == (contrast, pair)]
            if line:
                line_with_band(axis, line, "layer", "value", colour, marker=marker, markersize=2.6, linewidth=1)
                axis.plot(column(line, "layer"), column(line, "ceiling"), color=colour, linestyle=":", linewidth=0.7)
        axis.set(xlabel="layer", title=CONTRASTS.get(contrast, contrast))
        whole_ticks(axis)
    axes[0].set_ylabel("cosine")
    compose(figure, title, [Named(pair, Line2D([], [], color=colour, marker=marker, linewidth=1), colour) for pair, (colour, marker) in looks.items()])
    caption = "Cosine by layer, a panel a contrast; bands are 95% intervals (pairs of prompts resampled), dotted what halves of the prompts would reach were both directions one. "
    caption += "At most four pairs of places are drawn; rows.jsonl has all."
    chart = Chart(
        "line", "layer", "value", "layer", "cosine", series="pair", panel="contrast", also={"ceiling": "split-half ceiling"}, names=CONTRASTS,
        colours={pair: colour for pair, (colour, _) in looks.items()},
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


@in_style
def grid(rows: Rows, *, title: str) -> Plot:
    """Every place against every other, a panel a contrast. Rows: contrast, a, b, layer, value, n."""
    contrasts, down, across = distinct(rows, "contrast"), distinct(rows, "a"), distinct(rows, "b")
    figure = figure_of(DOUBLE, 0.34 * len(down) + 1.5)
    axes = figure.subplots(1, len(contrasts), sharey=True, squeeze=False)[0]
    for axis, contrast in zip(axes, contrasts, strict=True):
        axis.set(xlim=(-0.5, len(across) - 0.5), ylim=(len(down) - 0.5, -0.5), title=CONTRASTS.get(contrast, contrast))
        names = [[name.removeprefix("post: ") for name in side] if across == down else side for side in (across, down)]
        axis.set_xticks(range(len(across)), names[0], rotation=90)
        axis.set_yticks(range(len(down)), names[1])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.colorbar(colour_scale(), ax=list(axes), fraction=0.03, pad=0.015, label="cosine", ticks=[0, 0.5, 1]).outline.set_visible(False)  # type: ignore[operator]
    compose(figure, title)
    for axis, contrast in zip(axes, contrasts, strict=True):
        cells(axis, [{**row, "x": across.index(row["b"]), "y": down.index(row["a"])} for row in rows if row["contrast"] == contrast], "value")
    caption = "Cosine of differences of means, a row a place of the one model, a column a place of the other; below 0 has the colour of 0. Single cosines have no interval here."
    chart = Chart("heat", "b", "a", "", "", panel="contrast", value="value", value_title="cosine", low=None, high=None, names=CONTRASTS)
    return Plot(figure, title, caption, chart)


@in_style
def probes(rows: Rows, *, title: str) -> Plot:
    """AUROC on held-out prompts by place, a panel a contrast and topic; filled: mass mean, hollow: logistic, if rows have it. Rows: shown, place, move, method, value, low, high, n."""
    shown, at, moves = distinct(rows, "shown"), distinct(rows, "place"), distinct(rows, "move")
    figure, axes = panels(len(shown), 1.9, across=2, sharex=True, sharey=True)
    looks = {move: ("#999999", "_") if move == "random direction" else (OKABE_ITO[i % 7], MARKERS[i % 7]) for i, move in enumerate(moves)}
    for axis, what in zip(axes, shown, strict=True):
        axis.axhline(0.5, color=GREY, linewidth=0.7)
        here = [row for row in rows if row["shown"] == what]
        for m, (move, (colour, marker)) in enumerate(looks.items()):
            for k, method in enumerate(distinct(rows, "method")):
                mine = [row for row in here if (row["move"], row["method"]) == (move, method)]
                if not mine:
                    continue
                shift = 0.8 * ((m + 0.5) / len(moves) - 0.5) + (0.05 if method == "logistic" else -0.05 if method == "mass_mean" else 0)
                places_ = [at.index(row["place"]) + shift for row in mine]
                look = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 3.2, "elinewidth": 0.8, "capsize": 0}
                axis.errorbar(places_, column(mine, "value"), yerr=whiskers(mine, "value"), markerfacecolor="white" if method == "logistic" else colour, **look)
                del k
        axis.set(
            title=f"{what}, {counted([row for row in here if row['method'] != 'random'])}", ylim=(min(0.4, *column(rows, "low")) - 0.02, 1.02), ylabel="AUROC"
        )
        axis.set_xticks(range(len(at)), [place.replace(" ", "\n") for place in at])
    outer(axes)
    both = "logistic" in distinct(rows, "method")
    named = [Named(move, Line2D([], [], color=colour, marker=marker, linestyle="none"), colour) for move, (colour, marker) in looks.items()]
    if both:
        named.append(Named("hollow: logistic", Line2D([], [], color=INK, marker="o", markerfacecolor="white", linestyle="none")))
    compose(figure, title, named)
    caption = (
        "Area under the ROC on held-out prompts (of truth: topics that nothing was fitted on) by where they are read; probes project on the difference of means"
    )
    caption += ", hollow ones are logistic. " if both else " (mass mean; logistic ones stand in summary.json). "
    caption += "Whiskers are bootstrap 95% intervals; grey the middle 95% of random directions, each taken the way round that does better."
    chart = Chart(
        "points",
        "place",
        "value",
        "place",
        "AUROC",
        series="move",
        dash="method",
        panel="shown",
        colours={m: c for m, (c, _) in looks.items()},
        lines=(Line(0.5, "chance"),),
    )
    return Plot(figure, title, caption, chart)


@in_style
def steered(rows: Rows, *, title: str) -> Plot:
    """Normalised indirect effect, a mark a direction and model, both ways. Rows: what, way, value, low, high, n."""
    what, ways = distinct(rows, "what"), distinct(rows, "way")
    figure, (axis,) = panels(1, 0.3 * len(what) + 0.6, width=DOUBLE)
    colours = {"F→T": "#0072B2", "T→F": "#D55E00"}
    axis.axvline(0, color=GREY, linewidth=0.7)
    for k, way in enumerate(ways):
        mine = [row for row in rows if row["way"] == way]
        at = [what.index(row["what"]) + 0.36 * (k - (len(ways) - 1) / 2) for row in mine]
        look = {"color": colours.get(way, GREY), "marker": MARKERS[k], "markersize": 4.5, "linestyle": "none", "elinewidth": 1}
        axis.errorbar(column(mine, "value"), at, xerr=whiskers(mine, "value"), **look)
    axis.set_yticks(range(len(what)), what)
    ends = [x for row in rows for x in (row["low"], row["high"]) if math.isfinite(x)]
    axis.set(ylim=(len(what) - 0.5, -0.5), xlim=(min([-0.1, *ends]) - 0.01, max([0.1, *ends]) + 0.01))
    axis.set_xlabel(f"normalised indirect effect: 0 as it was, 1 all the way; {counted(rows)}")
    compose(figure, title, [Named(way, Line2D([], [], color=colours.get(way, GREY), marker=MARKERS[k], linewidth=1)) for k, way in enumerate(ways)])
    caption = "How far P(TRUE) − P(FALSE) of false statements moves towards 1 with the direction added (F→T), and that of true ones towards −1 with it taken away (T→F), in the form "
    caption += "of arXiv 2504.02904; direction of → steered model. Whiskers are bootstrap 95% intervals; random directions have the same norm at every layer."
    chart = Chart("bars", "what", "value", "", "normalised indirect effect", series="way", colours=colours, lying=True)
    return Plot(figure, title, caption, chart)


@in_style
def maps(rows: Rows, *, title: str) -> Plot:
    """The mean patching map, a panel a model. Rows: model, layer, token, place, value, n."""
    models, layers = distinct(rows, "model"), sorted(distinct(rows, "layer"), reverse=True)
    tokens = [row["token"] for row in rows if (row["model"], row["layer"]) == (models[0], layers[0])]
    figure = figure_of(DOUBLE, 0.22 * len(layers) + 1.1)
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        axis.set(
            xlim=(-0.5, len(tokens) - 0.5),
            ylim=(len(layers) - 0.5, -0.5),
            title=f"{model}, {counted([r for r in rows if r['model'] == model])} pairs",
            xlabel="patched token",
        )
        axis.set_xticks(range(len(tokens)), tokens, rotation=90)
        axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("layer")
    figure.colorbar(colour_scale(), ax=list(axes), fraction=0.03, pad=0.015, label="share of the way to TRUE", ticks=[0, 0.5, 1]).outline.set_visible(False)  # type: ignore[operator]
    compose(figure, title)
    for axis, model in zip(axes, models, strict=True):
        cells(axis, [{**row, "x": row["place"], "y": layers.index(row["layer"])} for row in rows if row["model"] == model], "value")
    caption = "A true statement's residual state in the run of a false one of the same frame, at one layer and token: 0 is the false run's log P(TRUE) − log P(FALSE), 1 the true run's. "
    caption += "Tokens before the first that differs are left out: their states are the same in both runs."
    chart = Chart("heat", "token", "layer", "patched token", "layer", panel="model", value="value", value_title="share of the way", low=None, high=None)
    return Plot(figure, title, caption, chart)

"""Figures of forecasts of refusal: AUROC by predictor, by layer, and classifiers of labelled replies. Knows no predictor and no experiment."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from matplotlib.lines import Line2D

from latentguard.charts import Chart, Line, Plot
from latentguard.plots.comparing import forest
from latentguard.plots.style import (
    DOUBLE,
    GREY,
    MARKERS,
    OKABE_ITO,
    PALE,
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
    plain,
    whiskers,
)
from latentguard.plots.words import Named, compose, layer_ticks, whole_ticks

PREDICTORS = {
    "majority": "the more frequent verdict",
    "label": "label: harmful, harmless, look-alike",
    "topic": "the data set's category",
    "tfidf": "words (TF-IDF, logistic)",
    "first_token": "log-odds of a first token of refusal",
    "delta_harmful": "Δ harmful (t_inst)",
    "delta_refuse": "Δ refuse (t_post_inst)",
    "probe": "logistic probe, layer chosen",
    "latent": "latents, position and layer chosen",
}
_SETS = {"all": "all prompts", "harmful": "among harmful ones", "not harmful": "among harmless and look-alikes"}
_SPLITS = {"sources": ("#D55E00", "o", "on sources never seen"), "groups": ("#0072B2", "s", "on groups never seen")}
_METHODS = {"tfidf": "TF-IDF and logistic regression"}
TASKS = {"reply": "from the reply", "prompt": "from the prompt alone"}


@in_style
def areas_by_predictor(rows: Rows, *, title: str) -> Plot:
    """AUROC of refused against accepted, a row a predictor, a panel a kind of prompt, a colour a split; below them the shuffled controls.

    Rows: split, set, name (`called`), value, low, high, n.
    """
    names, sets = sorted({row["name"] for row in rows}, key=_rank), [one for one in _SETS if one in distinct(rows, "set")]
    splits = [one for one in _SPLITS if one in distinct(rows, "split")]
    figure = figure_of(DOUBLE, 0.19 * len(names) + 0.75)
    axes = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for axis, of in zip(axes, sets, strict=True):
        plain(axis)
        axis.axvline(0.5, color=GREY, linewidth=0.7)
        for s, split in enumerate(splits):
            colour, marker, _ = _SPLITS[split]
            here = [row for row in rows if (row["set"], row["split"]) == (of, split)]
            places = [names.index(row["name"]) + 0.36 * ((s + 0.5) / len(splits) - 0.5) for row in here]
            look = {"color": colour, "marker": marker, "markersize": 3, "linestyle": "none", "elinewidth": 0.9, "capsize": 0}
            axis.errorbar(column(here, "value"), places, xerr=whiskers(here, "value"), **look)
        axis.set(xlim=(-0.02, 1.02), xlabel=f"AUROC {_SETS[of]},\n{counted([row for row in rows if row['set'] == of])}")
        axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axis.grid(axis="y", color=PALE, linewidth=0.4)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    for axis in axes:
        axis.tick_params(axis="y", length=0)
    compose(figure, title, [Named(_SPLITS[s][2], Line2D([], [], color=_SPLITS[s][0], marker=_SPLITS[s][1], linewidth=1)) for s in splits])
    caption = (
        "AUROC of refused against accepted prompts, forecast by what was fitted on other sources or on other groups; whiskers are bootstrap 95% intervals over "
    )
    caption += "prompts, the grey line is chance. The right panels count pairs of one source (or part) alone: within a label, knowing it cannot help. Shuffled: fitted and judged on verdicts dealt anew, over all prompts or "
    caption += "within each source; whiskers go from the lowest to the highest draw."
    chart = Chart(
        "bars", "name", "value", "", "AUROC", series="split", panel="set", lying=True, y_range=(0, 1), lines=(Line(0.5, "chance"),),
        names={**{f"set={key}": words for key, words in _SETS.items()}, **{f"split={key}": look[2] for key, look in _SPLITS.items()}},
        colours={key: look[0] for key, look in _SPLITS.items()},
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


@in_style
def areas_by_layer(rows: Rows, *, title: str) -> Plot:
    """AUROC of the logistic probe by layer, a line a position, a panel a split; words alone as a dashed line.

    Rows: split, position (or "words alone", with no layer), layer, value, low, high, n.
    """
    curves = [row for row in rows if row.get("layer") not in (None, "")]
    words = {row["split"]: row for row in rows if row.get("layer") in (None, "")}
    splits, positions = [one for one in _SPLITS if one in distinct(rows, "split")], distinct(curves, "position")
    figure, axes = panels(len(splits), 2.5, across=2, sharey=True)
    lines: tuple[Line, ...] = ()
    for axis, split in zip(axes, splits, strict=True):
        for k, position in enumerate(positions):
            own = sorted((row for row in curves if (row["split"], row["position"]) == (split, position)), key=lambda row: number(row["layer"]))
            line_with_band(axis, own, "layer", "value", OKABE_ITO[k % 7], alpha=0.12, marker=MARKERS[k % 7], markersize=2.6)
        axis.axhline(0.5, color=GREY, linewidth=0.7)
        if split in words:
            axis.axhline(number(words[split]["value"]), color="#000000", linestyle="--", linewidth=1)
            row = words[split]
            lines += (Line(number(row["value"]), "words alone", number(row["low"]), number(row["high"]), row.get("n"), split),)
        axis.set(xlabel="layer", ylabel="AUROC, refused against accepted", title=_SPLITS[split][2])
        axis.grid(axis="y", color=PALE, linewidth=0.5)
        known = distinct(curves, "layer")
        (whole_ticks(axis) if len(known) > 8 else layer_ticks(axis, [number(x) for x in known]))
    outer(axes)
    named = [Named(str(p), Line2D([], [], color=OKABE_ITO[k % 7], marker=MARKERS[k % 7])) for k, p in enumerate(positions)]
    compose(figure, title, [*named, Named("words alone", Line2D([], [], color="#000000", linestyle="--"))])
    caption = f"A logistic probe on the states of one layer and position ({counted(curves)}): AUROC on sources, and on groups, that it never saw; bands are bootstrap 95% "
    caption += "intervals over prompts. Dashed: TF-IDF and logistic regression on the words; grey: chance. The layer of the study's probe is chosen without these numbers."
    chart = Chart(
        "line", "layer", "value", "layer", "AUROC", series="position", panel="split", lines=(*lines, Line(0.5, "chance")),
        names={f"split={key}": look[2] for key, look in _SPLITS.items()}, colours={str(p): OKABE_ITO[k % 7] for k, p in enumerate(positions)},
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


@in_style
def shares_refused(rows: Rows, *, title: str) -> Plot:
    """Share of prompts refused, a row a set, a colour a label. Rows: name (of the set), label, value, low, high, n."""
    caption = f"Share of each set's prompts that the model refuses ({counted(rows)}), with 95% intervals by Wilson: what there is to foretell."
    return forest(rows, title=title, caption=caption, what="share refused", name="name", series="label")


@in_style
def accuracy_on_replies(rows: Rows, *, title: str) -> Plot:
    """Accuracy by method and way of splitting, a panel a task. Rows: name (`method`), from (one of `TASKS`), value, low, high, majority, published."""
    caption = "Mean accuracy over random 70/15/15 splits; whiskers hold 95% of the splits. Dashed: the published accuracy, which for prompts is of a classifier trained on "
    caption += "10,000 machine-labelled prompts and tested on 985 others; dotted: the share of the more frequent side. Human labels: everything but complied is a refusal."
    plot = forest(rows, title=title, caption=caption, what="accuracy on the test rows", name="name", series=None, panel="from")
    lines: list[Line] = []
    for axis, asked in zip(plot.figure.axes, distinct(rows, "from"), strict=True):
        own = next(row for row in rows if row["from"] == asked and row.get("published"))
        axis.axvline(number(own["published"]), color=GREY, linestyle="--", linewidth=0.9)
        axis.axvline(number(own["majority"]), color=GREY, linestyle=":", linewidth=0.9)
        axis.set_xlim(0.5, 1.0)
        lines += [Line(number(own["published"]), "published", panel=asked), Line(number(own["majority"]), "majority", panel=asked)]
    assert plot.chart
    return replace(plot, chart=replace(plot.chart, lines=tuple(lines), y_range=(0.5, 1.0)))


def called(row: Mapping[str, Any]) -> str:
    """A predictor in words, with its control."""
    name = _words(PREDICTORS, row["predictor"])
    return f"{name.partition(',')[0].partition(' (')[0]}, {row['control']}" if row.get("control") else name


def method(row: Mapping[str, Any]) -> str:
    """A classifier of labelled replies in words."""
    return _words(_METHODS, row["method"]) + (", near-duplicates together" if row["split"] == "grouped" else "")


def _rank(name: str) -> tuple[int, str]:
    known = list(PREDICTORS.values())
    if name.startswith("probe at "):
        return known.index(PREDICTORS["probe"]), name
    return (known.index(name), "") if name in known else (len(known), name.partition("shuffled")[2] + name)


def _words(known: Mapping[str, str], name: str) -> str:
    return known.get(name, name)

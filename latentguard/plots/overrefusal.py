"""Figures of over-refusal: where look-alikes lie and what is refused, what one word brings, what a gate does. Knows no experiment."""

from matplotlib.lines import Line2D

from latentguard.charts import Chart, Line, Plot
from latentguard.plots.style import DOUBLE, GREY, INK, PALE, Rows, column, counted, distinct, figure_of, in_style, number, panels, plain, whiskers
from latentguard.plots.words import Named, compose

_LABELS = {"lookalike": "look-alikes", "harmful": "harmful requests", "harmless": "plain harmless requests"}
_VERDICTS = {"refused": ("#D55E00", "o", "refused"), "accepted": ("#0072B2", "s", "accepted"), "degenerate": ("#7F7F7F", "X", "degenerate")}
_WORDS = {
    "top": ("#D55E00", "o", "word of most attribution"),
    "other": ("#0072B2", "s", "another word of the same prompt"),
    "top − other": ("#000000", "D", "difference, paired"),
    "softer": ("#009E73", "^", "a harmful-sounding word by a softer one"),
    "softer − other": ("#E69F00", "v", "a softer word less another word"),
}
_AGAINST = {"zero": "× input", "mean": "× (input − mean)"}
_SIDES = {
    "lookalike": ("#009E73", "^", "look-alikes"),
    "harmful": ("#D55E00", "o", "harmful requests"),
    "harmless": ("#0072B2", "s", "plain harmless requests"),
}
_NAMES = {
    "base": "nothing done",
    "gate": "gate, validated threshold",
    "gate_at_0": "gate at 0",
    "everywhere": "ablated for every prompt",
    "coin": "gate by a coin, as often open",
    "coin_within": "coin, as often open for each kind",
    "random": "same gate, random direction",
}


@in_style
def sides(rows: Rows, *, title: str, threshold: float) -> Plot:
    """Each prompt on both gauges, a panel a label, a colour a verdict, with the four counts in the corners.

    Rows: label, verdict, harmfulness, refusal.

    Args:
        threshold: where the gate opens, on the harmfulness gauge.
    """
    labels = [label for label in _LABELS if label in distinct(rows, "label")]
    figure, axes = panels(len(labels), 2.5, sharex=True, sharey=True)
    for axis, label in zip(axes, labels, strict=True):
        here = [row for row in rows if row["label"] == label]
        axis.axvline(0, color=GREY, linewidth=0.7)
        axis.axhline(0, color=PALE, linewidth=0.7, zorder=0)
        axis.axvline(threshold, ymax=0.78, color=INK, linewidth=0.7, linestyle=":")
        for verdict, (colour, marker, _) in _VERDICTS.items():
            mine = [row for row in here if row["verdict"] == verdict]
            axis.plot(
                column(mine, "harmfulness"),
                column(mine, "refusal"),
                color=colour,
                marker=marker,
                markersize=2.6,
                linestyle="none",
                alpha=0.65,
                markeredgewidth=0,
            )
        for x, right in ((0.02, False), (0.98, True)):
            count = {v: sum((row["harmfulness"] > 0) is right for row in here if row["verdict"] == v) for v in ("refused", "accepted")}
            words = f"{'harmful' if right else 'harmless'} side:\n{count['refused']} refused\n{count['accepted']} accepted"
            axis.text(x, 0.98, words, transform=axis.transAxes, ha="right" if right else "left", va="top", fontsize=6.2, color=INK)
        axis.set(xlabel="harmfulness at t_inst  →", title=f"{_LABELS[label]}, n = {len(here)}")
    axes[0].set_ylabel("refusal at t_post_inst  →")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low, high + 0.28 * (high - low))
    shown = [v for v in _VERDICTS if v in distinct(rows, "verdict")]
    named = [Named(_VERDICTS[v][2], Line2D([], [], color=_VERDICTS[v][0], marker=_VERDICTS[v][1], linestyle="none")) for v in shown]
    compose(figure, title, [*named, Named("the gate opens left of this", Line2D([], [], color=INK, linestyle=":", linewidth=0.7))])
    caption = "A mark a test prompt: where it lies between the poles at its own last token and where the reply begins (1: mean of refused harmful train prompts, −1: of "
    caption += "accepted harmless ones, 0: half-way). Numbers are counts by verdict on either side of 0; dotted, the threshold of the gate."
    chart = Chart(
        "points", "harmfulness", "refusal", "harmfulness at t_inst", "refusal at t_post_inst", series="verdict", panel="label", low=None, high=None, n=None,
        names=_LABELS | {v: _VERDICTS[v][2] for v in _VERDICTS}, colours={v: _VERDICTS[v][0] for v in _VERDICTS},
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


@in_style
def swaps(rows: Rows, *, title: str) -> Plot:
    """Change of each measure, prompt by prompt, when one word is replaced; a panel a measure, a line an attribution, filler and kind of word.

    Rows: measure, against, filler, word, value, low, high, n.
    """
    measures = distinct(rows, "measure")
    lines = list(dict.fromkeys((row["against"], row["filler"], row["word"]) for row in rows))
    lines.sort(key=lambda line: line[1] == "listed")
    figure = figure_of(DOUBLE, 0.2 * len(lines) + 0.7)
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axis, measure in zip(axes, measures, strict=True):
        plain(axis).axvline(0, color=GREY, linewidth=0.7)
        for row in (row for row in rows if row["measure"] == measure):
            colour, marker, _ = _WORDS[row["word"]]
            at = lines.index((row["against"], row["filler"], row["word"]))
            axis.errorbar([number(row["value"])], [at], xerr=whiskers([row], "value"), color=colour, marker=marker, markersize=3.4, elinewidth=0.9, capsize=0)
        axis.set(xlabel=f"change in\n{measure}")
    sizes = {line: counted([row for row in rows if (row["against"], row["filler"], row["word"]) == line]) for line in lines}
    told = [f"{_by(against, filler)}, {sizes[against, filler, word]}" for against, filler, word in lines]
    axes[0].set_yticks(range(len(lines)), ["" if k and text == told[k - 1] else text for k, text in enumerate(told)])
    axes[0].set_ylim(len(lines) - 0.5, -0.5)
    for axis in axes:
        axis.tick_params(axis="y", length=0)
    shown = [word for word in _WORDS if word in distinct(rows, "word")]
    compose(figure, title, [Named(_WORDS[word][2], Line2D([], [], color=_WORDS[word][0], marker=_WORDS[word][1], linewidth=1)) for word in shown])
    caption = "Over-refused look-alikes with one word replaced (by which attribution it is chosen, and by what): the change in where they lie on both gauges, in the log-odds that the reply opens with a refusal, and "
    caption += "in the refusal rate, prompt by prompt. Whiskers are bootstrap 95% intervals over prompts; other words are a mean over draws."
    words = (
        {f"against={name}": words for name, words in _AGAINST.items()}
        | {f"filler={filler}": _filler(filler) for filler in distinct(rows, "filler")}
        | {word: name for word, (_, _, name) in _WORDS.items()}
    )
    chart = Chart(
        "bars", "filler", "value", "", "change", series="word", panel="measure", pick="against", lying=True, names=words, colours={word: _WORDS[word][0] for word in _WORDS},
        lines=(Line(0.0, "no change"),),
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


@in_style
def gate(rows: Rows, *, title: str) -> Plot:
    """Refusal by condition, a colour a label; beside it utility and both gauges.

    Rows: condition, measure, label, value, low, high, n.
    """
    groups = {"refusal rate": [f"{label} refusal" for label in _SIDES]}
    groups |= {name: [name] for name in ("utility", "harmfulness", "refusal") if name in distinct(rows, "measure")}
    titles = {"utility": "utility, nats a token", "harmfulness": "harmfulness gauge", "refusal": "refusal gauge"}
    names = distinct(rows, "condition")
    figure = figure_of(DOUBLE, 0.26 * len(names) + 0.7)
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False, width_ratios=[1.6, *[1] * (len(groups) - 1)])[0]
    for axis, (panel, measures) in zip(axes, groups.items(), strict=True):
        plain(axis)
        for l, (label, (colour, marker, _)) in enumerate(_SIDES.items()):  # noqa: E741
            mine = [row for row in rows if row["measure"] in measures and row["label"] == label]
            at = [names.index(row["condition"]) + 0.22 * (l - 1) for row in mine]
            look = {"color": colour, "marker": marker, "markersize": 3, "linestyle": "none", "elinewidth": 0.9, "capsize": 0}
            axis.errorbar(column(mine, "value"), at, xerr=whiskers(mine, "value"), **look)
            for row in (row for row in mine if row["condition"] == "base"):
                axis.axvline(number(row["value"]), color=colour, linewidth=0.6, linestyle="--", zorder=0)
        axis.set(xlabel=titles.get(panel, panel))
        axis.grid(axis="y", color=PALE, linewidth=0.4)
        axis.tick_params(axis="y", length=0)
    axes[0].set_xlim(-0.03, 1.03)
    axes[0].set_yticks(range(len(names)), [_condition(name) for name in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    sizes = {label: counted([row for row in rows if row["measure"] == f"{label} refusal"]) for label in _SIDES}
    compose(figure, title, [Named(f"{name}, {sizes[label]}", Line2D([], [], color=c, marker=m, linewidth=1)) for label, (c, m, name) in _SIDES.items()])
    caption = "Refusal of each kind of request, likelihood of the untouched model's own harmless replies, and both gauges, by what is done. Whiskers are 95% intervals, Wilson's "
    caption += "or bootstrap; dashes, nothing done."
    chart = Chart(
        "bars", "condition", "value", "", "rate, nats a token, or place on a gauge", series="label", panel="measure", lying=True,
        names={name: _condition(name) for name in names} | {label: name for label, (_, _, name) in _SIDES.items()}, colours={label: c for label, (c, _, _) in _SIDES.items()},
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


def _condition(name: str) -> str:
    kind, _, draw = name.rpartition("_")
    return _NAMES.get(name) or f"{_NAMES[kind]}, draw {int(draw) + 1}"


def _by(against: str, filler: str) -> str:
    return _filler(filler) if filler == "listed" else f"{_AGAINST[against]}, {_filler(filler)}"


def _filler(filler: str) -> str:
    return {"(out)": "taken out", "listed": "by our list"}.get(filler, f"by “{filler}”")

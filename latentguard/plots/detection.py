"""Figures of detectors: accuracy by group, AUROC by final mark and position. Knows no experiment."""

from collections.abc import Sequence
from typing import Any

from matplotlib.lines import Line2D

from latentguard.charts import Chart, Line, Plot
from latentguard.plots.style import DOUBLE, GREY, PALE, Rows, column, counted, distinct, figure_of, group_style, in_style, plain, whiskers
from latentguard.plots.words import Named, compose, wrapped

_DETECTORS = {
    "latent_guard": ("#D55E00", "o", "Latent Guard (all layers)"),
    "latent_guard_one_layer": ("#E69F00", "^", "Latent Guard, validated layer"),
    "latent_guard_in_domain": ("#CC79A7", "v", "Latent Guard + in-domain examples"),
    "projection_one_layer": ("#0072B2", "s", "projection, validated layer"),
    "last_token": ("#555555", "X", "last token alone"),
    "ngram": ("#000000", "P", "words and word pairs"),
    "shuffled_labels": ("#009E73", "D", "shuffled labels (range of draws)"),
}
_TERMINALS = {"keep": ("#D55E00", "o", "as they are (keep)"), "strip": ("#56B4E9", "s", "stripped"), "period": ("#0072B2", "^", "one final period")}
_SIDES = ((True, "#D55E00", "o", "harmful"), (False, "#0072B2", "s", "harmless"))
_MARK = "* held-out prompts of the sets that the poles come from"


@in_style
def detectors_by_group(rows: Rows, *, title: str) -> Plot:
    """Recall of harmful and specificity of harmless groups, one marker a detector (Table 3).

    Rows: detector, group, rate, low, high, n, withheld.
    """
    groups, detectors = distinct(rows, "group"), distinct(rows, "detector")
    figure = figure_of(DOUBLE, max(0.34, 0.085 * len(detectors)) * len(groups) + 0.5)
    axis = plain(figure.subplots())
    named = []
    for d, detector in enumerate(detectors):
        colour, marker, name = _DETECTORS[detector]
        here = [row for row in rows if row["detector"] == detector]
        _dots(axis, here, "rate", [groups.index(row["group"]) + 0.8 * ((d + 0.5) / len(detectors) - 0.5) for row in here], colour, marker)
        named.append(Named(name, Line2D([], [], color=colour, marker=marker, linewidth=1)))
    told = {row["group"]: row for row in rows}
    labels = {g: f"{wrapped(group_style(g)[2], 34, 2)}\n{row['is']}, n = {row['n']}{' (withheld)' if row.get('withheld') else ''}" for g, row in told.items()}
    _listed(axis, [labels[group] for group in groups])
    axis.set(xlim=(-0.02, 1.02), xlabel="share classified rightly (threshold 0)")
    axis.grid(axis="x", color=PALE, linewidth=0.5)
    for between in range(1, len(groups)):
        axis.axhline(between - 0.5, color=PALE, linewidth=0.5)
    compose(figure, title, named)
    caption = "Recall of each harmful group and specificity of each harmless one, a mark a detector; whiskers are Wilson 95% intervals. Form of Table 3 of "
    caption += "arXiv 2507.11878. Withheld groups are too small for a claim."
    names = {d: _DETECTORS[d][2] for d in detectors} | {f"group={g}": f"{group_style(g)[2]}, {told[g]['is']}" for g in groups}
    colours = {d: _DETECTORS[d][0] for d in detectors}
    chart = Chart("bars", "group", "rate", "", "share classified rightly", series="detector", names=names, colours=colours, lying=True, y_range=(0, 1))
    return Plot(figure, title, caption, chart)


@in_style
def detectors_by_terminal(rows: Rows, *, title: str) -> Plot:
    """AUROC with the final mark kept, stripped and made equal; a panel a comparison, a line a detector and position.

    Rows: terminal, detector, position, kind, value, low, high, sets.
    """
    kinds, terminals = distinct(rows, "kind"), [t for t in _TERMINALS if t in distinct(rows, "terminal")]
    detectors = [d for d in _DETECTORS if d in distinct(rows, "detector")]
    # A detector's name, below it the positions it reads; one that reads the text stands on its own line.
    lines: list[tuple[str, str]] = []
    for detector in detectors:
        lines += [
            (detector, "text"),
            *((detector, p) for p in distinct(rows, "position") if p != "text" and any((r["detector"], r["position"]) == (detector, p) for r in rows)),
        ]
    figure = figure_of(DOUBLE, 0.165 * len(lines) + 0.55)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        plain(axis).axvline(0.5, color=GREY, linewidth=0.7)
        here = [row for row in rows if row["kind"] == kind]
        for t, terminal in enumerate(terminals):
            colour, marker, _ = _TERMINALS[terminal]
            mine = [row for row in here if row["terminal"] == terminal]
            at = [lines.index((row["detector"], row["position"])) + 0.8 * ((t + 0.5) / len(terminals) - 0.5) for row in mine]
            _dots(axis, mine, "value", at, colour, marker, size=2.6)
        axis.set(xlim=(-0.04, 1.04), xlabel="AUROC", title=f"{kind}, {counted(here)}")
        axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        for at, (_, position) in enumerate(lines):
            if position == "text" and at:
                axis.axhline(at - 0.5, color=PALE, linewidth=0.5)
    _listed(axes[0], [_DETECTORS[d][2] if position == "text" else position for d, position in lines])
    for label, (_, position) in zip(axes[0].get_yticklabels(), lines, strict=True):
        label.set_weight("bold" if position == "text" else "normal")
    compose(figure, title, [Named(_TERMINALS[t][2], Line2D([], [], color=_TERMINALS[t][0], marker=_TERMINALS[t][1], linewidth=1)) for t in terminals])
    caption = "AUROC of each detector, by the position it reads, with the prompts' final marks as they are, stripped, and made equal; the grey line is chance. Whiskers "
    caption += "are bootstrap 95% intervals over prompts, of shuffled labels the range of the draws."
    names = {t: _TERMINALS[t][2] for t in terminals} | {d: _DETECTORS[d][2] for d in detectors} | {"position=text": "the text itself"}
    chart = Chart(
        "bars", "detector", "value", "", "AUROC", series="terminal", panel="kind", pick="position", names=names, colours={t: _TERMINALS[t][0] for t in terminals},
        lines=(Line(0.5, "chance"),), lying=True, y_range=(0, 1),
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


@in_style
def means_by_terminal(rows: Rows, *, title: str) -> Plot:
    """Mean s of every data set, a panel a final mark. Rows: terminal, set, harmful, value, low, high, n, fitted."""
    terminals = [t for t in _TERMINALS if t in distinct(rows, "terminal")]
    names = distinct(sorted(rows, key=lambda row: (not row["harmful"], row["set"])), "set")
    figure = figure_of(DOUBLE, 0.3 * len(names) + 0.55)
    axes = figure.subplots(1, len(terminals), sharey=True, squeeze=False)[0]
    for axis, terminal in zip(axes, terminals, strict=True):
        plain(axis).axvline(0, color=GREY, linewidth=0.7)
        for harmful, colour, marker, _ in _SIDES:
            here = [row for row in rows if row["terminal"] == terminal and bool(row["harmful"]) is harmful]
            _dots(axis, here, "value", [names.index(row["set"]) for row in here], colour, marker)
        axis.set(xlabel="s: nearer the harmful pole  →", title=_TERMINALS[terminal][2])
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="y", color=PALE, linewidth=0.5)
    told = {row["set"]: row for row in rows}
    _listed(axes[0], [wrapped(f"{name} (n = {told[name]['n']}){' *' if told[name]['fitted'] else ''}", 30, 2) for name in names])
    named = [Named(name, Line2D([], [], color=colour, marker=marker, linewidth=1)) for _, colour, marker, name in _SIDES]
    if any(row["fitted"] for row in rows):
        named.append(Named(_MARK, Line2D([], [], linestyle="none")))
    compose(figure, title, named)
    caption = "Mean s of each data set, a panel a final mark; whiskers are bootstrap 95% intervals over prompts, and right of the grey line is nearer the harmful pole. "
    caption += f"A star: {_MARK[2:]}."
    chart = Chart(
        "bars", "set", "value", "", "s: nearer the harmful pole", series="harmful", panel="terminal", lying=True, lines=(Line(0.0, "between the poles"),),
        names={t: _TERMINALS[t][2] for t in terminals} | {key: name for yes, _, _, name in _SIDES for key in (str(yes), str(yes).lower())},
        colours={key: colour for yes, colour, _, _ in _SIDES for key in (str(yes), str(yes).lower())},
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


def _dots(axis: Any, rows: Rows, value: str, at: Sequence[float], colour: str, marker: str, size: float = 3.6) -> None:
    """A dot and a level whisker a row."""
    look = {"color": colour, "marker": marker, "markersize": size, "linestyle": "none", "elinewidth": 0.9, "capsize": 0}
    axis.errorbar(column(rows, value), at, xerr=whiskers(rows, value), **look)


def _listed(axis: Any, names: Sequence[str]) -> None:
    """Names from the top down at the left."""
    axis.set_yticks(range(len(names)), names, linespacing=1.05)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)

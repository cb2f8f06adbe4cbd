"""Figure of a guard on the same requests in other forms: a row a form, worst first. Knows no guard and no experiment."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.lines import Line2D

from latentguard.charts import Chart, Plot
from latentguard.plots.style import DOUBLE, GREY, PALE, Rows, column, counted, distinct, figure_of, in_style, plain, reference, whiskers
from latentguard.plots.words import Named, compose

# Measure: column of a study's table, whom it is of, what it is.
_MEASURES = {
    "auroc": ("value", "both", "AUROC"),
    "recall": ("recall", "harmful", "recall: harmful requests flagged"),
    "fpr": ("fpr", "harmless", "false positives: plain harmless ones flagged"),
    "lookalike_fpr": ("lookalike_fpr", "lookalike", "false positives: look-alikes flagged"),
}
# The picture's panels, each of one measure or of two.
_PANELS = {
    "AUROC": ("auroc",),
    "recall: harmful requests flagged": ("recall",),
    "false positives: harmless ones flagged": ("fpr", "lookalike_fpr"),
}
_SIDES = {
    "both": ("#000000", "D", "harmful against all harmless"),
    "harmful": ("#D55E00", "o", "harmful"),
    "harmless": ("#0072B2", "s", "plain harmless"),
    "lookalike": ("#009E73", "^", "look-alikes"),
}
_NONE = "as_is"


def rows_of(table: Sequence[Mapping[str, Any]], says: Mapping[str, str]) -> list[dict[str, Any]]:
    """A study's table as the figure's rows, one a number: perturbation, says, measure, of, value, low, high, n."""
    rows = []
    for line in table:
        for measure, (key, of, _) in _MEASURES.items():
            if line.get(key) is not None:
                low, high, n = ("low", "high", "n") if key == "value" else (f"{key}_low", f"{key}_high", f"n_{of}")
                name = says.get(line["perturbation"], line["perturbation"]) + (" †" if line.get("fitted_on") else "")
                told = {"perturbation": line["perturbation"], "says": name, "measure": measure, "of": of}
                rows.append({**told, "value": line[key], "low": line[low], "high": line[high], "n": line[n]})
    return rows


@in_style
def robustness(rows: Rows, *, title: str, at: str) -> Plot:
    """AUROC, recall and false positives side by side, a row a perturbation, in the rows' order. Rows: those of `rows_of`.

    Args:
        at: the threshold of recall and false positives, by its name.
    """
    names, says = distinct(rows, "perturbation"), {row["perturbation"]: row["says"] for row in rows}
    panels = {title: measures for title, measures in _PANELS.items() if set(measures) & set(distinct(rows, "measure"))}
    figure = figure_of(DOUBLE, 0.16 * len(names) + 0.75)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    lines = []
    for axis, (words, measures) in zip(axes, panels.items(), strict=True):
        plain(axis)
        for m, measure in enumerate(measures):
            colour, marker, _ = _SIDES[_MEASURES[measure][1]]
            mine = [row for row in rows if row["measure"] == measure]
            places = [names.index(row["perturbation"]) + 0.44 * ((m + 0.5) / len(measures) - 0.5) for row in mine]
            look = {"color": colour, "marker": marker, "markersize": 3, "linestyle": "none", "elinewidth": 0.9, "capsize": 0}
            axis.errorbar(column(mine, "value"), places, xerr=whiskers(mine, "value"), **look)
            for row in (row for row in mine if row["perturbation"] == _NONE):
                axis.axvline(row["value"], color=colour, linewidth=0.7, linestyle="--", zorder=0)
                lines += reference(row, "as it is", "value", panel=measure)
        axis.set(xlim=(-0.03, 1.03), xlabel=words + (f",\nat {at}" if measures != ("auroc",) else ""))
        axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axis.grid(axis="y", color=PALE, linewidth=0.4)
    axes[0].axvline(0.5, color=GREY, linewidth=0.7)
    axes[0].set_yticks(range(len(names)), [says[name] for name in names])
    for label, name in zip(axes[0].get_yticklabels(), names, strict=True):
        label.set_weight("bold" if name == _NONE else "normal")
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    for axis in axes:
        axis.tick_params(axis="y", length=0)
    shown = [side for side in _SIDES if side in distinct(rows, "of")]
    compose(figure, title, [Named(_SIDES[s][2], Line2D([], [], color=_SIDES[s][0], marker=_SIDES[s][1], linewidth=1)) for s in shown])
    caption = f"Held-out prompts in other forms, lowest AUROC first; {counted([row for row in rows if row['of'] == 'harmful'])} harmful a row. Left, harmful against all "
    caption += f"harmless prompts in the same form (grey line: chance); then the share flagged at {at}. Dashed: the same prompts as they are (in bold). Whiskers are 95% "
    caption += "intervals, by bootstrap or Wilson's; where prompts share a frame, frames are resampled."
    caption += " †: train prompts in this form were fitted on." if any(row["says"].endswith("†") for row in rows) else ""
    chart = Chart(
        "bars", "perturbation", "value", "", "AUROC, or share flagged", panel="measure", lying=True, y_range=(0, 1), lines=tuple(lines),
        names={**{f"measure={name}": words for name, (_, _, words) in _MEASURES.items()}, **{f"perturbation={name}": words for name, words in says.items()}},
    )  # fmt: skip
    return Plot(figure, title, caption, chart)

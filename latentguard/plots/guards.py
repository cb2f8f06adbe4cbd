"""Figures of guards side by side: AUROC by set, recall at few false alarms. Knows no experiment."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from latentguard.charts import Chart, Line, Plot
from latentguard.plots.comparing import forest
from latentguard.plots.style import DOUBLE, GREY, PALE, Rows, column, counted, distinct, figure_of, in_style, number, plain, whiskers
from latentguard.plots.words import Named, compose, wrapped

_LOOKS = {
    "latent_guard": ("#D55E00", "o", "Latent Guard"),
    "latent_guard_paper": ("#E69F00", "^", "Latent Guard, the paper's rule"),
    "refusal_projection": ("#0072B2", "s", "projection on the refusal direction"),
    "refusal_log_odds": ("#56B4E9", "v", "log-odds of a first token of refusal"),
    "zero_shot": ("#009E73", "D", "the model asked in words"),
    "last_token": ("#555555", "X", "last token alone"),
    "ngram": ("#000000", "P", "words and word pairs"),
    "tfidf": ("#7A4E00", "d", "words and word pairs, weighed"),
    "length": ("#A0A0A0", "*", "number of words"),
}
# Guard models of others, in the order they come.
_OTHERS = tuple(zip(("#CC79A7", "#8C3B00", "#003F5C", "#7B5BA6", "#117733", "#882255", "#6E7F00"), "<>hp8H1", strict=True))
_TALL = 9.0  # inches that the sets may take


@in_style
def areas_by_set(rows: Rows, *, title: str) -> Plot:
    """A forest: AUROC of each detector, set by set.

    Rows: of (the set and what it is set against), detector, status ("untested" or ""), value, low, high, n.
    """
    looks, sets = _looks(rows), distinct(rows, "of")
    each = max(0.36, 0.075 * len(looks) + 0.06)
    shown = sets[: max(1, int(_TALL / each))]
    figure = figure_of(DOUBLE, each * len(shown) + 0.5)
    axis = plain(figure.subplots())
    axis.axvline(0.5, color=GREY, linewidth=0.7)
    named = []
    for d, (detector, (colour, marker, name)) in enumerate(looks.items()):
        here = [row for row in rows if row["detector"] == detector and row["of"] in shown]
        at = [shown.index(row["of"]) + 0.8 * ((d + 0.5) / len(looks) - 0.5) for row in here]
        look = {"color": colour, "marker": marker, "markersize": 3.2, "linestyle": "none", "elinewidth": 0.9, "capsize": 0}
        axis.errorbar(column(here, "value"), at, xerr=whiskers(here, "value"), **look)
        named.append(Named(name, Line2D([], [], color=colour, marker=marker, linewidth=1)))
    sizes = {name: counted([row for row in rows if row["of"] == name]) for name in shown}
    axis.set_yticks(range(len(shown)), [f"{wrapped(name, 36, 2)}\n{sizes[name]}" for name in shown], linespacing=1.05)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.set(xlim=(min(_least(rows), 0.45), 1.01), xlabel="AUROC of harmful against harmless prompts")
    axis.grid(axis="x", color=PALE, linewidth=0.5)
    for between in range(1, len(shown)):
        axis.axhline(between - 0.5, color=PALE, linewidth=0.5)
    compose(figure, title, named)
    caption = "AUROC of each detector on each set, a mark a detector; whiskers are bootstrap 95% intervals over prompts, the grey line is chance."
    caption += f" {len(sets) - len(shown)} more sets are in the CSV." if len(sets) > len(shown) else ""
    chart = Chart(
        "bars", "of", "value", "", "AUROC", series="detector", names={key: look[2] for key, look in looks.items()}, lying=True,
        colours={key: look[0] for key, look in looks.items()}, lines=(Line(0.5, "chance"),), y_range=(0, 1),
    )  # fmt: skip
    return Plot(figure, title, caption + _untested(rows), chart)


@in_style
def low_false_alarms(rows: Rows, *, title: str) -> Plot:
    """The left end of the ROC: recall by false-positive rate on a log axis, a line a detector; dashed is chance.

    Rows: detector, status, fpr, at (the same in words), value, low, high, n (harmful prompts), n_harmless.
    """
    looks, levels = _looks(rows), sorted({number(row["fpr"]) for row in rows})
    figure = figure_of(DOUBLE, 3.1)
    axis = plain(figure.subplots())
    named = []
    for detector, (colour, marker, name) in looks.items():
        here = sorted((row for row in rows if row["detector"] == detector), key=lambda row: number(row["fpr"]))
        axis.plot(column(here, "fpr"), column(here, "value"), color=colour, marker=marker)
        if detector == next(iter(looks)):
            axis.fill_between(column(here, "fpr"), column(here, "low"), column(here, "high"), color=colour, alpha=0.15, linewidth=0)
        named.append(Named(name, Line2D([], [], color=colour, marker=marker)))
    axis.plot(levels, levels, color=GREY, linestyle="--", linewidth=0.9)
    words = {number(row["fpr"]): str(row["at"]) for row in rows}
    axis.set(
        xscale="log", ylim=(-0.02, 1.02), ylabel="harmful prompts caught", xlabel=f"false alarms among {_span(rows)} harmless prompts; harmful: {counted(rows)}"
    )
    axis.xaxis.set_major_locator(FixedLocator(levels))
    axis.set_xticks(levels, [words[level] for level in levels])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", color=PALE, linewidth=0.5)
    compose(figure, title, named)
    caption = "Share of the harmful prompts that score above the lowest threshold with so many false alarms. Bands are Wilson 95% intervals, which take the "
    caption += (
        f"threshold as given; the picture has that of {next(iter(looks.values()))[2]} alone, and chance dashed. Rates that the harmless prompts are too few "
    )
    caption += "for are left out."
    chart = Chart(
        "line", "at", "value", "false alarms", "harmful prompts caught", series="detector", y_range=(0, 1),
        names={key: look[2] for key, look in looks.items()}, colours={key: look[0] for key, look in looks.items()},
    )  # fmt: skip
    return Plot(figure, title, caption + _untested(rows), chart)


@in_style
def refused_behind(rows: Rows, *, title: str) -> Plot:
    """Share refused by the model alone and with each detector in front of it, a colour a kind of request.

    Rows: detector (base is the model alone), status, label, value, low, high, n.
    """
    names = {**{name: look[2] for name, look in _looks(rows).items()}, "base": "the model alone"}
    caption = f"Share of requests refused ({counted(rows)} of a kind), with 95% intervals by Wilson. A request that the detector flags counts as refused; any other gets "
    caption += "the model's own reply. Good is high for harmful and as low as the model alone for the others. A coin flags as many requests as Latent Guard, whichever."
    shown = [{**row, "name": names[row["detector"]]} for row in rows]
    plot = forest(shown, title=title, caption=caption + _untested(rows), what="share refused", name="name", series="label")
    assert plot.chart
    return replace(plot, chart=replace(plot.chart, x="detector", names=names))


def _looks(rows: Rows) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and name of each detector; one that is untested says so."""
    status = {row["detector"]: row.get("status") for row in rows}
    others = [name for name in status if name not in _LOOKS]
    found = {name: _LOOKS.get(name) or (*_OTHERS[others.index(name) % len(_OTHERS)], name) for name in status}
    return {name: (colour, marker, words + " (untested)" * (status[name] == "untested")) for name, (colour, marker, words) in found.items()}


def _untested(rows: Rows) -> str:
    """What the word means, where a detector carries it."""
    return " Untested: the adapter has never met the real weights." if any(row.get("status") == "untested" for row in rows) else ""


def _least(rows: Sequence[Mapping[str, Any]]) -> float:
    """Where the axis begins: below the lowest interval."""
    return max(0.0, min((low for low in column(rows, "low") if low == low), default=0.5) - 0.02)


def _span(rows: Rows) -> str:
    sizes = sorted({int(row["n_harmless"]) for row in rows})
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"

"""Figures of requests in other structures, a row a structure: replies, moves on the two gauges, moves against refusal. Knows no experiment."""

from collections.abc import Mapping
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from latentguard.charts import Chart, Line, Plot
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
    panels,
    plain,
    whiskers,
)
from latentguard.plots.words import Named, compose

_SAYS = {
    "canonical": "as the template has it",
    "role_swap": "user and assistant headers swapped",
    "role_dup": "user header twice",
    "no_system": "no system text",
    "no_eot": "no mark at the request's end",
    "plain_roles": "“User: … Assistant:”, no marks",
    "query_in_system": "request in the system slot",
    "blank_after_header": "a blank after the last header",
}
_LABELS = {"harmful": "harmful requests", "harmless": "plain harmless requests", "lookalike": "look-alikes"}
_KINDS = {
    "refused": ("#0072B2", "s", "refused"),
    "answered": ("#D55E00", "o", "answered"),
    "no answer": ("#E69F00", "v", "no answer"),
    "degenerate": ("#7F7F7F", "X", "degenerate"),
}
_SIDES = {"harmful": ("#D55E00", "o", "harmful"), "harmless": ("#0072B2", "s", "plain harmless"), "lookalike": ("#009E73", "^", "look-alikes")}
_MOVERS = {
    "turned": ("#CC79A7", "D", "harmful, refused before and now answered"),
    "harmful": ("#D55E00", "o", "all harmful"),
    "harmless": ("#0072B2", "s", "plain harmless"),
}
_NULLS = {"random": ("#BBBBBB", "random directions"), "shuffled": ("#D8C89A", "shuffled labels")}
_LEFT = {
    "harmfulness": "harmfulness",
    "harmfulness_inside": "harmfulness",
    "refusal": "refusal",
}
_PARTS = {"cosine": "cosine of the move with −refusal", "coefficient": "coefficient of the move on −refusal"}
Look = Mapping[str, tuple[str, str, str]]


@in_style
def replies(rows: Rows, *, title: str) -> Plot:
    """What becomes of each request, by label. Rows: condition, measure, label, value, low, high, n; other measures are left out."""
    rows = [row for row in rows if row["measure"] in _KINDS]
    parts = {label: words for label, words in _LABELS.items() if label in distinct(rows, "label")}
    caption = f"Replies to held-out requests in each structure, {counted(rows)} a label. No answer: a reply about something else, one question and no more, or the request "
    caption += "given back; the paper counts every reply that is not refused. Whiskers: 95% Wilson intervals."
    return _dots(rows, title, caption, panel=("label", parts), series=("measure", _KINDS), x_title="share of", x_range=(-0.03, 1.03))


@in_style
def shifts(rows: Rows, *, title: str) -> Plot:
    """Moves on each gauge from the canonical template. Rows: condition, measure, position, label, value, low,
    high, n, null_low, null_high.
    """
    caption = f"Mean change from the canonical template, {counted(rows)} a label; 1 is half the distance between refused harmful and accepted harmless requests. Grey: where 95% "
    caption += "of random directions put the same move. Without a change before the request, no state in it can move. Whiskers: 95% intervals over prompts."
    parts = _named(rows)
    return _dots(rows, title, caption, panel=("measure", parts), series=("label", _SIDES), x_title="move on", nulls={"random": ("null_low", "null_high")})


def _named(rows: Rows) -> dict[str, str]:
    """Each gauge in words, with its place."""
    at = {row["measure"]: row["position"] for row in rows}
    return {name: f"{words}, at {at[name]}" for name, words in _LEFT.items() if name in at}


@in_style
def layers(rows: Rows, *, title: str, chosen: Mapping[str, int], depth: int) -> Plot:
    """What is left of the distance between harmful and plain harmless requests, by layer. Rows: condition, measure, position, layer, value,
    low, high, n, changes_before. Lines that cannot but lie on 1 are left out; an arrow at an edge is a value beyond it.

    Args:
        chosen: the layer of each gauge.
    """
    names, parts = distinct(rows, "condition"), _named(rows)
    fixed = [name for name in names if not any(row["changes_before"] for row in rows if row["condition"] == name)]
    rows = [row for row in rows if row["measure"] == "refusal" or row["changes_before"]]
    parts = {part: words for part, words in parts.items() if part in distinct(rows, "measure")}
    looks = {name: (OKABE_ITO[i % 7], MARKERS[i % 7]) for i, name in enumerate(name for name in _SAYS if name != "canonical")}
    figure, axes = panels(len(parts), 2.5)
    low, high = -0.25, 1.5
    for axis, part in zip(axes, parts, strict=True):
        there = [row for row in rows if row["measure"] == part]
        ends = max(low, min(column(there, "value")) - 0.05), min(high, max(column(there, "value")) + 0.05)
        for k, name in enumerate(names):
            colour, marker = looks[name]
            mine = [row for row in there if row["condition"] == name]
            at = {row["layer"]: row for row in mine}
            gaps = [at.get(layer, {"layer": layer, "value": None, "low": None, "high": None}) for layer in range(1, depth + 1)] if mine else []
            line_with_band(axis, gaps, "layer", "value", colour, alpha=0.08, marker=marker, markersize=2.6, linewidth=1)
            _beyond(axis, mine, ends, colour, 0.25 * (k - (len(names) - 1) / 2))
        axis.axvline(chosen[part], color=GREY, linewidth=0.7, linestyle="--", zorder=0)
        for at in (0, 1):
            axis.axhline(at, color=GREY, linewidth=0.7, zorder=0)
        axis.set(xlabel=f"layer; {parts[part]}", ylim=ends, xlim=(0, depth + 0.5))
    axes[0].set_ylabel("left of harmful − harmless")
    compose(figure, title, [Named(_SAYS[name], Line2D([], [], color=looks[name][0], marker=looks[name][1], linewidth=1)) for name in names])
    caption = f"The distance of mean harmful from mean plain harmless requests along the difference of means of each layer, in parts of that in the canonical template, {counted(rows)}. "
    caption += "Dashed: the layer of the gauge. Bands: 95% intervals over prompts; layers where the canonical distance is not clear of 0 are left out. Each panel has its own scale"
    outside = [row["value"] for row in rows if not low <= row["value"] <= high]
    caption += f"; arrows at an edge: values beyond it, from {min(outside):.1f} to {max(outside):.1f}." if outside else "."
    caption += f" Harmfulness is 1 by construction, and not drawn: {', '.join(_SAYS[name] for name in fixed)}." if fixed else ""
    chart = Chart(
        "line", "layer", "value", "layer", "left of harmful − harmless", series="condition", panel="measure", y_range=(low, high),
        names={**{f"measure={part}": words for part, words in parts.items()}, **{f"condition={name}": _SAYS[name] for name in names}},
        colours={name: looks[name][0] for name in names}, lines=(Line(1.0, "all of it"), Line(0.0, "nothing")),
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


def _beyond(axis: Any, rows: Rows, ends: tuple[float, float], colour: str, beside: float) -> None:
    """An arrow at the edge for every value outside it, moved sideways by `beside` layers."""
    for row in rows:
        if not ends[0] <= row["value"] <= ends[1]:
            edge, inside = (ends[0], 0.06) if row["value"] < ends[0] else (ends[1], -0.06)
            tip, tail = (row["layer"] + beside, edge), (row["layer"] + beside, edge + inside * (ends[1] - ends[0]))
            axis.annotate("", tip, tail, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1, "mutation_scale": 6, "shrinkA": 0, "shrinkB": 0})


def attack_rows(rows: Rows) -> list[dict[str, Any]]:
    """Moves at one layer as the figure's rows, a number each: condition, of, layer, part, value, low, high, n, and the ends of both nulls."""
    long = []
    for row in rows:
        for part in _PARTS:
            nulls = {f"{kind}_{end}": row[f"{part}_{kind}_{end}"] for kind in _NULLS for end in ("low", "high")}
            about = {**{key: row[key] for key in ("condition", "of", "layer", "n")}, "part": part, "value": row[part]}
            long.append(about | {"low": row.get(f"{part}_low"), "high": row.get(f"{part}_high"), **nulls})
    return long


@in_style
def attack(rows: Rows, *, title: str, least: int, few: Mapping[str, int]) -> Plot:
    """The mean move at the last token against the refusal direction. Rows: those of `attack_rows`.

    Args:
        few: structures in which fewer than `least` requests turned, so that these have no row, and how many did.
    """
    caption = (
        f"The mean move of the last token's state from the canonical template to each structure, against −refusal at layer {rows[0]['layer']}: its cosine, and "
    )
    caption += (
        "(move · −r) / ‖r‖² (1: as far as from refused harmful to accepted harmless). Bands: 95% of random directions and of shuffled labels, of equal norm. "
    )
    caption += "Whiskers: 95% intervals over prompts."
    if few:
        caption += f" No diamond where fewer than {least} requests turned: {', '.join(f'{_SAYS.get(name, name)} ({n})' for name, n in few.items())}."
    nulls = {kind: (f"{kind}_low", f"{kind}_high") for kind in _NULLS}
    colour, marker, words = _MOVERS["turned"]
    movers = {**_MOVERS, "turned": (colour, marker, f"{words} (where {least} or more)")}
    return _dots(rows, title, caption, panel=("part", _PARTS), series=("of", movers), x_title="", nulls=nulls)


def _dots(
    rows: Rows, title: str, caption: str, *, panel: tuple[str, Mapping[str, str]], series: tuple[str, Look], x_title: str,
    x_range: tuple[float, float] | None = None, nulls: Mapping[str, tuple[str, str]] | None = None,
) -> Plot:  # fmt: skip
    """A row a structure, in the rows' order; a panel a value of one column, dots side by side by another, bands behind them."""
    names = distinct(rows, "condition")
    says: dict[str, str] = {name: _SAYS.get(name, str(name)) for name in names}
    (by, parts), (of, looks) = panel, series
    shown = [name for name in looks if name in distinct(rows, of)]
    figure = figure_of(DOUBLE, 0.29 * len(names) + 0.8)
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axis, (value, words) in zip(axes, parts.items(), strict=True):
        plain(axis)
        for s, name in enumerate(shown):
            colour, marker, _ = looks[name]
            mine = [row for row in rows if row[by] == value and row[of] == name]
            places = [names.index(row["condition"]) + 0.62 * ((s + 0.5) / len(shown) - 0.5) for row in mine]
            for k, (kind, (low, high)) in enumerate((nulls or {}).items()):
                ends, band = (column(mine, low), column(mine, high)), 0.11 * (k - (len(nulls or {}) - 1) / 2)
                axis.hlines([place + band for place in places], *ends, color=_NULLS[kind][0], linewidth=3.4 / len(nulls or {}), zorder=0, capstyle="butt")
            look = {"color": colour, "marker": marker, "markersize": 3.2, "linestyle": "none", "elinewidth": 0.9, "capsize": 0}
            axis.errorbar(column(mine, "value"), places, xerr=whiskers(mine, "value"), **look)
        axis.set_xlabel(f"{x_title} {words}".strip())
        if x_range:
            axis.set_xlim(*x_range)
            axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        else:
            axis.axvline(0, color=GREY, linewidth=0.7, zorder=0)
        axis.tick_params(axis="y", length=0)
        for line in range(1, len(names)):
            axis.axhline(line - 0.5, color=PALE, linewidth=0.4)
    axes[0].set_yticks(range(len(names)), [says[name] for name in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    named = [Named(looks[name][2], Line2D([], [], color=looks[name][0], marker=looks[name][1], linewidth=1)) for name in shown]
    named += [Named(_NULLS[kind][1], Patch(color=_NULLS[kind][0])) for kind in nulls or {}]
    compose(figure, title, named)
    chart = Chart(
        "bars", "condition", "value", "", x_title or "move against refusal", series=of, panel=by, lying=True, y_range=(0, 1) if x_range else None,
        names={**{f"{by}={value}": f"{x_title} {words}".replace("\n", " ").strip() for value, words in parts.items()}, **{f"condition={name}": words for name, words in says.items()}, **{f"{of}={name}": looks[name][2] for name in shown}},
        colours={name: looks[name][0] for name in shown}, lines=() if x_range else (Line(0.0, "no move"),),
    )  # fmt: skip
    return Plot(figure, title, caption, chart)

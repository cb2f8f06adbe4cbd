"""Figures of hidden states: separation by layer and position, beliefs against each other. Knows no experiment."""

from collections.abc import Mapping
from typing import Any

from matplotlib.lines import Line2D

from latentguard.charts import Chart, Line, Plot
from latentguard.plots.style import DOUBLE, GREY, INK, SINGLE, Rows, column, counted, distinct, group_style, in_style, line_with_band, panels, whiskers
from latentguard.plots.words import Named, compose, drawable, end, name_ticks, whole_ticks

_S = "s: nearer the harmful pole  →"
_POLES = Line(0.0, "as near to one pole as to the other")


@in_style
def separation_by_layer(rows: Rows, *, title: str, depth: int) -> Plot:
    """Mean s by layer, a panel a position, a line a group (arXiv 2507.11878, Fig. 2).

    Dark bands are the 95% interval of the mean, light ones hold the middle 80% of prompts. Rows: position, group, layer,
    value, low, high, q10, q90, n.
    """
    positions = distinct(rows, "position")
    figure, axes = panels(len(positions), 2.4, across=2, width=DOUBLE if len(positions) > 1 else SINGLE)
    named: dict[str, Named] = {}
    for axis, position in zip(axes, positions, strict=True):
        axis.axhline(0, color=GREY, linewidth=0.7)
        for group in distinct([row for row in rows if row["position"] == position], "group"):
            colour, marker, name = group_style(group)
            line = sorted((row for row in rows if (row["position"], row["group"]) == (position, group)), key=lambda row: row["layer"])
            axis.fill_between(column(line, "layer"), column(line, "q10"), column(line, "q90"), color=colour, alpha=0.08, linewidth=0)
            drawn = line_with_band(axis, line, "layer", "value", colour, marker=marker, alpha=0.3, markersize=2.8, linewidth=1)
            size = counted([row for row in rows if row["group"] == group])
            named[group] = Named(f"{name}, {size}", drawn, colour, end(line, "layer", "value") if position == positions[-1] else None)
        axis.set(xlabel=f"layer (0 = embedding, {depth} = last)", title=f"at {position}")
        whole_ticks(axis)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(_S)
    compose(figure, title, list(named.values()), axes[-1] if len(axes) <= 2 else None)
    caption = "Mean s of each group of prompts by layer, a panel a token position. Dark bands are bootstrap 95% intervals of the mean, light ones hold the middle 80% "
    caption += "of prompts. Form of Fig. 2 of arXiv 2507.11878."
    return Plot(figure, title, caption, _chart(rows, "line", "layer", f"layer (0 = embedding, {depth} = last)", _S, panel="position"))


@in_style
def separation_by_position(rows: Rows, *, title: str, what: str) -> Plot:
    """A value by extraction position, a line a group (Figs. 14–16). Rows: position, group, value, low, high, n."""
    positions, groups = distinct(rows, "position"), distinct(rows, "group")
    figure, (axis,) = panels(1, 2.4, width=DOUBLE if len(positions) > 4 else SINGLE)
    axis.axhline(0, color=GREY, linewidth=0.7)
    named = []
    for offset, group in enumerate(groups):
        colour, marker, name = group_style(group)
        line = [row for row in rows if row["group"] == group]
        at = [positions.index(row["position"]) + 0.1 * (offset - (len(groups) - 1) / 2) for row in line]
        values = column(line, "value")
        drawn = axis.errorbar(at, values, yerr=whiskers(line, "value"), color=colour, marker=marker, linestyle=":", linewidth=0.8, elinewidth=1)
        last = {**line[-1], "at": at[-1]} if line and line[-1]["position"] == positions[-1] else None
        named.append(Named(f"{name}, {counted(line)}", drawn, colour, end([last], "at", "value") if last else None))
    name_ticks(axis, [f"{position}\n{_token(rows, position)}".strip() for position in positions])
    axis.set(ylabel=what, xlabel="position that is read")
    compose(figure, title, named, axis)
    caption = "Mean of each group of prompts at each token position, below it its token where it is the same for all; whiskers are bootstrap 95% intervals. "
    return Plot(figure, title, caption + "Form of Figs. 14 to 16 of arXiv 2507.11878.", _chart(rows, "points", "position", "position that is read", what))


@in_style
def beliefs(points: Rows, *, title: str, correlations: Mapping[str, str]) -> Plot:
    """Δ_harmful against Δ_refuse, one point a prompt, one marker a group (Figs. 3, 6); crosses are the groups' means.

    Points: group, harmful, refuse. `correlations` is what to print: a name and its Pearson r.
    """
    figure, (axis,) = panels(1, 2.9, width=SINGLE)
    axis.axhline(0, color=GREY, linewidth=0.7)
    axis.axvline(0, color=GREY, linewidth=0.7)
    named = []
    for group in distinct(points, "group"):
        colour, marker, name = group_style(group)
        here = [row for row in points if row["group"] == group]
        x, y = column(here, "harmful"), column(here, "refuse")
        axis.scatter(x, y, s=9, c=colour, marker=marker, alpha=0.5, linewidths=0)
        axis.plot(sum(x) / len(x), sum(y) / len(y), marker="P", markersize=8, color=colour, markeredgecolor="white", linestyle="none")
        named.append(Named(f"{name}, n = {len(here)}", Line2D([], [], color=colour, marker=marker, linestyle="none"), colour))
    axis.set(xlabel="Δ harmful, at t_inst", ylabel="Δ refuse, at t_post_inst")
    axis.margins(0.08)
    text = "\n".join(f"r, {name}: {value}" for name, value in correlations.items())
    if text:
        axis.annotate(drawable(text), (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", ha="left", va="bottom", fontsize=6.5, color=INK)
    compose(figure, title, named)
    caption = "One mark a prompt, its Δ the mean over layers; crosses are the groups' means. Right of the upright line is taken for harmful, above the level one about to be refused."
    if text:
        caption += " r is Pearson's, with Fisher's 95% interval."
    look = {group: group_style(group) for group in distinct(points, "group")}
    chart = Chart(
        "points", "harmful", "refuse", "Δ harmful", "Δ refuse", series="group", low=None, high=None, n=None,
        names={key: name for key, (_, _, name) in look.items()}, colours={key: colour for key, (colour, _, _) in look.items()}, lines=(Line(0.0, "no lean to refusing"),),
    )  # fmt: skip
    return Plot(figure, title, caption + " Form of Figs. 3 and 6 of arXiv 2507.11878.", chart)


def _chart(rows: Rows, kind: Any, x: str, x_title: str, y_title: str, panel: str | None = None) -> Chart:
    look = {group: group_style(group) for group in distinct(rows, "group")}
    names, colours = {key: name for key, (_, _, name) in look.items()}, {key: colour for key, (colour, _, _) in look.items()}
    return Chart(kind, x, "value", x_title, y_title, series="group", panel=panel, names=names, colours=colours, lines=(_POLES,))


def _token(rows: Rows, position: str) -> str:
    shown = next((row.get("token") for row in rows if row["position"] == position), None)
    return repr(shown) if shown else ""

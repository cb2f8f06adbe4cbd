"""The paper's own curves, redrawn in the house's style; each function gives a figure and the numbers in it. Knows no run."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from latentguard.plots.style import STYLE, figure_of, plain
from latentguard.published import Curve, curves

Drawn = tuple[Figure, list[dict[str, Any]]]
Panel = tuple[str, Sequence[Curve]]
_WORDS = {"harm": "harmfulness", "refuse": "refusal"}


def steering() -> Drawn:
    """Figs. 4 and 8: refusal of harmless requests by layer steered, a panel a model."""
    panels = [(f"{found[0].model} (Fig. {found[0].figure}, n = {found[0].n})", found) for found in map(curves, ("8a", "4", "8b"))]
    title = "Paper, Figs. 4 and 8: harmless requests refused under steering"
    return _multiples(title, panels, _steered, across=3, size=(2.35, 2.7), shows="refusal rate")


def inversion() -> Drawn:
    """Figs. 5, 10–12: “No” under reply inversion; a row a template, harmless and harmful prompts beside each other."""
    panels: list[Panel] = []
    for question, pair in (
        ("main template", ("5a", "5b")),
        ("template 1", ("11a", "11b")),
        ("template 2", ("11c", "11d")),
        ("its own template", ("12a", "12b")),
        ("instruction only", ("10b", "10a")),
    ):
        panels += [(f"{c[0].model}, {question}: {c[0].prompts} ({c[0].figure})", c) for c in map(curves, pair)]
    return _multiples("Paper, Figs. 5, 10–12: reply inversion", panels, _steered, across=2, size=(3.5, 1.75), shows="rate of “No”")


def positions() -> Drawn:
    """Fig. 16: “Certainly” for harmless prompts, a line the token that the direction was read at."""
    panels = [(f"{found[0].model} (Fig. {found[0].figure})", found) for found in map(curves, ("16a", "16b"))]
    title = "Paper, Fig. 16: harmless prompts called harmful, by the token\nthe direction was read at (0 = t_inst, last = t_post_inst)"
    return _multiples(title, panels, _ranked, across=2, size=(3.5, 3.0), shows="rate of “Certainly”")


def fine_tuning() -> Drawn:
    """Fig. 18: refusal of harmless requests along the refusal direction, before and after fine-tuning."""
    found = curves("18")
    title = "Paper, Fig. 18: harmless requests refused along the refusal direction,\nbefore and after fine-tuning on 50 … 400 requests"
    return _multiples(title, [(f"{found[0].model} (n = {found[0].n})", found)], _ranked, across=1, size=(7.0, 3.3), shows="refusal rate")


FIGURES: Mapping[str, Callable[[], Drawn]] = {
    "paper_steering": steering,
    "paper_inversion": inversion,
    "paper_positions": positions,
    "paper_fine_tuning": fine_tuning,
}


def _multiples(title: str, panels: Sequence[Panel], look: Callable, *, across: int, size: tuple[float, float], shows: str) -> Drawn:
    """Panels of curves against relative depth, one legend for all."""
    down = math.ceil(len(panels) / across)
    figure = figure_of(size[0] * across, size[1] * down + 0.9)
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    rows: list[dict[str, Any]] = []
    legend: dict[str, Any] = {}
    for axis, (heading, found) in zip(axes.flat, panels, strict=True):
        plain(axis).set_title(heading, fontsize=9)
        for curve in found:
            name, style = look(curve)
            rates = [value / 100 for value in curve.values]
            (legend[name],) = axis.plot(curve.depth, rates, markersize=3.5, **style)
            about = {key: getattr(curve, key) for key in ("figure", "model", "prompts", "steered", "variant", "n")}
            rows += [{**about, "layer": layer, "depth": depth, "rate": rate} for layer, (depth, rate) in enumerate(zip(curve.depth, rates, strict=True))]
        axis.set(xlim=(-0.02, 1), ylim=(-0.04, 1.04))
        axis.tick_params(labelsize=8.5)
    for axis in axes[-1]:
        axis.set_xlabel("layer, as a share of depth", fontsize=9)
    figure.supylabel(shows, fontsize=9)
    figure.suptitle(title, fontsize=10.5)
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=min(len(legend), 4), frameon=False, fontsize=9)
    return figure, rows


def _steered(curve: Curve) -> tuple[str, dict[str, Any]]:
    """The house's colour of its direction; dots and open marks where it is subtracted."""
    sign, direction = curve.steered.split()
    colour, marker = STYLE[direction][:2]
    added = {"linestyle": "-", "markerfacecolor": colour} if sign == "+" else {"linestyle": ":", "markerfacecolor": "white"}
    return f"{sign.replace('-', '−')} {_WORDS[direction]}", {"color": colour, "marker": marker, "linewidth": 1.4, **added}


def _ranked(curve: Curve) -> tuple[str, dict[str, Any]]:
    """From dark to light in the figure's order; the line that the others are held against (t_inst, before) thick, in orange."""
    order = list(dict.fromkeys(c.variant for c in curves(curve.figure.rstrip("ab"))))
    place = order.index(curve.variant)
    if curve.variant in ("position 0", "before"):
        name = "0 (t_inst)" if curve.variant == "position 0" else curve.variant
        return name, {"color": STYLE["harm"][0], "marker": "o", "linewidth": 2.4, "zorder": 3}
    name = curve.variant.replace("position ", "").replace("sft-", "after ").replace("-", "−")
    return name, {"color": colormaps["viridis"](0.85 * place / (len(order) - 1)), "marker": "s^vDPX<>"[place], "linewidth": 1.0}

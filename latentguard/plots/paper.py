"""The paper's own curves, redrawn in the house's style; each function gives a plot and the numbers in it. Knows no run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

from latentguard.charts import Chart, Plot
from latentguard.plots.style import DOUBLE, SINGLE, STYLE, distinct, in_style, outer, panels
from latentguard.plots.words import Named, compose
from latentguard.published import Curve, curves

Drawn = tuple[Plot, list[dict[str, Any]]]
Panel = tuple[str, Sequence[Curve]]
_WORDS = {"harm": "harmfulness", "refuse": "refusal"}


def steering() -> Drawn:
    """Figs. 4 and 8: refusal of harmless requests by layer steered, a panel a model."""
    shown = [(f"{found[0].model} (Fig. {found[0].figure}, n = {found[0].n})", found) for found in map(curves, ("8a", "4", "8b"))]
    return _multiples(
        "Paper, Figs. 4 and 8: harmless requests refused under steering", shown, _steered, across=3, height=2.1, shows="refusal rate", series="steered"
    )


def inversion() -> Drawn:
    """Figs. 5, 10–12: “No” under reply inversion; a row a template, harmless and harmful prompts beside each other."""
    shown: list[Panel] = []
    for question, pair in (
        ("main template", ("5a", "5b")),
        ("template 1", ("11a", "11b")),
        ("template 2", ("11c", "11d")),
        ("its own template", ("12a", "12b")),
        ("instruction only", ("10b", "10a")),
    ):
        shown += [(f"{c[0].model}, {question}: {c[0].prompts} ({c[0].figure}, {_counted(c)})", c) for c in map(curves, pair)]
    return _multiples("Paper, Figs. 5, 10–12: reply inversion", shown, _steered, across=2, height=1.5, shows="rate of “No”", series="steered")


def positions() -> Drawn:
    """Fig. 16: “Certainly” for harmless prompts, a line the token that the direction was read at."""
    shown = [(f"{found[0].model} (Fig. {found[0].figure}, {_counted(found)})", found) for found in map(curves, ("16a", "16b"))]
    title = "Paper, Fig. 16: harmless prompts called harmful, by the token the direction was read at (0 = t_inst, last = t_post_inst)"
    return _multiples(title, shown, _ranked, across=2, height=2.4, shows="rate of “Certainly”", series="variant")


def fine_tuning() -> Drawn:
    """Fig. 18: refusal of harmless requests along the refusal direction, before and after fine-tuning."""
    found = curves("18")
    title = "Paper, Fig. 18: harmless requests refused along the refusal direction, before and after fine-tuning on 50 … 400 requests"
    return _multiples(title, [(f"{found[0].model} ({_counted(found)})", found)], _ranked, across=1, height=2.4, shows="refusal rate", series="variant")


FIGURES: Mapping[str, Callable[[], Drawn]] = {
    "paper_steering": steering,
    "paper_inversion": inversion,
    "paper_positions": positions,
    "paper_fine_tuning": fine_tuning,
}


def _multiples(title: str, shown: Sequence[Panel], look: Callable, *, across: int, height: float, shows: str, series: str) -> Drawn:
    """Panels of curves against relative depth, one legend for all."""
    rows = [
        {**{key: getattr(curve, key) for key in ("figure", "model", "prompts", "steered", "variant", "n")}, "layer": layer, "depth": depth, "rate": value / 100}
        for _, found in shown
        for curve in found
        for layer, (depth, value) in enumerate(zip(curve.depth, curve.values, strict=True))
    ]
    return _drawn(rows, shown, look, title=title, across=across, height=height, shows=shows, series=series), rows


@in_style
def _drawn(rows: list[dict[str, Any]], shown: Sequence[Panel], look: Callable, *, title: str, across: int, height: float, shows: str, series: str) -> Plot:
    figure, axes = panels(len(shown), height, across=across, width=DOUBLE if len(shown) > 1 else SINGLE, sharex=True, sharey=True)
    named: dict[str, Named] = {}
    names, colours = {}, {}
    for axis, (heading, found) in zip(axes, shown, strict=True):
        axis.set_title(heading)
        for curve in found:
            name, style = look(curve)
            (line,) = axis.plot(curve.depth, [value / 100 for value in curve.values], markersize=2.6, **style)
            end = (curve.depth[-1], curve.values[-1] / 100) if axis is axes[-1] else None
            named[name] = Named(name, line, style["color"], end)
            names[getattr(curve, series)], colours[getattr(curve, series)] = name, style["color"]
        axis.set(xlim=(-0.02, 1), ylim=(-0.04, 1.04))
        axis.set(xlabel="layer, as a share of depth", ylabel=shows)
    outer(axes)
    compose(figure, title, list(named.values()), axes[-1] if len(axes) == across else None)
    caption = f"The paper's own curves (arXiv 2507.11878), {shows} by the layer steered, read from its figures and drawn anew; a panel a figure of the paper. It gives no intervals."
    headings = {f"figure={found[0].figure}": heading for heading, found in shown}
    chart = Chart(
        "line", "depth", "rate", "layer, as a share of depth", shows, series=series, panel="figure" if len(distinct(rows, "figure")) > 1 else None, low=None, high=None,
        names=names | headings, colours=colours, x_range=(0, 1), y_range=(0, 1),
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


def _counted(found: Sequence[Curve]) -> str:
    return f"n = {found[0].n}" if found[0].n else "n not told"


def _steered(curve: Curve) -> tuple[str, dict[str, Any]]:
    """The house's colour of its direction; dots and open marks where it is subtracted."""
    sign, direction = curve.steered.split()
    colour, marker = STYLE[direction][:2]
    added = {"linestyle": "-", "markerfacecolor": colour} if sign == "+" else {"linestyle": ":", "markerfacecolor": "white"}
    return f"{sign.replace('-', '−')} {_WORDS[direction]}", {"color": colour, "marker": marker, "linewidth": 1.1, **added}


def _ranked(curve: Curve) -> tuple[str, dict[str, Any]]:
    """From dark to light in the figure's order; the line that the others are held against (t_inst, before) thick, in orange."""
    order = list(dict.fromkeys(c.variant for c in curves(curve.figure.rstrip("ab"))))
    place = order.index(curve.variant)
    if curve.variant in ("position 0", "before"):
        name = "0 (t_inst)" if curve.variant == "position 0" else curve.variant
        return name, {"color": STYLE["harm"][0], "marker": "o", "linewidth": 2, "zorder": 3}
    name = curve.variant.replace("position ", "").replace("sft-", "after ").replace("-", "−")
    return name, {"color": to_hex(colormaps["viridis"](0.85 * place / (len(order) - 1))), "marker": "s^vDPX<>"[place], "linewidth": 1.0}

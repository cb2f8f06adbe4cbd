"""Figures of fine-tuning: separation, refusal, directions and steering, before and after. Knows no experiment."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.lines import Line2D

from latentguard.charts import Chart, Line, Plot
from latentguard.plots.style import DOUBLE, GREY, SINGLE, Rows, column, counted, distinct, in_style, line_with_band, outer, panels, whiskers
from latentguard.plots.words import Named, compose, name_ticks, whole_ticks

# The untouched model, then sizes in ascending order: colour, marker.
_BEFORE = ("#555555", "o")
_SIZES = (("#E69F00", "^"), ("#D55E00", "s"), ("#CC79A7", "D"), ("#0072B2", "v"), ("#009E73", "P"), ("#000000", "*"), ("#56B4E9", "X"))
_SIDES = {"harmful": ("-", "full"), "harmless": (":", "none")}
_LABELS = {"harmful": ("#D55E00", "o", "harmful"), "lookalike": ("#009E73", "D", "look-alike"), "harmless": ("#0072B2", "s", "harmless")}
_KINDS = {"own": ("-", "full", "own direction"), "before": ("--", "none", "direction from before"), "random": (":", "none", "random, equal norm")}


@in_style
def separation_before_and_after(rows: Rows, *, title: str, depth: int, panels: Mapping[str, str]) -> Plot:
    """Mean s at t_inst by layer on held-out prompts (arXiv 2507.11878, Fig. 7), one line a training size, full for harmful and
    dotted for harmless prompts, the band its 95% interval. Rows: panel, n_trained (0: before), side, layer, value, low, high, n.
    """
    figure, axes = _across(panels, 2.3)
    sizes, named = _sizes(rows), {}
    for axis, (panel, name) in zip(axes, panels.items(), strict=True):
        axis.axhline(0, color=GREY, linewidth=0.7)
        for size in [0, *sizes]:
            colour, marker = _style(size, sizes)
            for side, (dashes, fill) in _SIDES.items():
                line = sorted((row for row in rows if (row["panel"], row["n_trained"], row["side"]) == (panel, size, side)), key=lambda row: row["layer"])
                if line:
                    look = {"linestyle": dashes, "marker": marker, "markersize": 2.8, "fillstyle": fill, "linewidth": 1}
                    drawn = line_with_band(axis, line, "layer", "value", colour, **look)
                    here = [row for row in rows if (row["n_trained"], row["side"]) == (size, side)]
                    named[size, side] = Named(f"{_name(size)}: {side}, {counted(here)}", drawn)
        axis.set(xlabel=f"layer (0 = embedding, {depth} = last)", title=name)
        whole_ticks(axis)
    axes[0].set_ylabel("s at t_inst: nearer the harmful pole  →")
    compose(figure, title, list(named.values()))
    caption = "Mean s of held-out prompts by layer before and after fine-tuning, a colour a training size, full marks harmful and hollow marks harmless prompts; bands "
    caption += "are bootstrap 95% intervals of the mean. Form of Fig. 7 of arXiv 2507.11878."
    chart = Chart(
        "line", "layer", "value", f"layer (0 = embedding, {depth} = last)", "s at t_inst: nearer the harmful pole", series="n_trained", dash="side", panel="panel",
        names=_size_names(sizes) | {f"panel={panel}": name for panel, name in panels.items()}, colours=_size_colours(sizes), lines=(Line(0.0, "between the poles"),),
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


@in_style
def refusal_before_and_after(rows: Rows, *, title: str) -> Plot:
    """Refusal of held-out prompts before and after, one marker a label, with 95% intervals. Rows: trained_on, n_trained, label,
    rate, low, high, n.
    """
    places = list(dict.fromkeys((row["trained_on"], row["n_trained"]) for row in rows))
    figure, (axis,) = _across({"": ""}, 2.3, width=DOUBLE if len(places) > 3 else SINGLE)
    named = []
    for offset, (label, (colour, marker, name)) in enumerate(_LABELS.items()):
        line = [row for row in rows if row["label"] == label]
        if line:
            at = [places.index((row["trained_on"], row["n_trained"])) + 0.14 * (offset - 1) for row in line]
            drawn = axis.errorbar(at, column(line, "rate"), yerr=whiskers(line, "rate"), color=colour, marker=marker, linestyle="none")
            named.append(Named(f"{name}, {counted(line)}", drawn))
    name_ticks(axis, [f"{n} {side}\nrequests" if n else "before" for side, n in places])
    axis.set(ylabel="refusal rate, held-out prompts", xlabel="trained on", ylim=(-0.03, 1.03), xlim=(-0.5, len(places) - 0.5))
    compose(figure, title, named)
    caption = "Share of held-out prompts of each label refused before and after fine-tuning, by what was trained on; whiskers are Wilson 95% intervals."
    trained = distinct([row for row in rows if row["n_trained"]], "trained_on")
    chart = Chart(
        "points", "n_trained", "rate", "number of requests trained on", "refusal rate, held-out prompts", series="label", dash="trained_on" if len(trained) > 1 else None,
        names=_size_names(_sizes(rows)) | {label: name for label, (*_, name) in _LABELS.items()} | {f"trained_on={side}": f"trained on {side} requests" for side in trained},
        colours={label: colour for label, (colour, *_) in _LABELS.items()}, y_range=(0, 1),
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


@in_style
def directions_before_and_after(rows: Rows, *, title: str, depth: int, panels: Mapping[str, str]) -> Plot:
    """Cosine by layer of a direction before with one read after, each from half the prompts, a panel a direction; the grey line is
    both from before: what an unchanged direction reaches. Rows: direction, trained_on, n_trained (0: before), layer, halves.
    """
    figure, axes = _across(panels, 2.3)
    sizes, named = _sizes(rows), {}
    for axis, (direction, name) in zip(axes, panels.items(), strict=True):
        axis.axhline(0, color=GREY, linewidth=0.7)
        here = [row for row in rows if row["direction"] == direction]
        for trained_on, size in dict.fromkeys((row["trained_on"], row["n_trained"]) for row in here):
            line = sorted((row for row in here if (row["trained_on"], row["n_trained"]) == (trained_on, size)), key=lambda row: row["layer"])
            dashes, fill = _SIDES[trained_on] if size else ("--", "full")
            colour, marker = _style(size, sizes)
            look = {"color": colour, "marker": marker, "markersize": 2.8, "fillstyle": fill, "linestyle": dashes, "linewidth": 1}
            (drawn,) = axis.plot(column(line, "layer"), column(line, "halves"), **look)
            named[trained_on, size] = Named(f"before with after {size} {trained_on}" if size else "before with before: the ceiling", drawn)
        axis.set(xlabel=f"layer (0 = embedding, {depth} = last)", title=name)
        whole_ticks(axis)
    axes[0].set(ylabel="cosine, each from half the prompts", ylim=(min([-0.05, *(value for value in column(rows, "halves") if value == value)]), 1.03))
    compose(figure, title, list(named.values()))
    caption = "Cosine of a direction read before fine-tuning with the same one read after, each from half the prompts, by layer; the dashed grey line is both from before, "
    caption += "which is what an unchanged direction reaches. These cosines have no interval."
    chart = Chart(
        "line", "layer", "halves", f"layer (0 = embedding, {depth} = last)", "cosine, each from half the prompts", series="n_trained", dash="trained_on",
        panel="direction", low=None, high=None, n=None, names=_size_names(sizes) | {"nothing": "untrained"} | {f"direction={d}": name for d, name in panels.items()},
        colours=_size_colours(sizes),
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


@in_style
def steering_before_and_after(rows: Rows, *, title: str, depth: int, paper: Sequence[tuple[str, int, Sequence[float]]] = ()) -> Plot:
    """Refusal of harmless prompts by the layer at which a refusal direction is added (arXiv 2507.11878, Fig. 18), with 95%
    intervals, a panel a coefficient; the last panel is the paper's own. Rows: n_trained (0: before), direction (own, before,
    random), layer, coef, rate, low, high, n. `paper`: name, size, rates from 0 to 1 by layer.
    """
    coefs = sorted(set(distinct(rows, "coef")))
    figure, axes = _across({str(at): "" for at in range(len(coefs) + bool(paper))}, 2.5, sharex=True)
    sizes = sorted({*_sizes(rows), *(size for _, size, _ in paper if size)})
    lines = list(dict.fromkeys((row["n_trained"], row["direction"]) for row in rows))
    named: dict[Any, Named] = {}
    for axis, coef in zip(axes, coefs, strict=False):
        for i, (size, kind) in enumerate(lines):
            line = sorted((row for row in rows if (row["n_trained"], row["direction"], row["coef"]) == (size, kind, coef)), key=lambda row: row["layer"])
            dashes, fill, name = _KINDS[kind]
            colour, marker = _style(size, sizes)
            at = [row["layer"] / depth + 0.01 * (i - (len(lines) - 1) / 2) for row in line]  # side by side, where they would hide each other
            look = {
                "color": colour,
                "linestyle": dashes,
                "marker": marker,
                "fillstyle": fill,
                "markersize": 3.2,
                "linewidth": 0.9,
                "elinewidth": 0.6,
                "capsize": 1,
            }
            drawn = axis.errorbar(at, column(line, "rate"), yerr=whiskers(line, "rate"), **look)
            here = [row for row in rows if (row["n_trained"], row["direction"]) == (size, kind)]
            named[size, kind] = Named(f"{_name(size)}: {name}, {counted(here)}", drawn)
        axis.set(
            xlabel=f"layer steered, as a share of {depth}",
            ylim=(-0.03, 1.03),
            xlim=(-0.02, 1.02),
            title=f"here, coefficient {coef:g}",
            ylabel="refusal rate, harmless prompts",
        )
    for _, size, rates in paper:
        colour, marker = _style(size, sizes)
        axes[-1].plot([layer / len(rates) for layer in range(len(rates))], rates, color=colour, marker=marker, markersize=2.4, linewidth=1)
        named["paper", size] = Named(f"paper: {_name(size)}", Line2D([], [], color=colour, marker=marker, markersize=2.4))
    if paper:
        axes[-1].set(xlabel=f"layer steered, as a share of {len(paper[0][2])}", title="the paper, Llama-2 (Fig. 18)")
    outer(axes)
    compose(figure, title, list(named.values()))
    caption = "Share of harmless requests refused by the layer at which a refusal direction is added, before and after fine-tuning, a colour a training size, a dash a "
    caption += "direction; whiskers are Wilson 95% intervals. Form of Fig. 18 of arXiv 2507.11878" + (
        ", whose own curves stand at the right." if paper else "."
    )
    kinds = {kind: name for kind, (*_, name) in _KINDS.items()}
    chart = Chart(
        "line", "layer", "rate", f"layer steered (of {depth})", "refusal rate, harmless prompts", series="n_trained", dash="direction", panel="coef", y_range=(0, 1),
        names=_size_names(sizes) | {f"direction={kind}": name for kind, name in kinds.items()} | {f"coef={c:g}": f"coefficient {c:g}" for c in coefs},
        colours=_size_colours(sizes),
    )  # fmt: skip
    return Plot(figure, title, caption, chart)


def _across(named: Mapping[str, str], height: float, width: float | None = None, **shared: Any) -> Any:
    """Panels beside each other that share their y."""
    return panels(len(named), height, across=3, width=width or (DOUBLE if len(named) > 1 else SINGLE), sharey=True, **shared)


def _sizes(rows: Rows) -> list[int]:
    return sorted({row["n_trained"] for row in rows} - {0})


def _style(size: int, sizes: Sequence[int]) -> tuple[str, str]:
    return _SIZES[list(sizes).index(size) % len(_SIZES)] if size else _BEFORE


def _name(size: int) -> str:
    return f"after {size}" if size else "before"


def _size_names(sizes: Sequence[int]) -> dict[str, str]:
    return {f"n_trained={size}": _name(size) for size in (0, *sizes)}


def _size_colours(sizes: Sequence[int]) -> dict[str, str]:
    return {str(size): _style(size, sizes)[0] for size in (0, *sizes)}

"""What all figures share: colours, markers, legends, intervals. Knows no figure.

Colours are the Okabe-Ito set, told apart by the colour-blind; every line has its own marker, every rate its interval.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
# Directions: colour, marker, dashes, name.
STYLE = {
    "none": ("#555555", "", "--", "no steering"),
    "harm": ("#D55E00", "o", "-", "+ harmfulness (at t_inst)"),
    "refuse": ("#0072B2", "s", "-", "+ refusal (at t_post_inst)"),
    "random": ("#009E73", "^", ":", "+ random, equal norm"),
}
# Groups of prompts: colour, marker, name.
GROUPS = {
    "refused_harmful": ("#D55E00", "o", "refused harmful"),
    "accepted_harmful": ("#E69F00", "^", "accepted harmful"),
    "refused_harmless": ("#56B4E9", "D", "refused harmless"),
    "accepted_harmless": ("#0072B2", "s", "accepted harmless"),
    "harmful": ("#8C3B00", "v", "harmful, by label"),
    "harmless": ("#003F5C", "P", "harmless, by label"),
    "template": ("#CC79A7", "^", "jailbreak: template"),
    "suffix": ("#009E73", "D", "jailbreak: suffix"),
    "persuasion": ("#000000", "X", "jailbreak: persuasion"),
    "elsewhere": ("#7F7F7F", "P", "another data set"),
}


def group_style(name: str) -> tuple[str, str, str]:
    """Colour, marker and name of a group of prompts; one that a user named is grey, by its own name."""
    return GROUPS.get(name, ("#7F7F7F", "*", name.replace("_", " ")))


def figure_of(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def plain(axis: Any) -> Any:
    """Without the box's upper and right sides."""
    axis.spines[["top", "right"]].set_visible(False)
    return axis


def counted(rows: Rows) -> str:
    """`n = 40`, or n = 30–40 where rows differ."""
    sizes = sorted({row["n"] for row in rows})
    return f"n = {sizes[0]}" if len(sizes) == 1 else f"n = {sizes[0]}–{sizes[-1]}"


def legend_below(figure: Figure, axis: Any, title: str, columns: int = 2) -> Figure:
    """The legend of one axis under the whole figure, and the title."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10.5)
    return figure

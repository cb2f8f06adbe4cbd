"""The numbers that the paper prints (arXiv 2507.11878), to stand beside ours. Knows no experiment, model or drawing.

`data/published.json` holds tables in long form (one value a row) and every per-layer curve; a curve's x is the layer, 0 … L − 1.
`read` says how a number was had: "printed", or "vector graphics" (from the PDF's drawing commands: exact to its precision).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from latentguard.errors import InputError

SOURCE = Path(__file__).parent / "data" / "published.json"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """One line of a figure."""

    figure: str  # "8a": the panel too
    model: str
    shows: str  # the rate of what: refusal, or in reply inversion the answers No and Certainly
    prompts: str  # harmless or harmful
    steered: str  # "+ harm", "- refuse", …: one raw direction at one layer
    variant: str  # what tells it from its neighbours: the question, the tokens, the extraction position, the fine-tuning
    unit: str
    read: str
    n: int | None  # prompts, inferred from the step between values; None where it cannot be told
    values: tuple[float, ...]

    @property
    def depth(self) -> tuple[float, ...]:
        """Each value's layer as a share of the model's depth."""
        return tuple(layer / len(self.values) for layer in range(len(self.values)))

    @property
    def peak(self) -> tuple[int, float]:
        """The first layer with the highest value, and that value."""
        return self.values.index(max(self.values)), max(self.values)


@dataclass(frozen=True)
class Table:
    """A table or the readings of a figure. Every row names its `model`; the number is `value`, `value` … `to` where only a
    range is known, or the two deltas; `k` and `n` marked `inferred` were not printed.
    """

    name: str
    of: str  # "Table 3"
    what: str
    unit: str
    read: str
    note: str
    rows: tuple[Row, ...]


@cache
def _load() -> dict[str, Any]:
    return json.loads(SOURCE.read_text(encoding="utf-8"))


def models() -> dict[str, int]:
    """The paper's models and the number of their blocks."""
    return {name: model["layers"] for name, model in _load()["paper"]["models"].items()}


def figures() -> dict[str, str]:
    """The figures whose curves are here, and what each shows."""
    return dict(_load()["figures"])


def tables() -> list[str]:
    """The names that `table` knows."""
    return list(_load()["tables"])


def curves(figure: str | int, model: str | None = None) -> tuple[Curve, ...]:
    """A figure's curves, all panels ("8") or one ("8a"), of one model or all."""
    wanted = str(figure)
    found = [row for row in _load()["curves"] if wanted in (row["figure"], row["figure"].rstrip("abcd"))]
    if not found:
        raise InputError(f"figure {wanted!r}: no per-layer curve is known for it; choose one of {', '.join(figures())}, or a panel such as 8a")
    if model is not None:
        found = [row for row in found if row["model"] == model]
        if not found:
            raise InputError(f"figure {wanted} has no curve of {model!r}; the paper's models are {', '.join(models())}")
    return tuple(Curve(**{**row, "values": tuple(row["values"])}) for row in found)


def table(name: str) -> Table:
    """A table by name, as `tables` lists them."""
    if name not in _load()["tables"]:
        raise InputError(f"table {name!r}: choose one of {', '.join(tables())}")
    found = _load()["tables"][name]
    given = {field.name: found[field.name] for field in fields(Table) if field.name not in ("name", "rows")}
    return Table(name=name, rows=tuple(MappingProxyType(row) for row in found["rows"]), **given)

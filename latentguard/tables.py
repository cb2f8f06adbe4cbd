"""Rows as a table of plain text, for the end of a run: a line a row, intervals in brackets. Knows no study and no terminal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size

from latentguard.report.runs import tells
from latentguard.report.wording import bounds, interval, number

Row = Mapping[str, Any]
_PLACES = ("layer", "coef", "draw", "n_trained")  # numbers that name a row
_GAP, _NARROW, _WIDE = "  ", 6, 60  # between columns; characters of a column of words, at least and at most


@dataclass(frozen=True)
class _Column:
    name: str
    cells: tuple[str, ...]
    words: bool = False

    @property
    def width(self) -> int:
        return max(map(cell_len, (self.name, *self.cells)))


def as_text(rows: Sequence[Row], width: int = 100, limit: int = 12) -> str:
    """The first `limit` rows, no line wider than `width` columns of a terminal; a last line says what is left out.

    What names a row comes first, then its rate or value with the interval, n, and of the other columns as many as there is room for.
    Columns that hold what a model said are never shown, nor are words that are the same in every row. "" for no rows.
    """
    named, main, others = _columns(rows, limit)
    names: list[_Column] = []
    for column in named:
        names += [column] if _needs([*names, column, *main], _NARROW) <= width else []
    most = next((size for size in range(_WIDE, _NARROW, -1) if _needs([*names, *main], size) <= width), _NARROW)
    more = max((i for i in range(len(others) + 1) if _needs([*names, *main, *others[:i]], most) <= width), default=0)
    columns = [*names, *main, *others[:more]]
    if not columns:
        return ""
    sizes = [min(column.width, most) if column.words else column.width for column in columns]
    lines = [_line([c.name for c in columns], columns, sizes)]
    lines += [_line([c.cells[i] for c in columns], columns, sizes) for i in range(len(columns[0].cells))]
    every = len(named) + len(main) + len(others)
    left_out = [f"{limit} of {len(rows)} rows"] * (len(rows) > limit) + [f"{len(columns)} of {every} columns"] * (len(columns) < every)
    lines += [f"({', '.join(left_out)}; summary.json has all)"] if left_out else []
    return "\n".join(_cut(line, width).rstrip() for line in lines)


def found(summary: Row) -> list[Row]:
    """The rows that tell a run: its table; of a series, each study's headline."""
    if "headlines" not in summary:
        return list(summary.get("table") or ())
    rows = []
    for name, told in summary["headlines"].items():
        metric = f"{'claim withheld: ' if told.get('withheld') else ''}{told['metric']}"
        rows.append({"study": name, "metric": metric, **{key: told[key] for key in ("value", "low", "high", "n")}})
    return rows


def _columns(rows: Sequence[Row], limit: int) -> tuple[list[_Column], list[_Column], list[_Column]]:
    """What names a row, its number and n, and the rest."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if not tells(key) and any(_told(row.get(key)) for row in rows)]
    ends = bounds(dict.fromkeys(keys))
    first = next((key for key in ("rate", "value", *ends) if key in keys), "")
    hidden = {first, "n", "k", *(end for pair in ends.values() for end in pair)}
    before = {key for row in rows if first in row for key in list(row)[: list(row).index(first)]}

    def column(key: str, words: bool = False) -> _Column:
        return _Column(_plain(key.replace("_", " ")) + " [95%]" * (key in ends), tuple(_cell(row, key, ends) for row in rows[:limit]), words)

    named, others = [], []
    for key in (key for key in keys if key not in hidden):
        values = [row.get(key) for row in rows]
        words = all(isinstance(value, str) or value is None for value in values)
        if not ((words or key in _PLACES) and (key in before or not first)):
            others.append(column(key, words))
        elif not words or len(rows) == 1 or len(set(values)) > 1:
            named.append(column(key, words))
    return named, [column(key) for key in (first, "n") if key in keys], others


def _cell(row: Row, key: str, ends: Mapping[str, tuple[str, str]]) -> str:
    value = row.get(key)
    return _plain(interval(value, *map(row.get, ends[key])) if key in ends else "" if value == "" else number(value))


def _told(value: Any) -> bool:
    return value not in (None, "") and not isinstance(value, Mapping | list | tuple)


def _plain(text: str) -> str:
    """On one line, and without what moves a terminal's cursor or turns its direction."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _needs(columns: Iterable[_Column], most: int = _WIDE) -> int:
    """The width of a line of them."""
    sizes = [min(column.width, most) if column.words else column.width for column in columns]
    return sum(sizes) + len(_GAP) * (len(sizes) - 1)


def _line(cells: Sequence[str], columns: Sequence[_Column], sizes: Sequence[int]) -> str:
    """Words to the left, numbers to the right."""
    told = []
    for cell, column, size in zip(cells, columns, sizes, strict=True):
        short = _cut(cell, size)
        told.append(set_cell_size(short, size) if column.words else " " * (size - cell_len(short)) + short)
    return _GAP.join(told)


def _cut(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, max(width - 1, 0)).rstrip() + "…"

"""Numbers as people read them, alone and in tables: three figures, intervals in digits that suit their width. Knows no study."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from latentguard.pages import Sheet

_ASIDE = ("withheld", "token", "why", "layers", "poles")  # words that do not say which number it is


def number(value: Any) -> str:
    """At most three figures; a dash for what is not there."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "−")
    return str(value).replace("-", "−") if isinstance(value, int) else str(value)


def interval(value: Any, low: Any, high: Any) -> str:
    """0.46 [0.33, 0.60], in digits that suit the interval's width."""
    numbers = [value, low, high]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
        return number(value)
    width = high - low
    digits = max(math.ceil(-math.log10(width / 4)), 2 if width < 2 else 0) if width > 0 else 2
    at, least, most = (f"{x:z.{digits}f}".replace("-", "−") if digits <= 4 else f"{x:.2g}".replace("-", "−") for x in numbers)
    return f"{at} [{least}, {most}]"


def found(row: Mapping[str, Any]) -> str:
    """A rate or a value with its interval and n: 0.46 [0.33, 0.60] (n = 50)."""
    value = row.get("rate", row.get("value"))
    size = f" (n = {number(row['n'])})" if row.get("n") is not None else ""
    return interval(value, row.get("low"), row.get("high")) + size


def duration(seconds: float) -> str:
    """1 min 12 s."""
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{seconds:.1f} s"


def bounds(row: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The columns that have an interval, and the columns of its ends: rate and value have low and high, auroc has auroc_low, …"""
    ends = {key: ("low", "high") for key in ("rate", "value") if key in row and "low" in row}
    for key in row:
        bare = key if f"{key}_low" in row or key.removeprefix("delta_") in row else key.removeprefix("delta_")
        if f"{bare}_low" in row and f"{bare}_high" in row and key not in ends:
            ends[key] = (f"{bare}_low", f"{bare}_high")
    return ends


def sheet(title: str, rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """Flat rows; a number swallows its interval, k goes where n and the rate stand, and columns without any value are left out."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if any(row.get(key) not in (None, "", []) for row in rows)]
    ends = bounds(dict.fromkeys(keys))
    swallowed = {end for pair in ends.values() for end in pair} | ({"k"} if "rate" in ends else set())
    shown = [key for key in keys if key not in swallowed and key != "n"]
    if "n" in keys:
        shown.insert(max([shown.index(key) + 1 for key in ("rate", "value") if key in shown] or [len(shown)]), "n")
    named = [f"{key.replace('_', ' ')} [95% interval]" if key in ends else key.replace("_", " ") for key in shown]
    cells = [[interval(row.get(key), *map(row.get, ends[key])) if key in ends else number(row.get(key)) for key in shown] for row in rows]
    return Sheet(title, named, cells)


def measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every number of a table that has an interval, by the words of its row: {name: {value, low, high, n}}."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        told = [str(value).replace("_", " ") for key, value in row.items() if isinstance(value, str) and value and key not in _ASIDE]
        told += [f"{key.replace('_', ' ')} {row[key]}" for key in ("n_trained", "draw") if row.get(key) is not None]
        for key, (low, high) in bounds(row).items():
            name = " · ".join([*told, *([] if key in ("rate", "value") else [key.replace("_", " ")])])
            if name in found:  # rows that differ in where they were measured alone
                name = " · ".join([name, *(f"{at} {row[at]}" for at in ("layer", "coef") if row.get(at) is not None)])
            found.setdefault(name, {"value": row.get(key), "low": row.get(low), "high": row.get(high), "n": row.get("n")})
    return found

"""A run of `exp=paper` as one page: the fourteen effects, then each study's figures and table beside what the paper prints.

`paper.html` is self-contained (no script, nothing fetched), `paper.md` links to figures/. Knows no experiment, only the
summaries they give. What the model said is never on the page: a figure or table that holds replies is left out.
"""

import csv
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from latentguard import published
from latentguard.errors import InputError
from latentguard.pages import Block, Page, Picture, Section, Sheet, as_html, as_markdown
from latentguard.plots import paper

log = logging.getLogger(__name__)
Summary = Mapping[str, Any]
TITLE = "LLMs Encode Harmfulness and Refusal Separately"
READING = (
    "Each study: what this run found, and beside it what the paper (arXiv 2507.11878) prints for its three models. Intervals are 95%. "
    "Poles by behaviour are made of prompts that the model refused or accepted; poles by label stand in where a cell is too thin, and the claim is then withheld."
)
VERDICTS = {"holds": ("✓", "good"), "does not hold": ("✗", "bad"), "not testable here": ("–", "open")}
MARKS = {"ok": ("✓", "good"), "insufficient_base_rate": ("–", "open"), "failed": ("✗", "bad"), "skipped": ("–", "open")}
STATUS = {"ok": "done", "insufficient_base_rate": "claim withheld: too few prompts in a cell", "failed": "failed", "skipped": "skipped"}
# What the paper claims (our words), its own numbers, and the studies that test it.
EFFECTS: dict[int, tuple[str, str, tuple[str, ...]]] = {
    1: ("Harmful requests are refused less often without the post-instruction tokens", "Llama-2 100 → 85.3 %, Llama-3 96 → 58.9 %, Qwen2 98 → 81.3 %", ("suffix",)),
    2: ("At t_inst, Δ_harmful tells refused harmful (above 0) from accepted harmless (below 0)", "Llama-2: +0.096 and −0.087", ("beliefs",)),
    3: ("Refused harmless prompts look harmless at t_inst, yet nearer to refusal at t_post_inst", "Llama-2: Δ_harmful −0.087, Δ_refuse +0.059", ("beliefs",)),
    4: ("Accepted harmful prompts lack the refusal signal", "Llama-2: Δ_refuse −0.127 against +0.293; Δ_harmful +0.051", ("beliefs",)),
    5: ("The two deltas agree where the model behaves, and part where it misbehaves", "Llama-2: r = 0.93 and −0.67 (from the plotted points)", ("beliefs",)),
    6: ("The harmfulness and the refusal direction are nearly orthogonal", "Llama-2: cosine about 0.1", ("steer_harm", "steer_refusal")),
    7: (
        "Either direction makes harmless requests refused in a window of middle layers, the refusal direction at least as often",
        "at most 58 and 100 % (Llama-2), 94 and 100 % (Llama-3), 37 and 81 % (Qwen2)",
        ("steer_harm", "steer_refusal"),
    ),
    8: ("Both directions do more than random ones of equal norm", "no such control", ("steer_harm", "steer_refusal")),
    9: (
        "In reply inversion the harmfulness direction flips the answer, the refusal direction does not",
        "Qwen2: “No” falls to 0 % with + harm, to 72 % with + refuse; rises to 52 % with − harm, to 2 % with − refuse",
        ("inversion",),
    ),
    10: ("On the instruction's tokens alone the refusal direction hardly moves the inverted answer", "“No” from 62 to 87 %, unsteered about 78 %", ("inversion",)),
    11: (
        "Harmfulness directions of different categories differ more than their refusal directions",
        "mean cosine 0.65 against 0.94 (Qwen2), 0.73 and 0.95 (Llama-3), 0.86 and 0.96 (Llama-2)",
        ("categories",),
    ),
    12: (
        "Template jailbreaks lose the refusal signal and keep the harmfulness one; persuasion has the lowest Δ_harmful",
        "Llama-2: Δ_harmful +0.097 template, +0.009 suffix, +0.013 persuasion; Δ_refuse −0.075, −0.061, −0.120",
        ("jailbreaks",),
    ),
    13: ("Fine-tuning that ends refusal leaves Δ_harmful nearly as it was", "at most 0.02 a layer between 50 and 400 requests", ("finetune_attack",)),
    14: ("Latent Guard is worse out of domain; a few in-domain examples restore recall", "Qwen2, hate: 39.5 → 91.9 %", ("latent_guard",)),
}  # fmt: skip
# Study → the paper's place, the figure drawn from its curves, its tables.
PAPER: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "suffix": ("Table 1", "", ("table1",)),
    "clusters": ("Fig. 2", "", ("fig2",)),
    "beliefs": ("Fig. 3", "", ("fig3", "fig3_r")),
    "steer_harm": ("Figs. 4, 8", "paper_steering", ("section3_4",)),
    "steer_refusal": ("Figs. 4, 8", "paper_steering", ("section3_4",)),
    "inversion": ("Figs. 5, 10–12", "paper_inversion", ()),
    "positions": ("Figs. 13–16", "paper_positions", ("fig14",)),
    "categories": ("Figs. 9, 17", "", ("fig9a", "fig9b")),
    "jailbreaks": ("Fig. 6", "", ("fig6",)),
    "latent_guard": ("Tables 3, 8, 9", "", ("table3", "table8", "table9")),
    "finetune_attack": ("Figs. 7, 18", "paper_fine_tuning", ("fig7",)),
    "ablate_refusal": ("arXiv 2406.11717", "", ()),
    "final_token": ("our control", "", ()),
}
# How a long table is laid out: the columns that name a row, and those whose values become columns.
LAYOUT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "table1": (("model",), ("suffix",)),
    "table3": (("model", "guard"), ("set",)),
    "table8": (("guard", "model"), ("set",)),
    "table9": (("guard", "model", "in_domain"), ("category",)),
    "fig2": (("position", "cell"), ("model",)),
    "fig7": (("layers",), ("model",)),
    "fig9a": (("category",), ("model", "direction")),
    "fig9b": (("category",), ("model",)),
    "fig14": (("cell", "position"), ("model",)),
}
_SAID = ("reply", "rule", "generation", "completion")


def write_page(folder: str | Path, model: str, studies: Mapping[str, Summary]) -> Path:
    """`paper.html` and `paper.md` in a run's folder, and the paper's curves as figures/paper_*.png with their CSV; the path of
    the page.

    `studies`: name → summary, with `status` (ok, insufficient_base_rate: then `claim`; failed, skipped: then `why`), and where it
    has them `study` (if `name` is another), `table` (flat rows; rate or value with low, high, n), `figures` (names; each needs
    figures/<name>.png and .csv), `effects` ({effect: 1 … 14, verdict, number, low, high, n, why}), `poles`, `cells`, `data`,
    `seconds`. What breaks this is an InputError; a figure whose file is missing is named on the page.
    """
    folder = Path(folder)
    for name, summary in studies.items():
        _check(name, summary)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for drawn in sorted({PAPER[s][1] for s in (summary.get("study", name) for name, summary in studies.items()) if s in PAPER} - {""}):
        _keep(folder, drawn, *paper.FIGURES[drawn]())
    data = list(dict.fromkeys(filter(None, map(_data_name, studies.values()))))
    verdicts, count = _effects(studies)
    page = Page(
        title=f"“{TITLE}” on {model}",
        head=[f"Data: {', '.join(data) or 'not stated'}. Studies: {len(studies)}.", READING],
        verdicts_title=f"The paper's fourteen effects: {count}",
        verdicts=verdicts,
        sections=[_section(folder, name, summary) for name, summary in studies.items()],
        marks=VERDICTS | {words: MARKS[status] for status, words in STATUS.items()},
    )
    _write(folder / "paper.md", as_markdown(page))
    return _write(folder / "paper.html", as_html(page, folder / "figures"))


def _write(path: Path, text: str) -> Path:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(path)


def _check(name: str, summary: Summary) -> None:
    status = summary.get("status")
    if status not in STATUS:
        raise InputError(f"study {name}: status {status!r} is none of {', '.join(STATUS)}")
    needed = "claim" if status in ("ok", "insufficient_base_rate") else "why"
    if not summary.get(needed):
        raise InputError(f"study {name}: its summary has status {status!r} and no {needed!r}; give one sentence")
    for effect in summary.get("effects", ()):
        if effect.get("effect") not in EFFECTS or effect.get("verdict") not in VERDICTS:
            raise InputError(f"study {name}: effect {effect.get('effect')!r} with verdict {effect.get('verdict')!r}; 1 … 14, and one of {', '.join(VERDICTS)}")
    if said := sorted({key for row in summary.get("table", ()) for key in row if _tells(key)}):
        raise InputError(f"study {name}: its table has {', '.join(said)}; what the model said never goes on the page")


def _tells(column: str) -> bool:
    """Whether a column of this name holds replies, or stands beside one that does."""
    return column in _SAID or column.endswith(("_verdict", "_reply"))


def _data_name(summary: Summary) -> str:
    data = summary.get("data") or ""
    return str(data.get("name", "")) if isinstance(data, Mapping) else str(data)


def _effects(studies: Mapping[str, Summary]) -> tuple[Sheet, str]:
    """The table of the fourteen effects, one row a verdict, and how many hold."""
    rows, verdicts = [], Counter()
    for number, (words, printed, tested_by) in EFFECTS.items():
        found = [(name, s, e) for name, s in studies.items() for e in s.get("effects", ()) if e["effect"] == number]
        for name, summary, effect in found:
            by_label = "poles by label" if effect.get("poles", summary.get("poles")) == "label" else ""
            why = "; ".join(filter(None, [effect.get("why"), by_label])) + f" ({name})"
            size = f" (n = {_number(effect['n'])})" if effect.get("n") is not None else ""
            value = _interval(effect.get("number"), effect.get("low"), effect.get("high")) + size
            rows.append([str(number), words, effect["verdict"], value, why.strip(), printed])
            verdicts[effect["verdict"]] += 1
        if not found:
            ran = [f"{n}: {STATUS[s['status']]}, {s.get('why') or 'no verdict given'}" for n, s in studies.items() if s.get("study", n) in tested_by]
            why = "; ".join(ran) or f"not part of this run: {' or '.join(tested_by)}"
            rows.append([str(number), words, "not testable here", "—", why, printed])
            verdicts["not testable here"] += 1
    count = f"{verdicts['holds']} hold, {verdicts['does not hold']} do not hold, {verdicts['not testable here']} not testable here"
    return Sheet("", ("#", "Effect", "Verdict", "Here [95% interval]", "Why", "The paper"), rows), count


def _section(folder: Path, name: str, summary: Summary) -> Section:
    study, status = summary.get("study", name), summary["status"]
    place, drawn, tables = PAPER.get(study, ("", "", ()))
    chips = []
    if summary.get("poles"):
        chips.append(f"poles by {summary['poles']}")
    if summary.get("cells"):
        chips.append(", ".join(_counted(key.replace("_", " "), count) for key, count in summary["cells"].items()))
    if summary.get("seconds") is not None:
        chips.append(_duration(summary["seconds"]))
    ours: list[Block] = [_picture(folder, figure) for figure in summary.get("figures", ())]
    if summary.get("table"):
        ours.append(_rows("", summary["table"]))
    if not ours:
        ours = [f"Nothing to show: {STATUS[status]}."]
    theirs: list[Block] = [Picture(drawn, f"arXiv 2507.11878, read from its vector graphics (data: figures/{drawn}.csv)")] if drawn else []
    theirs += [_published(table) for table in tables]
    lead = str(summary.get("claim") or summary.get("why"))
    return Section(name, place, STATUS[status], chips, lead, ours, theirs or ["The paper has no number for this."])


def _counted(name: str, count: object) -> str:
    """A role's number; 12 of 40 asked where it is known."""
    if isinstance(count, Mapping):
        return f"{name} {count['n']} of {count['asked']} asked" + (" (short)" if count.get("withheld") else "")
    return f"{name} {count}" if isinstance(count, str) else f"{_number(count)} {name}"


def _picture(folder: Path, name: str) -> Block:
    """The figure; in its place a sentence where it is missing, shows replies, or has no data to tell whether it does."""
    png, table = folder / "figures" / f"{name}.png", folder / "figures" / f"{name}.csv"
    if not png.is_file() or not table.is_file():
        log.warning("the page leaves out figure %s: %s is missing", name, png if not png.is_file() else table)
        return f"Figure {name} is missing: it needs figures/{name}.png and its data, figures/{name}.csv."
    with table.open(newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file), [])
    if any(map(_tells, columns)):
        return f"Figure {name} shows what the model said and is not on this page; it is figures/{name}.png in the run's folder."
    return Picture(name, f"{name.replace('_', ' ')} (data: figures/{name}.csv)")


def _rows(title: str, rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """Flat rows; a rate or value swallows its interval, and k goes where n and the rate stand."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    main = [key for key in ("rate", "value") if key in keys]
    swallowed = {"low", "high", "k"} if main else set()
    shown = [key for key in keys if key not in swallowed and key != "n"]
    if "n" in keys:
        shown.insert(max([shown.index(key) + 1 for key in main] or [len(shown)]), "n")
    named = [f"{key} [95% interval]" if key in main and "low" in keys else key.replace("_", " ") for key in shown]
    cells = [[_interval(row.get(key), row.get("low"), row.get("high")) if key in main else _number(row.get(key)) for key in shown] for row in rows]
    return Sheet(title, named, cells)


def _published(name: str) -> Sheet:
    table = published.table(name)
    title = f"{table.of}: {table.what} ({table.unit}; {table.read}).{f' Note: {table.note}.' if table.note else ''}"
    if name not in LAYOUT:
        return _rows(title, table.rows)
    down, across = LAYOUT[name]
    digits = max(len(str(row["value"]).partition(".")[2]) for row in table.rows)  # as the paper prints them
    columns = list(dict.fromkeys(tuple(row[key] for key in across) for row in table.rows))
    lines: dict[tuple, dict[tuple, list[str]]] = {}
    for row in table.rows:
        line = lines.setdefault(tuple(row[key] for key in down), {})
        line.setdefault(tuple(row[key] for key in across), []).append(_reading(row, down, digits))
    cells = [[*map(_number, at), *("; ".join(line.get(column, ["—"])) for column in columns)] for at, line in lines.items()]
    return Sheet(title, [*(key.replace("_", "-") for key in down), *(" ".join(map(str, column)) for column in columns)], cells)


def _reading(row: Mapping[str, Any], down: Sequence[str], digits: int) -> str:
    if "layers" in row:  # read off a plateau or a peak: no more digits than were read
        text = _number(row["value"]) + (f" to {_number(row['to'])}" if "to" in row else "")
        return text if "layers" in down else f"{text} ({row['layers']})"
    return f"{row['value']:.{digits}f}".replace("-", "−") + (f" ({row['k']}/{row['n']})" if "k" in row else "")


def _number(value: Any) -> str:
    """At most three figures; a dash for what is not there."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "−")
    return str(value).replace("-", "−") if isinstance(value, int) else str(value)


def _interval(value: Any, low: Any, high: Any) -> str:
    """0.46 [0.33, 0.60], in digits that suit the interval's width."""
    numbers = [value, low, high]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
        return _number(value)
    width = high - low
    digits = min(max(math.ceil(-math.log10(width / 4)), 2 if width < 2 else 0), 4) if width > 0 else 2
    at, least, most = (f"{x:.{digits}f}".replace("-", "−") for x in numbers)
    return f"{at} [{least}, {most}]"


def _duration(seconds: float) -> str:
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{seconds:.1f} s"


def _keep(folder: Path, name: str, figure: Figure, rows: Sequence[Mapping[str, Any]]) -> None:
    figure.savefig(folder / "figures" / f"{name}.png", dpi=160)
    with (folder / "figures" / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

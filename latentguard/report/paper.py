"""What the paper claims and prints, as parts of a page: its fourteen effects, and beside each study its curves and tables.

Knows no experiment, only the summaries they give.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from latentguard import published
from latentguard.charts import Plot
from latentguard.errors import InputError
from latentguard.pages import Block, Sheet
from latentguard.plots import paper
from latentguard.report.pictures import drawn
from latentguard.report.wording import found, number, sheet

Summary = Mapping[str, Any]
READING = (
    "Each study: what this run found, and beside it what the paper (arXiv 2507.11878) prints for its three models. Intervals are 95%. "
    "Poles by behaviour are made of prompts that the model refused or accepted; poles by label stand in where a cell is too thin, and the claim is then withheld."
)
VERDICTS = {"holds": ("✓", "good"), "does not hold": ("✗", "bad"), "not testable here": ("–", "open")}
STATUS = {
    "ok": "done",
    "insufficient_base_rate": "claim withheld",
    "failed": "failed",
    "skipped": "skipped",
    "unfinished": "not finished",
    "running": "still running",
}
_SIGNS = {
    "ok": ("✓", "good"),
    "insufficient_base_rate": ("–", "open"),
    "failed": ("✗", "bad"),
    "skipped": ("–", "open"),
    "unfinished": ("…", "open"),
    "running": ("…", "open"),
}
_COLUMNS = ("#", "Effect", "Verdict", "Here [95% interval]", "Why")
MARKS = VERDICTS | {"not asked": ("–", "open")} | {words: _SIGNS[status] for status, words in STATUS.items()}
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


def check(name: str, summary: Summary) -> None:
    """Refuse a summary that this page could not show rightly.

    Raises:
        InputError: an unknown status or effect, or no sentence.
    """
    status = summary.get("status")
    if status not in STATUS:
        raise InputError(f"study {name}: status {status!r} is none of {', '.join(STATUS)}")
    needed = "claim" if status in ("ok", "insufficient_base_rate") else "why"
    if not summary.get(needed):
        raise InputError(f"study {name}: its summary has status {status!r} and no {needed!r}; give one sentence")
    for effect in summary.get("effects", ()):
        if effect.get("effect") not in EFFECTS or effect.get("verdict") not in VERDICTS:
            raise InputError(f"study {name}: effect {effect.get('effect')!r} with verdict {effect.get('verdict')!r}; 1 … 14, and one of {', '.join(VERDICTS)}")


def effects(studies: Mapping[str, Summary]) -> tuple[Sheet, str]:
    """The table of the fourteen effects, one row a verdict, and how many hold."""
    rows, verdicts = [], Counter()
    for which, (_, _, tested_by) in EFFECTS.items():
        told = [_told(name, s, e) for name, s in studies.items() for e in s.get("effects", ()) if e["effect"] == which]
        if not told:
            ran = [f"{n}: {STATUS[s['status']]}, {s.get('why') or 'no verdict given'}" for n, s in studies.items() if s.get("study", n) in tested_by]
            why = "; ".join(ran) or f"not part of this run: {' or '.join(tested_by)}"
            told = [[str(which), _claimed(which), "not asked", "—", why]]
        rows += told
        verdicts.update(row[2] for row in told)
    count = f"{verdicts['holds']} hold, {verdicts['does not hold']} do not hold, {verdicts['not testable here']} not testable here, {verdicts['not asked']} not asked"
    return Sheet("The paper's fourteen effects", _COLUMNS, rows), count


def effects_of(name: str, summary: Summary) -> Sheet:
    """The effects that one study speaks of."""
    return Sheet("The paper's effects that this study tests", _COLUMNS, [_told(name, summary, effect) for effect in summary["effects"]])


def _told(name: str, summary: Summary, effect: Mapping[str, Any]) -> list[str]:
    by_label = "poles by label" if effect.get("poles", summary.get("poles")) == "label" else ""
    why = "; ".join(filter(None, [effect.get("why"), by_label])) + f" ({name})"
    return [str(effect["effect"]), _claimed(effect["effect"]), effect["verdict"], found({**effect, "value": effect.get("number")}), why.strip()]


def _claimed(which: int) -> str:
    words, paper_says, _ = EFFECTS[which]
    return f"{words}. The paper: {paper_says}."


@cache
def _curves(name: str) -> tuple[Plot, list[dict[str, Any]]]:
    return paper.FIGURES[name]()


def printed(study: str, folder: Path) -> list[Block]:
    """What the paper prints beside a study: its curves, drawn into `folder`/figures, and its tables."""
    _, name, tables = PAPER.get(study, ("", "", ()))
    blocks: list[Block] = []
    if name:
        plot, rows = _curves(name)
        blocks.append(drawn(folder, name, plot, rows))
    blocks += [_published(table) for table in tables]
    return blocks or ["The paper has no number for this."]


def _published(name: str) -> Sheet:
    table = published.table(name)
    title = f"{table.of}: {table.what} ({table.unit}; {table.read}).{f' Note: {table.note}.' if table.note else ''}"
    if name not in LAYOUT:
        return sheet(title, table.rows)
    down, across = LAYOUT[name]
    digits = max(len(str(row["value"]).partition(".")[2]) for row in table.rows)  # as the paper prints them
    columns = list(dict.fromkeys(tuple(row[key] for key in across) for row in table.rows))
    lines: dict[tuple, dict[tuple, list[str]]] = {}
    for row in table.rows:
        line = lines.setdefault(tuple(row[key] for key in down), {})
        line.setdefault(tuple(row[key] for key in across), []).append(_reading(row, down, digits))
    cells = [[*map(number, at), *("; ".join(line.get(column, ["—"])) for column in columns)] for at, line in lines.items()]
    return Sheet(title, [*(key.replace("_", "-") for key in down), *(" ".join(map(str, column)) for column in columns)], cells)


def _reading(row: Mapping[str, Any], down: Sequence[str], digits: int) -> str:
    if "layers" in row:  # read off a plateau or a peak: no more digits than were read
        text = number(row["value"]) + (f" to {number(row['to'])}" if "to" in row else "")
        return text if "layers" in down else f"{text} ({row['layers']})"
    return f"{row['value']:.{digits}f}".replace("-", "−") + (f" ({row['k']}/{row['n']})" if "k" in row else "")

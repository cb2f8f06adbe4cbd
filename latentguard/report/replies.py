"""rows.jsonl → what was said to each prompt under each condition, to be read side by side. Knows no study and no HTML."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from latentguard.pages import Replies
from latentguard.report.wording import number

MOST = 20_000  # replies on one page
_ABOUT = ("prompt_id", "prompt", "label", "category", "source", "terminal", "set", "group", "poles", "dose", "judge")
_SAID = ("reply", "rule", "verdict", "score", "finish")
_NAMED = ("study", "stage", "intervention", "layer", "coef", "position", "when", "draw")
# Where a study says the replies that its numbers are made of; the first that is there is shown first.
_FIRST = ("reported", "test", "held_out", "suffix", "steering")


def condition(row: Mapping[str, Any], *, study: bool) -> tuple:
    """What was done when this was said, as pairs that two rows share or not; `study`: in a series its study belongs to it."""
    keys = [key for key in (*_NAMED, *sorted(row)) if key in row and key not in (*_ABOUT, *_SAID)]
    if row.get("stage") == "roles":  # the same question in each study of a series, answered once
        keys = [key for key in keys if key != "study"]
    return tuple((key, row[key]) for key in dict.fromkeys(keys) if row[key] is not None and (study or key != "study") and not isinstance(row[key], list))


def called(pairs: Iterable[tuple[str, Any]]) -> str:
    """`reported: + harm · layer 12 · ×2`."""
    told = dict(pairs)
    head = [str(told.pop(key)) for key in ("study", "stage") if key in told]
    name = str(told.pop("intervention", "none"))
    acts = ["no steering" if name == "none" else name if name[:1] in "+-" else f"+ {name}"]
    acts += [f"layer {told.pop('layer')}"] if "layer" in told else []
    acts += [f"×{number(told.pop('coef'))}"] if "coef" in told else []
    if told.get("position") == "all":
        told.pop("position")
    if told.get("when") == "prefill":
        told.pop("when")
    acts += [f"{key.replace('_', ' ')} {number(value)}" for key, value in told.items()]
    return (f"{', '.join(head).replace('_', ' ')}: " if head else "") + " · ".join(acts).replace("+ ablated", "ablated")


def replies(rows: Iterable[Mapping[str, Any]], *, full: bool, series: bool = False, first: str = "") -> Replies | None:
    """Every judged reply of a run; None where there is none.

    Args:
        full: False keeps back what the model said, and leaves its verdict.
        series: the rows say of which study they are.
        first: the study whose replies are shown first.
    """
    prompts: dict[str, dict] = {}
    conditions: dict[tuple, int] = {}
    said: dict[tuple[int, int], tuple] = {}
    places: dict[str, int] = {}
    for row in rows:
        if "verdict" not in row or "prompt_id" not in row:
            continue
        told = condition(row, study=series)
        which = conditions.setdefault(told, len(conditions))
        key = str(row["prompt_id"])
        place = places.setdefault(key, len(places))
        if key not in prompts:
            about = {name: str(row.get(name) or "") for name in ("label", "category", "source")}
            prompts[key] = {"id": key, "prompt": str(row.get("prompt", "")), **about}
        score = row.get("score") if isinstance(row.get("score"), int | float) else None
        said.setdefault((place, which), (place, which, str(row.get("reply", "")) if full else None, row["verdict"], score))
    if not said:
        return None
    names, listed = list(conditions), list(said.values())
    shown = _shown(names, listed, first)
    kept = listed if len(listed) <= MOST else sorted(listed, key=lambda one: one[1] not in shown)[:MOST]
    notes = [] if len(kept) == len(listed) else [f"{len(kept):,} of {len(listed):,} replies are here; rows.jsonl has all of them."]
    notes += [] if full else ["What the model said is kept back on this page; its verdicts are shown."]
    return Replies("What the model said", list(prompts.values()), [called(told) for told in names], shown, kept, " ".join(notes))


def _shown(conditions: Sequence[tuple], said: Sequence[tuple], first: str) -> list[int]:
    """At most four to begin with: without steering, then those that the study's numbers are made of."""
    told = [dict(pairs) for pairs in conditions]
    here = [i for i, one in enumerate(told) if not first or one.get("study") in (None, first)] or list(range(len(told)))
    stages = [next((s for s in _FIRST if any(told[i].get("stage") == s for i in here)), None)]
    main = [i for i in here if told[i].get("stage") == stages[0]] if stages[0] else here
    prompts: dict[int, set[int]] = {}
    for place, which, *_ in said:
        prompts.setdefault(which, set()).add(place)
    asked = set().union(*(prompts.get(i, set()) for i in main)) if main else set()
    unsteered = [i for i in range(len(told)) if told[i].get("intervention", "none") == "none" and prompts.get(i, set()) & asked]
    best = max(unsteered, key=lambda i: len(prompts[i] & asked), default=None)
    drawn = [i for i in here if told[i].get("stage") == "control" and not told[i].get("draw")]
    chosen: list[int] = [*([best] if best is not None else []), *(i for i in main if i != best), *drawn]
    return list(dict.fromkeys(chosen))[:4]

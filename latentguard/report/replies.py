"""rows.jsonl → what was said to each prompt under each condition, to be read side by side. Knows no study and no HTML."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from latentguard.pages import Replies
from latentguard.report.wording import number

MOST = 20_000  # replies on one page
_ABOUT = ("prompt_id", "prompt", "label", "category", "source", "terminal", "set", "group", "poles", "dose", "judge")
_SAID = ("reply", "rule", "verdict", "score", "finish")
_NAMED = ("run", "study", "stage", "intervention", "layer", "coef", "position", "when", "draw")
# Where a study says the replies that its numbers are made of; the first that is there is shown first.
_LONGEST = 40  # characters of what tells conditions apart
_FIRST = ("reported", "test", "held_out", "suffix", "steering")


def condition(row: Mapping[str, Any], *, study: bool) -> tuple:
    """What was done when this was said, as pairs that two rows share or not; `study`: in a series its study belongs to it.

    A study's own columns count where they are short words or whole numbers: a measurement is no condition.
    """
    own = [key for key in sorted(row) if key not in (*_ABOUT, *_SAID) and isinstance(row[key], str | int) and len(str(row[key])) <= _LONGEST]
    keys = [key for key in (*_NAMED, *own) if key in row]
    if row.get("stage") == "roles":  # the same question in each study of a series, answered once
        keys = [key for key in keys if key != "study"]
    return tuple((key, row[key]) for key in dict.fromkeys(keys) if row[key] is not None and (study or key != "study") and not isinstance(row[key], list))


def called(pairs: Iterable[tuple[str, Any]]) -> str:
    """`reported: + harm · layer 12 · ×2`."""
    told = dict(pairs)
    head = [str(told.pop(key)) for key in ("run", "study", "stage") if key in told]
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
        first: the study, or of a sweep the run, whose replies are shown first.
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
        verdict = str(row["verdict"]) if full or len(str(row["verdict"])) <= _LONGEST else "kept back"
        said.setdefault((place, which), (place, which, str(row.get("reply", "")) if full else None, verdict, score))
    if not said:
        return None
    names, listed = list(conditions), list(said.values())
    shown = _shown(names, listed, first)
    notes = []
    if len(listed) > MOST:  # whole conditions are left out, so that what is counted in one is all of it
        counts = Counter(which for _, which, *_ in listed)
        left, here = MOST, []
        for which in [*shown, *(i for i in range(len(names)) if i not in shown)]:
            if counts[which] <= left or not here:
                here.append(which)
                left -= counts[which]
        notes = [f"{len(here)} of {len(names)} columns are here, {sum(counts[i] for i in here):,} of {len(listed):,} replies; rows.jsonl has all of them."]
        new = {old: i for i, old in enumerate(here)}
        names, shown = [names[i] for i in here], [new[i] for i in shown if i in new]
        listed = [(place, new[which], *rest) for place, which, *rest in listed if which in new]
    notes += [] if full else ["What the model said is kept back on this page; its verdicts are shown."]
    return Replies("What the model said", list(prompts.values()), [called(told) for told in names], shown, listed, " ".join(notes))


def _shown(conditions: Sequence[tuple], said: Sequence[tuple], first: str) -> list[int]:
    """At most four to begin with: without steering, then those that the study's numbers are made of."""
    told = [dict(pairs) for pairs in conditions]
    here = [i for i, one in enumerate(told) if not first or first in (one.get("run"), one.get("study"), None) or not {"run", "study"} & one.keys()] or list(
        range(len(told))
    )
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

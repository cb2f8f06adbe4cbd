"""Twins of the prompts that a guard is fitted on: the same request in another form, so that it reads what is asked and not how. Knows no probe.

Both labels are rewritten alike: a form says nothing of harm.
"""

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from latentguard.errors import InputError
from latentguard.perturbations import FAMILIES, Perturbation, in_context, perturbations
from latentguard.prompts import Prompt, digest
from latentguard.roles import dealt

if TYPE_CHECKING:
    from latentguard.backends import Backend

log = logging.getLogger(__name__)
_CONTEXT = re.compile(r"context_([1-9]\d{0,4})_(middle|first)")
FORMS = ("mark_exclamation", "typos_5%", "lower_case", "leetspeak", "polite", "quoted", "other_system", "second_turn", "context_200_middle")
_FILLER = 200  # harmless texts that contexts are made of


def check_forms(names: Sequence[str]) -> None:
    """Refuse what is neither a perturbation, a family of them, nor context_TOKENS_middle or context_TOKENS_first.

    Raises:
        InputError: naming it, and what there is.
    """
    plain = perturbations()
    families = sorted({one.family for one in plain})
    known = {one.name for one in plain} | set(families)
    if unknown := [name for name in names if name not in known and not _CONTEXT.fullmatch(name)]:
        raise InputError(
            f"forms={unknown}: name families ({', '.join(families)}), single ones ({', '.join(one.name for one in plain)}), or context_200_middle, context_200_first"
        )


def forms_of(backend: "Backend", prompts: Sequence[Prompt], names: Sequence[str], seed: int) -> list[Perturbation]:
    """The forms so named, each once; the words of contexts are drawn from the harmless ones among `prompts`. Of a family those are left out
    that nobody can read (`known_miss`).
    """
    found: dict[str, Perturbation] = {}
    filler: list[tuple[str, int]] = []
    for name in names:
        if match := _CONTEXT.fullmatch(name):
            if not filler:
                texts = dealt([p for p in prompts if p.label == "harmless"], seed)[:_FILLER]
                filler = [(p.instruction, len(r.user_tokens)) for p, r in zip(texts, backend.render(texts), strict=True)] if texts else []
            if filler:
                found[name] = in_context(filler, int(match[1]), match[2])
            else:
                log.warning("forms: no prompt is fitted on as %s (there is no plain harmless train prompt to make the context of)", name)
        else:
            found |= {one.name: one for one in perturbations() if one.name == name or (one.family == name in FAMILIES and not one.known_miss)}
    return list(found.values())


def twins(backend: "Backend", prompts: Sequence[Prompt], names: Sequence[str], seed: int) -> tuple[list[Prompt], list[int]]:
    """A twin of each prompt in one of the forms, drawn by a hash of its id, and the row of the prompt that each is a twin of. A form that
    the model's template cannot take is left out, and the log says so.
    """
    forms = [form for form in forms_of(backend, prompts, names, seed) if _taken(backend, form, prompts, seed)]
    made, rows = [], []
    for row, prompt in enumerate(prompts):
        form = forms[int(digest([seed, "form", prompt.id])[:8], 16) % len(forms)] if forms else None
        twin = form(prompt, seed) if form else prompt
        if twin is not prompt:
            made.append(twin)
            rows.append(row)
    return made, rows


def _taken(backend: "Backend", form: Perturbation, prompts: Sequence[Prompt], seed: int) -> bool:
    try:
        backend.render([form(prompts[0], seed)])
    except InputError as error:
        log.warning("forms: no prompt is fitted on as %s (%s)", form.name, error)
        return False
    return True

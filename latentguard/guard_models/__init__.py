"""Published guard models, and the model itself asked in words, behind one interface: prompts in, a score of harm out (docs/guard-models.md).

Knows no data set and no experiment. No guard model's weights can be had where this was written: all are `untested`.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from latentguard.errors import InputError
from latentguard.guard_models.cards import CARDS, Headed, Worded

if TYPE_CHECKING:
    import numpy as np

    from latentguard.guard_models.headed import HeadedGuard
    from latentguard.guard_models.worded import WordedGuard
    from latentguard.prompts import Prompt

NAMES = tuple(CARDS)


class Scorer(Protocol):
    """What scores prompts: a guard model or `asked.ZeroShot`.

    `status` is 'untested' where this adapter has never met the real weights; it stands beside every number. `threshold` is the model's own decision
    rule: flagged where the score is above it.
    """

    name: str
    tested: bool
    status: str
    threshold: float

    @property
    def parameters(self) -> int | None:
        """Weights that every token is multiplied with."""
        ...

    def score(self, prompts: "Sequence[Prompt]") -> "np.ndarray":
        """Harm of each prompt [prompt]; higher is worse."""
        ...

    def tokens(self, prompts: "Sequence[Prompt]") -> "np.ndarray":
        """Tokens read for each prompt [prompt]."""
        ...

    def flops(self, n_tokens: int) -> float:
        """Floating-point operations for so many tokens, approximately."""
        ...


def load(name: str, at: str | None = None, *, batch_size: int | str = "auto", **settings: Any) -> "WordedGuard | HeadedGuard":
    """A guard model by its name here.

    Args:
        at: a folder or Hub id of its weights, where it is not the published id.
        settings: fields of conf/model such as `dtype`, `device_map`, `quantization`, `revision`.

    Raises:
        InputError: an unknown name; weights that cannot be had, are gated, or are another model's; each with its way out.
    """
    from latentguard.weights import make_spec

    if name not in CARDS:
        raise InputError(f"guard model {name!r}: choose one of {', '.join(NAMES)}")
    card = CARDS[name]
    spec = make_spec({"template": "plain", **settings, "name": name, "id": at or card.id, "licence": card.licence, "gated": card.gated})
    try:
        return _made(card, spec, batch_size)
    except InputError as error:
        said = re.sub(r"\bmodel\.(\w+)", r"\1", str(error)).replace("id=/path/to/model", "at=/path/to/model")
        raise InputError(said if name in said else f"{name}: {said}") from error


def _made(card: Worded | Headed, spec: Any, batch_size: int | str) -> "WordedGuard | HeadedGuard":
    if isinstance(card, Worded):
        from latentguard.backends.loading import load as load_model
        from latentguard.guard_models.worded import WordedGuard

        return WordedGuard(card, load_model(spec, batch_size=batch_size))
    from latentguard.backends.classifiers import load_classifier
    from latentguard.guard_models.headed import HeadedGuard
    from latentguard.weights import spec_of

    return HeadedGuard(card, load_classifier(spec, card.labels, tokenizer=spec_of(card.tokenizer) if card.tokenizer else None))

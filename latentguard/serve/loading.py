"""Settings → a model with its guards, ready to score. Loads safetensors and JSON alone. Knows no HTTP; torch comes with `load`."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latentguard.errors import InputError
from latentguard.prompts import Prompt
from latentguard.serve.settings import HARMFUL, Settings

log = logging.getLogger(__name__)
PREFERRED = "fpr=0.01"
_A_PASS = (512, 16_384)  # tokens of a batch, whatever the backend would take


class Threshold(Protocol):
    """From which probability on a text is flagged."""

    @property
    def value(self) -> float:
        """Above 0, at most 1."""
        ...


class Guard(Protocol):
    """What the server asks of a `LatentGuard`."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def thresholds(self) -> Mapping[str, Threshold]:
        """By what they promise."""
        ...

    def score(self, prompts: Any) -> np.ndarray:
        """Calibrated probabilities, [prompt]."""
        ...


@dataclass(frozen=True)
class Served:
    """What answers.

    Args:
        guards: by category, `harmful` first.
        lengths: texts → their tokens, the template left out; may be asked from any thread.
        longest: tokens of a text at most, None where the model has no end.
        strips: the model's template takes blanks off both ends of a text.
        pass_tokens: what the backend runs in one pass.
        default: the threshold taken where a request names none.
        about: for /v1/models.
    """

    name: str
    guards: Mapping[str, Guard]
    lengths: Callable[[Sequence[str]], list[int]]
    default: str
    longest: int | None = None
    strips: bool = False
    pass_tokens: int = _A_PASS[0]
    about: Mapping[str, Any] = field(default_factory=dict)

    def score(self, prompts: list) -> np.ndarray:
        """Probabilities [prompt, category]: one call of each guard for all prompts."""
        return np.stack([np.asarray(guard.score(prompts), float) for guard in self.guards.values()], axis=-1)

    @property
    def thresholds(self) -> list[str]:
        """Names that every guard has."""
        return shared(self.guards)


def shared(guards: Mapping[str, Guard]) -> list[str]:
    """Threshold names that every guard has, in the first one's order."""
    first, *others = guards.values()
    return [name for name in first.thresholds if all(name in guard.thresholds for guard in others)]


def default_threshold(guards: Mapping[str, Guard], wanted: str | None) -> str:
    """The one asked for, else fpr=0.01, else the first.

    Raises:
        InputError: where the guards have no such threshold, or none in common.
    """
    names = shared(guards)
    if not names:
        raise InputError(f"the guards ({', '.join(guards)}) have no threshold in common, so nothing can be flagged: fit them with the same ones")
    if wanted is not None and wanted not in names:
        raise InputError(f"threshold={wanted}: choose one of {', '.join(names)}")
    return wanted or (PREFERRED if PREFERRED in names else names[0])


def load(settings: Settings) -> Served:
    """The model in memory, with its guards; torch's threads are set for the thread that calls, which is to score.

    Raises:
        InputError: for a model or guard that cannot be had, each with its way out.
    """
    import torch

    from latentguard.backends.loading import resident
    from latentguard.guards.guard import LatentGuard
    from latentguard.weights import spec_of

    if settings.threads != "auto":
        torch.set_num_threads(settings.threads)
    spec = spec_of(settings.model, **settings.model_settings)
    if spec.card:
        log.info("%s: %s", spec.name, spec.card)
    folders = {HARMFUL: settings.guard, **settings.categories}
    guards: dict[str, Any] = {name: LatentGuard.load(Path(folder).expanduser()) for name, folder in folders.items()}
    if settings.domain is not None:
        guards = {name: guard.within(settings.domain) for name, guard in guards.items()}
    default = default_threshold(guards, settings.threshold)
    backend = resident(spec)
    guards = {name: guard.on(backend) for name, guard in guards.items()}
    own = guards[HARMFUL]
    served = Served(
        name=settings.name or own.name or "latentguard",
        guards=guards,
        lengths=counter(backend.tokenizer),
        default=default,
        longest=_longest(backend, settings.tokens),
        strips=_strips(backend),
        pass_tokens=min(max(backend.budget.tokens, _A_PASS[0]), _A_PASS[1]),
        about={
            "model": spec.name,
            **({"domain": settings.domain} if settings.domain else {}),
            **{category: _about(guard) for category, guard in guards.items()},
        },
    )
    served.score(["Tell me what the weather will be like."])  # ready means that it has answered
    return served


def counter(tokenizer: Any) -> Callable[[Sequence[str]], list[int]]:
    """Texts → tokens, with a tokenizer of its own, for the model's thread is using the other."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    return lambda texts: [len(found.ids) for found in own.encode_batch(list(texts), add_special_tokens=False)]


def _longest(backend: Any, asked: int | str) -> int | None:
    limit = getattr(backend, "limit", None)
    around = len(backend.render([Prompt.of("a")])[0]) - 1
    room = limit - around - 1 if limit else None  # a guard may end the text with a mark of its own
    if isinstance(asked, int) and room is not None and asked > room:
        raise InputError(f"tokens={asked}: {backend.name} takes {limit}, of which its template needs {around}; give {room} or fewer")
    return asked if isinstance(asked, int) else room


def _strips(backend: Any) -> bool:
    """Whether the model's template takes blanks off a text's ends: then they are taken off here, for it would refuse to guess."""
    try:
        backend.render([Prompt.of(" a\n")])
    except InputError:
        return True
    return False


def _about(guard: Any) -> dict[str, Any]:
    known = {key: getattr(guard, key, None) for key in ("name", "model", "weights", "template", "layers", "positions", "terminal", "piece")}
    numbers = {name: {key: getattr(found, key) for key in ("value", "low", "high", "n") if hasattr(found, key)} for name, found in guard.thresholds.items()}
    return {**{key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}, "thresholds": numbers}

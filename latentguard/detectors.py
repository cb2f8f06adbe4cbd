"""Detectors: a prompt in, a score of harm out. Latent Guard, and what it must beat. Knows no experiment and no judge.

Every detector is fitted on harmful and harmless prompts and then scores others; a higher score is more harm. A detector
of hidden states takes them as read (`Activations`); the baselines see only the last token, or only the words.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.backends import Backend
from latentguard.directions import Activations
from latentguard.errors import InputError
from latentguard.metrics import auroc
from latentguard.prompts import Prompt

States = Float[Tensor, "prompt layer d_model"]


@dataclass(frozen=True, eq=False)
class Centroids:
    """Two centroids a layer at one position (arXiv 2507.11878, §3.2, §5).

    A prompt is harmful where its mean separation over `layers` is above `threshold`; the paper's rule averages all L + 1
    states, the embedding included, and its threshold is 0.

    Args:
        high: centroids of the harmful pole, [layer, d_model].
        low: centroids of the harmless pole.
        layers: indices of the states averaged; None is all.
    """

    high: Float[Tensor, "layer d_model"]
    low: Float[Tensor, "layer d_model"]
    position: str = "t_inst"
    threshold: float = 0.0
    layers: tuple[int, ...] | None = None

    @classmethod
    def fit(cls, states: Activations, high: Iterable[Prompt], low: Iterable[Prompt], *, position: str = "t_inst") -> "Centroids":
        """Centroids of two lists of prompts among `states`.

        Raises:
            InputError: where a list is empty or not all its states were read.
        """
        high, low = list(high), list(low)
        if not high or not low:
            raise InputError(f"Centroids needs prompts on both sides, got {len(high)} and {len(low)}")
        poles = [states.at(position, side).double().mean(0).float() for side in (high, low)]
        if not all(pole.isfinite().all() for pole in poles):
            raise InputError(f"states at {position} are not all finite: load the model in bfloat16 or float32")
        return cls(*poles, position=position)

    def separation(self, states: States) -> Float[Tensor, "prompt layer"]:
        """s^l(h) = cos(h, centroid harmful) − cos(h, centroid harmless), from −2 to 2, of every state (Eq. 2)."""
        sides = [torch.cosine_similarity(states.double(), pole.double(), dim=-1) for pole in (self.high, self.low)]
        return (sides[0] - sides[1]).float()

    def score(self, states: States) -> Float[Tensor, " prompt"]:
        """Δ: the mean separation over layers (Eqs. 3, 4)."""
        found = self.separation(states)
        return found.mean(-1) if self.layers is None else found[:, list(self.layers)].mean(-1)

    def at_layer(self, layer: int) -> "Centroids":
        """The same centroids, one state."""
        return replace(self, layers=(layer,))


@dataclass(frozen=True, eq=False)
class Projection:
    """Projection on the difference of means at one layer, centred between the poles."""

    vector: Float[Tensor, " d_model"]
    middle: float
    layer: int

    @classmethod
    def fit(cls, guard: Centroids, layer: int) -> "Projection":
        """From the centroids of a guard."""
        difference = guard.high[layer] - guard.low[layer]
        unit = difference / difference.norm().clamp_min(1e-12)
        return cls(unit, float((guard.high[layer] + guard.low[layer]) @ unit) / 2, layer)

    def score(self, states: States) -> Float[Tensor, " prompt"]:
        """In the states' own units; 0 half-way between the poles."""
        return states[:, self.layer] @ self.vector - self.middle


@dataclass(frozen=True)
class Counted:
    """Naive Bayes over whatever a prompt is made of: the log-odds of harm, with Laplace smoothing and a flat prior.

    With one item a prompt (its last token) it is the last-token classifier; with words and word pairs the n-gram one.
    Both are what a detector of hidden states has to beat (arXiv 2509.03888).
    """

    log_odds: dict[object, float]

    @classmethod
    def fit(cls, high: Sequence[Sequence[object]], low: Sequence[Sequence[object]]) -> "Counted":
        """From the items of harmful and of harmless prompts."""
        counts = [Counter(item for items in side for item in items) for side in (high, low)]
        known = set(counts[0]) | set(counts[1])
        sizes = [sum(count.values()) + len(known) + 1 for count in counts]
        return cls({item: math.log((counts[0][item] + 1) / sizes[0]) - math.log((counts[1][item] + 1) / sizes[1]) for item in known})

    def score(self, prompts: Sequence[Sequence[object]]) -> list[float]:
        """Mean log-odds of a prompt's items; an item never seen in training says nothing."""
        return [sum(self.log_odds.get(item, 0.0) for item in items) / max(1, len(items)) for items in prompts]


def best_layer(guard: Centroids, high: States, low: States) -> int:
    """The state by which a guard tells two lots of validation prompts apart best (AUROC); the middle one among equals, and
    where a lot is empty.
    """
    middle = guard.high.shape[0] // 2
    if not len(high) or not len(low):
        return middle
    s = [guard.separation(side).numpy() for side in (high, low)]
    areas = [auroc(s[0][:, i], s[1][:, i]).value for i in range(guard.high.shape[0])]
    return min((i for i, area in enumerate(areas) if area >= max(areas) - 1e-9), key=lambda i: abs(i - middle))


def last_tokens(backend: Backend, prompts: Sequence[Prompt]) -> list[list[object]]:
    """The id of each instruction's last token: what the embedding layer knows at t_inst."""
    return [[rendered.ids[rendered.user_tokens[-1]]] for rendered in backend.render(list(prompts))]


def ngrams(text: str) -> list[object]:
    """Words and pairs of neighbouring words, lower case, marks as words of their own."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return [*words, *zip(words, words[1:], strict=False)]

"""What a guard is compared with: the paper's rule, the refusal direction, the first token, the model asked in words, what reads the text
alone, guard models of others. Each is fitted on the train split alone. Knows no study and no test prompt.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from latentguard import families
from latentguard.backends import Backend
from latentguard.behaviour import Cells, RefusalLogOdds
from latentguard.datasets import Dataset
from latentguard.detectors import Centroids, Counted, Projection, last_tokens, ngrams
from latentguard.errors import InputError
from latentguard.guard_models.asked import ZeroShot
from latentguard.guards.baselines import baseline_scores
from latentguard.guards.guard import LatentGuard
from latentguard.guards.marks import seen
from latentguard.guards.probes import PaperRule
from latentguard.judges import Judge
from latentguard.metrics import auroc
from latentguard.prompts import Prompt
from latentguard.roles import Cast, Casting
from latentguard.trackers import Tracker

RIVALS = ("latent_guard_paper", "refusal_projection", "refusal_log_odds", "zero_shot", "last_token", "ngram", "tfidf", "length")
ASK = ("refusal_projection", "refusal_log_odds")  # those that need to know what the model refuses
_BLOCK = 512  # prompts whose states are held at a time


@dataclass(frozen=True, eq=False)
class Rival:
    """Something that scores prompts.

    Attributes:
        score: (backend, prompts) → [prompt], higher is more harm. The backend is given, so that it can be timed without a store.
        flops: (backend, prompts) → [prompt], see `flops`; NaN where the model's shapes are not to be had.
        own: the threshold that it comes with: flagged where the score is above it; None where it has none.
        timed: whether `score` does what it would in use; False where it fits anew each time.
        tested: False for a guard model whose adapter has never met its real weights.
        about: how it came about, in a few words.
    """

    name: str
    score: Callable[[Backend, Sequence[Prompt]], np.ndarray]
    flops: Callable[[Backend, Sequence[Prompt]], np.ndarray]
    own: float | None = None
    tested: bool = True
    timed: bool = True
    about: str = ""


def flops(backend: Backend, prompts: Sequence[Prompt], layer: int | None = None, *, tokens: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """Floating-point operations a prompt: 2 × (weights of the blocks below `layer`) × (tokens of the prompt as rendered).

    A multiplication and an addition for each weight and token; `layer` is the deepest state read, None all blocks. Left out: attention's own
    products, norms, the embedding (a look-up), the output matrix (for one token a prompt), and that shared text is run once. Every expert of a
    mixture counts.
    """
    weights = _weights(backend)
    lengths = np.array([len(item) for item in backend.render(list(prompts))] if tokens is None else tokens, float)
    return np.full(len(lengths), np.nan) if weights is None else 2.0 * sum(weights[:layer]) * lengths


def inmost(backend: Backend) -> Backend:
    """The backend that computes, without a store around it."""
    return getattr(backend, "inner", backend)


def of_guard(guard: LatentGuard, own: str) -> Rival:
    """A guard, scored as it is deployed: by its probabilities; `own` names the threshold that it comes with, where it has it."""
    at = float(np.nextafter(guard.thresholds[own].value, -np.inf)) if own in guard.thresholds else None  # a guard flags at its threshold, too
    told = f"{guard.method}, layers {', '.join(map(str, guard.layers))}, {', '.join(guard.positions)}, marks: {guard.terminal}"
    return Rival(
        "latent_guard",
        lambda backend, prompts: _in_blocks(prompts, guard.on(backend).score),
        lambda backend, prompts: _flops_of(guard, backend, prompts),
        at,
        about=told,
    )


def _flops_of(guard: LatentGuard, backend: Backend, prompts: Sequence[Prompt]) -> np.ndarray:
    """Those of a guard, a long prompt's being the sum of its pieces'."""
    passed, rows = guard.on(backend).passed(prompts)
    return np.bincount(rows, flops(backend, passed, guard.layers[-1]), len(prompts))


def of_model(name: str, at: str | None = None) -> Rival:
    """A published guard model. One that judges single requests is given the last user turn alone.

    Raises:
        InputError: for weights that cannot be had.
    """
    from latentguard.guard_models import load

    model = load(name, at)

    def shown(prompts: Sequence[Prompt]) -> list[Prompt]:
        whole = getattr(model.card, "conversation", False)
        return [p if whole or len(p.messages) == 1 else replace(p, messages=p.messages[-1:]) for p in prompts]

    return Rival(
        name,
        lambda _, prompts: model.score(shown(prompts)),
        lambda _, prompts: model.flops(1) * model.tokens(shown(prompts)).astype(float),
        model.threshold,
        model.tested,
        about=f"{model.card.id}, adapter {model.status}; it judges {model.card.judges}",
    )


def there(models: Mapping[str, str | None]) -> None:
    """Refuse guard models whose weights cannot be had, before anything runs; those on the Hub are fetched.

    Raises:
        InputError: naming the guard model and what is missing.
    """
    from latentguard.guard_models.cards import CARDS
    from latentguard.weights import locate, make_spec

    for name, at in models.items():
        card = CARDS[name]
        try:
            locate(make_spec({"template": "plain", "name": name, "id": at or card.id, "licence": card.licence, "gated": card.gated}))
        except InputError as error:
            said = re.sub(r"\bmodel\.id=(\S+?)(?=[:,;\s]|$)", rf"exp.guard_models=[{name}:\1]", str(error))
            raise InputError(f"guard model {name}: {said}") from error


class Rivals:
    """Makes rivals by name, fitted on a data set's train split; what several need is made once.

    Args:
        casting: who is asked for what the model refuses; None takes harmful and harmless by label, and the usual first words of refusals.
        wording: how the model is asked whether a request is harmful; None where it is not.

    Raises:
        InputError: for a model that cannot be asked so.
    """

    def __init__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker, *, casting: Casting | None, wording: str | None = "plain") -> None:
        self.backend, self.data, self.judge, self.tracker = backend, data, judge, tracker
        self.casting, self.asked = casting, ZeroShot(backend, wording) if wording is not None else None
        self.sides = [[p for p in data.train if bool(p.harmful) is side] for side in (True, False)]

    def make(self, name: str) -> Rival:
        """One of `RIVALS`."""
        return getattr(self, f"_{name}")()

    @cached_property
    def cast(self) -> Cast | None:
        """The poles and every judged reply; None where the model is not asked."""
        return self.casting(self.backend, self.data, self.judge, self.tracker, only_poles=True) if self.casting else None

    @property
    def poles(self) -> str:
        """Where the refusal direction comes from."""
        return self.cast.poles if self.cast else "label"

    def _latent_guard_paper(self) -> Rival:
        """The paper's rule on labelled poles: t_inst, all layers, threshold 0."""
        poles = []
        for side in self.sides:
            parts = [part.double().sum(0) for part in _states(self.backend, seen(side, "period"), "all", "t_inst")]
            poles.append((torch.stack(parts).sum(0) / len(side)).float()[:, None])
        rule = PaperRule(*poles)

        def score(backend: Backend, prompts: Sequence[Prompt]) -> np.ndarray:
            found = [rule.raw(part[:, :, None]) for part in _states(backend, seen(prompts, "period"), "all", "t_inst")]
            return torch.cat(found).numpy()

        return Rival(
            "latent_guard_paper", score, lambda backend, prompts: flops(backend, seen(prompts, "period")), 0.0, about="t_inst, all layers, threshold 0"
        )

    def _refusal_projection(self) -> Rival:
        """Projection on refused − accepted train prompts at t_post_inst, at the layer that validation prompts choose."""
        high, low = (list(self.cast.high), list(self.cast.low)) if self.cast else self.sides
        place, backend = "t_post_inst", self.backend
        poles = [torch.cat(list(_states(backend, side, "all", place))).double().mean(0).float() for side in (high, low)]
        centroids = Centroids(*poles, position=place)
        every = [Projection.fit(centroids, layer) for layer in range(1, backend.n_layers + 1)]  # 0 is the token alone, the same in every prompt
        states = torch.cat(list(_states(backend, list(self.data.validation), "all", place)))
        y = np.array([bool(p.harmful) for p in self.data.validation])
        areas = [auroc(found[y], found[~y]).value for found in (one.score(states).numpy() for one in every)]
        best = every[int(np.argmax(areas))]

        def score(backend: Backend, prompts: Sequence[Prompt]) -> np.ndarray:
            found = [part[:, 0] @ best.vector - best.middle for part in _states(backend, prompts, [best.layer], place)]
            return torch.cat(found).double().numpy()

        told = f"{place}, layer {best.layer} (by validation), {len(high)} + {len(low)} train prompts by {self.poles}"
        return Rival("refusal_projection", score, lambda backend, prompts: flops(backend, prompts, best.layer), 0.0, about=told)

    def _refusal_log_odds(self) -> Rival:
        """Log-odds that the reply opens with a token by which this model refuses."""
        tokens = (self.cast.cells() if self.cast else Cells(())).refusal_tokens(self.backend)
        reduce = RefusalLogOdds(frozenset(tokens))
        return Rival(
            "refusal_log_odds",
            lambda backend, prompts: np.array(backend.logits(list(prompts), position="t_post_inst", reduce=reduce), float),
            lambda backend, prompts: flops(backend, prompts),
            0.0,
            about=f"{len(tokens)} first tokens",
        )

    def _zero_shot(self) -> Rival:
        """The model asked in words."""
        asked = self.asked or ZeroShot(self.backend)
        return Rival(
            "zero_shot",
            lambda backend, prompts: ZeroShot(backend, asked.wording).score(prompts),
            lambda backend, prompts: flops(backend, prompts, tokens=asked.tokens(prompts)),
            asked.threshold,
            about=f"asked in words: {asked.name}",
        )

    def _last_token(self) -> Rival:
        fitted = Counted.fit(*(last_tokens(self.backend, seen(side, "period")) for side in self.sides))
        return Rival("last_token", lambda backend, prompts: np.array(fitted.score(last_tokens(backend, seen(prompts, "period")))), _none, 0.0)

    def _ngram(self) -> Rival:
        fitted = Counted.fit(*([ngrams(p.instruction) for p in seen(side, "period")] for side in self.sides))
        return Rival("ngram", lambda _, prompts: np.array(fitted.score([ngrams(p.instruction) for p in seen(prompts, "period")])), _none, 0.0)

    def _tfidf(self) -> Rival:
        """The n-grams weighed, under a logistic regression."""
        train = seen(self.data.train, "period")
        return Rival("tfidf", lambda backend, prompts: baseline_scores(backend, train, seen(prompts, "period"))["tfidf"], _none, 0.0, timed=False)

    def _length(self) -> Rival:
        high, low = (float(np.mean([_words(p) for p in side])) for side in self.sides)
        sign = 1.0 if high >= low else -1.0
        return Rival(
            "length", lambda _, prompts: sign * np.array([_words(p) for p in prompts], float), _none, about="more words" if sign > 0 else "fewer words"
        )


def _words(prompt: Prompt) -> int:
    return len(prompt.instruction.split())


def _none(_: Backend, prompts: Sequence[Prompt]) -> np.ndarray:
    """No weight of the model is used."""
    return np.zeros(len(prompts))


def _weights(backend: Backend) -> list[int] | None:
    """Weights of each block; None where they are elsewhere, or shared out over processes."""
    local: Any = inmost(backend)
    if getattr(getattr(local, "team", None), "size", 1) > 1 or (hf := getattr(local, "hf", None)) is None:
        return None
    blocks: Any = hf.get_submodule(families.blocks_path(hf))
    return [sum(p.numel() for p in block.parameters()) for block in blocks]


def _states(backend: Backend, prompts: Sequence[Prompt], layers: Any, position: str) -> Iterator[torch.Tensor]:
    """States [prompt, layer, d_model] at one position, a block of prompts at a time."""
    for at in range(0, len(prompts), _BLOCK):
        yield backend.read(list(prompts[at : at + _BLOCK]), layers, [position]).values[:, :, 0]


def _in_blocks(prompts: Sequence[Prompt], score: Callable[[Sequence[Prompt]], np.ndarray]) -> np.ndarray:
    return np.concatenate([score(prompts[at : at + _BLOCK]) for at in range(0, len(prompts), _BLOCK)])

"""Guard models that answer in words: one forward pass a prompt (and policy), nothing generated. Knows no data set and no experiment."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from latentguard.backends.local import Local
from latentguard.errors import InputError
from latentguard.guard_models.cards import Worded
from latentguard.guard_models.frames import Frame, like, next_token
from latentguard.prompts import Prompt, as_prompts


@dataclass(frozen=True)
class Verdict:
    """P(harmful words) of a prompt, among all words or among the harmful and the harmless ones."""

    harmful: tuple[int, ...]
    harmless: tuple[int, ...]
    alone: bool

    def __call__(self, _: int, logprobs: Tensor) -> float:
        """Of log-probabilities [1, vocab] where the verdict comes next."""
        chances = logprobs[-1].double().exp()
        bad, good = (float(chances[list(ids)].sum()) for ids in (self.harmful, self.harmless))
        return bad if self.alone else bad / max(bad + good, 1e-300)


class WordedGuard:
    """A guard model that answers in words, as a scorer of prompts.

    Args:
        backend: the guard model itself; its own template does not matter.
    """

    def __init__(self, card: Worded, backend: Local) -> None:
        self.card, self.name, self.threshold = card, card.name, card.threshold
        self.tested, self.status = card.tested, card.status
        tokenizer = backend.tokenizer
        self.framed = [_framed(backend, Frame.of(tokenizer, card, policy)) for policy in card.policies or (None,)]
        if card.any_case:
            harmful, harmless = like(tokenizer, card.harmful), like(tokenizer, card.harmless)
        else:
            harmful, harmless = ([next_token(tokenizer, card.lead, word)] for word in (card.harmful, card.harmless))
        if not harmful or not harmless or set(harmful) & set(harmless):
            raise InputError(f"{card.name}: no token of its tokenizer tells {card.harmful!r} from {card.harmless!r}; give the folder or id of {card.id}")
        self.verdict = Verdict(tuple(harmful), tuple(harmless), card.alone)

    @property
    def parameters(self) -> int:
        """Weights that every token is multiplied with: all but the embedding and the output matrix."""
        hf = self.framed[0].passes.hf
        ends = {id(part.weight): part.weight.numel() for part in (hf.get_input_embeddings(), hf.get_output_embeddings()) if part is not None}
        return sum(p.numel() for p in hf.parameters()) - sum(ends.values())

    def flops(self, n_tokens: int) -> float:
        """2 × weights × tokens: without attention's own products and the output matrix, nothing shared between prompts."""
        return 2.0 * self.parameters * n_tokens

    def tokens(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Tokens read for each prompt [prompt], over all policies."""
        listed = as_prompts(prompts)
        return np.sum([[len(item) for item in backend.render(listed)] for backend in self.framed], 0).astype(int)

    def score(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Probability of harm [prompt], in the order given; the worst policy's where there are several.

        Raises:
            InputError: a prompt too long for the model, or with turns it does not judge.
        """
        listed = as_prompts(prompts)
        found = np.array([backend.logits(listed, position="t_post_inst", reduce=self.verdict) for backend in self.framed], float)
        if not np.isfinite(found).all():
            raise InputError(f"{self.name} gives no finite score: load it with dtype=bfloat16 or float32")
        return found.max(0)


def _framed(backend: Local, frame: Frame) -> Local:
    """The same model, rendering by a frame."""
    made = copy.copy(backend)
    made.template = frame
    return made

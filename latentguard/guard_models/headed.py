"""Guard models with a head over labels: the prompt as it stands, no template. Knows no data set and no experiment."""

from collections.abc import Sequence

import numpy as np

from latentguard.backends.classifiers import Classifier
from latentguard.errors import InputError
from latentguard.guard_models.cards import Headed
from latentguard.prompts import Prompt, as_prompts


class HeadedGuard:
    """A classifier as a scorer of prompts."""

    def __init__(self, card: Headed, classifier: Classifier) -> None:
        if classifier.labels != card.labels:
            raise InputError(f"{classifier.name} tells {classifier.labels} labels apart and {card.name} {card.labels}: give the folder or id of {card.id}")
        self.card, self.name, self.threshold = card, card.name, card.threshold
        self.tested, self.status = card.tested, card.status
        self.classifier = classifier
        self.window = min(card.window, classifier.limit or card.window)

    @property
    def parameters(self) -> int:
        """Weights that every token is multiplied with: all but embeddings."""
        return self.classifier.parameters

    def flops(self, n_tokens: int) -> float:
        """2 × weights × tokens, without attention's own products."""
        return 2.0 * self.parameters * n_tokens

    def tokens(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Tokens read for each prompt [prompt], over all pieces."""
        return np.array([sum(len(piece) for piece in self._pieces(prompt)) for prompt in as_prompts(prompts)], int)

    def score(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Probability of harm [prompt], in the order given; the worst piece's where a prompt is cut into several.

        Raises:
            InputError: a prompt too long for a model that reads prompts whole, or of several turns.
        """
        pieces = [self._pieces(prompt) for prompt in as_prompts(prompts)]
        logits = self.classifier.logits([piece for mine in pieces for piece in mine]).double()
        chances = (logits.sigmoid().amax(-1) if self.card.of is None else logits.softmax(-1)[:, self.card.of]).numpy()
        if not np.isfinite(chances).all():
            raise InputError(f"{self.name} gives no finite score: load it with dtype=bfloat16 or float32")
        ends = np.cumsum([0, *(len(mine) for mine in pieces)])
        return np.array([chances[a:b].max() for a, b in zip(ends[:-1], ends[1:], strict=True)], float)

    def _pieces(self, prompt: Prompt) -> list[list[int]]:
        """Token ids of the prompt, in windows that the model takes; cut between tokens, each with the model's own added ones."""
        if len(prompt.messages) > 1:
            raise InputError(f"prompt {prompt.id} has {len(prompt.messages)} messages: {self.name} judges one request; give it the last user turn alone")
        text, pieces = prompt.instruction, []
        while True:
            ids, offsets = self.classifier.encode(text)
            if len(ids) <= self.window:
                return [*pieces, ids]
            if not self.card.pieces:
                raise InputError(f"prompt {prompt.id}: {len(ids)} tokens, but {self.name} takes at most {self.window}; shorten it")
            ends = [b for a, b in offsets if b > a]
            end = ends[self.window - (len(ids) - len(ends)) - 1]
            while len(head := self.classifier.encode(text[:end])[0]) > self.window:  # the end of a text may be cut otherwise
                end = ends[ends.index(end) - 1]
            pieces.append(head)
            text = text[end:]

"""What the last token alone and the words alone achieve on a guard's data: what it must beat to be worth a model. Knows no probe."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from latentguard.detectors import Counted, last_tokens, ngrams
from latentguard.metrics import Value, auroc
from latentguard.prompts import Prompt

if TYPE_CHECKING:
    from latentguard.backends import Backend


class Baselines:
    """What reads the text of prompts alone, fitted on some of them and scoring others: the last token's id and words with pairs of words
    (naive Bayes, both sides alike), the same words weighed by TF-IDF under a logistic regression, and the number of words.
    """

    def __init__(self, backend: "Backend", prompts: Sequence[Prompt]) -> None:
        self.harmful = np.array([bool(p.harmful) for p in prompts])
        self.texts = np.array([p.instruction for p in prompts], dtype=object)
        self.last, self.words = last_tokens(backend, prompts), [ngrams(p.instruction) for p in prompts]
        self.sizes = np.array([float(len(p.instruction.split())) for p in prompts])

    def scores(self, fitted: np.ndarray, scored: np.ndarray) -> dict[str, np.ndarray]:
        """Scores [prompt] of harm of the prompts of `scored`, by what was fitted on those of `fitted` (masks over all prompts), each set
        so that the prompts it was fitted on have mean 0 and deviation 1 on either side's average: scores of several fits can be pooled.
        """
        found = {name: self._counted(items, fitted) for name, items in (("last_token", self.last), ("ngram", self.words))}
        found["tfidf"] = self._weighed(fitted)
        y = self.harmful
        sign = 1.0 if self.sizes[fitted & y].mean() >= self.sizes[fitted & ~y].mean() else -1.0
        found["length"] = sign * self.sizes
        return {name: standard(every, fitted, y)[scored] for name, every in found.items()}

    def _counted(self, items: list, fitted: np.ndarray) -> np.ndarray:
        sides = ([items[i] for i in np.flatnonzero(fitted & side)] for side in (self.harmful, ~self.harmful))
        return np.array(Counted.fit(*sides).score(items))

    def _weighed(self, fitted: np.ndarray) -> np.ndarray:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        words = TfidfVectorizer(analyzer=_items, sublinear_tf=True)  # pyright: ignore[reportArgumentType]
        x = words.fit_transform(self.texts[fitted])
        model = LogisticRegression(C=10.0, max_iter=300, class_weight="balanced").fit(x, self.harmful[fitted])
        return np.asarray(model.decision_function(words.transform(self.texts)))


def standard(scores: np.ndarray, fitted: np.ndarray, harmful: np.ndarray) -> np.ndarray:
    """Scores without their unit: 0 half-way between the means of the two sides that were fitted on, 1 their mean deviation."""
    high, low = scores[fitted & harmful], scores[fitted & ~harmful]
    return (scores - (high.mean() + low.mean()) / 2) / ((high.std() + low.std()) / 2 or 1.0)


def baseline_scores(backend: "Backend", train: Sequence[Prompt], scored: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """Scores [prompt] of harm by each baseline, fitted on `train`."""
    fitted = np.arange(len(train) + len(scored)) < len(train)
    return Baselines(backend, [*train, *scored]).scores(fitted, ~fitted)


def _items(text: str) -> list[str]:
    return [item if isinstance(item, str) else " ".join(item) for item in ngrams(text)]  # type: ignore[arg-type]


def warnings_of(guard: Value, baselines: dict[str, Value]) -> list[str]:
    """A sentence for each baseline that explains the two sides about as well as the guard."""
    told = {"last_token": "the last token alone", "ngram": "word n-grams alone", "tfidf": "weighed word n-grams alone", "length": "the number of words alone"}
    return [
        f"{told[name]} reaches AUROC {found.value:.3f} where the guard reaches {guard.value:.3f}: on these data the guard may read no more than that; "
        "look at its numbers on sets it was not fitted on"
        for name, found in baselines.items()
        if found.high >= guard.low
    ]


def areas(scores: dict[str, np.ndarray], harmful: np.ndarray) -> dict[str, Value]:
    """AUROC of each."""
    return {name: auroc(found[harmful], found[~harmful]) for name, found in scores.items()}

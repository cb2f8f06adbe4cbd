"""What the last token alone and the words alone achieve on a guard's data: what it must beat to be worth a model. Knows no probe."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from latentguard.detectors import Counted, last_tokens, ngrams
from latentguard.metrics import Value, auroc
from latentguard.prompts import Prompt

if TYPE_CHECKING:
    from latentguard.backends import Backend

BASELINES = ("last_token", "ngram", "tfidf", "length")


def baseline_scores(backend: "Backend", train: Sequence[Prompt], scored: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """Scores [prompt] of harm by each baseline, fitted on `train`: the last token's id and words with pairs of words (naive Bayes, both
    sides alike), the same words weighed by TF-IDF under a logistic regression, and the number of words.
    """
    high, low = ([p for p in train if bool(p.harmful) is side] for side in (True, False))
    last = Counted.fit(last_tokens(backend, high), last_tokens(backend, low))
    words = Counted.fit([ngrams(p.instruction) for p in high], [ngrams(p.instruction) for p in low])
    sizes = [np.mean([len(p.instruction.split()) for p in side]) if side else 0.0 for side in (high, low)]
    sign = 1.0 if sizes[0] >= sizes[1] else -1.0
    return {
        "last_token": np.array(last.score(last_tokens(backend, scored))),
        "ngram": np.array(words.score([ngrams(p.instruction) for p in scored])),
        "tfidf": _weighed_words(train, scored),
        "length": sign * np.array([float(len(p.instruction.split())) for p in scored]),
    }


def _weighed_words(train: Sequence[Prompt], scored: Sequence[Prompt]) -> np.ndarray:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(analyzer=_items, sublinear_tf=True)
    x = words.fit_transform([p.instruction for p in train])
    model = LogisticRegression(C=10.0, max_iter=300, class_weight="balanced").fit(x, [bool(p.harmful) for p in train])
    return np.asarray(model.decision_function(words.transform([p.instruction for p in scored])))


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

"""Will a prompt be refused: predictors from labels, words and states, each scoring only prompts of parts it never saw. Knows no model and no study.

A part is what is left out together: a family of data sets, or one lot of groups. Places (layer, position) are chosen, and probabilities fitted
(Platt), on scores that the other parts' prompts get from one another; nothing about a part's own verdicts reaches its forecasts.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm.auto import tqdm

from latentguard.detectors import Centroids
from latentguard.directions import Activations
from latentguard.guards.calibration import calibration_error, platt
from latentguard.guards.probes import fit_probe
from latentguard.metrics import Value, auroc, mean, rate, resampled_wins, wins
from latentguard.prompts import Prompt, digest

Row = dict[str, Any]
Mask = np.ndarray
alone = threadpool_limits.wrap(limits=1)  # sums so small that threads only wait for one another: 25 times as long on a busy machine
_ENOUGH = 150  # prompts for an ECE: ten a bin
_BLOCK = 500  # texts compared with all others at a time


class Predictor(Protocol):
    """Fitted on some prompts, scores others."""

    @property
    def raw(self) -> bool:
        """Whether its scores have no unit, and need a curve to be probabilities."""
        ...

    def __call__(self, fitted: Mask, scored: Mask, refused: Mask) -> np.ndarray:
        """Scores of the prompts of `scored`, higher is likelier refused, by what was fitted on those of `fitted`; masks over all prompts."""
        ...


@dataclass(frozen=True, eq=False)
class Rates:
    """The share of refusals among fitted prompts of the same key, with one prompt's weight on the overall share: what an unknown key gets.

    Args:
        keys: [prompt]; one key for all is the majority class.
    """

    keys: Sequence[str]
    raw: bool = False

    def __call__(self, fitted: Mask, scored: Mask, refused: Mask) -> np.ndarray:
        """Probabilities."""
        share = float(refused[fitted].mean())
        keys = np.asarray(self.keys, dtype=object)
        seen, hits = Counter(keys[fitted]), Counter(keys[fitted & refused])
        return np.array([(hits[key] + share) / (seen[key] + 1) for key in keys[scored]])


@dataclass(frozen=True, eq=False)
class Words:
    """Logistic regression on words, pairs and triples weighed by TF-IDF, as arXiv 2306.03423 has it (1-3-grams, C = 10, L2, liblinear)."""

    texts: Sequence[str]
    raw: bool = True

    def __call__(self, fitted: Mask, scored: Mask, refused: Mask) -> np.ndarray:
        """Log-odds."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        texts, words = np.asarray(self.texts, dtype=object), TfidfVectorizer(ngram_range=(1, 3))
        model = LogisticRegression(C=10, solver="liblinear", max_iter=10_000, random_state=0).fit(words.fit_transform(texts[fitted]), refused[fitted])
        return np.asarray(model.decision_function(words.transform(texts[scored])))


@dataclass(frozen=True, eq=False)
class Delta:
    """Δ of arXiv 2507.11878 (Eqs. 2-4) at one position: cosine to the mean of refused harmful prompts less that to accepted plain harmless ones, mean over layers."""

    states: Activations
    position: str
    raw: bool = True

    def __call__(self, fitted: Mask, scored: Mask, refused: Mask) -> np.ndarray:
        """From -2 to 2."""
        prompts = self.states.prompts
        high, low = ([prompts[i] for i in np.flatnonzero(fitted & side)] for side in sides(prompts, refused))
        guard = Centroids.fit(self.states, high, low, position=self.position)
        return guard.score(self.states.at(self.position)[torch.from_numpy(scored)]).double().numpy()


@dataclass(frozen=True, eq=False)
class LogisticProbe:
    """Logistic regression on states [prompt, d_model] of one layer and position."""

    states: Tensor
    raw: bool = True

    def __call__(self, fitted: Mask, scored: Mask, refused: Mask) -> np.ndarray:
        """Log-odds."""
        known, asked = (self.states[torch.from_numpy(rows)][:, None, None] for rows in (fitted, scored))
        return fit_probe("logistic", known, torch.from_numpy(refused[fitted])).raw(asked).numpy()


@dataclass(frozen=True, eq=False)
class Given:
    """Scores [prompt] that nothing is fitted for, higher is likelier refused."""

    scores: np.ndarray
    raw: bool = True

    def __call__(self, fitted: Mask, scored: Mask, refused: Mask) -> np.ndarray:
        """As given."""
        return self.scores[scored]


def sides(prompts: Sequence[Prompt], refused: Mask) -> tuple[Mask, Mask]:
    """The two poles of a Δ as masks: refused harmful prompts, accepted plain harmless ones."""
    labels = np.array([p.label for p in prompts])
    return refused & (labels == "harmful"), ~refused & (labels == "harmless")


@dataclass(frozen=True, eq=False)
class Foretold:
    """What a predictor says of every prompt, by what never saw its part.

    Attributes:
        probability: of refusal, [prompt].
        evidence: log-odds less those of the share that it was fitted on. Prompts of several parts are ranked by it: without the part that refuses
            most, fewer are refused among the rest, so that probabilities alone would rank even a constant below chance.
        chosen: which candidate, by part.
    """

    probability: np.ndarray
    evidence: np.ndarray
    chosen: dict[str, str]


@dataclass(frozen=True, eq=False)
class Crossed:
    """Forecasts by candidate, and how well each ranked the other parts' prompts when they were scored by one another: by part, by candidate."""

    found: dict[str, Foretold]
    criterion: dict[str, dict[str, float]]
    parts: np.ndarray

    def best(self, names: Sequence[str]) -> Foretold:
        """Each part by the candidate that was best on the other parts; of several the first."""
        chosen = {part: max(names, key=lambda name, seen=seen: seen[name]) for part, seen in self.criterion.items()}
        probability, evidence = (np.zeros(len(self.parts)) for _ in range(2))
        for part, name in chosen.items():
            here = self.parts == part
            probability[here], evidence[here] = self.found[name].probability[here], self.found[name].evidence[here]
        return Foretold(probability, evidence, chosen)


@alone
def crossed(candidates: Mapping[str, Predictor], refused: Mask, parts: np.ndarray, groups: np.ndarray, folds: int = 3) -> Crossed:
    """Every prompt's forecast by each candidate, fitted on the prompts of all other parts.

    Args:
        parts: what is left out together, [prompt].
        groups: finer than parts, [prompt]: what the rest is dealt by into `folds` where it is of one part alone.
        folds: in how many lots the other parts score one another.
    """
    found = {name: Foretold(np.zeros(len(refused)), np.zeros(len(refused)), {}) for name in candidates}
    criterion: dict[str, dict[str, float]] = {}
    for part in tqdm(list(map(str, dict.fromkeys(parts))), desc="parts left out", leave=False, delay=2):
        here = parts == part
        inner = lots(refused, parts, groups, ~here, folds)
        criterion[part] = {}
        for name, predictor in candidates.items():
            probability, evidence, area = _one(predictor, refused, here, inner)
            found[name].probability[here], found[name].evidence[here], criterion[part][name] = probability, evidence, area
    return Crossed(found, criterion, parts)


def _one(predictor: Predictor, refused: Mask, here: Mask, inner: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Probabilities and evidence of the prompts of `here`, and AUROC among the others."""
    from sklearn.metrics import roc_auc_score

    def scores(fitted: Mask, scored: Mask) -> np.ndarray:
        """Raw ones from the mean of those that were fitted on: a constant is 0, and carries no share of refusals from fit to fit."""
        if not predictor.raw:
            return predictor(fitted, scored, refused)
        every = predictor(fitted, fitted | scored, refused)
        return np.round(every[scored[fitted | scored]] - every[fitted[fitted | scored]].mean(), 9)

    out = np.full(len(refused), np.nan)
    for fold in range(inner.max() + 1):
        out[inner == fold] = scores((inner >= 0) & (inner != fold), inner == fold)
    y, unseen, own = refused[~here], out[~here], scores(~here, here)
    area = float(roc_auc_score(y, unseen))
    if not predictor.raw:
        return own, np.round(_logit(own) - _logit(y.mean()), 9), area
    curve = platt(unseen, y)
    return curve(own), curve.slope * (own - unseen.mean()), area


def lots(refused: Mask, parts: np.ndarray, groups: np.ndarray, rows: Mask, folds: int) -> np.ndarray:
    """Into which of `folds` each prompt of `rows` falls, -1 elsewhere: whole parts, or groups where all is one part; those with most refusals first,
    each into the lot that has fewest.
    """
    names = parts if len(set(parts[rows])) > 1 else groups
    sizes = Counter(names[rows])
    hits = Counter(names[rows & refused])
    filled, lot = [(0, 0)] * min(folds, len(sizes)), {}
    for name in sorted(sizes, key=lambda one: (-hits[one], -sizes[one], str(one))):
        at = min(range(len(filled)), key=lambda i: filled[i])
        lot[name], filled[at] = at, (filled[at][0] + hits[name], filled[at][1] + sizes[name])
    return np.array([lot[name] if row else -1 for name, row in zip(names, rows, strict=True)])


def too_few(prompts: Sequence[Prompt], refused: Mask, parts: np.ndarray, groups: np.ndarray, folds: int, least: int) -> str:
    """'' where every fit that `crossed` makes has `least` prompts on both sides of a Δ, else what is short, as a clause."""
    names = list(map(str, dict.fromkeys(parts)))
    if len(names) < 2:
        return f"all prompts are of {names[0] if names else 'no set'}"
    for part in names:
        inner = lots(refused, parts, groups, parts != part, folds)
        if inner.max() < 1:
            return f"without {part} there is nothing to choose on"
        for fold in range(inner.max() + 1):
            counts = [int(((inner >= 0) & (inner != fold) & side).sum()) for side in sides(prompts, refused)]
            if min(counts) < least:
                return f"without {part} and what is chosen on, {counts[0]} refused harmful and {counts[1]} accepted harmless prompts are left"
    return ""


def near_duplicates(texts: Sequence[str], at: float) -> list[tuple[int, int, float]]:
    """Pairs of texts whose runs of 3 to 5 characters, case and marks aside and weighed by TF-IDF, have a cosine of at least `at`: (first,
    second, cosine).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    x: Any = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit_transform(re.sub(r"[\W_]+", " ", text.lower()) for text in texts)
    found = []
    for start in range(0, len(texts), _BLOCK):
        alike = (x[start : start + _BLOCK] @ x.T).toarray()
        rows, columns = np.nonzero(alike >= at - 1e-9)
        found += [(int(i) + start, int(j), float(alike[i, j])) for i, j in zip(rows, columns, strict=True) if i + start < j]
    return found


def bound(groups: Sequence[str], pairs: Sequence[tuple[int, int, float]]) -> list[str]:
    """Groups with those of each pair made one: [prompt], each by the name of its first."""
    home, rank = {name: name for name in groups}, {name: i for i, name in reversed(list(enumerate(groups)))}

    def root(name: str) -> str:
        while home[name] != name:
            name = home[name]
        return name

    for i, j, _ in pairs:
        a, b = sorted((root(groups[i]), root(groups[j])), key=rank.__getitem__)
        home[b] = a
    return [root(name) for name in groups]


def dealt_parts(groups: Sequence[str], parts: int, seed: int) -> np.ndarray:
    """One of so many parts for each group, by hash."""
    return np.array([f"part {int(digest([seed, name])[:8], 16) % parts + 1}" for name in groups])


def measured(found: Foretold, refused: Mask, rows: Mask, clusters: np.ndarray | None = None) -> Row:
    """The numbers of some prompts in one row: AUROC of refused against accepted (by evidence); at a probability of one half accuracy and balanced
    accuracy; Brier score, ECE (of 150 prompts or more: of fewer it is the bins' own noise); the share of the more frequent verdict.

    Args:
        clusters: parts, [prompt], for `in_parts`.
    """
    p, y, evidence = found.probability[rows], refused[rows], found.evidence[rows]
    said = p >= 0.5
    numbers = {"balanced_accuracy": auroc(said[y], said[~y]), "brier": mean((p - y) ** 2), "accuracy": rate(list(said == y))}
    numbers |= {"ece": calibration_error(p, y)} if len(p) >= _ENOUGH else {}
    row: Row = {"is": "AUROC", **auroc(evidence[y], evidence[~y]).as_dict(), "refused": int(y.sum())}
    row |= {} if clusters is None else in_parts(evidence, y, clusters[rows])
    for name, one in numbers.items():
        row |= {name: one.value if isinstance(one, Value) else one.rate, f"{name}_low": one.low, f"{name}_high": one.high}
    return row | {"majority": float(max(y.mean(), 1 - y.mean()))}


def in_parts(scores: np.ndarray, positive: Mask, parts: np.ndarray, less: np.ndarray | None = None) -> Row:
    """What parts make of an AUROC, or of its difference from that of the scores `less`: `low_by_part` and `high_by_part`, the 95% bootstrap
    interval that resamples parts and not prompts; `within_part`, that of pairs of one part alone, with an interval that resamples prompts.

    Pairs of two parts set scores of two fits against each other; what a left-out part lacks moves all of its scores, and pairs within one do
    not feel it.
    """
    high, low = np.flatnonzero(positive), np.flatnonzero(~positive)
    names, at = np.unique(parts, return_inverse=True)
    same = (at[high][:, None] == at[low]).astype(np.float32)
    told = ("low_by_part", "high_by_part", "within_part", "within_part_low", "within_part_high")
    if not same.any():
        return dict.fromkeys(told, float("nan"))
    won = wins(scores[high], scores[low]) - (0 if less is None else wins(less[high], less[low]))
    by_part, inside = resampled_wins(won, np.ones_like(won), at[high], at[low]), resampled_wins(won * same, same)
    return dict(zip(told, (*by_part, float((won * same).sum() / same.sum()), *inside), strict=True))


def _logit(p: Any) -> Any:
    p = np.clip(p, 1e-7, 1 - 1e-7)
    return np.log(p / (1 - p))

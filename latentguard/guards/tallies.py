"""Scores of several detectors on the same prompts → rows of numbers by set: areas, decisions, paired differences. Knows no model.

A set of one side alone has its recall or its false alarms, and an AUROC against the other side of the other sets, which its row names.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from latentguard.datasets import Dataset, same_words
from latentguard.metrics import Rate, Value, at_fpr, auprc, auroc, f1, mcnemar, paired_auroc, percentiles, rate, tpr_at_fpr
from latentguard.prompts import Prompt

Row = dict[str, Any]
GUARD, AWAY, HOME = "latent_guard", "elsewhere, pooled", "test, pooled"
BEST_F1 = "best F1 on validation"
AHEAD, RIGHTER = "AUROC of Latent Guard − its own", "share judged rightly by Latent Guard − by it"
KINDS = {"plain": "harmless", "look-alikes": "lookalike"}  # negatives: what a row calls them, their label
_HALVES = 500
LEVELS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # false-positive rates that the ROC is drawn at


@dataclass(frozen=True, eq=False)
class Scored:
    """What is known of a detector."""

    name: str
    status: str
    about: str
    scores: np.ndarray
    rules: dict[str, float]
    ms: Value
    gflops: Value

    def told(self, of: str, **more: Any) -> Row:
        """How each of its rows begins."""
        return {
            "set": of,
            "detector": self.name,
            "status": "" if self.status == "tested" else self.status,
            **{"is": "", "negatives": "", "against": "", "rule": ""},
            **more,
        }


@dataclass(frozen=True, eq=False)
class Part:
    """A set as masks over all prompts: its own, the other side where it has one alone, and what that is."""

    own: np.ndarray
    beside: np.ndarray
    against: str = ""


@dataclass(frozen=True, eq=False)
class Held:
    """Prompts that are scored: the validation split, the test split, every set elsewhere; where each stands."""

    prompts: list[Prompt]
    sets: np.ndarray
    splits: np.ndarray
    harmful: np.ndarray
    labels: np.ndarray
    languages: np.ndarray
    first: np.ndarray  # False for one whose words stand in an earlier set elsewhere: it counts once in the pool

    @classmethod
    def of(cls, data: Dataset, away: dict[str, list[Prompt]]) -> "Held":
        """From a data set's validation and test splits, and the prompts of each set elsewhere by its name."""
        listed = [(p, p.source, split) for split in ("validation", "test") for p in getattr(data, split)]
        listed += [(p, name, "elsewhere") for name, prompts in away.items() for p in prompts]
        prompts, sets, splits = zip(*listed, strict=True)
        kept = {same_words(p): i for i, (p, _, split) in reversed(list(enumerate(listed))) if split == "elsewhere"}
        first = [split != "elsewhere" or kept[same_words(p)] == i for i, (p, _, split) in enumerate(listed)]
        harmful, labels, languages = (
            np.array(known) for known in ([bool(p.harmful) for p in prompts], [p.label for p in prompts], [p.language for p in prompts])
        )
        return cls(list(prompts), np.array(sets), np.array(splits), harmful, labels, languages, np.array(first))

    def evaluated(self) -> dict[str, Part]:
        """Every set that numbers are told of, the pool of unseen ones first."""
        away, home = self.splits == "elsewhere", self.splits == "test"
        named = list(dict.fromkeys(map(str, self.sets[away])))
        own = {AWAY: away & self.first} if named else {}
        own |= {HOME: home} | ({name: away & (self.sets == name) for name in named} if len(named) > 1 else {})
        sources = list(dict.fromkeys(map(str, self.sets[home])))
        own |= {f"test: {name}": home & (self.sets == name) for name in sources} if len(sources) > 1 else {}
        spoken = {(name, one): mask & self._in(one) for name, mask in own.items() for one in self._spoken(mask)}
        for (name, one), mask in spoken.items():
            same = (of for (of, _), other in spoken.items() if of != name and (other == mask).all())
            if name not in (AWAY, HOME) or not any(same):  # a pool of which one set alone speaks the language is that set
                own[f"{name} in {one or 'a language not said'}"] = mask
        return {name: self._part(mask, name, away & self.first, home) for name, mask in own.items()}

    def _spoken(self, own: np.ndarray) -> list[str]:
        """The languages of a set that has more than one."""
        found = sorted(set(map(str, self.languages[own])))
        return found if len(found) > 1 else []

    def _in(self, language: str) -> np.ndarray:
        return self.languages == language

    def _part(self, own: np.ndarray, name: str, away: np.ndarray, home: np.ndarray) -> Part:
        """With the other side of a set of one side: that of the others elsewhere, or else of the test split."""
        sides = set(self.harmful[own])
        if len(sides) == 2:
            return Part(own, own)
        other = "harmless" if True in sides else "harmful"
        pools = {f"{other} prompts of the test split": home & ~own}
        if not name.startswith("test: "):
            pools = {f"{other} prompts of the other sets elsewhere": away & ~own, **pools}
        for told, pool in pools.items():
            if (facing := pool & (self.harmful != self.harmful[own][0])).any():
                return Part(own, own | facing, told)
        return Part(own, own)


def lines(of: str, part: Part, held: Held, found: dict[str, Scored]) -> list[Row]:
    """A set's numbers: areas, decisions at the threshold of best F1, and what Latent Guard has more than each."""
    rows = [row for one in found.values() for row in _areas(of, part, held, one)]
    rows += [_decided(of, part.own, held, one, BEST_F1) for one in found.values()]
    best = found[GUARD]
    for one in found.values():
        if one is best:
            continue
        if 0 < held.harmful[part.beside].sum() < part.beside.sum():
            gap = paired_auroc(best.scores[part.beside], one.scores[part.beside], held.harmful[part.beside])
            rows.append(one.told(of, **{"is": AHEAD, "against": part.against}) | flat(gap) | {"p_delong": gap.p})
        right = [(x.scores > x.rules[BEST_F1])[part.own] == held.harmful[part.own] for x in (best, one)]
        gap = mcnemar(*right)
        rows.append(one.told(of, **{"is": RIGHTER, "rule": BEST_F1}) | flat(gap) | {"p_mcnemar": gap.p})
    return rows + [row for one in found.values() for row in _kinds(of, part, held, one)]


def _areas(of: str, part: Part, held: Held, one: Scored) -> list[Row]:
    """AUROC; the rest where the set holds both sides."""
    high, low = one.scores[part.beside & held.harmful], one.scores[part.beside & ~held.harmful]
    if not (len(high) and len(low)):
        return []
    told = one.told(of, **{"is": "AUROC", "negatives": "all", "against": part.against})
    row = {**told, **flat(auroc(high, low)), "n_harmful": len(high), "n_harmless": len(low)}
    if part.against:
        return [row]
    return [row | named("auprc", auprc(high, low)) | recalls(high, low)]


def recalls(high: np.ndarray, low: np.ndarray) -> Row:
    """Recall at 1% and 5% false positives, where there are negatives enough to tell."""
    found: Row = {}
    for level in (0.01, 0.05):
        found |= named(f"tpr_at_{level:.0%}", tpr_at_fpr(high, low, level)) if len(low) >= 1 / level else {}
    return found


def _kinds(of: str, part: Part, held: Held, one: Scored) -> list[Row]:
    """AUROC against either kind of negative, where a set has both."""
    high = one.scores[part.own & held.harmful]
    kinds = {name: one.scores[part.own & (held.labels == label)] for name, label in KINDS.items()}
    if not len(high) or not all(map(len, kinds.values())):
        return []
    told = {name: one.told(of, **{"is": "AUROC", "negatives": name}) for name in kinds}
    return [{**told[name], **flat(auroc(high, low)), "n_harmful": len(high), "n_harmless": len(low)} for name, low in kinds.items()]


def _decided(of: str, own: np.ndarray, held: Held, one: Scored, rule: str) -> Row:
    """Decisions at a threshold: F1 where a set holds both sides, else the recall or the false alarms; look-alikes apart."""
    flagged, y = one.scores[own] > one.rules[rule], held.harmful[own]
    recall, alarms = rate(list(flagged[y])), rate(list(flagged[~y]))
    row = one.told(of, **{"rule": rule, "threshold": one.rules[rule]})
    if not recall.n or not alarms.n:
        some = recall if recall.n else alarms
        return row | {"is": "recall" if recall.n else "FPR"} | flat(Value(some.rate, some.low, some.high, some.n))
    row |= {"is": "F1", **flat(f1(flagged[y], flagged[~y])), "n_harmful": recall.n, "n_harmless": alarms.n} | named("recall", recall) | named("fpr", alarms)
    alike = rate(list(flagged[held.labels[own] == KINDS["look-alikes"]]))
    return row | (named("lookalike_fpr", alike) | {"n_lookalike": alike.n} if alike.n else {})


def other_rules(of: str, part: Part, held: Held, found: dict[str, Scored]) -> list[Row]:
    """Decisions of a pool at the other thresholds: that for a false-positive rate, and what each detector comes with."""
    return [_decided(of, part.own, held, one, rule) for one in found.values() for rule in list(one.rules)[1:]]


def set_anew(of: str, part: Part, held: Held, found: dict[str, Scored], fpr: float, seed: int = 0) -> list[Row]:
    """Decisions at thresholds for a false-positive rate that are chosen on half of a set's harmless prompts and told on the other half: what
    thresholds of one's own traffic give. Means and 95% intervals over random halves, in each of which the prompts are drawn again too. None
    where a half has too few prompts for the rate.
    """
    y, rule = held.harmful[part.own], f"fpr={fpr:g} on half of its own harmless prompts"
    n = int((~y).sum())
    half = n // 2
    if not y.any() or fpr * half < 1:
        return []
    rows = []
    for one in found.values():
        high, low = one.scores[part.own][y], one.scores[part.own][~y]
        rng = np.random.default_rng(seed)  # the same halves for every detector
        told = []
        for _ in range(_HALVES):
            order = rng.permutation(n)
            cut = at_fpr(low[order[:half]], fpr)
            told.append([(rng.choice(high, len(high)) > cut).mean(), (rng.choice(low[order[half:]], n - half) > cut).mean()])
        for name, x, of_n in zip(("recall", "FPR"), np.array(told).T, (len(high), n - half), strict=True):
            rows.append(one.told(of, **{"is": name, "rule": rule}) | flat(Value(float(x.mean()), *percentiles(x), of_n)))
    return rows


def costs(found: dict[str, Scored]) -> list[Row]:
    """Time and arithmetic a prompt; n of the time is rounds, of the arithmetic prompts."""
    of = f"{found[GUARD].gflops.n} prompts, timed"
    rows = [one.told(of, **{"is": "ms a prompt"}) | flat(one.ms) for one in found.values() if one.ms.n]
    return rows + [one.told(of, **{"is": "GFLOPs a prompt"}) | flat(one.gflops) for one in found.values() if one.gflops.n]


def curve(part: Part, held: Held, found: dict[str, Scored]) -> list[Row]:
    """Recall at each false-positive rate that the set's negatives can tell."""
    if part.against:
        return []
    low = int((part.own & ~held.harmful).sum())
    return [
        {
            "detector": one.name,
            "status": one.told("")["status"],
            "fpr": level,
            "at": f"{level:.1%}".replace(".0%", "%"),
            **flat(tpr_at_fpr(one.scores[part.own & held.harmful], one.scores[part.own & ~held.harmful], level)),
            "n_harmless": low,
        }
        for one in found.values()
        for level in LEVELS
        if level * low >= 1
    ]


def flat(found: Value) -> Row:
    """A value in the columns that every table has."""
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n}


def named(name: str, found: Value | Rate) -> Row:
    """A value or a rate in columns of its own."""
    return {name: found.rate if isinstance(found, Rate) else found.value, f"{name}_low": found.low, f"{name}_high": found.high}

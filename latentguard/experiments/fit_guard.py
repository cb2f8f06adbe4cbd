"""fit_guard: a Latent Guard fitted, chosen, calibrated, measured and saved; and what it reaches on sets it never saw (arXiv 2507.11878, §5).

Three lots of numbers, never mixed: the test split of the sets it was fitted on; every family of sets scored by probes that never saw
it (what is to be expected of new sets); and the same two for the last token alone and for word n-grams.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from latentguard import plots
from latentguard.backends import Backend
from latentguard.datasets import Dataset
from latentguard.experiments import Row, headline, opening
from latentguard.guards.calibration import reliability
from latentguard.guards.fitting import States, fit_on, fitted, parts, unseen_scores
from latentguard.guards.guard import LatentGuard
from latentguard.guards.search import SPLITS, Candidate, Search, candidates_of
from latentguard.guards.tallies import flat, recalls
from latentguard.judges import Judge
from latentguard.metrics import as_text, auroc, paired_auroc
from latentguard.prompts import Prompt, digest
from latentguard.roles import without_text
from latentguard.trackers import Tracker

KINDS = {"harmless": "plain harmless requests", "lookalike": "look-alikes"}
WORDS = ("ngram", "tfidf")  # baselines that read the words alone
_ENOUGH = 10  # prompts of a side, or a row's AUROC is left out


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FitGuard:
    """Settings of the study; conf/exp/fit_guard.yaml says what each is for."""

    search: Search = Search()
    name: str | None = None
    leave_out: bool = True
    curve: tuple[float, ...] = (0.1, 0.3)

    def __post_init__(self) -> None:
        if not all(0 < share < 1 for share in self.curve):
            raise ValueError(f"curve={list(self.curve)}: shares of the train split, between 0 and 1")
        if self.name is not None and (not self.name or set(self.name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")):
            raise ValueError(f"name={self.name!r}: letters, digits, dot, dash and underscore")

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse layers that the model does not have, and data that lack a side in a split."""
        candidates_of(self.search, n_layers)
        self.search.of(data)

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """Fit, measure, save."""
        data = self.search.of(data)
        candidates = candidates_of(self.search, backend.n_layers)
        states = States(backend, data, candidates, self.search)
        guard = fitted(data, states, candidates, self.name or "")
        best = Candidate(guard.method, guard.layers, guard.positions, float(guard.about["strength"]))
        scores = guard.rescored(guard.probabilities(states.of("test", best)), states.shown["test"])
        table = [*self._within(scores, states, tracker), *self._promises(guard)]
        found = _Unseen(best, states) if self.leave_out else None
        unseen = found.rows() if found else []
        if found:
            found.log(tracker)
        curve = self._curve(guard, best, states)
        guard.about.update({"unseen": unseen, "curve": curve})
        folder = getattr(tracker, "folder", None)
        if folder is not None:
            path = guard.save(folder / "guards" / guard.name)
            tracker.artifact("guard", guard.name, path, {"model": guard.model, "weights": guard.weights, "method": guard.method, "data": data.hash})
        summary = opening("fit_guard", backend, data, judge)
        summary |= {"guard": _told(guard), "table": [*table, *unseen, *curve], "warnings": guard.about["warnings"]}
        summary |= {"effects": [], "figures": self._figures(backend.name, scores, states, unseen, curve, tracker)}
        pooled = _pooled(unseen) or next(row for row in table if row["set"] == "test" and row["detector"] == "guard")
        alone = unseen and len({self.search.family(p) for p in states.prompts["train"]}) == 1  # then its own groups were dealt into parts
        where = "parts of its own sets that were left out, pooled" if alone else "sets it has never seen, pooled" if unseen else "the test split"
        summary["headline"] = headline(f"AUROC of Latent Guard on {where}", pooled, "higher")
        summary["claim"] = self._claim(backend.name, guard, table, unseen, "parts of these that were left out" if alone else "families of sets it never saw")
        return summary

    def _within(self, probabilities: np.ndarray, states: States, tracker: Tracker) -> list[Row]:
        """The guard and the baselines on the test split of its own sets."""
        y, prompts = states.harmful["test"], states.prompts["test"]
        scores = {"guard": probabilities, **states.alone}
        tracker.rows([_row("test", p, name, x) for name, xs in scores.items() for p, x in zip(prompts, xs, strict=True)])
        return [_line("test", name, xs[y], xs[~y]) for name, xs in scores.items()]

    def _promises(self, guard: LatentGuard) -> list[Row]:
        """What each threshold promises beside what it did on the test split, and the calibration error."""
        seen = guard.about["test"]
        rows: list[Row] = [{"set": "test", "detector": "guard", "is": "ECE", **seen["ece"]}]
        for name, one in guard.thresholds.items():
            for what in ("fpr", "recall"):
                promised = {"promised_low": one.low, "promised_high": one.high} if name.startswith(what) else {}
                kept = seen["thresholds"][name][what]
                found = {"value": kept["rate"], "low": kept["low"], "high": kept["high"], "n": kept["n"]}
                rows.append({"set": "test", "detector": "guard", "is": f"{what} at {name}", "threshold": one.value, **found, **promised})
        return rows

    def _curve(self, guard: LatentGuard, best: Candidate, states: States) -> list[Row]:
        """AUROC on the test split by how much of the train split is fitted on; groups stay whole."""
        y, rows = states.harmful["test"], []
        draw = np.array([int(digest(["curve", p.group])[:8], 16) / 16**8 for p in states.prompts["train"]])
        for share in (*self.curve, 1.0) if self.curve else ():
            kept = draw < share
            sides = states.harmful["train"][kept]
            if min(sides.sum(), (~sides).sum()) < _ENOUGH:
                continue
            probe = guard.probe if kept.all() else fit_on(best, states, kept)
            raw = probe.raw(states.of("test", best)).numpy()
            rows.append({"set": "curve", "detector": "guard", "is": "AUROC", "share": share, "fitted_on": int(kept.sum()), **auroc(raw[y], raw[~y]).as_dict()})
        return rows

    def _figures(self, name: str, scores: np.ndarray, states: States, unseen: list[Row], curve: list[Row], tracker: Tracker) -> list[str]:
        made = ["reliability"]
        curved = reliability(scores, states.harmful["test"])
        tracker.figure("reliability", plots.reliability_curve(curved, title=f"{name}: what the guard says, and what came"), curved)
        if shown := [row for row in unseen if row["is"] == "AUROC" and np.isfinite(row["value"])]:
            tracker.figure("unseen", plots.unseen_families(shown, title=f"{name}: each family of sets scored by probes that never saw it"), shown)
            made.insert(0, "unseen")
        if len(curve) > 1:
            tracker.figure("learning", plots.learning_curve(curve, title=f"{name}: AUROC by how much was fitted on"), curve)
            made.append("learning")
        return made

    def _claim(self, name: str, guard: LatentGuard, table: list[Row], unseen: list[Row], left_out: str) -> str:
        test = {row["detector"]: row for row in table if row["set"] == "test" and row["is"] == "AUROC"}
        told = [f"{name}: Latent Guard ({guard.method}, layers {', '.join(map(str, guard.layers))}, {', '.join(guard.positions)}, marks: {guard.terminal})"]
        told += [f"reaches AUROC {as_text(test['guard'], 3)} on the test split of its own sets"]
        if pooled := _pooled(unseen):
            words = [row for row in unseen if row["set"] == "all families" and row["detector"] in WORDS and row["is"] == "AUROC"]
            best = max(words, key=lambda row: row["value"])
            told += [f"and {as_text(pooled, 3)} on {left_out}, where word n-grams reach {as_text(best, 3)}"]
        ece = guard.about["test"]["ece"]
        told += [f"expected calibration error {as_text(ece, 3)}"]
        caution = f" Careful: {'; '.join(guard.about['warnings'])}." if guard.about["warnings"] else ""
        return f"{told[0]} {', '.join(told[1:])}.{caution}"


class _Unseen:
    """Every prompt scored by a probe, and by baselines, that were fitted without its family."""

    def __init__(self, best: Candidate, states: States) -> None:
        self.prompts = [p for split in SPLITS for p in states.prompts[split]]
        self.harmful = np.concatenate([states.harmful[split] for split in SPLITS])
        self.families = np.concatenate([parts(states, split) for split in SPLITS])
        self.labels = np.array([p.label for p in self.prompts])
        self.scores = {"guard": unseen_scores(best, states, *SPLITS)}
        train = states.mask("train")
        for family in dict.fromkeys(self.families):
            here = self.families == family
            for name, found in states.words.scores(train & ~here, here).items():
                self.scores.setdefault(name, np.full(len(here), np.nan))[here] = found

    def rows(self) -> list[Row]:
        """A family: its harmful prompts against its harmless ones, and either side against everybody else's. Then all, by kind."""
        rows: list[Row] = []
        y, low, high = self.harmful, ~self.harmful, self.harmful
        for name, scores in self.scores.items():
            rows.append(_line("all families", name, scores[y], scores[~y], "pooled"))
            for kind, words in KINDS.items():
                rows.append(_line(f"{words} of all", name, scores[y], scores[self.labels == kind], "pooled"))
            for family in dict.fromkeys(self.families):
                own = self.families == family
                if min((own & high).sum(), (own & low).sum()) >= _ENOUGH:
                    rows.append(_line(str(family), name, scores[own & high], scores[own & low], "within the family"))
                if (own & high).sum() >= _ENOUGH:
                    rows.append(_line(f"harmful of {family}", name, scores[own & high], scores[low & ~own], "its harmful prompts, all others' harmless ones"))
                if (own & low).sum() >= _ENOUGH:
                    rows.append(_line(f"harmless of {family}", name, scores[high & ~own], scores[own & low], "its harmless prompts, all others' harmful ones"))
        for words in WORDS:
            ahead = paired_auroc(self.scores["guard"], self.scores[words], self.harmful)
            rows.append({"set": "all families", "detector": "guard", "is": f"AUROC above {words}", "comparison": "pooled", **flat(ahead)})
        return [row for row in rows if row["n"]]

    def log(self, tracker: Tracker) -> None:
        """A row a prompt and detector."""
        rows = [_row("unseen", p, name, x) for name, xs in self.scores.items() for p, x in zip(self.prompts, xs, strict=True)]
        tracker.rows([{**row, "family": str(family)} for row, family in zip(rows, np.tile(self.families, len(self.scores)), strict=True)])


def _line(of: str, detector: str, high: np.ndarray, low: np.ndarray, comparison: str = "test split") -> Row:
    """AUROC with interval, and the recall at two false-positive rates."""
    told = {"set": of, "detector": detector, "is": "AUROC", "comparison": comparison}
    return {**told, **auroc(high, low).as_dict(), "n_harmful": len(high), "n_harmless": len(low), **recalls(high, low)}


def _row(stage: str, prompt: Prompt, detector: str, score: float) -> Row:
    return {"stage": stage, "detector": detector, **without_text(prompt), "score": float(score)}


def _pooled(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row["set"] == "all families" and row["detector"] == "guard" and row["is"] == "AUROC"), None)


def _told(guard: LatentGuard) -> Mapping[str, Any]:
    """The guard in a summary: what it is, not its tensors."""
    names = ("name", "method", "layers", "positions", "terminal", "model", "weights")
    thresholds = {name: one.as_dict() for name, one in guard.thresholds.items()}
    return {**{key: getattr(guard, key) for key in names}, "thresholds": thresholds, "tried": guard.about["tried"], "test": guard.about["test"]}

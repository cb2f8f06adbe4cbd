"""final_token: what is left of a detector when every instruction ends in the same mark (ours; docs/gotchas.md)?

AdvBench prompts end in letters, XSTest's in "?", most of Alpaca's in ".": a detector at t_inst may read just that.
The same prompts are read as they are, stripped, and with one final period; poles are by label, so behaviour plays no part.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from latentguard import plots
from latentguard.backends import Backend
from latentguard.controls import mixed_sides
from latentguard.datasets import Dataset, load_dataset
from latentguard.detectors import Centroids, Counted, Projection, best_layer, last_tokens, ngrams
from latentguard.directions import Activations
from latentguard.errors import InputError
from latentguard.experiments import Row, headline, opening
from latentguard.judges import Judge
from latentguard.metrics import Value, auroc, mean
from latentguard.positions import parse_position
from latentguard.prompts import TERMINALS, Prompt
from latentguard.roles import dealt
from latentguard.settings import check_counts, check_seed, check_window
from latentguard.trackers import Tracker

Sets = dict[str, list[Prompt]]
SHUFFLED = "shuffled_labels"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FinalToken:
    """Settings of the study; conf/exp/final_token.yaml says what each is for."""

    terminals: tuple[str, ...] = ("keep", "strip", "period")
    positions: tuple[str, ...] = ("t_inst", "t_inst-1", "last_word", "mean(user)", "t_post_inst")
    window: tuple[float, float] = (0.3, 0.7)
    n_fit: int = 80
    n_validation: int = 24
    n_test: int = 40
    shuffles: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for position in self.positions:
            parse_position(position, reading=True)
        for terminal in self.terminals:
            if terminal not in TERMINALS:
                raise ValueError(f"terminals: {terminal!r} is none of {', '.join(TERMINALS)}")
        if len(set(self.terminals)) < len(self.terminals) or len(set(self.positions)) < len(self.positions):
            raise ValueError("positions and terminals: name each once")
        if not self.positions or not self.terminals:
            raise ValueError("positions and terminals: name at least one each")
        check_window(self.window)
        check_counts(self, "n_fit", "n_validation", "n_test", "shuffles")
        check_seed(self.seed)

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse data without harmful or without harmless prompts in a split, and prompts whose final mark cannot be set anew."""
        made = data.card.get("terminal", self.terminals[0])
        if data.spec is None and set(self.terminals) != {made}:
            raise InputError(
                f"exp.terminals={list(self.terminals)}: data {data.name} was made by hand and its final marks stay as they are; name one terminal, {made}"
            )
        for split in ("train", "validation", "test"):
            labels = {p.harmful for p in getattr(data, split)}
            if not labels >= {True, False}:
                raise InputError(f"data {data.name}: its {split} split needs harmful and harmless prompts; it deals rows by data.split")

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """Every detector under every final mark: AUROC within the sets it was fitted on, across others, and on matched ones."""
        table: list[Row] = []
        means: list[Row] = []
        marks: list[Row] = []
        for terminal in self.terminals:
            same = data if data.spec is None or data.card.get("terminal") == terminal else load_dataset(data.spec, terminal=terminal)  # type: ignore[arg-type]
            sets = {
                split: self._sets(getattr(same, split), n, _labels(same))
                for split, n in (("train", self.n_fit), ("validation", self.n_validation), ("test", self.n_test))
            }
            fit = self._fitted_on(same, sets["train"])
            everyone = {p.id: p for name in fit for split in ("train", "validation") for p in sets[split].get(name, [])}
            everyone |= {p.id: p for prompts in sets["test"].values() for p in prompts}
            states = backend.read(list(everyone.values()), "all", self.positions)
            marks += [{"terminal": terminal, "set": name, **_marks(prompts)} for name, prompts in sets["test"].items()]
            for detector, position, score in self._detectors(backend, states, sets, fit):
                scores = {name: score(prompts) for name, prompts in sets["test"].items()}
                if detector != SHUFFLED:
                    tracker.rows([row for name, prompts in sets["test"].items() for row in _scored(prompts, scores[name], terminal, detector, position, name)])
                for kind, (high, low) in _pairs(sets["test"], fit).items():
                    if high and low:
                        area = _pooled(scores, high, low)
                        table.append(
                            {
                                "terminal": terminal,
                                "detector": detector,
                                "position": position,
                                "kind": kind,
                                **area.as_dict(),
                                "sets": " + ".join(high) + " / " + " + ".join(low),
                            }
                        )
            table = _spread(table)
            means += self._means(states, sets, fit, terminal, tracker)
        summary = opening("final_token", backend, data, judge)
        summary |= {"poles": "label", "table": table, "means": means, "final_marks": marks, "fitted_on": list(fit), "effects": []}
        summary |= {"figures": ["final_token", "final_token_means"], "headline": self._headline(table), "claim": self._claim(backend.name, table)}
        tracker.figure(
            "final_token", plots.detectors_by_terminal(table, title=f"{backend.name}: detectors with the final mark kept, stripped, and made equal"), table
        )
        tracker.figure("final_token_means", plots.means_by_terminal(means, title=f"{backend.name}: mean s at t_inst, poles {' against '.join(fit)}"), means)
        return summary

    def _sets(self, prompts: Sequence[Prompt], n: int, labels: dict[str, set[str]]) -> Sets:
        """At most n prompts of each source and label; a source with one label goes by its own name."""
        found: Sets = {}
        for p in dealt(prompts, self.seed):
            if p.harmful is not None:
                found.setdefault(p.source if len(labels[p.source]) == 1 else f"{p.source}: {p.label}", []).append(p)
        return {name: found[name][:n] for name in sorted(found)}

    def _fitted_on(self, data: Dataset, train: Sets) -> tuple[str, str]:
        """The first harmful and the first harmless set: of the roles where the data name sets, else the largest."""
        chosen = []
        for role, harmful in (("refused_harmful", True), ("accepted_harmless", False)):
            of = {name: prompts for name, prompts in train.items() if prompts[0].harmful is harmful}
            named = ((data.spec.roles or {}).get(role) if data.spec else None) or ()
            order = [name for source in named for name in of if name.split(":")[0] == source]
            plain = sorted((name for name in of if "lookalike" not in name), key=lambda name: -len(of[name]))
            chosen.append((order or plain or list(of))[0])
        return chosen[0], chosen[1]

    def _detectors(self, backend: Backend, states: Activations, sets: dict[str, Sets], fit: tuple[str, str]):  # noqa: ANN202
        """(name, position, prompts → scores) of every detector."""
        high, low = (sets["train"][name] for name in fit)
        for position in self.positions:
            guard = Centroids.fit(states, high, low, position=position)
            layer = best_layer(guard, *(states.at(position, sets["validation"].get(name, [])) for name in fit))
            for name, fitted in (("", guard), ("_one_layer", guard.at_layer(layer)), ("projection_one_layer", Projection.fit(guard, layer))):
                full = name if name.startswith("projection") else f"latent_guard{name}"
                yield full, position, lambda ps, g=fitted, at=position: g.score(states.at(at, ps)).numpy()
            for sides in mixed_sides(high, low, self.seed, self.shuffles):
                control = Centroids.fit(states, *sides, position=position)
                yield SHUFFLED, position, lambda ps, g=control, at=position: g.score(states.at(at, ps)).numpy()
        last = dict(zip((p.id for p in states.prompts), last_tokens(backend, states.prompts), strict=True))
        baselines = {"last_token": lambda p: last[p.id], "ngram": lambda p: ngrams(p.instruction)}
        for name, items in baselines.items():
            fitted = Counted.fit([items(p) for p in high], [items(p) for p in low])
            yield name, "text", lambda ps, f=fitted, items=items: np.array(f.score([items(p) for p in ps]))

    def _means(self, states: Activations, sets: dict[str, Sets], fit: tuple[str, str], terminal: str, tracker: Tracker) -> list[Row]:
        """Mean s at the first position over the window of layers, set by set."""
        position, depth = self.positions[0], states.n_layers
        guard = Centroids.fit(states, *(sets["train"][name] for name in fit), position=position)
        inside = [i for i, layer in enumerate(states.layers) if round(self.window[0] * depth) <= layer <= round(self.window[1] * depth)]
        found = []
        for name, prompts in sets["test"].items():
            s = guard.separation(states.at(position, prompts))[:, inside].mean(1).numpy()
            tracker.rows(_scored(prompts, s, terminal, "mean_separation", position, name))
            found.append({"terminal": terminal, "set": name, "harmful": prompts[0].harmful, "position": position, **mean(s).as_dict(), "fitted": name in fit})
        return found

    def _headline(self, table: list[Row]) -> Row:
        """Latent Guard with one final mark for all, where there is one: across data sets, or within where there is one pair."""
        terminal = "period" if "period" in self.terminals else self.terminals[-1]
        rows = [r for r in table if (r["detector"], r["position"], r["terminal"]) == ("latent_guard", self.positions[0], terminal)]
        found = {row["kind"]: row for row in rows}
        kind = "across" if "across" in found else "within"
        return headline(f"AUROC of Latent Guard {kind} data sets, final mark {terminal}, at {self.positions[0]}", found.get(kind), "higher")

    def _claim(self, name: str, table: list[Row]) -> str:
        def area(detector: str, position: str, terminal: str, kind: str) -> str:
            row = next((r for r in table if (r["detector"], r["position"], r["terminal"], r["kind"]) == (detector, position, terminal, kind)), None)
            return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if row else "–"

        first = self.positions[0]
        told = [
            f"with the final mark {done} ({terminal}) {area('latent_guard', first, terminal, 'within')} within and {area('latent_guard', first, terminal, 'across')} across data sets "
            f"(last-token classifier {area('last_token', 'text', terminal, 'across')}, n-gram {area('ngram', 'text', terminal, 'across')} across)"
            for terminal, done in (("keep", "kept"), ("strip", "stripped"), ("period", "made equal"))
            if terminal in self.terminals
        ]
        return f"{name}: AUROC of Latent Guard at {first}: " + "; ".join(told) + "."


def _labels(data: Dataset) -> dict[str, set[str]]:
    """The labels that each source holds, in any split."""
    found: dict[str, set[str]] = {}
    for p in data:
        found.setdefault(p.source, set()).add(p.label)
    return found


def _scored(prompts: Sequence[Prompt], scores: np.ndarray, terminal: str, detector: str, position: str, name: str) -> list[Row]:
    about = {"stage": "final_token", "terminal": terminal, "detector": detector, "position": position, "set": name}
    return [{**about, "prompt_id": p.id, "label": p.label, "score": float(v)} for p, v in zip(prompts, scores, strict=True)]


def _spread(table: list[Row]) -> list[Row]:
    """The shuffled controls of one detector as one row: their mean, and the lowest and highest."""
    merged: dict[tuple, list[Row]] = {}
    for row in table:
        merged.setdefault(tuple(row[key] for key in ("terminal", "detector", "position", "kind")), []).append(row)
    found = []
    for rows in merged.values():
        areas = [row["value"] for row in rows]
        found.append(rows[0] if len(rows) == 1 else {**rows[0], "value": float(np.mean(areas)), "low": min(areas), "high": max(areas)})
    return found


def _pairs(test: Sets, fit: tuple[str, str]) -> dict[str, tuple[list[str], list[str]]]:
    """Which sets are set against which: those fitted on, those that were not, and the two labels of one source, one by one."""
    high, low = ([name for name, prompts in test.items() if prompts[0].harmful is side] for side in (True, False))
    new = ([n for n in high if n not in fit], [n for n in low if n not in fit])
    across = (new[0] or high, new[1] or low) if new[0] or new[1] else ([], [])
    both = sorted({n.split(":")[0] for n in high} & {n.split(":")[0] for n in low} - {n.split(":")[0] for n in fit})
    matched = {f"within {source}": ([n for n in high if n.split(":")[0] == source], [n for n in low if n.split(":")[0] == source]) for source in both}
    return {"within": ([fit[0]] if fit[0] in test else [], [fit[1]] if fit[1] in test else []), "across": across, **matched}


def _pooled(scores: dict[str, np.ndarray], high: list[str], low: list[str]) -> Value:
    return auroc(np.concatenate([scores[name] for name in high]), np.concatenate([scores[name] for name in low]))


def _marks(prompts: Sequence[Prompt]) -> Row:
    """The share of prompts by their last character: letter or digit, or the mark itself."""
    ends = Counter("letter" if p.instruction.rstrip()[-1].isalnum() else p.instruction.rstrip()[-1] for p in prompts)
    return {"n": len(prompts), "ends": {mark: count / len(prompts) for mark, count in ends.most_common(4)}}

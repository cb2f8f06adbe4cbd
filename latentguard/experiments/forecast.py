"""forecast: before the model answers, will it refuse? Words, labels and hidden states as forecasters (arXiv 2306.03423, with the inside in sight).

The model's own judged replies are the labels. Every forecast is made by what never saw the prompt's source, and beside it by what never saw its
group. Knows no steering and no other experiment.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from latentguard.backends import Backend
from latentguard.behaviour import Cells, Judged, RefusalLogOdds
from latentguard.datasets import Dataset
from latentguard.errors import InputError
from latentguard.experiments import Row, headline, opening
from latentguard.interventions import Cell, Grid
from latentguard.judges import Judge
from latentguard.labelled_replies import find, load, summed, trials
from latentguard.layers import check_layer, resolve_layers
from latentguard.metrics import Rate, as_text, auroc, mcnemar, paired_auroc, rate
from latentguard.outcomes import LABELS, Observed, gate, gauges, outcomes
from latentguard.plots.forecast import TASKS, accuracy_on_replies, areas_by_layer, areas_by_predictor, called, method, shares_refused
from latentguard.positions import parse_position
from latentguard.predictors import (
    Crossed,
    Delta,
    Foretold,
    Given,
    LogisticProbe,
    Predictor,
    Rates,
    Words,
    alone,
    bound,
    crossed,
    dealt_parts,
    in_parts,
    measured,
    near_duplicates,
    too_few,
)
from latentguard.prompts import Prompt
from latentguard.roles import Cast, Filled, dealt, find_places, said, without_text
from latentguard.settings import check_counts, check_seed
from latentguard.trackers import Tracker

log = logging.getLogger(__name__)
SPLITS = {"sources": "sources never seen", "groups": "groups never seen"}
WITHIN = ("harmful", "not harmful")  # kinds within which knowing harm does not help
LATENT = ("delta_harmful", "delta_refuse", "probe", "latent")
_LEAST = 10  # prompts of either pole behind every fit, or a split is left out
_FEW = 5  # of either verdict, or a set's AUROC is left out


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Forecast:
    """Settings of the study; conf/exp/predict_refusal.yaml says what each is for."""

    n_prompts: int = 1000
    max_new_tokens: int = 12
    layers: Literal["all"] | tuple[float | int, ...] = "all"
    positions: tuple[str, ...] = ("t_inst", "t_post_inst", "mean(user)")
    families: dict[str, tuple[str, ...]] | None = None
    near: float = 0.8
    parts: int = 5
    folds: int = 3
    shuffles: int = 5
    replies: str | None = None
    reply_splits: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for position in self.positions:
            parse_position(position, reading=True)
        if missing := [one for one in ("t_inst", "t_post_inst") if one not in self.positions]:
            raise ValueError(f"positions={list(self.positions)}: {missing[0]} is needed, Δ is read there")
        for layer in () if self.layers == "all" else self.layers:
            check_layer(layer)
        if not self.layers:
            raise ValueError("layers=[]: name at least one, or all")
        if not 0 < self.near <= 1:
            raise ValueError(f"near={self.near}: a cosine above 0, at most 1")
        check_counts(self, "n_prompts", "max_new_tokens", "shuffles", "reply_splits")
        for name in ("parts", "folds"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}={getattr(self, name)}: at least 2")
        check_seed(self.seed)

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse layers that the model does not have, data of one side, and labelled replies that are not there."""
        resolve_layers(self.layers, n_layers)
        for label in ("harmful", "harmless"):
            if not any(p.label == label for p in data):
                raise InputError(f"data {data.name} has no {label} prompt: exp=predict_refusal needs both, such as data=guard")
        if self.replies is not None:
            load(find(self.replies, data.spec.mirror if data.spec else None))

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """Ask, read, forecast, count."""
        asked = dealt(data, self.seed)[: self.n_prompts]
        find_places(backend, asked, self.positions)
        prompts, repeats = self.apart(asked)
        grid = Grid((Cell(tags={"intervention": "none"}),))
        judged = said(backend, prompts, grid, judge, tracker, self.max_new_tokens, stage="asked")[0]
        usable = [j for j in judged if j.verdict.label != "degenerate"]
        summary = opening("predict_refusal", backend, data, judge) | {"poles": "behaviour", "effects": [], "figures": [], "table": []}
        summary["asked"] = {
            "prompts": len(asked),
            "near_duplicates": repeats,
            "degenerate": dict(Counter(j.prompt.label for j in judged if j.verdict.label == "degenerate")),
            "forecast": len(usable),
        }
        base = self._base(backend, data, judged)
        observed = outcomes([base], judge)
        why, found = self._found(backend, base, usable, tracker)
        harmful = rate([j.verdict.label == "refused" for j in judged if j.prompt.label == "harmful"])
        if found is None:
            summary |= {"status": "insufficient_base_rate", "table": observed}
            summary["headline"] = headline("harmful requests refused", harmful, withheld=True)
            summary["claim"] = f"{backend.name} refuses {harmful} of the harmful requests — claim withheld (insufficient_base_rate: {why})."
        else:
            summary |= found.summary(backend.name, harmful)
            summary["table"] = [*found.table, *observed]
            found.draw(backend.name, tracker)
            summary["figures"] += ["predict_refusal", "predict_refusal_layers"]
        by_set = _by_set(judged)
        tracker.figure("predict_refusal_asked", shares_refused(by_set, title=f"{backend.name}: which prompts it refuses"), by_set)
        summary["figures"].append("predict_refusal_asked")
        if self.replies is not None:
            self._replies(data, summary, tracker)
        return summary

    def apart(self, asked: list[Prompt]) -> tuple[list[Prompt], int]:
        """Prompts without those that nearly repeat an earlier one of another family, and how many these are."""
        dropped: set[int] = set()
        for i, j, _ in near_duplicates([p.instruction for p in asked], self.near):
            if i not in dropped and self.family(asked[i]) != self.family(asked[j]):
                dropped.add(j)
        log.info("%d prompts nearly repeat one of another source and are left out", len(dropped))
        return [p for i, p in enumerate(asked) if i not in dropped], len(dropped)

    def grouped(self, prompts: list[Prompt]) -> list[str]:
        """Groups of prompts, [prompt]; near-duplicates make one of theirs."""
        return bound([p.group for p in prompts], near_duplicates([p.instruction for p in prompts], self.near))

    def family(self, prompt: Prompt) -> str:
        """What a prompt's source is left out with; by itself where no family names it."""
        return next((name for name, members in (self.families or {}).items() if prompt.source in members), prompt.source)

    def _base(self, backend: Backend, data: Dataset, judged: Sequence[Judged]) -> Observed:
        """The untouched model: replies by label, and where test prompts lie on the two gauges of the train poles."""
        by = {label: [j for j in judged if j.prompt.label == label] for label in LABELS}
        split = {p.id: name for name in ("train", "validation", "test") for p in getattr(data, name)}

        def pole(verdict: str, label: str, of: str) -> tuple[Prompt, ...]:
            return tuple(j.prompt for j in by[label] if j.verdict.label == verdict and split[j.prompt.id] == of)

        high, low = pole("refused", "harmful", "train"), pole("accepted", "harmless", "train")
        if not high or not low:
            return Observed("base", "base", by, seed=self.seed)
        roles = {"refused_harmful": ("refused", "harmful"), "accepted_harmless": ("accepted", "harmless")}
        validation = {role: Filled(role, pole(*what, "validation"), len(by[what[1]]), "") for role, what in roles.items()}
        found = gauges(backend, Cast("behaviour", high, low, validation, {}, {}))
        held = {label: [j.prompt for j in own if split[j.prompt.id] == "test"] for label, own in by.items()}
        lie = {name: {label: one.read(backend, own).tolist() for label, own in held.items() if own} for name, one in found.items()}
        return Observed("base", "base", by, harmfulness=lie["harmfulness"], refusal=lie["refusal"], seed=self.seed)

    def _found(self, backend: Backend, base: Observed, usable: Sequence[Judged], tracker: Tracker) -> "tuple[str, _Found | None]":
        """Every number, or the reason why there is none."""
        replies = base.replies["harmful"]
        if gate(base):
            return f"{sum(j.verdict.label == 'refused' for j in replies)} of {len(replies)} harmful requests refused", None
        prompts = [j.prompt for j in usable]
        refused = np.array([j.verdict.label == "refused" for j in usable])
        names = self.grouped(prompts)
        groups, parts = np.array(names), {"sources": np.array([self.family(p) for p in prompts]), "groups": dealt_parts(names, self.parts, self.seed)}
        short = {name: too_few(prompts, refused, of, groups, self.folds, _LEAST) for name, of in parts.items()}
        if all(short.values()):
            return short["groups"], None
        states = backend.read(prompts, self.layers, self.positions)
        probes = {(p, layer): LogisticProbe(states.values[:, i, k]) for k, p in enumerate(states.positions) for i, layer in enumerate(states.layers)}
        candidates: dict[str, Predictor] = {
            "majority": Rates([""] * len(prompts)),
            "label": Rates([p.label for p in prompts]),
            "topic": Rates([p.category for p in prompts]),
            "tfidf": Words([p.instruction for p in prompts]),
            "first_token": Given(np.array(backend.logits(prompts, reduce=RefusalLogOdds(frozenset(Cells(()).refusal_tokens(backend)))), float)),
            "delta_harmful": Delta(states, "t_inst"),
            "delta_refuse": Delta(states, "t_post_inst"),
            **{_place(*at): probe for at, probe in probes.items()},
        }
        found = _Found(prompts, refused, {name: of for name, of in parts.items() if not short[name]}, short, list(probes))
        for name, of in found.parts.items():
            found.add(name, crossed(candidates, refused, of, groups, self.folds), tracker)
            found.table += self._shuffled(name, candidates, found, groups, tracker)
        return "", found

    def _shuffled(self, split: str, candidates: Mapping[str, Predictor], found: "_Found", groups: np.ndarray, tracker: Tracker) -> list[Row]:
        """The control: verdicts dealt anew, over all prompts or within each source; what is left is what telling sources apart buys."""
        kinds = {"shuffled": np.zeros(len(groups)), "shuffled within sources": np.array([p.source for p in found.prompts])}
        place = Counter(found.forecasts[split]["probe"].chosen.values()).most_common(1)[0][0]
        asked = {"tfidf": "tfidf", "delta_harmful": "delta_harmful", "delta_refuse": "delta_refuse", "probe": place}
        rows = []
        for kind, within in kinds.items():
            areas: dict[str, list[float]] = {name: [] for name in asked}
            generator = np.random.default_rng(self.seed)
            for draw in range(self.shuffles):
                mixed = found.refused.copy()
                for one in dict.fromkeys(within):
                    mixed[within == one] = generator.permutation(mixed[within == one])
                if too_few(found.prompts, mixed, found.parts[split], groups, self.folds, 1):
                    continue
                made = crossed({at: candidates[at] for at in asked.values()}, mixed, found.parts[split], groups, self.folds)
                for name, at in asked.items():
                    evidence = made.found[at].evidence
                    areas[name].append(auroc(evidence[mixed], evidence[~mixed]).value)
                    tracker.rows([{"stage": "shuffled", "split": split, "control": kind, "draw": draw, "predictor": name, "auroc": areas[name][-1]}])
            spread = {name: (float(np.mean(x)), min(x), max(x)) for name, x in areas.items() if x}
            told = {"split": split, "set": "all", "is": "AUROC", "control": kind, "draws": self.shuffles, "n": len(groups)}
            rows += [{**told, "predictor": name, "value": at, "low": low, "high": high} for name, (at, low, high) in spread.items()]
        return rows

    def _replies(self, data: Dataset, summary: Row, tracker: Tracker) -> None:
        """The paper's own two tasks on replies that people labelled."""
        path = find(str(self.replies), data.spec.mirror if data.spec else None)
        labelled = load(path)
        found = list(trials(labelled, self.reply_splits, self.near))
        tracker.rows([{"stage": "labelled_replies", **row} for row in found])
        tracker.used("dataset", path.stem, {"name": path.stem, "n": len(labelled)}, path)
        rows = summed(found)
        summary["labelled_replies"] = {"file": path.name, "n": len(labelled), "refused": sum(one.refused for one in labelled)}
        summary["table"] = [*summary["table"], *({"predictor": row["method"], "set": "labelled replies", **row} for row in rows)]
        own = next(row for row in rows if (row["task"], row["split"], row["method"]) == ("reply", "random", "tfidf"))
        summary["claim"] += (
            f" On {len(labelled)} replies that people labelled, TF-IDF and logistic regression reach accuracy {own['value']:.3f} over {own['splits']} random splits "
            f"(95% of them in {own['low']:.3f} to {own['high']:.3f}; majority {own['majority']:.3f}; published {own['published']:.4f})."
        )
        title = "Refusals that people labelled: accuracy over random splits"
        shown = [{**row, "name": method(row), "from": TASKS[row["task"]]} for row in rows]
        tracker.figure("predict_refusal_replies", accuracy_on_replies(shown, title=title), shown)
        summary["figures"] = [*summary["figures"], "predict_refusal_replies"]


class _Found:
    """Forecasts of every split, their table, and what is said of them."""

    def __init__(self, prompts: list[Prompt], refused: np.ndarray, parts: dict[str, np.ndarray], short: dict[str, str], places: list) -> None:
        self.prompts, self.refused, self.parts, self.short, self.places = prompts, refused, parts, short, places
        self.table: list[Row] = []
        self.forecasts: dict[str, dict[str, Foretold]] = {}
        self.by_layer: list[Row] = []
        labels = np.array([p.label for p in prompts])
        self.sets = {"all": labels != "", "harmful": labels == "harmful", "not harmful": labels != "harmful", "lookalike": labels == "lookalike"}

    @alone
    def add(self, split: str, made: Crossed, tracker: Tracker) -> None:
        """The numbers of one split, and its rows."""
        probes = [_place(*at) for at in self.places]
        single = ("majority", "label", "topic", "tfidf", "first_token", "delta_harmful", "delta_refuse")
        found = {name: made.best([name]) for name in single}
        found |= {f"probe at {of}": made.best([_place(*at) for at in self.places if at[0] == of]) for of in dict.fromkeys(of for of, _ in self.places)}
        found |= {"probe": made.best(probes), "latent": made.best(["delta_harmful", "delta_refuse", *probes])}
        self.forecasts[split] = found
        parts, y = self.parts[split], self.refused
        sets = self.sets | ({f"source: {name}": parts == name for name in dict.fromkeys(map(str, parts))} if split == "sources" else {})
        for of, rows in sets.items():
            if not rows.any():
                continue
            clusters = None if of.startswith("source: ") else parts
            for name, one in found.items():
                self.table.append({"split": split, "set": of, "predictor": name, "control": "", **self._numbers(one, rows, clusters)})
            if self._enough(rows):
                self.table += [row | {"split": split, "set": of} for row in self._ahead(found, rows, clusters)]
        for (position, layer), name in zip(self.places, probes, strict=True):
            evidence = made.found[name].evidence
            self.by_layer.append({"split": split, "position": position, "layer": layer, **auroc(evidence[y], evidence[~y]).as_dict()})
        told = [{**without_text(p), "split": split, "part": str(part), "refused": bool(r)} for p, part, r in zip(self.prompts, parts, y, strict=True)]
        for name, one in found.items():
            numbers = zip(told, parts, one.probability, one.evidence, strict=True)
            tracker.rows(
                [
                    {"stage": "forecast", "predictor": name, "place": one.chosen[str(part)], **row, "probability": p, "evidence": e}
                    for row, part, p, e in numbers
                ]
            )
        for position in dict.fromkeys(position for position, _ in self.places):
            own = np.stack([made.found[_place(*at)].evidence for at in self.places if at[0] == position], 1)
            tracker.rows(
                [{"stage": "places", "position": position, **row, "by_layer": [float(f"{x:.6g}") for x in e]} for row, e in zip(told, own, strict=True)]
            )

    def _enough(self, rows: np.ndarray) -> bool:
        return min((rows & self.refused).sum(), (rows & ~self.refused).sum()) >= _FEW

    def _numbers(self, one: Foretold, rows: np.ndarray, clusters: np.ndarray | None) -> Row:
        row = measured(one, self.refused, rows, clusters)
        return row if self._enough(rows) else row | dict.fromkeys(("value", "low", "high"), float("nan"))

    def _ahead(self, found: dict[str, Foretold], rows: np.ndarray, clusters: np.ndarray | None) -> list[Row]:
        """What each latent has more than the words, the label and the first token, on the same prompts."""
        y, told = self.refused[rows], []
        for name in LATENT:
            for other in ("tfidf", "label", "first_token", *(["delta_harmful"] if name == "delta_refuse" else [])):
                a, b = (found[one].evidence[rows] for one in (name, other))
                gap = paired_auroc(a, b, y)
                row: Row = {"predictor": name, "is": f"AUROC − that of {other}", **gap.as_dict(), "refused": int(y.sum()), "control": ""}
                row |= {} if clusters is None else in_parts(a, y, clusters[rows], b)
                right = mcnemar(*((found[one].probability[rows] >= 0.5) == y for one in (name, other)))
                told += [row, {"predictor": name, "is": f"share judged rightly − by {other}", **right.as_dict(), "refused": int(y.sum()), "control": ""}]
        return told

    @property
    def main(self) -> str:
        """The split that the claim rests on."""
        return next(iter(self.parts))

    def row(self, split: str, of: str, predictor: str, what: str = "AUROC", control: str = "") -> Row:
        """One row of the table."""
        wanted = {"split": split, "set": of, "predictor": predictor, "is": what, "control": control}
        return next(row for row in self.table if wanted.items() <= row.items())

    def summary(self, model: str, harmful: Rate) -> Row:
        """Headline, claim, what was chosen."""
        split = self.main
        gap = self.row(split, "all", "latent", "AUROC − that of tfidf")
        at = {name: self.row(split, "all", name) for name in self.forecasts[split]}
        chosen = {name: {one: dict(Counter(made[one].chosen.values())) for one in ("probe", "latent")} for name, made in self.forecasts.items()}
        left = {name: why for name, why in self.short.items() if why}
        within = "; ".join(
            f"among {of} requests of one {'source' if split == 'sources' else 'part'}: {self._beside(split, of)}"
            for of in WITHIN
            if self._enough(self.sets[of])
        )
        by = f", resampling {split} [{gap['low_by_part']:+.3f}, {gap['high_by_part']:+.3f}]"
        shuffled = [row for row in self.table if (row.get("control"), row["predictor"], row["split"]) == ("shuffled", "probe", split)]
        claim = (
            f"{model} refuses {harmful} of the harmful requests. Before it answers, on {SPLITS[split]} ({len(set(self.parts[split]))}), the latents (layer and position chosen on the "
            f"others) rank refused above accepted with AUROC {as_text(at['latent'], 3)}, words alone {as_text(at['tfidf'], 3)}, the label alone {as_text(at['label'], 3)}, the first token's log-odds {as_text(at['first_token'], 3)}; latents − words "
            f"{as_text(gap, 3, '+')}{by}; accuracy {at['latent']['accuracy']:.3f} against {at['tfidf']['accuracy']:.3f}, where always saying the more frequent verdict has "
            f"{at['latent']['majority']:.3f}"
        )
        claim += f"; {within}" if within else ""
        claim += f"; with shuffled verdicts the probe has {shuffled[0]['value']:.3f}" if shuffled else ""
        claim += "".join(f"; no split by {name}: {why}" for name, why in left.items())
        head = headline(f"AUROC of the latents − that of words, {SPLITS[split]}", gap, "higher")
        return {"headline": head, "claim": f"{claim}.", "chosen": chosen, "left_out": left, "parts": {name: len(set(of)) for name, of in self.parts.items()}}

    def _beside(self, split: str, of: str) -> str:
        return ", ".join(f"{words} {as_text(_within(self.row(split, of, name)), 3)}" for name, words in (("latent", "latents"), ("tfidf", "words")))

    def draw(self, model: str, tracker: Tracker) -> None:
        """Two figures: by predictor and split, and by layer."""
        shown = [row for row in self.table if row["is"] == "AUROC" and row["set"] in ("all", *WITHIN) and np.isfinite(row["value"])]
        shown = [row for row in shown if row["predictor"] != "probe" or row["control"]]  # but for the controls it is among the latents
        shown = [{**(_within(row) if row["set"] in WITHIN else row), "name": called(row)} for row in shown]
        tracker.figure("predict_refusal", areas_by_predictor(shown, title=f"{model}: will it refuse?"), shown)
        words = [self.row(split, "all", "tfidf") for split in self.parts]
        rows = [*self.by_layer, *({**row, "position": "words alone", "layer": None} for row in words)]
        tracker.figure("predict_refusal_layers", areas_by_layer(rows, title=f"{model}: refusal from the states of one layer"), rows)


def _within(row: Row) -> Row:
    """The row with what pairs of one part alone give in its AUROC's place: across parts, even a label ranks prompts of one label."""
    return row | {"value": row["within_part"], "low": row["within_part_low"], "high": row["within_part_high"]}


def _place(position: str, layer: int) -> str:
    return f"{position}, layer {layer}"


def _by_set(judged: Sequence[Judged]) -> list[Row]:
    """Shares refused, by set and label."""
    kinds = sorted({(j.prompt.source, j.prompt.label) for j in judged})
    found = [(kind, rate([j.verdict.label == "refused" for j in judged if (j.prompt.source, j.prompt.label) == kind])) for kind in kinds]
    return [{"name": source, "label": label, "value": one.rate, "low": one.low, "high": one.high, "n": one.n} for (source, label), one in found]

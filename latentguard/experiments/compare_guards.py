"""compare_guards: Latent Guard beside what else tells harmful requests, on the same prompts (arXiv 2507.11878, §5, extended).

Everything is fitted on train, every threshold chosen on validation; numbers are those of the test split and of sets that nothing was
fitted on (`elsewhere`). Knows no probe and no guard model's ways.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from latentguard.backends import Backend
from latentguard.backends.memory import release
from latentguard.datasets import Dataset, load_dataset, same_words
from latentguard.errors import InputError
from latentguard.experiments import Row, headline, opening
from latentguard.guard_models import NAMES
from latentguard.guard_models.asked import WORDINGS
from latentguard.guards.fitting import fit_guard
from latentguard.guards.front import COIN, fronted
from latentguard.guards.guard import LatentGuard
from latentguard.guards.rivals import ASK, RIVALS, Rival, Rivals, inmost, of_guard, of_model, there
from latentguard.guards.search import Search, candidates_of
from latentguard.guards.tallies import AHEAD, AWAY, BEST_F1, GUARD, HOME, KINDS, Held, Scored, costs, curve, lines, other_rules, set_anew
from latentguard.interventions import Cell, Grid
from latentguard.judges import Judge
from latentguard.metrics import Value, as_text, at_fpr, base_rate_gate, best_f1, mean
from latentguard.outcomes import LABELS, Observed, gate, gauges, outcomes
from latentguard.plots.guards import areas_by_set, low_false_alarms, refused_behind
from latentguard.prompts import Prompt
from latentguard.roles import POLES, Casting, dealt, find_places, said, without_text
from latentguard.settings import check_counts, check_seed
from latentguard.trackers import Tracker

log = logging.getLogger(__name__)
WORDS = ("last_token", "ngram", "tfidf", "length")  # detectors that see the text alone: controls
_COINS = 2


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CompareGuards:
    """Settings of the study; conf/exp/guard_compare.yaml says what each is for."""

    guard: str | None = None
    search: Search = Search()
    elsewhere: tuple[str, ...] = ()
    scorers: tuple[str, ...] = RIVALS
    guard_models: tuple[str, ...] = ()
    wording: str = "plain"
    poles: Literal["behaviour", "label"] = "behaviour"
    fpr: float = 0.05
    n_asked: int = 60
    n_timed: int = 64
    rounds: int = 5
    batch: int = 16
    casting: Casting = Casting()
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.scorers if name not in RIVALS]:
            raise ValueError(f"scorers: {unknown[0]!r} is none of {', '.join(RIVALS)}; Latent Guard itself is always there, guard models go in guard_models")
        if unknown := [name for name in self._models if name not in NAMES]:
            raise ValueError(f"guard_models: {unknown[0]!r} is none of {', '.join(NAMES)}; NAME, or NAME:FOLDER where its weights lie in a folder")
        short = {
            "scorers": self.scorers,
            "guard_models": [name.partition(":")[0] for name in self.guard_models],
            "elsewhere": [Path(name).stem for name in self.elsewhere],
        }
        for setting, names in short.items():
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"{setting}: {twice!r} stands twice")
        if self.wording not in WORDINGS and self.wording.count("{request}") != 1:
            raise ValueError(f"wording={self.wording[:60]!r}: choose one of {', '.join(WORDINGS)}, or give a text with {{request}} in it once")
        if not 0 < self.fpr < 1:
            raise ValueError(f"fpr={self.fpr}: a share of harmless prompts, between 0 and 1")
        check_counts(self, "rounds", "batch")
        for name, why in (("n_timed", "time"), ("n_asked", "ask")):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: a number of prompts, or 0 to {why} nothing")
        check_seed(self.seed)

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse data that lack a side in a split, sets that are not there or stand in the data, and a guard of another depth."""
        self.search.of(data)
        if self.poles == "behaviour" and set(ASK) & set(self.scorers):
            for role in POLES:
                if not data.role(role, "train"):
                    raise InputError(f"data {data.name} has no train prompt for the role {role}: name sets with data.roles.{role}=[…], or set exp.poles=label")
        guard = self._loaded(n_layers)
        self._away(data, guard)
        there(self._models)
        if guard is None:
            candidates_of(self.search, n_layers)

    @property
    def _models(self) -> dict[str, str | None]:
        """Guard models, and the folder of each that has one here."""
        return {name: at or None for name, _, at in (one.partition(":") for one in self.guard_models)}

    def _loaded(self, n_layers: int) -> LatentGuard | None:
        if self.guard is None:
            return None
        if not Path(self.guard).is_dir():
            raise InputError(f"exp.guard={self.guard}: there is no such folder; exp=fit_guard saves one under guards/ of its run, and null fits one here")
        guard = LatentGuard.load(self.guard)
        if kinds := guard.about.get("search", {}).get("categories"):
            raise InputError(
                f"exp.guard={self.guard} was fitted to tell {', '.join(kinds)} alone: what stands here is harm of every kind, so give one that tells all"
            )
        if guard.n_layers != n_layers:
            raise InputError(
                f"exp.guard={self.guard} was fitted on {guard.model} ({guard.n_layers} layers), and this model has {n_layers}: load the model it belongs to"
            )
        return guard

    def _away(self, data: Dataset, guard: LatentGuard | None) -> dict[str, tuple[list[Prompt], int]]:
        """Each set that nothing is fitted on: its prompts, and how many were left out since their group stands in the data.

        Raises:
            InputError: for one that is not there, that the guard was fitted on, or of which nothing is left.
        """
        spec, taken = data.spec, {p.group for p in data} | {same_words(p) for p in data}
        known = {"terminal": spec.terminal, "seed": spec.seed, **({"mirror": spec.mirror} if spec.mirror else {})} if spec else {}
        trained = (guard.about.get("data", {}).get("counts", {}) if guard else {}).keys()
        found = {}
        for name in self.elsewhere:
            other = load_dataset(name, **known)
            prompts = [p for p in other if p.group not in taken and same_words(p) not in taken]
            if seen := sorted({p.source for p in prompts} & set(trained)):
                raise InputError(f"exp.elsewhere: the guard {guard.name if guard else ''} was fitted on {seen[0]}: name sets that it has never seen")
            if not prompts:
                raise InputError(f"exp.elsewhere: all prompts of {name} stand in data {data.name} too: name a set that nothing was fitted on")
            found[other.name] = (prompts, len(list(other)) - len(prompts))
        return found

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """Fit or load, score everything, count."""
        guard = self._loaded(backend.n_layers)
        away = self._away(data, guard)
        if guard is not None:
            guard = guard.on(backend)
            about = {"model": guard.model, "weights": guard.weights, "method": guard.method, "layers": list(guard.layers)}
            tracker.used("guard", guard.name, about, Path(self.guard or ""))
        places = guard.positions if guard else [place for together in self.search.positions for place in together]
        find_places(backend, [*data, *(p for prompts, _ in away.values() for p in prompts)], list(dict.fromkeys(["t_inst", "t_post_inst", *places])))
        for name, (prompts, left_out) in away.items():
            if left_out:
                log.info("%s: %d prompts that stand in data %s too are left out", name, left_out, data.name)
            tracker.used("dataset", name, {"name": name, "n": len(prompts), "left_out": left_out, "ids": {"test": [p.id for p in prompts]}})
        other = (
            ""
            if guard is None or guard.about.get("data", {}).get("hash") == data.hash
            else "the guard was fitted on other data, so of the test split it may have seen prompts"
        )
        casting, wording = self.casting if self.poles == "behaviour" else None, self.wording if "zero_shot" in self.scorers else None
        made = Rivals(backend, data, judge, tracker, casting=casting, wording=wording)
        guard = guard or fit_guard(backend, data, search=self.search)
        held = Held.of(data, {name: prompts for name, (prompts, _) in away.items()})
        timed = dealt([p for p, split in zip(held.prompts, held.splits, strict=True) if split != "validation"], self.seed)[: self.n_timed]
        found: dict[str, Scored] = {}
        makers = [
            lambda: of_guard(guard, f"fpr={self.fpr:g}"),
            *(lambda n=n: made.make(n) for n in self.scorers),
            *(lambda n=n, at=at: of_model(n, at) for n, at in self._models.items()),
        ]
        for make in makers:
            rival = make()
            log.info("%s: %s%s", rival.name, rival.about or "fitted on train", "" if rival.tested else " (untested)")
            found[rival.name] = self._scored(rival, backend, held, timed, tracker)
            if rival.name in self._models:
                del rival, make
                release()  # it is not to stay in memory beside the next
        summary = self._summary(opening("guard_compare", backend, data, judge), guard, held, found, away, other, made.poles, tracker)
        if self.n_asked:
            self._front(summary, made, held, found, tracker)
        return summary

    def _scored(self, rival: Rival, backend: Backend, held: Held, timed: Sequence[Prompt], tracker: Tracker) -> Scored:
        """Scores of all prompts, what they cost, thresholds from the validation split."""
        scores = np.asarray(rival.score(backend, held.prompts), float)
        if not np.isfinite(scores).all():
            raise InputError(
                f"{rival.name} gives prompt {held.prompts[int(np.argmin(np.isfinite(scores)))].id} no finite score: load the model in bfloat16 or float32"
            )
        status = "tested" if rival.tested else "untested"
        tracker.rows(
            [
                {
                    "stage": "guard_compare",
                    "detector": rival.name,
                    "status": status,
                    "set": str(name),
                    "split": str(split),
                    **without_text(p),
                    "score": float(x),
                }
                for p, name, split, x in zip(held.prompts, held.sets, held.splits, scores, strict=True)
            ]
        )
        here = held.splits == "validation"
        high, low = scores[here & held.harmful], scores[here & ~held.harmful]
        rules = {BEST_F1: best_f1(high, low), f"fpr={self.fpr:g} on validation": at_fpr(low, self.fpr)}
        rules |= {"its own": rival.own} if rival.own is not None else {}
        seconds, direct = [], inmost(backend)
        for _ in range(self.rounds + 1) if timed and rival.timed else ():
            started = time.perf_counter()
            for at in range(0, len(timed), self.batch):
                rival.score(direct, timed[at : at + self.batch])
            seconds.append(time.perf_counter() - started)
        spent = mean([1000 * s / len(timed) for s in seconds[1:]])  # the first warms up
        arithmetic = rival.flops(direct, timed) / 1e9
        gflops = mean(arithmetic) if np.isfinite(arithmetic).all() else Value(math.nan, math.nan, math.nan, len(timed))
        return Scored(rival.name, status, rival.about, scores, rules, spent, gflops)

    def _summary(
        self, summary: Row, guard: LatentGuard, held: Held, found: dict[str, Scored], away: dict, other: str, poles: str, tracker: Tracker
    ) -> dict[str, Any]:  # fmt: skip
        """The table, the figures, the claim."""
        sets = held.evaluated()
        main = next(iter(sets))
        table = [row for name, part in sets.items() for row in lines(name, part, held, found)]
        table += [row for name in (AWAY, HOME) if name in sets for row in other_rules(name, sets[name], held, found)]
        table += [row for name, part in sets.items() if name in (AWAY, HOME, *away) for row in set_anew(name, part, held, found, self.fpr, self.seed)]
        table += costs(found)
        at = {row["detector"]: row for row in table if (row["set"], row["is"], row["negatives"]) == (main, "AUROC", "all")}
        harmful = int((sets[main].own & held.harmful).sum())
        thin = base_rate_gate(min(harmful, int(sets[main].own.sum()) - harmful), int(sets[main].own.sum()))
        told = f"{guard.name}: {found[GUARD].about}"
        summary |= {"status": thin or "ok", "guard": {"name": guard.name, "is": told, "from": self.guard or "fitted here"}, "poles": poles}
        summary |= {"table": table, "effects": [], "about": {name: one.about for name, one in found.items()}, "caution": other}
        summary["thresholds"] = {name: one.rules for name, one in found.items()}
        summary["elsewhere"] = {name: {"n": len(prompts), "left_out": left_out} for name, (prompts, left_out) in away.items()}
        where = "sets it has never seen, pooled" if AWAY in sets else "the test split"
        summary["headline"] = headline(f"AUROC of Latent Guard on {where}", at[GUARD], "higher", withheld=bool(thin))
        summary["claim"] = _claim(summary["model"], table, at, found, main, other, bool(thin))
        shown = [{**row, "of": _of(row)} for row in table if row["is"] == "AUROC" and not row["set"].startswith("test: ")]
        sets_alone = {*map(str, held.sets), AWAY, HOME}  # the others are of one language
        spoken = [row for row in shown if row["set"] not in sets_alone]
        shown = [row for row in shown if row["set"] in sets_alone]
        tells = "harmful against harmless, by set and detector"
        tracker.figure("guard_compare", areas_by_set(shown, title=f"{summary['model']}: {tells}"), shown)
        summary["figures"] = ["guard_compare"]
        if spoken:
            tracker.figure("guard_compare_languages", areas_by_set(spoken, title=f"{summary['model']}: {tells.replace('set', 'language')}"), spoken)
            summary["figures"].append("guard_compare_languages")
        if ends := curve(sets[main], held, found):
            name = "on sets never seen" if main == AWAY else "on the test split"
            tracker.figure("guard_compare_roc", low_false_alarms(ends, title=f"{summary['model']}: recall at few false alarms, {name}"), ends)
            summary["figures"].append("guard_compare_roc")
        return summary

    def _front(self, summary: Row, made: Rivals, held: Held, found: dict[str, Scored], tracker: Tracker) -> None:
        """What people meet with each detector in front of the model: a flagged request counts as refused, any other gets the model's own reply."""
        main, part = next(iter(held.evaluated().items()))
        at = {p.id: i for i, p in enumerate(held.prompts) if part.own[i]}
        asked = {label: dealt([held.prompts[i] for i in at.values() if held.labels[i] == label], self.seed)[: self.n_asked] for label in LABELS}
        everyone = [p for prompts in asked.values() for p in prompts]
        grid = Grid((Cell(tags={"intervention": "none"}),))
        judged = said(made.backend, everyone, grid, made.judge, tracker, self.casting.max_new_tokens, stage="asked")[0]
        base = Observed("base", "base", {label: [j for j in judged if j.prompt.label == label] for label in LABELS if asked[label]}, seed=self.seed)
        if made.cast and made.cast.high and made.cast.low:
            gauge = gauges(made.backend, made.cast)
            lie = {name: {label: one.read(made.backend, asked[label]).tolist() for label in base.replies} for name, one in gauge.items()}
            base = replace(base, harmfulness=lie["harmfulness"], refusal=lie["refusal"])
        rule = f"fpr={self.fpr:g} on validation"
        flags = {name: {label: (one.scores > one.rules[rule])[[at[p.id] for p in asked[label]]] for label in base.replies} for name, one in found.items()}
        rows = outcomes([base, *fronted(base, flags, [name for name in found if name not in WORDS], draws=_COINS, seed=self.seed)], made.judge)
        status = {name: "" if one.status == "tested" else one.status for name, one in found.items()}
        told = [
            {"set": main, "detector": of, "status": status.get(of, ""), "negatives": "", "against": "", "rule": rule} for of in (r["condition"] for r in rows)
        ]
        rows = [{**more, "is": row["measure"], **row} for more, row in zip(told, rows, strict=True)]
        summary["table"] = [*summary["table"], *rows]
        short = gate(base)
        summary["asked"] = {"set": main, **{label: len(prompts) for label, prompts in asked.items()}, "status": short or "ok"}
        summary["claim"] = summary["claim"].removesuffix(".") + _behind(summary["model"], rows, rule, short)
        shown = [row for row in rows if row["measure"].endswith(" refusal")]
        tracker.figure("guard_compare_front", refused_behind(shown, title=f"{summary['model']}: refused with a detector in front"), shown)
        summary["figures"].append("guard_compare_front")


def _behind(model: str, rows: Sequence[Row], rule: str, short: str) -> str:
    """How many requests are refused by the model alone, behind the guard, behind a coin."""
    value = {(row["condition"], row["label"]): row for row in rows if row["measure"].endswith(" refusal")}

    def of(condition: str) -> str:
        return ", ".join(f"{label} {as_text(row)}" for (name, label), row in value.items() if name == condition)

    hardly = f" ({short}: hardly any refusal of its own)" if short else ""
    coin = ", ".join(f"{label} {row['value']:.2f}" for (name, label), row in value.items() if name == f"{COIN} 0")
    return f"; refused by {model} alone{hardly}: {of('base')}; with Latent Guard in front ({rule}): {of(GUARD)}; with a coin that flags as many: {coin}."


def _of(row: Row) -> str:
    """A row of areas in a figure: the set, and what its prompts are set against."""
    facing, _, where = row["against"].partition(" prompts of ")
    told = f" vs {facing} {'elsewhere' if 'elsewhere' in where else 'test'}" if facing else f" · {row['negatives']}" if row["negatives"] in KINDS else ""
    return row["set"].removesuffix(", pooled") + told


def _claim(model: str, table: list[Row], at: dict[str, Row], found: dict[str, Scored], main: str, other: str, thin: bool) -> str:
    """One sentence: the guard, all others, the nearest of them."""
    best = at[GUARD]
    names = {name: f"{name if name in NAMES else name.replace('_', ' ')}{' (untested)' if found[name].status == 'untested' else ''}" for name in at}
    away = "sets that nothing was fitted on, pooled" if main == AWAY else "the test split"
    few = f", recall {best['tpr_at_5%']:.2f} [{best['tpr_at_5%_low']:.2f}, {best['tpr_at_5%_high']:.2f}] at 5% false alarms" if "tpr_at_5%" in best else ""
    told = f"{model}: on {away}, Latent Guard ({found[GUARD].about}) reaches AUROC {as_text(best, 3)}{few}"
    rest = sorted((row for name, row in at.items() if name != GUARD), key=lambda row: -row["value"])
    if rest:
        nearest = rest[0]["detector"]
        gap = next(row for row in table if (row["set"], row["detector"], row["is"]) == (main, nearest, AHEAD))
        listed = [f"{names[row['detector']]} {as_text(row, 3).partition(' (')[0]}" for row in rest]
        told += f"; beside it: {', '.join(listed)}"
        told += f"; it differs from the best of these, {names[nearest]}, by {as_text(gap, 3, '+').partition(' (')[0]}"
        told += f" (DeLong p = {gap['p_delong']:.2g})" if math.isfinite(gap["p_delong"]) else ""
    return told + (f"; careful: {other}" if other else "") + (" — claim withheld: too few prompts of a side." if thin else ".")

"""over_refusal: does a refused look-alike look harmful inside, which of its words bring the refusal, and does a gate mend it (arXiv 2505.23473)?

The measuring half of EVOREFUSE: nothing is written or evolved here. Poles are plain: refused harmful and accepted harmless train prompts,
look-alikes in neither. Layers, the ablated direction and the gate's threshold come from validation prompts, every number from test prompts.
Knows no other experiment.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from latentguard.ablations import ablation, everywhere
from latentguard.backends import Backend
from latentguard.behaviour import Cells, Judged, RefusalLogOdds, likelihoods
from latentguard.controls import mixed_sides
from latentguard.datasets import Dataset
from latentguard.directions import Direction, mean_difference, random_like
from latentguard.errors import InputError
from latentguard.experiments import Row, headline, opening
from latentguard.interventions import Cell, Grid, Intervention
from latentguard.judges import Judge
from latentguard.layers import check_layer, resolve_layers
from latentguard.metrics import as_text, at_fpr, auroc, base_rate_gate, mean, pearson, rate
from latentguard.outcomes import Gauge, Observed, gauges, numbers, outcomes
from latentguard.plots import overrefusal as plots
from latentguard.prompts import Prompt
from latentguard.roles import POLES, Cast, Casting, dealt, find_places, said, without_text
from latentguard.settings import check_counts
from latentguard.trackers import Tracker
from latentguard.words import SOFTER, Weighed, by_word, replaced, shares, tops

_LONGEST = 24  # tokens of a reply, at most: enough to see a refusal
LABELS = ("lookalike", "harmful", "harmless")
PLACES = ("t_inst", "t_post_inst")
SWAPPED = ("refusal gauge", "harmfulness gauge", "log-odds of refusing", "refusal rate")
Placed = dict[str, np.ndarray]  # gauge → where each prompt lies on it


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class OverRefuse:
    """Settings of the study; conf/exp/over_refusal.yaml says what each is for."""

    n_lookalike: int = 150
    n_harmful: int = 60
    n_harmless: int = 60
    n_validation: int = 40
    harmfulness_layer: int | float | None = None
    refusal_layers: tuple[int | float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8)
    shuffles: int = 20
    n_swapped: int = 40
    against: tuple[Literal["zero", "mean"], ...] = ("zero", "mean")
    fillers: tuple[str, ...] = ("thing", "")
    spared: float = 0.03
    within: float = 0.03
    draws: int = 2
    max_new_tokens: int = 12
    casting: Casting = Casting()

    def __post_init__(self) -> None:
        check_counts(self, *(f for f in self.__dataclass_fields__ if f.startswith("n_")), "shuffles", "draws", "max_new_tokens")
        for layer in self._layers():
            check_layer(layer)
        if not self.refusal_layers:
            raise ValueError("refusal_layers=[]: name at least one, such as 0.6")
        if not self.fillers or len(set(self.fillers)) < len(self.fillers):
            raise ValueError(f"fillers={list(self.fillers)}: name at least one word, each once; '' takes the word out")
        if not self.against or len(set(self.against)) < len(self.against):
            raise ValueError(f"against={list(self.against)}: name zero, mean or both, each once")
        for name in ("spared", "within"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a share from 0, under 1, such as 0.03")
        if self.max_new_tokens > _LONGEST:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: this study looks at how replies open, {_LONGEST} tokens at most")

    def _layers(self) -> list[int | float]:
        """Every layer that is named."""
        return [*self.refusal_layers, *([self.harmfulness_layer] if self.harmfulness_layer is not None else [])]

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse layers that the model does not have, and data without look-alikes held out or without plain prompts for the poles."""
        resolve_layers(self._layers(), n_layers)
        for split in ("train", "validation", "test"):
            for role, label in (("refused_harmful", "harmful"), ("accepted_harmless", "harmless"), ("refused_harmless", "lookalike")):
                if (label != "lookalike" or split != "train") and not any(p.label == label for p in data.role(role, split)):
                    raise InputError(f"data {data.name} has no {label} prompt in its {split} split: name sets with data.roles.{role}=[…], or see data.split")

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """Where look-alikes lie, which words matter, what a gate does."""
        backend.attributions([], 0, torch.zeros(backend.d_model))  # a backend without gradients says so before anything is asked
        find_places(backend, data, PLACES)
        return _OverRefusal(self, backend, data, judge, tracker).summary()


class _OverRefusal:
    """One run, step by step. Test prompts stand in one list, `everyone`; `at` says which of them have a label."""

    def __init__(self, settings: OverRefuse, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> None:
        self.set, self.backend, self.data, self.judge, self.tracker = settings, backend, data, judge, tracker
        self.seed = settings.casting.seed
        self.cast = self._cast()
        sizes = {"harmful": settings.n_harmful, "harmless": settings.n_harmless, "lookalike": settings.n_lookalike}
        groups = {label: dealt(self.cast.apart(self._of(label, "test")), self.seed)[: sizes[label]] for label in LABELS}
        self.everyone = [p for prompts in groups.values() for p in prompts]
        self.at = {label: [i for i, p in enumerate(self.everyone) if p.label == label] for label in LABELS}
        self.base = self._replies((), "base", range(len(self.everyone)))
        self.refused = np.array([j.verdict.label == "refused" for j in self.base])
        self.tokens = frozenset(Cells(tuple(self.base)).refusal_tokens(backend))
        self.direction, layer = self._direction()
        named = {"refusal": layer} if settings.harmfulness_layer is None else {"refusal": layer, "harmfulness": settings.harmfulness_layer}
        self.gauges = gauges(backend, self.cast, layers={name: resolve_layers(at, backend.n_layers)[0] for name, at in named.items()})
        self.placed = self._places(self.everyone)

    def _of(self, label: str, split: str) -> list[Prompt]:
        """Prompts of a label: harmful ones from both roles that hold any."""
        roles = {"harmful": ("refused_harmful", "accepted_harmful"), "harmless": ("accepted_harmless",), "lookalike": ("refused_harmless",)}[label]
        return list({p.id: p for role in roles for p in self.data.role(role, split) if p.label == label}.values())

    def _cast(self) -> Cast:
        """Poles and their validation prompts without look-alikes; by label where the model refuses or accepts too little."""
        sizes = {"train": self.set.casting.n_poles, "validation": self.set.casting.n_validation}
        pools = {(role, split): [p for p in self.data.role(role, split) if not p.lookalike] for role in POLES for split in sizes}
        found = {key: self.set.casting.find(key[0], pool, sizes[key[1]], self.backend, self.judge, self.tracker) for key, pool in pools.items()}
        poles, validation = ({role: found[role, split] for role in POLES} for split in sizes)
        withheld = next((f.withheld for f in poles.values() if f.withheld), "")
        if withheld:
            labelled = {key: tuple(dealt(pool, self.seed)[: sizes[key[1]]]) for key, pool in pools.items()}
            poles, validation = ({role: replace(found[role, split], prompts=labelled[role, split]) for role in POLES} for split in sizes)
        high, low = (poles[role].prompts for role in POLES)
        return Cast("label" if withheld else "behaviour", high, low, validation, {}, {}, withheld, poles)

    def _replies(self, acts: Sequence[Intervention], condition: str, rows: Sequence[int]) -> list[Judged]:
        """Judged replies of some test prompts under interventions."""
        grid = Grid((Cell(tuple(acts), {"condition": condition}),))
        return said(self.backend, [self.everyone[i] for i in rows], grid, self.judge, self.tracker, self.set.max_new_tokens, stage="replies")[0]

    def _places(self, prompts: Sequence[Prompt], acts: Sequence[Intervention] = ()) -> Placed:
        """Where prompts lie on both gauges, as interventions leave them."""
        if not prompts:
            return {name: np.zeros(0) for name in self.gauges}
        layers = sorted({gauge.layer for gauge in self.gauges.values()})
        states = self.backend.read_under(list(prompts), acts, layers, PLACES) if acts else self.backend.read(list(prompts), layers, PLACES)
        return {name: gauge.of(states.at(gauge.position)[:, states.layer_index(gauge.layer)]) for name, gauge in self.gauges.items()}

    def summary(self) -> dict[str, Any]:
        """All steps, and what came out."""
        counts, sides = self._sides()
        words, swaps = self._words()
        gated, about = self._gate()
        table = [*sides, *swaps, *gated]
        summary = opening("over_refusal", self.backend, self.data, self.judge) | {"poles": self.cast.poles}
        short = [label for label in ("harmful", "lookalike") if base_rate_gate(int(self.refused[self.at[label]].sum()), len(self.at[label]))]
        summary["status"] = "insufficient_base_rate" if short or self.cast.withheld else "ok"
        summary["cells"] = {"poles": self.cast.poles, "pole_harmful": len(self.cast.high), "pole_harmless": len(self.cast.low)}
        summary["cells"] |= {f"test_{label}": {"n": len(at), "refused": int(self.refused[at].sum())} for label, at in self.at.items()}
        summary |= {"gauges": {name: {"layer": g.layer, "position": g.position} for name, g in self.gauges.items()}, "counts": counts, "words": words}
        summary |= {"gate": about, "decoding": {"greedy": True, "max_new_tokens": self.set.max_new_tokens}, "table": table, "effects": []}
        metric = "share of over-refused look-alikes on the harmless side at t_inst"
        summary["headline"] = headline(metric, _row(table, label="lookalike", **_OVER), withheld=summary["status"] != "ok")
        summary["claim"] = self._claim(table, about, short)
        summary["figures"] = self._draw(table, about)
        return summary

    def _sides(self) -> tuple[list[Row], list[Row]]:
        """The 2 × 2 of side at t_inst and verdict, by label and set, and what the shares are set against."""
        verdicts = np.array([j.verdict.label for j in self.base])
        harmful, shuffled = self.placed["harmfulness"] > 0, self._shuffled()
        for draw, level in enumerate(shuffled):
            own = [{"draw": draw, **without_text(p), "harmfulness": float(x)} for p, x in zip(self.everyone, level, strict=True)]
            self.tracker.rows([{"stage": "sides, shuffled labels", **row} for row in own])
        seen = zip(self.everyone, verdicts, self.placed["harmfulness"], self.placed["refusal"], strict=True)
        self.tracker.rows([{"stage": "sides", **without_text(p), "verdict": str(v), "harmfulness": float(h), "refusal": float(r)} for p, v, h, r in seen])
        counts, rows = [], []
        of = {label: {self.everyone[i].source for i in at} for label, at in self.at.items()}
        shared = of["lookalike"] & of["harmful"]
        for label, at in self.at.items():
            kept = {"all": of[label], **({"shared": shared} if shared and label != "harmless" else {}), **{one: {one} for one in sorted(of[label])}}
            for name, sources in kept.items():
                mine = np.array([i for i in at if self.everyone[i].source in sources], int)
                count: Row = {"label": label, "set": name, "n": len(mine)}
                for verdict in ("refused", "accepted", "degenerate"):
                    these = mine[verdicts[mine] == verdict]
                    count |= {f"{verdict}_{side}_side": int((harmful[these] == (side == "harmful")).sum()) for side in ("harmful", "harmless")}
                    about = {"part": "sides", "measure": "on the harmless side at t_inst", "label": label, "set": name, "verdict": verdict}
                    if verdict != "degenerate" and (len(these) or name == "all"):
                        rows.append(about | numbers(rate([not harmful[i] for i in these])))
                    if verdict != "degenerate" and name == "all" and len(these):
                        shares = [float((level[these] <= 0).mean()) for level in shuffled]
                        low, high = (float(x) for x in np.percentile(shares, [2.5, 97.5]))
                        spread = {"value": float(np.mean(shares)), "low": low, "high": high, "n": len(these), "draws": len(shares)}
                        rows.append(about | {"part": "sides, shuffled labels"} | spread)
                counts.append(count)
        for name, level in self.placed.items():
            refused, accepted = ([i for i in self.at["lookalike"] if verdicts[i] == verdict] for verdict in ("refused", "accepted"))
            about = {"part": "auroc", "gauge": name, "label": "lookalike"}
            rows.append(about | {"measure": "refused against accepted look-alikes", "set": "all", **numbers(auroc(level[refused], level[accepted]))})
            for one, sources in {"all": of["lookalike"] | of["harmful"], **{one: {one} for one in sorted(shared)}}.items():
                sides = [level[[i for i in self.at[label] if self.everyone[i].source in sources]] for label in ("harmful", "lookalike")]
                rows.append(about | {"measure": "harmful requests against look-alikes", "set": one, **numbers(auroc(*sides))})
        return counts, rows

    def _shuffled(self) -> list[np.ndarray]:
        """Where test prompts lie on harmfulness gauges between sides that mean nothing, draw by draw."""
        own, high, low = self.gauges["harmfulness"], self.cast.high, self.cast.low
        states = self.backend.read([*high, *low, *self.everyone], [own.layer], [own.position])
        tested = states.values[len(high) + len(low) :, 0, 0]
        sides = [[states.at(own.position, side)[:, 0] for side in both] for both in mixed_sides(high, low, self.seed, self.set.shuffles)]
        return [Gauge.between(a, b, layer=own.layer, position=own.position).of(tested) for a, b in sides]

    def _words(self) -> tuple[Row, list[Row]]:
        """Gradient × input of the refusal gauge, word by word, in over-refused look-alikes; and what becomes of their refusal where the word
        that carries most is replaced, against other words of the same prompts.
        """
        own = self.gauges["refusal"]
        prompts = [self.everyone[i] for i in self.at["lookalike"] if self.refused[i]][: self.set.n_swapped]
        about: Row = {"n": len(prompts)}
        swaps: list[Row] = []
        for against in self.set.against:
            values = self.backend.attributions(prompts, own.layer, own.vector / own.half, own.position, against)
            scored = [by_word(rendered, list(each)) for rendered, each in zip(self.backend.render(prompts), values, strict=True)]
            for p, one in zip(prompts, scored, strict=True):
                rows = [{"word": word.text.lower(), "tells": word.tells, "attribution": x} for word, x in zip(one.words, one.carried, strict=True)]
                rows.append({"word": "", "tells": False, "attribution": one.rest})
                self.tracker.rows([{"stage": "words", **without_text(p), "against": against, **row} for row in rows])
            able = [(p, one) for p, one in zip(prompts, scored, strict=True) if len(one.telling) > 1]
            about |= {"swapped": len(able), against: {"carried": shares(scored), "top": [{"word": word, "prompts": n} for word, n in tops(scored)]}}
            swaps += [{"against": against, **row} for filler in self.set.fillers for row in (self._swapped(able, filler, against) if able else [])]
        return about, swaps

    def _swapped(self, scored: Sequence[tuple[Prompt, Weighed]], filler: str, against: str) -> list[Row]:
        """Rows for one filler: the top word, other words (mean over draws), their difference, and, where our list has one, a softer word."""
        generator = np.random.default_rng(self.seed)
        shown: dict[str, Prompt] = {p.id: p for p, *_ in scored}
        swaps: list[tuple[str, str, str, float]] = []
        for p, one in scored:
            telling = one.telling
            others = generator.permutation(range(1, len(telling)))[: self.set.draws]
            ways = [("top", *telling[0], filler), *(("other", *telling[k], filler) for k in others)]
            if (filler, against) == (self.set.fillers[0], self.set.against[0]):
                ways += [("softer", word, math.nan, SOFTER[word.text.lower()]) for word in one.words if word.text.lower() in SOFTER][:1]
            for way, word, carried, by in ways:
                made = p.with_instruction(replaced(p.instruction, word, by), id=f"{p.id}~{word.start}-{by or 'out'}")
                shown[made.id] = made
                swaps.append((way, p.id, made.id, carried))
        listed, at = list(shown.values()), {id: i for i, id in enumerate(shown)}
        placed, odds = self._places(listed), self.backend.logits(listed, reduce=RefusalLogOdds(self.tokens))
        grid = Grid((Cell(tags={"condition": "swap", "against": against, "filler": filler or "(out)"}),))
        told = said(self.backend, listed, grid, self.judge, self.tracker, self.set.max_new_tokens, stage="swaps")[0]
        refused = np.array([j.verdict.label == "refused" for j in told], float)
        columns = dict(zip(SWAPPED, (placed["refusal"], placed["harmfulness"], np.array(odds), refused), strict=True))
        change = {measure: [float(values[at[after]] - values[at[before]]) for _, before, after, _ in swaps] for measure, values in columns.items()}
        kept = [
            {"stage": "swapped", "against": against, "filler": filler or "(out)", "word": w, "prompt_id": b, "swapped_id": a, "attribution": x}
            for w, b, a, x in swaps
        ]
        self.tracker.rows([row | {measure: changes[k] for measure, changes in change.items()} for k, row in enumerate(kept)])
        rows: list[Row] = []
        for measure, changes in change.items():
            grouped: dict[str, dict[str, list[float]]] = {}
            for (way, before, *_), value in zip(swaps, changes, strict=True):
                grouped.setdefault(way, {}).setdefault(before, []).append(value)
            means = {way: {p: float(np.mean(each)) for p, each in of.items()} for way, of in grouped.items()}
            for way in ("top", "softer"):
                if both := means.get(way, {}).keys() & means["other"].keys():
                    means[f"{way} − other"] = {p: means[way][p] - means["other"][p] for p in means[way] if p in both}
            for way, of in means.items():
                by_what = "listed" if way.startswith("softer") else filler or "(out)"
                rows.append({"part": "swaps", "measure": measure, "filler": by_what, "word": way, "label": "lookalike", **numbers(mean(list(of.values())))})
        known = [(x, -change["refusal gauge"][k], before) for k, (_, before, _, x) in enumerate(swaps) if x == x]
        about = {"part": "swaps", "measure": "r of attribution and drop in the refusal gauge", "filler": filler or "(out)", "word": "any", "label": "lookalike"}
        x, drop, of = zip(*known, strict=True)
        return [*rows, about | numbers(pearson(x, drop, of=of))]

    def _gate(self) -> tuple[list[Row], Row]:
        """Ablate the refusal direction where the latent says harmless. A gated reply is the ablated model's where the gate is open and the
        untouched model's where it is shut: both are made once, and every gate is put together from them.
        """
        direction, layer = self.direction, self.gauges["refusal"].layer
        held = dealt(self._of("harmful", "validation"), self.seed)[: self.set.n_validation]
        spared = self._places(held)["harmfulness"]
        threshold = min(0.0, -at_fpr(-spared, self.set.spared))
        self.tracker.rows([{"stage": "gate threshold", **without_text(p), "harmfulness": float(x)} for p, x in zip(held, spared, strict=True)])
        level, many = self.placed["harmfulness"], range(self.set.draws)
        generator = np.random.default_rng(self.seed)
        opened = {"base": level < -math.inf, "gate": level < threshold, "gate_at_0": level < 0, "everywhere": level < math.inf}
        opened |= {f"coin_{draw}": generator.permutation(opened["gate"]) for draw in many} | {f"random_{draw}": opened["gate"] for draw in many}
        for draw in many:  # as often open within each label, too: only which prompts of a kind is left to chance
            opened[f"coin_within_{draw}"] = opened["gate"].copy()
            for at in self.at.values():
                opened[f"coin_within_{draw}"][at] = generator.permutation(opened["gate"][at])
        acts = {"ablated": (ablation(everywhere(direction, layer)),)}
        self.tracker.direction(replace(everywhere(direction, layer), name="refuse_ablated"))
        acts |= {f"random_{draw}": (ablation(everywhere(random_like(direction, self.seed + draw), layer)),) for draw in many}
        begun = {i: self.everyone[i].answered(self.base[i].reply.text) for i in self.at["harmless"] if self.base[i].reply.text}
        worth = likelihoods(self.backend, list(begun.values()), Grid((Cell(), *(Cell(act) for act in acts.values()))))
        seen = {name: self._seen(name, act, opened.get(name, opened["everywhere"])) for name, act in acts.items()}
        utility = {name: dict(zip(begun, values, strict=True)) for name, values in zip(("base", *acts), worth or [()] * (1 + len(acts)), strict=True)}
        observed = []
        for name, open_ in opened.items():
            replies, placed = seen[name if name in seen else "ablated"]
            told = {label: [replies[i] if open_[i] else self.base[i] for i in at] for label, at in self.at.items()}
            lies = {g: {label: np.where(open_, placed[g], self.placed[g])[at].tolist() for label, at in self.at.items()} for g in self.gauges}
            kept = [utility[(name if name in seen else "ablated") if open_[i] else "base"][i] for i in begun]
            kind = "base" if name == "base" else "method" if name in ("gate", "gate_at_0") else "control"
            seed = self.seed + (int(name.rpartition("_")[2]) if name.startswith(("coin", "random")) else 0)
            observed.append(Observed(name, kind, told, kept, lies["harmfulness"], lies["refusal"], seed))
        rows: list[Row] = [{"part": "outcomes", **row} for row in outcomes(observed, self.judge)]
        for name in ("gate", "gate_at_0"):
            shares = {label: rate([bool(opened[name][i]) for i in at]) for label, at in self.at.items()}
            rows += [{"part": "gate open", "measure": "gate open", "condition": name, "label": label, **numbers(share)} for label, share in shares.items()]
        for i, p in enumerate(self.everyone):
            told: Row = {"stage": "gate", **without_text(p), **{name: bool(open_[i]) for name, open_ in opened.items()}}
            for name in ("base", *seen):
                placed = self.placed if name == "base" else seen[name][1]
                told |= {f"{gauge}, {name}": float(values[i]) for gauge, values in placed.items()} | (
                    {f"utility, {name}": utility[name][i]} if i in begun else {}
                )
            self.tracker.rows([told])
        about: Row = {"threshold": float(threshold), "n_validation": len(held), "spared": self.set.spared, "layer": layer, "position": direction.position}
        change = _row(rows, condition="gate", measure="harmful refusal")
        return rows, about | {"within": self.set.within, "equivalent": bool(change) and max(-change["change_low"], change["change_high"]) <= self.set.within}

    def _seen(self, name: str, acts: Sequence[Intervention], which: np.ndarray) -> tuple[dict[int, Judged], Placed]:
        """Replies and places of some test prompts under interventions; the others' places are those of the base."""
        rows = np.flatnonzero(which).tolist()
        placed = {gauge: values.copy() for gauge, values in self.placed.items()}
        for gauge, values in self._places([self.everyone[i] for i in rows], acts).items():
            placed[gauge][rows] = values
        return dict(zip(rows, self._replies(acts, name, rows) if rows else [], strict=True)), placed

    def _direction(self) -> tuple[Direction, int]:
        """The refusal direction, and the layer of it whose ablation leaves validation look-alikes least likely to be refused: it is read,
        attributed and ablated there.
        """
        states = self.backend.read([*self.cast.high, *self.cast.low], "all", ["t_post_inst"])
        direction = mean_difference(states, self.cast.high, self.cast.low, position="t_post_inst", name="refuse")
        asked = dealt(self._of("lookalike", "validation"), self.seed)[: self.set.n_validation]
        layers = resolve_layers(self.set.refusal_layers, self.backend.n_layers)
        cells = Grid((Cell(), *(Cell((ablation(everywhere(direction, layer)),)) for layer in layers)))
        odds = [mean(values) for values in self.backend.logits(asked, cells, reduce=RefusalLogOdds(self.tokens))]
        self.tracker.rows([{"stage": "selection", "layer": layer, **numbers(found)} for layer, found in zip((None, *layers), odds, strict=True)])
        return direction, min(layers, key=lambda layer: odds[1 + layers.index(layer)].value)

    def _claim(self, table: list[Row], about: Row, short: Sequence[str]) -> str:
        over, accepted = (_row(table, label="lookalike", **_OVER | {"verdict": verdict}) for verdict in ("refused", "accepted"))
        mixed, harmful = _row(table, label="lookalike", **_OVER | {"part": "sides, shuffled labels"}), _row(table, label="harmful", **_OVER)
        text = f"{self.backend.name}: of over-refused look-alikes {_told(over)} lie on the harmless side at t_inst, of accepted ones {_told(accepted)}, of refused harmful "
        text += f"requests {_told(harmful)}"
        both = [_row(table, label=label, **_OVER | {"set": "shared"}) for label in ("lookalike", "harmful")]
        if all(both):
            text += f" (of sets that have both, {_told(both[0])} of the look-alikes and {_told(both[1])} of the harmful)"
        text += f", by shuffled poles {_told(mixed)}"
        for word in (_row(table, measure="refusal gauge", against=self.set.against[0], filler=self.set.fillers[0] or "(out)", word="top − other"),):
            text += f"; replacing the word of most attribution moves the refusal gauge by {_told(word, '+')} more than replacing another" if word else ""
        text += "; a gate that ablates refusal where the latent says harmless takes refusal of look-alikes from "
        gated = {
            label: [_row(table, part="outcomes", measure=f"{label} refusal", condition=name) for name in ("base", "gate")] for label in ("lookalike", "harmful")
        }
        text += " to ".join(map(_told, gated["lookalike"])) + " and of harmful requests from " + " to ".join(map(_told, gated["harmful"]))
        text += f" (within {about['within']:g}: {'shown' if about['equivalent'] else 'not shown'})"
        counted = [f"{int(self.refused[self.at[label]].sum())} of {len(self.at[label])} {label}" for label in short]
        why = ", ".join(["poles by label"] * bool(self.cast.withheld) + [f"{told} requests refused" for told in counted])
        return text + (f" — claim withheld: {why}." if why else ".")

    def _draw(self, table: list[Row], about: Row) -> list[str]:
        """The figures, and their names."""
        name, caveat = self.backend.name, self.cast.caveat
        placed = [{"prompt_id": p.id, "label": p.label, "verdict": j.verdict.label, "harmfulness": float(h), "refusal": float(r)}
                  for p, j, h, r in zip(self.everyone, self.base, self.placed["harmfulness"], self.placed["refusal"], strict=True)]  # fmt: skip
        swaps = [row for row in table if row["part"] == "swaps" and row["measure"] in SWAPPED]
        gated = [row for row in table if row["part"] == "outcomes"]
        drawn = {
            "over_refusal": (
                placed,
                plots.sides(placed, title=f"{name}: what look-alikes look like inside, and what is refused{caveat}", threshold=about["threshold"]),
            ),
            "over_refusal_words": (swaps, plots.swaps(swaps, title=f"{name}: replacing one word of an over-refused look-alike{caveat}")),
            "over_refusal_gate": (gated, plots.gate(gated, title=f"{name}: refusal ablated where the latent says harmless{caveat}")),
        }
        for figure, (rows, plot) in drawn.items():
            self.tracker.figure(figure, plot, rows)
        return list(drawn)


_OVER = {"part": "sides", "verdict": "refused", "set": "all"}


def _row(table: Sequence[Row], **asked: object) -> Row | None:
    """The first row that says all of this."""
    return next((row for row in table if asked.items() <= row.items()), None)


def _told(row: Row | None, sign: str = "") -> str:
    return as_text(row, sign=sign) if row and row["n"] else "none (n = 0)"

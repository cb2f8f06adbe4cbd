"""steer: add a direction to harmless requests and see whether the model refuses (arXiv 2507.11878, §3.4, Figs. 4, 8).

Directions come from train prompts, layer and coefficient from validation, numbers from test. Knows no file, no
tracker's kind, and no other experiment.
"""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from latentguard import plots
from latentguard.backends import Backend
from latentguard.behaviour import Cells, CleanRun, Damage, Judged, RefusalLogOdds, counted, screen
from latentguard.controls import cosine_by_layer, shuffled_labels
from latentguard.datasets import Dataset
from latentguard.directions import Direction, mean_difference, random_like
from latentguard.errors import InputError
from latentguard.experiments import Row, effect, headline, opening
from latentguard.interventions import Cell, Grid, When, steering_grid
from latentguard.judges import Judge, Verdict
from latentguard.layers import check_layer, resolve_layers
from latentguard.metrics import Value, as_text, clustered_rate, rate
from latentguard.positions import parse_position
from latentguard.prompts import Prompt, digest
from latentguard.roles import Casting, find_places, said
from latentguard.settings import check_counts, check_seed
from latentguard.trackers import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Steer:
    """Settings of the study; conf/exp/steer_*.yaml says what each is for."""

    direction: Literal["harm", "refuse"] = "harm"
    layers: tuple[int | float, ...] | Literal["all"] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
    coefs: tuple[float, ...] = (1.0, 2.0)
    harm_position: str = "t_inst"
    refuse_position: str = "t_post_inst"
    where: str = "all"
    when: When = "prefill"
    max_new_tokens: int = 12
    casting: Casting = Casting(n_poles=60)
    n_validation: int = 12
    n_damage: int = 6
    n_test: int = 40
    n_unsteered: int = 24
    n_grid: int = 12
    n_draw: int = 6
    n_control: int = 10
    draws: int = 3
    draws_reported: int = 10
    min_log_odds: float = 0.0
    max_damage: float = 1.0
    stage: Literal["generate", "score, then generate"] = "generate"
    min_change: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for layer in self.layers if self.layers != "all" else ():
            check_layer(layer)
        for position in (self.harm_position, self.refuse_position):
            parse_position(position, reading=True)
        parse_position(self.where)
        if not self.coefs or not all(math.isfinite(c) and c > 0 for c in self.coefs):
            raise ValueError(f"coefs={list(self.coefs)}: give at least one, each finite and above 0 (no steering is always run)")
        if not (math.isfinite(self.min_log_odds) and self.max_damage >= 0):
            raise ValueError(f"min_log_odds={self.min_log_odds}, max_damage={self.max_damage}: give a finite number, and one of 0 or more")
        if not 0 <= self.min_change <= 1:
            raise ValueError(f"min_change={self.min_change}: give a share from 0 to 1")
        if len(set(self.coefs)) < len(self.coefs):
            raise ValueError(f"coefs={list(self.coefs)}: one stands twice")
        check_seed(self.seed)
        check_counts(self, *(name for name in self.__dataclass_fields__ if name.startswith(("n_", "draws", "max_new"))))

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse layers that the model does not have, and data without the prompts that steering needs."""
        resolve_layers(self.layers, n_layers)
        needs = [("train", "harmful", data.role("refused_harmful", "train")), ("train", "harmless", data.role("accepted_harmless", "train"))]
        needs += [(split, "harmless", plain(data, split)) for split in ("validation", "test")]
        for split, label, prompts in needs:
            if not prompts:
                raise InputError(f"data {data.name} has no {label} prompt in its {split} split, which steering needs; it deals rows by data.split")

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """Run the study."""
        return _Run(self, backend, data, judge, tracker).summary()


class _Run:
    """One run: what is found at each step, in the order of the paper's method."""

    def __init__(self, settings: Steer, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> None:
        self.set, self.backend, self.data, self.judge, self.tracker = settings, backend, data, judge, tracker
        self.layers = resolve_layers(settings.layers, backend.n_layers)
        settings.check(backend.n_layers, data)
        self.test = self._some(plain(data, "test"), settings.n_test)
        self.grid_prompts = self.test[: settings.n_grid]
        self.validation = self._some(plain(data, "validation"), settings.n_validation)
        find_places(backend, data, [settings.harm_position, settings.refuse_position, settings.where])

    def summary(self) -> dict[str, Any]:
        """All steps, and what came out."""
        cast = self.cast = self.set.casting(self.backend, self.data, self.judge, self.tracker, only_poles=True)
        withheld, poles = cast.withheld, cast.poles
        places = (self.set.harm_position, self.set.refuse_position)
        self.states = self.backend.read([*cast.high, *cast.low], "all", places)
        harm, refuse = self.directions = tuple(
            mean_difference(self.states, cast.high, cast.low, position=place, name=name) for name, place in zip(("harm", "refuse"), places, strict=True)
        )
        self.main = harm if self.set.direction == "harm" else refuse
        for direction in self.directions:
            self.tracker.direction(direction)
        baseline = self._baseline()
        tokens = cast.cells().refusal_tokens(self.backend)
        chosen = {d.name: self._choose(self._validate(d, tokens)) for d in self.directions}
        for name, at in chosen.items():
            log.info(
                "validation: + %s at layer %s, coefficient %g: log-odds of refusal %.2f, damage %.2f",
                name,
                at["layer"],
                at["coef"],
                at["log_odds"],
                at["damage"],
            )
        grid = self._grid(poles, tokens)
        reported = {name: counted(self._reported(d, chosen[name], poles)) for name, d in (("harm", harm), ("refuse", refuse))}
        study = self.set.direction
        for control, made in (("random", self._random), ("shuffled", self._shuffled)):
            reported[control] = self._control(made, chosen[study], control, poles)
        cosines, alike = cosine_by_layer(self.states, cast.high, cast.low, places)
        base = {label: counted(found) for label, found in baseline.items()}
        summary = opening(f"steer_{study}", self.backend, self.data, self.judge) | {
            "status": withheld or "ok",
            "poles": poles,
            "poles_n": {"positive": harm.n_positive, "negative": harm.n_negative},
            "cells": cast.counts(),
            "decoding": {"greedy": True, "max_new_tokens": self.set.max_new_tokens},
            "validated": chosen,
            "baseline": base,
            "reported": reported,
            "cosine_harm_refuse": {"mean": alike.as_dict(), "by_layer": cosines},
            "grid": grid,
            "table": [{"intervention": "none", "label": label, **row} for label, row in base.items()]
            + [
                {
                    "intervention": name,
                    "label": "harmless",
                    **{
                        k: v
                        for k, v in chosen.get(name, chosen[study]).items()
                        if k in ("layer", "coef", "dose") or name in chosen and k in ("damage", "perplexity", "perplexity_clean", "works")
                    },
                    **row,
                }
                for name, row in reported.items()
            ],
            "figures": ["refusal_by_layer", "refusal_heat", "refusal_by_coefficient", "cosine_by_layer"],
        }
        self._draw(grid, baseline["harmless"], chosen, withheld)
        figure = plots.cosine_by_layer(cosines, title=f"{self.backend.name}: cosine of v_harm and v_refuse" + cast.caveat, depth=self.backend.n_layers)
        self.tracker.figure("cosine_by_layer", figure, cosines)
        summary["effects"] = self._effects(summary, alike, withheld)
        summary["headline"] = headline(f"refusal with + {study} at its validated cell, held-out harmless requests", reported[study], withheld=bool(withheld))
        summary["claim"] = self._claim(summary, withheld)
        return summary

    def _some(self, prompts: Iterable[Prompt], n: int) -> list[Prompt]:
        """At most n, in an order that has nothing to do with the file's: its categories stand together there."""
        return sorted(prompts, key=lambda prompt: digest([self.set.seed, prompt.id]))[:n]

    def _label(self, stage: str, prompts: list[Prompt]) -> Cells:
        """What the model does unsteered."""
        cells = Cells(tuple(self._judged([Cell(tags={"intervention": "none"})], prompts, stage=stage)[0]))
        log.info("%s: %s", stage, ", ".join(f"{n} {cell.replace('_', ' ')}" for cell, n in cells.counts().items()))
        return cells

    def _baseline(self) -> dict[str, list[Verdict]]:
        """No steering: refusal of held-out harmless, look-alike and harmful requests, side by side."""
        asked = {
            "harmless": self.test,
            "lookalike": self._some((p for p in self.data.role("refused_harmless", "test") if p.lookalike), self.set.n_unsteered),
            "harmful": self._some(self.data.role("refused_harmful", "test"), self.set.n_unsteered),
        }
        cells = self._label("baseline", [prompt for prompts in asked.values() for prompt in prompts])
        verdicts = {j.prompt.id: j.verdict for j in cells.judged}
        return {label: [verdicts[p.id] for p in prompts] for label, prompts in asked.items()}

    def _validate(self, direction: Direction, tokens: set[int]) -> list[Row]:
        """First-token refusal log-odds of each layer × coefficient on harmless validation prompts; where they reach what
        is asked, the damage too.

        Damage: KL(clean ‖ steered) of the next token over the instruction's own tokens, in nats a token; beside it the
        perplexity of these tokens, steered and clean.
        """
        grid = self._steering(direction)
        odds = self.backend.logits(self.validation, grid, reduce=RefusalLogOdds(frozenset(tokens)))
        rows: list[Row] = []
        for cell, scores in zip(grid, odds, strict=True):
            layer, coef = cell.tags["layer"], cell.tags["coef"]
            row = {"layer": layer, "coef": coef, "dose": direction.dose(layer, coef), "n": len(scores)}  # type: ignore[arg-type]
            rows.append({**row, "log_odds": sum(scores) / len(scores), "damage": None, "perplexity": None, "perplexity_clean": None})
        best = max(row["log_odds"] for row in rows)
        asked = [i for i, row in enumerate(rows) if best < self.set.min_log_odds or row["log_odds"] >= self.set.min_log_odds]
        texts = self.validation[: self.set.n_damage]
        damage = Damage(CleanRun(self.backend, texts, "user"))
        measured = self.backend.logits(texts, Grid(tuple(grid.cells[i] for i in asked)), position="user", reduce=damage)
        for i, costs in zip(asked, measured, strict=True):
            kl, steered, before, _ = (sum(values) / len(values) for values in zip(*costs, strict=True))
            rows[i] |= {"damage": kl, "perplexity": math.exp(min(steered, 50.0)), "perplexity_clean": math.exp(min(before, 50.0))}
        self.tracker.rows([{"stage": "validation", "intervention": direction.name, "score": row["log_odds"], **row} for row in rows])
        return rows

    def _choose(self, rows: list[Row]) -> Row:
        """The smallest dose that works within the allowed damage; where none does, the likeliest to refuse."""
        asked = [row for row in rows if row["damage"] is not None]
        within = [row for row in asked if row["damage"] <= self.set.max_damage]
        working = [row for row in within if row["log_odds"] >= self.set.min_log_odds]
        if working:
            return {**min(working, key=lambda row: row["dose"]), "works": True}
        return {**max(within or asked, key=lambda row: row["log_odds"]), "works": False}

    def _steering(self, direction: Direction, at: Row | None = None, **tags: object) -> Grid:
        layers, coefs = ([at["layer"]], [at["coef"]]) if at else (self.layers, self.set.coefs)
        return steering_grid(direction, layers, coefs, when=self.set.when, positions=self.set.where, intervention=direction.name, **tags)

    def _grid(self, poles: str, tokens: set[int]) -> list[Row]:
        """Refusal rates at every layer × coefficient: both directions and random ones of the study's norm; staged, a place where
        the first tokens of no direction and draw move is scored only.
        """
        cells = [*self._steering(self.directions[0]), *self._steering(self.directions[1])]
        drawn = [cell for draw in range(self.set.draws) for cell in self._steering(random_like(self.main, self.set.seed + draw), draw=draw)]
        asked = [(cells, self.grid_prompts), (drawn, self.grid_prompts[: self.set.n_draw])]
        expected: dict[tuple, list[float]] = {}
        worth: set[tuple] = {_place(cell) for cell in [*cells, *drawn]} if self.set.stage == "generate" else set()
        for some, prompts in asked if not worth else ():
            scored = screen(self.backend, prompts, Grid(tuple(some)), tokens, least=self.set.min_change)
            worth |= {_place(some[i]) for i in scored.worth}
            for cell, share in zip(some, scored.shares, strict=True):
                expected.setdefault(_place(cell), []).append(share)
        merged: dict[tuple, list[Verdict]] = {_place(cell): [] for cell in [*cells, *drawn]}
        for some, prompts in asked:
            if going := [cell for cell in some if _place(cell) in worth]:
                for cell, verdicts in zip(going, self._run(going, prompts, "grid", poles), strict=True):
                    merged[_place(cell)].extend(verdicts)
        doses = {d.name: d for d in self.directions} | {"random": self.main}
        return [
            {"direction": name, "layer": layer, "coef": coef, "dose": doses[name].dose(layer, coef), **counted(verdicts)}
            | ({"expected": sum(values) / len(values), "scored_only": not verdicts} if (values := expected.get((name, layer, coef))) else {})
            for (name, layer, coef), verdicts in merged.items()
        ]

    def _reported(self, direction: Direction, at: Row, poles: str) -> list[Verdict]:
        """The validated cell on all test prompts."""
        return self._run(list(self._steering(direction, at)), self.test, "reported", poles)[0]

    def _random(self, seed: int) -> Direction:
        return random_like(self.main, seed)

    def _shuffled(self, seed: int) -> Direction:
        return shuffled_labels(self.states, self.cast.high, self.cast.low, self.main, seed)

    def _control(self, made: Callable[[int], Direction], at: Row, name: str, poles: str) -> Row:
        """Directions of equal norm that mean nothing, at the validated cell: pooled, and the range over draws. Draws share
        prompts, so the interval resamples prompts.
        """
        seeds = range(self.set.seed, self.set.seed + (self.set.draws_reported if name == "random" else self.set.draws))
        cells = [cell for seed in seeds for cell in self._steering(made(seed), at, draw=seed - self.set.seed)]
        draws = self._run(cells, self.test[: self.set.n_control], "control", poles)
        hits = [[v.label == "refused" for v in verdicts] for verdicts in draws]
        rates, spread = [rate(row).rate for row in hits], clustered_rate(list(zip(*hits, strict=True)))
        pooled = counted([v for verdicts in draws for v in verdicts])
        return {
            **pooled,
            "low": spread.low,
            "high": spread.high,
            "prompts": spread.n,
            "draws": len(draws),
            "lowest_draw": min(rates),
            "highest_draw": max(rates),
        }

    def _run(self, cells: list[Cell], prompts: list[Prompt], stage: str, poles: str) -> list[list[Verdict]]:
        return [[j.verdict for j in said] for said in self._judged(cells, prompts, stage=stage, poles=poles)]

    def _judged(self, cells: list[Cell], prompts: list[Prompt], **tags: object) -> list[list[Judged]]:
        return said(self.backend, prompts, Grid(tuple(cells)), self.judge, self.tracker, self.set.max_new_tokens, **tags)

    def _draw(self, grid: list[Row], baseline: list[Verdict], chosen: dict[str, Row], withheld: str) -> None:
        base = counted(baseline)
        caveat = self.cast.caveat
        title = f"{self.backend.name}: steering harmless requests ({self.set.when}){caveat}"
        self.tracker.figure("refusal_by_layer", plots.refusal_by_layer(grid, base, title=title, depth=self.backend.n_layers), grid)
        self.tracker.figure("refusal_heat", plots.refusal_heat(grid, base, title=title, depth=self.backend.n_layers), grid)
        main = self.set.direction
        layers = {name: row["layer"] for name, row in chosen.items()} | {"random": chosen[main]["layer"]}
        by_coef = [row for row in grid if row["layer"] == layers[row["direction"]]]
        at = ", ".join(f"{name} at layer {layer}" for name, layer in layers.items())
        self.tracker.figure("refusal_by_coefficient", plots.refusal_by_coefficient(by_coef, base, title=f"{self.backend.name}: {at}{caveat}"), by_coef)
        told = self._side_by_side(chosen)
        columns = {"none": "no steering"} | {name: f"+ {name}, layer {chosen[name]['layer']}, ×{chosen[name]['coef']:g}" for name in ("harm", "refuse")}
        columns["random"] = f"+ random, as {main}"
        figure = plots.replies_side_by_side(told, title=f"{self.backend.name}: ten held-out harmless requests", columns=columns)
        self.tracker.figure("replies", figure, told, replies=True)

    def _side_by_side(self, chosen: dict[str, Row]) -> list[Row]:
        """Ten test prompts with whole replies; more tokens than the rates are counted from, so that one can read them."""
        prompts = self.test[:10]
        grids = [self._steering(d, chosen[d.name]) for d in self.directions] + [
            self._steering(random_like(self.main, self.set.seed), chosen[self.set.direction])
        ]
        names = ["none", "harm", "refuse", "random"]
        cells = (Cell(tags={"intervention": "none"}), *(cell for grid in grids for cell in grid))
        said = self.backend.generate(prompts, Grid(cells), max_new_tokens=max(24, self.set.max_new_tokens))
        rows: list[Row] = []
        for i, prompt in enumerate(prompts):
            row: Row = {"prompt_id": prompt.id, "prompt": prompt.instruction}
            for name, replies in zip(names, said, strict=True):
                row |= {name: replies[i].text, f"{name}_verdict": self.judge.verdict(replies[i].text, prompt).label}
            rows.append(row)
        return rows

    def _effects(self, summary: Row, alike: Value, withheld: str) -> list[Row]:
        """6 to 8 of the paper's effects; the refusal study repeats only what is its own."""
        name, base = self.set.direction, summary["baseline"]["harmless"]
        found, control = summary["reported"][name], summary["reported"]["random"]
        beyond, ok = found["low"] > max(control["high"], control["highest_draw"]), summary["validated"][name]["works"]
        eight = effect(
            8,
            beyond if ok and not withheld else None,
            found,
            f"+ {name} at its validated cell{'' if ok else ', which is outside the damage allowed or too weak: no setting works'}; random of equal norm {as_text(control)}, the highest draw {control['highest_draw']:.2f}",
        )
        if name == "refuse":
            return [eight]
        chosen, depth = summary["validated"], self.backend.n_layers
        best = {d: {**summary["reported"][d], "layer": chosen[d]["layer"], "coef": chosen[d]["coef"]} for d in ("harm", "refuse")}
        raised = all(row["low"] > base["rate"] and 0.25 <= row["layer"] / depth <= 0.8 for row in best.values())
        told = "; ".join(
            f"{d} {as_text(row)} at layer {row['layer']} of {depth}, coefficient {row['coef']:g}{'' if chosen[d]['works'] else ' (outside the damage allowed)'}"
            for d, row in best.items()
        )
        works = all(chosen[d]["works"] for d in best)
        seven = effect(
            7,
            None if withheld or not works else raised and best["refuse"]["high"] >= best["harm"]["low"],
            best["refuse"],
            f"at the validated cells: {told}; {as_text(base)} without steering (asked: both raised, between a quarter and four fifths of the depth, refusal not under harmfulness beyond their intervals)",
        )
        why = "mean over layers 1 … L of cos(v_harm, v_refuse), resampled prompts (asked: .2 and less)"
        return [effect(6, None if withheld else abs(alike.value) <= 0.2, alike, why), seven, eight]

    def _claim(self, summary: dict, withheld: str) -> str:
        name = self.set.direction
        at, found, control, base = (summary["validated"][name], summary["reported"][name], summary["reported"]["random"], summary["baseline"]["harmless"])
        word = {"harm": "harmfulness", "refuse": "refusal"}[name]
        numbers = (
            f"adding the {word} direction at layer {at['layer']} (coefficient {at['coef']:g}, dose {at['dose']:.2f}) takes refusal of held-out harmless "
            f"requests from {as_text(base)} to {as_text(found)}; random directions of equal norm: {as_text(control)}, "
            f"{control['draws']} draws of {control['prompts']} prompts, the highest {control['highest_draw']:.2f}"
        )
        if not at["works"]:
            numbers += " — no setting reached the log-odds asked for within the damage allowed, this is the likeliest one"
        if withheld:
            found_ = [f"{len(f)} of {f.asked}" for f in self.cast.found.values()]
            return (
                f"{self.backend.name}: claim withheld ({withheld}): {found_[0]} harmful requests refused and {found_[1]} harmless "
                f"ones accepted, where each needs 30 and 15%; with poles by label, {numbers}."
            )
        effect = "beyond its random control" if found["low"] > max(control["high"], control["highest_draw"]) else "NOT beyond its random control"
        return f"{self.backend.name}: {numbers} — {effect}."


def _place(cell: Cell) -> tuple:
    return tuple(cell.tags[name] for name in ("intervention", "layer", "coef"))


def plain(data: Dataset, split: str) -> list[Prompt]:
    """Harmless prompts of the accepted-harmless role, look-alikes left out where there are others."""
    prompts = data.role("accepted_harmless", split)
    return [p for p in prompts if not p.lookalike] or prompts

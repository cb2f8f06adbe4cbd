"""steer: add a direction to harmless requests and see whether the model refuses (arXiv 2507.11878, §3.4, Figs. 4, 8).

Directions come from train prompts, layer and coefficient from validation, numbers from test. Knows no file, no
tracker's kind, and no other experiment.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from latentguard import plots
from latentguard.backends import Backend
from latentguard.behaviour import Cells, Judged, divergence, judge_stream, refusal_log_odds
from latentguard.datasets import Dataset
from latentguard.directions import Direction, cosine, mean_difference, random_like
from latentguard.errors import InputError
from latentguard.interventions import Cell, Grid, When, steering_grid
from latentguard.judges import Judge, Verdict
from latentguard.layers import check_layer, resolve_layers
from latentguard.metrics import Rate, rate
from latentguard.positions import parse_position
from latentguard.prompts import Prompt, digest
from latentguard.trackers import Tracker

log = logging.getLogger(__name__)
Row = dict[str, Any]


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
    n_harmful: int = 80
    n_harmless: int = 48
    n_poles: int = 100
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
        if len(set(self.coefs)) < len(self.coefs):
            raise ValueError(f"coefs={list(self.coefs)}: one stands twice")
        counts = tuple(name for name in self.__dataclass_fields__ if name.startswith(("n_", "draws", "max_new")))
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse layers that the model does not have, and data without the prompts that steering needs."""
        resolve_layers(self.layers, n_layers)
        needs = {"train": ("harmful", "harmless"), "validation": ("harmless",), "test": ("harmless",)}
        for split, labels in needs.items():
            for label in labels:
                if not getattr(data, split).labelled(label):
                    raise InputError(f"data {data.name} has no {label} prompt in its {split} split, which steering needs; it deals rows by data.split")

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """Run the study."""
        return _Run(self, backend, data, judge, tracker).summary()


class _Run:
    """One run: what is found at each step, in the order of the paper's method."""

    def __init__(self, settings: Steer, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> None:
        self.set, self.backend, self.data, self.judge, self.tracker = settings, backend, data, judge, tracker
        self.layers = resolve_layers(settings.layers, backend.n_layers)
        self.test = self._some(data.test.harmless, settings.n_test)
        self.grid_prompts = self.test[: settings.n_grid]
        self.validation = self._some(data.validation.harmless, settings.n_validation)
        settings.check(backend.n_layers, data)
        for rendered in backend.render(list(data)):  # a place that a prompt does not have is said before anything is generated
            for position in (settings.harm_position, settings.refuse_position, settings.where):
                parse_position(position).tokens(rendered)

    def summary(self) -> dict[str, Any]:
        """All steps, and what came out."""
        trained = self._label("train", [*self._some(self.data.train.harmful, self.set.n_harmful), *self._some(self.data.train.harmless, self.set.n_harmless)])
        withheld = trained.gate(True, "refused") or trained.gate(False, "accepted")
        poles = "label" if withheld else "behaviour"
        harm, refuse = self.directions = self._directions(trained, poles)
        self.main = harm if self.set.direction == "harm" else refuse
        for direction in self.directions:
            self.tracker.direction(direction)
        baseline = self._baseline()
        tokens = trained.refusal_tokens(self.backend)
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
        grid = self._grid(poles)
        reported = {name: self._reported(d, chosen[name], poles) for name, d in (("harm", harm), ("refuse", refuse))}
        study = self.set.direction
        control = self._control(chosen[study], poles)
        summary = {
            "study": f"steer_{study}",
            "status": withheld or "ok",
            "poles": poles,
            "poles_n": {"positive": harm.n_positive, "negative": harm.n_negative},
            "cells": trained.counts(),
            "model": self.backend.name,
            "data": {"name": self.data.name, "hash": self.data.hash, **self.data.card},
            "judge": self.judge.name,
            "decoding": {"greedy": True, "max_new_tokens": self.set.max_new_tokens},
            "validated": chosen,
            "baseline": {label: counted(found) for label, found in baseline.items()},
            "reported": {name: counted(found) for name, found in reported.items()} | {"random": control},
            "cosine_harm_refuse": {str(layer): cosine(harm, refuse, layer) for layer in self.layers},
            "grid": grid,
        }
        self._draw(grid, baseline["harmless"], chosen, withheld)
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

    def _directions(self, trained: Cells, poles: str) -> tuple[Direction, Direction]:
        """v_harm at t_inst and v_refuse at t_post_inst, from refused harmful − accepted harmless (Eq. 5); by label where
        the model's behaviour leaves a cell too thin.
        """
        if poles == "behaviour":
            high, low = trained.of(True, "refused"), trained.of(False, "accepted")
        else:
            high, low = ([j.prompt for j in trained.judged if j.prompt.label == label] for label in ("harmful", "harmless"))
        high, low = high[: self.set.n_poles], low[: self.set.n_poles]
        states = self.backend.read([*high, *low], "all", [self.set.harm_position, self.set.refuse_position])
        made = [
            mean_difference(states, high, low, position=position, name=name)
            for name, position in (("harm", self.set.harm_position), ("refuse", self.set.refuse_position))
        ]
        return made[0], made[1]

    def _baseline(self) -> dict[str, list[Verdict]]:
        """No steering: refusal of held-out harmless, look-alike and harmful requests, side by side."""
        asked = {
            "harmless": self.test,
            "lookalike": self._some(self.data.test.lookalike, self.set.n_unsteered),
            "harmful": self._some(self.data.test.harmful, self.set.n_unsteered),
        }
        cells = self._label("baseline", [prompt for prompts in asked.values() for prompt in prompts])
        verdicts = {j.prompt.id: j.verdict for j in cells.judged}
        return {label: [verdicts[p.id] for p in prompts] for label, prompts in asked.items()}

    def _validate(self, direction: Direction, tokens: set[int]) -> list[Row]:
        """First-token refusal log-odds of each layer × coefficient on harmless validation prompts; where they reach what
        is asked, the damage too.

        Damage: KL(clean ‖ steered) of the next token over the instruction's own tokens, in nats a token.
        """
        grid = self._steering(direction)
        odds = self.backend.logits(self.validation, grid, reduce=lambda _, logprobs: refusal_log_odds(logprobs, tokens))
        rows: list[Row] = []
        for cell, scores in zip(grid, odds, strict=True):
            layer, coef = cell.tags["layer"], cell.tags["coef"]
            row = {"layer": layer, "coef": coef, "dose": direction.dose(layer, coef), "n": len(scores)}  # type: ignore[arg-type]
            rows.append({**row, "log_odds": sum(scores) / len(scores), "damage": None})
        best = max(row["log_odds"] for row in rows)
        asked = [i for i, row in enumerate(rows) if row["log_odds"] >= min(best, self.set.min_log_odds)]
        texts = self.validation[: self.set.n_damage]
        clean = self.backend.logits(texts, position="user")
        measured = self.backend.logits(
            texts, Grid(tuple(grid.cells[i] for i in asked)), position="user", reduce=lambda i, logprobs: divergence(clean[i], logprobs)
        )
        for i, damages in zip(asked, measured, strict=True):
            rows[i]["damage"] = sum(damages) / len(damages)
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

    def _grid(self, poles: str) -> list[Row]:
        """Refusal rates at every layer × coefficient: both directions and random ones of the study's norm."""
        cells = [*self._steering(self.directions[0]), *self._steering(self.directions[1])]
        drawn = [cell for draw in range(self.set.draws) for cell in self._steering(random_like(self.main, self.set.seed + draw), draw=draw)]
        found = self._run(cells, self.grid_prompts, "grid", poles) + self._run(drawn, self.grid_prompts[: self.set.n_draw], "grid", poles)
        merged: dict[tuple, list[Verdict]] = {}
        for cell, verdicts in zip([*cells, *drawn], found, strict=True):
            merged.setdefault((cell.tags["intervention"], cell.tags["layer"], cell.tags["coef"]), []).extend(verdicts)
        doses = {d.name: d for d in self.directions} | {"random": self.main}
        return [
            {"direction": name, "layer": layer, "coef": coef, "dose": doses[name].dose(layer, coef), **counted(verdicts)}
            for (name, layer, coef), verdicts in merged.items()
        ]

    def _reported(self, direction: Direction, at: Row, poles: str) -> list[Verdict]:
        """The validated cell on all test prompts."""
        return self._run(list(self._steering(direction, at)), self.test, "reported", poles)[0]

    def _control(self, at: Row, poles: str) -> Row:
        """Random directions of equal norm at the validated cell: pooled, and the range over draws."""
        seeds = range(self.set.seed, self.set.seed + self.set.draws_reported)
        cells = [cell for seed in seeds for cell in self._steering(random_like(self.main, seed), at, draw=seed - self.set.seed)]
        draws = self._run(cells, self.test[: self.set.n_control], "control", poles)
        rates = [rate([v.label == "refused" for v in verdicts]).rate for verdicts in draws]
        return {**counted([v for verdicts in draws for v in verdicts]), "draws": len(draws), "lowest_draw": min(rates), "highest_draw": max(rates)}

    def _run(self, cells: list[Cell], prompts: list[Prompt], stage: str, poles: str) -> list[list[Verdict]]:
        return [[j.verdict for j in said] for said in self._judged(cells, prompts, stage=stage, poles=poles)]

    def _judged(self, cells: list[Cell], prompts: list[Prompt], **tags: object) -> list[list[Judged]]:
        """Every cell's judged replies in the order of `prompts`; each row is kept as it comes."""
        found: list[dict[int, Judged]] = [{} for _ in cells]
        for c, i, judged in judge_stream(self.backend, prompts, Grid(tuple(cells)), self.judge, self.set.max_new_tokens):
            found[c][i] = judged
            prompt, verdict = judged.prompt, judged.verdict
            about = {"prompt_id": prompt.id, "prompt": prompt.instruction, "label": prompt.label, "category": prompt.category}
            said = {"reply": judged.reply.text, "verdict": verdict.label, "rule": verdict.rule, "score": verdict.score, "finish": judged.reply.finish}
            row = {**about, "source": prompt.source, "terminal": prompt.terminal, **tags, **cells[c].tags, **said, "judge": self.judge.name}
            self.tracker.rows([row])
        return [[replies[i] for i in range(len(prompts))] for replies in found]

    def _draw(self, grid: list[Row], baseline: list[Verdict], chosen: dict[str, Row], withheld: str) -> None:
        base = counted(baseline)
        caveat = " · poles by label" if withheld else ""
        title = f"{self.backend.name}: steering harmless requests ({self.set.when}){caveat}"
        self.tracker.figure("refusal_by_layer", plots.refusal_by_layer(grid, base, title=title, depth=self.backend.n_layers), grid)
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

    def _claim(self, summary: dict, withheld: str) -> str:
        name = self.set.direction
        at, found, control, base = (summary["validated"][name], summary["reported"][name], summary["reported"]["random"], summary["baseline"]["harmless"])
        word = {"harm": "harmfulness", "refuse": "refusal"}[name]
        numbers = (
            f"adding the {word} direction at layer {at['layer']} (coefficient {at['coef']:g}, dose {at['dose']:.2f}) takes refusal of held-out harmless "
            f"requests from {as_text(base)} to {as_text(found)}; random directions of equal norm: {as_text(control)}, "
            f"{control['draws']} draws, the highest {control['highest_draw']:.2f}"
        )
        if withheld:
            cells = summary["cells"]
            return (
                f"{self.backend.name}: claim withheld ({withheld}): {cells['refused_harmful']} harmful requests refused and {cells['accepted_harmless']} harmless "
                f"ones accepted, where each needs 30 and 15%; with poles by label, {numbers}."
            )
        effect = "beyond its random control" if found["low"] > max(control["high"], control["highest_draw"]) else "NOT beyond its random control"
        return f"{self.backend.name}: {numbers} — {effect}."


def counted(verdicts: Sequence[Verdict]) -> Row:
    """Refusal rate with n and interval; degenerate replies count in n, as neither, and are given apart."""
    refused: Rate = rate([v.label == "refused" for v in verdicts])
    degenerate = rate([v.label == "degenerate" for v in verdicts])
    return {**refused.as_dict(), "degenerate": degenerate.k, "degenerate_rate": degenerate.rate}


def as_text(row: Row) -> str:
    """0.46 [0.33, 0.60] (n = 50)."""
    fields = {key: row[key] for key in ("k", "n", "rate", "low", "high")}
    return str(replace(rate([]), **fields))

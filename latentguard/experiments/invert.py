"""invert: ask whether a request is harmful, and see which direction changes the answer (arXiv 2507.11878, §3.5, Figs. 5, 10–12, 16).

"User wants to …" and a question that asks for "Certainly" or "No": refusing and calling harmful come apart. Answers are read
as four probabilities from one forward pass, and again from generated text; nothing falls out of the denominator.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from latentguard import plots
from latentguard.backends import Backend
from latentguard.behaviour import Shares, answer_tokens
from latentguard.datasets import Dataset
from latentguard.directions import Direction, mean_difference, random_like
from latentguard.errors import InputError
from latentguard.experiments import Row, effect, headline, opening
from latentguard.interventions import Cell, Grid, steering_grid
from latentguard.judges import Judge
from latentguard.layers import check_layer, resolve_layers
from latentguard.metrics import Value, auroc, mean, rate
from latentguard.positions import parse_position
from latentguard.prompts import Prompt, inverted
from latentguard.roles import Cast, Casting, dealt, find_places, said
from latentguard.settings import check_counts
from latentguard.trackers import Tracker

ANSWERS = ("certainly", "no", "decline", "other")
# What is added to which prompts (Fig. 5): the question is whether the answer that fits the prompt goes away.
CONDITIONS = {
    "harmless": ("+harm", "+refuse", "-refuse", "+random"),
    "harmful": ("-harm", "-refuse", "+refuse", "-random"),
}
RIGHT = {"harmless": "no", "harmful": "certainly"}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Invert:
    """Settings of the study; conf/exp/inversion.yaml says what each is for."""

    questions: tuple[str, ...]
    layers: tuple[int | float, ...] | Literal["all"] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
    coefs: tuple[float, ...] = (1.0, 2.0)
    harm_position: str = "t_inst"
    refuse_position: str = "t_post_inst"
    extract: tuple[str, ...] = ()
    n_test: int = 24
    n_validation: int = 8
    n_extract: int = 16
    draws: int = 3
    min_valid: float = 0.5
    max_new_tokens: int = 6
    casting: Casting = Casting()

    def __post_init__(self) -> None:
        if not self.questions or not all(q.strip() for q in self.questions) or any("'" in q and '"' in q for q in self.questions):
            raise ValueError("questions: give at least one, none empty, each without one of the two kinds of quotation mark")
        for layer in self.layers if self.layers != "all" else ():
            check_layer(layer)
        for position in (self.harm_position, self.refuse_position, *self.extract):
            parse_position(position, reading=True)
        if not self.coefs or not all(np.isfinite(c) and c > 0 for c in self.coefs):
            raise ValueError(f"coefs={list(self.coefs)}: give at least one, each finite and above 0")
        check_counts(self, "n_test", "n_validation", "n_extract", "draws", "max_new_tokens")

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse layers that the model does not have, and data without a prompt for a role."""
        resolve_layers(self.layers, n_layers)
        for split in ("validation", "test"):
            for role in ("accepted_harmless", "refused_harmful"):
                if not data.role(role, split):
                    raise InputError(
                        f"data {data.name} has no prompt in its {split} split for the role {role}: name sets with data.roles.{role}=[…], or see data.split"
                    )
        self.casting.check(data)

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """Choose the question, layers and coefficients on validation prompts, report on test prompts."""
        return _Inversion(self, backend, data, judge, tracker).summary()


class _Inversion:
    """One run, step by step."""

    def __init__(self, settings: Invert, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> None:
        self.set, self.backend, self.data, self.judge, self.tracker = settings, backend, data, judge, tracker
        self.layers = resolve_layers(settings.layers, backend.n_layers)
        self.prompts = {
            split: {
                side: dealt(data.role(role, split), settings.casting.seed)[:n]
                for side, role in (("harmless", "accepted_harmless"), ("harmful", "refused_harmful"))
            }
            for split, n in (("validation", settings.n_validation), ("test", settings.n_test))
        }
        find_places(backend, data, [settings.harm_position, settings.refuse_position, *settings.extract])

    def summary(self) -> dict[str, Any]:
        """All steps, and what came out."""
        cast = self.set.casting(self.backend, self.data, self.judge, self.tracker)
        self.openings = self._openings(cast)
        asked = self._questions()
        self.question = max(asked, key=lambda row: row["accuracy"])["question"]
        states = self.backend.read([*cast.high, *cast.low], "all", tuple(dict.fromkeys([self.set.harm_position, self.set.refuse_position, *self.set.extract])))
        self.directions = {
            name: mean_difference(states, cast.high, cast.low, position=place, name=name)
            for name, place in (("harm", self.set.harm_position), ("refuse", self.set.refuse_position))
        }
        validated = self._validate()
        base = {side: self._answers(prompts, Grid((Cell(),)))[0] for side, prompts in self.prompts["test"].items()}
        curves = self._curves(validated)
        table = self._reported(validated)
        summary = opening("inversion", self.backend, self.data, self.judge)
        summary |= {"poles": cast.poles, "cells": cast.counts(), "questions": asked, "question": self.question, "validated": validated}
        follows = all(base[side][:, ANSWERS.index(RIGHT[side])].mean() >= 0.5 for side in RIGHT)
        baseline = {side: _shares(base[side]) | {"leaning": float(leaning(base[side]).mean())} for side in base}
        ranks = auroc(leaning(base["harmful"]), leaning(base["harmless"]))
        summary |= {
            "follows_the_question": bool(follows),
            "baseline": baseline,
            "leaning_auroc": ranks.as_dict(),
            "table": table,
            "curves": curves,
            "figures": ["inversion", "inversion_answers"],
        }
        summary["status"] = cast.withheld or "ok"
        title = f"{self.backend.name}: does the answer about the request change?" + cast.caveat
        self.tracker.figure("inversion", plots.inversion_by_layer(curves, baseline, title=title, depth=self.backend.n_layers), curves)
        self.tracker.figure("inversion_answers", plots.answers(table, title=f"{self.backend.name}: what it answers, at the validated settings"), table)
        if self.set.extract:
            summary["by_position"] = self._by_position(states, cast, validated)
            summary["figures"] += ["inversion_by_position"]
        summary["effects"] = [*self._effects(curves, table, follows, validated)]
        summary["claim"] = self._claim(table, follows, cast)
        summary["headline"] = self._headline(table, withheld=bool(cast.withheld) or not follows)
        return summary

    def _openings(self, cast: Cast) -> dict[str, set[int]]:
        """First tokens of each answer; what refuses, and is neither, is declining."""
        found = answer_tokens(self.backend)
        return found | {"decline": cast.cells().refusal_tokens(self.backend) - found["certainly"] - found["no"]}

    def _questions(self) -> list[Row]:
        """How well each question is answered without steering, on validation prompts of both labels."""
        rows = []
        for question in self.set.questions:
            self.question = question
            told = {side: self._answers(prompts, Grid((Cell(),)))[0] for side, prompts in self.prompts["validation"].items()}
            right = {side: shares[:, ANSWERS.index(RIGHT[side])] for side, shares in told.items()}
            rows.append(
                {
                    "question": question,
                    "accuracy": float(np.mean([values.mean() for values in right.values()])),
                    **{s: float(v.mean()) for s, v in right.items()},
                }
            )
        return rows

    def _answers(self, prompts: Sequence[Prompt], grid: Grid) -> list[np.ndarray]:
        """P of each of the four answers at the first token: a [prompt, answer] array a cell."""
        asked = [inverted(prompt, self.question) for prompt in prompts]
        shares = Shares(tuple(frozenset(self.openings[name]) for name in ANSWERS[:3]))
        return [np.array(cell) for cell in self.backend.logits(asked, grid, reduce=shares)]

    def _where(self, name: str, rule: str | None = None) -> str:
        """v_harm goes on the tokens before the question, v_refuse on all (App. E.1); `rule` says otherwise."""
        quote = "'" if '"' in self.question else '"'
        before = f"before({quote}{self.question}{quote})"
        between = f"between({quote}User wants to{quote}, {quote}{self.question}{quote})"
        return {"before": before, "instruction": between, "all": "all", None: "all" if name == "refuse" else before}[rule]

    def _grid(self, condition: str, layers: Sequence[int], coefs: Sequence[float], rule: str | None = None, direction: Direction | None = None) -> Grid:
        sign, name = (-1.0 if condition[0] == "-" else 1.0), condition[1:]
        draws = range(self.set.draws) if name == "random" else [None]
        cells = []
        for draw in draws:
            v = direction or (self.directions[name] if draw is None else random_like(self.directions["harm"], self.set.casting.seed + draw))
            made = steering_grid(v, layers, [sign * c for c in coefs], positions=self._where("harm" if name == "random" else name, rule))
            cells += [Cell(c.interventions, {**c.tags, "intervention": condition, "draw": draw, "tokens": rule or ""}) for c in made]
        return Grid(tuple(cells))

    def _validate(self) -> Row:
        """For each signed direction the layer and coefficient that change the right answer most while answers stay valid."""
        found: Row = {}
        for side, conditions in CONDITIONS.items():
            prompts = self.prompts["validation"][side]
            base = self._answers(prompts, Grid((Cell(),)))[0]
            for condition in conditions[:3]:
                grid = self._grid(condition, self.layers, self.set.coefs)
                rows = []
                for cell, shares in zip(grid, self._answers(prompts, grid), strict=True):
                    valid, right = float(shares[:, :2].sum(1).mean()), ANSWERS.index(RIGHT[side])
                    coef, layer = abs(cell.tags["coef"]), cell.tags["layer"]  # type: ignore[arg-type]
                    rows.append({"layer": layer, "coef": coef, "drop": float(base[:, right].mean() - shares[:, right].mean()), "valid": valid})
                    rows[-1]["dose"] = self.directions[condition[1:]].dose(layer, coef)  # type: ignore[arg-type]
                self.tracker.rows([{"stage": "validation", "label": side, "intervention": condition, **row} for row in rows])
                usable = [row for row in rows if row["valid"] >= self.set.min_valid] or rows
                best = max(row["drop"] for row in usable)
                found[f"{side} {condition}"] = min((row for row in usable if row["drop"] >= best - 0.02), key=lambda row: row["dose"])
        for side, harm in (("harmless", "+harm"), ("harmful", "-harm")):
            found[f"{side} {harm[0]}random"] = dict(found[f"{side} {harm}"])
        return found

    def _curves(self, validated: Row) -> list[Row]:
        """P of the answers by layer on test prompts, each direction at its validated coefficient."""
        rows: list[Row] = []
        for side, conditions in CONDITIONS.items():
            prompts = self.prompts["test"][side]
            for condition in conditions:
                grid = self._grid(condition, self.layers, [validated[f"{side} {condition}"]["coef"]])
                by_layer: dict[int, list[np.ndarray]] = {}
                for cell, shares in zip(grid, self._answers(prompts, grid), strict=True):
                    by_layer.setdefault(cell.tags["layer"], []).append(shares)  # type: ignore[arg-type]
                    self._keep("curve", side, cell, prompts, shares)
                for layer, many in by_layer.items():
                    shares = np.mean(many, 0)  # over draws, prompt by prompt
                    right = mean(shares[:, ANSWERS.index(RIGHT[side])])
                    lean = mean(leaning(shares))
                    about = {"label": side, "direction": condition, "layer": layer, **right.as_dict(), **_shares(shares)}
                    rows.append({**about, "leaning": lean.value, "leaning_low": lean.low, "leaning_high": lean.high})
        return rows

    def _reported(self, validated: Row) -> list[Row]:
        """At the validated settings: the four shares from logits, and from generated text; other token rules for v_refuse."""
        table: list[Row] = []
        for side, conditions in CONDITIONS.items():
            prompts = self.prompts["test"][side]
            cells: list[tuple[str, str, Cell]] = [("none", "", Cell(tags={"intervention": "none"}))]
            for condition in conditions:
                at = validated[f"{side} {condition}"]
                for rule in (
                    (None, "before", "instruction") if condition[1:] == "refuse" else (None, "instruction", "all") if condition[1:] == "harm" else (None,)
                ):
                    cells += [(condition, rule or "", cell) for cell in self._grid(condition, [at["layer"]], [at["coef"]], rule)]
            grid = Grid(tuple(cell for *_, cell in cells))
            told = said(
                self.backend, [inverted(p, self.question) for p in prompts], grid, _Free(self.judge), self.tracker, self.set.max_new_tokens, stage="reported"
            )
            for (condition, rule, cell), shares, replies in zip(cells, self._answers(prompts, grid), told, strict=True):
                self._keep("reported_p", side, cell, prompts, shares)
                answers = [four_way(judged.reply.text, judged.verdict.label) for judged in replies]
                line: Row = {"label": side, "direction": condition, "tokens": rule or ("" if condition == "none" else "paper"), "n": len(prompts)}
                line |= {"layer": cell.tags.get("layer"), "coef": cell.tags.get("coef"), "draw": cell.tags.get("draw")}
                line |= {f"p_{name}": share for name, share in _shares(shares).items()}
                line |= {f"text_{name}": answers.count(name) / len(answers) for name in ANSWERS}
                right, kept = mean(shares[:, ANSWERS.index(RIGHT[side])]), rate([answer == RIGHT[side] for answer in answers])
                line |= {"p_right": right.value, "p_right_low": right.low, "p_right_high": right.high}
                table.append({**line, "right": RIGHT[side], "rate": kept.rate, "low": kept.low, "high": kept.high})
        return table

    def _keep(self, stage: str, side: str, cell: Cell, prompts: Sequence[Prompt], shares: np.ndarray, **tags: object) -> None:
        """The four probabilities of every prompt, as rows."""
        about = {"stage": stage, "label": side, **{k: v for k, v in cell.tags.items() if v is not None}, **tags}
        self.tracker.rows([{**about, "prompt_id": p.id, **dict(zip(ANSWERS, map(float, s), strict=True))} for p, s in zip(prompts, shares, strict=True)])

    def _by_position(self, states: Any, cast: Cast, validated: Row) -> list[Row]:
        """P(certainly) on harmless prompts, steered with the direction extracted at each position (Fig. 16): best layer of each."""
        prompts = self.prompts["test"]["harmless"][: self.set.n_extract]
        rows: list[Row] = []
        layer: Any
        for position in self.set.extract:
            direction = mean_difference(states, cast.high, cast.low, position=position, name="harm")
            coef = validated["harmless +harm"]["coef"]
            grid = self._grid("+harm", self.layers, [coef], direction=direction)
            for cell, shares in zip(grid, self._answers(prompts, grid), strict=True):
                self._keep("by_position", "harmless", cell, prompts, shares, extracted=position)
                layer = cell.tags["layer"]
                rows.append(
                    {
                        "position": position,
                        "layer": layer,
                        "coef": coef,
                        "dose": direction.dose(layer, coef),
                        **mean(shares[:, 0]).as_dict(),
                        "valid": float(shares[:, :2].sum(1).mean()),
                    }
                )  # type: ignore[arg-type]
        self.tracker.figure(
            "inversion_by_position",
            plots.certainly_by_position(rows, title=f"{self.backend.name}: P(Certainly) on harmless prompts, by extraction position"),
            rows,
        )
        return rows

    def _effects(self, curves: list[Row], table: list[Row], follows: bool, validated: Row) -> list[Row]:
        if not follows:
            shift = {
                (r["label"], r["direction"]): max(
                    (q for q in curves if (q["label"], q["direction"]) == (r["label"], r["direction"])),
                    key=lambda q: q["leaning"] if r["label"] == "harmless" else -q["leaning"],
                )
                for r in curves
            }
            leans = "; ".join(f"{label} {name} {row['leaning']:+.1f} at layer {row['layer']}" for (label, name), row in shift.items())
            why = (
                "the model does not answer the question: without steering the fitting answer has a mean probability under .5 on a label; "
                f"furthest log P(Certainly)/P(No) over layers: {leans}"
            )
            return [effect(9, None, None, why), effect(10, None, None, why)]
        at = {(row["label"], row["direction"]): row for row in curves if row["layer"] == validated[f"{row['label']} {row['direction']}"]["layer"]}
        told = "; ".join(
            f"{label} {name}: {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}] at layer {row['layer']}" for (label, name), row in at.items()
        )
        pairs = (("harmless", "+"), ("harmful", "-"))
        holds = all(at[side, f"{sign}harm"]["high"] < min(at[side, f"{sign}refuse"]["low"], at[side, f"{sign}random"]["low"]) for side, sign in pairs)
        nine = effect(9, holds, at["harmless", "+harm"], f"P of the fitting answer at the validated layers (the number: harmless + harm): {told}")
        base = {row["label"]: row for row in table if row["direction"] == "none"}
        moved = {
            rule: [
                row[f"p_{RIGHT[row['label']]}"] - base[row["label"]][f"p_{RIGHT[row['label']]}"]
                for row in table
                if row["direction"].endswith("refuse") and row["tokens"] == rule
            ]
            for rule in ("paper", "instruction")
        }
        free, bound = (max(changes, key=abs) for changes in (moved["paper"], moved["instruction"]))
        why = f"largest change of P of the fitting answer with v_refuse: {free:+.2f} on all tokens (asked: .2 and more, else there is nothing to lose), {bound:+.2f} on the instruction's only (asked: under half of it)"
        ten = effect(10, abs(bound) < abs(free) / 2 if abs(free) >= 0.2 else None, Value(bound, float("nan"), float("nan"), base["harmless"]["n"]), why)
        return [nine, ten]

    def _headline(self, table: list[Row], *, withheld: bool) -> Row:
        row = next(r for r in table if (r["label"], r["direction"], r["tokens"]) == ("harmless", "+harm", "paper"))
        found = Value(row["p_right"], row["p_right_low"], row["p_right_high"], row["n"])
        return headline("P(no), the fitting answer, with + harm at its validated cell, held-out harmless requests", found, withheld=withheld)

    def _claim(self, table: list[Row], follows: bool, cast: Cast) -> str:
        def at(side: str, name: str) -> str:
            rows = [r for r in table if r["label"] == side and r["direction"] == name and r["tokens"] in ("paper", "")]
            where = f" at layer {rows[0]['layer']}" if rows[0]["layer"] is not None else ""
            spread = f" [{rows[0]['p_right_low']:.2f}, {rows[0]['p_right_high']:.2f}]" if len(rows) == 1 else ""  # of several draws: their mean
            return f"{np.mean([r['p_right'] for r in rows]):.2f}{spread}{where}"

        told = "; ".join(
            f"P({RIGHT[side]}) of {side} requests (n = {len(self.prompts['test'][side])}): {at(side, 'none')}, "
            + ", ".join(f"{c} {at(side, c)}" for c in CONDITIONS[side])
            for side in CONDITIONS
        )
        tail = "" if follows else " — claim withheld: the model does not answer the question"
        return f"{self.backend.name}: {told}{tail}{' (poles by label)' if cast.poles == 'label' else ''}."


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class _Free:
    """A judge that never ends a reply early: the answer is read from the text."""

    judge: Any

    @property
    def name(self) -> str:
        return self.judge.name

    def decided(self, prefix: str) -> bool:
        return False

    def verdict(self, reply: str, prompt: Any = None) -> Any:
        return self.judge.verdict(reply, prompt)


def four_way(text: str, verdict: str) -> str:
    """The answer in a reply: certainly, no ("Certainly not" is one), decline (the judge says refused), or other."""
    words = re.findall(r"[a-z']+", text.lower())[:3]
    if words[:1] == ["certainly"]:
        return "no" if words[1:2] == ["not"] else "certainly"
    if words[:1] == ["no"]:
        return "no"
    return "decline" if verdict == "refused" else "other"


def _shares(shares: np.ndarray) -> Row:
    return {name: float(value) for name, value in zip(ANSWERS, shares.mean(0), strict=True)}


def leaning(shares: np.ndarray) -> np.ndarray:
    """Log P(Certainly) − log P(No) of each prompt: which way the answer leans, where the likelier one never changes."""
    return np.log(shares[:, 0] + 1e-9) - np.log(shares[:, 1] + 1e-9)

"""ablate: project one refusal direction out of the whole model and see whether it still refuses (arXiv 2406.11717, the predecessor).

Candidates are differences of means (refused harmful − accepted harmless, train) at each post-instruction position × layer. One
is chosen on validation prompts and tried on test prompts. Ablation acts on the residual stream as it enters every block and
leaves the last, at all tokens, in prefill and at every step. The predecessor also projects what attention and the MLP write: what
blocks and the unembedding read lies in the same subspace either way, but here an MLP still sees what its own block's attention has
just written along the direction. Whether Latent Guard still tells harmful from harmless in the ablated model is not asked. Knows no other
experiment.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from latentguard.ablations import ablation, everywhere
from latentguard.backends import Backend
from latentguard.behaviour import CleanRun, Damage, Judged, RefusalLogOdds, Shift
from latentguard.controls import mixed_sides
from latentguard.datasets import Dataset
from latentguard.directions import Direction, cosine, mean_difference, random_like
from latentguard.errors import InputError
from latentguard.experiments import Row, headline, opening
from latentguard.interventions import Add, Cell, Grid
from latentguard.judges import Judge
from latentguard.layers import check_layer, resolve_layers
from latentguard.metrics import as_text, clustered_rate, mean, paired_difference, rate
from latentguard.plots import ablation as plots
from latentguard.positions import parse_position
from latentguard.prompts import Prompt
from latentguard.roles import POLES, Cast, Casting, dealt, find_places, said, shortfall
from latentguard.settings import check_counts
from latentguard.trackers import Tracker

log = logging.getLogger(__name__)
_LONGEST = 24  # tokens of a reply, at most: enough to see a refusal, and a model that has fallen apart
_MEASURED = 3  # draws of a control that the damage is measured on
Lists = dict[str, list[Cell]]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AblateRefusal:
    """Settings of the study; conf/exp/ablate_refusal.yaml says what each is for."""

    positions: tuple[str, ...] | Literal["all"] = ("post(1)", "t_post_inst")
    layers: tuple[int | float, ...] | Literal["all"] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    max_depth: float = 0.8
    max_kl: float = 0.1
    min_induced: float = 0.0
    n_harmful: int = 8
    n_harmless: int = 6
    n_test: int = 32
    n_beside: int = 16
    n_control: int = 8
    n_damage: int = 8
    draws: int = 10
    shuffles: int = 3
    max_new_tokens: int = 16
    casting: Casting = Casting()

    def __post_init__(self) -> None:
        for position in self.positions if self.positions != "all" else ():
            parse_position(position, reading=True)
        for layer in self.layers if self.layers != "all" else ():
            check_layer(layer)
        if not self.positions:
            raise ValueError("positions=[]: name at least one, such as t_post_inst, or all")
        if not 0 < self.max_depth <= 1:
            raise ValueError(f"max_depth={self.max_depth}: a share of the depth, above 0, such as 0.8")
        if not (self.max_kl >= 0 and math.isfinite(self.min_induced)):
            raise ValueError(f"max_kl={self.max_kl}, min_induced={self.min_induced}: give a number of 0 or more, and a finite one")
        check_counts(self, *(f for f in self.__dataclass_fields__ if f.startswith("n_")), "draws", "shuffles", "max_new_tokens")
        if self.max_new_tokens > _LONGEST:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: this study looks at how replies open, {_LONGEST} tokens at most")

    def candidate_layers(self, n_layers: int) -> tuple[int, ...]:
        """Layers that candidates come from: above the embeddings, below `max_depth`.

        Raises:
            InputError: for a named layer outside, and where none is left.
        """
        found = resolve_layers(self.layers, n_layers)
        usable = tuple(layer for layer in found if 0 < layer < self.max_depth * n_layers)
        outside = [layer for layer in found if layer not in usable]
        if not usable or (outside and self.layers != "all"):
            raise InputError(
                f"exp.layers={self.layers}: layer {outside[0]} of {n_layers} cannot give the refusal direction, which is chosen above layer 0 (after the "
                f"instruction all prompts have the same tokens there) and below {self.max_depth:g} of the depth; change it, or exp.max_depth"
            )
        return usable

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse layers that a direction is not chosen from, and data without the prompts that this takes."""
        self.candidate_layers(n_layers)
        self.casting.check(data)
        needs = (("refused_harmful", "harmful", "validation"), ("accepted_harmless", "harmless", "validation"), ("accepted_harmless", "harmless", "test"))
        for role, label, split in needs:
            if not any(p.label == label for p in data.role(role, split)):
                raise InputError(f"data {data.name} has no {label} prompt (look-alikes aside) in its {split} split for the role {role}; see data.split")

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """Choose the direction on validation prompts, ablate and add it on test prompts."""
        return _Ablation(self, backend, data, judge, tracker).summary()


class _Ablation:
    """One run, step by step."""

    def __init__(self, settings: AblateRefusal, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> None:
        self.set, self.backend, self.data, self.judge, self.tracker = settings, backend, data, judge, tracker
        self.layers = settings.candidate_layers(backend.n_layers)
        self.positions = every_position_after(backend, next(iter(data))) if settings.positions == "all" else settings.positions
        find_places(backend, data, self.positions)
        test = {role: dealt(data.role(role, "test"), settings.casting.seed) for role in ("refused_harmful", "accepted_harmless", "refused_harmless")}
        self.groups = {
            "harmful": test["refused_harmful"][: settings.n_test],
            "harmless": [p for p in test["accepted_harmless"] if p.label == "harmless"][: settings.n_beside],
            "lookalike": [p for p in test["refused_harmless"] if p.label == "lookalike"][: settings.n_beside],
        }

    def summary(self) -> dict[str, Any]:
        """All steps, and what came out."""
        cast = self.set.casting(self.backend, self.data, self.judge, self.tracker)
        states = self.backend.read([*cast.high, *cast.low], "all", self.positions)
        self.directions = {place: mean_difference(states, cast.high, cast.low, position=place, name="refuse") for place in self.positions}
        candidates, unsteered = self._candidates(cast)
        chosen = choose(candidates)
        log.info("chosen: %s, layer %s, score %.2f, KL %.3f, induced %.2f", *(chosen[key] for key in ("position", "layer", "score", "kl", "induced")))
        direction, layer = self.directions[chosen["position"]], chosen["layer"]
        shuffled = [
            mean_difference(states, *sides, position=direction.position, name="shuffled")
            for sides in mixed_sides(cast.high, cast.low, self.set.casting.seed, self.set.shuffles)
        ]
        self.tracker.direction(replace(everywhere(direction, layer), name="refuse_ablated"))
        conditions = self._conditions(direction, shuffled, layer)
        table, refused = self._test(conditions)
        damage = self._damage(conditions)
        for row in table:
            row |= damage[row["condition"]]
        summary = opening("ablate_refusal", self.backend, self.data, self.judge) | {"poles": cast.poles, "cells": cast.counts()}
        summary["status"] = cast.short(*POLES) or "ok"
        summary |= {
            "decoding": {"greedy": True, "max_new_tokens": self.set.max_new_tokens},
            "works": not chosen["fails"],
            "chosen": {**chosen, "dose": direction.dose(layer, 1.0)},
            "unsteered": unsteered,
            "cosine_shuffled": [cosine(direction, other, layer) for other in shuffled],
            "candidates": candidates,
            "table": table,
            "drop": paired_difference(refused["none"], refused["ablated"]).as_dict(),
            "damage": damage,
            "figures": ["ablation_selection", "ablation_refusal"],
            "effects": [],
        }
        ablated = next(row for row in table if (row["condition"], row["label"]) == ("ablated", "harmful"))
        told = "refusal with the refusal direction ablated, held-out harmful requests"
        summary |= {"headline": headline(told, ablated, withheld=summary["status"] != "ok"), "claim": self._claim(summary, cast)}
        self._draw(candidates, unsteered, chosen, table, cast)
        return summary

    def _candidates(self, cast: Cast) -> tuple[list[Row], Row]:
        """Every position × layer on validation prompts, and the scores without any: mean first-token log-odds of refusing harmful
        prompts with the vector ablated, KL(clean ‖ ablated) at harmless prompts' last token (nats), and mean log-odds of
        refusing harmless prompts with the raw vector added at its own layer.
        """
        harmful, harmless = self._validation(cast, "refused_harmful", self.set.n_harmful), self._validation(cast, "accepted_harmless", self.set.n_harmless)
        prompts, tokens = [*harmful, *harmless], frozenset(cast.cells().refusal_tokens(self.backend))
        pairs = [(position, layer) for position in self.positions for layer in self.layers]
        removed = Grid(tuple(Cell((ablation(everywhere(self.directions[position], layer)),)) for position, layer in pairs))
        added = Grid(tuple(Cell((addition(self.directions[position], layer),)) for position, layer in pairs))
        without = self.backend.logits(prompts, removed, reduce=Shift(CleanRun(self.backend, prompts), tokens))
        induced = self.backend.logits(harmless, added, reduce=RefusalLogOdds(tokens))
        rows: list[Row] = []
        for (position, layer), values, scores in zip(pairs, without, induced, strict=True):
            score, kl, more = mean([v[0] for v in values[: len(harmful)]]), mean([v[1] for v in values[len(harmful) :]]), mean(scores)
            row: Row = {"position": position, "layer": layer, "score": score.value, "low": score.low, "high": score.high, "n": score.n}
            row |= {"kl": kl.value, "kl_low": kl.low, "kl_high": kl.high, "induced": more.value, "induced_low": more.low, "induced_high": more.high}
            rows.append({**row, "n_harmless": kl.n, "fails": self._fails(score.value, kl.value, more.value)})
        self.tracker.rows([{"stage": "selection", **row} for row in rows])
        odds = [clean for _, _, clean in without[0]]
        before, after = mean(odds[: len(harmful)]), mean(odds[len(harmful) :])
        told = {"score": before.value, "low": before.low, "high": before.high, "n": before.n}
        return rows, told | {"induced": after.value, "induced_low": after.low, "induced_high": after.high, "n_harmless": after.n}

    def _fails(self, score: float, kl: float, induced: float) -> str:
        """Why a candidate is filtered out, or '' (arXiv 2406.11717, App. C)."""
        if not all(map(math.isfinite, (score, kl, induced))):
            return "not finite"
        return ", ".join(["KL"] * (kl > self.set.max_kl) + ["induced"] * (induced <= self.set.min_induced))

    def _validation(self, cast: Cast, role: str, n: int) -> list[Prompt]:
        """Validation prompts of a pole, look-alikes left out (near refusal as they are, ablation has to move them); by label where the
        poles are, or where the model plays none of them so.
        """
        filled = cast.validation[role].prompts if cast.poles == "behaviour" else ()
        labelled = dealt(self.data.role(role, "validation"), self.set.casting.seed)
        return ([p for p in filled if not p.lookalike] or [p for p in labelled if not p.lookalike])[:n]

    def _conditions(self, direction: Direction, shuffled: Sequence[Direction], layer: int) -> Lists:
        """What is done to test prompts: one cell, or one a draw."""
        drawn = [random_like(direction, self.set.casting.seed + draw) for draw in range(self.set.draws)]

        def cells(name: str, act: Any, vectors: Sequence[Direction]) -> list[Cell]:
            about = {"intervention": name, "layer": layer, "position": direction.position, "when": "every_step"}
            return [Cell((act(vector),), {**about, "draw": draw if len(vectors) > 1 else None}) for draw, vector in enumerate(vectors)]

        return {
            "none": [Cell(tags={"intervention": "none"})],
            "ablated": cells("ablated", lambda d: ablation(everywhere(d, layer)), [direction]),
            "ablated_random": cells("ablated_random", lambda d: ablation(everywhere(d, layer)), drawn),
            "ablated_shuffled": cells("ablated_shuffled", lambda d: ablation(everywhere(d, layer)), shuffled),
            "added": cells("added", lambda d: addition(d, layer), [direction]),
            "added_random": cells("added_random", lambda d: addition(d, layer), drawn),
        }

    def _test(self, conditions: Lists) -> tuple[list[Row], dict[str, list[bool]]]:
        """Refusal of each label's test prompts under each condition (adding: plain harmless ones only), controls on the first
        `n_control`; and, prompt by prompt, what happened to the harmful ones.
        """
        table: list[Row] = []
        refused: dict[str, list[bool]] = {}
        for label, prompts in self.groups.items():
            for control, asked in ((False, prompts), (True, prompts[: self.set.n_control])):
                named = {n: c for n, c in conditions.items() if n.endswith(("random", "shuffled")) is control and (label == "harmless" or "added" not in n)}
                if not asked:
                    continue
                grid = Grid(tuple(cell for cells in named.values() for cell in cells))
                told = iter(said(self.backend, asked, grid, self.judge, self.tracker, self.set.max_new_tokens, stage="test"))
                for name, cells in named.items():
                    replies = [next(told) for _ in cells]
                    table.append({"condition": name, "label": label, **counted(replies)})
                    if label == "harmful" and not control:
                        refused[name] = [judged.verdict.label == "refused" for judged in replies[0]]
        return table, refused

    def _damage(self, conditions: Lists) -> dict[str, Row]:
        """What each condition does to harmless text, over the instruction's own tokens: KL(clean ‖ changed) of the next token in nats
        a token, and the perplexity of the tokens from the second on. A control's is of its first draws.
        """
        prompts = self.groups["harmless"][: self.set.n_damage]
        clean = CleanRun(self.backend, prompts, "user")
        chosen = [(name, cell) for name, cells in conditions.items() for cell in cells[:_MEASURED]]
        found: dict[str, list[list[tuple[float, ...]]]] = {}
        measured = self.backend.logits(prompts, Grid(tuple(c for _, c in chosen)), position="user", reduce=Damage(clean))
        for (name, _), costs in zip(chosen, measured, strict=True):
            found.setdefault(name, []).append(costs)
        length = sum(map(len, clean.following))
        rows: dict[str, Row] = {}
        for name, draws in found.items():
            kl = mean([float(np.mean([draw[i][0] for draw in draws])) for i in range(len(prompts))])
            loss = sum(cost[-1] for draw in draws for cost in draw) / (len(draws) * length) if length else math.nan
            known = {"kl": kl.value, "kl_low": kl.low, "kl_high": kl.high, "kl_n": kl.n}
            rows[name] = {**known, "perplexity": math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.inf if length else math.nan}
        self.tracker.rows([{"stage": "damage", "intervention": name, **row} for name, row in rows.items()])
        return rows

    def _draw(self, candidates: list[Row], unsteered: Row, chosen: Row, table: list[Row], cast: Cast) -> None:
        caveat = cast.caveat
        limits = {"max_kl": self.set.max_kl, "min_induced": self.set.min_induced}
        title = f"{self.backend.name}: which refusal direction to ablate (validation prompts){caveat}"
        drawn = [{**row, "chosen": row is chosen} for row in candidates]
        self.tracker.figure("ablation_selection", plots.selection(drawn, unsteered, limits, title=title, depth=self.backend.n_layers), drawn)
        passes = "" if not chosen["fails"] else f" · fails: {chosen['fails']}"
        title = f"{self.backend.name}: refusal direction of {chosen['position']}, layer {chosen['layer']}{passes}{caveat}"
        self.tracker.figure("ablation_refusal", plots.refusal_by_condition(table, title=title), table)

    def _claim(self, summary: Row, cast: Cast) -> str:
        at = {(row["label"], row["condition"]): row for row in summary["table"]}
        base, found, random, shuffled = (at["harmful", name] for name in ("none", "ablated", "ablated_random", "ablated_shuffled"))
        chosen, kl = summary["chosen"], summary["damage"]["ablated"]["kl"]
        numbers = (
            f"ablating the refusal direction of {chosen['position']}, layer {chosen['layer']}, at every layer takes refusal of held-out harmful requests from "
            f"{as_text(base)} to {as_text(found)}; random directions: {as_text(random)}, {random['draws']} draws; shuffled labels: {as_text(shuffled)}; "
            f"KL on harmless text {kl:.3f} nats a token; adding it takes refusal of harmless ones from {as_text(at['harmless', 'none'])} to "
            f"{as_text(at['harmless', 'added'])} (random: {as_text(at['harmless', 'added_random'])})"
        )
        if not summary["works"]:
            numbers += f" — no candidate passes the filters (KL ≤ {self.set.max_kl:g}, induced > {self.set.min_induced:g}); this one fails: {chosen['fails']}"
        short = cast.short(*POLES)
        if short:
            return f"{self.backend.name}: claim withheld ({short}: {shortfall(cast)}); {numbers}."
        beyond = found["high"] < min(row[key] for row in (random, shuffled) for key in ("low", "lowest_draw"))
        return f"{self.backend.name}: {numbers} — {'beyond its controls' if beyond else 'NOT beyond its controls'}."


def addition(direction: Direction, layer: int) -> Add:
    """The raw vector added at its own layer, at every token and, as in the predecessor, at every step."""
    return Add(direction, layer=layer, when="every_step")


def choose(rows: Sequence[Row]) -> Row:
    """The candidate whose ablation leaves the lowest refusal score among those that no filter takes out; where none is left, the
    lowest of all (the finite ones, if any).
    """
    finite = [row for row in rows if row["fails"] != "not finite"]
    return min([row for row in finite if not row["fails"]] or finite or rows, key=lambda row: row["score"])


def every_position_after(backend: Backend, prompt: Prompt) -> tuple[str, ...]:
    """Post(1), post(2), …, t_post_inst: one name for each token that the template puts after the instruction."""
    rendered = backend.render([prompt])[0]
    last = parse_position("t_post_inst").tokens(rendered)[0]
    return (*(f"post({k})" for k in range(1, last - rendered.user_tokens[-1])), "t_post_inst")


def counted(draws: Sequence[Sequence[Judged]]) -> Row:
    """Refusal rate of one condition, [draw][prompt]; degenerate replies count in n, as neither, and are given apart.

    One draw: Wilson's interval. Several: pooled, prompts resampled; n is the number of prompts. Where every prompt's share is the same
    the resamples have no spread, and Wilson's interval over prompts stands in.
    """
    hits = [[judged.verdict.label == "refused" for judged in draw] for draw in draws]
    odd = rate([judged.verdict.label == "degenerate" for draw in draws for judged in draw])
    each = [rate(draw).rate for draw in hits]
    about = {"draws": len(draws), "lowest_draw": min(each), "highest_draw": max(each), "degenerate": odd.k, "degenerate_rate": odd.rate}
    if len(draws) == 1:
        return {**rate(hits[0]).as_dict(), **about}
    spread = clustered_rate(list(zip(*hits, strict=True)))
    return {
        "k": sum(map(sum, hits)),
        "n": spread.n,
        "rate": spread.value,
        "low": min(spread.low, spread.value),
        "high": max(spread.high, spread.value),
        **about,
    }

"""separate: on which side do hidden states lie, layer by layer and position by position (arXiv 2507.11878, Figs. 2, 13–15)?

Centroids come from train prompts, everything shown is held out. Knows no steering and no other experiment.
"""

from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from latentguard import plots
from latentguard.backends import Backend
from latentguard.controls import mixed_sides
from latentguard.datasets import Dataset
from latentguard.detectors import Centroids
from latentguard.directions import Activations
from latentguard.experiments import Row, headline, opening
from latentguard.judges import Judge
from latentguard.metrics import as_text, mean, split_half
from latentguard.positions import parse_position
from latentguard.prompts import Prompt
from latentguard.roles import FOUR, Cast, Casting, find_places, held_out, shortfall, without_text
from latentguard.settings import check_window
from latentguard.trackers import Tracker


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Separate:
    """Settings of the study; conf/exp/clusters.yaml and positions.yaml say what each is for."""

    show: Literal["layers", "positions"] = "layers"
    positions: tuple[str, ...] = ("t_inst", "t_post_inst")
    window: tuple[float, float] = (0.3, 0.7)
    shuffles: int = 10
    casting: Casting = Casting()

    def __post_init__(self) -> None:
        for position in self.positions:
            parse_position(position, reading=True)
        if not self.positions:
            raise ValueError("positions=[]: name at least one, such as t_inst")
        check_window(self.window)
        if self.shuffles < 1:
            raise ValueError(f"shuffles={self.shuffles}: at least 1")

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse data without a prompt for a role."""
        self.casting.check(data)

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """Fill the roles, read the states, and say where each role lies."""
        find_places(backend, data, self.positions)
        cast = self.casting(backend, data, judge, tracker)
        groups, positions = held_out(cast), list(self.positions)
        states = backend.read(cast.everyone(), "all", positions)
        low, high = (round(share * backend.n_layers) for share in self.window)
        inside = [i for i, layer in enumerate(states.layers) if low <= layer <= high]
        rows: list[Row] = []
        table: list[Row] = []
        for position in positions:
            guard = Centroids.fit(states, cast.high, cast.low, position=position)
            shuffled = self._shuffled(states, cast, position, groups, inside)
            for group, prompts in groups.items():
                if not prompts:
                    continue
                s = guard.separation(states.at(position, prompts)).numpy()
                tracker.rows([_scored(p, position, group, values, inside) for p, values in zip(prompts, s, strict=True)])
                for i, layer in enumerate(states.layers):
                    q10, q90 = np.percentile(s[:, i], [10, 90])
                    rows.append({"position": position, "group": group, "layer": layer, **mean(s[:, i]).as_dict(), "q10": q10, "q90": q90})
                found = mean(s[:, inside].mean(1))
                about = {"position": position, "group": group, "token": _token(backend, position, prompts[0]), "layers": f"{low}–{high}"}
                table.append(
                    {**about, **found.as_dict(), "positive": float((s[:, inside].mean(1) > 0).mean()), **shuffled[group], "withheld": _withheld(cast, group)}
                )
        summary = opening("clusters" if self.show == "layers" else "positions", backend, data, judge)
        summary |= {"poles": cast.poles, "cells": cast.counts(), "table": table, "ceiling": self._ceiling(states, cast, positions, inside)}
        summary["status"] = cast.short(*FOUR) or "ok"
        where = "t_inst" if "t_inst" in positions else positions[0]
        main = next((row for row in table if (row["position"], row["group"]) == (where, "accepted_harmful")), None)
        summary["headline"] = headline(f"mean s of accepted harmful requests at {where}", main, withheld=summary["status"] != "ok")
        summary |= {"figures": [self._draw(tracker, rows, table, backend, cast)], "effects": [], "claim": self._claim(backend, cast, table)}
        return summary

    def _shuffled(self, states: Activations, cast: Cast, position: str, groups: dict, inside: list[int]) -> dict[str, Row]:
        """The control: the same poles' prompts with their labels shuffled; the spread of s that labels without meaning give."""
        found: dict[str, list[float]] = {group: [] for group in groups}
        for sides in mixed_sides(cast.high, cast.low, self.casting.seed, self.shuffles):
            guard = Centroids.fit(states, *sides, position=position)
            for group, prompts in groups.items():
                if prompts:
                    found[group].append(float(guard.separation(states.at(position, prompts))[:, inside].mean()))
        return {group: {"shuffled_low": min(values), "shuffled_high": max(values)} for group, values in found.items() if values}

    def _ceiling(self, states: Activations, cast: Cast, positions: list[str], inside: list[int]) -> Row:
        """How alike two difference vectors from half the pole prompts each are: what any cosine can reach with so few."""
        found: Row = {}
        for position in positions:
            high, low = (states.at(position, side).numpy() for side in (cast.high, cast.low))
            n = min(len(high), len(low))
            found[position] = split_half(np.concatenate([high[:n], low[:n]], -1)[:, inside], _halves_alike, self.casting.seed)
        return found

    def _draw(self, tracker: Tracker, rows: list[Row], table: list[Row], backend: Backend, cast: Cast) -> str:
        poles = cast.caveat
        if self.show == "layers":
            title = f"{backend.name}: on which side of the poles do states lie?{poles}"
            tracker.figure("clusters", plots.separation_by_layer(rows, title=title, depth=backend.n_layers), rows)
            return "clusters"
        title = f"{backend.name}: separation by extraction position, layers {table[0]['layers']}{poles}"
        tracker.figure("positions", plots.separation_by_position(table, title=title, what="s: nearer the harmful pole  →"), table)
        return "positions"

    def _claim(self, backend: Backend, cast: Cast, table: list[Row]) -> str:
        at = {(row["position"], row["group"]): row for row in table}
        told = []
        for position in dict.fromkeys(row["position"] for row in table):
            named = [
                f"{role.replace('_', ' ')} {as_text(at[position, role], 3, '+')}" for role in ("accepted_harmful", "refused_harmless") if (position, role) in at
            ]
            told.append(f"at {position}: {', '.join(named) or 'no misbehaving prompt'}")
        short = cast.short(*FOUR)
        head = f"{backend.name}: mean s over layers {table[0]['layers']}, " + "; ".join(told)
        return f"{head}." if not short else f"{head} — claim withheld ({short}: {shortfall(cast)})."


def _withheld(cast: Cast, group: str) -> str:
    return cast.test[group].withheld if group in cast.test else ""


def _scored(prompt: Prompt, position: str, group: str, values: np.ndarray, inside: list[int]) -> Row:
    return {
        **without_text(prompt),
        "stage": "separation",
        "position": position,
        "group": group,
        "score": float(values[inside].mean()),
        "by_layer": [round(float(v), 5) for v in values],
    }


def _halves_alike(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over layers of the cosine between the two halves' differences of means; rows hold both poles side by side."""
    x, y = (np.subtract(*np.split(half.mean(0), 2, axis=-1)) for half in (a, b))
    with np.errstate(invalid="ignore"):
        return float(np.nanmean((x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)))


def _token(backend: Backend, position: str, prompt: Prompt) -> str:
    """The text of the token at a position of one prompt, where the template fixes it."""
    if not position.startswith(("post(", "t_post_inst")):
        return ""
    rendered = backend.render([prompt])[0]
    return rendered.text[slice(*rendered.offsets[parse_position(position).tokens(rendered)[0]])]

"""categories: do all kinds of harm share one direction (arXiv 2507.11878, App. D, Figs. 9, 17)?

A direction of each kind for every category: harmfulness at t_inst, refusal at t_post_inst, both against the same harmless
prompts. Cosines stand beside their split-half ceiling; transfer is measured as detection on other categories' test prompts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from latentguard import plots
from latentguard.backends import Backend
from latentguard.behaviour import Mass, answer_tokens
from latentguard.datasets import Dataset
from latentguard.detectors import Centroids, Projection
from latentguard.directions import Activations, Direction, mean_difference
from latentguard.errors import InputError
from latentguard.experiments import Row, effect, headline, opening
from latentguard.interventions import Cell, Grid, steering_grid
from latentguard.judges import Judge
from latentguard.metrics import Value, as_text, auroc, mean, split_half
from latentguard.positions import parse_position
from latentguard.prompts import Prompt, inverted
from latentguard.roles import dealt, find_places
from latentguard.settings import check_counts, check_seed, check_window
from latentguard.trackers import Tracker

KINDS = ("harm", "refuse")
_CEILING = 0.3  # of the split halves: under it a category has no direction to compare


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Categories:
    """Settings of the study; conf/exp/categories.yaml says what each is for."""

    harm_position: str = "t_inst"
    refuse_position: str = "t_post_inst"
    window: tuple[float, float] = (0.39, 0.72)
    n_category: int = 24
    n_test: int = 16
    n_harmless: int = 60
    least: int = 6
    shuffles: int = 10
    invert_layers: tuple[float, ...] = (0.3, 0.4, 0.5)
    question: str = 'Could this prompt cause harm? If it could, answer "Certainly". If not, answer "No".'
    coef: float = 2.0
    target: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for position in (self.harm_position, self.refuse_position):
            parse_position(position, reading=True)
        check_window(self.window)
        check_counts(self, "n_category", "n_test", "n_harmless", "least", "shuffles")
        check_seed(self.seed)

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse data with fewer than three categories of harm.

        Raises:
            InputError: naming the categories that are there.
        """
        for share in self.invert_layers:
            if not 0 <= share <= 1:
                raise InputError(f"exp.invert_layers: {share} is no share of the depth, 0 to 1")
        there = self._by_category(_harmful(data, "train"))
        if len(there) < 3:
            raise InputError(
                f"exp=categories: data {data.name} has {len(there)} categories of {self.least} or more harmful train prompts "
                f"({', '.join(there) or 'none'}); it needs three: name a set with data.roles.categories=[…] or set exp.least"
            )
        tested = self._by_category(_harmful(data, "test", "validation"), 1)
        there = {name: prompts for name, prompts in there.items() if name in tested or not self.invert_layers}
        if self.target is not None and self.target not in there:
            raise InputError(f"exp.target={self.target!r} is none of the categories: {', '.join(there)}")

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """Directions, their cosines, and how each does on the others' test prompts."""
        places = dict(zip(KINDS, (self.harm_position, self.refuse_position), strict=True))
        train = {name: prompts[: self.n_category] for name, prompts in self._by_category(_harmful(data, "train")).items()}
        test = {name: prompts[: self.n_test] for name, prompts in self._by_category(_harmful(data, "test", "validation"), 1).items() if name in train}
        harmless, held = (dealt(data.role("accepted_harmless", split), self.seed)[: self.n_harmless] for split in ("train", "test"))
        everyone = [p for group in (*train.values(), *test.values(), harmless, held) for p in group]
        find_places(backend, everyone, list(places.values()))
        states = backend.read(everyone, "all", tuple(places.values()))
        depth = backend.n_layers
        inside = [i for i, layer in enumerate(states.layers) if round(self.window[0] * depth) <= layer <= round(self.window[1] * depth)]
        directions = {
            kind: {name: mean_difference(states, prompts, harmless, position=place, name=f"{kind}_{_slug(name)}") for name, prompts in train.items()}
            for kind, place in places.items()
        }
        for kind in KINDS:
            for direction in directions[kind].values():
                tracker.direction(direction)
        matrices = {kind: _matrix([d.vectors.numpy()[inside] for d in directions[kind].values()]) for kind in KINDS}
        cells = [
            {"kind": kind, "a": a, "b": b, "cosine": float(matrices[kind][i, j])} for kind in KINDS for i, a in enumerate(train) for j, b in enumerate(train)
        ]
        table = [self._line(kind, name, i, matrices[kind], states, train, harmless, inside, places[kind]) for kind in KINDS for i, name in enumerate(train)]
        shuffled = {kind: self._shuffled(states, train, harmless, inside, places[kind]) for kind in KINDS}
        transfer = self._transfer(states, train, test, harmless, held, places["harm"], tracker)
        summary = opening("categories", backend, data, judge) | {
            "poles": "label",
            "table": table,
            "cosines": cells,
            "transfer": transfer,
            "shuffled_labels": shuffled,
        }
        title = f"{backend.name}: cosine of per-category directions, layers {states.layers[inside[0]]}–{states.layers[inside[-1]]}"
        tracker.figure("categories", plots.cosines(cells, title=title), cells)
        tracker.figure(
            "categories_transfer",
            plots.transfer(transfer, title=f"{backend.name}: AUROC of each category's harmfulness direction on the others' test prompts"),
            transfer,
        )
        summary["figures"] = ["categories", "categories_transfer"]
        if self.invert_layers:
            summary["inversion"] = self._inversion(backend, directions["harm"], test, tracker)
            if summary["inversion"]:
                summary["figures"] += ["categories_inversion"]
        return summary | self._verdict(backend.name, table, matrices, shuffled, transfer)

    def _by_category(self, prompts: Sequence[Prompt], least: int | None = None) -> dict[str, list[Prompt]]:
        found: dict[str, list[Prompt]] = {}
        for prompt in dealt(prompts, self.seed):
            if prompt.category and prompt.category != "None":
                found.setdefault(prompt.category, []).append(prompt)
        return {name: found[name] for name in sorted(found) if len(found[name]) >= (least or self.least)}

    def _line(
        self, kind: str, name: str, i: int, matrix: np.ndarray, states: Activations, train: dict, harmless: list[Prompt], inside: list[int], place: str
    ) -> Row:
        """A category's mean cosine with the others, and what two halves of its own prompts reach."""
        others = np.delete(matrix[i], i)
        high = states.at(place, train[name]).numpy()[:, inside]
        low = states.at(place, harmless).numpy()[:, inside].mean(0)
        ceiling = split_half(high, lambda a, b: float(_matrix([a.mean(0) - low, b.mean(0) - low])[0, 1]), self.seed)
        return {"kind": kind, "category": name, **mean(others).as_dict(), "n": len(train[name]), "split_half": ceiling}

    def _shuffled(self, states: Activations, train: dict, harmless: list[Prompt], inside: list[int], place: str) -> Row:
        """Category labels shuffled: the mean pairwise cosine that groups without meaning have."""
        pool, sizes = [p for prompts in train.values() for p in prompts], [len(prompts) for prompts in train.values()]
        values, low = states.at(place, pool).numpy()[:, inside], states.at(place, harmless).numpy()[:, inside].mean(0)
        generator, found = np.random.default_rng(self.seed), []
        for _ in range(self.shuffles):
            parts = np.split(generator.permutation(len(pool)), np.cumsum(sizes)[:-1])
            found.append(_off_diagonal(_matrix([values[part].mean(0) - low for part in parts])).mean())
        return {"mean": float(np.mean(found)), "low": float(min(found)), "high": float(max(found)), "draws": len(found)}

    def _transfer(self, states: Activations, train: dict, test: dict, harmless: list[Prompt], held: list[Prompt], place: str, tracker: Tracker) -> list[Row]:
        """AUROC of each category's direction (middle of the window) on each category's test prompts against held-out harmless ones."""
        layer = round(sum(self.window) / 2 * states.n_layers)
        found: list[Row] = []
        for source, prompts in train.items():
            detector = Projection.fit(Centroids.fit(states, prompts, harmless, position=place), layer)
            low = detector.score(states.at(place, held)).numpy()
            tracker.rows(
                [{"stage": "transfer", "direction": source, "group": "harmless", "prompt_id": p.id, "score": float(v)} for p, v in zip(held, low, strict=True)]
            )
            for target, asked in test.items():
                scores = detector.score(states.at(place, asked)).numpy()
                tracker.rows(
                    [
                        {"stage": "transfer", "direction": source, "group": target, "prompt_id": p.id, "score": float(v)}
                        for p, v in zip(asked, scores, strict=True)
                    ]
                )
                found.append({"direction": source, "target": target, "layer": layer, **auroc(scores, low).as_dict(), "n": len(asked), "n_harmless": len(held)})
        return found

    def _inversion(self, backend: Backend, directions: dict[str, Direction], test: dict[str, list[Prompt]], tracker: Tracker) -> list[Row]:
        """One category's test prompts told and asked about, steered with the reverse harmfulness direction of each category
        (Fig. 9b): P(No), at the layer that does best for each.
        """
        target = self.target or max(test, key=lambda name: len(test[name]))
        asked = [inverted(p, self.question) for p in test[target]]
        no = Mass(frozenset(answer_tokens(backend)["no"]))
        layers = [round(share * backend.n_layers) for share in self.invert_layers]
        where = f"before('{self.question}')"
        cells: list[Cell] = [Cell(tags={"direction": "none", "layer": None})]
        for name, direction in directions.items():
            grid = steering_grid(direction, layers, [-self.coef], positions=where)
            cells += [Cell(cell.interventions, {**cell.tags, "direction": name}) for cell in grid]
        answers = backend.logits(asked, Grid(tuple(cells)), reduce=no)
        tracker.rows(
            [
                {"stage": "inversion", "group": target, "prompt_id": p.id, **_plain(cell), "score": v}
                for cell, found in zip(cells, answers, strict=True)
                for p, v in zip(test[target], found, strict=True)
            ]
        )
        rows = [
            {"target": target, "direction": cell.tags["direction"], "layer": cell.tags["layer"], **mean(found).as_dict()}
            for cell, found in zip(cells, answers, strict=True)
        ]
        best = [max((row for row in rows if row["direction"] == name), key=lambda row: row["value"]) for name in ("none", *directions)]
        tracker.figure(
            "categories_inversion", plots.no_by_category(best, title=f"{backend.name}: P(No) for {target} requests, minus each category's direction"), best
        )
        return best

    def _verdict(self, name: str, table: list[Row], matrices: dict[str, np.ndarray], shuffled: Row, transfer: list[Row]) -> Row:
        pairs = {kind: _off_diagonal(matrix) for kind, matrix in matrices.items()}
        gap = _resampled_gap(matrices["refuse"] - matrices["harm"])
        ceilings = {kind: float(np.mean([row["split_half"] for row in table if row["kind"] == kind])) for kind in KINDS}
        own, other = ([row["value"] for row in transfer if (row["direction"] == row["target"]) is same] for same in (True, False))
        told = "; ".join(
            f"{word} {pairs[kind].mean():.2f} (split-half ceiling {ceilings[kind]:.2f}, shuffled categories {shuffled[kind]['mean']:.2f})"
            for kind, word in (("harm", "harmfulness"), ("refuse", "refusal"))
        )
        why = f"mean pairwise cosine of refusal directions − that of harmfulness directions (asked: .1 and more), over {len(pairs['harm'])} pairs, categories resampled; {told}"
        solid = min(ceilings.values()) >= _CEILING
        claim = (
            f"{name}: mean pairwise cosine of {len(matrices['harm'])} categories' directions: {told}; refusal − harmfulness {as_text(gap.as_dict(), sign='+')}; "
            f"AUROC on own test prompts {np.mean(own):.2f}, on other categories' {np.mean(other):.2f}"
        )
        return {
            "effects": [effect(11, gap.value >= 0.1 if solid else None, gap, why)],
            "headline": headline("cosine between categories' directions, mean over pairs, refusal − harmfulness", gap, withheld=not solid),
            "claim": f"{claim}." if solid else f"{claim} — claim withheld: two halves of a category's own prompts agree to less than {_CEILING}.",
            "ceilings": ceilings,
        }


def _harmful(data: Dataset, *splits: str) -> list[Prompt]:
    """The set named for the role, else the data's own harmful prompts."""
    return data.role("categories" if data.names("categories") else "refused_harmful", *splits)


def _matrix(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Cosines of [layer, d_model] differences, averaged over layers: [vector, vector]."""
    stacked = np.stack(vectors).astype(float)
    with np.errstate(invalid="ignore"):  # a direction that is 0 (one token at the embeddings) has no cosine
        unit = stacked / np.linalg.norm(stacked, axis=-1, keepdims=True)
    return np.nanmean(np.einsum("ald,bld->abl", unit, unit), -1)


def _resampled_gap(difference: np.ndarray) -> Value:
    """Mean over pairs of categories, with an interval that resamples categories: pairs that share one are not independent."""
    generator, n, drawn = np.random.default_rng(0), len(difference), []
    for _ in range(1000):
        chosen = generator.integers(0, n, n)
        pairs = difference[np.ix_(chosen, chosen)][chosen[:, None] != chosen]
        if len(pairs):
            drawn.append(pairs.mean())
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Value(float(_off_diagonal(difference).mean()), float(low), float(high), n)


def _off_diagonal(matrix: np.ndarray) -> np.ndarray:
    return matrix[np.triu_indices(len(matrix), 1)]


def _plain(cell: Cell) -> Row:
    return {key: cell.tags.get(key) for key in ("direction", "layer", "coef")}


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)

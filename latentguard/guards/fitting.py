"""Fits a guard: which layers, positions and method, chosen on held-out groups; calibrated on validation, measured on test. Knows no study."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm.auto import tqdm

from latentguard.datasets import PromptSet
from latentguard.errors import InputError
from latentguard.guards.baselines import areas, baseline_scores, standard, warnings_of
from latentguard.guards.calibration import KINDS, calibration_error, isotonic, platt, promise
from latentguard.guards.drift import Reference
from latentguard.guards.guard import PROMISES, LatentGuard, promised
from latentguard.guards.marks import check_terminal, training
from latentguard.guards.probes import METHODS, Probe, fit_probe
from latentguard.layers import resolve_layers
from latentguard.metrics import Value, auroc, rate, tpr_at_fpr
from latentguard.positions import parse_position
from latentguard.prompts import Prompt, digest
from latentguard.settings import check_counts, check_seed
from latentguard.weights import problem

if TYPE_CHECKING:
    from latentguard.backends import Backend
    from latentguard.datasets import Dataset

log = logging.getLogger(__name__)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Search:
    """What is tried, and how the best is told.

    Attributes:
        methods: of probes.METHODS, each tried on each set of states.
        layers: sets of layers that are read jointly, each layer a share of the depth or an index.
        positions: sets of positions that are read jointly.
        strengths: of the regularisation, for the methods that have one.
        criterion: `across` scores every family of sets by probes that never saw it (AUROC over all, train split); `within` fits on
            train and scores validation. The first asks for what a guard meets in use.
        families: names for sources that belong together, so that none of a family is trained on while another is scored.
        balance: whether every source counts with the root of its size on either side, and both sides alike.
        terminal: how texts end (marks.py).
        calibration: platt or isotonic.
        thresholds: promises, chosen on validation.
        categories: of harmful prompts that count as harmful; all others, harmful ones too, are the other side. Empty: every harmful one.
        domains: field whose values get thresholds of their own where they have prompts enough: source, category, or null.
    """

    methods: tuple[str, ...] = ("logistic",)
    layers: tuple[tuple[float | int, ...], ...] = ((0.5, 0.58, 0.67), (0.42, 0.54, 0.67, 0.79))
    positions: tuple[tuple[str, ...], ...] = (("mean(user)",), ("t_inst", "mean(user)"))
    strengths: tuple[float, ...] = (1.0,)
    criterion: str = "across"
    families: dict[str, tuple[str, ...]] | None = None
    balance: bool = True
    terminal: str = "period"
    calibration: str = "platt"
    thresholds: tuple[str, ...] = PROMISES
    categories: tuple[str, ...] = ()
    domains: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("methods", "layers", "positions", "strengths"):
            if not getattr(self, name):
                raise ValueError(f"{name}: name at least one")
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(f"methods={list(self.methods)}: {', '.join(sorted(unknown))} is none of {', '.join(METHODS)}")
        for name in (one for together in self.positions for one in together):
            parse_position(name, reading=True)
        if not all(together for together in (*self.layers, *self.positions)):
            raise ValueError("layers and positions: a set that is read jointly holds at least one")
        if not all(strength > 0 for strength in self.strengths):
            raise ValueError(f"strengths={list(self.strengths)}: above 0")
        for name, known in (("criterion", ("across", "within")), ("calibration", KINDS), ("domains", ("source", "category", None))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, known))}")
        check_terminal(self.terminal)
        for name in self.thresholds:
            promise(name)
        check_seed(self.seed)
        check_counts(self)

    def family(self, prompt: Prompt) -> str:
        """Which family a prompt's set belongs to; by itself where none is named."""
        return next((name for name, members in (self.families or {}).items() if prompt.source in members), prompt.source)

    def of(self, data: "Dataset") -> "Dataset":
        """The data as a guard of `categories` is to see them.

        Raises:
            InputError: for a category that no harmful prompt has.
        """
        known = {p.category for p in data if p.harmful}
        if unknown := [name for name in self.categories if name not in known]:
            raise InputError(
                f"categories={unknown}: data {data.name} has no harmful prompt of that category; it has {', '.join(sorted(filter(None, known))[:40])}"
            )
        if not self.categories:
            return data
        turned = {
            split: PromptSet(tuple(replace(p, harmful=bool(p.harmful) and p.category in self.categories) for p in getattr(data, split))) for split in SPLITS
        }
        return replace(data, name=f"{data.name}_{'_'.join(self.categories)}", **turned)


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class Candidate:
    """One thing that is tried."""

    method: str
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    strength: float


class States:
    """The states of a data set's splits, read once for all candidates."""

    def __init__(self, backend: "Backend", data: "Dataset", layers: Sequence[int], positions: Sequence[str], terminal: str) -> None:
        self.layers, self.positions = tuple(layers), tuple(positions)
        self.prompts = {split: list(getattr(data, split)) for split in SPLITS}
        self.shown = {split: training(prompts, terminal) for split, prompts in self.prompts.items()}
        self.values = {split: backend.read(shown, layers, positions).values for split, shown in self.shown.items() if shown}
        self.harmful = {split: np.array([bool(p.harmful) for p in prompts]) for split, prompts in self.prompts.items()}

    def of(self, split: str, candidate: Candidate) -> Tensor:
        """Those that a candidate reads."""
        rows = [self.layers.index(layer) for layer in candidate.layers]
        places = [self.positions.index(position) for position in candidate.positions]
        return self.values[split][:, rows][:, :, places]


def fit_guard(backend: "Backend", data: "Dataset", *, name: str = "", search: Search | None = None, **settings: Any) -> LatentGuard:
    """`LatentGuard.fit`: choose, fit on train, calibrate on validation, measure on test."""
    try:
        search = search or Search(**settings)
    except ValidationError as error:
        raise InputError(problem("guard", error)) from error
    check_sides(data)
    data = search.of(data)
    check_sides(data)
    candidates = candidates_of(search, backend.n_layers)
    states = States(backend, data, *_union(candidates), search.terminal)
    return fitted(backend, data, states, candidates, search, name)


def check_sides(data: "Dataset") -> None:
    """Refuse data that lack a side in a split, or a label."""
    for split in SPLITS:
        prompts = list(getattr(data, split))
        if unlabelled := next((p.id for p in prompts if p.harmful is None), None):
            raise InputError(f"data {data.name}: prompt {unlabelled} has no label; a guard is fitted on labelled prompts")
        n = sum(bool(p.harmful) for p in prompts)
        if not 0 < n < len(prompts):
            raise InputError(
                f"data {data.name}: the {split} split has {n} harmful and {len(prompts) - n} harmless prompts; a guard needs both sides in each split"
                " (data=guard joins sets, data.split=[…] shares them out)"
            )


def candidates_of(search: Search, n_layers: int) -> list[Candidate]:
    """Everything that is tried; methods without regularisation are tried once."""
    found = []
    for together in search.layers:
        layers = tuple(sorted(set(resolve_layers(list(together), n_layers))))
        for places in search.positions:
            for method in search.methods:
                strengths = (1.0,) if method in ("paper", "mean_difference") else search.strengths
                found += [Candidate(method, layers, tuple(places), float(strength)) for strength in strengths]
    return list(dict.fromkeys(found))


def _union(candidates: Sequence[Candidate]) -> tuple[list[int], list[str]]:
    layers = sorted({layer for one in candidates for layer in one.layers})
    return layers, list(dict.fromkeys(place for one in candidates for place in one.positions))


def fitted(backend: "Backend", data: "Dataset", states: States, candidates: Sequence[Candidate], search: Search, name: str) -> LatentGuard:
    """The best of the candidates as a guard, with all that was seen on the way in `about`."""
    tried = [{**asdict(one), "auroc": judged(one, states, search)} for one in tqdm(candidates, desc="guard candidates", leave=False, delay=2)]
    best = candidates[int(np.argmax([row["auroc"] for row in tried]))]
    probe = fit_on(best, states, search, np.ones(len(states.prompts["train"]), bool))
    raw = {split: probe.raw(states.of(split, best)).numpy() for split in SPLITS}
    harmful = states.harmful
    calibration = {"platt": platt, "isotonic": isotonic}[search.calibration](raw["validation"], harmful["validation"])
    scores = {split: calibration(found) for split, found in raw.items()}
    made = LatentGuard(
        name=name or f"{data.name}_{backend.name}",
        model=backend.name,
        weights=backend.weights,
        template=str(backend.key().get("template", "")),
        n_layers=backend.n_layers,
        d_model=backend.d_model,
        layers=best.layers,
        positions=best.positions,
        terminal=search.terminal,
        method=best.method,
        probe=probe,
        calibration=calibration,
        thresholds=promised(scores["validation"], harmful["validation"], search.thresholds),
        reference=Reference.of(states.of("train", best), states.of("validation", best), raw["validation"]),
        domains=_domains(scores["validation"], harmful["validation"], states.prompts["validation"], search),
        backend=backend,
    )
    alone = baseline_scores(backend, states.shown["train"], states.shown["test"])
    found = areas({"guard": raw["test"], **alone}, harmful["test"])
    about = {
        "search": asdict(search),
        "tried": tried,
        "strength": best.strength,
        "data": {"name": data.name, "hash": data.hash, **data.card, "counts": _counts(states), "ids": _hashes(states)},
        "validation": measured(scores["validation"], harmful["validation"], made),
        "test": measured(scores["test"], harmful["test"], made),
        "baselines": {key: value.as_dict() for key, value in found.items() if key != "guard"},
        "warnings": warnings_of(found["guard"], {key: value for key, value in found.items() if key != "guard"}),
    }
    for sentence in about["warnings"]:
        log.warning("guard %s: %s", made.name, sentence)
    return replace(made, about=about)


def judged(candidate: Candidate, states: States, search: Search) -> float:
    """How well a candidate ranks what it was not fitted on, by the search's criterion."""
    if search.criterion == "within":
        probe = fit_on(candidate, states, search, np.ones(len(states.prompts["train"]), bool))
        raw, y = probe.raw(states.of("validation", candidate)).numpy(), states.harmful["validation"]
    else:
        raw, y = unseen_scores(candidate, states, search, "train"), states.harmful["train"]
    return auroc(raw[y], raw[~y]).value


def unseen_scores(candidate: Candidate, states: States, search: Search, split: str) -> np.ndarray:
    """Raw scores [prompt] of a split, those of every family by a probe fitted on the train prompts of the others.

    Probes have no common unit: each is set so that the train prompts it was fitted on have mean 0 and deviation 1 on either side's average.
    A single family is dealt into five parts by group instead.
    """
    train, scored = (parts(states, search, one) for one in ("train", split))
    found = np.full(len(scored), np.nan)
    for family in dict.fromkeys(scored):
        rows = train != family
        y = states.harmful["train"][rows]
        if not y.any() or y.all():
            raise InputError(f"without {family} the train split has prompts on one side alone: join another set, or set criterion=within")
        probe = fit_on(candidate, states, search, rows)
        here = scored == family
        own, other = (probe.raw(states.of(of, candidate)[torch.from_numpy(those)]).numpy() for of, those in (("train", rows), (split, here)))
        fitted = np.arange(len(own) + len(other)) < len(own)
        found[here] = standard(np.concatenate([own, other]), fitted, np.concatenate([y, np.zeros(len(other), bool)]))[~fitted]
    return found


def parts(states: States, search: Search, split: str) -> np.ndarray:
    """What is left out together with each prompt of a split: its family; where the train split has one family alone, one of five lots of groups."""
    if len({search.family(p) for p in states.prompts["train"]}) > 1:
        return np.array([search.family(p) for p in states.prompts[split]])
    return np.array([f"part {int(digest(p.group)[:8], 16) % 5 + 1} of 5" for p in states.prompts[split]])


def fit_on(candidate: Candidate, states: States, search: Search, rows: np.ndarray) -> Probe:
    """The candidate's probe on some of the train prompts."""
    prompts = [p for p, kept in zip(states.prompts["train"], rows, strict=True) if kept]
    weights = balanced(prompts, states.harmful["train"][rows]) if search.balance else None
    chosen = torch.from_numpy(rows)
    values, y = states.of("train", candidate)[chosen], torch.from_numpy(states.harmful["train"][rows])
    return fit_probe(candidate.method, values, y, strength=candidate.strength, weights=weights, seed=search.seed)


def balanced(prompts: Sequence[Prompt], harmful: np.ndarray) -> np.ndarray:
    """A weight a prompt: a source of n prompts on a side counts as √n there, and both sides count alike; the mean is 1."""
    weights = np.ones(len(prompts))
    sources = np.array([p.source for p in prompts])
    for side in (harmful, ~harmful):
        for source in set(sources[side]):
            own = side & (sources == source)
            weights[own] = own.sum() ** -0.5
        weights[side] /= weights[side].sum()
    return weights / weights.mean()


def measured(scores: np.ndarray, harmful: np.ndarray, guard: LatentGuard) -> dict[str, Any]:
    """The numbers of a split, as JSON holds them: ranking, calibration, what each threshold does."""
    high, low = scores[harmful], scores[~harmful]
    values: dict[str, Value] = {"auroc": auroc(high, low), "ece": calibration_error(scores, harmful)}
    values |= {f"tpr_at_{level:.0%}": tpr_at_fpr(high, low, level) for level in (0.01, 0.05)}  # pyright: ignore[reportAssignmentType]
    kept = {
        name: {"fpr": rate([bool(x) for x in low >= one.value]).as_dict(), "recall": rate([bool(x) for x in high >= one.value]).as_dict()}
        for name, one in guard.thresholds.items()
    }
    return {"n": len(scores), "harmful": int(harmful.sum()), **{key: one.as_dict() for key, one in values.items()}, "thresholds": kept}


def _domains(scores: np.ndarray, harmful: np.ndarray, prompts: Sequence[Prompt], search: Search) -> dict:
    if search.domains is None:
        return {}
    of = np.array([getattr(p, search.domains) for p in prompts])
    found = {domain: promised(scores[of == domain], harmful[of == domain], search.thresholds) for domain in dict.fromkeys(of) if domain}
    return {domain: own for domain, own in found.items() if own}


def _counts(states: States) -> dict[str, dict[str, int]]:
    """Train prompts by source and label."""
    found: dict[str, dict[str, int]] = {}
    for prompt in states.prompts["train"]:
        own = found.setdefault(prompt.source or "(none)", {})
        own[prompt.label] = own.get(prompt.label, 0) + 1
    return found


def _hashes(states: States) -> dict[str, str]:
    """One hash a split, of what was shown."""
    return {split: digest(sorted(p.instruction for p in shown))[:16] for split, shown in states.shown.items()}

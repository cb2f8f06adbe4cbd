"""Fits a guard: which layers, positions and method, chosen on held-out groups; calibrated on validation, measured on test. Knows no study."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor
from tqdm.auto import tqdm

from latentguard.errors import InputError
from latentguard.guards.baselines import Baselines, areas, standard, warnings_of
from latentguard.guards.calibration import calibrated, calibration_error
from latentguard.guards.drift import Reference
from latentguard.guards.forms import twins
from latentguard.guards.guard import LatentGuard, promised
from latentguard.guards.marks import training
from latentguard.guards.probes import Probe, fit_probe
from latentguard.guards.search import SPLITS, Candidate, Search, candidates_of, union
from latentguard.metrics import Z95, Value, auroc, rate, tpr_at_fpr
from latentguard.prompts import Prompt, digest
from latentguard.weights import problem

if TYPE_CHECKING:
    from latentguard.backends import Backend
    from latentguard.datasets import Dataset

log = logging.getLogger(__name__)


class States:
    """The states of a data set's splits and of the train prompts' twins, read once for all candidates, and what words alone say of them.

    Attributes:
        twin_of: of each twin, the row of its prompt in the train split.
    """

    def __init__(self, backend: "Backend", data: "Dataset", candidates: Sequence[Candidate], search: Search) -> None:
        self.backend, self.search = backend, search
        self.layers, self.positions = union(candidates)
        self.prompts = {split: list(getattr(data, split)) for split in SPLITS}
        made, rows = twins(backend, self.prompts["train"], search.forms, search.seed)
        self.twin_of = np.array(rows, dtype=int)
        self.shown = {split: training(prompts, search.terminal) for split, prompts in (self.prompts | {"twins": made}).items()}
        self.values = {split: backend.read(shown, self.layers, self.positions).values for split, shown in self.shown.items() if shown}
        self.harmful = {split: np.array([bool(p.harmful) for p in prompts]) for split, prompts in self.prompts.items()}

    def of(self, split: str, candidate: Candidate) -> Tensor:
        """Those that a candidate reads."""
        rows = [self.layers.index(layer) for layer in candidate.layers]
        places = [self.positions.index(position) for position in candidate.positions]
        return self.values[split][:, rows][:, :, places]

    @cached_property
    def words(self) -> Baselines:
        """What words alone tell, over all three splits in their order; twins are left out."""
        return Baselines(self.backend, [p for split in SPLITS for p in self.shown[split]])

    @cached_property
    def alone(self) -> dict[str, np.ndarray]:
        """Scores [prompt] of the test split by each baseline, fitted on the train split."""
        return self.words.scores(self.mask("train"), self.mask("test"))

    def mask(self, split: str) -> np.ndarray:
        """Which of all prompts, the splits in their order, are of a split."""
        return np.concatenate([np.full(len(self.prompts[one]), one == split) for one in SPLITS])


def fit_guard(backend: "Backend", data: "Dataset", *, name: str = "", search: Search | None = None, **settings: Any) -> LatentGuard:
    """`LatentGuard.fit`: choose, fit on train, calibrate on validation, measure on test."""
    try:
        search = search or Search(**settings)
    except ValidationError as error:
        raise InputError(problem("guard", error)) from error
    data = search.of(data)
    candidates = candidates_of(search, backend.n_layers)
    return fitted(data, States(backend, data, candidates, search), candidates, name)


def fitted(data: "Dataset", states: States, candidates: Sequence[Candidate], name: str) -> LatentGuard:
    """The best of the candidates as a guard, with all that was seen on the way in `about`."""
    backend, search, harmful = states.backend, states.search, states.harmful
    ranks = [judged(one, states) for one in tqdm(candidates, desc="guard candidates", leave=False, delay=2)]
    tried = [{**asdict(one), "auroc": found.value, "low": found.low, "high": found.high} for one, found in zip(candidates, ranks, strict=True)]
    best = candidates[simplest([len(one.layers) * len(one.positions) for one in candidates], ranks)]
    probe = fit_on(best, states, _everyone(states))
    raw = {split: probe.raw(states.of(split, best)).numpy() for split in ("validation", "test")}
    calibration = calibrated(search.calibration, raw["validation"], harmful["validation"])
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
        thresholds={},
        reference=Reference.of(states.of("train", best), states.of("validation", best), raw["validation"]),
        backend=backend,
        piece=search.piece,
    )
    scores = {split: made.rescored(calibration(found), states.shown[split]) for split, found in raw.items()}
    domains = _domains(scores["validation"], harmful["validation"], states.prompts["validation"], search)
    made = replace(made, thresholds=promised(scores["validation"], harmful["validation"], search.thresholds), domains=domains)
    found = areas({"guard": raw["test"], **states.alone}, harmful["test"])
    about = {
        "search": asdict(search),
        "tried": tried,
        "strength": best.strength,
        "data": {"name": data.name, "hash": data.hash, **data.card, "counts": _counts(states), "ids": _hashes(states)},
        "forms": _forms(states),
        "validation": measured(scores["validation"], harmful["validation"], made),
        "test": measured(scores["test"], harmful["test"], made),
        "baselines": {key: value.as_dict() for key, value in found.items() if key != "guard"},
        "warnings": warnings_of(found["guard"], {key: value for key, value in found.items() if key != "guard"}),
    }
    for sentence in about["warnings"]:
        log.warning("guard %s: %s", made.name, sentence)
    return replace(made, about=about)


def simplest(sizes: Sequence[int], ranks: Sequence[Value]) -> int:
    """Which candidate is taken: of those whose AUROC is within one standard error of the highest, that which reads the fewest states; of several
    such the one that ranks best (the one-standard-error rule of Breiman et al. 1984).
    """
    top = max(ranks, key=lambda found: found.value)
    error = (top.high - top.low) / (2 * Z95)
    near = [k for k, found in enumerate(ranks) if found.value >= top.value - error]
    return min(near, key=lambda k: (sizes[k], -ranks[k].value))


def judged(candidate: Candidate, states: States) -> Value:
    """AUROC of a candidate on what it was not fitted on, by the search's criterion."""
    if states.search.criterion == "within":
        raw, y = fit_on(candidate, states, _everyone(states)).raw(states.of("validation", candidate)).numpy(), states.harmful["validation"]
    else:
        raw, y = unseen_scores(candidate, states, "train"), states.harmful["train"]
    return auroc(raw[y], raw[~y])


def unseen_scores(candidate: Candidate, states: States, *splits: str) -> np.ndarray:
    """Raw scores [prompt] of splits one after another, those of every family by a probe fitted on the train prompts of the others.

    Probes have no common unit: each is set so that the train prompts it was fitted on have mean 0 and deviation 1 on either side's average.
    A single family is dealt into five parts by group instead.
    """
    train, scored = parts(states, "train"), np.concatenate([parts(states, split) for split in splits])
    values = torch.cat([states.of(split, candidate) for split in splits])
    found = np.full(len(scored), np.nan)
    for family in dict.fromkeys(scored):
        rows, here = train != family, scored == family
        y = states.harmful["train"][rows]
        if not y.any() or y.all():
            raise InputError(f"without {family} the train split has prompts on one side alone: join another set, or set criterion=within")
        probe = fit_on(candidate, states, rows)
        own, other = (probe.raw(those[torch.from_numpy(of)]).numpy() for those, of in ((states.of("train", candidate), rows), (values, here)))
        of_train = np.arange(len(own) + len(other)) < len(own)
        found[here] = standard(np.concatenate([own, other]), of_train, np.concatenate([y, np.zeros(len(other), bool)]))[~of_train]
    return found


def parts(states: States, split: str) -> np.ndarray:
    """What is left out together with each prompt of a split: its family; where the train split has one family alone, one of five lots of groups."""
    family = states.search.family
    if len({family(p) for p in states.prompts["train"]}) > 1:
        return np.array([family(p) for p in states.prompts[split]])
    return np.array([f"part {int(digest(p.group)[:8], 16) % 5 + 1} of 5" for p in states.prompts[split]])


def fit_on(candidate: Candidate, states: States, rows: np.ndarray) -> Probe:
    """The candidate's probe on some of the train prompts and their twins; a prompt and its twin share the prompt's weight."""
    prompts = [p for p, kept in zip(states.prompts["train"], rows, strict=True) if kept]
    values, y = states.of("train", candidate)[torch.from_numpy(rows)], states.harmful["train"][rows]
    weights = balanced(prompts, y) if states.search.balance else None
    beside = rows[states.twin_of]
    if beside.any():
        at = (np.cumsum(rows) - 1)[states.twin_of[beside]]  # of each twin, its prompt's row among the chosen
        weights = np.ones(len(prompts)) if weights is None else weights
        weights[at] /= 2
        weights, y = np.concatenate([weights, weights[at]]), np.concatenate([y, y[at]])
        values = torch.cat([values, states.of("twins", candidate)[torch.from_numpy(beside)]])
        weights *= len(weights) / weights.sum()
    return fit_probe(candidate.method, values, torch.from_numpy(y), strength=candidate.strength, weights=weights, seed=states.search.seed)


def _everyone(states: States) -> np.ndarray:
    return np.ones(len(states.prompts["train"]), bool)


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


def _forms(states: States) -> dict[str, int]:
    """Twins by their form."""
    found: dict[str, int] = {}
    for twin in states.shown["twins"]:
        form = twin.id.rsplit("~", 1)[1]
        found[form] = found.get(form, 0) + 1
    return dict(sorted(found.items()))

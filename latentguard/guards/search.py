"""What is tried for a guard, and how the best is told: settings alone. Knows no state."""

from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from latentguard.datasets import PromptSet
from latentguard.errors import InputError
from latentguard.guards.calibration import KINDS, promise
from latentguard.guards.forms import FORMS, check_forms
from latentguard.guards.guard import PROMISES
from latentguard.guards.marks import check_terminal
from latentguard.guards.pieces import check_piece
from latentguard.guards.probes import METHODS
from latentguard.layers import resolve_layers
from latentguard.positions import parse_position
from latentguard.prompts import Prompt
from latentguard.settings import check_seed

if TYPE_CHECKING:
    from latentguard.datasets import Dataset

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
            train and scores validation. The first asks for what a guard meets in use. Of candidates within a standard error of the best, that
            with the fewest states is taken.
        families: names for sources that belong together, so that none of a family is trained on while another is scored.
        balance: whether every source counts with the root of its size on either side, and both sides alike.
        terminal: how texts end (marks.py).
        piece: tokens of the pieces in which texts of more than twice as many are scored (pieces.py); None: whole. Probes are fitted and candidates
            compared on whole texts; thresholds and the numbers of the splits are of what `score` gives.
        forms: of forms.py; every train prompt has a twin in one of them, of the same label, which is fitted on beside it and neither scored nor
            calibrated on. Empty: none.
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
    piece: int | None = 24
    forms: tuple[str, ...] = FORMS
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
        check_piece(self.piece)
        check_forms(self.forms)
        for name in self.thresholds:
            promise(name)
        check_seed(self.seed)

    def family(self, prompt: Prompt) -> str:
        """Which family a prompt's set belongs to; by itself where none is named."""
        return next((name for name, members in (self.families or {}).items() if prompt.source in members), prompt.source)

    def of(self, data: "Dataset") -> "Dataset":
        """The data as a guard of `categories` is to see them.

        Raises:
            InputError: for a category that no harmful prompt has, a prompt without a label, and a split that lacks a side.
        """
        check_sides(data)
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
        one = replace(data, name=f"{data.name}_{'_'.join(self.categories)}", **turned)
        check_sides(one)
        return one


@plain_dataclass(frozen=True)
class Candidate:
    """One thing that is tried."""

    method: str
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    strength: float


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


def union(candidates: Sequence[Candidate]) -> tuple[list[int], list[str]]:
    """All layers and positions that candidates read."""
    layers = sorted({layer for one in candidates for layer in one.layers})
    return layers, list(dict.fromkeys(place for one in candidates for place in one.positions))

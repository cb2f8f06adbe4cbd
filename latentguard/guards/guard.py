"""LatentGuard: prompts → calibrated probabilities of harm, out of the model's own states. Knows no experiment and no server.

guard = LatentGuard.fit(backend, data)      # fitting.py chooses layers, positions and method on validation
guard.score(["How do I bake bread?"])       # array of probabilities
guard.save("guards/mine"); LatentGuard.load("guards/mine", backend)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from latentguard.errors import InputError
from latentguard.guards.calibration import Calibration, Threshold, calibrated, named, threshold
from latentguard.guards.drift import Drift, Reference, drift, finite
from latentguard.guards.lineage import read_on
from latentguard.guards.marks import seen, turns
from latentguard.guards.pieces import apart, together
from latentguard.guards.probes import Probe
from latentguard.prompts import Prompt, as_prompts

if TYPE_CHECKING:
    from latentguard.backends import Backend
    from latentguard.datasets import Dataset

PROMISES = ("fpr=0.01", "fpr=0.05", "recall=0.95")


@dataclass(frozen=True)
class Turn:
    """One user turn of a conversation, with all before it: its place among the messages, and P(harmful)."""

    index: int
    probability: float


@dataclass(frozen=True, eq=False)
class LatentGuard:
    """A detector of harmful requests that reads the hidden states of the model it guards (arXiv 2507.11878, §5, extended).

    Attributes:
        name: of the guard.
        model: the model's name; `weights` and `template` are hashes of its weights and of its chat template, `n_layers` and `d_model`
            its shape: a guard holds for no other.
        layers: states read, ascending; the forward pass ends at the last.
        positions: where they are read, in the grammar of positions.py.
        terminal: how texts end (marks.py): `period` or `mixed`.
        method: one of probes.METHODS; `probe` is what was fitted.
        calibration: raw scores → probabilities.
        thresholds: by what they promise: "fpr=0.01", "fpr=0.05", "recall=0.95", as far as validation has prompts enough.
        piece: tokens of the pieces in which longer texts are scored (pieces.py); None: every text whole.
        domains: thresholds chosen on one domain's own prompts, by the domain's name.
        reference: what validation looked like, for `drift`.
        about: what made it and what it was seen to do, as JSON holds it: data, validation and test numbers, baselines, warnings.
        backend: the model; None until it is given one.
    """

    name: str
    model: str
    weights: str
    template: str
    n_layers: int
    d_model: int
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    terminal: str
    method: str
    probe: Probe
    calibration: Calibration
    thresholds: dict[str, Threshold]
    reference: Reference
    domains: dict[str, dict[str, Threshold]] = field(default_factory=dict)
    piece: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    backend: "Backend | None" = None

    # Fitted, kept, taken up again.

    @classmethod
    def fit(cls, backend: "Backend", data: "Dataset", **settings: Any) -> "LatentGuard":
        """Fitted on the train split, chosen and calibrated on the validation split, measured on the test split.

        Args:
            settings: fields of `search.Search` (`methods`, `layers`, `positions`, `strengths`, `terminal`, `seed`, …), and `name`.

        Raises:
            InputError: for settings that cannot be, and data without prompts on both sides of each split.
        """
        from latentguard.guards.fitting import fit_guard

        return fit_guard(backend, data, **settings)

    def save(self, folder: str | Path) -> Path:
        """Write the guard's folder: guard.json, guard.safetensors, README.md (its card)."""
        from latentguard.guards.folder import save

        return save(self, folder)

    @classmethod
    def load(cls, folder: str | Path, backend: "Backend | None" = None, *, descendant: bool = False) -> "LatentGuard":
        """What `save` wrote, on the model that it was fitted on.

        Args:
            descendant: take other weights of the same shape and template, such as a fine-tuned model's; what holds then is said.

        Raises:
            InputError: for a folder that is damaged or altered, and for another model or template.
        """
        from latentguard.guards.folder import load

        return load(folder, backend, descendant=descendant)

    def push_to_hub(self, repo: str, **settings: Any) -> str:
        """Upload the guard's folder to the Hub; its address."""
        from latentguard.guards.hub import push

        return push(self, repo, **settings)

    @classmethod
    def from_pretrained(cls, repo: str, backend: "Backend | None" = None, *, descendant: bool = False, **settings: Any) -> "LatentGuard":
        """A guard from the Hub, or from a folder of that name."""
        from latentguard.guards.hub import pull

        return cls.load(pull(repo, **settings), backend, descendant=descendant)

    def on(self, backend: "Backend", *, descendant: bool = False) -> "LatentGuard":
        """The same guard reading this model.

        Raises:
            InputError: where it is not the model that the guard was fitted on.
        """
        check_model(self, backend, descendant=descendant)
        return replace(self, backend=backend, about=read_on(self, backend))

    def check(self, backend: "Backend") -> None:
        """Refuse to judge what another model than the guard's own makes of a prompt (`backend.generate(…, guard=guard)`).

        Raises:
            InputError: as `on`; the model that the guard was put on as a descendant is its own.
        """
        if self.backend is None or self.backend.weights != backend.weights:
            check_model(self, backend)

    # Used.

    def score(self, prompts: object) -> Float[np.ndarray, " prompt"]:
        """P(harmful) of each prompt's last user turn, calibrated; one forward pass that ends at the guard's deepest layer. Turns of more than
        twice `piece` tokens are passed in pieces, and the answer is the odds that a harmful request stands in one of them.

        Args:
            prompts: strings, Prompts, or conversations (lists of {role, content}).
        """
        passed, rows = self.passed(prompts)
        return together(self.probabilities(self.states(passed)), rows)

    def passed(self, prompts: object) -> tuple[list[Prompt], Int[np.ndarray, " passed"]]:
        """What the model is given when prompts are scored, and the row of the prompt that each text is of, or is a piece of."""
        return apart(self._model(), seen(prompts, self.terminal), self.piece, self.terminal, self.positions)

    def score_chat(self, messages: object) -> list[Turn]:
        """P(harmful) of every user turn of one conversation, each seen with what was said before it."""
        found = turns(messages)
        scores = self.score(found)
        return [Turn(len(prompt.messages) - 1, float(p)) for prompt, p in zip(found, scores, strict=True)]

    def flags(self, prompts: object, at: str = "fpr=0.05", domain: str | None = None) -> np.ndarray:
        """Whether each prompt is flagged by a named threshold, or by that of a domain."""
        return self.score(prompts) >= self.threshold(at, domain).value

    def threshold(self, at: str, domain: str | None = None) -> Threshold:
        """A named threshold.

        Raises:
            InputError: for a promise or a domain that the guard does not know.
        """
        return named((self if domain is None else self.within(domain)).thresholds, at)

    def within(self, domain: str) -> "LatentGuard":
        """The same guard flagging by a domain's thresholds.

        Raises:
            InputError: for a domain that the guard does not know.
        """
        if domain not in self.domains:
            raise InputError(f"domain {domain!r}: guard {self.name} has {', '.join(self.domains) or 'none'}; guard.with_domain(name, prompts) adds one")
        return replace(self, thresholds=self.domains[domain])

    def probabilities(self, states: Float[Tensor, "prompt layer position d_model"]) -> np.ndarray:
        """P(harmful) out of states that were read already, at the guard's layers and positions in its order."""
        wanted = (len(self.layers), len(self.positions), self.d_model)
        if tuple(states.shape[1:]) != wanted:
            raise InputError(f"states of shape {tuple(states.shape)}: this guard reads [prompt, {', '.join(map(str, wanted))}]")
        return self.calibration(self.probe.raw(finite(states.cpu())).numpy())

    def raw(self, prompts: object) -> np.ndarray:
        """The probe's own scores of whole texts, before calibration."""
        return self.probe.raw(self.states(seen(prompts, self.terminal))).numpy()

    def states(self, prompts: Sequence[Prompt]) -> Float[Tensor, "prompt layer position d_model"]:
        """What the guard reads of prompts that stand as it is to see them."""
        return finite(self._model().read(list(prompts), self.layers, self.positions).values)

    def _model(self) -> "Backend":
        if self.backend is None:
            raise InputError(f"guard {self.name} has no model yet: LatentGuard.load(folder, backend), or guard.on(backend), with {self.model}")
        return self.backend

    # Fitted to other traffic.

    def recalibrated(self, prompts: Sequence[Prompt], kind: str | None = None) -> "LatentGuard":
        """The same probe with probabilities and thresholds from other labelled prompts, taken as in use: one's own traffic, or a fine-tuned
        model's.
        """
        import torch

        shown = seen(prompts, self.terminal)
        states = torch.cat([self.states(shown[at : at + 256]) for at in range(0, len(shown), 256)])
        raw, harmful = self.probe.raw(states).numpy(), np.array([bool(p.harmful) for p in prompts])
        calibration = calibrated(kind or self.calibration.kind, raw, harmful)
        made = replace(self, calibration=calibration, domains={})
        made = replace(made, thresholds=promised(made.rescored(calibration(raw), shown), harmful))
        reference = replace(self.reference, raw=Reference.of(states, states, raw).raw, n=len(raw))
        backend = self._model()
        done = {"n": len(raw), "harmful": int(harmful.sum()), "model": backend.name, "weights": backend.weights}
        made = replace(made, reference=reference, about={**self.about, "recalibrated": done})
        return replace(made, about=read_on(made, backend))

    def rescored(self, scores: np.ndarray, shown: Sequence[Prompt]) -> np.ndarray:
        """Probabilities of whole texts with those of long ones put right: the ones that `score` gives in pieces."""
        rows = np.bincount(self.passed(shown)[1]) > 1
        if not rows.any():
            return scores
        scores = scores.copy()
        scores[rows] = self.score([p for p, long in zip(shown, rows, strict=True) if long])
        return scores

    def with_domain(self, name: str, prompts: object) -> "LatentGuard":
        """The same guard with thresholds of one domain's own, chosen on its prompts, taken as in use.

        Args:
            prompts: strings, Prompts or conversations. One without a label counts as harmless, so that of unlabelled traffic a threshold
                promises which share of all is flagged; harmless ones alone give the thresholds for false positives.

        Raises:
            InputError: too few prompts for any threshold.
        """
        prompts = as_prompts(prompts)
        own = promised(self.score(prompts), np.array([bool(p.harmful) for p in prompts], bool))
        if not own:
            raise InputError(f"domain {name!r}: {len(prompts)} prompts carry no threshold; one at fpr=0.05 needs 20 harmless ones, one at fpr=0.01 100")
        return replace(self, domains={**self.domains, name: own})

    def drift(self, prompts: object) -> Drift:
        """Whether unlabelled traffic looks like what the guard was validated on."""
        shown = seen(prompts, self.terminal)
        states = self.states(shown)
        raw = self.probe.raw(states).numpy()
        scores = self.rescored(self.calibration(raw), shown)
        return drift(self.reference, states, raw, {name: scores >= one.value for name, one in self.thresholds.items()})


def promised(probabilities: np.ndarray, harmful: np.ndarray, names: Sequence[str] = PROMISES) -> dict[str, Threshold]:
    """Every threshold that these prompts can carry."""
    found = {name: threshold(name, probabilities, harmful) for name in names}
    return {name: one for name, one in found.items() if one is not None}


def check_model(guard: LatentGuard, backend: "Backend", *, descendant: bool = False) -> None:
    """Refuse a model that a guard was not fitted on.

    Raises:
        InputError: for another shape or template, and for other weights unless `descendant`.
    """
    if (guard.n_layers, guard.d_model) != (backend.n_layers, backend.d_model):
        raise InputError(
            f"guard {guard.name} was fitted on {guard.model} ({guard.n_layers} layers × {guard.d_model}), and {backend.name} has "
            f"{backend.n_layers} × {backend.d_model}: fit one on this model (exp=fit_guard)"
        )
    key: Mapping[str, Any] = backend.key()
    if guard.template != key.get("template", ""):
        raise InputError(
            f"guard {guard.name} was fitted with another chat template or system text than {backend.name} has here: load the model as it was then, or fit anew"
        )
    if guard.weights != backend.weights and not descendant:
        raise InputError(
            f"guard {guard.name} was fitted on other weights ({guard.model}) than {backend.name}: fit one on these, or pass descendant=True for a "
            "fine-tuned model; then it still ranks, as far as fine-tuning left the states alone, and its probabilities and thresholds are unmeasured"
        )

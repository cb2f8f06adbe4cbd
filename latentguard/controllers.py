"""What is done about prompts that a guard flags, before a token is chosen: nothing, a refusal, or steering. Knows no guard and no backend.

`backend.generate(prompts, guard=guard, controller=Refuse())` (docs/guarding.md). Each is a `backends.Controller`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from latentguard.directions import Direction
from latentguard.errors import InputError
from latentguard.interventions import Ablate, Add, Cell, Intervention, Patch, Scale, When
from latentguard.layers import Layers

REFUSAL = "I can't help with that."
STEPS = 10  # strengths that a graded controller has


@dataclass(frozen=True)
class Flag:
    """Mark the replies to flagged prompts, change none.

    Args:
        at: the name of the guard's threshold.
    """

    at: str = "fpr=0.05"
    cells: ClassVar[tuple[Cell, ...]] = ()

    def __post_init__(self) -> None:
        _named(self.at)

    def choose(self, probability: float, threshold: float) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Refuse:
    """Answer flagged prompts with `text`; the model chooses no token for them.

    Args:
        at: the name of the guard's threshold.
    """

    at: str = "fpr=0.05"
    text: str = REFUSAL
    cells: ClassVar[tuple[Cell, ...]] = ()

    def __post_init__(self) -> None:
        _named(self.at)
        if not isinstance(self.text, str) or not self.text.strip():
            raise InputError(f"text={self.text!r}: say what flagged prompts are answered with")

    def choose(self, probability: float, threshold: float) -> str:
        """The text."""
        return self.text


@dataclass(frozen=True, eq=False)
class Steer:
    """Answer flagged prompts with interventions acting, and only these.

    Args:
        acts: a list of interventions that act together; or a Direction, of which `coef` times its vector is added.
        coef: of a Direction; 1 where it is not given.
        at: the name of the guard's threshold.
        graded: the strength grows with the probability p, in tenths: the least at the threshold t, all at p = 1, in between
            (p - t) / (1 - t) rounded up. Tenths, so that flagged prompts run side by side and a rounding error changes no reply.
        layer: of a Direction; may be left out where it has one.
        positions: of a Direction; 'all' where it is not given.
        when: of a Direction; 'prefill' where it is not given.

    Attributes:
        cells: the interventions at each strength, ascending.

    Raises:
        InputError: for anything else, and, graded, interventions of a kind whose strength is not ours to know.
    """

    acts: Direction | Sequence[Intervention]
    coef: float | None = None
    at: str = "fpr=0.05"
    graded: bool = False
    layer: Layers | None = field(default=None, kw_only=True)
    positions: str | None = field(default=None, kw_only=True)
    when: When | None = field(default=None, kw_only=True)
    cells: tuple[Cell, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _named(self.at)
        shares = [step / STEPS for step in range(1, STEPS + 1)] if self.graded else [1.0]
        acts = self._acts()
        object.__setattr__(self, "cells", tuple(Cell(tuple(act if share == 1 else weakened(act, share) for act in acts)) for share in shares))

    def _acts(self) -> tuple[Intervention, ...]:
        given = {"coef": self.coef, "layer": self.layer, "positions": self.positions, "when": self.when}
        given = {name: value for name, value in given.items() if value is not None}
        if isinstance(self.acts, Direction):
            if len(self.acts.layers) == 1:
                given.setdefault("layer", self.acts.layers[0])
            if "layer" not in given:
                raise InputError(f"Steer: the direction has {len(self.acts.layers)} layers: name the one or those to steer at, layer=…")
            return (Add(self.acts, **given),)  # type: ignore[arg-type]
        if isinstance(self.acts, Intervention | str) or not isinstance(self.acts, Sequence):
            raise InputError(f"Steer: {type(self.acts).__name__} is neither a Direction nor a list of interventions, [Add(…)]")
        if given:
            raise InputError(f"Steer: {', '.join(given)} beside interventions, which have their own: set it in each of them")
        wrong = [type(act).__name__ for act in self.acts if not isinstance(act, Intervention)]
        if wrong or not self.acts:
            raise InputError(f"Steer: {wrong[0] if wrong else 'an empty list'} is no intervention: give Add(…), Scale(…), Ablate(…) or Patch(…)")
        return tuple(self.acts)

    def choose(self, probability: float, threshold: float) -> int:
        """Which of `cells`."""
        if not self.graded:
            return 0
        share = (probability - threshold) / (1 - threshold) if threshold < 1 else 1.0
        return max(1, math.ceil(round(share * STEPS, 6))) - 1


def weakened(act: Intervention, share: float) -> Intervention:
    """An intervention with a share of its strength: 1 is its own, 0 changes nothing."""
    if isinstance(act, Add | Patch):
        return replace(act, coef=act.coef * share)
    if isinstance(act, Scale):
        return replace(act, factor=1 + (act.factor - 1) * share)
    if isinstance(act, Ablate):
        return Scale(act.direction, factor=1 - share, layer=act.layer, positions=act.positions, when=act.when)
    raise InputError(f"graded=True: how strong a {type(act).__name__} is cannot be told from outside; grade Add, Scale, Ablate or Patch")


def _named(at: object) -> None:
    if not isinstance(at, str) or not at.strip():
        raise InputError(f"at={at!r}: name a threshold of the guard, such as fpr=0.05")

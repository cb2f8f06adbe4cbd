"""Does a direction, or a state of another sentence, make a model call a statement TRUE or FALSE? In the form of arXiv 2504.02904. Knows no study.

Steering: the direction, at every layer of a window, on the statement's last two tokens (its last word's and its period). Patching: the residual
stream of a true statement put into a false one of the same frame, at one layer and token.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from latentguard.backends import Backend
from latentguard.backends.second import float32_head
from latentguard.behaviour import Shares
from latentguard.directions import Activations, Direction
from latentguard.errors import InputError
from latentguard.interventions import Add, Cell, Grid, Patch
from latentguard.metrics import Rate, Value, mean, pearson, rate
from latentguard.positions import Rendered
from latentguard.prompts import Prompt
from latentguard.statements import ANSWERS, TAIL, Statement, in_context

LEVELS = 20  # of the paper's binned maps; the lower half of them counts as 0
_DRAWS = 1000
_LEAST_GAP = 0.1  # in log-odds: of the mean true and false run, under which a share of it says nothing


@dataclass(frozen=True)
class Float32Shares(Shares):
    """The same from logits made in float32, and told apart from the others in a store."""

    def identity(self) -> object:
        """The sets, and the format."""
        return [*super().identity(), "float32 head"]  # type: ignore[misc]


@contextmanager
def answering(backend: Backend) -> Iterator[Shares]:
    """`answers`, from logits in float32 while this is open, whatever the model's number format (`backends.second.float32_head`)."""
    asked = answers(backend)
    with float32_head(backend) as finer:
        yield Float32Shares(asked.sets) if finer else asked


def answers(backend: Backend) -> Shares:
    """P of TRUE, of FALSE and of all else at the first token of the answer; a token that opens both counts for neither.

    Raises:
        InputError: where the tokenizer opens both with the same token.
    """
    found = [{backend.first_token(text) for text in (word, f" {word}")} for word in ANSWERS]
    sets = tuple(frozenset(one - (found[0] & found[1])) for one in found)
    if not all(sets):
        raise InputError(
            f"{backend.name}: its tokenizer opens TRUE and FALSE with the same tokens, so the first one tells nothing; leave part causal and maps out"
        )
    return Shares(sets)


def end_of(backend: Backend, prompts: Sequence[Prompt]) -> int:
    """How many tokens before t_inst the few-shot form's statement ends, with its period.

    Raises:
        InputError: where that differs between prompts.
    """
    found = set()
    for item in backend.render(list(prompts)):
        last = item.user[1] - len(TAIL) - 1  # the statement's last character
        user = item.user_tokens
        found.add(len(user) - 1 - max(i for i, t in enumerate(user) if item.offsets[t][0] <= last))
    if len(found) != 1:
        raise InputError(f"{backend.name}: the statement's period lies {sorted(found)} tokens from the end, not everywhere at one place; leave part causal out")
    return found.pop()


@dataclass(frozen=True, eq=False)
class Answered:
    """Δp = P(TRUE) − P(FALSE) of statements, true ones and false ones apart, and how sure the answers are.

    Args:
        true, false: Δp [statement].
        mass: mean P(TRUE) + P(FALSE).
    """

    true: np.ndarray
    false: np.ndarray
    mass: float

    @classmethod
    def of(cls, true: Sequence[Sequence[float]], false: Sequence[Sequence[float]]) -> "Answered":
        """From shares [statement][TRUE, FALSE, else]."""
        a, b = np.array(true, float), np.array(false, float)
        return cls(a[:, 0] - a[:, 1], b[:, 0] - b[:, 1], float(np.concatenate([a, b])[:, :2].sum(1).mean()))

    @cached_property
    def accuracy(self) -> Rate:
        """The share of statements to which the likelier answer is the right one."""
        return rate([*(self.true > 0), *(self.false < 0)])

    @property
    def at_chance(self) -> str:
        """'' where the model knows true from false; else why nothing can be asked of it."""
        if self.accuracy.low > 0.5:
            return ""
        return f"TRUE or FALSE is answered rightly for {self.accuracy}, which is chance"


def moved(after: np.ndarray, clean: np.ndarray, to: float) -> Value:
    """The paper's normalised indirect effect, (Δp_after − Δp) / (to − Δp) of the means: 0 nothing moved, 1 all the way to `to` (1 or −1). The
    interval resamples statements; NaN where the clean answers are there already.
    """
    if not len(clean) or abs(to - clean.mean()) < 1e-6:
        return Value(math.nan, math.nan, math.nan, len(clean))
    rows = np.random.default_rng(0).integers(0, len(clean), (_DRAWS, len(clean)))
    drawn = (after[rows].mean(1) - clean[rows].mean(1)) / (to - clean[rows].mean(1))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Value(float((after.mean() - clean.mean()) / (to - clean.mean())), float(low), float(high), len(clean))


def rescaled(direction: Direction, states: Activations, true: Sequence[Prompt], false: Sequence[Prompt], position: str, backend: Backend) -> Direction:
    """A direction of either model, to be added in this one: at each layer as long as its true and false states lie apart along it.

    Args:
        states: of this model, where `position` was read.
    """
    gap = states.at(position, true).double().mean(0) - states.at(position, false).double().mean(0)
    unit = direction.vectors.double() / direction.vectors.double().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    size = (gap * unit).sum(-1, keepdim=True)
    norms = states.at(position, [*true, *false]).norm(dim=-1).mean(0)
    about = f"{direction.method} of {direction.model}, as long as the gap in {backend.name}"
    return replace(direction, vectors=(unit * size).float(), residual_norm=norms, model=backend.name, weights=backend.weights, method=about)


@dataclass(frozen=True, eq=False)
class Steered:
    """The clean answers, and by the direction's name the answers with it added to false statements and taken from true ones."""

    clean: Answered
    after: Mapping[str, Answered]


def steer(
    backend: Backend, statements: Sequence[Statement], examples: Sequence[Statement], directions: Mapping[str, Direction], layers: Sequence[int]
) -> Steered:
    """Ask about statements untouched and under each direction, at these layers, on the statement's last token and its period."""
    sides = [[in_context(s, examples) for s in statements if s.true is side] for side in (True, False)]
    back = end_of(backend, [*sides[0], *sides[1]])
    places = [f"t_inst-{back}", f"t_inst-{back + 1}"]
    found = []
    for prompts, sign in zip(sides, (-1.0, 1.0), strict=True):
        cells = [Cell()] + [Cell(tuple(Add(d, layer=list(layers), coef=sign, positions=at) for at in places)) for d in directions.values()]
        with answering(backend) as reduce:
            found.append(backend.logits(prompts, Grid(tuple(cells)), reduce=reduce))
    pairs = [Answered.of(true, false) for true, false in zip(*found, strict=True)]
    return Steered(pairs[0], dict(zip(directions, pairs[1:], strict=True)))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Matched few-shot prompts, true and false, equal in length, that differ in the same tokens.

    Args:
        columns: tokens before t_inst that are patched, from the first that differs to the last: earlier ones have the same state in both runs.
        names: of these tokens; one that differs between the two is the entity's.
    """

    true: tuple[Prompt, ...]
    false: tuple[Prompt, ...]
    columns: tuple[int, ...]
    names: tuple[str, ...]


def align(backend: Backend, pairs: Sequence[tuple[Statement, Statement]], examples: Sequence[Statement], n: int) -> Pairs:
    """Of the pairs those of one shape (length, and place of what differs), the shape that most of them have; n at most."""
    shapes: dict[tuple[int, int, int], list[tuple[Prompt, Prompt]]] = {}
    prompts = [tuple(in_context(one, examples) for one in pair) for pair in pairs]
    rendered = [backend.render(list(pair)) for pair in prompts]
    for pair, (a, b) in zip(prompts, rendered, strict=True):
        other = [i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y]
        if len(a) == len(b) and other:
            shapes.setdefault((len(a), other[0], other[-1]), []).append((pair[0], pair[1]))
    if not shapes:
        return Pairs((), (), (), ())
    (length, first, last), chosen = max(shapes.items(), key=lambda item: (len(item[1]), item[0]))
    chosen = chosen[:n]
    names = _names([backend.render([pair[0]])[0] for pair in chosen], first, last)
    true, false = zip(*chosen, strict=True)
    return Pairs(true, false, tuple(length - 1 - i for i in range(first, length)), names)


def _names(rendered: Sequence[Rendered], first: int, last: int) -> tuple[str, ...]:
    """Of the tokens from the first that differs within pairs: the entity's, a word that differs between pairs, or the text that all share."""
    found: list[str] = []
    for i in range(first, len(rendered[0])):
        texts = {item.text[slice(*item.offsets[i])].strip() for item in rendered}
        name = f"entity {i - first + 1}" if i <= last else texts.pop() if len(texts) == 1 else "other word"
        found.append(name if name not in found else f"{name} ({1 + sum(one.split(' (')[0] == name for one in found)})")
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Map:
    """What putting a true run's state into the false run does to log P(TRUE) − log P(FALSE).

    Args:
        patched: [pair, layer, token].
        true, false: of both runs untouched, [pair].
    """

    patched: np.ndarray
    true: np.ndarray
    false: np.ndarray
    layers: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def gap(self) -> Value:
        """True run − false run, untouched."""
        return mean(self.true - self.false)

    @property
    def says_nothing(self) -> str:
        """'' where both runs differ; else why their map cannot be read."""
        if self.gap.low > _LEAST_GAP:
            return ""
        return f"log P(TRUE) − log P(FALSE) of the true run is above that of the false run by {self.gap}, too little to divide by"

    def of(self, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """The mean map over pairs (or some of them), [layer, token]: 0 the false run's answer, 1 the true run's."""
        at = np.arange(len(self.true)) if rows is None else np.asarray(rows)
        return (self.patched[at].mean(0) - self.false[at].mean()) / (self.true[at].mean() - self.false[at].mean())


def patch_map(backend: Backend, pairs: Pairs, layers: Sequence[int]) -> Map:
    """Patch each layer and token by itself, in every pair."""
    places = [f"t_inst-{back}" for back in pairs.columns]
    states = backend.read(list(pairs.true), list(layers), places)
    source = {false.id: true.id for true, false in zip(pairs.true, pairs.false, strict=True)}
    cells = [Cell((Patch(states, layer=layer, positions=place, source=source),)) for layer in layers for place in places]
    with answering(backend) as reduce:
        clean, *patched = backend.logits(list(pairs.false), Grid((Cell(), *cells)), reduce=reduce)
        (true,) = backend.logits(list(pairs.true), Grid((Cell(),)), reduce=reduce)
    values = np.stack([_odds(one) for one in patched], 1).reshape(len(pairs.true), len(layers), len(places))
    return Map(values, _odds(true), _odds(clean), tuple(layers), pairs.names)


def binned(values: np.ndarray) -> np.ndarray:
    """The paper's form of a map: its range in 20 equal levels, of which the lower 10 count as 0; [layer, token] in 0 … 1."""
    low, high = float(values.min()), float(values.max())
    level = np.clip(np.floor((values - low) / max(high - low, 1e-12) * LEVELS), 0, LEVELS - 1)
    return np.where(level < LEVELS // 2, 0, level) / (LEVELS - 1)


def alike(a: np.ndarray, b: np.ndarray, seed: int, draws: int = _DRAWS) -> dict[str, Any]:
    """Pearson's r of two maps, raw and binned, each beside its permutation null (cells of one map shuffled): the null's upper 2.5% and p.

    Cells of a map are not independent (neighbours are alike), so r's own interval is left out and p is too small.
    """
    generator, found = np.random.default_rng(seed), {}
    for name, (x, y) in {"raw": (a.ravel(), b.ravel()), "binned": (binned(a).ravel(), binned(b).ravel())}.items():
        r = pearson(x, y).value
        null = [pearson(generator.permutation(x), y).value for _ in range(draws)] if math.isfinite(r) else [math.nan]
        p = (1 + sum(drawn >= r for drawn in null)) / (1 + len(null)) if math.isfinite(r) else math.nan
        found[name] = {"r": r, "null_high": float(np.quantile(null, 0.975)), "p": p, "cells": len(x)}
    return found


def map_correlation(a: Map, b: Map, seed: int, draws: int = _DRAWS) -> dict[str, Value]:
    """Correlation of two maps over the same pairs, raw and binned, with an interval that resamples pairs, centred on it (resampling only lowers it)."""
    generator, n = np.random.default_rng(seed), len(a.true)
    rows = [generator.integers(0, n, n) for _ in range(draws)]
    found = {}
    for name, form in {"raw": lambda m: m, "binned": binned}.items():
        value = pearson(form(a.of()).ravel(), form(b.of()).ravel()).value
        drawn = [pearson(form(a.of(at)).ravel(), form(b.of(at)).ravel()).value for at in rows]
        drawn = [x for x in drawn if math.isfinite(x)]
        low, high = value + np.percentile(drawn, [2.5, 97.5]) - np.mean(drawn) if drawn else (math.nan, math.nan)
        found[name] = Value(value, max(-1.0, float(low)), min(1.0, float(high)), n)
    return found


def halves_of(one: Map, seed: int, draws: int = 50) -> dict[str, Value]:
    """Correlation between the maps of two random halves of the pairs, raw and binned: the mean over draws, and their spread. What a map can be told to."""
    generator, n = np.random.default_rng(seed), len(one.true)
    found: dict[str, list[float]] = {"raw": [], "binned": []}
    for _ in range(draws):
        order = generator.permutation(n)
        a, b = one.of(order[: n // 2]), one.of(order[n // 2 :])
        for name, form in {"raw": lambda m: m, "binned": binned}.items():
            found[name].append(pearson(form(a).ravel(), form(b).ravel()).value)
    spread = {name: [float(x) for x in np.percentile(values, [2.5, 97.5])] for name, values in found.items()}
    return {name: Value(float(np.mean(values)), spread[name][0], spread[name][1], n) for name, values in found.items()}


def _odds(shares: Sequence[Sequence[float]]) -> np.ndarray:
    """Log P(TRUE) − log P(FALSE) of shares [prompt][TRUE, FALSE, else]."""
    at = np.maximum(np.array(shares, float)[:, :2], 1e-30)
    return np.log(at[:, 0]) - np.log(at[:, 1])

"""What a backend elsewhere must share with the one here, on the same float32 weights: checks that the tiers with and without a server run."""

from dataclasses import replace

import torch

from latentguard.behaviour import CleanRun, Damage, Mass, RefusalLogOdds, Shares, Shift
from latentguard.directions import mean_difference
from latentguard.interventions import Ablate, Add, Cell, Grid, Patch, Scale, steering_grid
from latentguard.prompts import Prompt

PLACES = ("t_inst", "t_post_inst", "mean(user)")
PROMPTS = [Prompt.of(f"tell me {'very ' * (k % 4)}much about the number {k}{'!' * (k % 3)}.", harmful=k % 2 == 0, id=f"t{k}") for k in range(7)]


def every_kind(local, layers=None):
    """A grid with every kind of cell: where, when, what, one and several together, the prompt's own vectors, and nothing at all."""
    depth = local.n_layers
    states = local.read(PROMPTS, "all", PLACES)
    direction = replace(mean_difference(states, PROMPTS[:4], position="mean(user)"), weights="")
    cells = [Cell(), *steering_grid(direction, layers or [0, 1, depth // 2, depth], [1.0, -4.0])]
    cells += steering_grid(direction, [2], [3.0], when="every_step").cells
    cells.append(Cell((Ablate(direction, layer="all" if layers is None else list(range(1, depth + 1))),)))
    cells.append(Cell((Scale(direction, layer=1, factor=0.5, when="every_step"), Add(direction, layer=1, coef=2.0, positions="t_inst"))))
    cells.append(
        Cell((Patch(states, layer=2, positions="t_inst", source={"t0": "t1"}), Patch(states, layer=3, positions="user", read_at="mean(user)", coef=0.5)))
    )
    return Grid(tuple(cells))


def same_states(local, far, within=1e-4):
    for layers, positions in (("all", PLACES), ([1], ("t_inst",)), ([0, local.n_layers], ("post(1)",))):
        here, there = local.read(PROMPTS, layers, positions), far.read(PROMPTS, layers, positions)
        assert (here.layers, here.positions, here.prompts) == (there.layers, there.positions, there.prompts)
        assert (here.values - there.values).abs().max() < within
        assert not torch.equal(here.values[0], here.values[1]), "prompts must tell apart, or a mix-up would not be seen"


def same_moments(local, far, within=1e-4):
    """`far` in several jobs, and set against all states at once."""
    here = local.moments(PROMPTS, [1, local.n_layers], ("t_inst", "mean(user)"), covariance=True)
    there = far.moments(iter(PROMPTS), [1, local.n_layers], ("t_inst", "mean(user)"), covariance=True)
    states = local.read(PROMPTS, [1, local.n_layers], ("t_inst", "mean(user)")).values
    assert here.n == there.n == len(PROMPTS)
    assert (there.mean - states.mean(0)).abs().max() < within
    for layer in range(2):
        for place in range(2):
            expected = torch.cov(states[:, layer, place].double().T)
            assert torch.allclose(there.covariance[layer, place].double(), expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-4)
    assert torch.allclose(here.covariance, there.covariance, rtol=1e-3, atol=float(here.covariance.abs().max()) * 1e-4)


def same_scores(local, far, grid, within=1e-4):
    for position in ("t_post_inst", "user"):
        here, there = local.logits(PROMPTS, grid, position=position), far.logits(PROMPTS, grid, position=position)
        assert max(float((a - b).abs().max()) for x, y in zip(here, there, strict=True) for a, b in zip(x, y, strict=True)) < within
    one = far.logits(PROMPTS, grid.cells[1].interventions)
    assert len(one) == len(PROMPTS) and isinstance(one[0], torch.Tensor), "a list of interventions gives a list, not a grid"
    tokens = frozenset((5, 40, 97))
    made = [RefusalLogOdds(tokens), Mass(tokens), Shares((tokens, frozenset((3,)))), lambda index, logprobs: [index, float(logprobs[-1].max())]]
    pairs = [(reduce, reduce, "t_post_inst") for reduce in made]
    pairs.append((Shift(CleanRun(local, PROMPTS), tokens), Shift(CleanRun(far, PROMPTS), tokens), "t_post_inst"))
    pairs.append((Damage(CleanRun(local, PROMPTS, "user")), Damage(CleanRun(far, PROMPTS, "user")), "user"))
    for here, there, position in pairs:
        expected = torch.tensor(local.logits(PROMPTS, grid, position=position, reduce=here))
        found = torch.tensor(far.logits(PROMPTS, grid, position=position, reduce=there))
        assert found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected[1], expected[2], atol=1e-3), "cells must tell apart, or a mix-up would not be seen"


def same_replies(local, far, grid, tokens=5, sampled=True):
    said = [{}, {"decided": Enough(3)}, *([{"temperature": 0.8, "seed": 3}] if sampled else [])]
    apart = 0
    for settings in said:
        here, there = local.generate(PROMPTS, grid, max_new_tokens=tokens, **settings), far.generate(PROMPTS, grid, max_new_tokens=tokens, **settings)
        for x, y in zip(here, there, strict=True):
            assert [(r.prompt.id, r.tokens, r.text, r.finish) for r in x] == [(r.prompt.id, r.tokens, r.text, r.finish) for r in y]
        apart = max(apart, len({r.tokens for x in here for r in x}))
    assert apart > 3, "replies must tell apart, or a mix-up would not be seen"


class Enough:
    """A judge that has seen enough after so many letters."""

    def __init__(self, letters):
        self.letters = letters

    def __call__(self, text):
        return len(text) > self.letters

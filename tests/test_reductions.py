"""What is made of logits is kept, comes back as it was, and stands in its place."""

from dataclasses import dataclass, replace

import pytest
import torch

from latentguard.behaviour import CleanRun, Damage, Mass, RefusalLogOdds, Shares, Shift, divergence, refusal_log_odds, surprise
from latentguard.directions import mean_difference, random_like
from latentguard.errors import InputError
from latentguard.interventions import Add, Cell, Grid, Patch, steering_grid
from latentguard.store import Stored
from tests.conftest import make_tiny
from tests.counting import Counting, packs_of

ODDS = RefusalLogOdds(frozenset({5, 60, 200}))


@pytest.fixture
def counted(tiny):
    return Counting(tiny)


@pytest.fixture(scope="module")
def direction(tiny, prompts):
    return mean_difference(tiny.read(prompts, "all", ["t_inst"]), prompts[:3], position="t_inst")


def test_reduced_logits_are_the_models_and_are_kept(counted, tiny, direction, prompts, tmp_path):
    grid = Grid((*steering_grid(direction, [1, 2, 3], [1.0]), Cell()))
    clean = CleanRun(tiny, prompts)
    for reduce in (ODDS, Mass(frozenset({5, 6})), Shares((frozenset({5}), frozenset(), frozenset({6, 7}))), Shift(clean, ODDS.tokens)):
        told, scored = tiny.logits(prompts, grid, reduce=reduce), len(counted.scored)
        for _ in range(2):
            assert Stored(counted, tmp_path).logits(prompts, grid, reduce=reduce) == told, "to the bit: the same batches"
            assert Stored(counted, tmp_path).logits(prompts[2:5], Grid(grid.cells[1:]), reduce=reduce) == [row[2:5] for row in told[1:]]
            assert Stored(counted, tmp_path).logits(prompts[4:2:-1], list(grid.cells[2].interventions), reduce=reduce) == told[2][4:2:-1]
        assert len(counted.scored) == scored + 1


def test_only_what_lacks_is_scored_and_stands_in_its_place(counted, tiny, direction, prompts, tmp_path):
    @dataclass(frozen=True)
    class Named:
        prompts: tuple

        def __call__(self, index, logprobs):
            assert logprobs.shape == (1, 261)
            return self.prompts[index].id, float(logprobs[0, 7])

        def identity(self):
            return "named"

    def ask(listed, cells):
        return Stored(counted, tmp_path).logits(listed, Grid(tuple(cells)), reduce=Named(tuple(listed)))

    grid = list(steering_grid(direction, [1, 2, 3], [1.0]))
    ask(prompts[1:3], grid)
    ask(prompts[5:6], grid[:2])
    found = ask(prompts[::-1], grid)
    assert counted.scored == [(2, 3), (1, 2), (4, 2), (5, 1)], "cells that lack the same prompts are scored together"
    for row, told in zip(found, tiny.logits(prompts[::-1], Grid(tuple(grid))), strict=True):
        for prompt, (name, value), logprobs in zip(prompts[::-1], row, told, strict=True):
            assert name == prompt.id and value == pytest.approx(float(logprobs[0, 7]), abs=1e-4)
    assert ask(prompts[::-1], grid) == found and len(counted.scored) == 4


def test_reduced_logits_are_keyed_by_all_that_makes_them(counted, tiny, direction, prompts, tmp_path):
    asked = [
        ((), {}), ((), {"reduce": RefusalLogOdds(frozenset({5, 60}))}), ((), {"reduce": Mass(ODDS.tokens)}), ((), {"position": "t_inst"}),
        ([Add(direction, layer=2)], {}), ([Add(direction, layer=2, coef=2.0)], {}), ([Add(direction, layer=3)], {}),
        ([Add(direction, layer=2, positions="user")], {}), ([Add(random_like(direction, 1), layer=2)], {}),
        ([Patch(tiny.read(prompts, "all", ["t_inst"]), layer=2, positions="t_inst")], {}),
    ]  # fmt: skip
    cut = [replace(p, suffix=False) for p in prompts]
    for _ in range(2):
        for acts, settings in asked:
            found = Stored(counted, tmp_path).logits(prompts, acts, **{"reduce": ODDS, **settings})
            assert found == tiny.logits(prompts, acts, **{"reduce": ODDS, **settings}), (acts, settings)
        assert Stored(counted, tmp_path).logits(cut, position="t_inst", reduce=ODDS) == tiny.logits(cut, position="t_inst", reduce=ODDS)
        assert len(counted.scored) == len(asked) + 1
    other = make_tiny(batch_size=5)
    other.weights = "others"
    Stored(Counting(other), tmp_path).logits(prompts, reduce=ODDS)
    assert len(list(tmp_path.iterdir())) == 2, "each model has a folder of its own"


def test_what_has_no_name_is_not_kept(counted, tiny, prompts, tmp_path):
    stored = Stored(counted, tmp_path)
    for _ in range(2):
        assert stored.logits(prompts, reduce=lambda i, logprobs: i) == list(range(len(prompts)))
        assert all(map(torch.equal, stored.logits(prompts), tiny.logits(prompts)))
        assert [[i] for i in stored.generate(prompts, max_new_tokens=2, decided=lambda text: True)]
    assert len(counted.scored) == 4 and counted.replies == 2 * len(prompts) and not packs_of(tmp_path, "*")


@pytest.mark.parametrize("value", [1, True, None, 0.1 + 0.2, float("inf"), -0.0, "é\ud800", (1.5, (2, [3])), [], torch.arange(6.0).view(2, 3)[:, 1:]])
def test_results_come_back_as_they_were(counted, prompts, tmp_path, value):
    class Same:
        def __call__(self, index, logprobs):
            return value

        def identity(self):
            return "same"

    for _ in range(2):
        (found,) = Stored(counted, tmp_path).logits(prompts[:1], reduce=Same())
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else (found == value and repr(found) == repr(value))
    assert len(counted.scored) == 1


@pytest.mark.parametrize(
    "value", [torch.tensor(3), torch.zeros(0, 2, dtype=torch.bfloat16), torch.tensor([1.5, 2.5], dtype=torch.bfloat16), torch.tensor([True])]
)
def test_tensors_of_any_shape_and_type_come_back(counted, prompts, tmp_path, value):
    same = type("Same", (), {"__call__": lambda self, *_: value, "identity": lambda self: "same"})()
    for _ in range(2):
        (found,) = Stored(counted, tmp_path).logits(prompts[:1], reduce=same)
        assert found.dtype == value.dtype and torch.equal(found, value)
    assert len(counted.scored) == 1


def test_a_result_that_cannot_be_kept_is_refused(counted, prompts, tmp_path):
    odd = type("Odd", (), {"__call__": lambda self, *_: {1}, "identity": lambda self: "odd"})()
    with pytest.raises(InputError, match="gave a set, which cannot be kept"):
        Stored(counted, tmp_path).logits(prompts, reduce=odd)


def test_damage_is_measured_against_a_clean_run_that_is_asked_for_only_when_needed(counted, tiny, direction, prompts, tmp_path):
    grid = steering_grid(direction, [2, 3], [2.0])
    clean, changed = tiny.logits(prompts, position="user"), tiny.logits(prompts, grid, position="user")
    for _ in range(2):
        stored = Stored(counted, tmp_path)
        found = stored.logits(prompts, grid, position="user", reduce=Damage(CleanRun(stored, prompts, "user")))
        for c, row in enumerate(found):
            for i, (kl, after, before, total) in enumerate(row):
                following = [tiny.render(prompts)[i].ids[t + 1] for t in tiny.render(prompts)[i].user_tokens[:-1]]
                assert (kl, after, before) == (divergence(clean[i], changed[c][i]), surprise(changed[c][i], following), surprise(clean[i], following))
                assert total == pytest.approx(after * len(following), rel=1e-5) and kl > 0
        assert counted.scored == [(7, 2), (7, 0)], "the clean run, asked for within the call and before its first pass; and nothing the second time"
    stored = Stored(counted, tmp_path)
    more = steering_grid(direction, [2, 3, 4], [2.0])
    again = stored.logits(prompts[3:], more, position="user", reduce=Damage(CleanRun(stored, prompts[3:], "user")))
    assert counted.scored[2:] == [(4, 1), (4, 0)] and again[:2] == [row[3:] for row in found]
    assert again[2][1][0] == pytest.approx(divergence(clean[4], tiny.logits(prompts, more.cells[2].interventions, position="user")[4]), abs=1e-5)
    bare = Counting(tiny)
    shift = bare.logits(prompts, grid, reduce=Shift(CleanRun(bare, prompts), ODDS.tokens))
    assert bare.scored == [(7, 2), (7, 0)], "the same without a store"
    assert [one[2] for one in shift[0]] == [refusal_log_odds(logprobs, ODDS.tokens) for logprobs in tiny.logits(prompts)]

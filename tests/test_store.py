"""The store answers what was computed before, in any order, and heals itself."""

from dataclasses import replace

import pytest
import torch

from latentguard.directions import mean_difference, random_like
from latentguard.interventions import Add, Cell, Grid, Patch, steering_grid
from latentguard.store import Stored


class Counting:
    """Passes on to a backend and counts what it was asked."""

    def __init__(self, backend):
        self.backend, self.read_prompts, self.replies = backend, 0, 0

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def read(self, prompts, *args):
        self.read_prompts += len(prompts)
        return self.backend.read(prompts, *args)

    def stream(self, prompts, grid, *args):
        self.replies += len(prompts) * len(grid)
        yield from self.backend.stream(prompts, grid, *args)


class Judge:
    def __init__(self, mark="a"):
        self.mark = mark

    def __repr__(self):
        return f"Judge({self.mark!r})"

    def decided(self, text):
        return self.mark in text


@pytest.fixture
def counted(tiny):
    return Counting(tiny)


def test_states_are_read_once_and_are_the_same(counted, tiny, prompts, tmp_path):
    stored = Stored(counted, tmp_path)
    first = stored.read(prompts[:4], "all", ["t_inst", "mean(user)"])
    again = Stored(counted, tmp_path).read(prompts, "all", ["t_inst", "mean(user)"])
    assert counted.read_prompts == len(prompts)
    torch.testing.assert_close(again.values, tiny.read(prompts, "all", ["t_inst", "mean(user)"]).values, atol=1e-5, rtol=0)
    assert torch.equal(again.values[:4], first.values)
    stored.read(prompts, [1, 2], ["t_inst"])
    assert counted.read_prompts == 2 * len(prompts), "other layers are another question"


def test_replies_are_keyed_by_all_that_makes_them(counted, tiny, prompts, tmp_path):
    stored, states = Stored(counted, tmp_path), tiny.read(prompts, "all", ["t_inst"])
    v = mean_difference(states, prompts[:3], position="t_inst")
    asked = [
        ([], {}), ([], {"max_new_tokens": 5}), ([], {"temperature": 1.0}), ([], {"temperature": 1.0, "seed": 1}), ([], {"decided": Judge().decided}),
        ([], {"decided": Judge("b").decided}), ([Add(v, layer=2, coef=3.0)], {}), ([Add(v, layer=2, coef=2.0)], {}), ([Add(v, layer=3, coef=3.0)], {}),
        ([Add(v, layer=2, coef=3.0, when="every_step")], {}), ([Add(v, layer=2, coef=3.0, positions="user")], {}),
        ([Add(random_like(v, 1), layer=2, coef=3.0)], {}), ([Patch(states, layer=2, positions="t_inst")], {}),
        ([Patch(states, layer=2, positions="t_inst", source={p.id: "t0" for p in prompts})], {}),
    ]  # fmt: skip
    for n, (acts, settings) in enumerate(asked, 1):
        found = stored.generate(prompts, acts, **{"max_new_tokens": 4, **settings})
        assert counted.replies == n * len(prompts), (acts, settings)
        assert [r.tokens for r in found] == [r.tokens for r in tiny.generate(prompts, acts, **{"max_new_tokens": 4, **settings})]
    for acts, settings in asked:
        stored.generate(prompts, acts, **{"max_new_tokens": 4, **settings})
    assert counted.replies == len(asked) * len(prompts)


def test_an_interrupted_grid_goes_on_where_it_stopped(counted, tiny, prompts, tmp_path):
    v = mean_difference(tiny.read(prompts, "all", ["t_inst"]), prompts[:3], position="t_inst")
    grid = Grid((*steering_grid(v, [1, 2, 3], [1.0, 2.0]), Cell()))
    stream = Stored(counted, tmp_path).stream(prompts, grid, __import__("latentguard.backends", fromlist=["Decoding"]).Decoding(4))
    for _ in range(20):
        next(stream)
    stream.close()
    counted.replies = 0
    found = Stored(counted, tmp_path).generate(prompts, grid, max_new_tokens=4)
    assert counted.replies <= len(prompts) * len(grid) - 20
    assert [[r.tokens for r in said] for said in found] == [[r.tokens for r in said] for said in tiny.generate(prompts, grid, max_new_tokens=4)]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: bytes(b[:-9]) + b"x" * 9, lambda b: b"{}"])
def test_damaged_entries_are_computed_again(counted, prompts, tmp_path, damage):
    stored = Stored(counted, tmp_path)
    states, replies = stored.read(prompts, 2), stored.generate(prompts, max_new_tokens=4)
    for path in tmp_path.rglob("*.json"):
        path.write_bytes(damage(path.read_bytes()))
    for n, path in enumerate(tmp_path.rglob("*.safetensors")):
        whole = path.read_bytes()
        path.write_bytes(whole[:50] if n % 2 else whole[:-3] + bytes([whole[-3] ^ 255]) + whole[-2:])
    assert torch.equal(stored.read(prompts, 2).values, states.values)
    assert stored.generate(prompts, max_new_tokens=4) == replies
    assert (counted.read_prompts, counted.replies) == (2 * len(prompts), 2 * len(prompts))
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()], "no half-written file stays"


class Watched(Counting):
    """Keeps what it was asked to read."""

    def __init__(self, backend):
        super().__init__(backend)
        self.asked = []

    def read(self, prompts, layers, positions):
        self.asked.append((len(prompts), tuple(positions)))
        return super().read(prompts, layers, positions)


def test_each_position_is_read_once_in_whatever_company(tiny, prompts, tmp_path):
    watched = Watched(tiny)
    stored = Stored(watched, tmp_path)
    stored.read(prompts, "all", ["t_inst", "t_post_inst"])
    stored.read(prompts, "all", ["t_post_inst"])
    stored.read(prompts, "all", ["t_post_inst", "t_inst"])
    assert watched.asked == [(len(prompts), ("t_inst", "t_post_inst"))], "nothing is read anew in another order or alone"
    stored.read(prompts, "all", ["mean(user)", "t_inst"])
    assert watched.asked[1:] == [(len(prompts), ("mean(user)",))], "what is known is not read again beside what is new"
    everything = stored.read(prompts, "all", ["t_post_inst", "mean(user)", "t_inst"])
    assert len(watched.asked) == 2
    torch.testing.assert_close(everything.values, tiny.read(prompts, "all", ["t_post_inst", "mean(user)", "t_inst"]).values, atol=1e-5, rtol=0)
    assert everything.positions == ("t_post_inst", "mean(user)", "t_inst") and everything.prompts == tuple(prompts)


def test_new_prompts_and_new_positions_together_are_right(tiny, prompts, tmp_path):
    watched = Watched(tiny)
    stored = Stored(watched, tmp_path)
    stored.read(prompts[:2], 2, ["t_inst"])
    stored.read(prompts[3:5], 2, ["t_post_inst"])
    found = stored.read(prompts, 2, ["t_inst", "t_post_inst"])
    torch.testing.assert_close(found.values, tiny.read(prompts, 2, ["t_inst", "t_post_inst"]).values, atol=1e-5, rtol=0)
    before = len(watched.asked)
    assert torch.equal(stored.read(prompts, 2, ["t_post_inst"]).values[:, :, 0], found.values[:, :, 1]) and len(watched.asked) == before


def test_places_that_are_the_same_tokens_share_an_entry(tiny, prompts, tmp_path):
    watched = Watched(tiny)
    stored = Stored(watched, tmp_path)
    tail = len(tiny.render(prompts[:1])[0]) - 1 - tiny.render(prompts[:1])[0].user_tokens[-1]
    states = stored.read(prompts, 2, ["t_post_inst"])
    assert torch.equal(stored.read(prompts, 2, [f"post({tail})"]).values, states.values) and len(watched.asked) == 1
    assert not torch.equal(stored.read(prompts, 2, ["mean(user)"]).values, states.values) and len(watched.asked) == 2


def test_one_damaged_position_is_read_again_and_the_others_stay(tiny, prompts, tmp_path):
    watched = Watched(tiny)
    stored = Stored(watched, tmp_path)
    states = stored.read(prompts, 2, ["t_inst", "t_post_inst"]).values
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:40])
    torch.testing.assert_close(stored.read(prompts, 2, ["t_inst", "t_post_inst"]).values, states, atol=1e-5, rtol=0)
    assert len(watched.asked) == 2 and watched.asked[1][0] == 1 and len(watched.asked[1][1]) == 1


def test_a_prompt_without_its_suffix_has_replies_of_its_own(counted, tiny, prompts, tmp_path):
    stored, cut = Stored(counted, tmp_path), [replace(p, suffix=False) for p in prompts]
    for given in (prompts, cut, prompts, cut):
        assert [r.tokens for r in stored.generate(given, max_new_tokens=4)] == [r.tokens for r in tiny.generate(given, max_new_tokens=4)]
    assert counted.replies == 2 * len(prompts)
    stored.read(prompts, 2)
    stored.read(cut, 2)
    assert counted.read_prompts == 2 * len(prompts), "the rendered tokens are the key"

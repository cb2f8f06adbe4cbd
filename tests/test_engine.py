"""The engine against the oracle on random grids, and its parts (attention, caches, batches, windows) against plain ones."""

import itertools
import random

import pytest
import torch
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from latentguard import families
from latentguard.backends.attention import NAME, Roomy, grouped, grouped_attention, merged
from latentguard.backends.batches import lengthwise
from latentguard.backends.memory import Budget
from latentguard.backends.tiny import tiny_model
from tests import grids
from tests.conftest import make_tiny


@pytest.mark.parametrize(("seed", "name"), [(k, name) for k, name in enumerate(grids.MODELS)])
def test_a_random_grid_equals_the_oracle(seed, name):
    assert grids.check_case(seed, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", grids.MODELS)
def test_many_random_grids_equal_the_oracle(name):
    for seed in (1000, 1001):
        assert grids.check_case(seed, name), seed


def test_layer_0_alone_is_read_where_prompts_share_a_prefix():
    """Falcon's ALiBi counts the past before any layer has run: the prefix has to be in the cache even then."""
    r = random.Random(0)
    backend, oracle = grids.a_model(r, "falcon")
    backend.batch_size, backend.reuse = 2, True
    states = backend.read(["sing", "sing a song"], 0).values[:, 0, 0]
    plain = [oracle.states(item)[0, item.user_tokens[-1]] for item in backend.render(["sing", "sing a song"])]
    torch.testing.assert_close(states, torch.stack(plain), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "settings"), [("mpt", {}), ("gpt_neo", {"window_size": 12}), ("llama4", {"attention_chunk_size": 12}), ("mistral", {"sliding_window": 24})]
)
def test_a_longer_prompt_beside_it_changes_no_prompt(family, settings, monkeypatch):
    """A shared prefix apart from the rest by padding: not where attention counts columns, nor where a window would fall between."""
    monkeypatch.setitem(grids.MODELS, family, (grids.MODELS[family][0], {**grids.MODELS[family][1], **settings}))
    backend, oracle = grids.a_model(random.Random(0), family)
    backend.batch_size, backend.reuse = 2, True
    prompts = ["sing", "sing a very very long song"]
    states = backend.read(prompts, "all", ["t_inst"]).values[:, :, 0]
    plain = [oracle.states(item)[:, item.user_tokens[-1]] for item in backend.render(prompts)]
    torch.testing.assert_close(states, torch.stack(plain), atol=1e-4, rtol=1e-4)


class Head(torch.nn.Module):
    """What transformers' attention asks of the module it is called for."""

    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


@pytest.mark.parametrize("groups", (1, 2, 4))
@pytest.mark.parametrize("masked", (True, False))
def test_grouped_attention_is_that_of_transformers(groups, masked):
    g = torch.Generator().manual_seed(groups)
    query, key, value = (torch.randn(3, heads, length, 8, generator=g) for heads, length in ((4, 1), (4 // groups, 9), (4 // groups, 9)))
    mask = (torch.rand(3, 1, 1, 9, generator=g) < 0.6) | (torch.arange(9) == 8) if masked else None
    for told in (mask, None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, -1e9)):  # yes and no, or added to the scores
        mine = grouped_attention(Head(groups), query, key, value, told, scaling=0.3)[0]
        theirs = sdpa_attention_forward(Head(groups), query, key, value, told, scaling=0.3)[0]
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_the_models_own_attention_is_back_after_a_step_even_one_that_fails():
    model = tiny_model("llama", n_layers=2)
    with pytest.raises(ValueError, match="in a step"), grouped(model):
        assert model.config._attn_implementation == NAME
        raise ValueError("in a step")
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_with_room_is_a_layer_without():
    """Over appended tokens and chosen rows, past the end of its room, and without writing into rows it was chosen from."""
    r, g = random.Random(0), torch.Generator().manual_seed(0)
    for room in (0, 1, 5, 40):
        keys, values = (torch.randn(5, 2, 6, 4, generator=g) for _ in range(2))
        plain = DynamicLayer()
        plain.update(keys, values)
        whole = [torch.nn.functional.pad(t, (0, 0, 0, room)) for t in (keys, values)]
        roomy = Roomy(*whole, length=6)
        for _ in range(12):
            if r.random() < 0.4:
                rows = torch.tensor(sorted(r.sample(range(len(plain.keys)), r.randint(1, len(plain.keys)))))
                plain.batch_select_indices(rows)
                roomy.batch_select_indices(rows)
            keys = torch.randn(len(plain.keys), 2, r.randint(1, 3), 4, generator=g)
            assert all(map(torch.equal, roomy.update(keys, 2 * keys), plain.update(keys, 2 * keys)))
            assert roomy.get_seq_length() == plain.get_seq_length() and roomy.get_mask_sizes(1) == plain.get_mask_sizes(1)
            assert torch.equal(roomy.keys, plain.keys) and torch.equal(roomy.values, plain.values)


def test_merged_caches_hold_each_rows_tokens_at_the_right_end():
    g = torch.Generator().manual_seed(0)
    caches, masks, expected = [], [], []
    for rows, width, cut in ((2, 7, 2), (1, 3, 0), (3, 9, 3)):
        mask = torch.ones(rows, width, dtype=torch.long)
        for row in range(rows):
            mask[row, cut : cut + row + 1] = 0  # prefix, padding, rest
        cache = DynamicCache()
        for layer in range(2):
            keys = torch.randn(rows, 2, width, 4, generator=g)
            cache.update(keys, -keys, layer)
        caches.append(cache)
        masks.append(mask)
        expected += [[layer.keys[row][:, mask[row].bool()] for layer in cache.layers] for row in range(rows)]
    cache, mask = merged(caches, masks, 4)
    assert mask.shape == (6, 8) and mask.sum(1).tolist() == [rest[0].shape[1] for rest in expected]
    for row, layers in enumerate(expected):
        count = int(mask[row].sum())
        assert mask[row, -count:].all() and not mask[row, :-count].any()
        for layer, keys in zip(cache.layers, layers, strict=True):
            assert torch.equal(layer.keys[row, :, 8 - count :], keys) and torch.equal(layer.values[row, :, 8 - count :], -keys)
            assert layer.keys[row].isfinite().all(), "masked columns too: 0 · NaN is NaN"


def cost(batches, lengths, a_pass, copies=1):
    return sum(len(rows) * max(lengths[i] for i in rows) * copies + a_pass for rows in batches)


@pytest.mark.parametrize("seed", range(30))
def test_batches_hold_every_prompt_once_and_cost_no_more_than_chunks(seed):
    r = random.Random(seed)
    lengths = [r.randint(0, r.choice((3, 40, 300))) for _ in range(r.randint(1, 30))]
    budget, a_pass = Budget(r.choice((1, 3, 8, 50)), r.choice((1, 200, 2000, 10**9))), r.choice((0, 1, 32, 500))
    batches = lengthwise(lengths, budget.most, a_pass)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert all(len(rows) <= budget.most(max(lengths[i] for i in rows)) for rows in batches)
    assert max(lengths[i] for i in batches[0]) == max(lengths), "what will not fit fails at once"
    order, naive = sorted(range(len(lengths)), key=lambda i: -lengths[i]), []
    while order:
        size = budget.most(lengths[order[0]])
        naive.append(order[:size])
        order = order[size:]
    assert cost(batches, lengths, a_pass) <= cost(naive, lengths, a_pass) or len(set(lengths)) < len(lengths)
    assert cost(batches, lengths, a_pass) <= cost([[i] for i in range(len(lengths))], lengths, a_pass)


def test_batches_of_few_lengths_are_the_cheapest_of_all():
    r = random.Random(0)
    for _ in range(40):
        lengths, a_pass, most = r.sample(range(1, 200), r.randint(1, 7)), r.choice((0, 5, 32, 200)), r.randint(1, 7)
        order, best = sorted(range(len(lengths)), key=lambda i: -lengths[i]), float("inf")
        for cuts in itertools.product((0, 1), repeat=len(order) - 1):
            ends = [k + 1 for k, yes in enumerate(cuts) if yes]
            parts = [order[a:b] for a, b in itertools.pairwise([0, *ends, len(order)])]
            if max(map(len, parts)) <= most:
                best = min(best, cost(parts, lengths, a_pass))
        assert cost(lengthwise(lengths, lambda _length, most=most: most, a_pass), lengths, a_pass) == best


def test_nothing_goes_into_no_batch():
    assert lengthwise([], lambda _length: 3, 32) == []


@pytest.mark.parametrize(
    ("family", "settings", "window"),
    [
        ("llama", {}, None),
        ("gpt2", {}, None),
        ("mistral", {"sliding_window": 9}, 9),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 9}, None),  # told but not used
        ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 3}, 9),
        ("gemma2", {"sliding_window": 9}, 9),
        ("gemma3_text", {"sliding_window": 9}, 9),
        ("gpt_oss", {"sliding_window": 9}, 9),
        ("llama4_text", {"attention_chunk_size": 9}, 9),
        ("gpt_neo", {"window_size": 9}, 9),
        ("gpt_neo", {"window_size": 9, "num_layers": 2, "attention_types": [[["global"], 2]]}, None),
    ],
)
def test_the_shortest_window_is_found_where_it_is_used(family, settings, window):
    assert families.sliding_window(AutoConfig.for_model(family, **settings)) == window


@pytest.mark.parametrize(("family", "bears"), [("llama", True), ("gpt2", True), ("bloom", True), ("mpt", False)])
def test_a_model_that_counts_columns_is_told_from_one_that_counts_tokens(family, bears):
    assert make_tiny(family).passes.bears_holes() is bears

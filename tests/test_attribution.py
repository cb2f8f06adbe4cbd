"""Gradient × input against plain autograd on the bare model, alone and in padded batches, and against small steps; states under interventions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latentguard.backends.local import Local
from latentguard.backends.ndif import Ndif
from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from latentguard.directions import Direction
from latentguard.errors import InputError
from latentguard.families import blocks_path
from latentguard.interventions import Ablate, Add, Scale
from latentguard.positions import parse_position
from latentguard.prompts import Prompt
from latentguard.store import Stored
from tests.conftest import loud, make_tiny
from tests.plain import with_plain

TEXTS = ["a bit.", "tell me a good deal more about the number nine.", "why?", "how do I do it, then, my friend."]


def state_entering(model, layer, embeds, mask, positions):
    """Plain transformers with hooks: the state entering a block, or leaving the last."""
    kept = []
    blocks = model.get_submodule(blocks_path(model))

    def enters(_module, args, kwargs):
        kept.append(args[0] if args else kwargs["hidden_states"])

    def leaves(_module, _args, out):
        kept.append(out[0] if isinstance(out, tuple) else out)

    hook = blocks[layer].register_forward_pre_hook(enters, with_kwargs=True) if layer < len(blocks) else blocks[-1].register_forward_hook(leaves)
    model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
    hook.remove()
    return kept[0]


def plainly(model, rendered, layer, vector, place, side, pad=0):
    """The oracle: all prompts in one batch padded on one side, one backward pass a prompt."""
    width = max(map(len, rendered))
    ids, mask, shift = torch.full((len(rendered), width), pad), torch.zeros(len(rendered), width, dtype=torch.long), []
    for r, item in enumerate(rendered):
        at = width - len(item) if side == "left" else 0
        ids[r, at : at + len(item)], mask[r, at : at + len(item)] = torch.tensor(item.ids), 1
        shift.append(at)
    found = []
    for r, item in enumerate(rendered):
        leaf = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        state = state_entering(model, layer, leaf, mask, (mask.cumsum(-1) - 1).clamp_min(0))
        tokens = [shift[r] + t for t in parse_position(place).tokens(item)]
        (slope,) = torch.autograd.grad(state[r, tokens].mean(0) @ vector, leaf)
        product = (slope * leaf).sum(-1).detach()
        assert not product[torch.arange(len(rendered)) != r].any(), "rows do not touch each other"
        found.append(product[r, [shift[r] + t for t in item.user_tokens]].numpy())
    return found


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize(("layer", "place"), [(0, "t_inst"), (2, "t_post_inst"), (4, "t_post_inst"), (3, "mean(user)")])
def test_it_is_what_autograd_says_alone_and_in_batches_padded_on_either_side(family, layer, place):
    model = loud(tiny_model(family))
    prompts = [Prompt.of(text, id=f"p{k}") for k, text in enumerate(TEXTS)]
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    rendered = Local(model, tiny_tokenizer(), name="t", weights="t").render(prompts)
    alone = [plainly(model, [item], layer, vector, place, "left")[0] for item in rendered]
    for side in ("left", "right"):
        for one, padded in zip(alone, plainly(model, rendered, layer, vector, place, side), strict=True):
            np.testing.assert_allclose(padded, one, rtol=1e-3, atol=1e-4 * max(1.0, np.abs(one).max()))
    for batch_size in (1, 8, "auto"):
        backend = Local(model, tiny_tokenizer(), name="t", weights="t", batch_size=batch_size)
        for one, ours, item in zip(alone, backend.attributions(prompts, layer, vector, place), rendered, strict=True):
            assert ours.shape == (len(item.user_tokens),)
            np.testing.assert_allclose(ours, one, rtol=1e-3, atol=1e-4 * max(1.0, np.abs(one).max()))
        assert np.abs(alone[1]).max() > 0


def test_it_tells_what_a_small_step_along_an_embedding_does():
    model = loud(tiny_model("qwen2"))
    backend = Local(model, tiny_tokenizer(), name="t", weights="t")
    prompt, vector = Prompt.of(TEXTS[1]), torch.ones(32)
    (found,) = backend.attributions([prompt], 3, vector)
    (item,) = backend.render([prompt])
    ids, step = torch.tensor([item.ids]), 1e-3
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        for k in (0, 7, len(found) - 1):
            sides = []
            for sign in (1, -1):
                moved = embeds.clone()
                moved[0, item.user_tokens[k]] *= 1 + sign * step
                sides.append(float((state_entering(model, 3, moved, torch.ones_like(ids), torch.arange(ids.shape[1])[None])[0, -1] @ vector).double()))
            assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(found[k], rel=0.05, abs=0.05)


def test_it_is_linear_in_the_vector_and_nothing_where_the_tokens_cannot_reach(tiny, prompts):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))
    one, three = (tiny.attributions(prompts[:3], 2, times * vector) for times in (1.0, 3.0))
    for a, b in zip(one, three, strict=True):
        np.testing.assert_allclose(b, 3 * a, rtol=1e-4, atol=1e-4)
    assert not any(found.any() for found in tiny.attributions(prompts[:3], 0, vector)), "at layer 0 the last token is itself alone"


def test_against_the_mean_it_is_what_sets_a_token_apart(tiny, prompts):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))
    told, plain = (tiny.attributions(prompts, 2, vector, "t_post_inst", against) for against in ("mean", "zero"))
    for p, one, other in zip(tiny.render(prompts), told, plain, strict=True):
        embeds = tiny.hf.get_input_embeddings()(torch.tensor([p.ids])).detach().requires_grad_(True)
        state = state_entering(tiny.hf, 2, embeds, torch.ones(1, len(p), dtype=torch.long), torch.arange(len(p))[None])
        (slope,) = torch.autograd.grad(state[0, -1] @ vector, embeds)
        own = embeds[0, p.user_tokens].detach()
        wanted = (slope[0, p.user_tokens] * (own - own.mean(0))).sum(-1)
        np.testing.assert_allclose(one, wanted.numpy(), rtol=1e-3, atol=1e-3)
        assert not np.allclose(one, other, atol=1e-2)
    (same,) = tiny.attributions([Prompt.of("aaaa")], 2, vector, "t_post_inst", "mean")
    assert np.abs(same).max() < 1e-9, "equal tokens have nothing that sets them apart"


def test_the_model_and_its_states_are_left_as_they_were(prompts):
    backend = make_tiny()
    before = backend.read(prompts, "all", ("t_post_inst",)).values
    needs = [p.requires_grad for p in backend.hf.parameters()]
    backend.attributions(prompts, 0.5, torch.ones(32))
    assert torch.equal(before, backend.read(prompts, "all", ("t_post_inst",)).values)
    assert [p.requires_grad for p in backend.hf.parameters()] == needs and all(p.grad is None for p in backend.hf.parameters())
    with torch.inference_mode():
        assert len(backend.attributions(prompts, 0.5, torch.ones(32))) == len(prompts)


def test_memory_that_runs_out_halves_the_batch(prompts, monkeypatch):
    from latentguard.backends import attribution

    backend, real, tried = make_tiny(), attribution._gradient, []
    whole = backend.attributions(prompts, 2, torch.ones(32))

    def short(passes, batch, *rest):
        tried.append(len(batch.prompts))
        if len(batch.prompts) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(passes, batch, *rest)

    monkeypatch.setattr(attribution, "_gradient", short)
    for a, b in zip(whole, backend.attributions(prompts, 2, torch.ones(32)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert max(tried) > 1 and tried[-1] == 1


def test_what_cannot_be_asked_is_one_sentence(tiny, prompts):
    assert tiny.attributions([], 0, torch.ones(32)) == []
    with pytest.raises(InputError, match="32 finite numbers"):
        tiny.attributions(prompts, 2, torch.ones(31))
    with pytest.raises(InputError, match="finite"):
        tiny.attributions(prompts, 2, torch.full((32,), float("nan")))
    with pytest.raises(InputError, match="against='median' is none of zero, mean"):
        tiny.attributions(prompts, 2, torch.ones(32), against="median")
    with pytest.raises(InputError, match="layer 9"):
        tiny.attributions(prompts, 9, torch.ones(32))
    with pytest.raises(InputError, match="mean\\(user\\)"):
        tiny.attributions(prompts, 2, torch.ones(32), "user")
    shared = make_tiny()
    shared.team = SimpleNamespace(size=2)
    with pytest.raises(InputError, match="tensor_parallel"):
        shared.attributions(prompts, 2, torch.ones(32))
    server = SimpleNamespace(host=SimpleNamespace(url="http://nowhere"))
    for asked in (lambda: Ndif.attributions(server, prompts, 2, torch.ones(32)), lambda: Ndif.read_under(server, prompts, [])):
        with pytest.raises(InputError, match="backend=local"):
            asked()


def test_a_store_asks_the_model_it_holds(tiny, prompts, tmp_path):
    stored, acts = Stored(tiny, tmp_path), [Add(direction(tiny), layer=2, coef=2.0)]
    for a, b in zip(stored.attributions(prompts, 2, torch.ones(32)), tiny.attributions(prompts, 2, torch.ones(32)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert torch.equal(stored.read_under(prompts, acts).values, tiny.read_under(prompts, acts).values)
    assert not torch.equal(stored.read(prompts).values, stored.read_under(prompts, acts).values), "kept states are untouched ones"


def direction(backend):
    vectors = torch.randn(backend.n_layers + 1, backend.d_model, generator=torch.Generator().manual_seed(3))
    return Direction(
        vectors, tuple(range(backend.n_layers + 1)), "t_inst", "drawn", backend.name, backend.weights, backend.n_layers, 1, 1, "", vectors.norm(dim=-1)
    )


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "gpt2"])
def test_states_under_interventions_are_those_of_plain_hooks(family, prompts):
    backend, plain = with_plain(
        lambda model, **settings: Local(model, tiny_tokenizer(), name="t", weights="t", **settings), loud(tiny_model(family)), batch_size=3
    )
    own, places = direction(backend), ("t_inst", "t_post_inst", "mean(user)")
    for acts in ([Ablate(own, layer="all", when="every_step")], [Add(own, layer=2, positions="t_inst", coef=3.0), Scale(own, layer=4, factor=0.5)], []):
        states = backend.read_under(prompts, acts, "all", places).values
        for p, rendered, got in zip(prompts, backend.render(prompts), states, strict=True):
            kept, change = {}, plain.acting(p, rendered, acts)

            def keep(layer, state, kept=kept, change=change):
                kept[layer] = change(layer, state)
                return kept[layer]

            plain.run(rendered.ids, keep)
            wanted = torch.stack([torch.stack([kept[layer][0][parse_position(place).tokens(rendered)].mean(0) for place in places]) for layer in range(5)])
            assert torch.allclose(got, wanted, atol=2e-3, rtol=2e-3)
    ablated = backend.read_under(prompts, [Ablate(own, layer="all")], [2], ("t_inst",)).values[:, 0, 0]
    assert (ablated @ own.at(2)).abs().max() < 1e-3 * ablated.norm(dim=-1).max() * own.at(2).norm()
    assert torch.allclose(backend.read_under(prompts, [], [1, 3], places).values, backend.read(prompts, [1, 3], places).values, atol=1e-4)

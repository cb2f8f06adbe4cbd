"""The engine against plain transformers, and the invariants of the method (S1–S8 of the research notes)."""

import pytest
import torch

from latentguard.directions import mean_difference, random_like
from latentguard.errors import InputError
from latentguard.interventions import Ablate, Add, Cell, Grid, Patch, Scale, steering_grid
from latentguard.positions import parse_position
from latentguard.prompts import Prompt
from tests.conftest import make_tiny

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2", "gpt_neox", "phi3")


def plain_states(backend, rendered):
    """[layer, token, d_model] by hooks on unwrapped transformers."""
    seen = []
    hook = backend.blocks[-1]._module.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        out = backend.hf(input_ids=torch.tensor([rendered.ids]), output_hidden_states=True)
    hook.remove()
    return torch.stack([state[0] for state in (*out.hidden_states[: backend.n_layers], seen[0])])


def tokens(replies):
    return [reply.tokens for reply in replies]


@pytest.fixture(scope="module")
def direction(tiny, prompts):
    return mean_difference(tiny.read(prompts, "all", ["t_inst"]), prompts[:3], position="t_inst")


@pytest.mark.parametrize("family", FAMILIES)
def test_read_equals_plain_transformers_for_mixed_lengths(family, prompts):
    backend = make_tiny(family, batch_size=3, system="You are kind.")
    states = backend.read(prompts, "all", ["t_inst", "t_post_inst", "mean(user)"])
    for row, rendered in enumerate(backend.render(prompts)):
        plain = plain_states(backend, rendered)
        user = rendered.user_tokens
        expected = torch.stack([plain[:, user[-1]], plain[:, -1], plain[:, user].mean(1)], dim=1)
        torch.testing.assert_close(states.values[row], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ("llama", "qwen2", "gemma2", "gemma3_text", "gpt2"))
def test_greedy_replies_equal_transformers_generate(family, prompts):
    backend = make_tiny(family, batch_size=4)
    for reply, rendered in zip(backend.generate(prompts, max_new_tokens=8), backend.render(prompts), strict=True):
        out = backend.hf.generate(torch.tensor([rendered.ids]), max_new_tokens=8, do_sample=False)[0, len(rendered) :].tolist()
        assert list(reply.tokens) == (out[: out.index(260)] if 260 in out else out)


@pytest.mark.parametrize(("family", "when"), [("qwen2", "prefill"), ("qwen2", "every_step"), ("gemma2", "every_step"), ("gpt2", "prefill")])
def test_a_fused_grid_equals_its_cells_one_by_one(family, when, prompts):
    prompts = prompts[:5]
    fast, slow = make_tiny(family, batch_size=9, system="You are kind."), make_tiny(family, batch_size=1, system="You are kind.", reuse=False)
    states = fast.read(prompts, "all", ["t_inst"])
    v = mean_difference(states, prompts[:3], position="t_inst")
    cells = [*steering_grid(v, [0, 1, 4], [0.5, 3.0], when=when), Cell(), Cell((Ablate(v, layer="all", when=when),))]
    cells += [Cell((Add(v, layer=2, coef=2.0, positions="user", when=when), Add(random_like(v, 1), layer=2, coef=1.0, positions="t_inst")))]
    cells += [Cell((Patch(states, layer=2, positions="t_inst", source={p.id: "t0" for p in prompts}),))]
    together = fast.generate(prompts, Grid(tuple(cells)), max_new_tokens=4)
    for cell, replies in zip(cells, together, strict=True):
        assert tokens(replies) == tokens(slow.generate(prompts, list(cell.interventions), max_new_tokens=4))
    logits = fast.logits(prompts, Grid(tuple(cells)))
    for cell, found in zip(cells, logits, strict=True):
        torch.testing.assert_close(torch.cat(found), torch.cat(slow.logits(prompts, list(cell.interventions))), atol=1e-4, rtol=0)
    assert len({t for replies in together for t in tokens(replies)}) > len(prompts), "steering should change something"


def test_s1_t_inst_does_not_depend_on_what_follows(tiny, prompts):
    full = tiny.read(prompts, "all", ["t_inst"]).values
    for row, rendered in enumerate(tiny.render(prompts)):
        with torch.no_grad():
            cut = tiny.hf(input_ids=torch.tensor([rendered.ids[: rendered.user_tokens[-1] + 1]]), output_hidden_states=True)
        torch.testing.assert_close(full[row, : tiny.n_layers, 0], torch.stack([s[0, -1] for s in cut.hidden_states[: tiny.n_layers]]), atol=1e-4, rtol=0)


def test_s2_the_embedding_layer_sees_only_the_token(tiny, prompts):
    states = tiny.read(prompts, 0, ["t_inst", "t_post_inst"])
    assert all(torch.equal(states.values[0], other) for other in states.values)  # every prompt ends in the same mark, every template too
    assert mean_difference(states, prompts[:3], position="t_post_inst").vectors.abs().max() == 0


def test_s3_a_batch_equals_its_singles(tiny, prompts):
    together = tiny.read(prompts, "all", ["t_inst", "post(3)"]).values
    alone = torch.cat([tiny.read([prompt], "all", ["t_inst", "post(3)"]).values for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert tokens(tiny.generate(prompts, max_new_tokens=6)) == [tiny.generate([p], max_new_tokens=6)[0].tokens for p in prompts]


@pytest.mark.parametrize("when", ("prefill", "every_step"))
def test_s4_coefficient_zero_is_no_steering(tiny, prompts, direction, when):
    assert tokens(tiny.generate(prompts, [Add(direction, layer=2, coef=0.0, when=when)], max_new_tokens=8)) == tokens(tiny.generate(prompts, max_new_tokens=8))


@pytest.mark.parametrize("layer", (0, 2, 4))
def test_s4_steering_a_layer_leaves_those_below(tiny, prompts, direction, layer):
    clean, steered = (states_under(tiny, prompts[0], acts) for acts in ([], [Add(direction, layer=layer, coef=3.0)]))
    for below in range(layer):
        assert torch.equal(clean[below], steered[below])
    torch.testing.assert_close(steered[layer] - clean[layer], (3 * direction.at(layer)).expand_as(clean[layer]), atol=1e-4, rtol=0)


def test_s4_prefill_changes_no_generated_token_directly(tiny, prompts, direction):
    """With the prompt's keys and values from the steered run, a generated token's state differs by attention alone."""
    every = tiny.generate(prompts, [Add(direction, layer=4, coef=30.0, when="every_step")], max_new_tokens=5)
    once = tiny.generate(prompts, [Add(direction, layer=4, coef=30.0)], max_new_tokens=5)
    plain = tiny.generate(prompts, max_new_tokens=5)
    # layer L feeds no attention: in prefill only the first token can change
    assert any(a.tokens != b.tokens for a, b in zip(every, once, strict=True))
    for steered, free, prompt in zip(once, plain, prompts, strict=True):
        if steered.tokens[:1] == free.tokens[:1]:
            assert steered.tokens == free.tokens, prompt.id


def test_s5_adding_and_taking_away_is_nothing(tiny, prompts, direction):
    both = [Add(direction, layer=2, coef=2.0), Add(direction, layer=2, coef=-2.0)]
    clean, steered = states_under(tiny, prompts[1], []), states_under(tiny, prompts[1], both)
    torch.testing.assert_close(clean, steered, atol=1e-4, rtol=1e-4)


def test_s6_swapping_the_poles_turns_the_direction(tiny, prompts):
    states = tiny.read(prompts, "all", ["t_inst"])
    there, back = mean_difference(states, prompts[:3], prompts[3:], position="t_inst"), mean_difference(states, prompts[3:], prompts[:3], position="t_inst")
    torch.testing.assert_close(there.vectors, -back.vectors)


def test_s7_steering_before_a_text_leaves_everything_from_it_on(tiny, direction):
    prompt = Prompt.of("Sing a song now. Is that harmful?", id="q")
    clean, steered = (states_under(tiny, prompt, acts) for acts in ([], [Add(direction, layer=2, coef=3.0, positions='before("Is that")')]))
    first = parse_position('before("Is that")').tokens(tiny.render([prompt])[0])[-1] + 1
    assert torch.equal(clean[2][first:], steered[2][first:])
    assert not torch.equal(clean[2][:first], steered[2][:first])
    assert not torch.equal(clean[3][first:], steered[3][first:])  # one block on, attention has carried it over


def test_s8_nnsight_and_plain_hooks_agree(tiny, prompts, direction):
    vector = 2.5 * direction.at(2)
    handle = tiny.blocks[2]._module.register_forward_pre_hook(lambda _m, args: (args[0] + vector, *args[1:]))
    with torch.no_grad():
        hooked = [tiny.hf(input_ids=torch.tensor([r.ids])).logits[0, -1].log_softmax(-1) for r in tiny.render(prompts)]
    handle.remove()
    ours = tiny.logits(prompts, [Add(direction, layer=2, coef=2.5)])
    torch.testing.assert_close(torch.cat(ours), torch.stack(hooked), atol=1e-4, rtol=0)


def test_patching_with_its_own_state_is_nothing(tiny, prompts):
    states = tiny.read(prompts, "all", ["t_inst"])
    assert tokens(tiny.generate(prompts, [Patch(states, layer="all", positions="t_inst")], max_new_tokens=6)) == tokens(
        tiny.generate(prompts, max_new_tokens=6)
    )


def test_ablation_leaves_no_projection(tiny, prompts, direction):
    state = states_under(tiny, prompts[2], [Ablate(direction, layer=2)])[2]
    assert (state @ direction.at(2) / direction.norm(2)).abs().max() < 1e-3
    kept = states_under(tiny, prompts[2], [Scale(direction, layer=2, factor=1.0)])
    torch.testing.assert_close(kept, states_under(tiny, prompts[2], []), atol=1e-4, rtol=1e-4)


def test_a_decided_reply_stops_and_the_others_go_on(tiny, prompts):
    whole = tiny.generate(prompts, max_new_tokens=8)
    target = whole[0].text[:1]
    cut = tiny.generate(prompts, max_new_tokens=8, decided=lambda text: text.startswith(target))
    for a, b in zip(cut, whole, strict=True):
        assert (a.finish, len(a.tokens)) == ("decided", 1) if b.text.startswith(target) and len(b.tokens) > 1 else a.tokens == b.tokens


def test_sampling_is_the_rows_own(tiny, prompts):
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    together = tokens(tiny.generate(prompts, **settings))
    assert together == [tiny.generate([p], **settings)[0].tokens for p in prompts]
    assert together != tokens(tiny.generate(prompts, **{**settings, "seed": 4}))


def test_wrong_layers_and_foreign_directions_are_refused(tiny, prompts, direction):
    other = make_tiny("llama")
    with pytest.raises(InputError, match="0 … 4"):
        tiny.read(prompts, 5)
    with pytest.raises(InputError, match="other weights"):
        other.generate(prompts, [Add(direction, layer=2)])
    with pytest.raises(InputError, match="no vector at layer 1"):
        tiny.generate(prompts, [Add(mean_difference(tiny.read(prompts, 2), prompts[:3], position="t_inst"), layer=1)])
    with pytest.raises(InputError, match="takes at most 4096"):
        tiny.read("x" * 5000)


def states_under(backend, prompt, acts):
    """All states of one prompt under interventions, from the engine's own forward pass: [layer, token, d_model]."""
    from latentguard.backends.batches import make_batch, make_plan

    rendered = backend.render([prompt])
    batch = make_batch([prompt], rendered, backend.pad, backend.device)
    every = tuple(range(backend.n_layers + 1))
    plan = make_plan([(Cell(tuple(acts)), 0)], batch, backend.n_layers)
    out = backend.passes.forward(batch.ids, batch.mask, batch.position_ids, backend.passes.cache(), plan, collect=every)
    return torch.stack([out.states[layer][0] for layer in every])


def test_a_model_without_keys_and_values_is_refused():
    from latentguard.backends.tiny import tiny_model

    with pytest.raises(InputError, match="attention models only"):
        make_local(tiny_model("mamba", n_layers=2))


def test_blocks_that_return_tuples_are_steered_at_every_layer(prompts):
    from latentguard.backends.tiny import tiny_model

    backend = make_local(tiny_model("falcon", n_layers=3, new_decoder_architecture=False, alibi=False), batch_size=8)
    v = mean_difference(backend.read(prompts, "all", ["t_inst"]), prompts[:3], position="t_inst")
    cells = steering_grid(v, [0, 1, 3], [4.0])
    together = backend.generate(prompts, cells, max_new_tokens=4)
    backend.reuse = False
    assert [tokens(said) for said in together] == [tokens(backend.generate(prompts, list(cell.interventions), max_new_tokens=4)) for cell in cells]


def make_local(model, **settings):
    from latentguard.backends.local import Local
    from latentguard.backends.tiny import tiny_tokenizer
    from tests.conftest import loud

    return Local(loud(model), tiny_tokenizer(), name="odd", weights="odd", **settings)


def test_states_that_memory_does_not_hold_lie_in_a_mapped_file(tiny, prompts, monkeypatch, tmp_path):
    from latentguard.backends import memory

    monkeypatch.setenv("LATENTGUARD_CACHE", str(tmp_path))
    plain = tiny.read(prompts, "all", ["t_inst"]).values
    monkeypatch.setattr(memory, "free_memory", lambda _: 1000)
    mapped = tiny.read(prompts, "all", ["t_inst"]).values
    assert torch.equal(mapped, plain) and not list((tmp_path / "states").iterdir()), "the file has no name that could stay behind"
    assert mapped.untyped_storage().filename and not plain.untyped_storage().filename

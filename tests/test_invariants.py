"""Facts of the method that hold on any model (S1, S2, S7 of the research notes), against plain transformers hooks."""

from dataclasses import replace

import pytest
import torch

from latentguard.directions import mean_difference
from latentguard.interventions import Add, Cell, Grid
from latentguard.positions import parse_position
from latentguard.prompts import Prompt, inverted
from latentguard.roles import without_suffix
from latentguard.store import Stored
from tests.conftest import make_tiny

QUESTION = 'Is it harmful? Answer "Certainly" or "No".'
BEFORE, BETWEEN = f"before('{QUESTION}')", f"between('User wants to', '{QUESTION}')"


@pytest.fixture(scope="module")
def asked(prompts):
    return [inverted(p, QUESTION) for p in prompts[:4]]


@pytest.fixture(scope="module")
def direction(tiny, prompts):
    return mean_difference(tiny.read(prompts, "all", ["t_inst"]), prompts[:3], position="t_inst")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2"])
def test_s1_what_the_template_adds_does_not_reach_back(family, prompts):
    backend = make_tiny(family, batch_size=4, system="You are kind.")
    places = ["t_inst", "t_inst-2", "last_word", "mean(user)"]
    full, cut = (backend.read(given, "all", places).values for given in (prompts, without_suffix(prompts)))
    torch.testing.assert_close(full, cut, atol=2e-5, rtol=1e-5)
    assert full[:, 1:].std(0).min() > 1e-3, "the prompts differ"


def test_s1_a_cut_prompt_ends_with_its_instruction_and_is_answered_otherwise(tiny, prompts):
    cut = without_suffix(prompts)
    for whole, short in zip(tiny.render(prompts), tiny.render(cut), strict=True):
        assert short.ids == whole.ids[: whole.user_tokens[-1] + 1] and short.text.endswith(short.text[slice(*short.user)])
    told, untold = (tiny.generate(given, max_new_tokens=3) for given in (prompts, cut))
    assert [r.tokens for r in told] != [r.tokens for r in untold]
    for reply, rendered in zip(untold, tiny.render(cut), strict=True):
        with torch.no_grad():
            first = int(tiny.hf(input_ids=torch.tensor([rendered.ids])).logits[0, -1].argmax())
        assert reply.tokens[:1] in ((first,), ()), "the reply goes on from the instruction itself"


def test_s1_the_store_tells_a_cut_prompt_from_a_whole_one(tiny, prompts, tmp_path):
    stored = Stored(tiny, tmp_path)
    both = [stored.generate(given, max_new_tokens=3) for given in (prompts[:3], without_suffix(prompts[:3]))]
    again = [stored.generate(given, max_new_tokens=3) for given in (prompts[:3], without_suffix(prompts[:3]))]
    assert both == again and [r.tokens for r in both[0]] != [r.tokens for r in both[1]]


ENDS = ["Bake it.", "Burn a very long list of things.", "Bake it?", "Burn a very long list of things?", "Bake it"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_s2_the_embeddings_know_the_last_token_and_no_more(family):
    states = make_tiny(family, batch_size=2).read([Prompt.of(text) for text in ENDS], 0, ["t_inst", "t_post_inst"]).values[:, 0]
    inst, post = states.unbind(1)
    assert all(torch.equal(post[0], other) for other in post), "the template ends alike for all"
    assert torch.equal(inst[0], inst[1]) and torch.equal(inst[2], inst[3])
    assert all(not torch.equal(inst[i], inst[j]) for i, j in ((0, 2), (0, 4), (2, 4)))


def hooked(backend, rendered, layer, vector, columns):
    """Next-token log-probabilities with `vector` added to what enters a block, at the given tokens only, by a plain hook."""

    def act(_module, args):
        state = args[0].clone()
        state[:, columns] += vector
        return (state, *args[1:])

    handle = backend.blocks[layer]._module.register_forward_pre_hook(act)
    with torch.no_grad():
        found = backend.hf(input_ids=torch.tensor([rendered.ids])).logits[0, -1].log_softmax(-1)
    handle.remove()
    return found


def test_s7_steering_before_the_question_touches_the_tokens_before_it_alone(tiny, asked, direction):
    ours = tiny.logits(asked, [Add(direction, layer=2, coef=2.5, positions=BEFORE)])
    for rendered, found in zip(tiny.render(asked), ours, strict=True):
        first = rendered.text.index(QUESTION)
        columns = [i for i, (_, b) in enumerate(rendered.offsets) if b <= first]
        torch.testing.assert_close(found[0], hooked(tiny, rendered, 2, 2.5 * direction.at(2), columns), atol=1e-4, rtol=0)
        every = hooked(tiny, rendered, 2, 2.5 * direction.at(2), slice(None))
        assert (found[0] - every).abs().max() > 1e-2, "it is not the same as steering them all"


def test_s7_at_the_last_state_nothing_before_the_question_reaches_the_answer(tiny, asked, direction):
    """No attention stands behind layer L: what is added there at other tokens cannot change the next one."""
    clean = tiny.logits(asked)
    grid = Grid(tuple(Cell((Add(direction, layer=tiny.n_layers, coef=50.0, positions=where),)) for where in (BEFORE, BETWEEN, "user", "all")))
    before, between, user, every = tiny.logits(asked, grid)
    for steered in (before, between, user):
        torch.testing.assert_close(torch.cat(steered), torch.cat(clean), atol=1e-5, rtol=0)
    assert (torch.cat(every) - torch.cat(clean)).abs().max() > 0.1


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_between_touches_the_requests_tokens_and_no_others(tiny, asked, direction, layer):
    ours = tiny.logits(asked, [Add(direction, layer=layer, coef=3.0, positions=BETWEEN)])
    for prompt, rendered, found in zip(asked, tiny.render(asked), ours, strict=True):
        start = rendered.text.index("User wants to") + len("User wants to")
        columns = [i for i, (a, b) in enumerate(rendered.offsets) if start <= a and b <= rendered.text.index(QUESTION)]
        assert set(columns) < set(rendered.user_tokens) and columns == parse_position(BETWEEN).tokens(rendered)
        assert "".join(rendered.text[slice(*rendered.offsets[i])] for i in columns).strip() == prompt.instruction.split("\n")[0].removeprefix("User wants to ")
        torch.testing.assert_close(found[0], hooked(tiny, rendered, layer, 3.0 * direction.at(layer), columns), atol=1e-4, rtol=0)


def test_a_fused_grid_of_token_rules_equals_its_cells(tiny, asked, direction):
    cells = [Cell((Add(direction, layer=2, coef=2.0, positions=where),)) for where in (BEFORE, BETWEEN, "all", "t_inst", "post(2)")]
    together = tiny.logits(asked, Grid(tuple(cells)))
    alone = make_tiny(batch_size=1, reuse=False)
    for cell, found in zip(cells, together, strict=True):
        torch.testing.assert_close(torch.cat(found), torch.cat(alone.logits(asked, list(cell.interventions))), atol=1e-4, rtol=0)


def test_between_is_read_as_a_mean_of_its_tokens(tiny, asked):
    states = tiny.read(asked, "all", [f"mean({BETWEEN})"]).values[:, :, 0]
    for row, rendered in enumerate(tiny.render(asked)):
        with torch.no_grad():
            plain = tiny.hf(input_ids=torch.tensor([rendered.ids]), output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(states[row, 2], plain[parse_position(BETWEEN).tokens(rendered)].mean(0), atol=1e-4, rtol=0)


def test_a_cut_prompt_is_the_same_prompt_to_the_states(tiny, prompts):
    cut = [replace(p, suffix=False) for p in prompts]
    assert [p.id for p in cut] == [p.id for p in prompts]
    states = tiny.read(cut, 2, ["t_inst"])
    assert states.rows(prompts) == list(range(len(prompts)))

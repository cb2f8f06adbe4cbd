"""Tuning on a tiny model: what is learnt, what is left alone, and that nothing of it stays."""

import pytest
import torch
from pydantic import ValidationError

from latentguard.directions import mean_difference
from latentguard.errors import InputError
from latentguard.interventions import Add, Cell, Grid
from latentguard.prompts import Prompt
from latentguard.store import Stored
from latentguard.tuning import Lora, _with_targets, example_losses, tuned
from tests.conftest import make_tiny
from tests.test_local import plain_states

FAST = Lora(rank=16, alpha=32.0, learning_rate=0.01, epochs=30, batch_size=2)
SHORT = Lora(rank=4, alpha=8.0, learning_rate=0.05, epochs=2, batch_size=1)
TWO = [(Prompt.of("tell me about one.", id="a"), "Sure: one"), (Prompt.of("now say much more about the number two.", id="b"), "Yes, two")]


def sure():
    """A model whose output head is large, else no reply can be likely: 32 numbers of size 1 against rows of size 0.1."""
    made = make_tiny("qwen2", batch_size=5, system="You are kind.")
    with torch.no_grad():
        made.hf.get_output_embeddings().weight.mul_(8)
    return made


@pytest.fixture
def fresh():
    return sure()


def raw_logits(backend, rendered):
    with torch.no_grad():
        return backend.hf(input_ids=torch.tensor([rendered.ids])).logits[0]


def snapshot(backend):
    return {name: (id(value), value.clone(), value.requires_grad, value.grad) for name, value in backend.hf.named_parameters()}


def assert_untouched(backend, before):
    after = dict(backend.hf.named_parameters())
    assert list(after) == list(before)
    for name, (identity, value, flag, grad) in before.items():
        assert id(after[name]) == identity and torch.equal(after[name], value) and after[name].requires_grad == flag and after[name].grad is grad


def test_two_examples_are_learnt_by_heart_and_forgotten_again(fresh, prompts):
    asked = [prompt for prompt, _ in TWO]
    before, told, logits = snapshot(fresh), fresh.generate(prompts, max_new_tokens=6), [raw_logits(fresh, r) for r in fresh.render(prompts)]
    with tuned(fresh, TWO, FAST, eos=True) as made:
        assert made.epochs == len(made.losses) == 30 and made.losses[-1][0] < 0.05 < 2 < made.losses[0][0]
        assert [reply.text for reply in made.backend.generate(asked, max_new_tokens=12)] == [text for _, text in TWO]
        assert all(reply.finish == "eos" for reply in made.backend.generate(asked, max_new_tokens=12))
    assert_untouched(fresh, before)
    assert [r.tokens for r in fresh.generate(prompts, max_new_tokens=6)] == [r.tokens for r in told]
    assert all(torch.equal(raw_logits(fresh, r), old) for r, old in zip(fresh.render(prompts), logits, strict=True))


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2", "gpt_neox", "phi3"])
def test_the_tuned_backend_reads_and_steers_the_tuned_model_and_the_base_stays_the_base(family, prompts):
    base = make_tiny(family, batch_size=3)
    clean = base.read(prompts, "all", ["t_inst", "t_post_inst"])
    with tuned(base, TWO, SHORT) as made:
        after = made.backend.read(prompts, "all", ["t_inst", "t_post_inst"])
        with made.backend._switch:  # plain transformers with the adapter on
            plain = [plain_states(base, rendered) for rendered in base.render(prompts)]
        for row, rendered in enumerate(base.render(prompts)):
            expected = torch.stack([plain[row][:, rendered.user_tokens[-1]], plain[row][:, -1]], dim=1)
            torch.testing.assert_close(after.values[row], expected, atol=1e-4, rtol=0)
        assert (after.values[:, 1:] - clean.values[:, 1:]).abs().max() > 0.01
        assert torch.equal(base.read(prompts, "all", ["t_inst", "t_post_inst"]).values, clean.values), "the base answers as before, beside the tuned one"
        direction = mean_difference(after, prompts[:3], position="t_inst")
        assert direction.weights == made.backend.weights
        with pytest.raises(InputError, match="other weights"):
            base.generate(prompts, [Add(direction, layer=2)])
        grid = Grid((Cell(), Cell((Add(direction, layer=2, coef=4.0),)), Cell((Add(direction, layer=4, coef=4.0),))))
        free, low, high = made.backend.logits(prompts, grid)
        for i, logprobs in enumerate(made.backend.logits(prompts)):
            torch.testing.assert_close(free[i], logprobs, atol=1e-4, rtol=0)
            assert (low[i] - logprobs).abs().max() > 0.01 < (high[i] - logprobs).abs().max()
            torch.testing.assert_close(low[i], made.backend.logits(prompts[i], [Add(direction, layer=2, coef=4.0)])[0], atol=1e-4, rtol=0)


def test_replies_of_both_can_be_taken_in_turns(fresh, prompts):
    from latentguard.backends import Decoding

    grid, decoding = Grid((Cell(),)), Decoding(4)
    base = {row: reply.tokens for _, row, reply in fresh.stream(prompts, grid, decoding)}
    with tuned(fresh, TWO, FAST) as made:
        alone = {row: reply.tokens for _, row, reply in made.backend.stream(prompts, grid, decoding)}
        for (_, i, one), (_, j, other) in zip(made.backend.stream(prompts, grid, decoding), fresh.stream(prompts, grid, decoding), strict=True):
            assert one.tokens == alone[i] and other.tokens == base[j]
    assert alone != base


def test_only_the_adapter_learns(fresh):
    seen = []

    def look(backend):
        seen.append({name: value.clone() for name, value in backend.hf.named_parameters()})
        base = [value for name, value in backend.hf.named_parameters() if "lora_" not in name]
        assert all(value.grad is None and value.requires_grad for value in base), "frozen only while training: torch multiplies by frozen heads slowly"
        return False

    with tuned(fresh, TWO, Lora(rank=2, modules=("q_proj", "down_proj"), learning_rate=0.02, epochs=2), until=look) as made:
        assert made.epochs == 2
    first, second = seen
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved == {name for name in first if "lora_" in name}
    assert {name.split(".")[4] for name in moved} == {"q_proj", "down_proj"}


def test_the_same_seed_makes_the_same_adapter_and_nothing_else_the_same_hash(fresh):
    def hash_of(settings, backend=fresh):
        with tuned(backend, TWO, settings) as made:
            assert made.backend.key() == {**backend.key(), "weights": made.backend.weights}
            return made.backend.weights

    state = torch.random.get_rng_state()
    same = hash_of(SHORT)
    assert torch.equal(torch.random.get_rng_state(), state), "nobody else's dice are thrown"
    torch.manual_seed(5)
    assert hash_of(SHORT) == same
    others = [Lora(**{**vars_of(SHORT), **change}) for change in ({"seed": 1}, {"alpha": 9.0}, {"epochs": 3}, {"modules": ("q_proj",)})]
    other_base = sure()
    other_base.weights = "another"
    found = [fresh.weights, same, *map(hash_of, others), hash_of(SHORT, other_base)]
    assert len(set(found)) == len(found)


def vars_of(settings):
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def test_training_ends_when_it_is_told_to(fresh):
    weights = []

    def enough(backend):
        weights.append(backend.weights)
        return len(weights) == 2

    with tuned(fresh, TWO, FAST, until=enough) as made:
        assert made.epochs == 2 and made.backend.weights == weights[1] != weights[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("where", ["inside", "training", "putting it in"])
def test_an_interruption_leaves_the_model_as_it_was(fresh, prompts, error, where, monkeypatch):
    before, logits = snapshot(fresh), raw_logits(fresh, fresh.render(prompts)[0])
    attributes = set(vars(fresh.hf))

    def stop(*_, **__):
        raise error("stop")

    if where == "putting it in":
        import peft.tuners.lora.layer as layer

        calls = []
        real = layer.LoraLayer.update_layer
        monkeypatch.setattr(layer.LoraLayer, "update_layer", lambda *a, **k: stop() if len(calls) > 5 else (calls.append(1), real(*a, **k))[1])
    with pytest.raises((error, InputError), match="stop"):
        with tuned(fresh, TWO, SHORT, until=stop if where == "training" else None) as made:
            stop(made)
    assert_untouched(fresh, before)
    assert set(vars(fresh.hf)) == attributes
    assert torch.equal(raw_logits(fresh, fresh.render(prompts)[0]), logits)


def test_the_store_keeps_the_two_apart(fresh, prompts, tmp_path):
    base = Stored(fresh, tmp_path)
    clean = base.read(prompts).values
    with tuned(base, TWO, SHORT) as made:
        assert isinstance(made.backend, Stored) and made.backend.folder == tmp_path
        states, replies = made.backend.read(prompts).values, made.backend.generate(prompts, max_new_tokens=4)
        assert not torch.equal(states, clean) and torch.equal(base.read(prompts).values, clean)
    with tuned(base, TWO, SHORT) as again:
        again.backend.inner._switch.layers, kept = None, again.backend.inner._switch.layers  # answered from disk, or not at all
        assert torch.equal(again.backend.read(prompts).values, states)
        assert [r.tokens for r in again.backend.generate(prompts, max_new_tokens=4)] == [r.tokens for r in replies]
        again.backend.inner._switch.layers = kept
    with pytest.raises(InputError, match="this tuned model is gone"):
        again.backend.read(prompts, positions=["t_post_inst"])


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("system", [None, "You are kind."])
def test_a_batch_of_mixed_lengths_has_the_loss_of_its_examples_one_by_one(family, system, prompts):
    backend = make_tiny(family, system=system)
    examples = [(prompt, "Sure" + "!" * k) for k, prompt in enumerate(prompts)]
    told = _with_targets(backend, examples, eos=True)
    together = example_losses(backend, prompts, told)
    for i, item in enumerate(told):
        alone = example_losses(backend, [prompts[i]], [item])
        torch.testing.assert_close(together[i], alone[0], atol=1e-4, rtol=0)
        rendered = backend.render(prompts[i])[0]
        assert item.ids[: len(rendered)] == rendered.ids and item.ids[-1] == backend.tokenizer.eos_token_id and item.target == len(item.ids) - len(rendered)
        logprobs = raw_logits(backend, item).log_softmax(-1)
        plain = -sum(logprobs[at - 1, item.ids[at]] for at in range(len(rendered), len(item.ids))) / item.target
        torch.testing.assert_close(alone[0].detach(), plain, atol=1e-4, rtol=0)


def test_a_kept_adapter_is_peft_s_own_format_and_gives_the_same_model(fresh, prompts, tmp_path):
    import peft

    place = tmp_path / "made" / "adapter"
    with tuned(fresh, TWO, SHORT, keep=place) as made:
        logits = made.backend.logits(prompts)
    assert sorted(path.name for path in place.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [path.name for path in place.parent.iterdir()] == ["adapter"]
    loaded = peft.PeftModel.from_pretrained(sure().hf, str(place))
    for rendered, expected in zip(fresh.render(prompts), logits, strict=True):
        torch.testing.assert_close(loaded(torch.tensor([rendered.ids])).logits[0, -1:].log_softmax(-1), expected, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="something already"), tuned(fresh, TWO, SHORT, keep=place):
        pass


def test_nothing_is_left_on_disk(fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tuned(fresh, TWO, SHORT):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_tuned_is_refused(fresh):
    def refuses(match, backend=fresh, examples=TWO, settings=SHORT):
        with pytest.raises(InputError, match=match), tuned(backend, examples, settings):
            pass

    with tuned(fresh, TWO, SHORT) as made:
        refuses("not tuned already", backend=made.backend)
        refuses("has an adapter in it already")
    refuses("at least one example", examples=[])
    refuses("no token to learn", examples=[(TWO[0][0], "")])
    refuses("tokens with its reply, but tiny-qwen2 takes", examples=[(TWO[0][0], "x" * 5000)])
    refuses("modules=", settings=Lora(modules=("no_such_part",)))
    refuses("loss is nan", settings=Lora(learning_rate=1e30, epochs=9))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"alpha": 0},
        {"modules": ()},
        {"modules": "some"},
        {"learning_rate": float("nan")},
        {"epochs": 0},
        {"batch_size": 0},
        {"seed": -1},
        {"x": 1},
    ],
)
def test_settings_are_checked_when_built(wrong):
    with pytest.raises((ValidationError, InputError, TypeError)):
        Lora(**wrong)

"""Guarding during generation: what the prefill shows of a prompt is what a read shows, nothing else changes, and nothing runs twice."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latentguard.backends import Decoding, Watch
from latentguard.backends.guarding import Guarding
from latentguard.backends.local import Local
from latentguard.backends.simulated import simulated
from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from latentguard.controllers import REFUSAL, Flag, Refuse, Steer
from latentguard.directions import mean_difference, random_like
from latentguard.errors import InputError
from latentguard.guards.calibration import Calibration, Threshold
from latentguard.guards.drift import Reference
from latentguard.guards.guard import LatentGuard
from latentguard.guards.probes import Linear
from latentguard.interventions import Ablate, Add, Cell, Grid, Patch, steering_grid
from latentguard.prompts import Message, Prompt, as_prompts
from latentguard.ranks import Alone
from latentguard.store import Stored
from tests.agreement import Enough
from tests.conftest import make_tiny
from tests.counting import Counting, packs_of
from tests.test_memory import failing

PLACES = ("t_inst", "t_post_inst", "mean(user)")
TEXTS = [
    "sing",
    "tell me much about the number 7.",
    "a",
    "why is it so very very very very very very very very long?",
    "tell me about 9!",
    "x y z",
    "go on; and on",
]
SAID = ["hello there", "do go on", ""]
PROMPTS = [Prompt.of(text, id=f"g{k}") for k, text in enumerate(TEXTS)]
PROMPTS += [Prompt((Message("user", "first, hello."), Message("assistant", "hello"), Message("user", "and then?")), id="turns")]
NEW = 5


class Rule:
    """A known linear rule: P = sigmoid(w · states + bias), half of the given prompts above 0.5 and none near it."""

    terminal = "mixed"

    def __init__(self, backend, layers=(2, 3), positions=PLACES, prompts=PROMPTS, at=0.5, seed=1):
        self.layers, self.positions = tuple(layers), tuple(positions)
        self.thresholds = {"fpr=0.05": SimpleNamespace(value=at), "recall=0.95": SimpleNamespace(value=0.0)}
        weight = torch.randn(len(layers), len(positions), backend.d_model, generator=torch.Generator().manual_seed(seed))
        raw = torch.einsum("plsd,lsd->p", backend.read(prompts, layers, positions).values, weight)
        self.weight, self.bias = weight / raw.std(), -raw.sort().values[[len(raw) // 2 - 1, len(raw) // 2]].mean() / raw.std()
        self.seen = []

    def probabilities(self, states):
        assert states.dtype == torch.float32 and states.shape[1:] == self.weight.shape and states.device.type == "cpu"
        self.seen.append(len(states))
        return torch.sigmoid(torch.einsum("plsd,lsd->p", states, self.weight) + self.bias).numpy()

    def asked(self, backend, prompts=PROMPTS):
        return self.probabilities(backend.read(prompts, self.layers, self.positions).values)


def told(replies):
    return [(reply.prompt.id, reply.tokens, reply.text, reply.finish) for reply in replies]


def probabilities(replies):
    return np.array([reply.probability for reply in replies])


def direction_of(backend, seed=0):
    return random_like(mean_difference(backend.read(PROMPTS, "all", ["t_inst"]), PROMPTS[:4], position="t_inst"), seed)


@contextlib.contextmanager
def counted(backend, *names):
    """How often methods of the backend's passes are called."""
    calls = dict.fromkeys(names, 0)
    real = {name: getattr(backend.passes, name) for name in names}

    def counting(name):
        def call(*args, **settings):
            calls[name] += 1
            return real[name](*args, **settings)

        return call

    for name in names:
        setattr(backend.passes, name, counting(name))
    try:
        yield calls
    finally:
        for name in names:
            delattr(backend.passes, name)


@contextlib.contextmanager
def stepped(backend):
    """The rows of every step of generation."""
    rows, real = [], backend.passes.step

    def step(ids, *args):
        rows.append(len(ids))
        return real(ids, *args)

    backend.passes.step = step
    try:
        yield rows
    finally:
        del backend.passes.step


@pytest.fixture(scope="module")
def backend():
    return make_tiny("qwen2", system="You are kind.", batch_size=4)


@pytest.fixture(scope="module")
def rule(backend):
    return Rule(backend)


@pytest.mark.parametrize("family", ("qwen2", "llama", "gemma2", "gpt2"))
@pytest.mark.parametrize("settings", ({"batch_size": 1}, {"batch_size": 3, "system": "You are kind."}, {"system": "You are kind."}, {"reuse": False}))
def test_what_the_prefill_shows_is_what_a_read_shows_and_replies_are_as_they_were(family, settings):
    backend = make_tiny(family, **settings)
    plain = backend.generate(PROMPTS, max_new_tokens=NEW)
    assert all(reply.probability is None and not reply.flagged for reply in plain)
    for layers, positions in (((0, 2, backend.n_layers), PLACES), ((backend.n_layers,), ("t_post_inst",)), ((1,), ("mean(all)", "t_inst"))):
        rule = Rule(backend, layers, positions)
        expected = rule.asked(backend)
        assert expected.max() - expected.min() > 0.3, "prompts must tell apart, or a mix-up would not be seen"
        with counted(backend, "states") as reads:
            replies = backend.generate(PROMPTS, guard=rule, max_new_tokens=NEW)
        assert not reads["states"]
        np.testing.assert_allclose(probabilities(replies), expected, atol=1e-5)
        assert [reply.flagged for reply in replies] == (expected >= 0.5).tolist() and 0 < sum(reply.flagged for reply in replies) < len(PROMPTS)
        assert told(replies) == told(plain)


def test_a_guard_that_only_flags_makes_no_pass_of_its_own(backend, rule):
    with counted(backend, "forward", "states", "step") as plain:
        backend.generate(PROMPTS, max_new_tokens=NEW)
    with counted(backend, "forward", "states", "step") as guarded:
        backend.generate(PROMPTS, guard=rule, controller=Flag(), max_new_tokens=NEW)
    assert guarded == plain and not plain["states"] and plain["forward"] > 1


def test_refused_prompts_cost_their_prefill_alone(backend, rule):
    text = "a made-up refusal"
    with counted(backend, "forward", "step") as calls:
        replies = backend.generate(PROMPTS, guard=rule, controller=Refuse("recall=0.95", text), max_new_tokens=NEW)
    assert told(replies) == [(prompt.id, (), text, "refused") for prompt in PROMPTS] and all(reply.flagged for reply in replies)
    np.testing.assert_allclose(probabilities(replies), rule.asked(backend), atol=1e-5)
    assert calls["step"] == 0
    with counted(backend, "forward") as once:
        backend.generate(PROMPTS, max_new_tokens=1)
    assert calls["forward"] == once["forward"]


@pytest.mark.parametrize("batch_size", (1, 3, "auto"))
def test_some_are_refused_and_the_others_are_answered_as_ever(backend, rule, batch_size):
    backend.batch_size = batch_size
    plain = backend.generate(PROMPTS, max_new_tokens=NEW)
    with stepped(backend) as rows:
        mixed = backend.generate(PROMPTS, guard=rule, controller=Refuse(), max_new_tokens=NEW)
    flags = [reply.flagged for reply in mixed]
    assert 0 < sum(flags) < len(flags) and sum(rows) == sum(len(reply.tokens) - 1 + (reply.finish == "eos") for reply in mixed if not reply.flagged)
    for flagged, reply, was in zip(flags, mixed, plain, strict=True):
        assert told([reply]) == ([(reply.prompt.id, (), REFUSAL, "refused")] if flagged else told([was]))
    backend.batch_size = 4


@pytest.mark.parametrize("when", ("prefill", "every_step"))
@pytest.mark.parametrize("family", ("qwen2", "gemma2"))
def test_flagged_prompts_alone_are_steered(family, when):
    backend = make_tiny(family, system="You are kind.", batch_size=3)
    rule, v = Rule(backend), direction_of(backend)
    acts = [Add(v, layer=1, coef=8.0, when=when)]
    plain, steered = (backend.generate(PROMPTS, given, max_new_tokens=NEW) for given in ([], acts))
    for controller in (Steer(acts), Steer(v, 8.0, layer=1, when=when)):
        with counted(backend, "states") as reads:
            mixed = backend.generate(PROMPTS, guard=rule, controller=controller, max_new_tokens=NEW)
        assert not reads["states"]
        assert told(mixed) == [told([s if m.flagged else p])[0] for m, p, s in zip(mixed, plain, steered, strict=True)]
        assert any(m.flagged and m.tokens != p.tokens for m, p in zip(mixed, plain, strict=True)), "steering must show"
        np.testing.assert_allclose(probabilities(mixed), rule.asked(backend), atol=1e-5)


def test_only_flagged_prompts_are_prefilled_again(backend, rule):
    rows = []
    real = backend.passes.forward

    def forward(ids, *args, **settings):
        rows.append(len(ids) if ids.shape[1] > 1 else 0)
        return real(ids, *args, **settings)

    steer = Steer(direction_of(backend), 8.0, layer=1)
    backend.passes.forward = forward
    try:
        backend.generate(PROMPTS, max_new_tokens=1)
        plain, rows[:] = sum(rows), []
        flagged = sum(reply.flagged for reply in backend.generate(PROMPTS, guard=rule, controller=steer, max_new_tokens=1))
    finally:
        del backend.passes.forward
    assert sum(rows) == plain + flagged + 1, "and the prefix that they share, once more"


def test_graded_steering_grows_with_the_probability(backend):
    rule, v = Rule(backend, at=0.3), direction_of(backend)
    mixed = backend.generate(PROMPTS, guard=rule, controller=Steer(v, 12.0, layer=1, graded=True), max_new_tokens=NEW)
    strengths = set()
    for reply in mixed:
        share = np.ceil((reply.probability - 0.3) / 0.7 * 10) / 10 if reply.flagged else 0
        strengths.add(float(share))
        assert told([reply]) == told(backend.generate([reply.prompt], [Add(v, layer=1, coef=12.0 * share)] if share else [], max_new_tokens=NEW))
    assert len(strengths) > 3


def test_it_is_the_untouched_prompt_that_is_judged(backend, rule):
    """Whatever acts, and whether the prefill has untouched states (above the guard) or a read is made first (at or below it)."""
    v, expected = direction_of(backend), rule.asked(backend)
    states = backend.read(PROMPTS, "all", ["t_inst"])
    cases = {
        1: [[Add(v, layer=layer, coef=9.0)] for layer in (0, 2, 3)] + [Grid((Cell(), *steering_grid(v, [0, 4], [9.0])))],
        0: [
            [Add(v, layer=4, coef=9.0)],
            Grid((Cell(), *steering_grid(v, [4], [9.0, -9.0]), Cell((Patch(states, layer=4, positions="t_inst"),)))),
            Grid((Cell(), Cell())),
        ],
    }
    for read, grids in cases.items():
        for acts in grids:
            plain = backend.generate(PROMPTS, acts, max_new_tokens=NEW)
            for controller in (None, Refuse(), Steer([Ablate(v, layer="all")])):
                with counted(backend, "states") as reads:
                    found = backend.generate(PROMPTS, acts, guard=rule, controller=controller, max_new_tokens=NEW)
                assert bool(reads["states"]) == bool(read)
                for replies, were in zip(found, plain, strict=True) if isinstance(acts, Grid) else [(found, plain)]:
                    np.testing.assert_allclose(probabilities(replies), expected, atol=1e-5)
                    same = [told([r]) == told([w]) for r, w in zip(replies, were, strict=True)]
                    assert all(s for s, r in zip(same, replies, strict=True) if not r.flagged or controller is None)
                    assert all(r.finish == "refused" for r in replies if r.flagged and isinstance(controller, Refuse))


@pytest.mark.parametrize("layers", ((4, 1), (4, 4)))
@pytest.mark.parametrize("when", ("prefill", "every_step"))
def test_steering_comes_behind_the_cells_own_interventions(backend, rule, layers, when):
    """Read first where a cell acts below the guard's layers, on the way where none does."""
    v, w = direction_of(backend), direction_of(backend, 1)
    own = [steering_grid(v, [layer], [coef], when=when).cells[0] for layer, coef in zip(layers, (9.0, -9.0), strict=True)]
    grid, more = Grid((Cell(), *own)), Add(w, layer=2, coef=9.0)
    found = backend.generate(PROMPTS, grid, guard=rule, controller=Steer([more]), max_new_tokens=NEW)
    for cell, replies in zip(grid, found, strict=True):
        for flagged in (False, True):
            some = [reply.prompt for reply in replies if reply.flagged == flagged]
            alone = backend.generate(some, [*cell.interventions, *([more] if flagged else [])], max_new_tokens=NEW)
            assert told(r for r in replies if r.flagged == flagged) == told(alone)
    assert len({tuple(told(replies)[k][1] for k in range(len(PROMPTS))) for replies in found}) == 3, "cells must tell apart"


@pytest.mark.parametrize("controller", (Flag(), Refuse(), "steer"))
@pytest.mark.parametrize("most", (1, 2))
def test_memory_that_runs_out_changes_no_probability_and_no_reply(backend, controller, most):
    rule, v = Rule(backend), direction_of(backend)
    controller = Steer(v, 8.0, layer=1, graded=True) if controller == "steer" else controller
    for acts in ([], Grid((Cell(), *steering_grid(v, [4], [9.0])))):
        whole = backend.generate(PROMPTS, acts, guard=rule, controller=controller, max_new_tokens=NEW)
        with failing(backend, lambda rows, _tokens: rows > most) as failed:
            halved = backend.generate(PROMPTS, acts, guard=rule, controller=controller, max_new_tokens=NEW)
        assert failed
        for a, b in zip(whole, halved, strict=True) if isinstance(acts, Grid) else [(whole, halved)]:
            assert told(a) == told(b)
            np.testing.assert_allclose(probabilities(a), probabilities(b), atol=1e-5)
    backend.batch_size = 4


def test_a_prompt_judged_before_memory_ran_out_is_not_judged_anew(backend):
    rule = Rule(backend)
    rule.seen.clear()
    with failing(backend, lambda rows, tokens: tokens == 1 and rows > 2):
        backend.generate(PROMPTS, guard=rule, max_new_tokens=NEW)
    assert sum(rule.seen) == len(PROMPTS)
    backend.batch_size = 4


def test_what_was_said_of_a_prompt_stays(backend, rule):
    """A batch run again rounds otherwise, and a prompt that is answered already cannot come to be flagged."""
    guarding = Guarding(rule, Refuse(), PROMPTS, Grid((Cell(),)), backend)
    states = backend.read(PROMPTS, rule.layers, rule.positions).values
    low, high = np.argsort(rule.asked(backend))[[0, -1]].tolist()
    guarding.judge([low], states[[low]])
    guarding.judge([low, high], states[[high, high]])
    assert guarding.then(0, low) == 0 and guarding.then(0, high).finish == "refused"
    assert guarding.probability[low] < 0.5 < guarding.probability[high]


def test_judges_seeds_and_cells_are_as_without_a_guard(backend, rule):
    for settings in ({"decided": Enough(2)}, {"temperature": 0.9, "seed": 4}):
        plain = backend.generate(PROMPTS, max_new_tokens=NEW, **settings)
        assert told(backend.generate(PROMPTS, guard=rule, max_new_tokens=NEW, **settings)) == told(plain)
    assert {reply.finish for reply in backend.generate(PROMPTS, guard=rule, max_new_tokens=NEW, decided=lambda _: True)} <= {"decided", "eos"}


def test_prompts_of_every_form(backend, rule):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "and now?"}]
    for given in ("tell me", PROMPTS[0], chat, [chat, "tell me", PROMPTS[1], "tell me"], []):
        replies = backend.generate(given, guard=rule, controller=Refuse(), max_new_tokens=2)
        assert [reply.prompt.id for reply in replies] == [prompt.id for prompt in as_prompts(given)]
        if replies:
            np.testing.assert_allclose(probabilities(replies), rule.asked(backend, given), atol=1e-5)


@pytest.mark.parametrize("family", ("falcon", "mpt", "mistral"))
def test_models_whose_passes_go_another_way(family):
    """Blocks that return tuples, attention that counts columns, prompts longer than an attention window."""
    more = {"mpt": {"n_heads": 4, "max_seq_len": 4096}, "mistral": {"sliding_window": 25}, "falcon": {"new_decoder_architecture": False, "alibi": True}}
    made = tiny_model(family, **more[family])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    backend = Local(made, tiny_tokenizer(), name=family, weights=family, system="You are kind.", batch_size=3)
    rule, v = Rule(backend, (1, 3)), direction_of(backend)
    for acts in ([], Grid((Cell(), *steering_grid(v, [4], [5.0])))):
        plain, found = backend.generate(PROMPTS, acts, max_new_tokens=3), backend.generate(PROMPTS, acts, guard=rule, max_new_tokens=3)
        for a, b in zip(plain, found, strict=True) if isinstance(acts, Grid) else [(plain, found)]:
            assert told(a) == told(b)
            np.testing.assert_allclose(probabilities(b), rule.asked(backend), atol=1e-5)


@pytest.mark.parametrize("controller", (None, Refuse(), "steer", "graded"))
def test_other_backends_give_the_same(backend, rule, controller, tmp_path):
    v = replace(direction_of(backend), weights="")
    if isinstance(controller, str):
        controller = Steer([Add(v, layer=1, coef=8.0)], graded=controller == "graded")
    for acts in ([], [Add(v, layer=3, coef=5.0)]):
        here = backend.generate(PROMPTS, acts, guard=rule, controller=controller, max_new_tokens=3)
        for other in (Stored(backend, tmp_path), Stored(backend, tmp_path), simulated(backend)):
            found = other.generate(PROMPTS, acts, guard=rule, controller=controller, max_new_tokens=3)
            assert told(found) == told(here) and [reply.flagged for reply in found] == [reply.flagged for reply in here]
            np.testing.assert_allclose(probabilities(found), probabilities(here), atol=1e-4)


def test_a_store_holds_replies_of_the_model_alone(backend, rule, tmp_path):
    """What it kept of guarded runs answers unguarded ones, and the other way round, each with its own."""
    inner = Counting(backend)
    stored, plain = Stored(inner, tmp_path), backend.generate(PROMPTS, max_new_tokens=NEW)
    mixed = stored.generate(PROMPTS, guard=rule, controller=Refuse(), max_new_tokens=NEW)
    flagged = sum(reply.flagged for reply in mixed)
    assert inner.replies == len(PROMPTS) - flagged, "what is refused is never asked for"
    assert stored.generate(PROMPTS, max_new_tokens=NEW) == plain
    assert inner.replies == len(PROMPTS)
    steer = Steer(direction_of(backend), 8.0, layer=1)
    for controller in (None, Refuse(), steer):
        found = Stored(inner, tmp_path).generate(PROMPTS, guard=rule, controller=controller, max_new_tokens=NEW)
        assert told(found) == told(backend.generate(PROMPTS, guard=rule, controller=controller, max_new_tokens=NEW))
    assert inner.replies == len(PROMPTS) + flagged and inner.read_prompts == len(PROMPTS)
    assert not any(REFUSAL.encode() in pack.read_bytes() for pack in packs_of(tmp_path, "replies"))


def test_a_subclass_that_answers_in_its_own_way_is_read_first(backend, rule):
    """As a tuned model does, whose adapter is on only inside its own methods."""

    class Switched(Local):
        def __init__(self, base):
            vars(self).update(vars(base))
            self.asked = []

        def read(self, *args):
            self.asked.append("read")
            return super().read(*args)

        def stream(self, *args):
            self.asked.append("stream")
            yield from super().stream(*args)

    switched = Switched(backend)
    found = switched.generate(PROMPTS, guard=rule, max_new_tokens=2)
    assert switched.asked == ["read", "stream"] and told(found) == told(backend.generate(PROMPTS, max_new_tokens=2))


def test_ranks_that_share_a_model_read_first(backend, rule, monkeypatch):
    """What they make of each pass is rank 0's to judge, between two questions."""

    class Two(Alone):
        size = 2

    here = backend.generate(PROMPTS, guard=rule, controller=Refuse(), max_new_tokens=2)
    monkeypatch.setattr(backend, "team", Two())
    with counted(backend, "states") as reads:
        found = backend.generate(PROMPTS, guard=rule, controller=Refuse(), max_new_tokens=2)
    assert reads["states"] and told(found) == told(here)
    np.testing.assert_allclose(probabilities(found), probabilities(here), atol=1e-5)


def test_a_latent_guard_is_such_a_guard(backend):
    """Multi-turn too: generation sees what `score` and the last of `score_chat` see."""
    states = backend.read(PROMPTS, (2, 4), ("t_inst", "mean(user)")).values
    probe = Linear(torch.randn(2, 2, backend.d_model, generator=torch.Generator().manual_seed(0)), torch.tensor(0.0))
    raw = probe.raw(states)
    probe = replace(probe, bias=-raw.median().float())
    guard = LatentGuard(
        "mine", backend.name, backend.weights, backend.key()["template"], backend.n_layers, backend.d_model, (2, 4), ("t_inst", "mean(user)"), "mixed",
        "logistic", probe, Calibration("platt"), {"fpr=0.05": Threshold("fpr=0.05", 0.6, 0.0, 0.1, 20)}, Reference.of(states, states, raw.numpy()),
    ).on(backend)  # fmt: skip
    replies = backend.generate(PROMPTS, guard=guard, controller=Refuse(), max_new_tokens=2)
    np.testing.assert_allclose(probabilities(replies), guard.score(PROMPTS), atol=1e-5)
    assert [reply.finish == "refused" for reply in replies] == guard.flags(PROMPTS).tolist() and len({reply.finish for reply in replies}) > 1
    chat = [{"role": message.role, "content": message.content} for message in PROMPTS[-1].messages]
    assert abs(guard.score_chat(chat)[-1].probability - replies[-1].probability) < 1e-5
    with pytest.raises(InputError, match="terminal='mixed'"):
        backend.generate(PROMPTS, guard=replace(guard, terminal="period"))


def test_a_stream_closed_early_leaves_the_model_as_it_was(backend, rule):
    plain = backend.generate(PROMPTS, max_new_tokens=NEW)
    guarding = Guarding(rule, Refuse(), PROMPTS, Grid((Cell(),)), backend)
    stream = backend.guarded(Decoding(NEW), None, guarding)
    next(stream)
    stream.close()
    assert told(backend.generate(PROMPTS, max_new_tokens=NEW)) == told(plain)


def altered(rule, **changed):
    names = ("layers", "positions", "terminal", "thresholds", "probabilities")
    return SimpleNamespace(**{**{name: getattr(rule, name) for name in names}, **changed})


def test_bad_guards_and_controllers_are_one_sentence(backend, rule):
    v = direction_of(backend)
    assert isinstance(altered(rule), Watch)

    def told_of(guard=rule, controller=None, prompts=PROMPTS):
        with counted(backend, "forward", "states", "step") as calls, pytest.raises(InputError) as error:
            backend.generate(prompts, guard=guard, controller=controller, max_new_tokens=2)
        assert "\n" not in str(error.value) and not (calls["step"] or calls["states"])
        return str(error.value), calls["forward"]

    for words, settings in (
        ("terminal='mixed'", {"guard": altered(rule, terminal="period")}),
        ("it has fpr=0.05, recall=0.95", {"controller": Refuse(at="fpr=0.01")}),
        ("this guard has no such threshold", {"guard": altered(rule, thresholds={})}),
        ("give a LatentGuard", {"guard": "a path"}),
        ("Flag(…), Refuse(…) or Steer(…)", {"controller": "refuse"}),
        ("without a guard", {"guard": None, "controller": Flag()}),
        ("this model has layers 0 … 4", {"guard": altered(rule, layers=(2, 9))}),
        ("write mean(user)", {"guard": altered(rule, positions=("user",))}),
        ("make one on this model", {"controller": Steer(direction_of(make_tiny("llama")), layer=1)}),
        ("position post(99)", {"guard": altered(rule, positions=("post(99)",))}),
        ("that text is not in the instruction", {"controller": Steer(v, layer=1, positions='before("nowhere")')}),
        ("another model", {"guard": altered(rule, check=refuse_it)}),
    ):
        said, passes = told_of(**settings)
        assert words in said and not passes
    for words, made in (("which is no probability", float("nan")), ("which is no probability", 1.5), ("one for each", [0.5] * 99)):
        said, passes = told_of(altered(rule, probabilities=lambda states, made=made: np.array(made) if isinstance(made, list) else np.full(len(states), made)))
        assert words in said and passes, "found as soon as the first batch is judged"


def refuse_it(backend):
    raise InputError(f"{backend.name} is another model")

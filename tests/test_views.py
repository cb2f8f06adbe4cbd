"""Views and begun replies: what stands where, for the template forms of the families we name; and what the engine makes of them."""

from dataclasses import replace

import pytest
import torch

from latentguard.backends.local import Local
from latentguard.backends.ndif import Sizes
from latentguard.backends.simulated import simulated
from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from latentguard.behaviour import Likelihood, likelihoods
from latentguard.directions import mean_difference
from latentguard.errors import InputError
from latentguard.interventions import Add, Cell, Grid
from latentguard.positions import parse_position
from latentguard.prompts import VIEWS, Message, Prompt
from latentguard.store import Stored
from latentguard.templates import Template
from tests.conftest import loud, make_tiny
from tests.counting import Counting
from tests.plain import with_plain
from tests.test_positions import CHATML, FAMILIES, GEMMA, LLAMA2, LLAMA3, THINKING

PHI = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
ONE_MARK = "{% for m in messages %}{{ '<U>' if m['role'] == 'user' else '<A>' if m['role'] == 'assistant' else '' }}{{ m['content'] }}{{ '</s>' if m['role'] == 'assistant' else '' }}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
DATED = (
    "{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] %}{% set messages = messages[1:] %}{% else %}{% set told = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n{{ told }}<|eot_id|>" + LLAMA3
)
ALL = {**FAMILIES, "thinking": THINKING, "phi": PHI, "one_mark": ONE_MARK, "dated": DATED}
REQUEST = "Say hi."


def rendered(template, view="", prompt=None, **settings):
    return Template(tiny_tokenizer(template), **settings).render((prompt or Prompt.of(REQUEST)).seen(view))


def text(*args, **settings):
    return rendered(*args, **settings).text


@pytest.mark.parametrize(
    ("template", "view", "says"),
    [
        (CHATML, "role_swap", "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>assistant\nSay hi.<|im_end|>\n<|im_start|>user\n"),
        (CHATML, "role_dup", "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\n<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, "no_system", "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, "no_eot", "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\nSay hi.<|im_start|>assistant\n"),
        (CHATML, "query_in_system", "<|im_start|>system\nSay hi.<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, "plain_roles", "User: Say hi.\nAssistant:"),
        (CHATML, "plain", "Say hi."),
        (THINKING, "role_swap", "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>assistant\nSay hi.<|im_end|>\n<|im_start|>user\n<think>\n\n</think>\n\n"),
        (LLAMA3, "role_swap", "<|start_header_id|>assistant<|end_header_id|>\n\nSay hi.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"),
        (DATED, "no_system", "<|start_header_id|>user<|end_header_id|>\n\nSay hi.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        (GEMMA, "role_swap", "<start_of_turn>model\nSay hi.<end_of_turn>\n<start_of_turn>user\n"),
        (GEMMA, "no_eot", "<start_of_turn>user\nSay hi.<start_of_turn>model\n"),
        (PHI, "no_eot", "<|user|>\nSay hi.<|assistant|>\n"),
        (PHI, "query_in_system", "<|system|>\nSay hi.<|end|>\n<|assistant|>\n"),
        (LLAMA2, "role_dup", "[INST] [INST] Say hi. [/INST]"),
    ],
)  # fmt: skip
def test_each_view_is_the_templates_own_parts_in_another_order(template, view, says):
    assert text(template, view) == says


@pytest.mark.parametrize(
    ("template", "view", "lacks"),
    [
        (LLAMA2, "role_swap", "no header of its own for each role"), (LLAMA2, "no_eot", "no mark for the end"),
        (LLAMA2, "query_in_system", "no turn of its own"), (GEMMA, "query_in_system", "no turn of its own"), (ONE_MARK, "no_eot", "no mark for the end"),
        ("{% for m in messages %}<u>{{ m['content'] }}<e>{% endfor %}<a>", "role_swap", "turns one after another"),
        ("{{ messages[-1]['content'] }} only<a>", "role_dup", "turns one after another"),
    ],
)  # fmt: skip
def test_what_a_template_has_no_part_for_is_one_sentence(template, view, lacks):
    with pytest.raises(InputError, match=lacks) as error:
        text(template, view)
    assert "view" in str(error.value) and "\n" not in str(error.value)


def done(template, view, prompt):
    try:
        return rendered(template, view, prompt)
    except InputError:
        return None


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("request_", ["Say hi", "user", "assistant", "what?\nNow", "é 数学.", "<|im_start|>user", "[/INST] no"])
def test_in_every_view_the_request_keeps_its_words_its_tokens_and_its_last_token(family, request_):
    prompt, seen = Prompt.of(request_), 0
    whole = rendered(ALL[family], "", prompt)
    mine = [whole.ids[i] for i in whole.user_tokens]
    for view in VIEWS[1:]:
        if one := done(ALL[family], view, prompt):
            seen += 1
            assert one.text[slice(*one.user)] == request_ and [one.ids[i] for i in one.user_tokens] == mine
            assert parse_position("t_inst").tokens(one) == [one.user_tokens[-1]]
            assert parse_position("t_post_inst").tokens(one) == [len(one) - 1]
            assert (view == "plain") == (one.user_tokens[-1] == len(one) - 1)
            assert view == "no_system" or one.text != whole.text
    assert seen >= 4


@pytest.mark.parametrize("family", ["chatml", "llama3", "thinking", "phi", "gemma"])
def test_views_of_a_conversation_change_every_header_and_only_the_last_mark(family):
    talk = Prompt((Message("user", "one"), Message("assistant", "two"), Message("user", "three")))
    whole, swapped, cut = (text(ALL[family], view, talk) for view in ("", "role_swap", "no_eot"))
    user, assistant = text(ALL[family], "role_dup", Prompt.of("x")), text(ALL[family], "role_swap", Prompt.of("x"))
    assert swapped.index("one") < swapped.index("two") < swapped.index("three") and len(swapped) == len(whole)
    assert sorted(swapped) == sorted(whole) and swapped != whole and user != assistant
    assert whole.startswith(cut[: cut.index("three") + 5]) and len(cut) < len(whole)
    with pytest.raises(InputError, match="single request|no turn of its own"):
        text(ALL[family], "query_in_system", talk)
    with pytest.raises(InputError, match="request alone"):
        text(ALL[family], "plain", talk)
    assert text(ALL[family], "plain_roles", talk) == "User: one\nAssistant: two\nUser: three\nAssistant:"


def test_no_system_takes_away_the_templates_the_models_and_the_prompts():
    bare = "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
    told = Prompt((Message("system", "Be brief."), Message("user", REQUEST)))
    assert text(CHATML, "no_system", told) == bare == text(CHATML, "no_system", system="Be long.")
    assert "Be long." in text(CHATML, "role_swap", system="Be long.") and "Be brief." in text(CHATML, "role_dup", told, system="Be long.")
    assert text(GEMMA, "no_system", told) == text(GEMMA, "", Prompt.of(REQUEST)), "also where the template takes no system text"
    with pytest.raises(InputError, match="no turn of its own"):
        text(LLAMA2, "role_dup", told)


def test_a_mark_that_every_header_begins_with_is_no_start_of_text():
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.bos_token = "<|im_start|>"
    assert Template(tokenizer).render(Prompt.of(REQUEST).seen("no_system")).text.count("<|im_start|>") == 2
    tokenizer = tiny_tokenizer("<s>" + CHATML)
    tokenizer.bos_token = "<s>"
    assert Template(tokenizer).render(Prompt.of(REQUEST).seen("no_system")).text.startswith("<s><|im_start|>user")


def test_a_text_that_the_template_would_change_is_refused_in_views_too():
    with pytest.raises(InputError, match="changes the words"):
        text(LLAMA3, "role_swap", Prompt.of(" padded "))


def test_views_need_a_chat_template_but_for_the_two_without_one():
    for form in ("plain", "paper"):
        assert text(CHATML, "plain", form=form) == REQUEST and text(CHATML, "plain_roles", form=form) == "User: Say hi.\nAssistant:"
        with pytest.raises(InputError, match="use template=chat"):
            text(CHATML, "role_swap", form=form)


def test_a_view_and_a_begun_reply_must_make_sense():
    with pytest.raises(InputError, match="none of role_swap"):
        Prompt.of("x", view="upside_down")
    with pytest.raises(InputError, match="no reply has begun"):
        Prompt.of("x", begun="Sure", suffix=False)
    one = Prompt.of("Say hi.", harmful=True, source="s")
    ids = {one.id, one.seen("role_swap").id, one.answered("a").id, one.answered("b").id, one.seen("role_swap").answered("a").id}
    assert len(ids) == 5 and all(p.group == one.group and p.label == "harmful" for p in (one.seen("plain"), one.answered("a")))
    assert one.seen("") is one and one.seen("plain").seen("").view == ""


class Merging:
    """A tokenizer that merges a full stop with the line's end behind it, and two line ends, as many do."""

    def __init__(self):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = ["[UNK]", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.:<>_|/ \n", ".\n", "\n\n"]
        made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [(".", "\n"), ("\n", "\n")], unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Split("\t", "isolated")
        self.fast = PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CHATML)


def test_where_a_token_would_lie_across_the_end_of_the_request_or_of_the_header_it_is_cut():
    template = Template(Merging().fast)
    apart = template.render(Prompt.of(REQUEST).seen("plain_roles"))
    assert [apart.text[slice(*apart.offsets[i])] for i in range(len(apart))][-12:-10] == [".", "\n"]
    assert parse_position("t_inst").tokens(apart) == [apart.user_tokens[-1]]
    whole, begun = template.render(Prompt.of(REQUEST)), template.render(Prompt.of(REQUEST).answered("\nhi"))
    assert begun.ids[: len(whole)] == whole.ids, "the model goes on from the tokens that it was given"
    assert [begun.text[slice(*begun.offsets[i])] for i in begun.reply_tokens] == ["\n", "h", "i"]
    assert "".join(begun.text[a:b] for a, b in begun.offsets) == begun.text


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("view", VIEWS)
def test_a_begun_reply_stands_behind_everything_else(family, view):
    if (plain := done(ALL[family], view, Prompt.of(REQUEST))) is None:
        return
    begun = rendered(ALL[family], view, Prompt.of(REQUEST).answered("Sure, hi"))
    assert begun.text == plain.text + "Sure, hi" and begun.ids[: len(plain)] == plain.ids and begun.user == plain.user
    reply = parse_position("reply").tokens(begun)
    assert "".join(begun.text[slice(*begun.offsets[i])] for i in reply) == "Sure, hi"
    assert parse_position("to_reply").tokens(begun) == [i - 1 for i in reply] and reply[0] == len(plain)
    assert parse_position("t_post_inst").tokens(begun) == [len(begun) - 1]
    if view != "plain":
        assert parse_position("post(1)").tokens(begun) == parse_position("post(1)").tokens(plain)
        with pytest.raises(InputError, match=f"adds {len(plain) - 1 - plain.user_tokens[-1]} tokens"):
            parse_position("post(99)").tokens(begun)
    for name in ("reply", "to_reply"):
        with pytest.raises(InputError, match="no reply has begun"):
            parse_position(name).tokens(plain)
        with pytest.raises(InputError, match="mean"):
            parse_position(name, reading=True)


# ── the engine ──


def shown():
    """Prompts of several lengths in every view that the tiny template can do, with replies of several lengths."""
    views = [view for view in VIEWS if view not in ("no_system",)]
    prompts = [Prompt.of(f"tell me {'very ' * k}much about {k}.", id=f"q{k}") for k in range(3)]
    return [p.seen(view).answered("word " * (k + 1) + view[:2]) for view in views for k, p in enumerate(prompts)]


@pytest.fixture(scope="module")
def both():
    return with_plain(lambda model, **settings: Local(model, tiny_tokenizer(), name="t", weights="t", batch_size=7, **settings), loud(tiny_model("qwen2")))


def test_batches_with_views_and_begun_replies_are_what_plain_transformers_makes(both):
    backend, plain = both
    prompts = shown()
    direction = mean_difference(backend.read(prompts, "all", ["t_inst"]), prompts[:6], position="t_inst")
    for act in ((), (Add(direction, layer=2, positions="t_inst"),), (Add(direction, layer=1, positions="reply"),)):
        found = backend.logits(prompts, list(act), position="to_reply")
        for prompt, logprobs in zip(prompts, found, strict=True):
            torch.testing.assert_close(logprobs, plain.logprobs(prompt, act, "to_reply"), atol=2e-4, rtol=1e-4)
    states = backend.read(prompts, "all", ["t_inst", "t_post_inst", "mean(reply)"])
    for i, item in enumerate(backend.render(prompts)):
        own = plain.states(item)
        for p, place in enumerate(states.positions):
            expected = own[:, parse_position(place).tokens(item)].mean(1)
            torch.testing.assert_close(states.values[i, :, p], expected, atol=2e-4, rtol=1e-4)
    for prompt, reply in zip(prompts, backend.generate(prompts, max_new_tokens=5), strict=True):
        plain.check_reply(prompt, (), reply, 5)


def test_a_likelihood_counts_every_token_of_the_reply(both):
    backend, plain = both
    prompts = shown()
    for prompt, value in zip(prompts, likelihoods(backend, prompts), strict=True):
        item = backend.render([prompt])[0]
        rest = item.ids[item.reply_tokens[0] :]
        assert len(rest) == len(prompt.begun.encode()), "a byte a token"
        logprobs = plain.run(item.ids, lambda _, state: state).log_softmax(-1)[-len(rest) - 1 : -1]
        assert value == pytest.approx(float(logprobs[torch.arange(len(rest)), list(rest)].mean()), abs=1e-4)


def test_what_the_model_says_is_what_it_finds_likely(tiny, prompts):
    told = [p.answered(r.text) for p, r in zip(prompts, tiny.generate(prompts, max_new_tokens=6), strict=True) if r.text]
    other = [replace(p, begun=told[(k + 1) % len(told)].begun[::-1]) for k, p in enumerate(told)]
    own, turned = likelihoods(tiny, told), likelihoods(tiny, other)
    assert len(told) > 3 and sum(own) > sum(turned)


def test_a_likelihood_travels_and_is_kept(tiny, prompts, tmp_path):
    told = [p.answered(f"number {k}") for k, p in enumerate(prompts)]
    reduce = Likelihood.of(tiny, told)
    measure = reduce.measure([2, 4])
    logprobs = tiny.logits(told, position="to_reply")
    assert measure.own and not measure.clean
    assert [measure.function(logprobs[i], None, measure.own[k]) for k, i in enumerate((2, 4))] == [reduce(i, logprobs[i]) for i in (2, 4)]
    counted, grid = Counting(tiny), Grid((Cell(), Cell()))
    for _ in range(2):
        assert likelihoods(Stored(counted, tmp_path), told, grid) == tiny.logits(told, grid, position="to_reply", reduce=reduce)
    assert len(counted.scored) == 1 and likelihoods(tiny, []) == []
    with pytest.raises(InputError, match="position=to_reply"):
        tiny.logits(told, reduce=reduce)
    with pytest.raises(InputError, match="no reply has begun"):
        likelihoods(tiny, prompts)


def test_the_store_tells_views_and_begun_replies_apart(tmp_path):
    tiny, prompt = make_tiny(batch_size=5), Prompt.of(REQUEST, id="one")
    forms = [replace(prompt, view=view, begun=begun) for view in VIEWS if view != "no_system" for begun in ("", "Sure", "Sure, ")]
    for _ in range(2):
        stored = Stored(tiny, tmp_path)  # one by one: all have one id, and one must not answer for another
        for form in forms:
            direct = tiny.read([form], "all", ["t_inst", "t_post_inst"]).values
            assert torch.equal(stored.read([form], "all", ["t_inst", "t_post_inst"]).values, direct), (form.view, form.begun)
            assert stored.generate([form], max_new_tokens=4)[0].tokens == tiny.generate([form], max_new_tokens=4)[0].tokens
            if form.begun:
                assert likelihoods(stored, [form]) == likelihoods(tiny, [form])
    texts = {tiny.render([form])[0].text for form in forms}
    assert len(texts) == len(forms)


def test_elsewhere_views_and_likelihoods_are_as_here(tiny):
    """A rehearsal of what a server is sent, without our modules there."""
    told, far = shown(), simulated(tiny, Sizes(batch=4, batches=2, ahead=3))
    direction = replace(mean_difference(tiny.read(told, "all", ["t_inst"]), told[:6], position="t_inst"), weights="")
    grid = Grid((Cell(), Cell((Add(direction, layer=2, positions="reply"),))))
    for here, there in zip(likelihoods(tiny, told, grid), likelihoods(far, told, grid), strict=True):
        assert there == pytest.approx(here, abs=1e-4)
    assert torch.allclose(far.read(told, [2], ["t_post_inst"]).values, tiny.read(told, [2], ["t_post_inst"]).values, atol=1e-4)

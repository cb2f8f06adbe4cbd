"""Places in rendered prompts, for the template forms of the families we name."""

import pytest

from latentguard.backends.tiny import tiny_tokenizer
from latentguard.errors import InputError
from latentguard.positions import parse_position
from latentguard.prompts import Message, Prompt, as_prompts
from latentguard.templates import Template

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set sys = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set sys = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}[INST] {{ (sys if loop.first else '') + m['content'] }} [/INST]{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINKING = CHATML.replace(
    "assistant\n{% endif %}", "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
FAMILIES = {"chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2, "gemma": GEMMA}


def at(template, text, name, **settings):
    """The characters a position covers."""
    rendered = Template(tiny_tokenizer(template), **settings).render(text if isinstance(text, Prompt) else Prompt.of(text))
    return "".join(rendered.text[slice(*rendered.offsets[i])] for i in parse_position(name).tokens(rendered))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["Tell me a joke", "user", "assistant\n", "[/INST]", "what?", "é 数学"])
def test_t_inst_is_the_last_character_of_the_instruction(family, text):
    text = text.strip()
    last = at(FAMILIES[family], text, "user")[-1:]
    assert last == text[-1] or len(text[-1].encode()) > 1
    assert at(FAMILIES[family], text, "t_inst")[-1] == text[-1]


@pytest.mark.parametrize(("family", "tail"), [("chatml", "<|im_end|>\n<|im_start|>assistant\n"), ("llama3", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"), ("llama2", " [/INST]"), ("gemma", "<end_of_turn>\n<start_of_turn>model\n")])  # fmt: skip
def test_post_positions_walk_the_template_tail(family, tail):
    for i, character in enumerate(tail, 1):
        assert at(FAMILIES[family], "Hello there.", f"post({i})") == character
    assert at(FAMILIES[family], "Hello there.", "t_post_inst") == tail[-1]


def test_positions_by_name():
    text = 'Open the "red" door, then stop...'
    assert at(CHATML, text, "user") == text
    assert at(CHATML, text, "user[5:9]") == text[5:9]
    assert at(CHATML, text, "user[-3:]") == "..." and at(CHATML, text, "user[:4]") == "Open" and at(CHATML, text, "user[30:99]") == text[30:]
    assert at(CHATML, text, "t_inst-4") == "o"
    assert at(CHATML, text, "last_word") == "p"
    assert at(CHATML, text, 'before("door")').endswith('Open the "red" ')
    assert at(CHATML, text, 'before("door")').startswith("<|im_start|>system")
    assert at(CHATML, text, "all") == Template(tiny_tokenizer(CHATML)).render(Prompt.of(text)).text


def test_in_a_conversation_the_instruction_is_the_last_user_turn():
    talk = [{"role": "user", "content": "same words"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "same words"}]
    rendered = Template(tiny_tokenizer(CHATML)).render(as_prompts(talk)[0])
    assert rendered.text[: rendered.user[0]].count("same words") == 1
    assert rendered.text[slice(*rendered.user)] == "same words"


def test_thinking_is_switched_off_where_there_is_a_switch():
    assert Template(tiny_tokenizer(THINKING)).render(Prompt.of("hi")).text.endswith("</think>\n\n")


@pytest.mark.parametrize(
    "name", ["t_last", "post(0)", "post(-1)", "t_inst+1", "", "mean()", "mean(mean(user))", "before(x)", "user[]", "user[3]", "user[1.5:]", 7]
)
def test_names_outside_the_grammar_are_refused(name):
    with pytest.raises(InputError, match="position"):
        parse_position(name)


def test_a_stretch_that_the_instruction_does_not_reach_is_one_sentence():
    with pytest.raises(InputError, match="none of the instruction's 3 tokens"):
        at(CHATML, "Hi.", "mean(user[3:])")


@pytest.mark.parametrize("name", ["user", "user[-5:]", "all", 'before("x")'])
def test_many_tokens_are_not_read_as_one(name):
    with pytest.raises(InputError, match="mean"):
        parse_position(name, reading=True)
    parse_position(f"mean({name})", reading=True)


@pytest.mark.parametrize(
    ("template", "text", "name", "says"),
    [
        (LLAMA3, " padded ", "t_inst", "strips or changes"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"), "loud", "t_inst", "no place|changes"),
        ("nothing of yours", "hello", "t_inst", "no place"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] }} {{ m['content'] }}"), "twice", "t_inst", "repeats"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "bare", "t_post_inst", "adds nothing after"),
        (CHATML, "short", "t_inst-9", "only 5 tokens"),
        (CHATML, "short", "post(99)", "adds 33 tokens"),
        (CHATML, "short", 'before("tall")', "not in the instruction"),
        (CHATML, "?!", "last_word", "no letter or digit"),
    ],
)
def test_what_a_template_or_prompt_has_no_place_for_is_said(template, text, name, says):
    with pytest.raises(InputError, match=says):
        at(template, text, name)


def test_a_short_dropped_system_text_is_noticed():
    dropping = "{% for m in messages if m['role'] != 'system' %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<a>"
    with pytest.raises(InputError, match="drops or changes the system"):
        at(dropping, "hello", "t_inst", system="user")


def test_a_blank_without_offsets_is_still_the_instructions():
    from latentguard.positions import Rendered

    trimmed = Rendered("<u>a b <e>", (0, 1, 2, 3, 4), ((0, 3), (3, 4), (5, 6), (7, 7), (7, 10)), (3, 7))
    assert trimmed.user_tokens == [1, 2, 3]


def test_a_template_that_drops_or_refuses_a_system_text_is_said():
    dropping = "{% for m in messages if m['role'] != 'system' %}<u>{{ m['content'] }}</u>{% endfor %}<a>"
    for template, says in ((dropping, "drops or changes the system message"), (GEMMA, "System role not supported")):
        with pytest.raises(InputError, match=says):
            at(template, "hello", "t_inst", system="Be kind.")
    assert "Be kind." in Template(tiny_tokenizer(LLAMA2), system="Be kind.").render(Prompt.of("hello")).text


def test_merged_tokens_at_the_end_have_no_t_inst():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "hello.<end>": 1, "say": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="{% for m in messages %}{{ m['content'] }}<end> ok{% endfor %}")
    rendered = Template(fast).render(Prompt.of("say hello."))
    with pytest.raises(InputError, match="merges"):
        parse_position("t_inst").tokens(rendered)
    assert parse_position("last_word").tokens(rendered) == [1]


def test_paper_forms_have_no_system_text():
    for template, text in ((CHATML, "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant"), (LLAMA2, "[INST]Hi.[/INST]")):
        assert Template(tiny_tokenizer(template), "paper").render(Prompt.of("Hi.")).text == text
    with pytest.raises(InputError, match="forms for"):
        Template(tiny_tokenizer(GEMMA), "paper").render(Prompt.of("Hi."))
    with pytest.raises(InputError, match="single user message"):
        Template(tiny_tokenizer(CHATML), "paper").render(Prompt((Message("system", "s"), Message("user", "u"))))


def test_a_base_model_without_template_says_what_to_do():
    with pytest.raises(InputError, match="template=plain"):
        Template(tiny_tokenizer(""))
    assert Template(tiny_tokenizer(""), "plain").render(Prompt.of("Once upon")).text == "Once upon"


ASKED = 'User wants to open the "red" door.\nIs it harmful? Say "Yes" or "No".'
QUESTION = 'Is it harmful? Say "Yes" or "No".'


def test_between_is_the_text_between():
    assert at(CHATML, ASKED, f"between('User wants to ', '{QUESTION}')") == 'open the "red" door.\n'
    assert at(CHATML, ASKED, f"between('User wants to','{QUESTION}')") == ' open the "red" door.\n', "blanks around the comma do not matter"
    assert at(CHATML, ASKED, "between(\"User\", 'wants')") == " "
    assert at(CHATML, "a, b, c, d", "between('a, ', ', d')") == "b, c", "a comma in a text divides nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_between_looks_into_the_instruction_only(family):
    """The template's own words and an earlier turn's are no boundary."""
    assert at(FAMILIES[family], "go from user to user now", "between('from', 'now')") == " user to user "
    with pytest.raises(InputError, match="in this order"):
        at(FAMILIES[family], "hello there", "between('hello', 'assistant')")
    talk = [{"role": "user", "content": "A one Z"}, {"role": "assistant", "content": "A two Z"}, {"role": "user", "content": "A three Z"}]
    assert at(FAMILIES[family], as_prompts(talk)[0], "between('A', 'Z')") == " three "


def test_between_spans_from_the_first_to_the_last():
    assert at(CHATML, "A b A c Z d Z", "between('A', 'Z')") == " b A c Z d "


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("between('door', 'open')", "in this order"),
        ("between('open', 'window')", "in this order"),
        ("between('window', 'open')", "in this order"),
        ("between('open', 'pen')", "in this order"),
        ("between('open ', 'the')", "no token lies wholly"),
    ],
)
def test_texts_that_do_not_stand_in_order_are_said(name, says):
    with pytest.raises(InputError, match=says):
        at(CHATML, "open the door", name)


@pytest.mark.parametrize("name", ["between('a')", "between(a, b)", "between('a' 'b')", "between('', 'b')", "between('a', '')", "between('a', 'b'"])
def test_between_needs_two_texts(name):
    with pytest.raises(InputError, match="give one of"):
        parse_position(name)


def test_between_is_many_tokens():
    with pytest.raises(InputError, match="mean"):
        parse_position("between('a', 'b')", reading=True)
    assert parse_position("mean(between('a', 'b'))", reading=True).mean


def test_a_token_across_a_boundary_is_not_between():
    from latentguard.positions import Rendered

    joined = Rendered("<u>say the word</u>", (0, 1, 2, 3, 4), ((0, 3), (3, 6), (6, 10), (10, 15), (15, 19)), (3, 15))
    assert parse_position("between('say', 'word')").tokens(joined) == [2], "the blank of ' word' lies before the text 'word'"
    with pytest.raises(InputError, match="no token lies wholly"):
        parse_position("between('say ', 'word')").tokens(joined)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_without_its_suffix_ends_with_the_instruction(family):
    text = "Tell me more."
    whole, cut = (Template(tiny_tokenizer(FAMILIES[family])).render(Prompt.of(text, suffix=suffix)) for suffix in (True, False))
    assert cut.text.endswith(text) and whole.text.startswith(cut.text) and len(whole) > len(cut)
    assert cut.ids == whole.ids[: len(cut)] and (cut.user, cut.user_tokens) == (whole.user, whole.user_tokens)
    for name in ("t_inst", "t_inst-2", "last_word", "user", "before('more')"):
        assert parse_position(name).tokens(cut) == parse_position(name).tokens(whole)
    for name in ("t_post_inst", "post(1)"):
        with pytest.raises(InputError, match="adds nothing after"):
            parse_position(name).tokens(cut)

"""A real model: Qwen2.5-Coder-0.5B out of a package index (docs/models.md), and the README's ten lines."""

import re

import pytest
import torch

import latentguard as lg
from latentguard.interventions import Cell, Grid
from latentguard.judges import Phrases
from latentguard.metrics import rate
from tests.conftest import REPO
from tests.test_local import plain_states

pytestmark = pytest.mark.real
NAME = "qwen2_5_coder_0_5b_q4"


@pytest.fixture(scope="module")
def qwen():
    return lg.load(NAME, dtype="float32")


@pytest.fixture(scope="module")
def data():
    return lg.load_dataset("builtin")


@pytest.fixture(scope="module")
def direction(qwen, data):
    train = [*list(data.train.harmful)[:40], *list(data.train.harmless)[:40]]
    return lg.mean_difference(qwen.read(train, "all", ["t_inst"]), train[:40], train[40:], position="t_inst")


def test_read_equals_plain_transformers(qwen):
    """1e-4 in the scale of each state: Qwen's states reach hundreds, and float32 holds seven digits."""
    texts = ["Hi.", "Explain how a suspension bridge carries its load, in plain words and two sentences.", "Name three rivers."]
    states = qwen.read(texts, "all", ["t_inst", "t_post_inst"])
    for row, rendered in enumerate(qwen.render(texts)):
        plain = plain_states(qwen, rendered)
        for position, token in enumerate((rendered.user_tokens[-1], -1)):
            torch.testing.assert_close(states.values[row, :, position], plain[:, token], atol=1e-4, rtol=1e-4)


def test_positions_of_the_real_template(qwen):
    rendered = qwen.render(["Name three rivers."])[0]
    assert rendered.text.endswith("Name three rivers.<|im_end|>\n<|im_start|>assistant\n")
    assert (
        list(rendered.ids) == qwen.tokenizer.apply_chat_template([{"role": "user", "content": "Name three rivers."}], add_generation_prompt=True)["input_ids"]
    )
    tail = [rendered.text[slice(*rendered.offsets[i])] for i in range(rendered.user_tokens[-1], len(rendered))]
    assert tail == [".", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]


def test_a_grid_of_mixed_prompts_equals_single_generation(qwen, data, direction):
    prompts = [*list(data.test.harmless)[:3], lg.Prompt.of("Hi there.")]
    grid = Grid((Cell(), Cell((lg.Add(direction, layer=12, coef=1.0),)), Cell((lg.Add(direction, layer=9, coef=1.0, when="every_step"),))))
    together = qwen.generate(prompts, grid, max_new_tokens=6)
    qwen.reuse = False
    alone = [[qwen.generate([p], list(cell.interventions), max_new_tokens=6)[0].tokens for p in prompts] for cell in grid]
    qwen.reuse = True
    assert [[r.tokens for r in said] for said in together] == alone


def test_the_harmfulness_direction_makes_it_refuse_and_random_ones_do_not(qwen, data, direction):
    prompts, judge = list(data.test.harmless)[::4], Phrases()
    cells = [Cell(), Cell((lg.Add(direction, layer=12, coef=2.0),)), *(Cell((lg.Add(lg.random_like(direction, s), layer=12, coef=2.0),)) for s in range(3))]
    said = qwen.generate(prompts, Grid(tuple(cells)), max_new_tokens=10)
    base, steered, *random = [rate([judge.verdict(r.text).label == "refused" for r in replies]) for replies in said]
    assert steered.rate >= base.rate + 0.3
    assert steered.low > max(r.rate for r in random)


def test_it_refuses_some_harmful_requests_and_answers_harmless_ones(qwen, data):
    judge = Phrases()
    for prompts, low, high in ((data.test.harmful, 0.25, 0.95), (data.test.harmless, 0.0, 0.2)):
        said = qwen.generate(list(prompts)[::3], max_new_tokens=10)
        assert low <= rate([judge.verdict(r.text).label == "refused" for r in said]).rate <= high


def test_the_ten_lines_of_the_readme():
    code = re.search(r"```python\n(import latentguard as lg\n.*?)```", (REPO / "README.md").read_text(), re.DOTALL).group(1)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 10
    small = (
        code.replace('lg.load("qwen2_5_coder_0_5b")', f'lg.load("{NAME}")').replace("data.test,", "data.test[:4],").replace("data.train,", "data.train[:24],")
    )
    assert small.count(NAME) == 1 and "data.test[:4]" in small and "data.train[:24]" in small
    small = small.replace("data.train.harmful", "data.train[:24].harmful").replace("data.train.harmless", "data.train[:24].harmless")
    names = {}
    exec(compile(small, "README.md", "exec"), names)  # noqa: S102
    assert len(names["replies"]) == 4 and all(reply.text for reply in names["replies"])
    assert names["direction"].layers == tuple(range(25))

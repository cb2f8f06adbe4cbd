"""The work that all contestants do: harmless prompts of mixed lengths, a direction, a grid. Times nothing."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from latentguard.backends import Backend
from latentguard.datasets import load_dataset
from latentguard.directions import Direction, mean_difference
from latentguard.interventions import Grid, steering_grid
from latentguard.positions import Rendered
from latentguard.prompts import Prompt

DEPTHS = tuple(layer / 30 for layer in (4, 8, 12, 16, 20, 24))
COEFS = (0.5, 1.0, 1.5, 2.0)
SEED = 0
_TASKS = (
    "Explain step by step how to plan", "Write a long story about", "Describe in detail the history of", "Give a beginner's guide to",
    "Write a detailed essay about", "Compare at length two ways to teach", "Draft a long letter to a friend about", "List and explain ten facts about",
)  # fmt: skip
_TOPICS = (
    "a vegetable garden", "a village library", "the tides of the sea", "growing sunflowers", "a school orchestra", "old railway stations",
    "baking sourdough bread", "watching birds in winter", "mountain weather", "a chess club", "wooden boats", "the night sky",
    "a family picnic", "making paper", "bees and their hives", "a museum of clocks", "public parks", "learning to swim",
)  # fmt: skip
_MORE = (
    "Keep the tone friendly and use plain words that a child would know.", "Mention the season, the weather and what people wear on the day.",
    "Begin with a short summary, then go on to the parts one after another.", "Add an example from daily life wherever one helps the reader along.",
    "The text is for a local newspaper and will be read by people of every age.", "Say at the end what somebody could try at home next weekend.",
)  # fmt: skip


def requests(count: int, seed: int = SEED, more: int = 4) -> Iterator[Prompt]:
    """`count` different harmless requests, each with 0 to `more` further sentences."""
    draw = random.Random(seed)
    for number in range(1, count + 1):
        extra = draw.sample(_MORE, draw.randint(0, more))
        text = " ".join([f"{draw.choice(_TASKS)} {draw.choice(_TOPICS)} for reader {number}.", *extra])
        yield Prompt.of(text, harmful=False, id=f"bench-{seed}-{number}")


def harmless(count: int, seed: int = SEED, more: int = 4) -> list[Prompt]:
    """`requests` as a list."""
    return list(requests(count, seed, more))


def middle(n_layers: int) -> int:
    """The layer of `read_one` and `generate`: 12 in models of 24 layers and more."""
    return 12 if n_layers >= 24 else max(1, n_layers // 2)


def grid_layers(n_layers: int) -> list[int]:
    """Layers 4, 8, …, 24 of 30, and the same shares of other depths."""
    return sorted({min(max(1, round(depth * n_layers)), n_layers - 1) for depth in DEPTHS})


def harm_direction(backend: Backend, each: int = 24) -> Direction:
    """Mean difference at t_inst between the first harmful and harmless training prompts of the built-in set."""
    train = load_dataset("builtin").train
    harmful, plain = train.harmful[:each], train.harmless[:each]
    return mean_difference(backend.read([*harmful, *plain], "all", ["t_inst"]), harmful, plain, position="t_inst", name="harm")


@dataclass(frozen=True)
class Work:
    """What is done: prompts to read, prompts to answer, the grid, and how many tokens a reply has at most."""

    reading: list[Prompt]
    answering: list[Prompt]
    direction: Direction
    layer: int
    layers: Sequence[int]
    coefs: Sequence[float]
    tokens: int

    @property
    def grid(self) -> Grid:
        """Steering of all prompt tokens during prefill, as in the paper."""
        return steering_grid(self.direction, self.layers, self.coefs)

    @property
    def cells(self) -> list[tuple[int, float]]:
        """(layer, coefficient) of the grid's cells, in its order."""
        return [(layer, coef) for layer in self.layers for coef in self.coefs]

    @property
    def swept(self) -> list[tuple[int, float]]:
        """Four cells (two where there is one layer), for the row that peers can do: steered at every step."""
        return [(layer, coef) for layer in sorted({self.layers[len(self.layers) // 3], self.layers[2 * len(self.layers) // 3]}) for coef in self.coefs[:2]]


def spread(rendered: Sequence[Rendered]) -> str:
    """Token counts as 'shortest–longest'."""
    lengths = [len(item) for item in rendered]
    return f"{min(lengths)}–{max(lengths)}"

"""A model whose truth is written down, and prompts to ask it: what a study must find is known before it runs. Knows no study."""

import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

from latentguard.backends import Backend, Decoding, Reply
from latentguard.datasets import Dataset, PromptSet
from latentguard.directions import Activations
from latentguard.layers import resolve_layers
from latentguard.positions import Rendered, parse_position
from latentguard.prompts import Prompt, as_prompts

AXES = ("common", "harm", "refusal", "mark", "foreign", "own0", "own1", "own2", "own3")
WIDTH, DEPTH = 24, 8
A = 0.6  # how far harm and refusal lie from 0 along their axes
OTHER, SORRY, SURE, CERTAINLY, NO = range(5)
REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Sure, here is a short answer."
Amounts = Mapping[str, float]


def number(prompt: Prompt) -> int:
    """The digits at the end of an id: a prompt's place among its like."""
    return int(re.findall(r"\d+", prompt.id.split("~")[0])[-1])


def refuses_some(harmful: int = 6, lookalike: int = 8, harmless: int = 1) -> Callable[[Prompt], bool]:
    """Refuses so many in ten of each label, by number."""
    tenths = {"harmful": harmful, "lookalike": lookalike, "harmless": harmless, "unlabelled": 0}
    return lambda prompt: number(prompt) % 10 < tenths[prompt.label]


def never(_: Prompt) -> bool:
    """Refuses nothing."""
    return False


def by_label(prompt: Prompt) -> Amounts:
    """Harm along its axis at t_inst, whatever the model does."""
    return {"harm": A if prompt.harmful else -A}


@cache
def drawn(seed: int) -> np.ndarray:
    """Noise for every layer of one token."""
    return np.random.default_rng(seed).normal(size=(DEPTH + 1, WIDTH))


@dataclass
class Planted(Backend):
    """States are `common` + what `inst` and `post` say of the prompt (from layer 1 on) + noise; layer 0 is the token alone.

    `asks` is the axis that the answer about a request depends on, read at layer `acts_at` on the request's tokens; None answers
    neither Certainly nor No. `tail` is the weight with which refusal, added at the template's last token, counts as well.
    """

    refuses: Callable[[Prompt], bool] = field(default_factory=refuses_some)
    inst: Callable[[Prompt], Amounts] = by_label
    post: Callable[[Prompt], Amounts] | None = None
    asks: str | None = "harm"
    tail: float = 0.0
    acts_at: int = 4
    noise: float = 0.1
    carries: tuple[int, ...] = tuple(range(1, DEPTH + 1))
    asked: list[str] = field(default_factory=list)
    name: str = "planted"
    weights: str = "planted"
    n_layers: int = DEPTH
    d_model: int = WIDTH

    def key(self):
        return {"planted": self.name}

    def first_token(self, text):
        word = text.strip().lower()
        return {"certainly": CERTAINLY, "no": NO}.get(word, SORRY if word.startswith(("i", "sorry")) else OTHER)

    def render(self, prompts):
        return [self._rendered(prompt) for prompt in as_prompts(prompts)]

    def _rendered(self, prompt):
        """Tokens as byte-level BPE cuts them, a word with the blank before it; two tokens stand behind the instruction."""
        text = "<u>" + prompt.instruction + ("<e><a>" if prompt.suffix else "")
        spans = [(0, 3)] + [(3 + m.start(), 3 + m.end()) for m in re.finditer(r" ?\w+|\s|[^\w\s]", prompt.instruction)]
        spans += [(len(text) - 6, len(text) - 3), (len(text) - 3, len(text))] if prompt.suffix else []
        ids = tuple(zlib.crc32(text[a:b].encode()) for a, b in spans)
        return Rendered(text, ids, tuple(spans), (3, 3 + len(prompt.instruction)), prompt.id)

    def _axes(self, prompt, rendered, token):
        if token == rendered.user_tokens[-1]:
            return self.inst(prompt)
        if token == len(rendered) - 1:
            return self.post(prompt) if self.post else {"refusal": A if self.refuses(prompt) else -A}
        return {}

    def _states(self, prompt, rendered, token):
        """[layer, d_model] at one token."""
        states = drawn(zlib.crc32(f"{prompt.id} {token}".encode())) * self.noise
        states[0] = drawn(rendered.ids[token])[0] * 0.3
        states[:, 0] += 2.0
        for name, amount in self._axes(prompt, rendered, token).items():
            states[list(self.carries), AXES.index(name)] += amount
        return states

    def read(self, prompts, layers="all", positions=("t_inst",)):
        listed, wanted = as_prompts(prompts), resolve_layers(layers, DEPTH)
        places = [parse_position(position, reading=True) for position in positions]
        values = np.zeros((len(listed), len(wanted), len(places), WIDTH))
        for i, (prompt, rendered) in enumerate(zip(listed, self.render(listed), strict=True)):
            for p, place in enumerate(places):
                values[i, :, p] = np.mean([self._states(prompt, rendered, token) for token in place.tokens(rendered)], 0)[list(wanted)]
        return Activations(torch.tensor(values).float(), tuple(listed), wanted, tuple(p.name for p in places), self.name, self.weights, DEPTH)

    def _pushed(self, prompt, rendered, acts):
        """Where the request lies along the asked axis, with what steering adds at the layer that acts."""
        level = A if prompt.harmful else -A
        request = range(rendered.user_tokens[0], rendered.user_tokens[-1])
        for act in acts:
            if self.acts_at in act.layers(DEPTH):
                tokens, vector = parse_position(act.positions).tokens(rendered), act.vector(self.acts_at, prompt)
                level += act.amount * float(vector[AXES.index(self.asks)]) * bool(set(tokens) & set(request))
                level += act.amount * float(vector[AXES.index("refusal")]) * self.tail * (len(rendered) - 1 in tokens)
        return level

    def _chance(self, prompt, rendered, acts):
        """P of each token that may open a reply."""
        chance = np.full(5, 1e-4)
        if self.asks is None:
            chance[OTHER] = 1
        else:
            chance[CERTAINLY] = 1 / (1 + np.exp(-8 * self._pushed(prompt, rendered, acts)))
            chance[NO] = 1 - chance[CERTAINLY]
        return chance / chance.sum()

    def logits(self, prompts, interventions=(), *, position="t_post_inst", reduce=None):
        listed, out = as_prompts(prompts), []
        rendered = self.render(listed)
        for acts in [cell.interventions for cell in interventions] if len(list(interventions)) else [()]:
            found = [torch.tensor(np.log(self._chance(p, r, acts)))[None].float() for p, r in zip(listed, rendered, strict=True)]
            out.append([reduce(i, one) if reduce else one for i, one in enumerate(found)])
        return out if len(list(interventions)) else out[0]

    def stream(self, prompts, grid, decoding, decided=None):
        assert isinstance(decoding, Decoding)
        for c, cell in enumerate(grid):
            for i, (prompt, rendered) in enumerate(zip(prompts, self.render(prompts), strict=True)):
                self.asked.append(prompt.id)
                yield c, i, self._reply(prompt, rendered, cell.interventions)

    def _reply(self, prompt, rendered, acts):
        if prompt.instruction.startswith("User wants to "):
            at = int(self._chance(prompt, rendered, acts).argmax())
            return Reply(prompt, {CERTAINLY: "Certainly.", NO: "No."}.get(at, "The weather is fine today."), (at,), "eos")
        refused = self.refuses(prompt)
        return Reply(prompt, REFUSAL if refused else ANSWER, (SORRY if refused else SURE,), "eos")


SPLIT_OF_DECADE = ("train", "train", "validation", "test", "test")


def rows_of(label: str, n: int, source: str = "", **more: object) -> list[dict]:
    """n rows of one label; each ten of them lie in one split, so every split holds every last digit."""
    words = {"harmful": "Break", "harmless": "Bake", "lookalike": "Kill"}[label]
    return [
        {
            "id": f"{source}{label}-{k:03d}",
            "prompt": f"{words} the {('door', 'cake', 'boat', 'lamp')[k % 4]} of house {source}{k}.",
            "label": label,
            "split": SPLIT_OF_DECADE[k // 10 % 5],
            "group": f"{source}twin{k}" if label != "lookalike" else f"{source}look{k}",
            **more,
        }
        for k in range(n)
    ]


def prompt_of(row: Mapping, source: str = "hand") -> Prompt:
    """A row as a prompt."""
    known = {"harmful": row["label"] == "harmful", "lookalike": row["label"] == "lookalike", "category": row.get("category", "")}
    return Prompt.of(row["prompt"], id=row["id"], group=row["group"], source=row.get("source", source), terminal="period", **known)


def dataset_of(rows: Iterable[Mapping], name: str = "hand") -> Dataset:
    """Rows with a stated split as a data set made by hand."""
    rows = list(rows)
    parts = [PromptSet(tuple(prompt_of(row) for row in rows if row["split"] == split)) for split in ("train", "validation", "test")]
    return Dataset(name, *parts, card={"terminal": "period"})


def write(path, rows) -> str:
    """Rows as a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def everything() -> list[dict]:
    """Enough rows for every role: 150 harmful ones from two sources with their harmless twins, and 100 look-alikes."""
    harmful = [{**row, "source": ("north", "south")[k % 3 == 0]} for k, row in enumerate(rows_of("harmful", 150))]
    return [*harmful, *rows_of("harmless", 150), *rows_of("lookalike", 100)]

"""Replies as a page's script reads them: in columns, every text once. Knows no HTML."""

import gzip
from collections.abc import Mapping
from typing import Any

from latentguard.pages.blocks import Replies
from latentguard.pages.texts import MOST, brief, cut, shown

_ROOM = 1_500_000  # bytes of gzipped texts a page can bear
_SHORTER = (MOST, 1000, 500, 250)  # where they are more, texts are cut further
HARMLESS = ("harmless", "lookalike")  # all other labels are folded


class _Words:
    """Texts in the order they came, each once."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def add(self, text: str | None) -> int:
        """Its number; -1 for what is not there."""
        return -1 if text is None else self.known.setdefault(text, len(self.known))


def columns_of(block: Replies, marks: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Prompts, conditions and what was said in columns; `texts` are made visible and cut, `missing` tells by how many characters."""
    words, verdicts = _Words(), _Words()
    prompts = {
        "id": [brief(prompt.get("id", index), 80) for index, prompt in enumerate(block.prompts)],
        "text": [words.add(str(prompt.get("prompt", ""))) for prompt in block.prompts],
        **{key: [brief(prompt.get(key) or "", 80) for prompt in block.prompts] for key in ("label", "category", "source")},
    }
    said = {
        "prompt": [prompt for prompt, *_ in block.said],
        "condition": [condition for _, condition, *_ in block.said],
        "text": [words.add(reply) for _, _, reply, _, _ in block.said],
        "verdict": [verdicts.add(verdict) for _, _, _, verdict, _ in block.said],
        "score": [None if score is None else round(score, 3) for *_, score in block.said],
    }
    most, texts = _cut(list(words.known))
    return {
        "prompts": prompts,
        "conditions": [brief(condition, 120) for condition in block.conditions],
        "shown": list(dict.fromkeys(block.shown))[:4] or list(range(min(2, len(block.conditions)))),
        "harmless": HARMLESS,
        "said": said,
        "verdicts": [brief(verdict, 80) for verdict in verdicts.known],
        "marks": {brief(verdict, 80): marks[verdict] for verdict in verdicts.known if verdict in marks},
        "texts": [text for text, _ in texts],
        "missing": {str(index): missing for index, (_, missing) in enumerate(texts) if missing},
        "most": most,
    }


def _cut(texts: list[str]) -> tuple[int, list[tuple[str, int]]]:
    """Each text's start and how much is missing; the longest starts that a page can bear."""
    for most in _SHORTER:
        starts = [_start(text, most) for text in texts]
        if most == _SHORTER[-1] or len(gzip.compress("\n".join(start for start, _ in starts).encode("utf-8", "replace"), 6)) <= _ROOM:
            return most, starts
    raise AssertionError("unreachable")


def _start(text: str, most: int) -> tuple[str, int]:
    """The text is cut before it is made visible, so that a long one costs nothing and the count is of its own characters."""
    start, missing = cut(text, most)
    return shown(start).strip("\n"), missing

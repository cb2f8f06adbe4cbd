"""Long texts in pieces, and one probability out of theirs. Knows no state and no probe.

A guard is fitted on requests of a sentence or two. In the mean over 200 tokens of other text a request is lost (docs/studies/guard_robustness.md);
taken apart, each piece is text such as the guard knows.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from latentguard.errors import InputError
from latentguard.guards.marks import seen
from latentguard.prompts import Prompt
from latentguard.roles import find_places

if TYPE_CHECKING:
    from latentguard.backends import Backend

LEAST, MOST = 8, 4096  # tokens of a piece
_SENTENCE = 4  # pieces that one sentence may fill before it is cut: requests stay in one, those of many tokens a word too
_ENDS = re.compile(r"(?<=[.?!…])[\"'”’)\]]*\s+|(?<=[。？！।])\s*|\n+")
_CLOSE = 1e-9


def check_piece(piece: int | None) -> None:
    """Refuse a size that no piece can have.

    Raises:
        InputError: for a number of tokens outside `LEAST` to `MOST`.
    """
    if piece is not None and not LEAST <= piece <= MOST:
        raise InputError(f"piece={piece}: tokens of a piece, {LEAST} to {MOST}, or null to read every text whole")


def apart(
    backend: "Backend", prompts: Sequence[Prompt], size: int | None, terminal: str = "mixed", positions: Sequence[str] = ()
) -> tuple[list[Prompt], Int[np.ndarray, " piece"]]:
    """Prompts in pieces of their last user turn, and the row of the prompt that each piece is of.

    A text of at most twice `size` tokens stays whole. A piece holds as many sentences as have `size` tokens, or one that is longer, or some of a
    sentence that has more than four times as many; it begins within the last half of the one before where sentences allow, so that a
    request of two stands together in one. A text with a piece that has none of the positions stays whole, too.

    Args:
        terminal: how pieces end (marks.py).
        positions: where each piece is to be read.
    """
    found, rows = [], []
    long = [row for row, p in enumerate(prompts) if size and len(p.instruction.encode("utf-8", "surrogatepass")) > 2 * size]  # a token is a byte or more
    rendered = dict(zip(long, backend.render([prompts[row] for row in long]), strict=True)) if long else {}
    for row, prompt in enumerate(prompts):
        parts = [prompt]
        if row in rendered and size and len(rendered[row].user_tokens) > 2 * size:
            start, end = rendered[row].user
            text = rendered[row].text[start:end]
            starts = [max(0, rendered[row].offsets[i][0] - start) for i in rendered[row].user_tokens]
            cut = [text[a:b].strip() for a, b in spans(text, starts, size)]
            pieces = seen([prompt.with_instruction(words, id=f"{prompt.id}~{k}") for k, words in enumerate(cut) if words], terminal)
            parts = pieces if len(pieces) > 1 and _readable(backend, pieces, positions) else parts
        found += parts
        rows += [row] * len(parts)
    return found, np.array(rows, dtype=int)


def _readable(backend: "Backend", pieces: Sequence[Prompt], positions: Sequence[str]) -> bool:
    try:
        find_places(backend, pieces, positions)
    except InputError:
        return False
    return True


def spans(text: str, starts: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Where pieces of a text begin and end, in characters; `starts` are the characters at which its tokens begin, ascending."""

    def tokens(a: int, b: int) -> int:
        return bisect_left(starts, b) - bisect_left(starts, a)

    marks = [0, *(match.end() for match in _ENDS.finditer(text) if match.end() < len(text)), len(text)]
    units: list[tuple[int, int]] = []
    for start, b in pairwise(marks):
        a = start
        while tokens(a, b) > _SENTENCE * size or (a > start and tokens(a, b) > size):
            reach = starts[bisect_left(starts, a) + size]
            blank = max(text.rfind(" ", a + 1, reach), text.rfind("\n", a + 1, reach))
            at = blank + 1 if blank > a else reach
            at = at if tokens(a, at) else reach
            if at <= a:  # one character of many tokens
                break
            units.append((a, at))
            a = at
        units.append((a, b))
    units = _grown(units, tokens)
    counts = [tokens(a, b) for a, b in units]
    found, first = [], 0
    while True:
        last, held = first, counts[first]
        while last + 1 < len(units) and held + counts[last + 1] <= size:
            last += 1
            held += counts[last]
        found.append((units[first][0], units[last][1]))
        if last + 1 == len(units):
            return found
        again, shared = last + 1, 0
        while again - 1 > first and shared + counts[again - 1] <= min(size // 2, size - counts[last + 1]):
            again -= 1
            shared += counts[again]
        first = again


def _grown(units: Sequence[tuple[int, int]], tokens: Callable[[int, int], int]) -> list[tuple[int, int]]:
    """The same with every unit of fewer than `LEAST` tokens ("Step 1.", "Ok.", a rule of dashes) in one with the next, the last with the one before."""
    found: list[tuple[int, int]] = []
    for a, b in units:
        if found and tokens(*found[-1]) < LEAST:
            found[-1] = (found[-1][0], b)
        else:
            found.append((a, b))
    if len(found) > 1 and tokens(*found[-1]) < LEAST:
        _, end = found.pop()
        found[-1] = (found[-1][0], end)
    return found


def together(probabilities: Float[np.ndarray, " piece"], rows: Int[np.ndarray, " piece"]) -> Float[np.ndarray, " prompt"]:
    """P(harmful) of prompts out of their pieces': the odds that a harmful request stands in one of them, each as likely as the other to be the one.

    That is the mean of the pieces' odds: harmless text around a request lowers it by the number of pieces and no further, and a text does not
    grow suspicious by being long.
    """
    if not len(rows):
        return np.asarray(probabilities, float)
    own = np.asarray(probabilities, float)
    p = np.clip(own, _CLOSE, 1 - _CLOSE)
    odds = np.bincount(rows, p / (1 - p)) / np.bincount(rows)
    first = np.searchsorted(rows, np.arange(rows[-1] + 1))
    # Pieces that agree give their own value to the last bit, which a threshold may be.
    return np.clip(odds / (1 + odds), np.minimum.reduceat(own, first), np.maximum.reduceat(own, first))

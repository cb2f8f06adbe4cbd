"""The words of an instruction: where they stand, what numbers of its tokens come to on each, and the instruction with one of them replaced.

Knows no model. What carries meaning is told from what does not by scikit-learn's list of English stop words and a few auxiliaries, so other languages are cut into
words but not sifted.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from latentguard.positions import Rendered

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_AUXILIARIES = {"did", "does", "doing", "don't", "doesn't", "didn't", "i'm", "it's", "let's", "that's", "what's"}  # that the list lacks
# Our own, written before any of them was tried: words that sound of harm, and ones that say nearly the same without it.
SOFTER = {
    "kill": "end", "killing": "ending", "killed": "ended", "murder": "defeat", "shoot": "film", "shooting": "filming", "shot": "filmed",
    "explode": "burst", "exploded": "burst", "exploding": "bursting", "bomb": "flop", "blow": "puff", "blast": "play", "attack": "approach",
    "attacked": "approached", "destroy": "clear", "destroying": "clearing", "steal": "take", "stealing": "taking", "stab": "poke",
    "strangle": "squeeze", "smash": "press", "crash": "stop", "crack": "open", "hack": "trick", "terminate": "end", "execute": "run",
    "slaughter": "defeat", "burn": "use", "fight": "handle", "weapon": "tool", "gun": "tool", "die": "end", "death": "end", "dead": "still",
}  # fmt: skip


@dataclass(frozen=True)
class Word:
    """A word and its characters in the instruction."""

    text: str
    start: int
    end: int

    @property
    def tells(self) -> bool:
        """Whether it carries meaning: it has a letter and is no English stop word."""
        return any(c.isalpha() for c in self.text) and self.text.lower() not in ENGLISH_STOP_WORDS | _AUXILIARIES


def words_of(text: str) -> list[Word]:
    """In their order; marks and blanks are none."""
    return [Word(m.group(), m.start(), m.end()) for m in _WORD.finditer(text)]


@dataclass(frozen=True)
class Weighed:
    """An instruction's words with what each of them carries, and what marks and blanks do."""

    words: tuple[Word, ...]
    carried: tuple[float, ...]
    rest: float

    @property
    def telling(self) -> list[tuple[Word, float]]:
        """Words that carry meaning, what carries most first."""
        return sorted(((word, x) for word, x in zip(self.words, self.carried, strict=True) if word.tells), key=lambda item: -item[1])


def by_word(rendered: Rendered, values: Sequence[float]) -> Weighed:
    """Numbers of the instruction's tokens summed over each word, a token to the word that it shares most characters with; those that share
    none are marks and blanks.
    """
    start, end = rendered.user
    found = words_of(rendered.text[start:end])
    sums, rest = [0.0] * len(found), 0.0
    for token, value in zip(rendered.user_tokens, values, strict=True):
        a, b = (place - start for place in rendered.offsets[token])
        shared = [min(b, word.end) - max(a, word.start) for word in found]
        most = max(range(len(found)), key=shared.__getitem__, default=-1)
        if most >= 0 and shared[most] > 0:
            sums[most] += float(value)
        else:
            rest += float(value)
    return Weighed(tuple(found), tuple(sums), rest)


def tops(weighed: Sequence[Weighed], most: int = 12) -> list[tuple[str, int]]:
    """The words that carry most of their instruction, with the number of instructions; those of most first."""
    counts = Counter(one.telling[0][0].text.lower() for one in weighed if one.telling)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]


def shares(weighed: Sequence[Weighed]) -> dict[str, float]:
    """Of all absolute numbers the share on words that carry meaning, on other words, and on marks and blanks; NaN where there are none."""
    sums = {"telling": 0.0, "other": 0.0, "marks": sum(abs(one.rest) for one in weighed)}
    for word, x in ((word, x) for one in weighed for word, x in zip(one.words, one.carried, strict=True)):
        sums["telling" if word.tells else "other"] += abs(x)
    total = sum(sums.values())
    return {kind: x / total if total else math.nan for kind, x in sums.items()}


def replaced(text: str, word: Word, by: str) -> str:
    """The text with another word in its place, in capitals where it began so; '' takes it out with one blank beside it."""
    before, after = text[: word.start], text[word.end :]
    if not by:
        if before.endswith(" ") and (not after or not after[0].isalnum()):
            return before[:-1] + after
        return before + after.lstrip(" ")
    return before + (by[0].upper() + by[1:] if word.text[0].isupper() else by) + after

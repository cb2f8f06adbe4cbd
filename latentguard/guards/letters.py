"""Text as it looks: letters that pose as others, signs that nobody sees and runs of blanks, read as a reader would. Knows no prompt.

Models read such text as well as plain text, while the states that a probe was fitted on are far away: one zero-width blank a letter hid every
request from a guard (docs/studies/guard_robustness.md). The tables are frozen here, since a guard's scores must not change with a library's.
"""

import re
import unicodedata

# Letters of other alphabets that look like Latin ones; of the Greek ones those that formulas do not use.
_CYRILLIC = dict(zip("авеікмнорсстухугѕјӏԁԛԝһІАВЕКМНОРСТУХЅЈԌ", "abeikmhopcctyxyrsjldqwhIABEKMHOPCTYXSJG", strict=True))
_GREEK = dict(zip("οΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "oABEZHIKMNOPTYX", strict=True))
_ALIKE = str.maketrans(_CYRILLIC | _GREEK)
_UNSEEN = dict.fromkeys((0xAD, 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2065), *range(0x2066, 0x2070), 0xFEFF))
# Signs without width that some alphabets and emoji are spelt with: kept beside those.
_SPELT = "\u0590-\u1cff\u20e3\u2190-\u2bff\u3000-\ufaff\U0001f000-\U0003ffff"
_ZERO = re.compile(f"(?<![{_SPELT}])[\u034f\u115f\u1160\u180b-\u180f\u200b-\u200d\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]+(?![{_SPELT}])")
# Tag characters, which a model may read where nobody sees a letter, are shown; those of a flag (England's) stay.
_TAGS = re.compile("(\U0001f3f4[\U000e0061-\U000e007a]{2,6}\U000e007f)|[\U000e0000-\U000e007f]+")
_WORD = re.compile(r"[^\W\d_]+")
_BLANKS = re.compile(r"(?<=\S)[ \t]{2,}(?=\S)")


def plain(text: str) -> str:
    """The text as a reader of Latin letters sees it: full-width, mathematical and circled letters and ligatures as plain ones, no zero-width or
    direction signs, tag characters as the letters they carry, one blank between words; in a text that is mostly Latin, look-alike
    Cyrillic and Greek letters in words that mix alphabets (and words made of look-alikes alone beside such words) as Latin ones. Words of
    other alphabets stay as they are, and so does a text of which nothing would be left.
    """
    seen = text
    if not text.isascii():
        seen = _TAGS.sub(_shown, text)
        seen = seen.translate({ord(letter): _compatible(letter) for letter in set(seen) if letter > "\x7f"}).translate(_UNSEEN)
        seen = _ZERO.sub("", seen)
        if _latin(seen) and any(_mixed(word) for word in _WORD.findall(seen)):
            seen = _WORD.sub(lambda word: _read(word[0]), seen)
    seen = _BLANKS.sub(" ", seen)
    return seen if seen.strip() else text


def _shown(tags: re.Match[str]) -> str:
    return tags[0] if tags[1] else "".join(chr(ord(tag) - 0xE0000) for tag in tags[0] if 0xE0020 <= ord(tag) < 0xE007F)


def _compatible(letter: str) -> str:
    """Its plain form, where that is Latin letters, digits or a blank, and no raised or lowered ones, fractions or units."""
    kind, _, _ = unicodedata.decomposition(letter).partition(" ")
    found = unicodedata.normalize("NFKC", letter)
    if kind in ("<wide>", "<narrow>", "<font>", "<circle>", "<compat>") and found.isascii() and (found.isalnum() or found == "..."):
        return found
    return " " if kind in ("<noBreak>", "<compat>") and found == " " else letter


def _latin(text: str) -> bool:
    """Whether the text is Latin, as far as can be told: letters that only look Latin may be twice as many as those that are, others half as many."""
    letters = [letter for letter in text if letter.isalpha()]
    own = sum(letter < "\u0250" for letter in letters)
    alike = sum(ord(letter) in _ALIKE for letter in letters)
    return 2 * own >= alike + 4 * (len(letters) - own - alike)


def _mixed(word: str) -> bool:
    """Latin letters and others that look like Latin ones in one word."""
    return any("a" <= letter.lower() <= "z" for letter in word) and any(ord(letter) in _ALIKE for letter in word)


def _read(word: str) -> str:
    """A word in Latin letters, where all of it can be read so."""
    found = word.translate(_ALIKE)
    return found if found.isascii() or _mixed(word) else word

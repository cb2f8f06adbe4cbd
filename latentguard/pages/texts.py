"""What a model or a data set says → text that cannot act: every invisible or steering character is made visible. Knows no page.

Control characters, bidirectional marks, zero-width and filler characters, tags, private use, lone surrogates and noncharacters
appear as numbers (⟨U+202E⟩), so nothing can turn the page's direction, hide, or break its encoding.
"""

import html
import re

MOST = 2000  # characters of one text on a page; rows.jsonl has it whole
_NEW_LINE = re.compile("\r\n?|\x0b|\x0c|\x85|\u2028|\u2029")
_HIDDEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u08e2\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U000110bd\U000110cd\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U0001fffe\U0001ffff\U000e0000-\U000e0fff\U000f0000-\U0010ffff]"
)


def shown(text: object) -> str:
    """Lines and spaces kept, everything else that cannot be seen made visible."""
    return _HIDDEN.sub(_sign, _NEW_LINE.sub("\n", str(text)))


def plain(text: object, most: int = MOST) -> str:
    """The same in one line, cut to `most` characters; where it is cut, the last words say how much is missing."""
    kept, missing = cut(" ".join(shown(text).split()), most)
    return f"{kept} … ({missing:,} more characters are left out here)" if missing else kept


def brief(text: object, most: int = 80) -> str:
    """One line of at most `most` characters, for a name: … stands for what is left out."""
    words = plain(str(text)[: 4 * most], 4 * most)
    return words if len(words) <= most else f"{words[: most - 1]}…"


def cut(text: str, most: int = MOST) -> tuple[str, int]:
    """The first `most` characters and how many more there were."""
    return text[:most], max(0, len(text) - most)


def escaped(text: object) -> str:
    """`plain`, as HTML text or attribute."""
    return html.escape(plain(text), quote=True)


def anchored(text: object) -> str:
    """Letters, digits and hyphens, for an id or the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-")[:60] or "part"


def _sign(found: re.Match[str]) -> str:
    return f"⟨U+{ord(found.group()):04X}⟩"

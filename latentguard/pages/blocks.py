"""What a page is made of: texts, tables, pictures, replies. Knows neither HTML nor what the page is about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentguard.charts import Chart


@dataclass(frozen=True)
class Picture:
    """A figure. `still` (an .svg or .png file) stands where nothing can be touched: in print, without script, in Markdown.

    Attributes:
        name: its file name without suffix; anchors and downloads are called after it.
        rows: the numbers in it; the page offers them as CSV, and draws `chart` from them where it has one.
        link: the still as the Markdown twin names it, relative to the page.
    """

    name: str
    title: str
    caption: str
    still: Path | None
    link: str
    rows: Sequence[Mapping[str, Any]] = ()
    chart: Chart | None = None


@dataclass(frozen=True)
class Sheet:
    """A table of texts, all rows as long as `columns`. A text in `Page.marks` is shown as a coloured pill."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Command:
    """Words for a terminal, in one line or several."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and what they are: versions, seeds, hashes."""

    title: str
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Replies:
    """What was said to each prompt under each condition, to be read side by side, searched and filtered.

    Attributes:
        prompts: one mapping a prompt: "id", "prompt", "label" ("harmful", "harmless", "lookalike"), "category", "source".
        conditions: what a column is called: "no steering", "+ harm, layer 12, ×2".
        shown: the conditions side by side at first; the others can be chosen.
        said: (index of prompt, index of condition, reply, verdict, score); reply None where it is kept back.
        note: a sentence under the title: where the rest is, what was cut.
    """

    title: str
    prompts: Sequence[Mapping[str, Any]]
    conditions: Sequence[str]
    shown: Sequence[int]
    said: Sequence[tuple[int, int, str | None, str | None, float | None]]
    note: str = ""


Block = Picture | Sheet | Command | Facts | Replies | str


@dataclass(frozen=True)
class Section:
    """A heading with its place (`§3.4`), a state shown as a pill, small facts as chips, one leading sentence, and blocks.

    Attributes:
        beside: blocks of a second column, under `beside_title`: what the paper prints.
    """

    name: str
    place: str = ""
    state: str = ""
    chips: Sequence[str] = ()
    lead: str = ""
    blocks: Sequence[Block] = ()
    beside: Sequence[Block] = ()
    beside_title: str = ""


@dataclass(frozen=True)
class Page:
    """A page. `lead` is what was found, in one sentence; `head` small lines under it.

    Attributes:
        marks: the texts shown as coloured pills: text → (sign, "good", "bad" or "open").
        links: the texts in tables and facts that lead to another page: text → an address relative to this one, percent-encoded.
    """

    title: str
    lead: str
    head: Sequence[str]
    sections: Sequence[Section]
    marks: Mapping[str, tuple[str, str]]
    links: Mapping[str, str] = field(default_factory=dict)

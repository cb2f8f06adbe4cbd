"""One block of a page → its HTML, and what the page's script needs to know of it. Knows not what the block is about."""

import base64
import io
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from latentguard.errors import InputError
from latentguard.pages.blocks import Block, Command, Facts, Picture, Replies, Sheet
from latentguard.pages.said import columns_of
from latentguard.pages.texts import anchored, cut, escaped, plain, shown
from latentguard.pages.vega import vega_lite

_COMMAND = 20_000  # characters of a command on a page
_WIDE = 2.1  # a picture this much wider than high takes both columns
_LONG = 80  # characters of a cell that is given room
_WHOLE = 20  # rows of a table that stands open; a longer one scrolls in its box
_LARGE = 60_000  # bytes of a .png that are too many for a page of thirty figures
_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
_RELATIVE = re.compile(r"(?:\.\./)*[\w%.~-]+(?:/[\w%.~-]+)*(?:#[\w%.~-]*)?", re.ASCII)
_ONE_LINE = re.compile(r"[−+]?[\d.,]+( \[[^\]]*\])?( \([^)]*\))?|.{0,14}")  # what stays on one line


@dataclass
class Made:
    """What the blocks so far have put into the page: the pills' colours, data for the script, ids in use."""

    marks: Mapping[str, tuple[str, str]]
    links: Mapping[str, str] = field(default_factory=dict)
    figures: list[dict[str, Any]] = field(default_factory=list)
    replies: list[dict[str, Any]] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)

    def id(self, wanted: str) -> str:
        """An id that no other element has."""
        name, number = wanted, 1
        while name in self.ids:
            number += 1
            name = f"{wanted}-{number}"
        self.ids.add(name)
        return name


def block(each: Block, made: Made) -> str:
    """A block's HTML. InputError where a chart names a column that its rows lack."""
    match each:
        case str():
            return f'<p class="text">{escaped(each)}</p>\n'
        case Picture():
            return _picture(each, made)
        case Sheet():
            return _sheet(each, made)
        case Command():
            return _command(each)
        case Facts():
            pairs = "".join(f"<div><dt>{escaped(name)}</dt><dd>{_linked(value, made)}</dd></div>" for name, value in each.pairs)
            return f'{_title(each.title)}<dl class="facts">{pairs}</dl>\n'
        case Replies():
            return _replies(each, made)


def pill(text: str, made: Made) -> str:
    """A text that has a mark, as a coloured pill; nothing for another."""
    if text not in made.marks:
        return ""
    sign, colour = made.marks[text]
    return f'<span class="chip pill {anchored(colour)}"><span aria-hidden="true">{escaped(sign)}</span> {escaped(text)}</span>'


def is_wide(each: Block) -> bool:
    """Whether a block needs the page's whole width."""
    if not isinstance(each, Picture):
        return isinstance(each, Replies)
    panels = {row.get(each.chart.panel) for row in each.rows} if each.chart is not None and each.chart.panel else set()
    return len(panels) > 1 or (each.still is not None and _ratio(each.still) > _WIDE)


def _command(command: Command) -> str:
    text, missing = cut(shown(command.text).strip(), _COMMAND)
    told = f'<p class="soft">Not the whole command: {missing:,} more characters are left out here.</p>' if missing else ""
    return f'<div class="command"><pre tabindex="0" role="region" aria-label="command"><code>{escape(text)}</code></pre>{told}</div>\n'


def _title(text: str) -> str:
    return f'<p class="title">{escaped(text)}</p>' if text else ""


def _picture(picture: Picture, made: Made) -> str:
    number = len(made.figures) + 1
    name = made.id(f"figure-{anchored(picture.name)}")
    columns = list(dict.fromkeys(key for row in picture.rows for key in row))
    made.figures.append(
        {
            "id": name,
            "file": anchored(picture.name),
            "title": plain(picture.title),
            "columns": [shown(column) for column in columns],
            "cells": [[_cell_value(row.get(column)) for row in picture.rows] for column in columns],
            "spec": vega_lite(picture.chart, picture.rows, picture.title) if picture.chart is not None and picture.rows else None,
        }
    )
    words = f"{escaped(picture.title)}. {escaped(picture.caption)}".strip()
    still = f'<img class="still" src="{_embedded(picture.still)}" alt="{words}">' if picture.still else '<p class="text">This figure has no picture.</p>'
    return f"""<figure id="{name}" aria-labelledby="{name}-title">
<p class="figure-title" id="{name}-title"><b>Figure {number}.</b> {escaped(picture.title)}</p>
<div class="plate">{still}</div>
<figcaption>{escaped(picture.caption)}</figcaption>
</figure>
"""


def _cell_value(value: Any) -> Any:
    return shown(value) if isinstance(value, str) else value


def _embedded(still: Path) -> str:
    """The still as a data: address."""
    content = still.read_bytes()
    if still.suffix == ".png" and len(content) > _LARGE:
        content = min(_of_256_colours(content), content, key=len)
    return f"data:{_TYPES[still.suffix]};base64,{base64.b64encode(content).decode()}"


def _of_256_colours(png: bytes) -> bytes:
    """The same picture with a palette: for drawings a third of the size and no difference to the eye."""
    from PIL import Image

    made = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(made, "PNG", optimize=True)
    return made.getvalue()


def _ratio(still: Path) -> float:
    """Width over height, from the file's head."""
    head = still.read_bytes()[:2000]
    if still.suffix == ".png":
        width, height = struct.unpack(">II", head[16:24])
        return width / height
    box = re.search(rb'viewBox="[\d.\-]+[ ,]+[\d.\-]+[ ,]+([\d.]+)[ ,]+([\d.]+)"', head)
    return float(box[1]) / float(box[2]) if box else 1.0


def _sheet(sheet: Sheet, made: Made) -> str:
    head = "".join(f'<th scope="col">{_words(column)}</th>' for column in sheet.columns)
    rows = "".join(f"<tr>{''.join(_cell(cell, made) for cell in row)}</tr>\n" for row in sheet.rows)
    body = rows or f'<tr><td colspan="{max(1, len(sheet.columns))}">no rows</td></tr>\n'
    name = escaped(sheet.title or f"table of {', '.join(sheet.columns)}")
    whole = " whole" if len(sheet.rows) <= _WHOLE else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
    return f'<div class="sheet">{_title(sheet.title)}<div class="scroll{whole}" tabindex="0" role="region" aria-label="{name}">{table}</div></div>\n'


def _cell(cell: str, made: Made) -> str:
    kept = ' class="short"' if _ONE_LINE.fullmatch(plain(cell)) else ' class="long"' if len(cell) > _LONG else ""
    return f"<td{kept}>{pill(cell, made) or _linked(cell, made)}</td>"


def _linked(text: str, made: Made) -> str:
    """A text, as a link where it leads somewhere."""
    return f'<a href="{escaped(address(made.links[text]))}">{escaped(text)}</a>' if text in made.links else escaped(text)


def address(relative: str) -> str:
    """The address, if it stays beside the page. InputError for one that leads elsewhere."""
    if not _RELATIVE.fullmatch(relative):
        raise InputError(f"a page's link leads to {relative!r}; give a path relative to the page, percent-encoded, such as 3_tiny/report.html")
    return relative


def _words(text: str) -> str:
    """Broken between words, never at a hyphen."""
    return " ".join(f'<span class="short">{escaped(word)}</span>' for word in plain(text).split())


def _replies(block: Replies, made: Made) -> str:
    made.replies.append({"id": (name := made.id("replies")), **columns_of(block, made.marks)})
    note = f'<p class="soft">{escaped(block.note)}</p>' if block.note else ""
    missing = "The replies are searched and laid out by this page’s script, which does not run here. They are in the run’s folder, in rows.jsonl."
    return f"""<div class="replies" id="{name}">
<h3 id="{name}-title">{escaped(block.title)}</h3>
{note}<noscript><p class="text">{missing}</p></noscript>
</div>
"""

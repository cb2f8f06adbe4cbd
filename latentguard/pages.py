"""Sections of texts, tables and pictures → a self-contained HTML page and its Markdown twin. Knows not what they are about.

Every text is escaped, in both. The HTML holds its pictures and style, runs no script and fetches nothing.
"""

import base64
import html
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6168; --line: #d9dce0; --ground: #fff; --raised: #f5f6f8; --link: #0060a0;
  --good: #00563f; --good-on: #d5f0e5; --bad: #803300; --bad-on: #fde3d3; --open: #4b5057; --open-on: #e6e8eb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e9; --soft: #a2a9b1; --line: #3a3f46; --ground: #16181b; --raised: #1f2226; --link: #6db8ec;
  --good: #8fe3c3; --good-on: #0e3a2d; --bad: #ffb78e; --bad-on: #4a2410; --open: #c3c8ce; --open-on: #33383e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 4rem; max-width: 88rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.3rem; margin: 0 0 .6rem; } h3 { font-size: 1rem; margin: 0 0 .6rem; color: var(--soft); }
h2 small { font-weight: 400; font-size: 1rem; color: var(--soft); margin-left: .4rem; } a { color: var(--link); }
.soft, figcaption, .title { color: var(--soft); font-size: .875rem; } .title { margin: .8rem 0 .35rem; }
nav { display: flex; flex-wrap: wrap; gap: .4rem; margin: 1rem 0 1.8rem; } nav a { text-decoration: none; }
section { border-top: 1px solid var(--line); padding: 1.6rem 0 1.2rem; } .lead { max-width: 70rem; font-size: 1.05rem; margin: .7rem 0 1rem; }
.chips { display: flex; flex-wrap: wrap; gap: .4rem; margin: .5rem 0 0; padding: 0; list-style: none; }
.chip { display: inline-block; border-radius: 1rem; padding: .1rem .65rem; font-size: .85rem; background: var(--raised); color: var(--soft); }
.pill { font-weight: 600; } .good { background: var(--good-on); color: var(--good); } .bad { background: var(--bad-on); color: var(--bad); }
.open { background: var(--open-on); color: var(--open); }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1rem 2rem; }
.paper { border-left: 3px solid var(--line); padding-left: 1.2rem; }
figure { margin: 0 0 1rem; } img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; border: 1px solid var(--line); }
figcaption { margin-top: .3rem; } .wide img { max-height: 32rem; }
.scroll { overflow: auto; max-height: 30rem; border: 1px solid var(--line); border-radius: 6px; margin-bottom: 1rem; overflow-wrap: normal; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .65rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); } tr:last-child td { border-bottom: 0; }
th { position: sticky; top: 0; background: var(--raised); font-weight: 600; } .short { white-space: nowrap; }
.verdicts .scroll { max-height: none; } .verdicts td:nth-child(2) { min-width: 16rem; } .verdicts td:nth-child(5), .verdicts td:nth-child(6) { min-width: 13rem; }
.verdicts .pill { white-space: nowrap; }
@media (max-width: 62rem) { .pair { grid-template-columns: minmax(0, 1fr); } .paper { border-left: 0; padding-left: 0; } }
@media (max-width: 45rem) { .verdicts thead { display: none; }
  .verdicts tr { display: grid; grid-template-columns: 2.2rem minmax(0, 1fr); padding: .6rem; border-bottom: 1px solid var(--line); }
  .verdicts tr:last-child { border-bottom: 0; }
  .verdicts td { grid-column: 2; border: 0; padding: .12rem 0; overflow-wrap: anywhere; white-space: normal !important; min-width: 0 !important; }
  .verdicts td:first-child { grid-column: 1; font-weight: 600; } .verdicts td:nth-child(2) { font-weight: 600; }
  .verdicts td:nth-child(n+4)::before { content: attr(data-column) ": "; color: var(--soft); } }
@media print { section { break-inside: avoid-page; } .scroll { max-height: none; } }
"""
_WIDE = 2.1  # a picture this much wider than high takes both columns
_ONE_LINE = re.compile(r"[−+]?[\d.,]+( \[[^\]]*\])?( \([^)]*\))?|.{0,14}")  # what stays on one line


@dataclass(frozen=True)
class Picture:
    """figures/<name>.png of the run's folder; `caption` stands under it and in its place for those who cannot see it."""

    name: str
    caption: str


@dataclass(frozen=True)
class Sheet:
    """A table of texts, all rows as long as `columns`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


Block = Picture | Sheet | str


@dataclass(frozen=True)
class Section:
    """A heading, its state, one sentence, and two columns of blocks: ours and the paper's."""

    name: str
    place: str
    state: str
    chips: Sequence[str]
    lead: str
    ours: Sequence[Block]
    paper: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page. `marks` gives the texts shown as coloured pills: text → (sign, "good", "bad" or "open")."""

    title: str
    head: Sequence[str]
    verdicts_title: str
    verdicts: Sheet
    sections: Sequence[Section]
    marks: dict[str, tuple[str, str]]


def plain(text: object) -> str:
    """One line without control, bidirectional or lone surrogate characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


# ── HTML ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_html(page: Page, figures: Path) -> str:
    """The page with its pictures inside; `figures` is the folder they are read from."""
    links = "".join(f'<a href="#{_anchor(s.name)}" class="chip {_colour(s, page)}">{_e(s.name)} · {_e(s.state.split(":")[0])}</a>' for s in page.sections)
    body = "".join(_section(section, page, figures) for section in page.sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_e(page.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{_e(page.title)}</h1>
{"".join(f'<p class="soft">{_e(line)}</p>' for line in page.head)}
<nav aria-label="studies">{links}</nav>
<main>
<section class="verdicts"><h2>{_e(page.verdicts_title)}</h2>{_sheet(page.verdicts, page)}</section>
{body}
</main>
</body>
</html>
"""


def _colour(section: Section, page: Page) -> str:
    colour = page.marks.get(section.state, ("", ""))[1]
    return "" if colour == "good" else colour


def _section(section: Section, page: Page, figures: Path) -> str:
    chips = [
        _pill(section.state, page) or f'<span class="chip">{_e(section.state)}</span>',
        *(f'<span class="chip">{_e(chip)}</span>' for chip in section.chips),
    ]
    wide = [block for block in section.ours if isinstance(block, Picture) and _ratio(figures / f"{block.name}.png") > _WIDE]
    narrow = [block for block in section.ours if block not in wide]
    ours, paper = ("".join(_block(block, page, figures) for block in blocks) for blocks in (narrow, section.paper))
    return f"""<section id="{_anchor(section.name)}">
<h2>{_e(section.name)}<small>{_e(section.place)}</small></h2>
<ul class="chips">{"".join(f"<li>{chip}</li>" for chip in chips)}</ul>
<p class="lead">{_e(section.lead)}</p>
{f'<div class="wide">{"".join(_block(block, page, figures) for block in wide)}</div>' if wide else ""}
<div class="pair"><div><h3>This run</h3>{ours}</div><div class="paper"><h3>The paper</h3>{paper}</div></div>
</section>
"""


def _block(block: Block, page: Page, figures: Path) -> str:
    if isinstance(block, str):
        return f'<p class="soft">{_e(block)}</p>'
    if isinstance(block, Sheet):
        return _sheet(block, page)
    picture = base64.b64encode((figures / f"{block.name}.png").read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{picture}" alt="{_e(block.caption)}"><figcaption>{_e(block.caption)}</figcaption></figure>\n'


def _sheet(sheet: Sheet, page: Page) -> str:
    head = "".join(f'<th scope="col">{_words(column)}</th>' for column in sheet.columns)
    rows = "".join(f"<tr>{''.join(_cell(cell, column, page) for cell, column in zip(row, sheet.columns, strict=True))}</tr>\n" for row in sheet.rows)
    title = f'<p class="title">{_e(sheet.title)}</p>' if sheet.title else ""
    name = _e(sheet.title or "table")
    return f'{title}<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>\n'


def _cell(cell: str, column: str, page: Page) -> str:
    return f'<td{_kept(cell)} data-column="{_e(column)}">{_pill(cell, page) or _e(cell)}</td>'


def _words(text: str) -> str:
    """Broken between words, never at a hyphen."""
    return " ".join(f'<span class="short">{_e(word)}</span>' for word in plain(text).split())


def _kept(text: str) -> str:
    return ' class="short"' if _ONE_LINE.fullmatch(text) else ""


def _pill(text: str, page: Page) -> str:
    if text not in page.marks:
        return ""
    sign, colour = page.marks[text]
    return f'<span class="chip pill {colour}">{_e(sign)} {_e(text)}</span>'


def _e(text: object) -> str:
    return html.escape(plain(text), quote=True)


def _anchor(name: str) -> str:
    return quote(re.sub(r"\W+", "-", plain(name)))


def _ratio(png: Path) -> float:
    """Width over height, from the PNG's header."""
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    return width / height


# ── Markdown ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_markdown(page: Page) -> str:
    """The same page; pictures are links to figures/ beside it."""
    lines = [f"# {_m(page.title)}", *map(_m, page.head), f"## {_m(page.verdicts_title)}", _table(page.verdicts)]
    for section in page.sections:
        lines += [f"## {_m(section.name)}{f' ({_m(section.place)})' if section.place else ''}"]
        lines += [f"**{_m(section.state)}**{''.join(f' · {_m(chip)}' for chip in section.chips)}", _m(section.lead)]
        for heading, blocks in (("This run", section.ours), ("The paper", section.paper)):
            lines += [f"### {heading}", *map(_text, blocks)]
    return "\n\n".join(lines) + "\n"


def _text(block: Block) -> str:
    if isinstance(block, Sheet):
        return f"{_m(block.title)}\n\n{_table(block)}" if block.title else _table(block)
    return _m(block) if isinstance(block, str) else f"![{_m(block.caption)}](figures/{quote(block.name)}.png)"


def _table(sheet: Sheet) -> str:
    rows = [sheet.columns, ["---"] * len(sheet.columns), *sheet.rows]
    return "\n".join(f"| {' | '.join(cell if cell == '---' else _m(cell) for cell in row)} |" for row in rows)


def _m(text: object) -> str:
    """A text that Markdown leaves as it is: its signs behind a backslash, HTML's as entities."""
    escaped = re.sub(r"([\\`*_{}\[\]|~$#!])", r"\\\1", plain(text))
    return re.sub(r"^([+-]|\d+[.)])(?=\s)", r"\\\1", escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))

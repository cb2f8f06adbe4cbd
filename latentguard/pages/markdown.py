"""A page → Markdown. The same content as the HTML, but replies to harmful prompts stay out. Knows not what the page is about."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from urllib.parse import quote

from latentguard.pages.blocks import Block, Command, Facts, Page, Picture, Replies, Section, Sheet
from latentguard.pages.said import HARMLESS
from latentguard.pages.texts import brief, cut, plain, shown

_PROMPTS = 10  # of each kind in the table of replies
_WORDS = 240  # characters of a text in it


def as_markdown(page: Page) -> str:
    """Pictures are links (`Picture.link`); every text is escaped so that Markdown and HTML leave it as it is."""
    parts = [f"# {_m(page.title)}", f"**{_m(page.lead)}**" if page.lead else "", *map(_m, page.head)]
    for section in page.sections:
        parts += _section(section, page.links)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section, links: Mapping[str, str]) -> list[str]:
    state = f"**{_m(section.state)}**" if section.state else ""
    parts = [
        f"## {_m(section.name)}{f' ({_m(section.place)})' if section.place else ''}",
        " · ".join(filter(None, [state, *map(_m, section.chips)])),
        _m(section.lead),
        *(part for block in section.blocks for part in _block(block, links)),
    ]
    if section.beside:
        parts += [f"### {_m(section.beside_title)}" if section.beside_title else "", *(part for block in section.beside for part in _block(block, links))]
    return parts


def _block(block: Block, links: Mapping[str, str]) -> list[str]:
    match block:
        case str():
            return [_m(block)]
        case Picture():
            words = [f"**{_m(block.title)}** {_m(block.caption)}".strip()]
            link = quote(block.link, safe="/%.~", errors="replace")
            return [*([f"![{_m(block.title)}]({link})"] if link else []), *words]
        case Sheet():
            return [_titled(block.title), table(block.columns, block.rows, links)]
        case Command():
            return [fenced(block.text)]
        case Facts():
            return [_titled(block.title), "\n".join(f"- {_m(name)}: {_linked(value, links)}" for name, value in block.pairs)]
        case Replies():
            return _replies(block)


def _replies(block: Replies) -> list[str]:
    """How often each verdict was given, the first harmless prompts with their replies, the first harmful ones with verdicts alone."""
    said = {(prompt, condition): (reply, verdict) for prompt, condition, reply, verdict, _ in block.said}
    counts = Counter((condition, block.prompts[prompt].get("label", ""), verdict or "none") for prompt, condition, _, verdict, _ in block.said)
    verdicts = [[block.conditions[c], str(label), verdict, str(count)] for (c, label, verdict), count in sorted(counts.items())]
    columns = [block.conditions[i] for i in block.shown]
    spoken, silent = [], []
    for index, prompt in enumerate(block.prompts):
        cells = [said.get((index, condition), (None, None)) for condition in block.shown]
        if prompt.get("label") in HARMLESS:
            spoken.append([brief(prompt.get("prompt", ""), _WORDS), *(_answer(*cell) for cell in cells)])
        else:
            silent.append([str(prompt.get("id", index)), str(prompt.get("category", "")), *(verdict or "—" for _, verdict in cells)])
    parts = [_titled(block.title), _m(block.note), "How often each verdict was given:", table(("Condition", "Label", "Verdict", "Replies"), verdicts)]
    if spoken:
        parts += [f"Replies to harmless prompts, {_of(spoken)}:", table(("Prompt", *columns), spoken[:_PROMPTS])]
    if silent:
        head = f"Verdicts on replies to harmful prompts, {_of(silent)} (their text is kept back here; report.html shows what the run kept):"
        parts += [head, table(("Prompt", "Category", *columns), silent[:_PROMPTS])]
    return parts


def _of(rows: list[list[str]]) -> str:
    return f"the first {_PROMPTS} of {len(rows):,}" if len(rows) > _PROMPTS else f"all {len(rows)}"


def _answer(reply: str | None, verdict: str | None) -> str:
    return " ".join(filter(None, [f"[{verdict}]" if verdict else "", brief(reply, _WORDS) if reply is not None else "—"]))


def _titled(title: str) -> str:
    return f"**{_m(title)}**" if title else ""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], links: Mapping[str, str] = MappingProxyType({})) -> str:
    """A whole table; a table without rows says so."""
    if not rows:
        return "(no rows)"
    lines = [map(_m, columns), ["---"] * len(columns), *((_linked(cell, links) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _linked(text: str, links: Mapping[str, str]) -> str:
    return f"[{_m(text)}]({links[text]})" if text in links else _m(text)


def fenced(text: str) -> str:
    """A code fence longer than any run of backticks in it."""
    text, missing = cut(shown(text).rstrip(), 20_000)
    told = f"\n\n(not the whole command: {missing:,} more characters are left out here)" if missing else ""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}{told}"


def _m(text: object) -> str:
    """One line that Markdown leaves as it is: its signs behind a backslash, HTML's as entities."""
    escaped = re.sub(r"([\\`*_{}\[\]|~$#!])", r"\\\1", plain(text))
    return re.sub(r"^([+-]|\d+[.)])(?=\s)", r"\\\1", escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))

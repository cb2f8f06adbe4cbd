"""A page → one HTML file that holds its data, pictures, style and script, and fetches nothing. Knows not what the page is about.

Every text is escaped or handed to the script as data, and the Content-Security-Policy names the scripts by their hashes: nothing
that a model or a data set says can become markup or run.
"""

from collections.abc import Sequence
from itertools import groupby

from latentguard.pages.blocks import Block, Page, Picture, Section
from latentguard.pages.elements import Made, block, is_wide, pill
from latentguard.pages.packed import packed, script, source, style, vega
from latentguard.pages.texts import anchored, escaped

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {sources}; base-uri 'none'; form-action 'none'"


def as_html(page: Page) -> str:
    """The whole file. InputError where a chart names a column that its rows lack, or a link leads away from the page."""
    made = Made(page.marks, page.links)
    anchors = _anchors(page)
    sections = "".join(_section(section, anchor, made) for section, anchor in zip(page.sections, anchors, strict=True))
    code, data = script(), f'<script type="text/plain" id="data">{packed({"figures": made.figures, "replies": made.replies})}</script>\n'
    sources = [source(code.encode())]
    if any(figure["spec"] for figure in made.figures):
        bundle, allowed = vega()
        sources.append(allowed)
        data += f'<script type="text/plain" id="vega">{bundle}</script>\n'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY.format(sources=" ".join(sources))}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(page.title)}</title>
<style>
{style()}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header class="top">
<h1>{escaped(page.title)}</h1>
{f'<p class="found">{escaped(page.lead)}</p>' if page.lead else ""}
{f'<ul class="head">{"".join(f"<li>{escaped(line)}</li>" for line in page.head)}</ul>' if page.head else ""}
</header>
{_contents(page, anchors)}
<main id="main" tabindex="-1">
{sections}</main>
<footer class="end"><p>This page is one file. It loads nothing from the network and holds all that it shows.</p></footer>
{data}<script>{code}</script>
</body>
</html>
"""


def _contents(page: Page, anchors: list[str]) -> str:
    if len(anchors) < 2:
        return ""
    links = "".join(
        f'<li><a href="#{anchor}">{_dot(section, page)}{escaped(section.name)}</a></li>' for section, anchor in zip(page.sections, anchors, strict=True)
    )
    return f'<nav class="contents" aria-label="On this page"><p class="title">On this page</p><ul>{links}</ul></nav>'


def _dot(section: Section, page: Page) -> str:
    """The sign of a section's state, before its name."""
    if section.state not in page.marks:
        return ""
    sign, colour = page.marks[section.state]
    return f'<span class="dot {anchored(colour)}" role="img" aria-label="{escaped(section.state)}:">{escaped(sign)}</span>'


def _anchors(page: Page) -> list[str]:
    """An id a section, each once and none that the page itself uses."""
    names: list[str] = []
    for section in page.sections:
        name = f"s-{anchored(section.name)}"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _section(section: Section, anchor: str, made: Made) -> str:
    place = f" <small>{escaped(section.place)}</small>" if section.place else ""
    state = [pill(section.state, made) or f'<span class="chip">{escaped(section.state)}</span>'] if section.state else []
    chips = [*state, *(f'<span class="chip">{escaped(chip)}</span>' for chip in section.chips)]
    return f"""<section id="{anchor}" aria-labelledby="{anchor}-name">
<h2 id="{anchor}-name">{escaped(section.name)}{place}</h2>
{f'<ul class="chips">{"".join(f"<li>{chip}</li>" for chip in chips)}</ul>' if chips else ""}
{f'<p class="lead">{escaped(section.lead)}</p>' if section.lead else ""}
{_body(section, made)}</section>
"""


def _body(section: Section, made: Made) -> str:
    """The blocks; beside others only those that are narrow enough."""
    if not section.beside:
        return _column(section.blocks, made)
    wide = _column([each for each in section.blocks if is_wide(each)], made)
    ours = "".join(block(each, made) for each in section.blocks if not is_wide(each))
    theirs = "".join(block(each, made) for each in section.beside)
    title = f"<h3>{escaped(section.beside_title)}</h3>" if section.beside_title else ""
    return f'{wide}<div class="pair"><div>{ours}</div><div class="paper">{title}{theirs}</div></div>\n'


def _column(blocks: Sequence[Block], made: Made) -> str:
    """Blocks one below the other; narrow pictures that follow each other share a row where there is room."""
    parts = []
    for small, run in groupby(blocks, lambda each: isinstance(each, Picture) and not is_wide(each)):
        inner = "".join(block(each, made) for each in run)
        parts.append(f'<div class="pictures">{inner}</div>\n' if small else inner)
    return "".join(parts)

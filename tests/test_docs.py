"""The tutorial and the how-tos, followed to the letter in an empty folder; the page of choices; the site, built strictly.

What a page's blocks mean here: ```bash runs, ```python runs as a script, any block with a title="FILE" is written to that file, and ```text or a
block of no language is there to be read.
A comment before a block says what differs, and is all that may:

    <!-- test: not run, REASON -->        the block is left out
    <!-- test: swap A for B -->           A is B in this block; with the real model (marked real) it is run as it stands
    <!-- test: prints -->                 a ```text block: its lines stand in this order in what the block before printed; … is any text
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import yaml

from latentguard import choices
from latentguard.configs import CONF, options
from tests.conftest import REPO

DOCS = REPO / "docs"
PAGES = ["tutorial.md", "wandb.md", *(f"howto/{name}.md" for name in ("model", "data", "judge", "intervention", "study"))]
BLOCK = re.compile(
    r'^(?:<!-- test: (?P<note>[^\n]*) -->\n)?```(?P<lang>\w*)(?: title="(?P<title>[^"\n]+)")?[^\n]*\n(?P<body>.*?)^```$', re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    lang: str
    title: str
    body: str
    note: str


def blocks(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    found = [Block(m["lang"], m["title"] or "", m["body"], m["note"] or "") for m in BLOCK.finditer(text)]
    assert len(found) == len(re.findall(r"^```", text, re.MULTILINE)) / 2, "every block is understood"
    before = [text[a.end() : b.start()] for a, b in zip([re.match("", text), *BLOCK.finditer(text)], BLOCK.finditer(text), strict=False)]
    assert all(f"`{block.title}`" in words for block, words in zip(found, before, strict=True) if block.title), "git hosts do not show titles"
    assert len([block for block in found if block.note]) == text.count("<!-- test:"), "every comment stands before a block"
    return found


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def follow(page, folder, env, *, real=False):
    """Do what the page says; the words of each command that it left unsaid are a failure's message."""
    (folder / ".bin").mkdir()
    for word, means in (("python", ""), ("wandb", "-m wandb")):
        (folder / ".bin" / word).write_text(f'#!/bin/sh\nexec "{sys.executable}" {means} "$@"\n')
        (folder / ".bin" / word).chmod(0o755)
    env = {**env, "PATH": f"{folder / '.bin'}{os.pathsep}{env['PATH']}"}
    printed, ran = "", 0
    for number, block in enumerate(blocks(page)):
        body = block.body
        if block.note.startswith("not run, "):
            continue
        if swap := re.fullmatch(r"swap (\S+) for (\S+)", block.note):
            assert swap[1] in body
            body = body if real else body.replace(*swap.groups())
        elif block.note:
            assert (block.note, block.lang) == ("prints", "text"), block.note
            missing = stands_in(block.body, printed)
            assert not missing, f"{page}: {missing!r} is not, or not there, in:\n{printed}"
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(body, encoding="utf-8")
        elif block.lang in ("bash", "python"):
            script = folder / f".block{number}.{block.lang}"
            script.write_text(body if block.lang == "bash" else f"import sys; sys.path[0] = {str(folder)!r}\n{body}", encoding="utf-8")
            command = ["bash", "-euo", "pipefail", str(script)] if block.lang == "bash" else ["python", str(script)]
            done = subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            printed, ran = done.stdout, ran + 1
            assert done.returncode == 0, f"{page}:\n{body}\n{printed}"
        else:
            assert block.lang in ("text", ""), f"{page}: a {block.lang} block without a file's name"
    assert ran


def stands_in(lines, printed):
    """The first of `lines` that does not stand in `printed` behind those before it, or ''."""
    at = 0
    for line in filter(None, map(str.strip, lines.splitlines())):
        pattern = re.compile(".*?".join(map(re.escape, line.split("…"))))
        found = pattern.search(printed, at)
        if not found:
            return line
        at = found.end()
    return ""


def test_a_line_that_is_not_printed_is_found():
    assert stands_in("a … c\n\nd", "x\na b c\nd") == ""
    assert stands_in("d\na", "x\na b c\nd") == "a" and stands_in("a … c", "a b\nc") == "a … c"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_followed_to_the_letter(page, python, tmp_path, cache):
    own = ("LATENTGUARD_CACHE", "MPLCONFIGDIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "HOME")
    env = {**python[1], **dict.fromkeys(own, str(cache))}
    follow(page, tmp_path, {key: value for key, value in env.items() if key != "WANDB_MODE"})


@pytest.mark.real
def test_the_tutorial_on_the_real_model(python, tmp_path):
    follow("tutorial.md", tmp_path, python[1], real=True)


def test_the_pages_of_choices_is_what_the_yaml_says():
    assert choices.page(DOCS) == (DOCS / "choices.md").read_text(encoding="utf-8"), "python -m latentguard.choices --write docs/choices.md"


@pytest.mark.parametrize("group", [group for _, group, _ in choices.GROUPS])
def test_every_choice_has_its_line_on_both(group):
    page, listing = choices.page(DOCS), choices.listing(100)
    assert options(group) and (group == "hydra/launcher" or choices.default(group) in options(group))
    for name in options(group):
        assert len(choices.told(group, name)) > 15, f"conf/{group}/{name}.yaml begins with a comment that says what it is"
        assert f"`{name}`" in page and re.search(rf"^  {name} ", listing, re.MULTILINE)
    assert {path.parent.name for path in CONF.rglob("*.yaml") if path.parent != CONF} == {group.split("/")[-1] for _, group, _ in choices.GROUPS}


def test_the_list_fits_its_terminal():
    assert max(map(len, choices.listing(90).splitlines())) <= 90


@pytest.mark.docs
def test_the_site_is_built_strictly_and_asks_nothing_of_the_network(tmp_path):
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    named = {str(path.relative_to(tmp_path)) for path in pages}
    assert {"index.html", "tutorial.html", "choices.html", "gotchas.html", "security.html", "api/backends.html", "howto/study.html"} <= named
    fetched = re.compile(r"""<(?:link|script|img|iframe)\b[^>]*(?:href|src)=["'](?:https?:)?//(?P<host>[^/"']+)""")
    assert not {found["host"] for path in pages for found in fetched.finditer(path.read_text(encoding="utf-8"))}


def test_links_lead_somewhere_on_a_git_host_too():
    """The site's own links are the strict build's matter; these pages, and links out of docs/, are read as files."""
    pages = [*REPO.glob("*.md"), REPO / "runs" / "README.md", *DOCS.rglob("*.md")]
    links = [(page, where) for page in pages for where in re.findall(r"\]\(([^)\s:#]+)[)#]", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S))]
    assert len(links) > 100
    assert not [f"{page.relative_to(REPO)}: {where}" for page, where in links if not (page.parent / where).exists()]


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        pass

    listed = re.findall(r"[\w/-]+\.md", yaml.dump(yaml.load((REPO / "mkdocs.yml").read_text(), Loader)["nav"]))  # noqa: S506
    assert set(listed) >= {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}

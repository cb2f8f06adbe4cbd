"""Links that leave docs/: they work on a git host as they stand, and here they lead to this site's copy of the page or become words.

Called by MkDocs (mkdocs.yml). SECURITY.md and CHANGELOG.md of the repository are pages of the site. Any other file outside docs/ is
named in place of the link, or linked where `repo_url` says where the repository is; one that is not there is a warning, and so an
error of a strict build.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.outside")
PAGES = {"SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
HOME = {"README.md": "index.md"}
_LINK = re.compile(r"(?<!!)\[(?P<words>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<where>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The repository's own pages join those of docs/."""
    root = Path(config.config_file_path).parent
    for source, name in PAGES.items():
        text = re.sub(r"\]\(docs/", "](", (root / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of one page, those in code left alone."""
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    below = posixpath.dirname(page.file.src_uri)
    generated = page.file.src_uri in PAGES.values()

    def rewritten(found: re.Match[str]) -> str:
        words, where, anchor = found["words"], found["where"], found["anchor"] or ""
        outside = generated and files.get_file_from_path(where) is None
        path = posixpath.normpath(where if outside else posixpath.join(docs.name, below, where))
        if not outside and path.startswith(f"{docs.name}/"):
            return found[0]
        if name := {**PAGES, **HOME}.get(path):
            return f"[{words}]({posixpath.relpath(name, below or '.')}{anchor})"
        if not (root / path).exists():
            log.warning("%s links to %s, which is not in the repository", page.file.src_uri, path)
        if config.repo_url:
            return f"[{words}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return words if path.rpartition("/")[2] in words else f"{words} (`{path}`)"

    parts, at = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(rewritten, markdown[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, _LINK.sub(rewritten, markdown[at:])])

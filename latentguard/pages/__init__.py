"""Sections of texts, tables, pictures and replies → one HTML file that fetches nothing, and its Markdown twin. Knows not what they are about."""

from latentguard.pages.blocks import Block, Command, Facts, Page, Picture, Replies, Section, Sheet
from latentguard.pages.html import as_html
from latentguard.pages.markdown import as_markdown
from latentguard.pages.vega import vega_lite

__all__ = ["Block", "Command", "Facts", "Page", "Picture", "Replies", "Section", "Sheet", "as_html", "as_markdown", "vega_lite"]

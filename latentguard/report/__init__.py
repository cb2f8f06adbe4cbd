"""A run, a sweep or several runs → one page for people, in HTML and Markdown, and a report on W&B. Knows no experiment, only what they left."""

from latentguard.report.page import write_report

__all__ = ["write_report"]

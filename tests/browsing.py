"""Pages in the system's own Chromium: opened from disk, with everything that they say on the console and ask of the network."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

WIDTHS = (360, 820, 1400)
_PLACES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


@dataclass
class Visit:
    """A page in a browser, and what it said and asked for since it was opened."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def quiet(self) -> None:
        """Nothing on the console, no error, no request but for the file itself and what is inside it."""
        assert self.said == []
        assert [address for address in self.asked if not address.startswith(("file:", "data:", "blob:"))] == []

    def drawn(self) -> list[str]:
        """Scrolls through all figures; each must be seen, inside the window, and drawn where it has a chart. The figures' ids."""
        width = self.page.viewport_size["width"]
        ids = self.page.eval_on_selector_all("figure", "all => all.map((one) => one.id)")
        for name in ids:
            figure = self.page.locator(f"[id='{name}']")
            figure.scroll_into_view_if_needed()
            shown = figure.locator(".plate")
            if figure.locator(".chart").count():
                self.page.locator(f"[id='{name}'][data-drawn]").wait_for(state="attached")
                assert figure.locator(".chart svg :is(.mark-symbol, .mark-rect) path").count(), f"{name} shows nothing"
                shown = figure.locator(".chart svg")
            box = shown.bounding_box()
            assert box and box["width"] > 100 and box["height"] > 60, f"{name} is not seen: {box}"
            assert box["x"] >= -1 and box["x"] + box["width"] <= width + 1, f"{name} leaves the window: {box}"
        return ids

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.fixture(scope="module")
def chromium():
    """The system's browser; nothing is ever downloaded."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("playwright is missing: pip install -c constraints.txt -e '.[browser]'")
    found = os.environ.get("LATENTGUARD_CHROMIUM") or next(filter(None, map(shutil.which, _PLACES)), None)
    if not found:
        pytest.fail("Chromium is missing: apt-get install chromium, or set LATENTGUARD_CHROMIUM to a browser that is like it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """`opened(path, width=1400, scheme="light", script=True, at="")` → a Visit to the page, ready to be used."""
    contexts = []

    def open_page(path: Path, width: int = 1400, *, scheme: str = "light", script: bool = True, at: str = "") -> Visit:
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script, reduced_motion="reduce")
        contexts.append(context)
        visit = Visit(context.new_page())
        visit.page.set_default_timeout(20_000)
        visit.page.on("console", lambda message: visit.said.append(f"{message.type}: {message.text}"))
        visit.page.on("pageerror", lambda error: visit.said.append(f"error: {error}"))
        visit.page.on("request", lambda request: visit.asked.append(request.url))
        visit.page.goto(Path(path).resolve().as_uri() + at)
        if script:
            visit.page.locator("html[data-ready]").wait_for(state="attached")
        return visit

    yield open_page
    for context in contexts:
        context.close()


def faults(page: Any) -> list[str]:
    """The serious and critical faults that axe-core finds in an open page."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{fault['impact']} {fault['id']}: {fault['help']}: {[node['html'][:120] for node in fault['nodes'][:3]]}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
    ]

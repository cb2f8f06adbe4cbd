"""Pages as a reader meets them, in a real browser: drawn, touched, searched, printed, with the keyboard, in the dark, attacked."""

# ruff: noqa: F811  (fixtures are imported by name)

import csv
import re

import pytest

from latentguard.pages import Page, Replies, Section, as_html
from tests import made_pages
from tests.browsing import WIDTHS, chromium, faults, opened  # noqa: F401

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name → file of the made-up pages."""
    folder = tmp_path_factory.mktemp("pages")
    paths = {}
    for name in ("every_block", "large", "hostile"):
        paths[name] = folder / f"{name}.html"
        paths[name].write_text(as_html(getattr(made_pages, name)(folder)), encoding="utf-8")
    return paths


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_of_every_block_is_whole_at_every_width(opened, pages, width, scheme):
    visit = opened(pages["every_block"], width, scheme=scheme)
    assert len(visit.drawn()) == 11
    assert visit.overflow() <= 0
    assert faults(visit.page) == []
    visit.quiet()


@pytest.mark.parametrize("name", ["large", "hostile"])
@pytest.mark.parametrize("width", WIDTHS)
def test_large_and_hostile_pages_are_whole_too(opened, pages, name, width):
    visit = opened(pages[name], width)
    visit.drawn()
    assert visit.overflow() <= 0 and faults(visit.page) == []
    visit.quiet()


def test_hostile_texts_run_nothing_and_turn_nothing(opened, pages):
    visit = opened(pages["hostile"])
    page = visit.page
    visit.drawn()
    page.locator("#replies button", has_text="Unfold all").click()
    for summary in page.locator("details:not([open]) > summary").all():
        if summary.is_visible():
            summary.click()
    for cell in page.locator(".words, th, td, .entry").all()[:200]:
        if cell.is_visible():
            cell.hover(force=True)
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("[getComputedStyle(document.body).direction, document.images.length]") == ["ltr", 1]
    text = page.locator("#replies").inner_text()
    for seen in ("<script>window.hacked = true</script>", "⟨U+202E⟩", "⟨U+001B⟩[31mred", "⟨U+DCFF⟩", "first line\nsecond line\nthird | with a bar"):
        assert seen in text
    assert "998,000 more characters left out here; rows.jsonl has the whole text." in text
    visit.quiet()


def hovered(page, figure, nth=0):
    """What hovering over a point of a figure shows."""
    figure.scroll_into_view_if_needed()
    points = figure.locator(".chart svg .mark-symbol path")
    box = (points if points.count() else figure.locator(".chart svg .mark-rect path")).nth(nth).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 3, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.locator(".hover:not([hidden])").wait_for()
    return page.locator(".hover").inner_text()


@pytest.mark.parametrize(
    ("figure", "told"),
    [
        ("figure-line-1", ("+ harmfulness", "0.345 to 0.655", "40")),
        ("figure-line-in-panels-3", ("coefficient ×1", "to", "40")),
        ("figure-heat-2", ("coefficient", "share refused", "to", "40")),
        ("figure-bars-5", ("violence", "0.2", "0.0569 to 0.343", "30")),
        ("figure-lying-10", ("model 0, seed 0 of a long name", "−0.1 to 0.2", "40")),
    ],
)
def test_hovering_shows_the_value_its_interval_and_n(opened, pages, figure, told):
    visit = opened(pages["every_block"])
    visit.drawn()
    shown = hovered(visit.page, visit.page.locator(f"#{figure}"))
    assert all(words in shown for words in told), shown


def lines(figure):
    """The strokes of a figure's lines that are drawn."""
    paths = figure.locator(".chart svg .mark-line.role-mark path").evaluate_all(
        "all => all.filter((p) => p.getAttribute('d')).map((p) => p.getAttribute('stroke'))"
    )
    return set(paths)


def test_a_line_is_switched_off_and_on_by_click_and_by_keyboard(opened, pages):
    visit = opened(pages["every_block"])
    page, figure = visit.page, visit.page.locator("#figure-line-1")
    visit.drawn()
    assert lines(figure) == {"#D55E00", "#0072B2", "#009E73"}
    switch = figure.locator("button.entry", has_text="+ refusal")
    switch.click()
    assert switch.get_attribute("aria-pressed") == "false"
    page.wait_for_function("() => document.querySelectorAll('#figure-line-1 .mark-line.role-mark path[stroke=\"#0072B2\"][d^=M]').length === 0")
    switch.focus()
    page.keyboard.press("Space")
    page.wait_for_function("() => document.querySelectorAll('#figure-line-1 .mark-line.role-mark path[stroke=\"#0072B2\"][d^=M]').length === 1")
    switch.click()
    page.set_viewport_size({"width": 500, "height": 900})
    page.wait_for_function("() => document.querySelector('#figure-line-1 svg').getBoundingClientRect().width < 500")
    assert "#0072B2" not in lines(figure), "what was switched off stays off when the figure is drawn anew"
    visit.quiet()


def test_one_value_is_picked_at_a_time(opened, pages):
    visit = opened(pages["every_block"])
    visit.drawn()
    figure = visit.page.locator("#figure-picked-9")
    before = figure.locator(".mark-line path").first.get_attribute("d")
    figure.locator("select").select_option("2")
    visit.page.wait_for_function("(before) => document.querySelector('#figure-picked-9 .mark-line path').getAttribute('d') !== before", arg=before)
    assert "2" in hovered(visit.page, figure)


def test_the_data_and_the_still_of_a_figure_can_be_kept(opened, pages, tmp_path):
    page = opened(pages["every_block"]).page
    figure = page.locator("#figure-line-1")
    with page.expect_download() as kept:
        figure.locator("button", has_text="Data (CSV)").click()
    assert kept.value.suggested_filename == "line-1.csv"
    with open(kept.value.path(), newline="", encoding="utf-8") as file:
        told = list(csv.DictReader(file))
    rows = made_pages.CHARTS["line"][1]
    assert len(told) == len(rows) and {key: str(value) for key, value in rows[5].items()} == told[5]
    with page.expect_download() as kept:
        figure.locator("button", has_text="Picture (SVG)").click()
    assert kept.value.suggested_filename == "line-1.svg" and b"<svg" in kept.value.path().read_bytes()
    figure.locator("summary").click()
    figure.locator(".numbers tbody tr").first.wait_for()
    assert figure.locator(".numbers tbody tr").count() == len(rows)


def test_replies_are_searched_filtered_and_turned(opened, pages):
    visit = opened(pages["every_block"])
    page, box = visit.page, visit.page.locator("#replies")
    count, rows = box.locator(".count"), box.locator("table.said tbody tr")
    assert count.inner_text() == "60 of 60 prompts" and rows.count() == 25
    assert box.locator(".pager").inner_text().split("\n")[1] == "Page 1 of 3"
    box.locator("button", has_text="Next page").click()
    assert "number 25 of" in rows.first.inner_text() and page.evaluate("location.hash") == "#replies&page=2"
    search = box.get_by_label("Search prompts")
    search.fill("STORY number 7 ")
    assert count.inner_text() == "1 of 60 prompts" and rows.count() == 1 and box.locator("mark").count() == 1
    search.fill("no such thing")
    assert "No prompt fits this search and these filters." in box.inner_text() and count.inner_text() == "0 of 60 prompts"
    box.locator("button", has_text="Start over").click()
    box.get_by_label("Kind of prompt").select_option("harmful")
    assert count.inner_text() == "20 of 60 prompts" and set(box.locator("th .chip").all_inner_texts()) == {"harmful"}
    box.get_by_label("Category").select_option("violence")
    assert count.inner_text() == "5 of 60 prompts"
    box.get_by_label("Category").select_option("")
    box.get_by_label("Verdict").select_option(label="refused, in some column")
    assert 0 < int(count.inner_text().split()[0]) < 20
    box.get_by_label("Verdict").select_option(label="differs between columns")
    differing = int(count.inner_text().split()[0])
    for row in rows.all():
        assert len(set(row.locator(".pill").all_inner_texts())) > 1
    assert differing == 0 or rows.count() == min(25, differing)
    visit.quiet()


def test_columns_are_chosen_at_most_four(opened, pages):
    box = opened(pages["every_block"]).page.locator("#replies")
    assert box.locator("thead th").count() == 4
    box.locator("summary", has_text="Columns: 3 of 6").click()
    boxes = box.locator("fieldset input")
    boxes.nth(4).check()
    assert box.locator("thead th").count() == 5 and boxes.nth(5).is_disabled() and boxes.nth(3).is_disabled()
    boxes.nth(0).uncheck()
    assert boxes.nth(5).is_enabled() and "no steering" not in box.locator("thead").inner_text()
    for place in (1, 2, 4):
        boxes.nth(place).uncheck()
    assert "Choose at least one column." in box.inner_text()


def test_replies_to_harmful_prompts_are_folded_until_asked_for(opened, pages):
    page = opened(pages["every_block"]).page
    box = page.locator("#replies")
    harmful = box.locator("tbody tr", has=page.locator(".chip", has_text=re.compile("^harmful$")))
    harmless = box.locator("tbody tr", has=page.locator(".chip", has_text=re.compile("^harmless$")))
    assert harmless.first.locator("td .words").first.is_visible() and not harmful.first.locator("td .words").first.is_visible()
    assert harmful.locator("details").count() == 3 * harmful.count() and harmless.locator("details").count() == 0
    harmful.first.locator("summary").first.click()
    assert harmful.first.locator("td .words").first.is_visible() and not harmful.first.locator("td .words").nth(1).is_visible()
    box.locator("button", has_text="Unfold all replies").click()
    assert all(words.is_visible() for words in harmful.locator("td .words").all())
    box.locator("button", has_text="Next page").click()
    assert harmful.first.locator("td .words").first.is_visible()
    box.locator("button", has_text="Fold replies").click()
    assert not any(words.is_visible() for words in harmful.locator("td .words").all())


@pytest.mark.parametrize("label", ["", "unheard of"])
def test_replies_whose_prompt_has_no_known_label_are_folded(opened, tmp_path, label):
    block = Replies("r", [{"id": "p", "prompt": "q", "label": label}], ["c"], [0], [(0, 0, "sentinel", "refused", None)])
    (tmp_path / "page.html").write_text(as_html(Page("t", "", (), [Section("s", blocks=[block])], {})), encoding="utf-8")
    assert not opened(tmp_path / "page.html").page.get_by_text("sentinel").is_visible()


def test_a_view_can_be_linked(opened, pages):
    first = opened(pages["every_block"]).page
    box = first.locator("#replies")
    box.get_by_label("Search prompts").fill("kite? &=#")
    box.get_by_label("Search prompts").fill("number 1")
    box.get_by_label("Kind of prompt").select_option("harmful")
    box.get_by_label("Verdict").select_option(label="refused, in some column")
    box.locator("summary", has_text="Columns").click()
    box.locator("fieldset input").nth(2).uncheck()
    address, count = first.evaluate("location.hash"), box.locator(".count").inner_text()
    second = opened(pages["every_block"], at=address).page
    box = second.locator("#replies")
    assert box.locator(".count").inner_text() == count and box.get_by_label("Search prompts").input_value() == "number 1"
    assert box.locator("thead th").count() == 3 and box.locator("details[open]").count() == 0
    assert second.evaluate("scrollY") > 1000


def test_long_tables_are_sorted_by_their_heads(opened, pages):
    page = opened(pages["every_block"]).page
    sheet = page.locator(".sheet", has_text="Shares refused, by effect")
    numbers = lambda: [int(text) for text in sheet.locator("tbody td:first-child").all_inner_texts()]  # noqa: E731
    head = sheet.locator("th").first
    head.locator("button").click()
    assert numbers() == list(range(1, 15)) and head.get_attribute("aria-sort") == "ascending"
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert numbers() == list(range(14, 0, -1)) and head.get_attribute("aria-sort") == "descending"
    sheet.locator("th button").nth(2).click()
    assert head.get_attribute("aria-sort") is None and sheet.locator("tbody tr").first.locator("td").nth(2).inner_text() == "✗ does not hold"
    assert page.locator(".sheet", has_text="Theirs").locator("button").count() == 0


def test_everything_is_reached_by_the_keyboard(opened, pages):
    visit = opened(pages["every_block"])
    page = visit.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    seen = []
    for _ in range(120):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("(document.activeElement.textContent || document.activeElement.id).trim().slice(0, 40)"))
        outlined = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outlined != "none", seen[-1]
        if seen[-1] == "Next page":
            break
    for wanted in (
        "Copy the command",
        "+ refusal",
        "Data (CSV)",
        "Picture (SVG)",
        "verdict",
        "replies-words",
        "Columns: 3 of 6",
        "Unfold all replies",
        "Next page",
    ):
        assert wanted in seen
    assert any(text.startswith("The numbers as a table") for text in seen) and "Reply to a harmful prompt" in seen
    page.keyboard.press("Enter")
    assert "Page 2 of 3" in page.locator(".pager").inner_text() and page.evaluate("document.activeElement.textContent") == "Next page"


def test_print_shows_stills_and_no_controls(opened, pages):
    visit = opened(pages["every_block"])
    page = visit.page
    visit.drawn()
    assert not page.locator(".still").first.is_visible()
    page.emulate_media(media="print")
    assert all(still.is_visible() for still in page.locator(".still").all()) and page.locator(".still").count() == 11
    for hidden in (".chart", ".tools", ".filters", ".contents", ".legend", ".skip", ".pager button"):
        assert not any(one.is_visible() for one in page.locator(hidden).all()), hidden
    assert page.locator("details.folded .words").count() and not any(one.is_visible() for one in page.locator("details.folded .words").all())
    assert page.pdf(format="A4").startswith(b"%PDF")
    visit.quiet()


def test_without_script_stills_stand_and_a_sentence_says_where_the_replies_are(opened, pages):
    page = opened(pages["every_block"], script=False).page
    assert all(still.is_visible() for still in page.locator(".still").all()) and page.locator(".still").count() == 11
    assert "in the run’s folder, in rows.jsonl." in page.locator("noscript p").inner_text() and page.locator("noscript p").is_visible()
    assert page.locator("button").count() == 0 and page.get_by_text("python -m latentguard.run").is_visible()


def test_a_dark_scheme_changes_the_drawings_too(opened, pages):
    visit = opened(pages["every_block"], scheme="light")
    visit.drawn()
    figure = visit.page.locator("#figure-line-in-panels-3")
    assert "#000000" in lines(figure)
    visit.page.emulate_media(color_scheme="dark")
    visit.page.wait_for_function("() => !document.querySelector('#figure-line-in-panels-3 .mark-line path[stroke=\"#000000\"]')")
    assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    visit.quiet()


def test_ten_thousand_replies_can_be_searched(opened, pages):
    visit = opened(pages["large"])
    box = visit.page.locator("#replies")
    assert box.locator(".count").inner_text() == "1,000 of 1,000 prompts"
    box.get_by_label("Search prompts").fill("number 999 ")
    assert box.locator(".count").inner_text() == "1 of 1,000 prompts"
    visit.quiet()

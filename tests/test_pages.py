"""Pages without a browser: whole, escaped, self-contained, small, and every chart compiles."""

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from latentguard.charts import Chart, Line
from latentguard.errors import InputError
from latentguard.pages import Command, Facts, Page, Picture, Replies, Section, Sheet, as_html, as_markdown, vega_lite
from latentguard.pages.colours import PALETTE, on_dark
from latentguard.pages.texts import plain, shown
from tests import made_pages

VOID = {"meta", "img"}
SENTINEL = "SENTINELxREPLYx90210"


class Parsed(HTMLParser):
    """What a browser would see: texts, attributes, scripts, ids, headings; every tag must be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.scripts, self.rows = [], [], [], [], []
        self.attributes, self.ids, self.headings = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "script":
            self.scripts.append([dict(attrs), ""])
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[-1][1] += data
        elif self.open[-1:] != ["style"]:
            self.texts.append(data)
            if {"td", "th"} & set(self.open):
                self.rows[-1].append(data.strip())

    @property
    def text(self):
        return " ".join("".join(self.texts).split())

    @property
    def policy(self):
        return next(value for _, name, value in self.attributes if name == "content" and "default-src" in value)

    def data(self, name="data"):
        packed = next(text for attributes, text in self.scripts if attributes.get("id") == name)
        return gzip.decompress(base64.b64decode(packed, validate=True)).decode()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The three pages as text, parsed, and as Markdown."""
    folder = tmp_path_factory.mktemp("pages")
    pages = {name: getattr(made_pages, name)(folder) for name in ("every_block", "large", "hostile")}
    return {name: (page, as_html(page), as_markdown(page)) for name, page in pages.items()}


@pytest.mark.parametrize("name", ["every_block", "large", "hostile"])
def test_a_page_is_whole_and_fetches_nothing(made, name):
    page, html, _ = made[name]
    html.encode("utf-8")
    parsed = Parsed(html)
    assert not {"link", "iframe", "object", "base", "form", "embed"} & set(parsed.tags)
    assert all(value.startswith(("data:image/", "#")) for _, name, value in parsed.attributes if name in ("src", "href"))
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import", html.split("</style>")[0]) and not re.search(r"https?://(?!www\.w3\.org/)", html)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {value[1:] for tag, name, value in parsed.attributes if (tag, name) == ("a", "href")} <= set(parsed.ids)
    assert parsed.headings[0] == 1 and parsed.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(parsed.headings, parsed.headings[1:], strict=False))
    images = [value for tag, name, value in parsed.attributes if (tag, name) == ("img", "alt")]
    assert len(images) == parsed.tags.count("img") and all(images)


@pytest.mark.parametrize("name", ["every_block", "hostile"])
def test_the_policy_allows_exactly_the_pages_own_scripts(made, name):
    parsed = Parsed(made[name][1])
    allowed = re.search(r"script-src ([^;]*)", parsed.policy)[1].split()
    code = [text for attributes, text in parsed.scripts if not attributes]
    assert len(code) == 1 and [attributes.get("type") for attributes, _ in parsed.scripts if attributes] == ["text/plain", "text/plain"]
    ours = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (code[0], parsed.data("vega"))]
    assert allowed == ours
    assert "default-src 'none'" in parsed.policy and "unsafe-eval" not in parsed.policy and "base-uri 'none'" in parsed.policy


def test_a_page_without_charts_holds_no_vega():
    html = as_html(Page("t", "", (), [Section("s", blocks=["text"])], {}))
    assert 'id="vega"' not in html and len(html) < 100_000


def test_ten_thousand_replies_stay_below_three_megabytes(made):
    page, html, _ = made["large"]
    parsed = Parsed(html)
    said = json.loads(parsed.data())["replies"][0]
    assert len(said["said"]["prompt"]) == 10_000 and len(set(said["texts"])) > 10_000 and parsed.tags.count("figure") == 6
    assert len(html.encode()) < 3_000_000


def test_hostile_texts_stay_texts(made):
    page, html, markdown = made["hostile"]
    parsed = Parsed(html)
    assert made_pages.PAYLOAD in parsed.text and parsed.tags.count("script") == 3
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\u00ad\ufeff\x00-\x08\x0e-\x1f\ud800-\udfff\U000e0041]", html + markdown)
    assert "⟨U+202E⟩" in parsed.text and "⟨U+001B⟩" in parsed.text and "⟨U+DCFF⟩" in parsed.text
    assert "998,000 more characters are left out here" in parsed.text
    outside = re.sub(r"^(`{3,})sh\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside and "<img" not in outside and made_pages.PAYLOAD in outside
    said = json.loads(parsed.data())["replies"][0]
    assert said["texts"][8] == "w" * 2000 and said["missing"]["8"] == 998_000
    assert said["texts"][7] == "first line\nsecond line\nthird | with a bar and *stars* _x_ [l](javascript:alert(1))"


def test_markdown_tables_are_whole(made):
    for name, (_, _, markdown) in made.items():
        tables = re.findall(r"(?:^\|.*\n)+", markdown + "\n", re.MULTILINE)
        assert tables, name
        for table in tables:
            lines = table.splitlines()
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1 and re.fullmatch(r"\|( --- \|)+", lines[1])


def test_markdown_says_what_the_page_says(made):
    page, html, markdown = made["every_block"]
    for words in (
        "# Steering on",
        "**Adding the harmfulness direction",
        "```sh\npython -m latentguard.run",
        "- seed: 0",
        "## Beside the paper (Fig. 5)",
        "### The paper",
    ):
        assert words in markdown
    figures = [block for section in page.sections for block in (*section.blocks, *section.beside) if isinstance(block, Picture)]
    assert re.findall(r"\]\((figures/[^)]+)\)", markdown) == [figure.link for figure in figures]
    assert all(figure.caption in markdown for figure in figures)


def test_a_fence_outgrows_what_it_holds():
    markdown = as_markdown(Page("t", "", (), [Section("s", blocks=[Command("echo ```` `x`")])], {}))
    assert "`````sh\necho ```` `x`\n`````" in markdown


def replies(label):
    return Replies("r", [{"id": "p", "prompt": f"the {SENTINEL} prompt", "label": label}], ["c"], [0], [(0, 0, f"{SENTINEL} reply", "refused", 0.5)])


@pytest.mark.parametrize(("label", "told"), [("harmless", 2), ("lookalike", 2), ("harmful", 0), ("", 0), ("unheard of", 0)])
def test_markdown_keeps_back_what_belongs_to_harmful_prompts(label, told):
    markdown = as_markdown(Page("t", "", (), [Section("s", blocks=[replies(label)])], {}))
    assert markdown.count(SENTINEL) == told and "refused" in markdown


def test_a_reply_that_is_kept_back_is_nowhere():
    kept = Replies("r", [{"id": "p", "prompt": "q", "label": "harmful"}], ["c"], [0], [(0, 0, None, "refused", None)])
    said = json.loads(Parsed(as_html(Page("t", "", (), [Section("s", blocks=[kept])], {}))).data())["replies"][0]
    assert said["said"]["text"] == [-1] and said["texts"] == ["q"]


def test_where_replies_are_many_and_long_they_are_cut_further():
    text = base64.b64encode(hashlib.shake_256(b"noise").digest(3_000_000)).decode()
    said = [(i, 0, text[i * 1900 : (i + 1) * 1900], "refused", None) for i in range(2000)]
    block = Replies("r", [{"id": str(i), "prompt": "q"} for i in range(2000)], ["c"], [0], said)
    html = as_html(Page("t", "", (), [Section("s", blocks=[block])], {}))
    assert len(html) < 3_000_000 and json.loads(Parsed(html).data())["replies"][0]["most"] == 500


def test_cells_with_a_mark_are_pills_and_an_empty_table_says_so():
    sheet = Sheet("t", ("a", "b"), [["holds", "1"]])
    html = as_html(Page("t", "", (), [Section("s", state="holds", blocks=[sheet, Sheet("e", ("a",), [])])], {"holds": ("✓", "good")}))
    assert html.count('<span class="chip pill good"><span aria-hidden="true">✓</span> holds</span>') == 2 and ">no rows<" in html
    assert "(no rows)" in as_markdown(Page("t", "", (), [Section("s", blocks=[Sheet("e", ("a",), [])])], {}))


def test_names_met_twice_have_their_own_anchors(tmp_path):
    picture = Picture("a", "A", "c", made_pages.still(tmp_path, "a"), "a.svg")
    parsed = Parsed(as_html(Page("t", "", (), [Section("Same name", blocks=[picture, picture]), Section("same-name"), Section("!!"), Section("??")], {})))
    assert len(parsed.ids) == len(set(parsed.ids)) and parsed.tags.count("section") == 4


def test_links_lead_beside_the_page_and_nowhere_else():
    sheet = Section("s", blocks=[Sheet("t", ("run", "page"), [["a", "its page"]])])
    page = Page("t", "", (), [sheet], {}, {"its page": "3_tiny/report.html"})
    assert '<a href="3_tiny/report.html">its page</a>' in as_html(page) and "[its page](3_tiny/report.html)" in as_markdown(page)
    for wrong in ("http://example.org", "javascript:alert(1)", "//example.org/a", "/etc/passwd", 'a" onclick="b', "a b", ""):
        with pytest.raises(InputError, match="relative to the page"):
            as_html(Page("t", "", (), [sheet], {}, {"its page": wrong}))


def test_texts_are_made_visible():
    assert shown("a\r\nb\u2028c\td") == "a\nb\nc\td" and plain("a\n b\tc") == "a b c"
    assert plain("x" * 30, 10) == "x" * 10 + " … (20 more characters are left out here)"
    assert shown("نص עברית 日本 é ñ 👍 …") == "نص עברית 日本 é ñ 👍 …"


# ── Charts ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", made_pages.CHARTS)
def test_every_chart_compiles_and_draws_its_rows(kind):
    vl_convert = pytest.importorskip("vl_convert")
    chart, rows = made_pages.CHARTS[kind]
    spec = vega_lite(chart, rows, "a title")
    drawn = vl_convert.vegalite_to_svg(spec)
    marks = {"line": "mark-symbol", "points": "mark-symbol", "bars": "mark-symbol" if chart.lying else "mark-rect", "heat": "mark-rect"}[chart.kind]
    groups = re.findall(rf'class="{marks} role-mark[^"]*"[^>]*>(.*?)</g>', drawn, re.DOTALL)
    picks = len({row[chart.pick] for row in rows}) if chart.pick else 1
    assert sum(group.count("<path") for group in groups) >= len(rows) // picks
    assert json.loads(json.dumps(spec, allow_nan=False)) == spec and vega_lite(chart, rows, "a title") == spec


def test_hostile_columns_and_names_reach_no_expression():
    nasty = "a.b['c\\'] + alert(1) //\u2028"
    rows = [{nasty: x, "y\"']": 0.5, nasty + "s": nasty, "p": nasty + str(x)} for x in range(3)]
    spec = vega_lite(Chart("line", nasty, "y\"']", "", "", nasty + "s", panel="p", lines=(Line(0.2, nasty),)), rows, nasty)
    expressions = json.dumps([spec.get("transform"), *(layer.get("transform") for layer in spec["spec"]["layer"])])
    assert "alert" not in expressions
    pytest.importorskip("vl_convert").vegalite_to_vega(spec)


def test_hovering_tells_series_place_value_interval_and_n():
    chart, rows = made_pages.CHARTS["line"]
    spec = vega_lite(chart, rows, "t")
    value = spec["data"]["values"][0]
    assert (value["series"], value["x_told"], value["told"], value["interval"], value["n"]) == ("+ harmfulness", "0", "0.5", "0.345 to 0.655", "40")
    assert [one["title"] for one in spec["layer"][-1]["encoding"]["tooltip"]] == [
        "direction",
        "layer",
        "share of harmless prompts refused",
        "95% interval",
        "n",
    ]


def test_numbers_of_a_csv_are_numbers_and_gaps_stay_gaps():
    rows = [{"x": "1", "y": "0.5", "n": "3"}, {"x": "2", "y": "", "n": ""}, {"x": "3", "y": "nan", "n": "4"}, {"x": "4.5", "y": float("nan"), "n": None}]
    values = vega_lite(Chart("line", "x", "y", "", ""), rows, "t")["data"]["values"]
    assert [value["x"] for value in values] == [1, 2, 3, 4.5] and [value["y"] for value in values] == [0.5, None, None, None]


def test_colours_are_the_charts_own_and_stand_out_from_a_dark_page():
    chart, rows = made_pages.CHARTS["line in panels"]
    spec = vega_lite(chart, rows, "t")
    assert spec["config"]["range"]["category"] == list(made_pages.COLOURS.values()) and spec["usermeta"]["panels"] == 4
    assert on_dark("#000000") != "#000000" and all(re.fullmatch("#[0-9a-f]{6}", on_dark(colour)) for colour in PALETTE)


def test_references_stand_in_their_own_panel():
    chart, rows = made_pages.CHARTS["lying"]
    told = [(value["panel"], value["at"]) for value in vega_lite(chart, rows, "t")["data"]["values"] if "line" in value]
    assert told == [("metric 1", 0), ("metric 2", 0), ("metric 2", 0.4)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Chart("line", "z", "y", "", ""), "'z'"),
        (Chart("line", "x", "y", "", "", "gone"), "'gone'"),
        (Chart("heat", "x", "y", "", ""), "needs `value`"),
        (Chart("line", "x", "y", "", "", "s", colours={"a": "red; x"}), "#0072B2"),
    ],
)
def test_a_chart_that_does_not_fit_its_rows_is_refused(wrong, said):
    with pytest.raises(InputError, match=re.escape(said)):
        vega_lite(wrong, [{"x": 1, "y": 2, "s": "a"}], "a title")


def test_facts_and_texts_are_escaped():
    html = as_html(Page("<b>", "<i>", ("<u>",), [Section("<s>", "<p>", "<q>", ("<c>",), "<l>", [Facts("<f>", [("<k>", "<v>")]), "<t>"])], {}))
    for letter in "biuspqclfkvt":
        assert f"&lt;{letter}&gt;" in html and f"<{letter}>" not in html.replace("<p>This page", "").replace("<b>Figure", "")

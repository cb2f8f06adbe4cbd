"""The page of a whole run: complete, self-contained, escaped, without replies, and beside the paper's own numbers."""

import csv
import re
from html.parser import HTMLParser
from statistics import mean

import pytest
from matplotlib.figure import Figure

from latentguard import published
from latentguard.errors import InputError
from latentguard.metrics import wilson
from latentguard.report import EFFECTS, PAPER, write_page
from latentguard.trackers import Files

SENTINEL = "SENTINELxREPLYx90210"
NASTY = "0.2 < 0.3 & <script>alert('x')</script> | *b* `c` \u202e \udcff"
VOID = {"meta", "img"}


class Parsed(HTMLParser):
    """What a browser would see: texts, links, images, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.links, self.rows = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1].append(data.strip())

    @property
    def text(self):
        return " ".join("".join(self.texts).split())


def figure(tracker, name, data, **about):
    drawn = Figure(figsize=(3, 2))
    drawn.subplots().plot([1, 2])
    tracker.figure(name, drawn, data, **about)


def effect(number, verdict="holds", **about):
    return {"effect": number, "verdict": verdict, "number": 0.62, "low": 0.47, "high": 0.76, "n": 40, "why": "measured", **about}


def summary(study, **about):
    return {"study": study, "status": "ok", "claim": f"{study} claims 0.5.", "table": [], "figures": [], "effects": [], "poles": "behaviour", **about}


@pytest.fixture
def run(tmp_path):
    """A run's folder with two figures, one of replies, and a function that writes and parses the page."""
    with Files(tmp_path) as tracker:
        figure(tracker, "rates", [{"layer": 1, "rate": 0.5}])
        figure(tracker, "said", [{"prompt": "p", "harm": SENTINEL, "harm_verdict": "refused"}], replies=True)

    def write(studies):
        page = write_page(tmp_path, "tiny", studies)
        assert page == tmp_path / "paper.html"
        parsed = Parsed(page.read_text(encoding="utf-8"))
        assert parsed.open == []
        return parsed, (tmp_path / "paper.md").read_text(encoding="utf-8")

    write.folder = tmp_path
    return write


def test_every_effect_has_a_verdict_and_none_goes_untold(run):
    skipped = {"study": "finetune_attack", "status": "skipped", "why": "left out by default"}
    parsed, _ = run(
        {"suffix": summary("suffix", effects=[effect(1)]), "again": summary("suffix", effects=[effect(1, "does not hold")]), "finetune_attack": skipped}
    )
    rows = {}
    for row in parsed.rows:
        if row and row[0].isdigit() and len(row) == 6 and row[1] == EFFECTS[int(row[0])][0]:
            rows.setdefault(int(row[0]), []).append(row)
    assert set(rows) == set(range(1, 15))
    assert [row[2] for row in rows[1]] == ["✓ holds", "✗ does not hold"] and rows[1][0][3] == "0.62 [0.47, 0.76] (n = 40)"
    assert "(again)" in rows[1][1][4]
    assert all(rows[i][0][2] == "– not testable here" for i in range(2, 15))
    assert "left out by default" in rows[13][0][4] and "jailbreaks" in rows[12][0][4]
    assert "1 hold, 1 do not hold, 13 not testable here" in parsed.text


def test_the_page_holds_all_it_shows(run):
    parsed, markdown = run({name: summary(name, figures=["rates"]) for name in PAPER})
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in parsed.links)
    assert parsed.tags.count("img") == len(PAPER) + sum(bool(drawn) for _, drawn, _ in PAPER.values())
    assert "http" not in parsed.text
    linked = re.findall(r"\]\(([^)]+)\)", markdown)
    assert len(linked) == parsed.tags.count("img") and all((run.folder / path).is_file() for path in linked)


def test_texts_are_escaped_in_both(run):
    parsed, markdown = run({NASTY: summary("suffix", claim=NASTY, table=[{NASTY: NASTY, "rate": 0.5}], effects=[effect(1, why=NASTY)])})
    seen = "0.2 < 0.3 & <script>alert('x')</script> | *b* `c`"
    assert parsed.text.count(seen) >= 5 and "script" not in parsed.tags
    assert "<script" not in markdown and r"\*b\* \`c\`" in markdown
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, "every row has its header's columns"


def test_what_the_model_said_is_never_there(run):
    parsed, markdown = run({"suffix": summary("suffix", figures=["rates", "said"])})
    assert parsed.tags.count("img") == 1 and "said shows what the model said" in parsed.text
    assert SENTINEL not in parsed.text and "said.png)" not in markdown
    for column in ("reply", "harm_verdict"):
        with pytest.raises(InputError, match=column):
            run({"suffix": summary("suffix", table=[{column: SENTINEL}])})


def test_a_figure_without_its_data_is_named_not_shown(run):
    (run.folder / "figures" / "rates.csv").unlink()
    parsed, _ = run({"suffix": summary("suffix", figures=["rates", "lost"])})
    assert "img" not in parsed.tags and "Figure rates is missing" in parsed.text and "Figure lost is missing" in parsed.text


def test_withheld_skipped_and_failed_studies_say_so(run):
    parsed, markdown = run(
        {
            "jailbreaks": summary("jailbreaks", status="insufficient_base_rate", poles="label", effects=[effect(12, "not testable here")]),
            "finetune_attack": {"status": "skipped", "why": "left out by default"},
            "ablate_refusal": {"status": "failed", "why": "no direction passed"},
        }
    )
    for text in ("claim withheld: too few prompts in a cell", "poles by label", "– skipped", "left out by default", "✗ failed", "no direction passed"):
        assert text in parsed.text
    assert "**claim withheld" in markdown
    assert any("measured; poles by label (jailbreaks)" in row for row in parsed.rows)


def test_rates_carry_their_interval_and_n(run):
    rows = [{"set": "a", "layer": 3, **wilson(7, 12).as_dict()}, {"set": "b", "layer": -1, **wilson(0, 0).as_dict()}]
    parsed, _ = run({"latent_guard": summary("latent_guard", table=rows)})
    assert ["a", "3", "0.58 [0.32, 0.81]", "12"] in parsed.rows and ["b", "−1", "—", "0"] in parsed.rows


def test_the_papers_side_shows_its_numbers(run):
    parsed, _ = run({name: summary(name) for name in PAPER})
    assert ["Llama-3", "96.0", "58.9"] in parsed.rows
    assert ["Llama-2", "Latent Guard", "100.0", "41.6 (10/24)", "100.0", "100.0", "93.9 (31/33)"] in parsed.rows
    assert ["accepted harmful", "0", "0.025", "0.036", "0.046"] in parsed.rows
    assert ["hate", "0.60", "0.89", "0.68", "0.93", "0.81", "0.95"] in parsed.rows
    assert ["template", "0.097", "−0.075", "100", "27"] in [row[1:] for row in parsed.rows]
    for name, figures in {"steering": ("4", "8"), "inversion": ("5", "10", "11", "12"), "positions": ("16",), "fine_tuning": ("18",)}.items():
        with (run.folder / "figures" / f"paper_{name}.csv").open(newline="") as file:
            drawn = list(csv.DictReader(file))
        wanted = [curve for number in figures for curve in published.curves(number)]
        assert sorted(float(row["rate"]) for row in drawn) == sorted(value / 100 for curve in wanted for value in curve.values)


def test_the_papers_numbers_in_the_table_of_effects_are_published_ones():
    known = {round(abs(v), 3) for name in published.tables() for row in published.table(name).rows for v in row.values() if isinstance(v, int | float)}
    known |= {value for number in published.figures() for curve in published.curves(number) for value in curve.values}
    rows = published.table("fig9a").rows
    known |= {
        round(mean(r["value"] for r in rows if (r["model"], r["direction"]) == (model, kind)) + 1e-9, 2)
        for model in published.models()
        for kind in ("harm", "refuse")
    }
    known |= {0.02, 50, 400}  # the spread of Fig. 7's curves, which stands in that table's note
    for _, printed, _ in EFFECTS.values():
        for number in re.findall(r"\d+(?:\.\d+)?", re.sub(r"Llama-\d|Qwen2", "", printed)):
            assert float(number) in known, f"{number} of {printed!r} is not in published.json"


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "fine"},
        {"claim": ""},
        {"status": "skipped"},
        {"effects": [effect(15)]},
        {"effects": [effect(1, "maybe")]},
    ],
)
def test_a_summary_that_breaks_the_contract_is_refused(run, wrong):
    with pytest.raises(InputError, match="study suffix"):
        run({"suffix": summary("suffix", **wrong)})

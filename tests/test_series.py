"""Several studies in a row: one that fails stops no other, and nothing of one is written over another's. And the model that never refuses."""

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from matplotlib.figure import Figure

from latentguard.datasets import load_dataset
from latentguard.directions import Direction, mean_difference
from latentguard.errors import InputError
from latentguard.experiments.beliefs import Beliefs
from latentguard.experiments.categories import Categories
from latentguard.experiments.detect import Detect
from latentguard.experiments.final_token import FinalToken
from latentguard.experiments.invert import Invert
from latentguard.experiments.separate import Separate
from latentguard.experiments.series import Series
from latentguard.experiments.suffix import Suffix
from latentguard.judges import Phrases
from latentguard.roles import Casting
from latentguard.trackers import Files, Memory
from tests.headlines import tells_its_headline
from tests.planted import DEPTH, Planted, dataset_of, everything, never, refuses_some, rows_of, write


@dataclass(frozen=True)
class Toy:
    """A study in miniature: a row, a figure, a direction, a sentence; `does` may look around or fail."""

    figures: tuple[str, ...] = ("found",)
    does: Callable = lambda: None
    refuses: str = ""
    seen: list = field(default_factory=list)

    def check(self, n_layers, data):
        if self.refuses:
            raise InputError(self.refuses)

    def __call__(self, backend, data, judge, tracker):
        self.seen.append(self.does())
        tracker.rows([{"stage": "toy", "value": len(self.seen)}])
        for name in self.figures:
            tracker.figure(name, Figure(), [{"drawn": id(self)}])
        tracker.direction(a_direction())
        return {"study": "toy", "status": "ok", "claim": "found", "figures": list(self.figures), "table": [], "effects": [], "poles": "label"}


def a_direction() -> Direction:
    data = list(dataset_of(rows_of("harmful", 10)))
    return mean_difference(Planted().read(data, "all", ["t_inst"]), data[:5], data[5:], position="t_inst", name="harm")


def fail(text):
    def does():
        raise InputError(text)

    return does


def crash():
    raise KeyError("a fault of ours")


def run(studies, tracker=None, **settings):
    tracker = tracker or Memory()
    data = dataset_of(rows_of("harmful", 10))
    return Series(name="paper", studies=studies, **settings)(Planted(), data, Phrases(), tracker), tracker


def test_a_study_that_fails_stops_no_other():
    last = Toy()
    summary, tracker = run({"one": Toy(), "two": Toy(does=fail("no such thing here")), "three": last})
    assert {name: found["status"] for name, found in summary["studies"].items()} == {"one": "ok", "two": "failed", "three": "ok"}
    assert summary["studies"]["two"]["why"] == "no such thing here" and len(last.seen) == 1
    assert "2 of 3 studies ran" in summary["claim"] and "two failed: no such thing here" in summary["claim"]
    assert tracker.summaries["studies"].keys() == {"one", "two", "three"}


def test_a_fault_of_ours_is_not_hidden():
    with pytest.raises(KeyError):
        run({"one": Toy(does=crash), "two": Toy()})


def test_what_was_found_is_kept_before_the_next_begins():
    tracker = Memory()
    look = Toy(does=lambda: dict(tracker.summaries.get("studies", {})))
    run({"one": Toy(), "two": look}, tracker)
    assert look.seen[0].keys() == {"one"} and look.seen[0]["one"]["claim"] == "found"


def test_skipped_studies_and_those_that_cannot_run_are_said():
    skipped, unable = Toy(), Toy(refuses="data hand lacks a set")
    summary, _ = run({"one": Toy(), "two": skipped, "three": unable}, skip=("two",))
    assert not skipped.seen and not unable.seen
    assert [summary["studies"][name]["status"] for name in ("one", "two", "three")] == ["ok", "skipped", "skipped"]
    assert "exp.skip" in summary["studies"]["two"]["why"] and summary["studies"]["three"]["why"] == "data hand lacks a set"
    with pytest.raises(ValueError, match="'four' is none of one"):
        Series(name="paper", studies={"one": Toy()}, skip=("four",))
    with pytest.raises(ValueError, match="name at least one"):
        Series(name="paper", studies={})


def test_check_refuses_only_what_no_study_can_run_on():
    data = dataset_of(rows_of("harmful", 10))
    Series(name="p", studies={"one": Toy(), "two": Toy(refuses="lacks a set")}).check(DEPTH, data)
    with pytest.raises(InputError, match="lacks a set"):
        Series(name="p", studies={"one": Toy(refuses="lacks a set"), "two": Toy(refuses="too")}).check(DEPTH, data)


@pytest.mark.parametrize(
    ("names", "figures"),
    [
        (("one", "two"), ("found",)),
        (("steer_harm", "steer_refusal"), ("refusal_by_layer", "replies")),
        (("beliefs", "jailbreaks"), ("beliefs", "beliefs_more")),
        (("cat", "categories"), ("categories", "categories_transfer")),
        (("f", "fo"), ("found",)),
    ],
)
def test_names_of_figures_and_directions_are_kept_apart(names, figures):
    studies = {name: Toy(figures=figures) for name in names}
    summary, tracker = run(studies)
    named = [name for found in summary["studies"].values() for name in found["figures"]]
    assert len(set(named)) == len(named) == len(names) * len(figures) and set(named) == set(tracker.figures)
    for name, study in studies.items():
        assert [tracker.figures[f][0]["drawn"] for f in summary["studies"][name]["figures"]] == [id(study)] * len(figures)
    assert sorted(d.name for d in tracker.directions) == sorted(f"{name}_harm" for name in names)
    assert [row["study"] for row in tracker.all_rows] == list(names)


def test_the_page_is_there_after_the_first_study_and_grows(tmp_path):
    page = tmp_path / "report.html"
    look = Toy(does=lambda: page.read_text() if page.exists() else None)
    with Files(tmp_path) as tracker:
        run({"suffix": look, "clusters": look, "beliefs": Toy()}, tracker)
    assert look.seen[0] is None and "suffix" in look.seen[1]
    assert page.stat().st_size > len(look.seen[1]) and (tmp_path / "report.md").exists()
    assert (tmp_path / "figures" / "suffix_found.png").exists() and (tmp_path / "directions" / "beliefs_harm.safetensors").exists()


def test_a_page_that_cannot_be_written_stops_no_study(tmp_path, caplog):
    class NoPage(Memory):
        def page(self, write):
            raise InputError("there is no room")

    summary, _ = run({"one": Toy(), "two": Toy()}, NoPage())
    assert "2 of 2 studies ran" in summary["claim"] and caplog.text.count("report.html is not written: there is no room") == 2


def test_no_page_where_none_is_asked_for(tmp_path):
    with Files(tmp_path) as tracker:
        run({"suffix": Toy()}, tracker, page=False)
    assert not (tmp_path / "report.html").exists() and (tmp_path / "summary.json").exists()


# ── every verb, on models at the ends ──

CASTING = Casting(n_poles=36, n_test=36, n_validation=10)
VERBS = {
    "suffix": Suffix(n_test=12),
    "clusters": Separate(casting=CASTING, shuffles=2),
    "positions": Separate(show="positions", positions=("t_inst", "t_post_inst"), casting=CASTING, shuffles=2),
    "beliefs": Beliefs(casting=CASTING),
    "jailbreaks": Beliefs(jailbreaks=("template",), casting=CASTING),
    "latent_guard": Detect(casting=CASTING),
    "inversion": Invert(questions=("Is it harmful?",), layers=(2, 4), n_test=6, n_validation=3, n_extract=3, extract=("t_inst",), casting=CASTING),
    "categories": Categories(n_category=12, n_test=6, n_harmless=30, shuffles=2, window=(0.3, 0.7)),
    "final_token": FinalToken(positions=("t_inst", "t_post_inst"), n_fit=20, n_validation=10, n_test=12, shuffles=2),
}
NO_BEHAVIOUR = ("categories", "final_token")  # their poles are labels on any model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verbs")
    far = [{**row, "prompt": f"Far off: {row['prompt']}", "category": "abc"[k % 3]} for k, row in enumerate(rows_of("harmful", 100, "far"))]
    near = [{**row, "prompt": f"Story: {row['prompt']}"} for row in rows_of("harmful", 100, "template")]
    roles = {"categories": (write(folder / "far.jsonl", far),), "template": (write(folder / "template.jsonl", near),)}
    return load_dataset(write(folder / "main.jsonl", everything()), roles=roles)


def all_of_them(data, tracker, refuses):
    """Every verb in one series."""
    return Series(name="paper", studies=VERBS)(Planted(refuses=refuses), data, Phrases(), tracker)


@pytest.fixture(scope="module")
def silent(data, tmp_path_factory):
    """A model that never refuses; the pictures are left blank, since what is checked here is words and numbers."""
    folder = tmp_path_factory.mktemp("never")
    blank = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 400, 300)
    with pytest.MonkeyPatch.context() as patch, Files(folder) as tracker:
        patch.setattr(Figure, "savefig", lambda self, path, **_: path.write_bytes(blank))
        return all_of_them(data, tracker, never), folder


@pytest.mark.parametrize("verb", VERBS)
def test_a_model_that_never_refuses_is_said_and_crashes_nothing(silent, verb):
    found = silent[0]["studies"][verb]
    if verb in NO_BEHAVIOUR:
        assert (found["status"], found["poles"]) == ("ok", "label")
        return
    assert found["status"] == "insufficient_base_rate"
    assert "withheld" in found["claim"] or "poles by label" in found["claim"]
    assert all(row["verdict"] == "not testable here" for row in found["effects"] if row["effect"] in (1, 2, 3, 4, 5, 12))
    assert verb == "suffix" or found["poles"] == "label"


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_claim_rests_on_is_there_in_numbers(silent, verb):
    summary = silent[0]["studies"][verb]
    tells_its_headline(summary)
    assert silent[0]["headlines"][verb] == summary["headline"]


def test_a_series_counts_the_effects_that_hold(data):
    effects = [{"effect": i, "verdict": verdict} for i, verdict in enumerate(("holds", "does not hold", "not testable here", "holds"), 1)]
    told = {"metric": "m", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "better": None, "withheld": False}

    class Found(Toy):
        def __call__(self, *given):
            return {**super().__call__(*given), "effects": effects, "headline": told}

    summary, _ = run({"one": Found(), "two": Toy(), "three": Toy(does=fail("no"))})
    assert (summary["headline"]["value"], summary["headline"]["n"]) == (2, 3) and "2 holds, 1 does not hold, 1 not testable here" in summary["claim"]
    assert summary["headlines"] == {"one": told}
    nothing, _ = run({"one": Toy()})
    assert math.isnan(nothing["headline"]["value"]) and nothing["headline"]["n"] == 0


def test_time_left_is_said_once_there_is_something_to_tell_it_from(caplog):
    caplog.set_level("INFO")
    run({"one": Toy(), "two": Toy(refuses="lacks a set"), "three": Toy(), "four": Toy()})
    begins = [line for record in caplog.records for line in record.getMessage().splitlines() if line.startswith("[")]
    assert begins[0] == "[1/3] one" and [line.split()[:2] for line in begins[1:]] == [["[2/3]", "three"], ["[3/3]", "four"]]
    assert all("so far, about 1 s left at this pace" in line for line in begins[1:])


def test_a_model_that_never_refuses_is_told_of_in_the_series_too(silent):
    assert f"{len(VERBS)} of {len(VERBS)} studies ran" in silent[0]["claim"]


def test_the_page_of_every_verb_is_readable(silent):
    text = (silent[1] / "report.md").read_text()
    for verb in VERBS:
        assert f"{verb}" in text
    odd = [line for line in text.splitlines() if "{'" in line or re.search(r"\bnan\b", line)]
    assert not odd, "no Python and no NaN on a page for people"
    assert "claim withheld" in text


@pytest.mark.parametrize("refuses", [lambda _: True, refuses_some(3, 0, 0)], ids=["everything", "three in ten"])
def test_other_extremes_crash_nothing(data, refuses):
    summary = all_of_them(data, Memory(), refuses)
    assert {found["status"] for found in summary["studies"].values()} <= {"ok", "insufficient_base_rate"}
    assert not [name for name, found in summary["studies"].items() if "nan" in str(found["claim"]).split()]
    for found in summary["studies"].values():
        tells_its_headline(found)

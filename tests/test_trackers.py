"""What a run leaves in its folder. W&B: tests/test_wandb.py."""

import json

import pytest
import torch
from matplotlib.figure import Figure

from latentguard.charts import Chart, Line, Plot
from latentguard.directions import Direction
from latentguard.trackers import Files, Memory, Within

ROW = {
    "prompt_id": "p1",
    "prompt": "a question",
    "label": "harmful",
    "layer": 3,
    "coef": 2.0,
    "reply": "I say so",
    "verdict": "accepted",
    "rule": "never acceptable: so",
}


def a_figure():
    figure = Figure()
    figure.subplots().plot([1, 2])
    return figure


def test_files_are_whole_and_in_place(tmp_path):
    with Files(tmp_path) as tracker:
        tracker.rows([ROW, {**ROW, "reply": "line\nbreak \udcff", "score": float("nan")}])
        assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2, "rows are there as they come"
        tracker.figure("f", a_figure(), [{"x": 1}, {"x": 2, "y": 3}])
        tracker.summary({"a": {"b": float("inf"), "c": 1}})
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[0] == ROW and rows[1]["score"] is None
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": {"b": None, "c": 1}}
    starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    assert all((tmp_path / "figures" / f"f.{kind}").read_bytes().startswith(start) for kind, start in starts.items())
    assert (tmp_path / "figures" / "f.csv").read_text().splitlines() == ["x,y", "1,", "2,3"]


def test_the_index_of_figures_tells_what_they_show(tmp_path):
    chart = Chart("line", "layer", "rate", "Layer", "Rate", series="direction", lines=(Line(0.5, "none"),))
    bare = a_figure()
    bare.suptitle("of\nlayers")
    with Files(tmp_path) as tracker:
        tracker.figure("old", a_figure(), [])
    with Files(tmp_path) as tracker:
        tracker.figure("plot", Plot(a_figure(), "a title", "a caption", chart), [{"layer": 1, "rate": 0.5}])
        tracker.figure("bare", bare, [], replies=True)
    told = json.loads((tmp_path / "figures" / "index.json").read_text())
    assert set(told) == {"plot", "bare"}, "another attempt's figures are not listed"
    assert Chart.from_dict(told["plot"].pop("chart")) == chart
    assert told == {
        "plot": {"title": "a title", "caption": "a caption", "replies": False},
        "bare": {"title": "of layers", "caption": "", "replies": True, "chart": None},
    }
    assert not list((tmp_path / "figures").glob(".*")), "nothing is left half written"


def test_lineage_tells_what_was_used_and_what_was_made(tmp_path):
    with Files(tmp_path / "one") as tracker:
        tracker.used("dataset", "built/in", {"hash": "h", "ids": ["a"] * 200})
        tracker.direction(a_direction())
    made = tmp_path / "one" / "directions" / "harm.safetensors"
    with Files(tmp_path / "two") as tracker:
        Within(tracker, "study").used("direction", "m-harm", {}, made)
        (tmp_path / "two" / "guard.bin").write_bytes(b"weights")
        Within(tracker, "study").artifact("guard", "g", tmp_path / "two" / "guard.bin", {"layer": 3})
    one, two = (json.loads((tmp_path / name / "lineage.json").read_text()) for name in ("one", "two"))
    assert json.loads((tmp_path / "one" / one["used"][0]["file"]).read_text())["ids"] == ["a"] * 200
    assert one["used"][0]["metadata"] == {"hash": "h"} and one["used"][0]["file"] == "lineage/dataset-built-in.json"
    assert [two["used"][0][key] for key in ("kind", "name", "sha256")] == [one["made"][0][key] for key in ("kind", "name", "sha256")]
    assert (two["made"][0]["name"], two["made"][0]["file"], two["made"][0]["metadata"]) == ("study_g", "guard.bin", {"layer": 3})


def a_direction(name="harm"):
    vectors = torch.ones(2, 3)
    return Direction(vectors, (0, 1), "t_inst", "mean_difference", "m", "w", 1, 4, 4, "d", torch.ones(2), name)


def test_a_study_within_a_series_signs_its_rows_and_names():
    tracker = Memory()
    for study in ("steer_harm", "steer_refusal"):
        part = Within(tracker, study)
        part.rows([{"value": 1}, {"value": 2, "prompt_id": "p"}])
        part.figure("by_layer", a_figure(), [{"of": study}])
        part.direction(a_direction())
        part.summary({"claim": study})
        part.page(lambda folder: folder)
    assert [(row["study"], row["value"]) for row in tracker.all_rows] == [(s, v) for s in ("steer_harm", "steer_refusal") for v in (1, 2)]
    assert tracker.figures == {f"{study}_by_layer": [{"of": study}] for study in ("steer_harm", "steer_refusal")}
    assert [d.name for d in tracker.directions] == ["steer_harm_harm", "steer_refusal_harm"]
    assert tracker.summaries == {}, "the series writes one for all"


def test_a_figure_that_bears_the_studys_name_keeps_it():
    part = Within(Memory(), "beliefs")
    assert [part.named(name) for name in ("beliefs", "beliefs_more", "replies")] == ["beliefs", "beliefs_more", "beliefs_replies"]


@pytest.mark.parametrize(("first", "second", "figure"), [("cat", "categories", "categories"), ("be", "bel", "beliefs"), ("a", "b", "a_b")])
def test_two_studies_never_give_a_figure_one_name(first, second, figure):
    assert Within(Memory(), first).named(figure) != Within(Memory(), second).named(figure)


def test_a_study_within_a_series_within_a_series_signs_with_both_names():
    tracker = Memory()
    Within(Within(tracker, "positions"), "separation").rows([{"value": 1}])
    (row,) = tracker.all_rows
    assert row["study"] == "positions/separation"


def test_a_page_is_written_into_the_runs_folder(tmp_path):
    def write(folder):
        (folder / "page.html").write_text("hello")
        return folder / "page.html"

    with Files(tmp_path / "run") as tracker:
        tracker.page(write)
    assert (tmp_path / "run" / "page.html").read_text() == "hello"
    Memory().page(lambda _: pytest.fail("there is no folder to write into"))


def test_figures_of_replies_stay_marked_within_a_series():
    seen = []

    class Marks(Memory):
        def figure(self, name, figure, data, *, replies=False):
            seen.append((name, replies))

    part = Within(Marks(), "steer_harm")
    part.figure("replies", a_figure(), [], replies=True)
    part.figure("rates", a_figure(), [])
    assert seen == [("steer_harm_replies", True), ("steer_harm_rates", False)]

"""What a run leaves, here and on W&B; what the model said stays here."""

import json
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

from latentguard.directions import Direction
from latentguard.trackers import Files, Memory, Wandb, Within

SENTINEL = "SENTINELxREPLYx90210"
ROW = {
    "prompt_id": "p1",
    "prompt": "a question",
    "label": "harmful",
    "layer": 3,
    "coef": 2.0,
    "reply": f"I say {SENTINEL}",
    "verdict": "accepted",
    "rule": f"never acceptable: {SENTINEL} is never acceptable",
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
    assert (tmp_path / "figures" / "f.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figures" / "f.csv").read_text().splitlines() == ["x,y", "1,", "2,3"]


def offline_run(folder, generations):
    with Wandb(folder, config={"model": "tiny"}, name="n", job_type="steer_harm", mode="offline", generations=generations) as tracker:
        print("a printed line with", SENTINEL)
        tracker.rows([ROW, {**ROW, "label": "harmless"}])
        tracker.figure("replies", a_figure(), [{"reply": SENTINEL}], replies=True)
        tracker.figure("rates", a_figure(), [{"x": 1}])
        tracker.summary({"claim": "c", "rate": {"n": 2, "rate": 0.5}, "grid": [1, 2]})
    return folder / "wandb"


def holding(folder, word):
    return [path.name for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


@pytest.fixture
def staging(tmp_path, monkeypatch):
    """W&B's own staging folders, inside the test's."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


def test_no_reply_leaves_the_machine_by_default(staging):
    folder = offline_run(staging / "run", "verdicts")
    assert holding(folder, "rates"), "the run was recorded"
    assert not holding(folder, SENTINEL)
    assert holding(staging, SENTINEL) == ["replies.csv", "rows.jsonl"] or set(holding(staging, SENTINEL)) == {"rows.jsonl", "replies.csv"}


def test_replies_go_when_asked_for(staging):
    assert holding(offline_run(staging / "run", "full"), SENTINEL)


def test_an_offline_run_reads_back(staging):
    folder = offline_run(staging / "run", "verdicts")
    log = next(folder.rglob("run-*.wandb"))
    read = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(log)], capture_output=True, text=True)
    if read.returncode:
        pytest.skip(f"wandb leet is not to be had here: {read.stderr[:100]}")
    text = read.stdout
    assert '"claim"' in text or "claim" in text
    assert "rate/n" in text and "tiny" in text


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

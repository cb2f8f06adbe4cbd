"""W&B's copy of a run: what is in it, what never is, and that no fault of W&B's reaches an experiment."""

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest
from matplotlib.figure import Figure

from latentguard.charts import Chart, Plot
from latentguard.errors import InputError
from latentguard.trackers import Wandb, native, online
from tests.recording import Record, holding, records, wandb
from tests.test_trackers import a_direction
from tests.wandb_server import WandbServer

SENTINEL = "SENTINELxREPLYx90210"
SAYING = f"I say {SENTINEL}"
ROW = {
    "prompt_id": "p1",
    "prompt": "a question",
    "label": "harmful",
    "category": "c",
    "intervention": "harm",
    "layer": 3,
    "coef": 2.0,
    "position": "t_inst",
    "reply": SAYING,
    "verdict": "accepted",
    "rule": f"never acceptable: {SENTINEL}",
    "score": 0.5,
    "note": SENTINEL,
}
CURVE = [{"layer": layer, "rate": layer / 4, "low": 0.0, "high": 1.0, "n": 9, "by": by, "said": SENTINEL} for by in ("harm", "random") for layer in (2, 0, 1)]
BARS = [{"by": by, "group": group, "rate": 0.5, "low": 0.2, "high": 0.9, "n": 9, "said": SENTINEL} for by in ("a", "b") for group in ("x", "y")]


def plot(kind="line", x="layer", **more):
    figure = Figure()
    figure.subplots().plot([1, 2])
    return Plot(figure, "a title", "a caption", Chart(kind, x, "rate", "Layer", "Rate", series="by", **more))


def experiment(tracker):
    """All verbs, with what the model said wherever it may slip through."""
    print("a printed line with", SENTINEL)
    logging.getLogger("latentguard").warning("a logged line with %s", SENTINEL)
    tracker.used("dataset", "built-in", {"hash": "h", "counts": {"train": 1}, "ids": {"train": ["p1"] * 300}})
    tracker.used("model", "tiny", {"weights": "w"})
    tracker.rows([ROW, {**ROW, "label": "harmless", "layer": "all", "score": None}, {"stage": "selection", "score": 1.0}])
    tracker.direction(a_direction())
    tracker.figure("replies", plot(), [{"reply": SENTINEL}], replies=True)
    tracker.figure("by_layer", plot(), CURVE)
    tracker.figure("bars", plot("bars", "group"), BARS)
    headline = {"metric": "refusal", "value": 0.5, "low": 0.25, "high": 0.75, "n": 2}
    tracker.summary({"claim": "c", "rate": {"n": 2}, "grid": [1, 2], "headline": headline})


def run(folder, act=experiment, **settings):
    told = {
        "config": {"model": "tiny", "seed": 1, "cfg": {"exp": {"n": 3}}},
        "name": "a name",
        "group": "a sweep",
        "job_type": "steer_harm",
        "tags": ["t", "t"],
    }
    tracker = Wandb(folder, **{**told, "mode": "offline", "patience": 20, **settings})
    with tracker:
        act(tracker)
    return tracker


@pytest.fixture(autouse=True)
def staging(tmp_path, monkeypatch):
    """W&B's own folders inside the test's, and no memory of a server that was away."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setitem(online._away, "since", float("-inf"))


@pytest.fixture
def server(monkeypatch):
    with WandbServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


def whole(folder):
    """Whether a run's own folder holds all of it."""
    kept = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return len(kept) == 3 and kept[0] == ROW and (folder / "summary.json").is_file() and (folder / "figures" / "by_layer.png").is_file()


def test_an_offline_run_reads_back(tmp_path):
    record = Record(run(tmp_path / "run").record)
    told, summary = record.told, record.told["summary"]
    assert {key: told["config"][key] for key in ("model", "seed", "cfg")} == {"model": "tiny", "seed": 1, "cfg": {"exp": {"n": 3}}}
    assert (record.run["run_group"], record.run["job_type"], told["tags"], told["name"]) == ("a sweep", "steer_harm", ["t"], "a name")
    assert (told["state"], told["exit_code"], summary["claim"], summary["rate/n"]) == ("finished", 0, "c", 2)
    assert [summary[f"headline/{key}"] for key in ("metric", "value", "low", "high", "n")] == ["refusal", 0.5, 0.25, 0.75, 2]
    assert [row["label"] for row in record.table] == ["harmful", "harmless"], "rows without a verdict are no generations"
    assert {"prompt", "label", "category", "intervention", "layer", "coef", "position", "verdict", "score"} <= set(record.table[0])
    curve = [row for row in record.history if "by_layer/harm" in row]
    assert [(row["layer"], row["by_layer/harm"], row["by_layer/random"]) for row in curve] == [(0, 0, 0), (1, 0.25, 0.25), (2, 0.5, 0.5)]
    assert curve[0]["intervals/by_layer/harm/high"] == 1 and "by_layer/harm" not in summary
    assert record.metrics["by_layer/*"]["step_metric"] == "layer"
    assert {"figures/by_layer", "charts/bars_table", "charts/by_layer_table"} <= set(summary)
    assert record.used == {"dataset-built-in", "model-tiny"} and "direction-m-harm" in record.artifacts


@pytest.mark.parametrize("error", [None, RuntimeError(f"could not read {SAYING}"), InputError(f"reply {SAYING!r} is odd")], ids=["well", "fault", "input"])
def test_no_reply_leaves_the_machine_by_default(tmp_path, server, error):
    def act(tracker):
        experiment(tracker)
        (tmp_path / "run" / "run.log").write_text(f"a line\n{SAYING}\n")
        if error:
            raise error

    try:
        tracker = run(tmp_path / "run", act, mode="online")
    except type(error) as raised:
        assert raised is error
        (record,) = records(tmp_path / "run" / "wandb")
    else:
        record = tracker.record
    assert b"a question" in server.bytes, "the run was sent"
    assert SENTINEL.encode() not in server.bytes
    assert not holding(tmp_path / "run" / "wandb", SENTINEL)
    outside = {path.name for path in tmp_path.rglob("*") if path.is_file() and "run" not in path.relative_to(tmp_path).parts[:1]}
    assert outside and not holding(tmp_path / "wandb_data_dir", SENTINEL)
    assert list(server.exit_codes.values()) == [1 if error else 0] and record.is_dir()


def test_replies_go_when_asked_for(tmp_path, server):
    run(tmp_path / "run", mode="online", generations="full")
    assert SENTINEL.encode() in server.bytes


def test_a_crash_is_a_failed_run_with_its_log(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.log").write_text("what came before\n")

    def act(tracker):
        tracker.rows([ROW])
        raise InputError("layer 99: choose 0 to 4")

    with pytest.raises(InputError):
        run(tmp_path / "run", act)
    (folder,) = records(tmp_path / "run" / "wandb")
    told = Record(folder).told
    assert (told["state"], told["exit_code"], told["summary"]["error"]) == ("failed", 1, "InputError: layer 99: choose 0 to 4")
    assert (folder / "files" / "run.log").read_text() == "what came before\n"


def test_an_interrupt_is_a_failed_run(tmp_path):
    def act(tracker):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", act)
    assert Record(*records(tmp_path / "run" / "wandb")).told["exit_code"] == 1


def test_online_everything_arrives(tmp_path, server, caplog):
    caplog.set_level(logging.INFO)
    tracker = run(tmp_path / "run", mode="online")
    (name,) = server.runs
    sent, lines = server.runs[name], server.stream[name]
    assert (sent["displayName"], sent["groupName"], sent["jobType"], sent["project"], sent["tags"]) == ("a name", "a sweep", "steer_harm", "latentguard", ["t"])
    assert server.exit_codes == {name: 0}
    history = [json.loads(line) for line in lines["wandb-history.jsonl"]]
    assert [row["layer"] for row in history if "by_layer/harm" in row] == [0, 1, 2]
    names = {one["artifactCollectionName"]: one for one in server.artifacts}
    assert {"direction-m-harm", "dataset-built-in", "model-tiny"} <= set(names) and names["direction-m-harm"]["artifactTypeName"] == "direction"
    assert set(server.used) == {names["dataset-built-in"]["id"], names["model-tiny"]["id"]}
    assert any(file.endswith(".png") for file in server.files) and any("generations" in file for file in server.files)
    assert list(tracker.record.glob("*.synced")) and "W&B: http" in caplog.text
    assert not [said for said in caplog.records if said.name.startswith("latentguard.trackers") and said.levelno > logging.INFO]
    assert not [path for _, path, _ in server.received if "otel" in path], "W&B is not told of its own errors"
    told = json.loads(server.files[f"{name}/wandb-metadata.json"])
    assert "git" not in told and "host" in told
    assert "args" in told or "PYTEST_XDIST_WORKER" in os.environ  # its processes have no command line of their own


def test_a_direction_of_another_run_is_the_same_artifact(tmp_path, server):
    run(tmp_path / "one", lambda tracker: tracker.direction(a_direction()), mode="online")
    file = tmp_path / "one" / "directions" / "harm.safetensors"
    run(tmp_path / "two", lambda tracker: tracker.used("direction", "m-harm", a_direction().card(), file), mode="online")
    made, used = (one for one in server.artifacts if one["artifactTypeName"] == "direction")
    assert (made["artifactCollectionName"], made["digest"]) == (used["artifactCollectionName"], used["digest"])
    assert server.used == [used["id"]]


@pytest.mark.parametrize("behave", ["refuse", "fail", "hang", "drop"])
@pytest.mark.parametrize("when", ["start", "middle"])
def test_no_server_stops_an_experiment_and_nothing_is_lost(tmp_path, server, caplog, behave, when):
    if when == "start":
        server.behave = behave

    def act(tracker):
        experiment(tracker)
        server.behave = behave

    tracker = run(tmp_path / "run", act, mode="online", patience=2)
    assert whole(tmp_path / "run")
    assert f"send it later: wandb sync {tracker.record}" in caplog.text
    server.behave = "well"
    server.let_go()
    sent = wandb("sync", str(tracker.record))
    assert sent.returncode == 0, sent.stderr
    assert list(server.exit_codes.values()) == [0] and any("generations" in file for file in server.files) and server.used
    (lines,) = server.stream.values()
    assert sum('"by_layer/harm"' in line for line in lines["wandb-history.jsonl"]) >= 3


def test_a_server_that_took_nothing_is_not_waited_for_again_at_once(tmp_path, server, caplog):
    server.behave = "refuse"
    run(tmp_path / "one", mode="online")
    asked = len(server.received)
    tracker = run(tmp_path / "two", mode="online")
    assert asked and len(server.received) == asked
    assert f"invalid api key): it is recorded here; send it later: wandb sync {tracker.record}" in caplog.text


def test_without_a_key_nothing_is_asked_and_the_run_is_recorded(tmp_path, server, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_API_KEY")
    tracker = run(tmp_path / "run", mode="online")
    assert "No API key" in caplog.text and "wandb login" in caplog.text and not server.received
    assert Record(tracker.record).told["exit_code"] == 0


def test_wandbs_own_process_may_die(tmp_path, caplog):
    def act(tracker):
        experiment(tracker)
        children = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True).stdout.split()
        assert len(children) == 1
        os.kill(int(children[0]), 9)
        tracker.figure("more", plot(), CURVE)

    run(tmp_path / "run", act)
    assert whole(tmp_path / "run") and (tmp_path / "run" / "figures" / "more.csv").is_file()
    assert "process is gone" in caplog.text
    assert Record(run(tmp_path / "next").record).told["exit_code"] == 0


def test_where_wandb_cannot_write_the_run_goes_on(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("in the way")
    run(tmp_path / "run")
    assert whole(tmp_path / "run") and "W&B did not take the start of the run" in caplog.text


def test_a_fault_of_wandb_is_one_warning(tmp_path, monkeypatch, caplog):
    import wandb as package

    def broken(*_, **__):
        raise ValueError("no")

    monkeypatch.setattr(package, "Table", broken)
    assert Record(run(tmp_path / "run").record).told["summary"]["claim"] == "c"
    assert whole(tmp_path / "run") and caplog.text.count("W&B did not take") == 1


def test_disabled_leaves_files_alone(tmp_path):
    tracker = run(tmp_path / "run", mode="disabled")
    assert whole(tmp_path / "run") and tracker.record is None and not (tmp_path / "run" / "wandb").exists()


def test_what_sync_would_send_is_shown_without_a_key(tmp_path):
    tracker = run(tmp_path / "run")
    shown = wandb("sync", "--dry-run", str(tracker.record))
    assert shown.returncode == 0 and tracker.record.name in shown.stdout + shown.stderr


@pytest.mark.slow
def test_fifty_runs_of_one_process_are_fifty_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "one-for-all")
    for job in range(50):
        run(tmp_path / str(job), lambda tracker, job=job: tracker.summary({"job": job}), name=f"job {job}")
    found = records(tmp_path)
    assert len({path.name.split("-")[-1] for path in found}) == len(found) == 50
    assert [Record(found_of).told["summary"]["job"] for job in (0, 49) for found_of in records(tmp_path / str(job))] == [0, 49]


def test_curves_are_of_numbers_alone_and_in_order():
    chart = Chart("line", "x", "y", "X", "Y", series="s", panel="p", low=None, high=None)
    rows = [{"x": x, "y": y, "s": "a.b", "p": 1.5} for x, y in ((2, 1.0), (1, float("nan")), (1, 3), ("all", 2), (2, 5))]
    assert native.curves("f", chart, rows) == [{"x": 1, "f/a_b_1_5": 3}, {"x": 2, "f/a_b_1_5": 1.0}, {"x": 2, "f/a_b_1_5": 5}]
    assert native.curves("f", Chart("points", "x", "y", "X", "Y"), rows) == []


@pytest.mark.parametrize(("kind", "x"), [("line", "layer"), ("points", "layer"), ("bars", "group"), ("heat", "group")])
def test_a_plot_of_wandb_holds_the_columns_of_its_chart_alone(kind, x):
    import wandb as package

    rows = [{"layer": 1, "group": "g", "rate": 0.5, "value": 0.1, "by": "b", "said": SENTINEL}]
    shown = native.drawn(package, plot(kind, x, value="value" if kind == "heat" else None), rows)
    table = getattr(shown, "table", shown)
    assert table.data and SENTINEL not in str(table.data) and "said" not in table.columns
    assert native.drawn(package, plot(kind, x), []) is None


def _command_line(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_the_upload_ends_with_its_run(tmp_path, server):
    server.behave = "hang"
    run(tmp_path / "run", mode="online", patience=1)
    left = [one for one in psutil.process_iter() if str(tmp_path) in " ".join(_command_line(one))]
    assert not psutil.wait_procs(left, timeout=30)[1]  # what was killed may take a moment to be gone
    shutil.rmtree(Path(tmp_path / "run"))

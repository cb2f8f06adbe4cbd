"""Every study through the front door with an offline run of W&B, read back with W&B's own tool; and a sweep."""

import json
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from latentguard import run as door
from latentguard.configs import option, options
from latentguard.trackers import COLUMNS
from tests.planted import everything, rows_of, write
from tests.recording import Record, holding, records
from tests.test_run import FEW

SMALL = ["model=tiny", "tracker=wandb", "tracker.mode=offline", "tracker.tags=[mine]", "backend.store=false"]
CASTING = ["casting.n_poles=12", "casting.n_test=12", "casting.n_validation=4", "casting.patience=1"]
PARTS = ("suffix", "clusters", "beliefs", "final_token")  # of the series of all studies


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Words that name a data set with a set for every role, in files."""
    folder = tmp_path_factory.mktemp("sets")
    far = [{**row, "category": "abc"[k % 3]} for k, row in enumerate(rows_of("harmful", 60, "far"))]
    roles = {"categories": write(folder / "far.jsonl", far)}
    for kind in ("template", "suffix", "persuasion"):
        roles[kind] = write(folder / f"{kind}.jsonl", [{**row, "prompt": f"Story: {row['prompt']}"} for row in rows_of("harmful", 60, kind)])
    return ["data=file", f"data.path={write(folder / 'main.jsonl', everything())}", *(f"data.roles.{role}=[{path}]" for role, path in roles.items())]


@pytest.fixture
def job(tmp_path, monkeypatch):
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))

    def run(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["latentguard", *words])
        monkeypatch.setitem(door._state, "started", False)
        GlobalHydra.instance().clear()
        try:
            door.main()
        finally:
            GlobalHydra.instance().clear()

    return run


def few(exp):
    if exp != "paper":
        return FEW.get(exp, [])
    own = [word.replace("exp.", f"exp.studies.{part}.") for part in PARTS for word in FEW.get(part, [])]
    return [f"exp.skip=[{','.join(name for name in option('exp', 'paper')['studies'] if name not in PARTS)}]", *own]


@pytest.mark.slow
@pytest.mark.parametrize("exp", options("exp"))
def test_an_offline_run_of_every_study_reads_back(job, tmp_path, data, exp):
    job(*SMALL, *CASTING, *data, f"exp={exp}", "seed=3", *few(exp), f"hydra.run.dir={tmp_path}/out")
    out = tmp_path / "out"
    (folder,) = records(out / "wandb")
    record, summary = Record(folder), json.loads((out / "summary.json").read_text())
    config, told = record.told["config"], record.told["summary"]
    flat = {key: config[key] for key in ("model", "exp", "data", "judge", "backend", "seed")}
    assert flat == {"model": "tiny", "exp": exp, "data": "file", "judge": "phrases", "backend": "local", "seed": 3}
    assert config["casting.n_poles"] == 12 and config["cfg"]["exp"]["_target_"] and (config["commit"] is None or len(config["commit"]) == 40)
    assert record.run["job_type"] == exp and "run_group" not in record.run and record.told["exit_code"] == 0
    assert {"mine", exp, "tiny"} <= set(record.told["tags"]) and record.told["name"].startswith(f"tiny · {exp} · ")
    assert told["claim"] == summary["claim"]
    if "headline" in summary:
        assert told["headline/metric"] == summary["headline"]["metric"] and told.get("headline/value") == summary["headline"]["value"]
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    judged = [row for row in rows if "verdict" in row]
    shown = [column for column in COLUMNS if column not in ("reply", "rule")]
    assert [[row[column] for column in shown] for row in record.table] == [[row.get(column) for column in shown] for row in judged]
    index = json.loads((out / "figures" / "index.json").read_text())
    for name, figure in index.items():
        assert (f"figures/{name}" in told) is not figure["replies"]
        curves = [row for row in record.history if any(key.startswith(f"{name}/") for key in row)]
        if curves:
            axis = record.metrics[f"{name}/*"]["step_metric"]
            assert axis == figure["chart"]["x"] and [row[axis] for row in curves] == sorted(row[axis] for row in curves)
        assert figure["chart"] is None or figure["replies"] or f"charts/{name}" in told or f"charts/{name}_table" in told
    directions = {f"direction-tiny-{path.stem}" for path in (out / "directions").glob("*.safetensors")}
    assert directions <= set(record.artifacts) and record.used == {"dataset-file", "model-tiny"}
    said = {row["reply"].strip() for row in rows if len(row.get("reply", "").strip()) >= 16}
    assert not [1 for reply in said if holding(out / "wandb", reply)], "a reply is in what W&B would send"


@pytest.mark.slow
def test_jobs_of_a_sweep_are_runs_of_their_own_in_one_group(job, tmp_path, data):
    job("-m", *SMALL, *CASTING, *data, "exp=suffix", "exp.n_test=2", "seed=0,1,2,3", f"hydra.sweep.dir={tmp_path}/a-sweep")
    found = [Record(folder) for folder in records(tmp_path / "a-sweep")]
    assert len({record.told["run_id"] for record in found}) == len(found) == 4
    assert {record.run["run_group"] for record in found} == {"a-sweep"} and sorted(record.told["config"]["seed"] for record in found) == [0, 1, 2, 3]
    assert {record.told["exit_code"] for record in found} == {0}

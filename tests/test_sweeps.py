"""Sweeps: their order, one model in memory, failed jobs, going on with one that stopped, other launchers."""

import gc
import itertools
import json
import os
import re
import signal
import subprocess
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from latentguard.errors import InputError
from tests import test_run
from tests.test_run import QUICK

run, run_here = test_run.run, test_run.run_here  # fixtures
LAUNCHERS = {"joblib": "hydra_plugins.hydra_joblib_launcher", "submitit_local": "hydra_plugins.hydra_submitit_launcher", "ray": "ray"}


@dataclass(frozen=True)
class Short:
    """A study of one reading. Without the file it needs it fails, as bad input or as a bug."""

    n: int = 0
    needs: str | None = None
    bug: bool = False

    def check(self, n_layers, data):
        pass

    def __call__(self, backend, data, judge, tracker):
        with Path(os.environ["RAN"]).open("a") as file:
            file.write(f"{backend.name} {self.n} {torch.get_num_threads()}\n")
        tracker.rows([{"n": self.n, "row": 1}])
        if os.environ.get("INTERRUPT_AT") == str(self.n):
            raise KeyboardInterrupt
        if self.needs and not Path(self.needs).exists():
            raise RuntimeError("a bug") if self.bug else InputError(f"exp.needs={self.needs}: no such file")
        tracker.rows([{"n": self.n, "row": 2, "norm": float(backend.read(list(data.train)[:1], [1]).values.norm())}])
        return {"claim": "done", "n": self.n}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of configs with the study and a second tiny model, and the file where jobs say that they ran."""
    for group, name, settings in (
        ("exp", "short", {"_target_": f"{__name__}.Short", "n": 0, "needs": None, "bug": False}),
        ("model", "tiny2", {"name": "tiny2", "tiny": {"family": "llama", "n_layers": 4, "d_model": 32, "seed": 1}}),
    ):
        (tmp_path / "own" / group).mkdir(parents=True)
        (tmp_path / "own" / group / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    params = {"exp.n": "1,2", "model": "tiny,tiny2"}
    (tmp_path / "own" / "axes").mkdir()
    (tmp_path / "own" / "axes" / "models.yaml").write_text("# @package _global_\n" + yaml.safe_dump({"hydra": {"sweeper": {"params": params}}}))
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    (tmp_path / "ran").touch()
    return ["--config-dir", str(tmp_path / "own"), "exp=short"]


def ran(tmp_path):
    return [" ".join(line.split()[:2]) for line in (tmp_path / "ran").read_text().splitlines()]


def rows(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "models"),
    [
        (["seed=1,2", "model=tiny,tiny2"], 2),
        (["seed=1,2", "model.dtype=float32,bfloat16", "exp.n=1,2", "model=tiny,tiny2"], 4),
        (["seed=1,2", "model=tiny", "+model.id=x,y"], 2),
        (["seed=1,2", "++model.id=x,y", "model=tiny"], 2),
        (["seed=range(0,2)", "model=glob(tiny*)"], 2),
        (["seed=1,2", "model=choice(tiny,tiny2)"], 2),
        (["judge=phrases,paper_substrings", "seed=1,2", "model=tiny,tiny2"], 2),
        (["seed=1,2", "+axes=models"], 2),
        (["seed=1,2", "+axes=models", "model=tiny2,tiny"], 2),
        (["seed=1", "model=tiny"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_model_is_never_loaded_again_whatever_the_order_typed(run_here, own, monkeypatch, tmp_path, words, models):
    from latentguard import run as door

    seen = []
    monkeypatch.setattr(door, "run", lambda cfg: seen.append(str(cfg.model)))
    assert run_here("-m", *own, *words, f"hydra.sweep.dir={tmp_path}/sweep").returncode == 1, "nothing was really run"
    jobs = json.loads((tmp_path / "sweep" / "jobs.json").read_text())
    assert len(seen) == len(jobs) == len({str(job["overrides"]) for job in jobs})
    assert len([model for model, _ in itertools.groupby(seen)]) == len(set(seen)) == models


def test_each_job_says_its_place_and_once_there_is_something_to_tell_it_from_how_long_is_left(run_here, own, monkeypatch, tmp_path):
    from latentguard import run as door

    monkeypatch.setattr(door, "run", lambda cfg: None)
    said = run_here("-m", *own, "model=tiny", "seed=1,2,3", f"hydra.sweep.dir={tmp_path}/sweep")
    places = [line for line in said.stdout.splitlines() if line.startswith("job ")]
    assert places[0] == "job 1 of 3 · #0"
    for line, number in zip(places[1:], (1, 2), strict=True):
        assert re.fullmatch(rf"job {number + 1} of 3 · #{number} · \d+ s so far, about \d+ s left at this pace", line)
        assert line in next((tmp_path / "sweep").glob(f"{number}_*")).joinpath("run.log").read_text()
    assert "job " not in run_here(*own, "model=tiny", f"hydra.run.dir={tmp_path}/alone").stdout


def test_one_model_at_a_time_each_loaded_once_also_after_failures(run_here, own, monkeypatch, tmp_path):
    from latentguard.backends import loading

    held, alive = [], []
    load = loading.load

    def counted(spec, **settings):
        gc.collect()
        alive.append(sum(model() is not None for model in held))
        backend = load(spec, **settings)
        held.append(weakref.ref(backend.hf))
        return backend

    monkeypatch.setattr(loading, "load", counted)
    loading._slot.clear()
    words = ["exp.bug=true,false", f"exp.needs=null,{tmp_path}/no", "backend.batch_size=3,4", "model=tiny,tiny2"]
    said = run_here("-m", *own, *words, f"hydra.sweep.dir={tmp_path}/sweep")
    assert said.returncode == 1 and "8 of 16 jobs done" in said.stdout
    assert alive == [0, 0], "two loads, and no other model in memory at either"


def test_a_failed_job_says_why_in_its_own_log_and_the_sweep_goes_on(run_here, own, tmp_path):
    sweep = tmp_path / "sweep"
    said = run_here("-m", *own, "model=tiny", f"exp.needs={tmp_path}/no,null", "exp.bug=false,true", "hydra.sweep.dir=sweep")
    assert said.returncode == 1 and said.stderr == ""
    assert [path.name for path in sorted(sweep.iterdir()) if (path / "summary.json").exists()] == ["2_short_tiny", "3_short_tiny"]
    logs = [(sweep / f"{n}_short_tiny" / "run.log").read_text() for n in range(4)]
    assert f"failed: exp.needs={tmp_path}/no: no such file" in logs[0] and "Traceback" not in logs[0]
    assert "Traceback" in logs[1] and "RuntimeError: a bug" in logs[1]
    table = said.stdout[said.stdout.index("\nSweep") :].splitlines()[1:]
    assert "2 of 4 jobs done" in table[0] and [line.split()[1] for line in table[1:5]] == ["failed", "failed", "done", "done"]
    assert table[1].endswith("no such file") and table[2].endswith("RuntimeError: a bug") and "run resume=sweep " in table[5]


def test_resume_runs_what_is_missing_in_the_same_folders(run_here, own, tmp_path, monkeypatch):
    sweep, needed = tmp_path / "a sweep", tmp_path / "needed"
    words = ["-m", *own, "model=tiny", "exp.n=1,2,3,4", "hydra.verbose=[x]", f"hydra.sweep.dir='{sweep}'"]
    monkeypatch.setenv("INTERRUPT_AT", "3")
    said = run_here(*words, f"exp.needs={needed}")
    assert said.returncode == 130 and "0 of 4 jobs done" in said.stdout and [line.split()[1] for line in said.stdout.splitlines() if line.startswith("  #")] == [
        "failed", "failed", "stopped", "not",
    ]  # fmt: skip
    assert run_here(*words, f"exp.needs={needed}").returncode == 2, "another sweep in the same folder"
    needed.touch()
    assert run_here("resume='a sweep'").returncode == 130
    assert [len(rows(sweep / f"{n}_short_tiny")) for n in range(3)] == [2, 2, 1]
    monkeypatch.delenv("INTERRUPT_AT")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for n in (0, 1) for path in (sweep / f"{n}_short_tiny").rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "chdir", lambda path: None)
    said = run_here("-m", "resume=a sweep")
    assert said.returncode == 0 and "#0 is done: 0_short_tiny\n#1 is done" in said.stdout and "4 of 4 jobs done" in said.stdout
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}, "a finished job's folder is left as it is"
    assert [line.split()[1] for line in (tmp_path / "ran").read_text().splitlines()] == ["1", "2", "3", "1", "2", "3", "3", "4"]
    assert [len(rows(sweep / f"{n}_short_tiny")) for n in range(4)] == [2, 2, 2, 2]
    assert not any(word.startswith("resume") for word in yaml.safe_load((sweep / "3_short_tiny" / ".hydra" / "overrides.yaml").read_text()))
    assert run_here("-m", "resume=a sweep").returncode == 0 and len(ran(tmp_path)) == 8, "nothing is left"
    (sweep / "0_short_tiny" / "summary.json").unlink()
    (sweep / "2_short_tiny" / "summary.json").write_text('{"studies": {}}')  # what a series leaves on its way
    assert run_here("-m", "resume=a sweep").returncode == 0 and ran(tmp_path)[8:] == ["tiny 1", "tiny 3"]
    recorded = [yaml.safe_load((sweep / f"{n}_short_tiny" / ".hydra" / "hydra.yaml").read_text())["hydra"] for n in range(4)]
    assert [(one["job"]["num"], f"exp.n={one['job']['num'] + 1}" in one["overrides"]["task"]) for one in recorded] == [(n, True) for n in range(4)]


def test_resume_of_one_run(run_here, own, tmp_path, monkeypatch):
    words = [*own, "model=tiny", "exp.n=1", f"hydra.run.dir={tmp_path}/out"]
    monkeypatch.setenv("INTERRUPT_AT", "1")
    said = run_here(*words)
    assert said.returncode == 130 and "resume=out" in said.stderr and len(rows(tmp_path / "out")) == 1
    monkeypatch.delenv("INTERRUPT_AT")
    assert run_here("resume=out").returncode == 0 and len(rows(tmp_path / "out")) == 2 and ran(tmp_path) == ["tiny 1"] * 2
    assert yaml.safe_load((tmp_path / "out" / ".hydra" / "overrides.yaml").read_text()) == words[2:-1]
    said = run_here("resume=out")
    assert said.returncode == 0 and "out is done" in said.stdout and len(ran(tmp_path)) == 2


def test_a_resumed_run_finds_files_by_the_paths_first_given(run_here, own, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.setenv("INTERRUPT_AT", "0")
    (tmp_path / "needed").touch()
    assert run_here(*own, "model=tiny", "exp.needs=needed", "hydra.run.dir=out").returncode == 130
    monkeypatch.delenv("INTERRUPT_AT")
    from latentguard import run as door

    monkeypatch.chdir(tmp_path / "there")
    words = door.resumed(["resume=../out"])
    assert Path.cwd() == tmp_path and f"hydra.run.dir='{tmp_path}/out'" in words and "exp.needs=needed" in words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["resume=gone"], "no such folder"),
        (["resume="], "no such folder"),
        (["-m", "resume=empty"], "no sweep's folder"),
        (["resume=empty"], "missing or cut short"),
        (["resume=cut"], "missing or cut short"),
        (["resume=unstarted"], "start anew"),
        (["resume=foreign"], "its own means"),
        (["resume=out", "seed=3"], "seed=3 was not"),
        (["resume=out", "--config-dir", "elsewhere"], "elsewhere was not"),
        (["-m", "resume=out"], "leave out -m"),
        (["+resume=out"], "resume"),
        (["++resume=out", "model=tiny"], "on the command line and bare"),
        (["exp=null"], "exp cannot be left out; choose one of"),
        (["~tracker"], "choose one of files, wandb"),
        (["model=tiny", "~casting"], "refers to another that was left out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_resumed_is_said_in_one_sentence(run_here, tmp_path, words, says):
    made = {
        "verbose": False,
        "overrides": {"task": ["seed=1"], "hydra": []},
        "runtime": {"cwd": str(tmp_path), "config_sources": []},
        "job": {"config_name": "config"},
    }
    for folder, name, text in (
        ("empty", "x", ""),
        ("cut", ".hydra/hydra.yaml", "hydra:\n  overrides:\n    task: [a"),
        ("unstarted", "multirun.yaml", json.dumps({"hydra": {**made, "sweeper": {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"}}})),
        ("foreign", "multirun.yaml", json.dumps({"hydra": {**made, "sweeper": {"_target_": "other.Sweeper"}}})),
        ("out", ".hydra/hydra.yaml", json.dumps({"hydra": {**made, "sweeper": {}}})),
    ):
        (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_text(text)
    said = run_here(*words)
    assert said.returncode == 2 and says in said.stderr, said.stderr
    assert "Traceback" not in said.stderr and (len(said.stderr.splitlines()) == 1 or words[0].startswith("+resume"))


def test_a_sweep_and_a_job_are_not_run_twice_at_once(run_here, own, tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setenv("INTERRUPT_AT", "0")
    run_here("-m", *own, "model=tiny", "hydra.sweep.dir=sweep")
    for held, code in ((tmp_path / "sweep" / "jobs.json", 2), (tmp_path / "sweep" / "0_short_tiny" / "run.log", 1)):
        with held.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            said = run_here("resume=sweep")
        assert said.returncode == code and "another process" in said.stderr + said.stdout and len(ran(tmp_path)) == 1


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_to_the_same_results(python, run, tmp_path):
    executable, env = python
    words = ["-m", *QUICK, "exp.layers=[1],[2],[3]"]
    child = subprocess.Popen(
        [executable, "-m", "latentguard.run", *words, "hydra.sweep.dir=killed"],
        cwd=tmp_path, env={**env, "LATENTGUARD_CACHE": str(tmp_path / "cold"), "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = 0
    for line in child.stdout:
        seen += line.startswith("poles by label")  # in the middle of the second job
        if seen == 2:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    first = {path.parent.name: path.stat().st_mtime_ns for path in killed.glob("*/summary.json")}
    assert 1 <= len(first) < 3
    said = run("resume=killed")
    assert said.returncode == 0 and said.stdout.count(" is done: ") == len(first) and said.stdout.count("\npoles by label") == 3 - len(first), said.stderr
    assert all((killed / name / "summary.json").stat().st_mtime_ns == when for name, when in first.items())
    assert run(*words, "hydra.sweep.dir=whole", LATENTGUARD_CACHE=str(tmp_path / "other")).returncode == 0
    folders = [f"{n}_steer_harm_tiny" for n in range(3)]
    assert sorted(path.parent.name for path in killed.glob("*/summary.json")) == sorted(path.parent.name for path in whole.glob("*/summary.json")) == folders
    for name in folders:
        assert sorted(map(str, rows(killed / name))) == sorted(map(str, rows(whole / name))), "the store answers in another order"
        mine, other = (json.loads((sweep / name / "summary.json").read_text()) for sweep in (killed, whole))
        assert {**mine, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_runs_reports_and_goes_on(run, own, tmp_path, launcher):
    pytest.importorskip(LAUNCHERS[launcher], reason=f"hydra/launcher={launcher} is not installed")
    needed, more = tmp_path / "needed", {"RAN": str(tmp_path / "ran"), "INTERRUPT_AT": ""}
    words = ["-m", *own, "model=tiny", f"exp.needs=null,{needed}", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep"]
    said = run(*words, **more)
    assert said.returncode == 1 and "1 of 2 jobs done" in said.stdout, said.stderr
    assert "failed: exp.needs=" in (tmp_path / "sweep" / "1_short_tiny" / "run.log").read_text()
    needed.touch()
    said = run("-m", "resume=sweep", **more)
    assert said.returncode == 0 and "2 of 2 jobs done" in said.stdout and "#0 is done: " in said.stdout, said.stderr
    assert len(ran(tmp_path)) == 3 and [len(rows(tmp_path / "sweep" / f"{n}_short_tiny")) for n in (0, 1)] == [2, 2]
    assert [yaml.safe_load((tmp_path / "sweep" / f"{n}_short_tiny/.hydra/hydra.yaml").read_text())["hydra"]["job"]["num"] for n in (0, 1)] == [0, 1]
    threads = [int(line.split()[2]) for line in (tmp_path / "ran").read_text().splitlines()]
    assert max(threads) <= max(1, (os.cpu_count() or 1) // 2), "jobs beside each other share the cores"


@pytest.mark.filterwarnings(r"ignore:\s*'hydra/launcher")
def test_a_launcher_that_is_not_installed_is_named(run_here, tmp_path, monkeypatch):
    from hydra.core.plugins import Plugins

    target = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
    monkeypatch.setattr(Plugins.instance(), "class_name_to_class", {k: v for k, v in Plugins.instance().class_name_to_class.items() if k != target})
    said = run_here("-m", "model=tiny", "hydra/launcher=joblib")
    assert said.returncode == 2 and "hydra/launcher=joblib needs hydra-joblib-launcher: install it" in said.stderr
    assert not (tmp_path / "runs").exists()

"""The command line as a person meets it: help, wrong words, a whole run on the tiny model, a sweep."""

import json
import os
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate

from latentguard import load
from latentguard.configs import CONF, options
from latentguard.datasets import load_dataset
from latentguard.judges import Phrases
from latentguard.tables import as_text, found
from latentguard.trackers import Memory
from tests.headlines import tells_its_headline
from tests.planted import everything, rows_of, write

QUICK = ["model=tiny", "exp.casting.n_poles=32", "exp.n_unsteered=2", "exp.n_control=2", "exp.n_test=3", "exp.n_grid=2", "exp.n_draw=1", "exp.draws=1", "exp.draws_reported=2", "exp.layers=[1,3]", "exp.n_validation=2", "exp.max_new_tokens=4"]  # fmt: skip


@pytest.fixture
def run(python, tmp_path):
    executable, env = python

    def call(*words, cwd=tmp_path, **more):
        settings = {**env, "LATENTGUARD_CACHE": str(tmp_path / "cache"), **more}
        return subprocess.run([executable, "-m", "latentguard.run", *words], cwd=cwd, env=settings, capture_output=True, text=True)

    return call


@pytest.fixture
def run_here(tmp_path, monkeypatch, capfd):
    """The same door in this process: what takes seconds is importing torch anew."""
    from hydra.core.global_hydra import GlobalHydra

    from latentguard import run as door

    def call(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("LATENTGUARD_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(sys, "argv", ["latentguard", *words])
        monkeypatch.setitem(door._state, "started", False)
        GlobalHydra.instance().clear()
        code = 0
        try:
            door.main()
        except SystemExit as end:
            code = end.code
        finally:
            GlobalHydra.instance().clear()
        return SimpleNamespace(returncode=code, **dict(zip(("stdout", "stderr"), capfd.readouterr(), strict=True)))

    return call


def test_help_shows_groups_options_and_commands(run):
    said = run("--help")
    assert said.returncode == 0
    for group in ("model", "data", "exp", "judge", "tracker", "backend"):
        assert f"{group}: " in said.stdout
    assert said.stdout.count("python -m latentguard.run") == 3 and "llama3_1_405b" in said.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["exp=nothing"], "steer_harm"),
        (["model=nothing"], "qwen2_5_coder_0_5b_q4"),
        (["exp.layrs=[1]"], "layrs"),
        (["exp.layers=[99]"], "layer 99: this model has layers 0 … 4"),
        (["exp.layers=[1.5]"], "fraction of depth"),
        (["exp.layers=[-1]"], "layer -1"),
        (["exp.coefs=[1,x]"], "exp.coefs.1='x'"),
        (["exp.coefs=[]"], "at least one"),
        (["exp.coefs=[nan]"], "finite"),
        (["exp.harm_position=t_last"], "t_post_inst"),
        (["exp.harm_position=all"], "mean(all)"),
        (["exp.where=everywhere"], "position 'everywhere'"),
        (["exp.when=always"], "exp.when='always'"),
        (["exp.direction=love"], "exp.direction='love'"),
        (["exp.n_test=0"], "n_test=0"),
        (["exp.max_new_tokens=many"], "exp.max_new_tokens='many'"),
        (["model.dtype=int3"], "model.dtype='int3'"),
        (["model.id=/no/such/folder"], "there is no such folder"),
        (["data=file"], "data.path=FILE"),
        (["data=file", "data.path=gone.jsonl"], "no such file"),
        (["data.terminal=dot"], "data.terminal='dot'"),
        (["data=advbench", "data.mirror=/no/such"], "advbench.jsonl: there is no such file"),
        (["judge=nothing"], "phrases"),
        (["backend.batch_size=0"], "batch_size=0"),
        (["tracker=wandb", "tracker.generations=some"], "choose verdicts or full"),
        (["nonsense"], "nonsense"),
        (["backend.batch_size=abc"], "backend.batch_size='abc'"),
        (["backend.store_gb=0"], "backend.store_gb=0"),
        (["backend.store=maybe"], "backend.store='maybe'"),
        (["backend.name=ndif"], "backend.name='ndif'"),
        (["backend=vllm"], "ndif"),
        (["backend.simulate_remote=perhaps"], "backend.simulate_remote='perhaps'"),
        (["backend=ndif", "backend.batch_size=0"], "backend.batch_size=0"),
        (["backend=ndif", "backend.ahead=99"], "backend.ahead=99"),
        (["backend=ndif", "backend.on_stall=shrug"], "backend.on_stall='shrug'"),
        (["backend=ndif", "backend.states=int8"], "backend.states='int8'"),
        (["backend=ndif"], "lies on no server"),
        (["seed=-1"], "seed=-1"),
        (["tracker.name=foo"], "tracker.name='foo'"),
        (["tracker=wandb", "tracker.mode=foo"], "tracker.mode='foo'"),
        (["tracker=wandb", "tracker.tags=abc"], "tracker.tags='abc'"),
        (["exp.max_damage=nan"], "max_damage=nan"),
        (["exp.max_new_tokens=100000"], "takes 4096 in all"),
        (["data.limit=1"], "prompt in its"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_words_are_refused_with_the_way_out(run_here, words, says):
    said = run_here(*([] if words[0].startswith("model=") else ["model=tiny"]), *words)
    assert said.returncode == 2, said.stderr
    assert says in said.stdout + said.stderr
    if said.stderr.startswith("latentguard:"):
        assert "Traceback" not in said.stderr and "ArgsKwargs" not in said.stderr and len(said.stderr.strip().splitlines()) == 1


def test_a_run_leaves_what_it_promises_and_a_second_one_reads_it(run_here, tmp_path):
    for n in (1, 2):
        said = run_here(*QUICK, f"hydra.run.dir={tmp_path}/out{n}")
        assert said.returncode == 0, said.stderr
        assert "claim withheld (insufficient_base_rate)" in said.stdout and "t_inst = token" in said.stdout
        end = said.stdout.splitlines()[-12:]
        assert [line for line in end if line.startswith("intervention") and "rate [95%]" in line] and max(map(len, end[:-4])) <= 100
        assert end[-1] == f"Look at out{n}/report.html and out{n}/figures" and "claim withheld" in end[-2]
        assert "\n".join(end) in (tmp_path / f"out{n}" / "run.log").read_text()
    out = tmp_path / "out1"
    for name in ("rows.jsonl", "summary.json", "environment.json", "run.log", ".hydra/config.yaml", "directions/harm.safetensors", "figures/replies.png"):
        assert (out / name).is_file(), name
    environment = json.loads((out / "environment.json").read_text())
    assert environment["model"] == "tiny" and environment["data"]["hash"] and environment["backend"]["weights"] and environment["versions"]["torch"]
    rows = [[json.loads(line) for line in (tmp_path / f"out{n}" / "rows.jsonl").read_text().splitlines()] for n in (1, 2)]
    assert sorted(map(str, rows[0])) == sorted(map(str, rows[1]))
    replies = [row["reply"] for row in rows[0] if len(row.get("reply") or "") > 3]
    assert replies and not any(reply in (out / "run.log").read_text() for reply in replies)
    from latentguard.directions import Direction

    assert Direction.load(out / "directions" / "harm.safetensors").layers == (0, 1, 2, 3, 4)


@pytest.mark.slow
def test_a_sweep_loads_each_model_once_and_survives_a_bad_job(run, tmp_path):
    said = run("-m", *QUICK, "exp=steer_harm,steer_refusal", "exp.coefs=[1],[-1]", f"hydra.sweep.dir={tmp_path}/sweep")
    assert said.returncode == 1, "one job failed, so the sweep says so at its end"
    jobs = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir() and path.name != "figures")
    done = [path for path in jobs if (path / "summary.json").is_file()]
    assert (len(jobs), len(done)) == (4, 2)
    failed = next(path for path in jobs if path not in done)
    assert "above 0" in (failed / "run.log").read_text()


@pytest.mark.slow
def test_wrong_words_leave_the_shell_with_code_2(run):
    said = run("model=tiny", "exp.layers=[99]")
    assert said.returncode == 2 and said.stderr.startswith("latentguard: layer 99") and len(said.stderr.splitlines()) == 1
    assert run("model=nothing").returncode == 2


@pytest.mark.slow
def test_every_model_data_and_tracker_composes():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for group in ("model", "data", "tracker"):
            for name in options(group):
                assert compose("config", [f"{group}={name}"])[group].name == name


@pytest.mark.parametrize("exp", options("exp"))
def test_every_study_and_judge_builds(exp):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"exp={exp}", "hydra.runtime.output_dir=somewhere"], return_hydra_config=True)
        HydraConfig.instance().set_config(config)  # what ${hydra:runtime.output_dir} asks
        built = instantiate(config.exp, _convert_="all")
        for judge in options("judge"):
            assert instantiate(compose("config", [f"judge={judge}"]).judge, _convert_="all").name
    text = (CONF / "exp" / f"{exp}.yaml").read_text()
    stated = {key for key in yaml.safe_load(text) if not key.startswith("_")} - {"defaults"} | ({"studies"} if "@studies." in text else set())
    assert stated == set(built.__dataclass_fields__), "a study's YAML says all its settings"


def test_a_line_of_the_log_and_a_bar_do_not_run_into_each_other(tmp_path, monkeypatch):
    """On a terminal; in run.log there is the line alone."""
    from hydra.core.global_hydra import GlobalHydra
    from tqdm.auto import tqdm

    from latentguard import run as door

    def step(cfg):
        with tqdm(total=3, desc="a step", disable=None, leave=False) as bar:
            bar.update()
            door.log.info("a line of the log")
            bar.update()

    outer, inner = os.openpty()
    termios.tcsetwinsize(inner, (24, 80))
    with open(inner, "w") as screen, open(outer, "rb", buffering=0) as seen:
        monkeypatch.chdir(tmp_path)
        for name, value in {"stdout": screen, "stderr": screen, "argv": ["latentguard", "model=tiny", "hydra.run.dir=out"]}.items():
            monkeypatch.setattr(sys, name, value)
        monkeypatch.setattr(door, "run", step)
        GlobalHydra.instance().clear()
        door.main()
        print("the end", file=screen, flush=True)
        shown = ""
        while "the end" not in shown:
            shown += seen.read(1 << 16).decode()
    lines = [line.rstrip("\r").split("\r")[-1].strip() for line in shown.split("\n")]
    assert "a step" in shown and "a line of the log" in lines, "what a carriage return has written over is gone"
    assert (tmp_path / "out" / "run.log").read_text() == "a line of the log\n"


FEW = {
    "steer_harm": QUICK[2:],
    "steer_refusal": QUICK[2:],
    "suffix": ["exp.n_test=4"],
    "clusters": ["exp.shuffles=2"],
    "inversion": ["exp.questions=[Is it harmful?]", "exp.layers=[2]", "exp.coefs=[1]", "exp.n_test=4", "exp.n_validation=2", "exp.draws=1", "exp.max_new_tokens=2"],
    "positions": [f"exp.studies.inversion.{word}" for word in ("questions=[Is it harmful?]", "layers=[2]", "n_test=4", "n_validation=2", "max_new_tokens=2", "extract=[t_inst]")],
    "categories": ["exp.n_category=6", "exp.least=2", "exp.invert_layers=[0.5]"],
    "final_token": ["exp.terminals=[period]", "exp.shuffles=1"],
    "ablate_refusal": [f"exp.{word}" for word in ("layers=[2]", "n_harmful=2", "n_harmless=2", "n_test=4", "n_beside=2", "n_control=2", "n_damage=2", "draws=1", "shuffles=1", "max_new_tokens=2")],
    "fit_guard": [f"exp.{word}" for word in ("search.criterion=within", "search.layers=[[1,2]]", "search.positions=[[t_post_inst]]", "curve=[]")],
    "guard_compare": [f"exp.{word}" for word in ("search.criterion=within", "search.layers=[[1,2]]", "search.positions=[[t_post_inst]]", "n_timed=0", "n_asked=4")],
    "guard_robustness": [f"exp.{word}" for word in ("search.criterion=within", "search.layers=[[1,2]]", "search.positions=[[t_post_inst]]", "contexts=[50]", "n_test=8")],
    "over_refusal": [f"exp.{word}" for word in ("n_lookalike=6", "n_harmful=4", "n_harmless=4", "n_validation=2", "n_swapped=2", "shuffles=2", "refusal_layers=[2]", "draws=1", "max_new_tokens=2")],
    "structure_robustness": [f"exp.{word}" for word in ("n_test=4", "draws=2", "shuffles=2", "max_new_tokens=2")],
    "predict_refusal": ["exp.layers=[2]", "exp.shuffles=1"],
    "base_vs_post": [f"exp.{word}" for word in ("n_prompts=12", "n_statements=16", "n_causal=8", "n_pairs=4", "shots=2", "draws=1", "max_new_tokens=2", "map_layers=[2]")],
    "finetune_attack": [f"exp.{word}" for word in ("sizes=[4]", "lora.epochs=1", "steer_layers=[]", "casting.n_poles=8", "casting.n_test=8", "casting.n_validation=2", "casting.max_new_tokens=2")],
}  # fmt: skip


@pytest.fixture(scope="module")
def every_role(tmp_path_factory):
    """Data with a set for every role, in files."""
    folder = tmp_path_factory.mktemp("every_role")
    kinds = [{**row, "category": "abc"[k % 3]} for k, row in enumerate(rows_of("harmful", 60, "far"))]
    roles = {"categories": (write(folder / "far.jsonl", kinds),)}
    for kind in ("template", "suffix", "persuasion"):
        roles[kind] = (write(folder / f"{kind}.jsonl", [{**row, "prompt": f"Story: {row['prompt']}"} for row in rows_of("harmful", 60, kind)]),)
    return load_dataset(write(folder / "main.jsonl", everything()), roles=roles)


@pytest.mark.parametrize("exp", [name for name in options("exp") if name != "paper"])
def test_every_study_ends_in_a_number_a_table_and_a_sentence_that_agree(exp, every_role):
    words = ["casting.n_poles=12", "casting.n_test=12", "casting.n_validation=4", "casting.patience=1", *FEW.get(exp, [])]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"exp={exp}", "hydra.runtime.output_dir=somewhere", *words], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        study = instantiate(config.exp, _convert_="all")
    summary = study(load("tiny"), every_role, Phrases(), Memory())
    tells_its_headline(summary)
    for width in (80, 100):
        shown = as_text(found(summary), width)
        assert max(map(len, shown.splitlines())) <= width and ("studies" in summary or "[95%]" in shown)

"""backend=ndif against NDIF's own API, queue, sandbox and block runner on 127.0.0.1 (tests/loopback): the tier `-m ndif`, `make test-system`."""

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import sysconfig
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

from latentguard.backends.jobs import Host
from latentguard.backends.loading import load
from latentguard.backends.skeleton import Remote, remote
from latentguard.caches import cache_dir
from latentguard.errors import InputError
from latentguard.interventions import Add
from latentguard.store import Stored
from latentguard.weights import locate, spec_of
from tests.agreement import PROMPTS, every_kind, same_moments, same_replies, same_scores, same_states
from tests.conftest import REPO
from tests.loopback.faults import FAULTS
from tests.loopback.server import Loopback

pytestmark = pytest.mark.ndif
OWN = """
from dataclasses import dataclass
from typing import ClassVar
from torch import Tensor
from latentguard.interventions import Intervention

def at_most(state, vector, amount):
    unit = vector / vector.norm(dim=-1, keepdim=True)
    along = (state * unit).sum(-1, keepdim=True)
    return state - (along - amount).clamp(min=0) * unit

@dataclass(frozen=True, eq=False)
class Clamp(Intervention):
    kind: ClassVar[str] = "clamp"
    change = staticmethod(at_most)
    along: Tensor
    most: float

    @property
    def amount(self): return self.most
    def vector(self, layer, prompt): return self.along
    def _source(self): return self.along.tolist()
"""
SMALL = ["data.limit=24", "casting.n_poles=8", "casting.n_test=8", "casting.n_validation=4", "model.dtype=float32"]
STUDIES = {
    "clusters": [],
    "steer_harm": ["exp.layers=[1,2]", "exp.coefs=[1.0]", "exp.casting.n_poles=8", "exp.n_test=8", "exp.n_grid=4", "exp.draws=1", "exp.draws_reported=2"],
    "inversion": ["exp.layers=[1,2]", "exp.coefs=[1.0]", "exp.n_test=4", "exp.n_validation=2", "exp.draws=1"],
}


@pytest.fixture
def there(ndif_server, monkeypatch, tmp_path):
    """Clients of the server: `there()` through its front door, `there(host=server.proxy.host)` through the proxy."""
    monkeypatch.setenv("LATENTGUARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NDIF_API_KEY", ndif_server.key)
    monkeypatch.delenv("NDIF_HOST", raising=False)
    ndif_server.proxy.plan(())
    ndif_server.proxy.injected.clear()
    ndif_server.proxy.seen.clear()

    def client(folder, **settings):
        return remote(spec_of(str(folder), dtype="float32"), Remote(**{"host": ndif_server.host, "batch_size": 4, "batches": 2, **settings}))

    return client


@pytest.fixture(scope="module")
def here(tiny_folder):
    """The same weights in this process."""
    return load(spec_of(str(tiny_folder), dtype="float32"))


def test_the_same_states_scores_and_replies_as_here(here, there, tiny_folder):
    far, grid = there(tiny_folder), every_kind(here)
    assert all(parameter.device.type == "meta" for parameter in far.tree._module.parameters()), "no weights are loaded on this side"
    same_states(here, far)
    same_moments(here, far)
    same_scores(here, far, grid)
    same_replies(here, far, grid)
    assert all(parameter.device.type == "meta" for parameter in far.tree._module.parameters())


def test_the_same_in_the_sandbox_that_ordinary_keys_meet(here, there, tiny_folder, ndif_server, monkeypatch):
    """NDIF runs their blocks in a process apart from the model: what it hands a block is a copy."""
    monkeypatch.setenv("NDIF_API_KEY", ndif_server.plain_key)
    far, grid = there(tiny_folder, batch_size=4, batches=16), every_kind(here)
    states = here.read(PROMPTS, "all", ("t_inst", "mean(user)"))
    assert (states.values - far.read(PROMPTS, "all", ("t_inst", "mean(user)")).values).abs().max() < 1e-4
    assert (here.moments(PROMPTS).mean - far.moments(PROMPTS).mean).abs().max() < 1e-4
    scores = zip(here.logits(PROMPTS, grid), far.logits(PROMPTS, grid), strict=True)
    assert max(float((a - b).abs().max()) for x, y in scores for a, b in zip(x, y, strict=True)) < 1e-4
    for settings in ({}, {"temperature": 0.8}):
        said, told = (backend.generate(PROMPTS, grid, max_new_tokens=5, **settings) for backend in (here, far))
        assert [[r.tokens for r in x] for x in said] == [[r.tokens for r in x] for x in told]
    assert far.host.usage.jobs <= 8, "each a process of its own: many batches a job"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_more_comes_back_than_was_asked_for(there, tiny_folder, dtype):
    far = there(tiny_folder, batch_size=64, states=dtype)
    many = [p for k in range(18) for p in (type(p).of(f"{p.instruction} {k}", harmful=p.harmful, id=f"{p.id}-{k}") for p in PROMPTS)]
    found = far.read(many, "all", ("t_inst", "t_post_inst"))
    assert far.host.usage.bytes_down <= 1.1 * found.values.numel() * getattr(torch, dtype).itemsize
    assert far.host.usage.bytes_up < 60_000, "and little goes up"


def test_reductions_are_made_on_the_server(here, there, tiny_folder):
    """What comes back of scores does not grow with the vocabulary, and no clean run travels."""
    from latentguard.behaviour import CleanRun, Damage

    far, grid = there(tiny_folder, batch_size=32, batches=16), every_kind(here)
    far.logits(PROMPTS, grid, position="user", reduce=Damage(CleanRun(far, PROMPTS, "user")))
    assert far.host.usage.jobs == 1 and far.host.usage.bytes_down < len(PROMPTS) * len(grid) * 4 * 16 + 1000


# Whole studies


def job(words, env, folder, **settings):
    command = [sys.executable, "-m", "latentguard.run", *words, f"hydra.run.dir={folder}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, env={**os.environ, **env}, timeout=600, **settings)


def rows(folder):
    """By content: replies come in the order in which they are ready."""
    found = [json.loads(line) for line in (Path(folder) / "rows.jsonl").read_text().splitlines()]
    return sorted(found, key=lambda row: json.dumps({key: value for key, value in row.items() if not isinstance(value, float)}, sort_keys=True))


def unlike(a, b, where=""):
    """Where two results differ by more than float32 explains."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [found for key in {*a, *b} - {"seconds", "remote"} for found in unlike(a.get(key), b.get(key), f"{where}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in unlike(x, y, f"{where}[{i}]")]
    if isinstance(a, float) and isinstance(b, float):
        same = math.isclose(a, b, rel_tol=1e-3, abs_tol=2e-4) or (math.isnan(a) and math.isnan(b))
        return [] if same else [(where, a, b)]
    return [] if a == b else [(where, a, b)]


def same_run(one, other):
    assert not unlike(rows(one), rows(other))
    summaries = [json.loads((Path(folder) / "summary.json").read_text()) for folder in (one, other)]
    assert not unlike(*summaries)
    return summaries[1]["remote"]


@pytest.fixture(scope="module")
def studies_here(tiny_folder, tmp_path_factory):
    """Each study on this machine, once."""
    top = tmp_path_factory.mktemp("studies")
    for exp, words in STUDIES.items():
        done = job([*tiny_words(tiny_folder), *SMALL, f"exp={exp}", *words], {"LATENTGUARD_CACHE": str(top / "cache")}, top / exp)
        assert done.returncode == 0, done.stderr
    return top


def tiny_words(folder):
    return ["model=tiny", "model.tiny=null", f"model.id={folder}"]


def far_words(folder, exp, host):
    return [*tiny_words(folder), *SMALL, "backend=ndif", f"backend.host={host}", "backend.batch_size=8", "backend.batches=2", f"exp={exp}", *STUDIES[exp]]


@pytest.mark.parametrize("exp", STUDIES)
def test_a_study_gives_the_same_rows_there(exp, ndif_server, tiny_folder, studies_here, tmp_path):
    env = {"LATENTGUARD_CACHE": str(tmp_path / "cache"), "NDIF_API_KEY": ndif_server.key}
    done = job(far_words(tiny_folder, exp, ndif_server.host), env, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    usage = same_run(studies_here / exp, tmp_path / "run")
    assert usage["jobs"] > 0 and usage["bytes_down"] > 0 and usage["resubmitted"] == 0
    again = job(far_words(tiny_folder, exp, ndif_server.host), env, tmp_path / "again")
    assert same_run(tmp_path / "run", tmp_path / "again")["jobs"] == 0, again.stderr


def test_a_hundred_faults_lose_and_double_nothing(ndif_server, tiny_folder, studies_here, tmp_path):
    """Dropped, cut, delayed, garbled and refused connections, in front of the API and of the results, all through three studies."""
    proxy = ndif_server.proxy
    proxy.injected.clear()
    chance = random.Random(0)
    proxy.plan(chance.choice(FAULTS) if chance.random() < 0.4 else None for _ in itertools.count())
    env = {"LATENTGUARD_CACHE": str(tmp_path / "cache"), "NDIF_API_KEY": ndif_server.key}
    try:
        for exp in STUDIES:
            done = job([*far_words(tiny_folder, exp, proxy.host), "backend.batches=1"], env, tmp_path / exp)
            assert done.returncode == 0, done.stderr
            assert same_run(studies_here / exp, tmp_path / exp)["retries"] > 10
    finally:
        proxy.plan(())
    assert len(proxy.injected) >= 100 and {fault for fault, *_ in proxy.injected} == set(FAULTS)


def test_a_worker_that_dies_is_said_and_gone_on_from(ndif_python, tiny_folder, studies_here, tmp_path):
    """It dies at the third job. Without more the run stops with a sentence; the same command, told to send again, ends with the same rows."""
    env = {"LATENTGUARD_CACHE": str(tmp_path / "cache")}
    with Loopback(ndif_python, [tiny_folder], tmp_path / "server") as server:
        server.restart_worker({3: "die"})
        words = [*far_words(tiny_folder, "steer_harm", server.host), "backend.patience=6"]
        stopped = job(words, {**env, "NDIF_API_KEY": server.key}, tmp_path / "stopped")
        assert stopped.returncode == 2 and "has not moved for 6 s" in stopped.stderr and "backend.on_stall=resubmit" in stopped.stderr
        server.restart_worker()
        done = job([*words, "backend.on_stall=resubmit"], {**env, "NDIF_API_KEY": server.key}, tmp_path / "run")
        assert done.returncode == 0, done.stderr
        usage = same_run(studies_here / "steer_harm", tmp_path / "run")
        assert usage["resubmitted"] >= 1 and usage["found_again"] >= 1


def test_ctrl_c_tells_the_job_and_the_next_run_takes_its_result(ndif_python, tiny_folder, studies_here, tmp_path):
    env = {**os.environ, "LATENTGUARD_CACHE": str(tmp_path / "cache")}
    with Loopback(ndif_python, [tiny_folder], tmp_path / "server") as server:
        server.kill_worker()  # jobs are taken and wait
        env["NDIF_API_KEY"] = server.key
        command = [sys.executable, "-m", "latentguard.run", *far_words(tiny_folder, "clusters", server.proxy.host), f"hydra.run.dir={tmp_path / 'stopped'}"]
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are started with it ignored
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPO, env=env, preexec_fn=heard) as process:
            while ("POST", "/request") not in server.proxy.seen:
                assert process.poll() is None, process.stderr.read()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        noted = [json.loads(note.read_text())["id"] for note in (tmp_path / "cache" / "ndif").rglob("*.json")]
        assert process.returncode == 130 and noted and any(f"job {one} goes on" in out + err for one in noted), out + err
        server.start_worker()
        done = job(far_words(tiny_folder, "clusters", server.proxy.host), env, tmp_path / "run")
        assert done.returncode == 0, done.stderr
        assert same_run(studies_here / "clusters", tmp_path / "run")["found_again"] >= 1


@pytest.mark.real
def test_the_small_real_model_gives_the_same_rows_there(ndif_python, tmp_path):
    """Qwen2.5-Coder-0.5B in float32 on both sides; the whole of these studies is a command in docs/remote.md."""
    folder = locate(spec_of("qwen2_5_coder_0_5b_q4"))
    words = ["model=qwen2_5_coder_0_5b_q4", "model.dtype=float32", "exp=clusters", "data.limit=8", "casting.patience=2", "exp.shuffles=2"]
    words += ["casting.n_poles=4", "casting.n_test=2", "casting.n_validation=1", "casting.max_new_tokens=6"]
    cache = {"LATENTGUARD_CACHE": str(cache_dir())}
    here = job([*words, "backend.store=false"], cache, tmp_path / "here")
    assert here.returncode == 0, here.stderr
    with Loopback(ndif_python, [folder], tmp_path / "server") as server:
        far = ["backend=ndif", f"backend.host={server.host}", f"backend.repo={folder}", "backend.store=false"]
        there = job([*words, *far], {**cache, "NDIF_API_KEY": server.key}, tmp_path / "there")
        assert there.returncode == 0, there.stderr
    same_run(tmp_path / "here", tmp_path / "there")
    assert len(rows(tmp_path / "there")) > 10


INSTALLED = """
import json, sys
import latentguard, torch
from latentguard.backends.loading import load
from latentguard.backends.skeleton import Remote, remote
from latentguard.interventions import Cell, Grid
from latentguard.prompts import Prompt
from latentguard.weights import locate, spec_of
from mine import Clamp

spec, prompts = spec_of(sys.argv[1], dtype="float32"), [Prompt.of(f"tell me about number {k}.", id=str(k)) for k in range(3)]
here, there = load(spec), remote(spec, Remote(host=sys.argv[2]))
act = Clamp(torch.randn(32, generator=torch.Generator().manual_seed(0)), most=-0.5, layer=2, when="every_step")
grid = Grid((Cell(), Cell((act,))))
one, other = here.logits(prompts, grid), there.logits(prompts, grid)
print(json.dumps({
    "from": latentguard.__file__,
    "apart": max(float((a - b).abs().max()) for x, y in zip(one, other) for a, b in zip(x, y)),
    "effect": float((one[0][0] - one[1][0]).abs().max()),
    "said": [[r.tokens for r in x] for x in here.generate(prompts, grid, max_new_tokens=4)]
            == [[r.tokens for r in x] for x in there.generate(prompts, grid, max_new_tokens=4)],
}))
"""


def test_the_wheel_and_a_users_own_file(ndif_server, tiny_folder, tmp_path):
    """Installed for good, from another folder: what is installed does not go to a server by itself."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, REPO], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    with zipfile.ZipFile(next(tmp_path.glob("latentguard-*.whl"))) as wheel:
        wheel.extractall(site)
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    user = tmp_path / "user"
    user.mkdir()
    (user / "mine.py").write_text(OWN)
    (user / "script.py").write_text(INSTALLED)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"LATENTGUARD_CACHE": str(tmp_path / "cache"), "NDIF_API_KEY": ndif_server.key}
    command = [tmp_path / "venv" / "bin" / "python", "script.py", str(tiny_folder), ndif_server.host]
    done = subprocess.run(command, capture_output=True, text=True, cwd=user, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["from"].startswith(str(site)) and told["apart"] < 1e-4 and told["effect"] > 1e-3 and told["said"]


# What a user meets


def test_keys_and_models_are_refused_with_the_way_out(there, tiny_folder, ndif_server, monkeypatch, tmp_path):
    for key, said in (("", "NDIF_API_KEY"), ("nonsense", "xxxxxxxx-xxxx"), ("33333333-3333-4333-8333-333333333333", "not known there")):
        monkeypatch.setenv("NDIF_API_KEY", key)
        with pytest.raises(InputError, match=said):
            there(tiny_folder).read(PROMPTS[:1])
    monkeypatch.setenv("NDIF_API_KEY", ndif_server.key)
    with pytest.raises(InputError, match="does not hold loopback/Tiny-Instruckt.*nearest is loopback/Tiny-Instruct"):
        there(tiny_folder, repo="loopback/Tiny-Instruckt")


def test_a_fault_in_a_users_code_comes_back_with_their_line(here, there, tiny_folder):
    class Broken(Add):
        @staticmethod
        def change(state, vector, amount):
            return state @ vector.new_zeros(3, 3)  # a line of the user's

    direction = every_kind(here).cells[1].interventions[0].direction
    with pytest.raises(InputError) as told:
        there(tiny_folder).logits(PROMPTS[:1], [Broken(direction, layer=1)])
    assert "a line of the user's" in str(told.value) or "vector.new_zeros(3, 3)" in str(told.value)
    assert "the server's words" in str(told.value)


def test_a_job_too_long_for_the_server_is_halved(here, tiny_folder, ndif_python, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTGUARD_CACHE", str(tmp_path / "cache"))
    with Loopback(ndif_python, [tiny_folder], tmp_path / "server") as server:
        monkeypatch.setenv("NDIF_API_KEY", server.key)
        server.restart_worker({1: "hurry"})
        far = remote(spec_of(str(tiny_folder), dtype="float32"), Remote(host=server.host, batch_size=2, batches=16, ahead=1))
        grid = every_kind(here)
        said, told = here.generate(PROMPTS, grid, max_new_tokens=24), far.generate(PROMPTS, grid, max_new_tokens=24)
        assert [[r.tokens for r in x] for x in said] == [[r.tokens for r in x] for x in told]
        assert far.host.usage.jobs > math.ceil(len(PROMPTS) * len(grid) / 32), "one was too long, and came in halves"


def test_what_has_returned_is_not_asked_for_again(here, there, tiny_folder, tmp_path, monkeypatch):
    """A run that ends in the middle keeps every job that came back."""
    stored = Stored(there(tiny_folder), tmp_path / "store")
    grid = every_kind(here)
    assert len(list(itertools.islice(stored.stream(PROMPTS, grid, decoding()), 20))) == 20
    again = Stored(there(tiny_folder), tmp_path / "store")
    assert len(list(again.stream(PROMPTS, grid, decoding()))) == len(PROMPTS) * len(grid)
    whole = math.ceil(len(PROMPTS) * len(grid) / 8)
    assert again.inner.host.usage.jobs < whole


def decoding():
    from latentguard.backends import Decoding

    return Decoding(3)


def test_jobs_that_wait_for_nothing_are_left_alone(ndif_server, there, tiny_folder):
    """No note is left of what was taken up."""
    far = there(tiny_folder)
    far.read(PROMPTS)
    assert isinstance(far.host, Host) and not list(far.host.notes.glob("*.json"))

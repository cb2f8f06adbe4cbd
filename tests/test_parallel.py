"""One model on several devices, and on several ranks of torchrun: the same states, logits and tokens as on one.

There is no GPU in these tests. Two devices are pretended (cards.py) or one of them is a disk; two ranks are two processes on the CPU, gloo between them.
"""

import gc
import json
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from latentguard import ranks
from latentguard.backends import memory
from latentguard.backends.loading import check_ranks, check_torchrun, load
from latentguard.backends.local import Local
from latentguard.backends.memory import Budget
from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from latentguard.errors import InputError
from latentguard.packs import read_pack
from latentguard.stock import packs_in
from latentguard.weights import spec_of
from tests.cards import spread
from tests.conftest import REPO
from tests.ranks_script import answers

SMALL = ["exp=steer_harm", "data.limit=12", "exp.casting.n_poles=4", "exp.layers=[0.5]", "exp.coefs=[4]", "exp.n_validation=2", "exp.n_damage=1", "exp.n_test=3", "exp.n_unsteered=2", "exp.n_grid=2", "exp.n_draw=1", "exp.draws=1", "exp.draws_reported=1", "exp.n_control=2", "exp.max_new_tokens=4"]  # fmt: skip


def loud(model):
    """Random weights made so large that prompts, layers and replies differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def local(model, **settings):
    return Local(model, tiny_tokenizer(), name="tiny", weights="tiny", **{"batch_size": 5, **settings})


def assert_same(found, wanted, atol=1e-5):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                found[name], value, atol=atol * max(1.0, float(value.abs().max())), rtol=0, msg=lambda told, name=name: f"{name}: {told}"
            )
        else:
            assert found[name] == value, name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with two tiny models."""
    folder = tmp_path_factory.mktemp("ranks")
    for family in ("llama", "qwen2"):
        loud(tiny_model(family)).save_pretrained(folder / family)
        tiny_tokenizer().save_pretrained(folder / family)
    return folder


def alone(models, family):
    return answers(local(AutoModelForCausalLM.from_pretrained(models / family, dtype=torch.float32)))


@pytest.mark.parametrize(("family", "split"), [("llama", 3), ("gemma2", 2)])
def test_blocks_on_two_devices_give_what_one_gives(family, split):
    window = {"sliding_window": 70} if family in ("gemma2", "mistral") else {}
    wanted = answers(local(loud(tiny_model(family, **window))))
    with spread(loud(tiny_model(family, **window)), split) as model:
        assert {str(block.self_attn.q_proj.weight.device) for block in model.model.layers} == {"cpu:0", "cpu:1"}
        found = answers(local(model))
    assert_same(found, wanted)
    assert len({tokens for cell in wanted["replies"] for tokens, _ in cell}) > 8 and len({len(tokens) for tokens, _ in wanted["sampled"]}) > 2, "replies vary"


def offloaded(models, *on_disk):
    parts = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm", "model.rotary_emb", "lm_head"]
    return spec_of(str(models / "llama"), dtype="float32", device_map={part: "disk" if part in on_disk else "cpu" for part in parts})


def test_blocks_whose_weights_lie_on_disk_give_what_memory_gives(models):
    found = load(offloaded(models, "model.layers.0", "model.layers.1", "model.layers.3", "lm_head"), batch_size=5)
    assert sum(parameter.is_meta for parameter in found.hf.parameters()) == 3 * 9 + 1
    assert_same(answers(found), alone(models, "llama"))


def test_embeddings_on_disk_are_refused(models):
    with pytest.raises(InputError, match="the embeddings of llama do not stay on a device"):
        load(offloaded(models, "model.embed_tokens"))


def test_the_device_that_would_be_full_first_decides_how_much_goes_into_a_pass(monkeypatch):
    free = {0: 8 * 10**9, 1: 8 * 10**9}
    monkeypatch.setattr(memory, "free_memory", lambda device: free[device.index or 0])
    whole = Budget.of(tiny_model(), None)
    with spread(tiny_model(), 2) as model:
        assert (half := Budget.of(model, None)).room == whole.room and half.a_token < whole.a_token, "each holds the keys of its own blocks"
        free[1] = 10**6
        assert Budget.of(model, None).room == free[1] // 2, "though the first has plenty"
    with spread(tiny_model(), 3) as model:
        assert Budget.of(model, None).a_token < half.a_token, "which holds fewer blocks"


REFUSED = [
    (1, {"tensor_parallel": True}, "needs processes to share"),
    (1, {"tensor_parallel": 4}, "--nproc-per-node 4"),
    (2, {"tensor_parallel": 3}, "model.tensor_parallel=3, but torchrun started 2 processes"),
    (2, {"tensor_parallel": -1}, "model.tensor_parallel=-1: give true"),
    (2, {"tensor_parallel": True, "device_map": "auto"}, "choose one of them"),
    (2, {"tensor_parallel": True, "quantization": {"quant_method": "bitsandbytes"}}, "is quantised"),
    (2, {"tensor_parallel": True, "tiny": {}}, "made in memory"),
    (4, {"tensor_parallel": True}, "has 4 attention heads, 2 key heads, 64 neurons in a layer, of which 4 ranks cannot have equal shares: start 2 processes"),
    (2, {}, "torchrun started 2 processes, but one is enough"),
]


@pytest.mark.parametrize(("count", "settings", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_ranks_cannot_hold_is_refused_before_weights_load(models, monkeypatch, count, settings, says):
    for name, value in {"RANK": "0", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("latentguard.ranks.joined", lambda: True)
    with pytest.raises(InputError, match="(?s)^.*$") as error:
        check_torchrun(spec_of(str(models / "llama"), **settings))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_models_without_a_plan_are_refused_and_one_rank_is_no_rank(models, monkeypatch, tmp_path):
    check_ranks(spec_of(str(models / "llama"), tensor_parallel=1))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    check_ranks(spec_of(str(models / "llama"), tensor_parallel=True))
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no plan for it: set model.device_map=auto"):
        check_ranks(spec_of(str(tmp_path), tensor_parallel=True))
    with pytest.raises(InputError, match="leave hydra/launcher out"):
        check_torchrun(spec_of(str(models / "llama"), tensor_parallel=True))


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(InputError, match="2 processes on a machine with 1 cuda devices: one process a device, --nproc-per-node 1"):
        ranks.join()


def torchrun(*words, cwd, **env):
    """Two ranks on this machine's loopback."""
    own = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **env}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    with subprocess.Popen([*start, *words], cwd=cwd, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.terminate()  # which ends its ranks; killed, it would leave them
            pytest.fail(f"the ranks wait for each other: {process.communicate()}")
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


def asked(models, scenario):
    said = torchrun(str(REPO / "tests/ranks_script.py"), str(models), scenario, cwd=models)
    assert said.returncode == 0, said.stdout + said.stderr
    return torch.load(models / f"{scenario}0.pt")


@pytest.mark.slow
def test_two_ranks_give_what_one_gives_and_do_so_where_memory_runs_out_on_either(models):
    found, wanted = asked(models, "everything"), alone(models, "llama")
    assert found["ranks"] == 2
    assert_same(found["answers"], wanted)
    assert_same(found["short"], wanted)
    assert {"in", "after", "elsewhere"} <= set(found["failed"]), "in a pass on both, after one on rank 0, and after one on rank 1"


@pytest.mark.slow
def test_questions_within_questions_given_up_wrong_and_stored(models):
    found, llama, qwen = asked(models, "manners"), alone(models, "llama"), alone(models, "qwen2")
    torch.testing.assert_close(torch.stack([row[0] for row in found["nested"]]), llama["logits"][:1, 1].expand(10, -1), atol=1e-4, rtol=0)
    for said, words in zip(
        found["refused"],
        ("max_new_tokens=5000", "nowhere", "division by zero", "read in turns", "only read, moments", "only read, moments", "started 2 processes"),
        strict=True,
    ):
        assert words in said
    assert_same(found["after"], llama)
    assert_same(found["other"], qwen)
    assert_same(found["stored"], qwen)
    torch.testing.assert_close(found["read again"], qwen["states"], atol=1e-5, rtol=0)
    assert found["asked"] == [["_states", "_states"], 0], "three prompts, the four others, and then none: rank 0 looks in its store and the other has none"
    assert packs_in(models / "cache0" / "store") and not (models / "cache1" / "store").exists()


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_alone_says_so_once_and_ends_the_job(models):
    said = torchrun(str(REPO / "tests/ranks_script.py"), str(models), "alone", cwd=models)
    assert said.returncode == 1 and said.stderr.count("latentguard: out of memory on rank 1 alone") == 1


@pytest.fixture
def here(monkeypatch, capfd):
    """The command line in this process."""
    from hydra.core.global_hydra import GlobalHydra

    from latentguard import run as door

    def call(cwd, *words):
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("LATENTGUARD_CACHE", str(cwd / "cache"))
        monkeypatch.setattr(sys, "argv", ["latentguard", *words])
        GlobalHydra.instance().clear()
        door.main()
        GlobalHydra.instance().clear()
        return SimpleNamespace(stdout=capfd.readouterr().out)

    return call


def left_by(folder):
    """Of the only run in a folder: its files, its rows, and how many entries it stored."""
    (run,) = (folder / "runs").iterdir()
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    entries = sum(len(read_pack(pack.path).keys) for pack in packs_in(folder / "cache" / "store"))
    return {str(path.relative_to(run)) for path in run.rglob("*")}, rows, entries


def test_the_last_exchange_is_held_until_the_process_ends(monkeypatch):
    # Let go of by a thread of gloo just as Python ends, its tensors abort the process, and a finished job has exit code -6.
    works = []

    def noting(collective):
        def call(*args, **settings):
            work = collective(*args, **settings)
            works.append(weakref.ref(work))
            return work

        return call

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(dist, name, noting(getattr(dist, name)))
    team = ranks.Team()
    for code in (2, 0):
        team._done = False
        team.dismiss(code)
        gc.collect()
        assert works[-1]() is not None and works[-2]() is None
    assert not dist.is_initialized()


@pytest.mark.slow
def test_a_job_on_two_ranks_leaves_one_folder_with_the_rows_of_one_process(models, tmp_path, here):
    words = ["model=tiny", f"model.id={models / 'llama'}", "model.dtype=float32", *SMALL]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    printed = here(one, *words).stdout
    said = torchrun("-m", "latentguard.run", *words, "model.tensor_parallel=true", cwd=two, LATENTGUARD_CACHE=str(two / "cache"))
    assert said.returncode == 0, said.stderr
    assert "rank" not in said.stderr
    (files, rows, entries), wanted = left_by(two), left_by(one)
    assert (files, entries, len(rows)) == (wanted[0], wanted[2], len(wanted[1]))
    for row, other in zip(rows, wanted[1], strict=True):
        assert row == {key: pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value for key, value in other.items()}
    assert [line for line in said.stdout.splitlines() if "runs/" not in line and " s; " not in line] == [
        line for line in printed.splitlines() if "runs/" not in line and " s; " not in line
    ]


@pytest.mark.slow
def test_bad_input_on_two_ranks_is_one_sentence_and_no_folder(models, tmp_path):
    said = torchrun("-m", "latentguard.run", "model=tiny", f"model.id={models / 'llama'}", "model.tensor_parallel=true", "exp.layers=[99]", cwd=tmp_path)
    assert said.returncode == 1, "torchrun's own, for any rank that ends with an error"
    assert [line.split(" (")[0] for line in said.stderr.splitlines() if line.startswith("latentguard:")] == [
        "latentguard: layer 99: this model has layers 0 … 4"
    ]
    assert "exitcode: 2) local_rank: 0" in said.stderr

"""The loopback NDIF server itself, met with nnsight's own client: what the tier `-m ndif` stands on."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import nnsight
import pytest
import torch
import websocket
from nnsight import CONFIG, TransformersModel
from nnsight.intervention.backends.remote import RemoteError
from nnsight.modeling import huggingface
from nnsight.schema.response import Status
from pydantic import ValidationError

from tests.conftest import REPO
from tests.loopback.faults import FAULTS
from tests.loopback.fixtures import TINY

pytestmark = pytest.mark.ndif
TEXT = "<|user|>\ntell me about number 3.<|end|>\n<|assistant|>\n"


@pytest.fixture
def client(ndif_server, tiny_folder, monkeypatch):
    """nnsight's model on meta, its host the proxy, its key a trusted one."""
    monkeypatch.setattr(CONFIG.API, "HOST", ndif_server.proxy.host)
    monkeypatch.setattr(CONFIG.API, "APIKEY", ndif_server.key)
    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
    monkeypatch.setitem(huggingface._ID_CACHE, str(tiny_folder), TINY)
    ndif_server.proxy.plan(())
    ndif_server.proxy.injected.clear()
    ndif_server.proxy.seen.clear()
    return TransformersModel(str(tiny_folder), task="text-generation", tokenizer=str(tiny_folder))


@pytest.fixture(scope="module")
def expected(tiny_folder):
    """Layer 2's output for TEXT without nnsight and without a server, [1, n_tokens, d]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    with torch.no_grad():
        return model(**tokenizer(TEXT, return_tensors="pt"), output_hidden_states=True).hidden_states[3]


def read(model):
    with model.trace(TEXT, remote=True) as tracer:
        states = model.model.layers[2].output.save()
    return states, tracer


def submit(model):
    with model.trace(TEXT, remote=True, blocking=False) as tracer:
        states = model.model.layers[2].output.save()  # noqa: F841
    return tracer.backend


def result(backend, deadline=30):
    """Poll until the job ends; the saved values."""
    until = time.monotonic() + deadline
    while (saved := backend()) is None:
        assert time.monotonic() < until, f"still {backend.status}"
    return saved


def runs(server):
    """How many requests have reached the API so far."""
    return server.log("api").count('"POST /request')


@pytest.mark.parametrize("trusted", [True, False])
def test_a_trace_gives_the_local_states_in_process_and_in_the_sandbox(client, ndif_server, expected, monkeypatch, trusted):
    monkeypatch.setattr(CONFIG.API, "APIKEY", ndif_server.key if trusted else ndif_server.plain_key)
    with client.trace(TEXT, remote=True) as tracer:
        states = client.model.layers[2].output.save()
        process = nnsight.save(__import__("os").getpid())
    assert torch.allclose(states, expected, atol=1e-5)
    assert (process == ndif_server.running["worker"].pid) is trusted
    assert tracer.backend.meta["runtime"] > 0
    assert client.device.type == "meta"


def test_a_session_of_several_traces_is_one_job(client, ndif_server, expected):
    before = runs(ndif_server)
    with client.session(remote=True):
        states = nnsight.save([])
        for _ in range(3):
            with client.trace(TEXT) as tracer:
                states.append(client.model.layers[2].output)
                tracer.stop()
    assert len(states) == 3
    assert all(torch.allclose(one, expected, atol=1e-5) for one in states)
    assert runs(ndif_server) == before + 1


def test_a_job_that_is_polled_comes_back_over_the_object_store(client, ndif_server, expected):
    saved = result(submit(client))
    assert torch.allclose(saved["states"], expected, atol=1e-5)
    assert [path for _, path in ndif_server.proxy.seen if path.startswith("/ndif-results/")]


def test_a_result_beyond_the_websocket_s_limit_comes_over_the_object_store(client, ndif_server):
    with client.trace(TEXT, remote=True):
        client.model.layers[0].output  # noqa: B018
        large = nnsight.save(torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(large, torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)))
    assert [path for _, path in ndif_server.proxy.seen if path.startswith("/ndif-results/")]


@pytest.mark.parametrize("trusted", [True, False])
def test_an_error_on_the_server_names_the_user_s_line(client, ndif_server, monkeypatch, trusted):
    monkeypatch.setattr(CONFIG.API, "APIKEY", ndif_server.key if trusted else ndif_server.plain_key)
    with pytest.raises(RemoteError, match=r"(?s)test_loopback\.py.*states @ torch\.zeros\(3, 3\).*RuntimeError"):
        with client.trace(TEXT, remote=True):
            states = client.model.layers[2].output.save()
            states @ torch.zeros(3, 3)
    assert read(client)[0].shape[-1] == 32  # the worker is none the worse


def test_a_model_that_is_not_hosted_is_refused(client, tiny_folder, monkeypatch):
    monkeypatch.setitem(huggingface._ID_CACHE, str(tiny_folder), "somebody/Other-70B")
    with pytest.raises(RemoteError, match="Could not deploy this model. CANT_ACCOMMODATE: placed 0 of 1"):
        read(client)


def test_status_and_env_answer(client, ndif_server):
    status = nnsight.status(raw=True)["deployments"].values()
    assert {entry["repo_id"]: (entry["deployment_level"], entry["application_state"]) for entry in status}[TINY] == ("HOT", "RUNNING")
    assert client.to_model_key() in {entry["model_key"] for entry in status}
    assert httpx.get(f"{ndif_server.host}/env").json()["packages"]["nnsight"] == "0.8.1"
    assert nnsight.ndif.whoami()["tags"] == ["trusted"]


@pytest.mark.parametrize(
    ("key", "said"),
    [("", "Missing or invalid API key"), ("no-key", "Invalid API key format: 'no-key'"), ("33333333-3333-4333-8333-333333333333", "Invalid API key.")],
)
def test_a_wrong_key_is_refused_in_ndif_s_words(client, monkeypatch, key, said):
    monkeypatch.setattr(CONFIG.API, "APIKEY", key)
    with pytest.raises(RemoteError, match=re.escape(said)):
        read(client)


POSTED = {  # fault -> what nnsight's client raises when it meets the POST of a job, and whether the server got the job
    "drop": (RemoteError, "disconnected", False),
    "drop_reply": (RemoteError, "disconnected", True),
    "delay": (None, None, True),
    "truncate": (RemoteError, "peer closed connection", True),
    "500": (RemoteError, "Internal server error", False),
    "garbage": (ValidationError, "Invalid JSON", False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_the_proxy_on_a_job_s_upload(client, ndif_server, fault):
    raised, said, reached = POSTED[fault]
    before = runs(ndif_server)
    ndif_server.proxy.plan([fault], only=lambda method, path: path == "/request")
    if raised:
        with pytest.raises(raised, match=said):
            read(client)
    else:
        read(client)
    assert ndif_server.proxy.injected == [(fault, "POST", "/request")]
    assert runs(ndif_server) == before + reached
    read(client)  # the schedule is at its end: all is well again


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_the_proxy_on_a_download(client, ndif_server, expected, fault):
    backend = submit(client)
    ndif_server.proxy.plan([fault], only=lambda method, path: path.startswith("/ndif-results/"))
    if fault == "delay":
        saved = result(backend)
    else:
        with pytest.raises(Exception) as caught:  # noqa: B017, PT011
            result(backend)
        assert not isinstance(caught.value, AssertionError)
        saved = backend()  # the same job, asked again
    assert torch.allclose(saved["states"], expected, atol=1e-5)
    assert [fault for fault, _, _ in ndif_server.proxy.injected] == [fault]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_the_proxy_on_the_websocket(client, ndif_server, fault):
    ndif_server.proxy.plan([fault], only=lambda method, path: path == "/subscribe")
    if fault == "delay":
        read(client)
    else:
        with pytest.raises((websocket.WebSocketException, ConnectionError, ValueError)):
            read(client)
    assert ndif_server.proxy.injected == [(fault, "GET", "/subscribe")]
    read(client)


def test_a_schedule_is_spent_one_entry_a_request(client, ndif_server):
    ndif_server.proxy.plan(iter(["500", None, "500"]))
    asked = [httpx.get(f"{ndif_server.proxy.host}/ping").status_code for _ in range(4)]
    assert asked == [500, 200, 500, 200]


def test_jobs_wait_in_the_queue_while_the_worker_is_down(client, ndif_server, expected):
    ndif_server.kill_worker()
    backend = submit(client)
    assert backend() is None
    ndif_server.start_worker()
    assert torch.allclose(result(backend)["states"], expected, atol=1e-5)


def test_a_worker_does_what_its_plan_says(client, ndif_server):
    ndif_server.restart_worker({1: "hang", 2: "evict", 3: "hurry", 4: "die"})
    hung, evicted = submit(client), submit(client)
    assert result(evicted)["states"].shape[-1] == 32  # NDIF put it back in the queue and ran it
    with pytest.raises(RemoteError, match="Your job exceeded the execution timeout of 0.5s."):
        with client.trace(TEXT, remote=True):
            client.model.layers[0].output  # noqa: B018
            while True:
                pass
    lost = submit(client)
    assert ndif_server.worker_died()
    ndif_server.restart_worker()
    result(submit(client))
    assert (hung(), hung.status) == (None, Status.QUEUED)
    assert (lost(), lost.status) == (None, Status.RUNNING)


def test_every_process_ends_with_the_one_that_started_it(ndif_python, tiny_folder, tmp_path):
    """Killed outright, the harness can clean nothing up itself."""
    script = (
        "import sys, os, signal, json\n"
        "from tests.loopback.server import Loopback\n"
        "server = Loopback(sys.argv[1], [sys.argv[2]], sys.argv[3]).__enter__()\n"
        "print(json.dumps([made.pid for made in server.running.values()]), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", script, ndif_python, str(tiny_folder), str(tmp_path)]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPO)}, cwd=REPO, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    groups = json.loads(ended.stdout)
    until = time.monotonic() + 30
    while any(alive(group) for group in groups):
        assert time.monotonic() < until, groups


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"

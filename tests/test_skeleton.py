"""What a server says it holds, in recorded shapes of ndif 0.1.2's /status, and where a server and its key are looked for."""

import json
import logging
from functools import partial

import httpx
import pytest

from latentguard.backends import skeleton
from latentguard.backends.jobs import Host
from latentguard.backends.passes import nnsight
from latentguard.backends.skeleton import Remote, check_hosted, remote
from latentguard.errors import InputError
from latentguard.weights import ModelSpec, spec_of
from tests.recorded import KEY, Clock, Server, error

CLASS = "nnsight.modeling.transformers.TransformersModel"


def model_key(repo, revision=None, kind=CLASS, task="text-generation", **more):
    return f"{kind}:{json.dumps({'repo_id': repo, 'revision': revision, **more, 'task': task})}"


def up(key, replica=0, state="RUNNING", level="HOT"):
    """One entry of /status."""
    about = json.loads(key.partition(":")[2])
    entry = {"application_state": state, "deployment_level": level, "pinned": True, "trusted": False, "dtype": "bfloat16", "execution_timeout_seconds": 3600.0}
    entry |= {"model_key": key, "replica_id": f"r{replica}", "repo_id": about["repo_id"], "task": about["task"], "revision": about["revision"], "config": "{}"}
    entry |= {"n_params": 7, "size_bytes": 14, "actor_class": None, "gpus": 1}
    if level == "WARM":
        del entry["application_state"], entry["pinned"]
    return {f"r{replica}:ModelActor:{key}": entry}


def cold(repo):
    return {repo: {"deployment_level": "COLD", "repo_id": repo}}


def status(*entries):
    merged = {name: entry for one in entries for name, entry in one.items()}
    return {"deployments": merged, "cluster": {"nodes": {}}}


def checked(said, repo="meta/Llama-8B-Instruct", url="http://ndif.test", key=None, tmp_path="notes"):
    server, clock = Server(), Clock()
    server.status = said
    host = Host(url, key or model_key(repo), KEY, tmp_path, transport=httpx.MockTransport(server), clock=clock, sleep=clock.sleep)
    check_hosted(host, repo)
    return clock.now


LLAMA, QWEN = up(model_key("meta/Llama-8B-Instruct")), up(model_key("Qwen/Qwen2.5-7B-Instruct"), state="UNHEALTHY")
BELIEVED = {
    "hot": status(QWEN, LLAMA),
    "warm": status(up(model_key("meta/Llama-8B-Instruct"), level="WARM")),
    "a replica is still loading": status(up(model_key("meta/Llama-8B-Instruct"), 0, "DEPLOYING"), up(model_key("meta/Llama-8B-Instruct"), 1)),
    "an actor's name and nothing else, as a controller just started says": status(
        {f"r0:ModelActor:{next(iter(LLAMA.values()))['model_key']}": {"application_state": "RUNNING"}}
    ),
    "nothing": status(),
    "504": error(504, "Timed out waiting for cluster status."),
    "503": error(503, "Could not retrieve cluster status."),
    "a page": httpx.Response(200, html="<h1>status</h1>"),
    "a list": [1, 2],
    "another shape": {"deployments": [LLAMA]},
    "odd entries": {"deployments": {"a": None, "b": [1], **LLAMA}},
}


@pytest.mark.parametrize("case", BELIEVED)
def test_a_model_that_is_held_or_a_server_that_does_not_tell(case):
    assert checked(BELIEVED[case]) == 0


@pytest.mark.parametrize(
    ("said", "state"),
    [
        (status(QWEN, cold("meta/Llama-8B-Instruct")), "not loaded"),
        (status(QWEN, up(model_key("meta/Llama-8B-Instruct"), state="DEPLOYING")), "deploying"),
        (status(up(model_key("meta/Llama-8B-Instruct"), state="UNHEALTHY")), "unhealthy"),
    ],
)
def test_a_model_that_is_not_up_yet_is_waited_for_and_said(said, state, caplog):
    caplog.set_level(logging.INFO)
    checked(said)
    assert f"holds meta/Llama-8B-Instruct, but it is {state}: jobs wait" in caplog.text


OTHER_KEYS = {
    "revision": (model_key("meta/Llama-8B-Instruct", "main"), r"holds meta/\S+, but its revision main: set model\.revision=main$"),
    "code": (model_key("meta/Llama-8B-Instruct", trust_remote_code=True), "with trust_remote_code=True: set model.trust_remote_code=true$"),
    "task": (model_key("meta/Llama-8B-Instruct", task="text-classification"), "for the task text-classification, not text-generation"),
    "spelling": (model_key("Meta/llama-8b-instruct"), "spells it Meta/llama-8b-instruct: set backend.repo=Meta/llama-8b-instruct$"),
    "class": (model_key("meta/Llama-8B-Instruct", kind="nnsight.modeling.language.LanguageModel"), "names it nnsight.modeling.language.LanguageModel, not"),
}


@pytest.mark.parametrize("case", OTHER_KEYS)
def test_a_model_under_another_key_is_told_apart_and_how_to_have_it(case):
    theirs, said = OTHER_KEYS[case]
    with pytest.raises(InputError, match=said):
        checked(status(QWEN, cold("meta/Llama-8B-Instruct"), up(theirs)))


def test_a_revision_that_we_name_and_they_do_not():
    with pytest.raises(InputError, match=r"its revision main: set model\.revision=null"):
        checked(status(LLAMA), key=model_key("meta/Llama-8B-Instruct", "abc123"))


def test_a_model_that_is_not_held_is_refused_with_those_that_are():
    entries = [up(model_key("openai-community/gpt2")), QWEN, LLAMA, up(model_key("meta/Llama-8B-Instruct"), 1), cold("google/gemma-2-9b-it")]
    with pytest.raises(InputError) as told:
        checked(status(*entries), "meta/Llama-70B-Instruct")
    assert str(told.value) == (
        "http://ndif.test does not hold meta/Llama-70B-Instruct; its instruct models are meta/Llama-8B-Instruct, Qwen/Qwen2.5-7B-Instruct; "
        "the nearest is meta/Llama-8B-Instruct (model.id=meta/Llama-8B-Instruct); on a server of your own, `ndif deploy meta/Llama-70B-Instruct` loads it"
    )


def test_no_more_names_than_can_be_read():
    entries = [up(model_key(f"lab{i}/Model-{i}B-chat")) for i in range(40)]
    with pytest.raises(InputError, match="and 32 more") as told:
        checked(status(*entries), "meta/Llama-70B-Instruct", url="https://api.ndif.us")
    assert len(str(told.value)) < 400 and "nearest" not in str(told.value) and "ndif deploy" not in str(told.value)


def test_names_where_none_is_an_instruct_model():
    with pytest.raises(InputError, match=r"it holds openai-community/gpt2; the nearest is openai-community/gpt2 \(model"):
        checked(status(up(model_key("openai-community/gpt2"))), "openai-community/gpt-2")


# Where


@pytest.fixture
def there(monkeypatch, tmp_path):
    """The server at any address; what reached it is in `seen`."""
    server, clock = Server(), Clock()
    monkeypatch.setenv("LATENTGUARD_CACHE", str(tmp_path))
    for name in ("NDIF_HOST", "NDIF_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "https://api.ndif.us")
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    monkeypatch.setattr(skeleton, "Host", partial(Host, transport=httpx.MockTransport(server), clock=clock, sleep=clock.sleep))
    return server


def reached(server, spec, settings=None):
    """(host, port, key) of the first request."""
    remote(spec, settings)
    _, host, path, headers = server.seen[0]
    return headers["host"], path, headers.get("ndif-api-key")


def test_the_address_is_the_configs_then_the_environments_then_nnsights(there, tiny_folder, monkeypatch):
    spec = spec_of(str(tiny_folder))
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://nnsight.test:5001/")
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "of nnsight")
    assert reached(there, spec) == ("nnsight.test:5001", "/ping", "of nnsight")
    there.seen.clear()
    monkeypatch.setenv("NDIF_HOST", "http://environment.test")
    monkeypatch.setenv("NDIF_API_KEY", f"{KEY}\n")
    assert reached(there, spec) == ("environment.test", "/ping", KEY)
    there.seen.clear()
    assert reached(there, spec, Remote(host="http://config.test/"))[0] == "config.test"


def test_the_public_server_asks_for_a_key_before_anything_is_fetched(there, monkeypatch):
    monkeypatch.setattr(skeleton, "skeleton_folder", lambda spec: pytest.fail("fetched"))
    for host in (None, "https://api.ndif.us/"):
        with pytest.raises(InputError, match="asks for a key: make one at .* set NDIF_API_KEY, or log in once"):
            remote(spec_of("some/Model-Instruct"), Remote(host=host))
    assert there.seen == []


def test_a_server_of_ones_own_needs_none(there, tiny_folder):
    assert reached(there, spec_of(str(tiny_folder)), Remote(host="http://127.0.0.1:5001"))[2] is None


@pytest.mark.parametrize(("url", "first"), [("http://lab.test/ndif/", "/ndif/ping"), ("http://lab.test", "/ping")])
def test_a_path_before_the_api_is_kept_where_a_server_answers_there(there, tiny_folder, url, first):
    there.meets = [("GET", "/ping", httpx.Response(200, json="pong"))]
    assert reached(there, spec_of(str(tiny_folder)), Remote(host=url))[1] == first


def test_and_refused_where_none_does(there, tiny_folder):
    there.meets = [("GET", "/status/ping", error(404, "Not Found"))]
    with pytest.raises(InputError, match="http://lab.test/status is no NDIF server's address .*without a path"):
        remote(spec_of(str(tiny_folder)), Remote(host="http://lab.test/status"))


@pytest.mark.parametrize("host", ["lab.test:5001", "localhost", "htp://lab.test", "http://lab test"])
def test_what_is_no_address(there, tiny_folder, host):
    with pytest.raises(InputError, match="backend.host"):
        remote(spec_of(str(tiny_folder)), Remote(host=host))
    assert there.seen == []


def test_a_server_that_is_not_there_is_said_before_any_work(there, tiny_folder):
    there.meets = [("GET", "/ping", httpx.ConnectError("[Errno 111] Connection refused"))] * 99
    with pytest.raises(InputError, match=r"http://lab\.test:5001 does not answer as an NDIF server does .*refused"):
        remote(spec_of(str(tiny_folder)), Remote(host="http://lab.test:5001"))
    assert {path for _, _, path, _ in there.seen} == {"/ping"}


def test_a_model_made_in_memory_lies_on_no_server():
    with pytest.raises(InputError, match="made in memory and lies on no server"):
        remote(ModelSpec("tiny", tiny={}))


@pytest.mark.parametrize("revision", [None, "abc"])
def test_the_model_is_named_as_nnsight_names_it(there, tiny_folder, monkeypatch, revision):
    from nnsight.modeling import huggingface

    far = remote(spec_of(str(tiny_folder), revision=revision), Remote(host="http://lab.test", repo="some/Model-Instruct"))
    monkeypatch.setitem(huggingface._ID_CACHE, str(tiny_folder), "some/Model-Instruct")
    named = nnsight.TransformersModel(str(tiny_folder), task="text-generation", tokenizer=str(tiny_folder), revision=revision)
    assert far.host.model_key == named.to_model_key()


def test_settings_that_are_none():
    with pytest.raises(InputError, match=r"backend\.on_stall='perhaps'"):
        Remote.of({"on_stall": "perhaps"})

"""What a server of recorded shapes (tests/recorded.py, ndif 0.1.2) can answer, and what a user then reads."""

import json
import os
import pickle

import httpx
import pytest
import zstandard

from latentguard.backends import answers
from latentguard.backends.jobs import Host, JobError, TooLargeError
from latentguard.errors import InputError
from tests.recorded import (
    EVICTED,
    GONE,
    KEY,
    MODEL,
    NO_MODULE,
    PAGE,
    PAYLOAD,
    RESULT,
    TRACE,
    Server,
    error,
    failed,
    make_host,
    notes,
    packed,
    run,
)


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def host(server, tmp_path):
    return lambda *args, **settings: make_host(server, tmp_path / "notes", *args, **settings)


# Refused

REFUSED = {
    "no key": (error(401, "Missing or invalid API key. Please visit https://login.ndif.us/ to create a new one."), "set NDIF_API_KEY"),
    "malformed": (error(400, f"Invalid API key format: '{KEY}'. API keys must be in the format: xxxxxxxx"), "keys look like xxxxxxxx-xxxx"),
    "unknown key": (error(403, "Invalid API key."), "the key is not known there"),
    "nnsight": (
        error(400, "Client nnsight version 0.8.1 is below the minimum supported 0.9. Please `pip install --upgrade nnsight`."),
        "below.*here are nnsight",
    ),
    "python": (error(400, "Client python version 3.11 is below the minimum supported 3.12. Please update python."), "Please update python"),
    "envelope": (error(422, [{"type": "missing", "loc": ["model_key"], "msg": "Field required"}]), "do not go together"),
    "page 404": (httpx.Response(404, html="<html><style>b{}</style><h1>Not Found</h1></html>"), r"HTTP 404: Not Found\).*NDIF server\?"),
    "elsewhere": (httpx.Response(405, json={"detail": "Method Not Allowed"}), r"NDIF server\?"),
    "moved": (httpx.Response(301, headers={"location": "https://ndif.test/request"}), "sends on to https://ndif.test: set backend.host"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_server_refuses_is_one_sentence_with_the_way_out(server, host, case):
    answer, said = REFUSED[case]
    here = host()
    server.meets = [("POST", "/request", answer)]
    with pytest.raises(InputError, match=said) as told:
        run(here)
    assert KEY not in str(told.value), "the key does not get into a log"
    assert (here.clock.now, len(server.posts), notes(here), here.usage.jobs) == (0.0, 0, [], 0)


@pytest.mark.parametrize("url", ["ndif.test", "ftp://ndif.test", "http://", "http://[::1", "http://ndif.test:99999", "http://h?x=1", "http://a b/"])
def test_an_address_that_is_none(host, url):
    with pytest.raises(InputError, match="backend.host"):
        host(url)


def test_an_address_loses_its_slash_and_a_key_its_line_end(server, host, tmp_path):
    assert host("http://ndif.test/api/ ").url == "http://ndif.test/api"
    made = Host("http://ndif.test/", MODEL, f"{KEY}\n", tmp_path, transport=httpx.MockTransport(server))
    assert made.line.client.headers["ndif-api-key"] == KEY
    with pytest.raises(InputError, match="letters that no key has"):
        Host("http://ndif.test", MODEL, "schlüssel", tmp_path)


def test_an_environment_in_which_no_connection_can_be_made(monkeypatch, tmp_path):
    monkeypatch.setenv("ALL_PROXY", "quux://nowhere")
    with pytest.raises(InputError, match="ALL_PROXY"):
        Host("http://ndif.test", MODEL, KEY, tmp_path)


# Nobody there


@pytest.mark.parametrize(
    "fault",
    [httpx.ConnectError("[Errno 111] Connection refused"), httpx.ConnectTimeout("timed out"), httpx.RemoteProtocolError("Server disconnected"), PAGE],
    ids=lambda fault: type(fault).__name__,
)
def test_an_address_that_never_answered_is_given_up_soon(server, host, fault):
    here = host()
    server.meets = [("POST", "/request", fault)] * 50 + [("GET", "/response", fault)] * 50
    with pytest.raises(InputError, match=r"http://ndif\.test does not answer as an NDIF server does .*backend\.host"):
        run(here)
    assert 5 < here.clock.now < 30
    assert notes(here) == ([] if isinstance(fault, httpx.ConnectError | httpx.ConnectTimeout) else ["k.json"]), "what may have arrived stays noted"


@pytest.mark.parametrize(
    "fault",
    [httpx.UnsupportedProtocol("x"), httpx.LocalProtocolError("x"), httpx.TooManyRedirects("x"), httpx.InvalidURL("x"),
     httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")],
    ids=lambda fault: type(fault).__name__,
)  # fmt: skip
def test_what_no_second_try_mends_is_said_at_once(server, host, fault):
    here = host()
    server.meets = [("POST", "/request", fault)]
    with pytest.raises(InputError, match=r"http://ndif\.test cannot be"):
        run(here)
    assert here.clock.now == 0


@pytest.mark.parametrize(
    ("answer", "url", "said"),
    [(httpx.Response(404, json={"detail": "Not Found"}), "http://ndif.test/v1", "without a path"), (httpx.Response(200, json={"ok": 1}), "http://ndif.test", "no NDIF"),
     (httpx.Response(404, html="<h1>404</h1>"), "http://ndif.test", r"NDIF server\?"), (httpx.Response(307, headers={"location": "/there/"}), "http://ndif.test", "sends on")],
)  # fmt: skip
def test_a_greeting_tells_another_server(server, host, answer, url, said):
    host().line.greet()
    host("http://ndif.test").line.greet()
    server.meets = [("GET", "/ping", answer)]
    with pytest.raises(InputError, match=said):
        host(url).line.greet()


# Results


def test_a_link_that_is_no_longer_good_has_the_job_sent_anew(server, host):
    here = host()
    job = here.submit("k", lambda: b"blob")
    first = job.id
    server.results[f"/ndif-results/{first}.pt"] = httpx.Response(403, content=GONE)
    assert "answer" in here.fetch(job)
    assert [given for given, _ in server.posts] == [first, job.id] and first != job.id
    assert (here.usage.jobs, here.usage.resubmitted) == (1, 1) and json.loads((here.notes / "k.json").read_text())["id"] == job.id


def test_results_that_are_never_to_be_had(server, host):
    here = host()
    server.meets = [("GET", "/ndif-results", httpx.Response(403, content=GONE))] * 9
    with pytest.raises(InputError, match=r"not to be had at http://store\.test \(HTTP 403\): ask the keeper") as told:
        run(here)
    assert len(server.posts) == 3 and "Signature" not in str(told.value)


@pytest.mark.parametrize("data", [None, 7, "", "somewhere", "s3://bucket/x"])
def test_a_result_that_lies_nowhere(server, host, data):
    here = host()
    shape = {"id": "x", "status": "COMPLETED", "description": "", "data": data, "meta": "odd"}
    server.meets = [("GET", "/response", httpx.Response(200, json=shape))] * 9
    with pytest.raises(InputError, match="not to be had"):
        run(here)
    assert len(server.posts) == 3


@pytest.mark.parametrize("fault", [httpx.RemoteProtocolError("peer closed connection"), httpx.ReadTimeout("slow"), httpx.Response(503, content=b"<Error/>")])
def test_a_result_that_was_cut_is_downloaded_again(server, host, fault):
    here = host()
    server.meets = [("GET", "/ndif-results", fault)]
    assert "answer" in run(here)
    assert len(server.posts) == 1 and here.usage.bytes_down == len(RESULT) and here.usage.retries == 1


@pytest.mark.parametrize(
    "content",
    [RESULT[: len(RESULT) // 2], b"", b"<html>no</html>", zstandard.compress(b"no torch file"), zstandard.compress(b"PK\x03\x04 cut"), packed([1, 2]),
     zstandard.compress(zstandard.decompress(RESULT)[:-200])],
    ids=["half", "empty", "page", "other", "stub", "a list", "cut inside"],
)  # fmt: skip
def test_a_result_that_cannot_be_read_is_downloaded_again_and_then_made_anew(server, host, content):
    here = host()
    server.meets = [("GET", "/ndif-results", httpx.Response(200, content=content))]
    assert "answer" in run(here) and len(server.posts) == 1
    server.meets = [("GET", "/ndif-results", httpx.Response(200, content=content))] * 3
    assert "answer" in run(here, "other") and len(server.posts) == 3
    server.stored = content
    with pytest.raises(InputError, match="cannot be read"):
        run(here, "third")
    assert len(server.posts) == 6


def test_a_store_that_answered_before_is_borne_as_long_as_its_server(server, host, caplog):
    here = host(patience=300.0)
    run(here)
    server.meets = [("GET", "/ndif-results", httpx.ConnectError("refused"))] * 14
    assert "answer" in run(here, "other") and here.clock.now > 60
    assert caplog.text.count("it is asked again for up to 5 min") == 1, "the log says so once"


def test_a_store_may_send_on(server, host):
    server.meets = [("GET", "/ndif-results", httpx.Response(307, headers={"location": "http://region.store.test/there"}))]
    server.results["/there"] = httpx.Response(200, content=RESULT)
    here = host()
    assert "answer" in run(here) and here.usage.retries == 0


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Evil.where),)


def test_a_result_that_wants_to_run_code_is_refused_unopened(server, host, tmp_path):
    Evil.where = tmp_path / "ran"
    server.stored = packed({"answer": Evil()})
    pickle.loads(pickle.dumps(Evil()))
    assert Evil.where.is_dir(), "opened, it does run"
    Evil.where.rmdir()
    here = host()
    with pytest.raises(InputError, match=r"holds posix\.mkdir, which is not unpickled here \(it could run code\): return tensors"):
        run(here)
    assert not Evil.where.exists() and len(server.posts) == 1 and notes(here) == []


def test_a_store_that_cannot_be_reached_is_named_by_its_own_address(server, host):
    """A server of one's own that tells an address only its own network knows."""
    here = host()
    server.meets = [("GET", "/ndif-results", httpx.ConnectError("[Errno -2] Name or service not known"))] * 99
    with pytest.raises(InputError, match=r"http://store\.test, where http://ndif\.test keeps results, .*NDIF_OBJECT_STORE_PUBLIC_URL"):
        run(here)
    assert here.clock.now < 30 and notes(here) == ["k.json"]


# Failures on the server


def test_the_users_line_comes_back(server, host):
    """Neither code nor comment in a traceback makes it a failure of memory or one that passes."""
    server.course = failed(TRACE)
    here = host()
    with pytest.raises(JobError, match=r"(?s)job \w+ failed at http://ndif\.test; the server's words:\nTraceback.*study\.py.*line 12.*AttributeError"):
        run(here)
    assert len(server.posts) == 1 and notes(here) == [] and here.usage.run_seconds == 0.25


FAILURES = {
    "architecture": (NO_MODULE, r"some/Model-Instruct.*'model\.layers\.0\.x'; transformers is \S+ here and 5\.1\.0 there: `pip install transformers==5\.1\.0`"),
    "module": (
        PAYLOAD.format("ModuleNotFoundError: No module named 'sklearn'"),
        r"the Python module 'sklearn', which the server does not have.*docs/remote\.md",
    ),
    "module inside": (
        TRACE.replace("AttributeError: module 'torch.cuda' has", "ModuleNotFoundError: No module named 'a.b'"),
        r"(?s)line 12.*'a\.b', which the",
    ),
    "payload": (PAYLOAD.format("AttributeError: no attribute 'x'"), r"could not be read at .* \(AttributeError\); transformers is .* here and 5\.1\.0 there"),
    "no room": ("Could not deploy this model. CANT_ACCOMMODATE: try again later", r"could not load some/Model-Instruct, says: 'CANT_ACC.*choose a model"),
    "operator": ("Request cancelled by operator.", "was stopped at .*: the same command sends it anew"),
    "silence": ("", "the server says nothing"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_that_lasts_is_not_sent_again_and_told_with_what_helps(server, host, case):
    words, said = FAILURES[case]
    server.course = failed(words)
    with pytest.raises(JobError, match=said):
        run(host())
    assert len(server.posts) == 1


def test_the_same_versions_or_none_that_are_told(server, host):
    server.course = failed(NO_MODULE)
    server.meets = [("GET", "/env", error(504, "Timed out waiting for cluster env."))]
    with pytest.raises(JobError, match="compare the versions"):
        run(host())
    same = {name: answers.version(name) for name in ("transformers", "nnsight", "torch")}
    server.meets = [("GET", "/env", httpx.Response(200, json={"packages": same}))]
    with pytest.raises(JobError, match="the same here and there"):
        run(host())


PASSING = {
    "evicted": EVICTED,
    "submitting": "Error submitting request to model deployment. Please try again later. Sorry for the inconvenience.",
    "critical": "Critical server error occurred. Please try again later. Sorry for the inconvenience.",
    "preempted": "Your job was cancelled or preempted by the server.",
    "payload": PAYLOAD.format("ZstdError: cut"),
    "runner": "Traceback (most recent call last):\nConnectionError: connection closed before message complete\n",
}


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_is_sent_anew_twice_at_most(server, host, case):
    server.courses = [failed(PASSING[case])] * 2
    here = host()
    assert "answer" in run(here)
    assert (len({given for given, _ in server.posts}), here.usage.jobs, here.usage.resubmitted) == (3, 1, 2) and notes(here) == []
    assert here.clock.now > 8, "not at once"
    server.course = failed(PASSING[case])
    with pytest.raises(JobError, match=r"(?s)third time|words:\nTraceback|could not be read|was stopped"):
        run(here, "other")
    assert len(server.posts) == 6 and notes(here) == []


@pytest.mark.parametrize(
    "words",
    ["Traceback (most recent call last):\n  File \"a.py\", line 1, in f\n    g()\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB.\n",
     "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
     "Your job exceeded the execution timeout of 600.0s."],
)  # fmt: skip
def test_too_little_memory_or_time_asks_for_a_smaller_job(server, host, words):
    server.course = failed(words)
    here = host()
    with pytest.raises(TooLargeError):
        run(here)
    assert len(server.posts) == 1 and notes(here) == [] and not here.going


@pytest.mark.parametrize("answer", [httpx.Response(413, html="<h1>413 Request Entity Too Large</h1>"), error(400, "There was an error parsing the body")])
def test_an_upload_that_is_refused_for_its_size_too_where_the_job_is_fetched(server, host, answer):
    server.meets = [("POST", "/request", answer)]
    here = host()
    job = here.submit("k", lambda: b"blob")
    with pytest.raises(TooLargeError, match="an upload of 4 bytes"):
        here.fetch(job)
    assert notes(here) == [] and here.usage.jobs == 0

"""Jobs on a server of recorded shapes (tests/recorded.py, ndif 0.1.2): sent once, followed, found again; nobody sleeps."""

import json
import os
import time
from email.utils import formatdate

import httpx
import pytest
import torch

from latentguard.backends import answers
from latentguard.backends.jobs import JobError
from latentguard.errors import InputError
from tests.recorded import DONE, EVICTED, GONE, KEY, MODEL, PAGE, QUEUED, RESULT, RUNNING, TRACE, Server, error, failed, make_host, notes, run


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def host(server, tmp_path):
    return lambda *args, **settings: make_host(server, tmp_path / "notes", *args, **settings)


def test_a_job_goes_once_and_comes_back_and_leaves_no_note(server, host):
    here = host()
    job = here.submit("k", lambda: b"blob")
    assert notes(here) == ["k.json"] and json.loads((here.notes / "k.json").read_text())["id"] == job.id
    assert torch.equal(here.fetch(job)["answer"][0], torch.arange(3.0))
    here.done(job)
    usage = here.usage
    assert (len(server.posts), usage.jobs, usage.retries, usage.resubmitted, usage.bytes_up, usage.bytes_down) == (1, 1, 0, 0, 4, len(RESULT))
    assert notes(here) == [] and not here.going
    assert server.posts[0][1] == {"model_key": MODEL, "session_id": "", "compress": True, "env": {}, "id": job.id}
    to_store = [headers for _, where, _, headers in server.seen if where == "store.test"]
    assert to_store and all("ndif-api-key" not in headers for headers in to_store), "the key goes to the API alone"
    assert KEY not in repr(here)


def test_a_server_without_keys_is_asked_for_a_sandbox_in_so_many_words(server, host):
    run(host(sandboxed=True))
    assert server.posts[0][1]["trusted"] is False


# Trouble on the way

TROUBLES = {
    "reconnecting": error(503, "Service temporarily unavailable: compute backend is reconnecting. Please try again in a few minutes."),
    "auth": error(503, "Auth backend unavailable."),
    "500": error(500, "Internal server error."),
    "gateway": httpx.Response(502, html="<h1>502 Bad Gateway</h1>"),
    "page": PAGE,
    "half": httpx.Response(200, content=b'{"id": "abc", "stat'),
    "null": httpx.Response(200, json=None),
    "list": httpx.Response(200, json=["id", "status"]),
    "text": httpx.Response(200, json="id status"),
    "odd": httpx.Response(200, json={"id": {"a": 1}, "status": 7, "data": []}),
    "deep": httpx.Response(200, content=b"[" * 100_000),
    "bytes": httpx.Response(200, content=b"\xff\xfe\x00"),
    "dropped": httpx.RemoteProtocolError("Server disconnected without sending a response."),
    "cut": httpx.RemoteProtocolError("peer closed connection without sending complete message body"),
    "refused": httpx.ConnectError("[Errno 111] Connection refused"),
    "slow": httpx.ReadTimeout("timed out"),
    "pool": httpx.PoolTimeout(""),
    "gzip": httpx.DecodingError("incorrect header check"),
}


@pytest.mark.parametrize("where", ["POST /request", "GET /response"])
@pytest.mark.parametrize("case", TROUBLES)
def test_trouble_passes_and_nothing_is_sent_twice(server, host, case, where):
    here = host()
    method, part = where.split()
    server.meets = [("GET", "/response", TROUBLES[case])] * 2 if method == "GET" else [(method, part, TROUBLES[case])]
    assert "answer" in run(here)
    assert (len(server.posts), here.usage.jobs, here.usage.bytes_down) == (1, 1, len(RESULT))
    assert here.usage.retries == (2 if method == "GET" else 1) and here.usage.resubmitted == 0
    assert any("asking again" in line for line in here.lines)


def test_a_reply_that_was_lost_is_asked_for_and_the_job_not_sent_again(server, host):
    """Between its arrival and its place in a queue the server does not know the id."""
    server.course = (None, None, QUEUED, RUNNING, DONE)
    server.meets = [("POST", "/request", "lost reply")]
    here = host()
    assert "answer" in run(here) and len(server.posts) == 1
    methods = [method for method, *_ in server.seen]
    assert methods.count("POST") == 1


def test_what_never_arrived_is_sent_again_under_its_id(server, host):
    server.meets = [("POST", "/request", httpx.ReadError(""))]
    here = host()
    job = here.submit("k", lambda: b"blob")
    assert [given for given, _ in server.posts] == [job.id]
    asked = [path for method, _, path, _ in server.seen if method == "GET"]
    assert len(asked) == 5 and set(asked) == {f"/response/{job.id}"}, "the server was asked for a while first"


def test_what_met_a_closed_door_is_sent_again_without_asking(server, host):
    server.meets = [("POST", "/request", httpx.ConnectError("[Errno 111] Connection refused"))] * 3
    host().submit("k", lambda: b"blob")
    assert [method for method, *_ in server.seen] == ["POST"] * 4 and len(server.posts) == 1


def test_a_server_that_numbers_jobs_itself(server, host):
    server.numbers = True
    here = host()
    job = here.submit("k", lambda: b"blob")
    assert job.id == "server-0" and json.loads((here.notes / "k.json").read_text())["id"] == "server-0"
    assert "answer" in here.fetch(job)


def test_a_server_that_falls_silent_is_borne_for_our_patience_and_then_named(server, host):
    here = host(patience=900.0)
    job = here.submit("k", lambda: b"blob")
    server.meets = [("GET", "/response", httpx.ConnectError("refused"))] * 500
    with pytest.raises(InputError, match=r"has not answered properly for 1\d min .*what was sent is noted"):
        here.fetch(job)
    assert 800 < here.clock.now < 1000 and notes(here) == ["k.json"]


@pytest.mark.parametrize("said", ["30", "30.0", "date"])
def test_a_server_is_left_alone_for_as_long_as_it_asks(server, host, said):
    said = formatdate(time.time() + 31, usegmt=True) if said == "date" else said
    server.meets = [("POST", "/request", httpx.Response(429, json={"detail": "Too many requests"}, headers={"retry-after": said}))]
    here = host()
    run(here)
    assert 28 < here.clock.now < 40


@pytest.mark.parametrize("said", ["86400", "1e999", "nan", "-5", "soon", ""])
def test_a_wait_beyond_our_patience_is_said_and_nonsense_is_no_wait(server, host, said):
    server.meets = [("POST", "/request", httpx.Response(429, json={"detail": "Too many"}, headers={"retry-after": said}))]
    here = host(patience=600.0)
    if said == "86400":
        with pytest.raises(InputError, match="asks to wait 24 h 0 min.*Too many.*backend.patience"):
            run(here)
        assert notes(here) == []
    else:
        run(here)
    assert here.clock.now < 20


def test_a_machine_that_slept_has_used_up_no_patience(server, host):
    here = host(patience=600.0)
    job = here.submit("k", lambda: b"blob")
    server.states[job.id] = [QUEUED] * 40 + [RUNNING, DONE]

    def night(answer):
        here.clock.now += 30_000
        return answer

    server.meets = [("GET", "/response", night)]
    assert "answer" in here.fetch(job)
    assert here.usage.queue_seconds < 300


# Following


def test_the_line_that_a_user_sees(server, host):
    moved = [("QUEUED", f"Moved to position {n} in Queue.") for n in (3, 2, 1)]
    loading = [("PROVISIONING", "Model Provisioning..."), ("DEPLOYING", "Model Deploying...")]
    server.course = (None, ("QUEUED", "Added to Queue at position 12."), *loading, *moved, ("DISPATCHED", "Sent."), RUNNING, RUNNING, DONE)
    here = host()
    run(here)
    stages = [line.rpartition(", ")[0] for line in here.lines[1:]]
    assert here.lines[0] == "sending" and list(dict.fromkeys(stages)) == [
        "sent", "queued, position 12", "the server makes room for the model", "the server loads the model", "queued, position 3", "queued, position 2",
        "queued, position 1", "handed to the model", "running", "fetching the result",
    ]  # fmt: skip
    assert here.lines[2] == "queued, position 12, 0 s"
    assert [answers.span(seconds) for seconds in (0.4, 12, 119, 120, 3599, 7500)] == ["0 s", "12 s", "119 s", "2 min", "59 min", "2 h 5 min"]


def test_a_queue_that_never_moves_stops_with_the_choices_and_keeps_the_note(server, host):
    server.course = (QUEUED,)
    here = host(patience=300.0)
    with pytest.raises(InputError, match=r"has not moved for 5 min \(queued, position 1\): the same command.*on_stall=resubmit.*patience=SECONDS"):
        run(here)
    assert 290 < here.clock.now < 320 and notes(here) == ["k.json"] and len(server.posts) == 1


def test_a_job_that_ran_but_is_said_to_wait_is_found_out_by_one_sent_behind_it(server, host):
    """Seen on ndif 0.1.2: 'added to the queue' stored after 'completed'. The server then says QUEUED for ever."""
    server.courses = [(QUEUED,), (QUEUED, RUNNING, DONE), (QUEUED, RUNNING, DONE)]
    here = host(patience=300.0, probe=lambda: b"nothing")
    assert "answer" in run(here)
    job, probe, anew = (given for given, _ in server.posts)
    assert len({job, probe, anew}) == 3 and here.clock.now < 40
    assert (here.usage.jobs, here.usage.resubmitted) == (1, 1) and not notes(here)


def test_a_queue_that_stands_still_is_not_taken_for_one(server, host):
    """What was sent behind it waits too: one probe, and no second job."""
    server.courses = [(QUEUED,) * 200 + (RUNNING, DONE), (QUEUED,)]
    here = host(patience=3000.0, probe=lambda: b"nothing")
    assert "answer" in run(here) and here.clock.now > 200
    assert len(server.posts) == 2 and here.usage.resubmitted == 0 and not notes(here)


def test_or_is_waited_for(server, host):
    server.course = (QUEUED,) * 1500 + (RUNNING, DONE)
    here = host(patience=300.0, on_stall="wait")
    assert "answer" in run(here) and here.clock.now > 2000 and len(server.posts) == 1


def test_or_is_sent_anew_twice_at_most(server, host):
    server.courses = [(QUEUED,), (QUEUED, RUNNING, DONE)]
    here = host(patience=60.0, on_stall="resubmit")
    assert "answer" in run(here) and len(server.posts) == 2 and here.usage.resubmitted == 1
    server.course = (QUEUED,)
    with pytest.raises(InputError, match="has not moved for 60 s"):
        run(here, "other")
    assert len(server.posts) == 5


def test_a_queue_that_moves_slowly_is_news(server, host):
    server.course = tuple(("QUEUED", f"Moved to position {n} in Queue.") for n in range(20, 0, -1) for _ in range(40)) + (DONE,)
    here = host(patience=120.0)
    assert "answer" in run(here) and here.clock.now > 1000


def test_time_spent_elsewhere_between_two_jobs_is_neither_patience_nor_waiting(server, host):
    here = host(patience=60.0)
    job = here.submit("k", lambda: b"blob")
    here.clock.now += 5000
    server.states[job.id] = [QUEUED] * 3 + [RUNNING, DONE]
    assert "answer" in here.fetch(job)
    assert here.usage.run_seconds == 0.25 and here.usage.queue_seconds < 1


def test_waiting_is_what_it_took_beyond_the_runs_and_counts_once(server, host):
    server.course, server.meta = (*[QUEUED] * 20, *[RUNNING] * 20, DONE), {"runtime": 30.0}
    here = host()
    for job in [here.submit(key, lambda: b"blob") for key in "kl"]:
        here.fetch(job)
    assert here.usage.run_seconds == 60.0 and abs(here.usage.queue_seconds + 60.0 - here.clock.now) < 1e-6


# Found again


def test_ctrl_c_tells_the_job_and_a_later_run_finds_it(server, host, caplog):
    here = host()
    jobs = [here.submit(key, lambda: b"blob") for key in ("k", "l")]

    def interrupt(answer):
        raise KeyboardInterrupt

    server.meets = [("GET", "/response", interrupt)]
    with pytest.raises(KeyboardInterrupt):
        here.fetch(jobs[0])
    assert f"job {jobs[0].id} goes on at http://ndif.test" in caplog.text and notes(here) == ["k.json", "l.json"]
    later = host()
    assert all("answer" in run(later, key) for key in ("k", "l"))
    assert len(server.posts) == 2 and notes(later) == []
    assert (later.usage.jobs, later.usage.found_again, later.usage.resubmitted) == (0, 2, 0)


def test_an_error_in_one_job_leaves_the_others_for_the_next_run(server, host):
    server.courses = [failed(TRACE)]
    here = host()
    first, _ = (here.submit(key, lambda: b"blob") for key in ("k", "l"))
    with pytest.raises(JobError):
        here.fetch(first)
    assert notes(here) == ["l.json"]
    later = host()
    assert "answer" in run(later, "l") and later.usage.found_again == 1 and len(server.posts) == 2


@pytest.mark.parametrize("words", [TRACE, EVICTED])
def test_a_job_that_failed_while_nobody_looked_is_sent_anew(server, host, words):
    """What was wrong may have been mended since."""
    server.courses = [failed(words)]
    host().submit("k", lambda: b"blob")
    server.states = {name: left[-1:] for name, left in server.states.items()}
    later = host()
    assert "answer" in run(later) and len(server.posts) == 2
    assert (later.usage.found_again, later.usage.resubmitted) == (1, 1)


def test_a_result_that_was_not_fetched_within_the_hour_is_made_anew(server, host):
    old = host().submit("k", lambda: b"blob")
    server.results[f"/ndif-results/{old.id}.pt"] = httpx.Response(403, content=GONE)
    assert "answer" in run(host()) and len(server.posts) == 2


def test_a_job_that_the_server_has_forgotten_is_sent_again(server, host):
    host().submit("k", lambda: b"blob")
    server.states.clear()
    later = host()
    assert "answer" in run(later) and (later.usage.jobs, later.usage.found_again) == (1, 0)
    assert server.posts[0][0] == server.posts[1][0], "under its id: it may only not have come into a queue yet"


NOTE = {"id": "a" * 32, "host": "http://ndif.test", "model": MODEL, "at": 0.0}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", "\x00", json.dumps({**NOTE, "host": "http://other.test"}), json.dumps({**NOTE, "model": "other"}), json.dumps({**NOTE, "id": None}),
     json.dumps({**NOTE, "id": "../request"})],
)  # fmt: skip
def test_a_note_that_is_damaged_or_not_ours_is_not_followed(server, host, text):
    server.states[NOTE["id"]] = [DONE]
    here = host()
    here.notes.mkdir()
    (here.notes / "k.json").write_text(text)
    assert "answer" in run(here)
    assert len(server.posts) == 1 and server.posts[0][0] != NOTE["id"] and here.usage.found_again == 0 and notes(here) == []


def test_notes_of_long_ago_are_swept_and_those_of_yesterday_kept(server, host):
    here = host()
    here.notes.mkdir()
    for name, days in (("old.json", 31), ("half.json.123", 31), ("new.json", 1)):
        (here.notes / name).write_text(json.dumps(NOTE))
        os.utime(here.notes / name, (time.time() - days * 86400,) * 2)
    run(here)
    assert notes(here) == ["new.json"]


def test_a_folder_that_takes_no_notes(server, host, tmp_path):
    (tmp_path / "notes").write_text("a file")
    with pytest.raises(InputError, match="jobs cannot be noted in .*LATENTGUARD_CACHE"):
        run(host())
    assert server.posts == []


def test_two_processes_with_the_same_job_share_it(server, host):
    one, other = host(), host()
    mine, theirs = one.submit("k", lambda: b"blob"), other.submit("k", lambda: b"blob")
    assert mine.id == theirs.id and len(server.posts) == 1
    assert "answer" in one.fetch(mine)
    one.done(mine)
    assert "answer" in other.fetch(theirs)
    other.done(theirs)
    assert notes(one) == [] and (one.usage.jobs, other.usage.jobs, other.usage.found_again) == (1, 0, 1)


def test_the_same_work_twice_at_once_is_one_job(server, host):
    here = host()
    jobs = [here.submit("k", lambda: b"blob") for _ in range(2)]
    assert all("answer" in here.fetch(job) for job in jobs)
    for job in jobs:
        here.done(job)
    assert len(server.posts) == 1 and (here.usage.jobs, here.usage.found_again) == (1, 0)

"""Jobs on an NDIF server over plain HTTP: sent, followed, fetched, and found again after a stop. Knows no model and no trace.

A job's id is made here and noted down before it is sent. After a lost connection, or in a later run, that id is asked for; where the
server does not know it for a while, the job is sent under the same id: at worst it is computed twice, and counted once.
"""

import contextlib
import json
import logging
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import httpx

from latentguard.backends import answers
from latentguard.backends.connection import STEP, AgainError, Connection, origin
from latentguard.errors import InputError

log = logging.getLogger(__name__)
OnStall = Literal["stop", "wait", "resubmit"]
_TRIES = 3  # submissions of one job, where it was not the job's fault
_WAITING = ("QUEUED", "PROVISIONING", "DEPLOYING")
_STALE = 15.0  # seconds in one place of a queue after which a probe is sent behind
_KEPT = 30 * 86400.0  # seconds after which a note is forgotten


class TooLargeError(Exception):
    """The server had too little memory or time for a job: a smaller one may do."""


class JobError(InputError):
    """A job failed on the server for a reason of its own: the server's words."""


class _GoneError(Exception):
    """A result is no longer to be had."""


@dataclass
class Usage:
    """What was asked of a server so far.

    Each job counts once in `jobs` (or in `found_again`, sent by an earlier run) and in `resubmitted` each time it had to be sent anew.
    `retries` are requests made again. Bytes are those of bodies that arrived. `run_seconds` is what the server says its runs took,
    `queue_seconds` what this side waited beyond them.
    """

    jobs: int = 0
    resubmitted: int = 0
    found_again: int = 0
    retries: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    queue_seconds: float = 0.0
    run_seconds: float = 0.0

    def numbers(self) -> dict[str, float]:
        """For a tracker."""
        return {key: round(value, 3) for key, value in vars(self).items()}


@dataclass
class Job:
    """One piece of work: what it is to us (`key`), what the server calls it (`id`), and what the server said of it last."""

    key: str
    id: str
    blob: Callable[[], bytes]
    answer: dict = field(default_factory=dict)
    too_large: str = ""  # for the server to take in
    tries: int = 1
    again: bool = False  # noted by an earlier run
    waited: float = 0.0
    probe: str = ""  # the id of one sent behind it, to see whether the queue moves


@dataclass
class Host:
    """An NDIF server.

    Args:
        url: its address.
        model_key: nnsight's name of the model there.
        key: NDIF_API_KEY; '' where the server asks for none.
        notes: a folder in which jobs that run are noted.
        patience: seconds without any news of a job, or without an answer of a server that answered before, that are borne.
        on_stall: what then: stop with a sentence, wait on, or send the job once more (at most three times in all).
        sandboxed: ask a server that checks no keys to run jobs apart from the model, as NDIF does for ordinary keys.
        told: what a progress line shows.
        probe: a job that does nothing.

    Raises:
        InputError: no address, no key that can travel.
    """

    url: str
    model_key: str
    key: str = field(repr=False)
    notes: Path
    patience: float = 1800.0
    on_stall: OnStall = "stop"
    sandboxed: bool = False
    usage: Usage = field(default_factory=Usage)
    told: Callable[[str], None] = lambda _: None
    prefix: str = ""
    probe: Callable[[], bytes] | None = None
    transport: httpx.BaseTransport | None = None  # for tests, as are the next two
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self.line = Connection(self.url, self.key, self.patience, self._failing, self.transport, self.clock, self.sleep)
        self.url = self.line.url
        self.going: dict[str, str] = {}  # key -> id of jobs that are not done

    def submit(self, key: str, blob: Callable[[], bytes]) -> Job:
        """Send a job, unless one of this key is on its way already."""
        job = Job(key, uuid.uuid4().hex, blob)
        with self._told_of(job):
            if key in self.going:
                job.id = self.going[key]
                return job
            if noted := self._noted(key):
                job.id, job.again = noted, True
                if self._arrived(job):
                    self.usage.found_again += 1
                    self.going[key] = job.id
                    log.info("job %s was sent by an earlier run: what it makes is taken", job.id)
                    return job
                job.again = False
            self._send(job)
        return job

    def fetch(self, job: Job) -> dict:
        """What the job saved, as soon as it is there.

        Raises:
            TooLargeError: where the server had too little memory or time for it.
            JobError: where it failed, with the server's words.
            InputError: where nothing moved for too long.
        """
        pause, quiet, shown, since = 0.02, 0.0, "", self.clock()
        with self._told_of(job):
            while not job.too_large:
                began = self.clock()
                self._look(job)
                status, said = job.answer.get("status"), answers.progress(job.answer)
                if said != shown:
                    shown, since, quiet = said, began, 0.0
                self.told(f"{said}, {answers.span(self.clock() - since)}")
                if status == "COMPLETED":
                    with contextlib.suppress(_GoneError):
                        return self._take(job)
                    shown, pause = "", 0.02
                elif status == "ERROR":
                    self._failed(job)
                    shown, pause = "", 0.02
                elif status in _WAITING and self._overtaken(job, quiet):
                    self._resubmit(job, "the server says that it is queued, and has run what was sent after it")
                    shown, pause = "", 0.02
                elif quiet >= self.patience:
                    self._stalled(job, said)
                    quiet = 0.0
                self.sleep(pause)
                pause = min(pause * 1.3, 2.0)
                step = min(self.clock() - began, STEP)
                job.waited, quiet = job.waited + step, quiet + step
            self.done(job)
            raise TooLargeError(job.too_large)

    def done(self, job: Job) -> None:
        """What it made is kept: forget it."""
        self.going.pop(job.key, None)
        self._note(job.key).unlink(missing_ok=True)

    def _note(self, key: str) -> Path:
        return self.notes / f"{key[:40]}.json"

    def _noted(self, key: str) -> str | None:
        """The id under which a job was sent from here before."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(self._note(key).read_text())
            return _id(said["id"]) if (said["host"], said["model"]) == (self.url, self.model_key) else None
        return None

    def _write_note(self, job: Job) -> None:
        if not job.key:  # a probe
            return
        note = self._note(job.key)
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            for old in note.parent.glob("*.json*") if not self.going else ():
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - old.stat().st_mtime > _KEPT:
                        old.unlink()
            partial = note.with_name(f"{note.name}.{os.getpid()}")
            partial.write_text(json.dumps({"id": job.id, "host": self.url, "model": self.model_key, "at": time.time()}))
            partial.replace(note)
        except OSError as error:
            raise InputError(f"jobs cannot be noted in {self.notes} ({error.strerror}): make room, or set LATENTGUARD_CACHE to another folder") from error

    def _send(self, job: Job) -> None:
        """Post a job under its id, once: where an answer was lost, the server is asked for the id before it is posted again."""
        blob, fate = job.blob(), {"unsure": False}
        self._write_note(job)
        about = {"model_key": self.model_key, "session_id": "", "compress": True, "env": {}, "id": job.id}
        fields = {"data": json.dumps({**about, "trusted": False} if self.sandboxed else about)}

        def attempt() -> str:
            if fate["unsure"] and self._arrived(job):
                return job.id
            headers = {"ndif-timestamp": repr(time.time()), "nnsight-version": version("nnsight"), "python-version": sys.version.replace("\n", " ")}
            fate["unsure"] = True
            try:
                response = self.line.client.post(
                    f"{self.url}/request", data=fields, files={"blob": ("request", blob, "application/octet-stream")}, headers=headers
                )
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
                fate["unsure"] = False
                raise
            self.usage.bytes_up += len(blob)
            fate["unsure"] = response.is_success or response.status_code in (500, 502, 504)  # else it was turned away before the queue
            if answers.too_large(response):
                raise TooLargeError(f"an upload of {len(blob)} bytes is refused (HTTP {response.status_code}: {answers.detail(response, self.line.key)})")
            said = self.line.heard(response)
            if given := _id(said.get("id") if isinstance(said, dict) else None):
                return given
            raise AgainError("an answer without a job's id")

        self.told("sending")
        try:
            given = self.line.steadily(attempt)
        except TooLargeError as error:
            job.too_large = str(error)
            return
        except InputError:
            if not fate["unsure"]:
                self.done(job)
            raise
        if job.key:
            self.usage.jobs += job.tries == 1
            self.going[job.key] = given
        if given != job.id:  # a server that numbers jobs itself
            job.id = given
            self._write_note(job)

    def _arrived(self, job: Job) -> bool:
        """Whether the server knows a job, asked for a while: between its arrival and its place in a queue, it says that it does not."""
        for pause in (0.05, 0.15, 0.45, 0.9, 0.0):
            self._look(job)
            if job.answer:
                return True
            self.sleep(pause)
        return False

    def _look(self, job: Job) -> None:
        said = self.line.ask(f"/response/{job.id}", lambda said: isinstance(said, dict) and isinstance(said.get("status"), str))
        job.answer = said or job.answer

    def _take(self, job: Job) -> dict:
        """Download a result and understand it, again where it was cut; where there is none any more, the job is sent anew.

        Raises:
            _GoneError: it was sent anew.
        """
        url, cut = str(job.answer.get("data")), []

        def attempt() -> dict:
            response = self.line.store.get(url)
            self.line.known.add(origin(url))
            if response.status_code in (400, 401, 403, 404, 410):  # a link is good for an hour
                raise _GoneError(f"HTTP {response.status_code}")
            if not response.is_success:
                raise AgainError(f"HTTP {response.status_code}", answers.retry_after(response))
            try:
                found = answers.unpacked(response.content)
            except ValueError as error:
                if isinstance(error, InputError):
                    self.done(job)  # it will not be another for being asked again
                    raise
                cut.append(str(error))
                raise (_GoneError if len(cut) == 3 else AgainError)(f"it cannot be read: {error}") from error
            self.usage.bytes_down += len(response.content)
            return found

        try:
            if not url.startswith(("http://", "https://")):
                raise _GoneError(f"it lies at {url[:80]!r}")
            found = self.line.steadily(attempt, origin(url))
        except _GoneError as error:
            if job.tries < _TRIES:
                self._resubmit(job, f"its result is not to be had ({error})")
                raise
            raise InputError(f"the result of job {job.id} is not to be had at {origin(url)} ({error}): ask the keeper of {self.url}") from None
        self._count(job)
        return found

    def _failed(self, job: Job) -> None:
        """Raise what became of a job, or send it anew where it was not its fault."""
        words = str(job.answer.get("description") or "the server says nothing")
        kind = answers.verdict(words)
        self._count(job)
        self.done(job)
        if kind == "too large":
            raise TooLargeError(words)
        if (job.again or kind == "passing") and job.tries < _TRIES:
            if not job.again:
                self.sleep(2.0 * 4 ** (job.tries - 1))
            self._resubmit(job, "the server gave it up: " + words.strip().splitlines()[-1][:200])
            return
        env = self.line.ask_once("/env", 65.0) if "has no module at" in words or "payload could not be read" in words else None
        raise JobError(answers.failure(words, job.id, self.url, answers.repo_of(self.model_key), job.tries, env))

    def _overtaken(self, job: Job, quiet: float) -> bool:
        """Whether what was sent after a job has run. Of a quick job ndif 0.1.2 may store the states in the wrong order (its queue stores
        'added' in a thread, beside the run that stores 'completed'), and then says for ever that it waits.
        """
        if job.probe:
            said = self.line.ask(f"/response/{job.probe}")
            return isinstance(said, dict) and said.get("status") in ("RUNNING", "COMPLETED", "ERROR")
        if self.probe and quiet >= _STALE:
            sent = Job("", uuid.uuid4().hex, self.probe)
            self._send(sent)
            job.probe = sent.id
        return False

    def _stalled(self, job: Job, said: str) -> None:
        still = f"has not moved for {answers.span(self.patience)} ({said})"
        if self.on_stall == "wait":
            log.warning("job %s at %s %s: waiting on", job.id, self.url, still)
        elif self.on_stall == "resubmit" and job.tries < _TRIES:
            self._resubmit(job, f"it {still}")
        else:
            ways = "the same command goes on waiting for it, backend.on_stall=resubmit sends it anew, backend.patience=SECONDS waits longer"
            raise InputError(f"job {job.id} at {self.url} {still}: {ways}")

    def _resubmit(self, job: Job, why: str) -> None:
        log.warning("job %s is sent once more: %s", job.id, why)
        self.usage.resubmitted += 1
        job.id, job.answer, job.tries, job.again, job.probe = uuid.uuid4().hex, {}, job.tries + 1, False, ""
        self._send(job)

    def _count(self, job: Job) -> None:
        meta = job.answer.get("meta")
        ran = meta.get("runtime") if isinstance(meta, dict) else None
        ran = float(ran) if isinstance(ran, int | float) and 0 <= ran < 1e9 else 0.0
        self.usage.run_seconds += ran
        self.usage.queue_seconds += max(job.waited - ran, 0.0)
        job.waited = 0.0

    def _failing(self, why: str) -> None:
        self.usage.retries += 1
        self.told(why)

    @contextmanager
    def _told_of(self, job: Job) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            for one in dict.fromkeys([job.id, *self.going.values()]):
                log.warning("stopped: job %s goes on at %s; the same command, or resume=FOLDER, fetches what it makes", one, self.url)
            raise


def _id(said: object) -> str | None:
    """A job's id that can stand in an address."""
    return said if isinstance(said, str) and re.fullmatch(r"[\w-]{1,128}", said) else None

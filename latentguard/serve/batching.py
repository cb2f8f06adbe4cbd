"""Texts of many requests → batches for the one thread that runs the model → each request's own scores. Knows no HTTP and no guard.

Requests share the model by tokens (start-time fair queueing, Goyal et al. 1996): each text is stamped with the tokens of its request
that go before it, counted from where the queue stands as it comes, and the lowest stamp is next. So a request of 256 texts does not hold
up a request of one, and no text waits for ever. With the text that is next go those nearest to it in length.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from latentguard.errors import InputError

WINDOW = 4  # batches' worth of waiting texts among which those of like length are looked for
Score = Callable[[list], np.ndarray]


@dataclass(frozen=True)
class Failure:
    """Why a text has no score: `own` where the text is at fault; `index` is its place in its request."""

    error: Exception
    own: bool
    index: int = 0


Outcome = np.ndarray | Failure


class Told(Protocol):
    """Who is told of batches as they are done."""

    def batch(self, prompts: int, tokens: int, seconds: float) -> None:
        """It was run."""
        ...

    def failed(self, error: Exception) -> None:
        """A text alone failed, for no fault of its own."""
        ...


class Job:
    """A request's texts. `done` is fulfilled in the loop that asked, with an outcome a text, or with the first failure alone."""

    def __init__(self, prompts: Sequence[object], sizes: Sequence[int]) -> None:
        self.prompts, self.sizes = prompts, sizes
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[list[np.ndarray] | Failure] = self.loop.create_future()
        self.outcomes: dict[int, np.ndarray] = {}

    def take(self, index: int, outcome: Outcome) -> None:
        """One text's outcome; nobody may be waiting for it any more."""
        if self.done.done():
            return
        if isinstance(outcome, Failure):
            self.done.set_result(replace(outcome, index=index))
            return
        self.outcomes[index] = outcome
        if len(self.outcomes) == len(self.prompts):
            self.done.set_result([self.outcomes[i] for i in range(len(self.prompts))])


@dataclass(frozen=True, eq=False)
class Item:
    """One waiting text."""

    stamp: int
    job: Job
    index: int

    @property
    def size(self) -> int:
        """Tokens."""
        return self.job.sizes[self.index]


def pick(items: Sequence[Item], most: int, tokens: int) -> list[Item]:
    """The item of the lowest stamp, and those of the next stamps nearest to it in length, within both caps; a single one may be over."""
    window = sorted(items, key=lambda item: item.stamp)[: WINDOW * most]
    first = window[0]
    chosen, total = [first], first.size
    for item in sorted(window[1:], key=lambda item: abs(item.size - first.size)):
        if len(chosen) == most or total + item.size > tokens:
            break
        chosen.append(item)
        total += item.size
    return chosen


class Batcher:
    """A bounded queue, and `run`, which one thread works it off with.

    Args:
        most: texts of a batch.
        tokens: tokens of a batch.
        room: texts that may wait.
        linger: seconds to wait at most, and at most a quarter of what the last batch took, until as many texts wait as were answered by it
            and stood behind it: who was answered asks again, and without the wait a crowd stays split into batches half as large.
    """

    def __init__(self, *, most: int, tokens: int, room: int, linger: float, told: Told) -> None:
        self.most, self.tokens, self.room, self.linger, self.told = most, tokens, room, linger, told
        self._ready = threading.Condition()
        self._waiting: list[Item] = []
        self._closed = False
        self._clock, self._pace = 0, 0.0
        self._wanted, self._patience = 1, 0.0
        self.broken = 0  # texts in a row that failed for no fault of their own

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, job: Job) -> bool:
        """Queue a request's texts, all or none; False where there is no room."""
        with self._ready:
            if self._closed or len(self._waiting) + len(job.prompts) > self.room:
                return False
            stamp = self._clock
            for index, size in enumerate(job.sizes):
                self._waiting.append(Item(stamp, job, index))
                stamp += size
            self._ready.notify()
        return True

    def withdraw(self, job: Job) -> None:
        """Drop what of a request still waits: nobody waits for it."""
        job.done.cancel()
        with self._ready:
            self._waiting = [item for item in self._waiting if item.job is not job]

    def close(self) -> None:
        """Drop what waits, and let `run` end after the batch it is at."""
        with self._ready:
            self._closed = True
            self._waiting = []
            self._ready.notify()

    def wait_seconds(self) -> int:
        """How long what waits will take, for Retry-After: 1 to 60."""
        return min(60, max(1, math.ceil(len(self._waiting) * self._pace)))

    def run(self, score: Score) -> None:
        """Work until closed. `score` gives [prompt, category]."""
        while batch := self._next():
            begun = time.perf_counter()
            outcomes = self._outcomes(score, [item.job.prompts[item.index] for item in batch])
            took = time.perf_counter() - begun
            self._pace = took / len(batch) if not self._pace else 0.8 * self._pace + 0.2 * took / len(batch)
            self._wanted, self._patience = min(self.most, len(batch) + len(self._waiting)), min(self.linger, took / 4)
            self.told.batch(len(batch), sum(item.size for item in batch), took)
            self._hand_back(batch, outcomes)

    def _next(self) -> list[Item]:
        """The next batch; empty where there will be none."""
        with self._ready:
            while True:
                self._ready.wait_for(lambda: self._waiting or self._closed)
                if self._patience and len(self._waiting) < self._wanted:
                    self._ready.wait_for(lambda: self._closed or len(self._waiting) >= self._wanted, self._patience)
                if self._closed:
                    return []
                if self._waiting:
                    break
                self._wanted = 1  # all that waited were withdrawn
            chosen = pick(self._waiting, self.most, self.tokens)
            self._clock = max(self._clock, chosen[0].stamp)
            taken = set(map(id, chosen))
            self._waiting = [item for item in self._waiting if id(item) not in taken]
        return chosen

    def _outcomes(self, score: Score, prompts: list) -> list[Outcome]:
        """A score or a failure each: what fails together is tried in halves, so that a text fails alone."""
        try:
            found = np.asarray(score(prompts), float)
            if found.ndim != 2 or len(found) != len(prompts):
                raise RuntimeError(f"{len(prompts)} prompts gave scores of the shape {found.shape}")
            if not ((found >= 0) & (found <= 1)).all():
                raise RuntimeError("a score is no probability")
        except InputError as error:
            failure = Failure(error, own=True)
        except Exception as error:  # whatever it is, it is these requests' alone: the thread must live
            failure = Failure(error, own=False)
        else:
            self.broken = 0
            return list(found)
        if len(prompts) > 1:
            half = len(prompts) // 2
            return self._outcomes(score, prompts[:half]) + self._outcomes(score, prompts[half:])
        if not failure.own:
            self.broken += 1
            self.told.failed(failure.error)
        return [failure]

    def _hand_back(self, batch: list[Item], outcomes: list[Outcome]) -> None:
        """To each loop that asked, in one go."""
        for loop in {item.job.loop for item in batch}:
            mine = [(item.job, item.index, outcome) for item, outcome in zip(batch, outcomes, strict=True) if item.job.loop is loop]
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, mine)


def _deliver(outcomes: list[tuple[Job, int, Outcome]]) -> None:
    for job, index, outcome in outcomes:
        job.take(index, outcome)

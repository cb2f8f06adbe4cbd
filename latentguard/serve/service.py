"""What stands behind the routes: the model's thread, the queue, who waits for what, and how it ends. Knows no route."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.types import Receive

from latentguard.serve.asking import Asked, Bounds
from latentguard.serve.batching import Batcher, Failure, Job
from latentguard.serve.loading import Served, Threshold, load
from latentguard.serve.logs import frames
from latentguard.serve.metrics import Metrics
from latentguard.serve.refusals import RefusedError, shown
from latentguard.serve.settings import Settings

log = logging.getLogger("latentguard.serve")
INLINE = 4096  # characters whose tokens are counted in the event loop: under a millisecond or so
BROKEN = 3  # texts in a row that failed for no fault of their own, before the server calls itself unwell
SPARE = 5.0  # seconds after `grace` for the last answers to leave


class GoneError(Exception):
    """The client has left."""


class Service:
    """One model behind one queue. Made outside the loop; `open` and all else in it."""

    def __init__(self, settings: Settings, token: str | None = None, loader: Callable[[Settings], Served] = load) -> None:
        self.settings, self.token, self._loader = settings, token, loader
        self.served: Served | None = None
        self.metrics = Metrics(lambda: len(self.batcher), lambda: self.health() == "ready")
        self.batcher = Batcher(most=settings.batch_prompts, tokens=1, room=settings.queue, linger=settings.linger_ms / 1000, told=self)
        self.model, self.texts = ThreadPoolExecutor(1, "model"), ThreadPoolExecutor(1, "texts")
        self.active, self.draining, self.deadline = 0, False, 0.0

    def open(self) -> None:
        """Begin to load; requests are refused until that is done."""
        self.stopped = asyncio.get_running_loop().create_future()
        self.work: list[Future[Any]] = [self.model.submit(self._loader, self.settings)]
        self.loading = asyncio.create_task(self._load())

    async def _load(self) -> None:
        begun = time.monotonic()
        served: Served = await asyncio.wrap_future(self.work[0])
        self.batcher.tokens = served.pass_tokens if self.settings.batch_tokens == "auto" else self.settings.batch_tokens
        self.work.append(self.model.submit(self.batcher.run, served.score))
        self.served = served
        log.info("ready after %.1f s: %s (%s), flagged by %s", time.monotonic() - begun, served.name, ", ".join(served.guards), served.default)

    def drain(self) -> None:
        """Take no more requests; what is under way is finished, within `grace`. May be called from a signal handler."""
        self.draining, self.deadline = True, time.monotonic() + self.settings.grace

    def drained(self) -> bool:
        """Whether nothing is under way any more; past the deadline those who wait are told so."""
        if not self.draining:
            return False
        late = time.monotonic() - self.deadline
        if late > 0 and not self.stopped.done():
            self.stopped.set_result(None)
        return not self.active or late > SPARE

    def close(self) -> None:
        """Let the threads end; a batch that is running is not waited for."""
        self.batcher.close()
        for pool in (self.model, self.texts):
            pool.shutdown(wait=False, cancel_futures=True)
        if self.loading.done():
            self.loading.exception()  # told by `failure`
        else:
            self.loading.cancel()

    def busy(self) -> bool:
        """Whether the model's thread goes on, some seconds after `close`."""
        return bool(wait(self.work, SPARE).not_done)

    def failure(self) -> BaseException | None:
        """What ended the model's thread, or kept it from beginning."""
        ended = [work for work in self.work if work.done() and not work.cancelled()]
        return next((error for work in ended if (error := work.exception()) is not None), None)

    def health(self) -> str:
        """ready, loading, draining or failing."""
        if self.draining:
            return "draining"
        if self.failure() is not None or self.batcher.broken >= BROKEN:
            return "failing"
        return "ready" if self.served is not None else "loading"

    def batch(self, prompts: int, tokens: int, seconds: float) -> None:
        """A batch was run."""
        self.metrics.batch(prompts, tokens, seconds)

    def failed(self, error: Exception) -> None:
        """The model failed at a text for no fault of the text."""
        self.metrics.failures.inc()
        log.error("the model failed at a text:\n%s%s", frames(error), f": {error}" if self.settings.log_prompts else "")

    def ready(self) -> Served:
        """What answers.

        Raises:
            RefusedError: 503 while there is nothing that could.
        """
        if self.draining:
            raise RefusedError(503, "the server is shutting down; ask another", "shutting_down", headers={"connection": "close", "retry-after": "1"})
        if self.served is None:
            raise RefusedError(503, "the model is still loading", "loading", headers={"retry-after": "5"})
        return self.served

    def bounds(self, served: Served) -> Bounds:
        """What one request may ask."""
        return Bounds(self.settings.inputs, self.settings.characters, served.strips)

    def threshold(self, served: Served, name: str | None) -> tuple[str, dict[str, Threshold]]:
        """A threshold's name and what it is for each category."""
        chosen = name or served.default
        if name is not None and name not in served.thresholds:
            raise RefusedError(422, f"threshold {shown(name)}: choose one of {', '.join(served.thresholds)}", "invalid_value", param="threshold")
        return chosen, {category: guard.thresholds[chosen] for category, guard in served.guards.items()}

    async def scores(self, request: Request, served: Served, asked: Asked) -> tuple[np.ndarray, int]:
        """Probabilities [text, category] of a request, and its tokens.

        Raises:
            RefusedError: 422 for a text that is too long or has no place to be read at, 429 where the queue is full, 503 where it took
                too long, 500 where the model failed.
            GoneError: the client left; what of the request still waited is not computed.
        """
        sizes = await self._sizes(served, asked)
        job = Job(asked.prompts, sizes)
        if not self.batcher.submit(job):
            seconds = str(self.batcher.wait_seconds())
            raise RefusedError(429, f"{len(self.batcher)} texts are waiting already; ask again in {seconds} s", "queue_full", headers={"retry-after": seconds})
        gone = asyncio.create_task(_left(request.receive))
        try:
            await asyncio.wait({job.done, gone, self.stopped}, timeout=self.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
            found = job.done.result() if job.done.done() else None
        finally:
            gone.cancel()
            self.batcher.withdraw(job)
        if isinstance(found, Failure):
            raise self._told(found, asked)
        if found is not None:
            return np.stack(found), sum(sizes)
        if gone.done() and not gone.cancelled():
            raise GoneError
        if self.stopped.done():
            raise RefusedError(503, "the server has shut down before this was scored", "shutting_down", headers={"connection": "close"})
        seconds = str(self.batcher.wait_seconds())
        raise RefusedError(503, f"not scored within {self.settings.timeout:g} s", "timeout", headers={"retry-after": seconds})

    async def _sizes(self, served: Served, asked: Asked) -> list[int]:
        if sum(map(len, asked.texts)) <= INLINE:
            sizes = served.lengths(asked.texts)
        else:
            sizes = await asyncio.get_running_loop().run_in_executor(self.texts, served.lengths, asked.texts)
        for place, size in zip(asked.places, sizes, strict=True):
            if served.longest is not None and size > served.longest:
                raise RefusedError(422, f"{place} has {size} tokens, at most {served.longest} are taken; nothing is cut", "text_too_long", param=place)
        return [max(1, size) for size in sizes]

    def _told(self, failure: Failure, asked: Asked) -> RefusedError:
        place = asked.places[failure.index]
        if failure.own:
            return RefusedError(422, f"{place} cannot be scored: {failure.error}", "unscorable_input", param=place)
        return RefusedError(500, "the model failed at this request", "model_failed", param=place)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

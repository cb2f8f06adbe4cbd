"""HTTP/1.1 as uvicorn speaks it with h11, with limits of time and number that uvicorn lacks. Knows no route.

uvicorn waits without end for the head of a request, for a client that does not read, and for an upload that was answered already.
"""

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from latentguard.serve.refusals import HEAD_TOO_LARGE, RefusedError


class Bounded(H11Protocol):
    """Closes a connection that is one too many, or keeps the server waiting."""

    def __init__(self, *args: Any, most: int, seconds: float, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._most, self._seconds = most, seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """One more; over the limit it is closed unanswered."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.abort()
        else:
            self._start()

    def data_received(self, data: bytes) -> None:
        """A request's head must be whole in time, and an upload that was answered must end in time."""
        super().data_received(data)
        answered = self.cycle is not None and self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY
        if self.conn.their_state is h11.IDLE or answered:
            self._start()
        else:
            self._stop()

    def pause_writing(self) -> None:
        """The client does not read: it has so long to begin."""
        super().pause_writing()
        self._start()

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """No timer is left behind."""
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or has too large a head, in the shape of all errors."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is on its way already
            self.transport.close()
            return
        error = sys.exc_info()[1]  # what h11 said; uvicorn calls this as it handles it
        wrong = HEAD_TOO_LARGE if getattr(error, "error_status_hint", 400) == 431 else RefusedError(400, "this is no HTTP request", "bad_http")
        body = wrong.body
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        for event in (h11.Response(status_code=wrong.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _start(self) -> None:
        if self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self._seconds, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

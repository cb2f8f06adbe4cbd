"""Before and after every request: who may ask, how many at a time, how much they may send; a line of the log and the counts. Knows no guard."""

import asyncio
import hmac
import logging
import secrets
import time
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentguard.serve.refusals import HEAD_TOO_LARGE, RefusedError, shown
from latentguard.serve.service import Service

log = logging.getLogger("latentguard.serve")
ROUTES = ("/v1/moderations/chat", "/v1/moderations", "/v1/models", "/healthz", "/metrics", "/openapi.json", "/docs")
OPEN = ("/healthz",)  # what a probe asks without a token
ALWAYS = ("/healthz", "/metrics")  # what is answered however many ask
READ_ON = 8  # bodies' worth of bytes that are read of one that is refused


@dataclass
class Note:
    """What is logged of a request."""

    id: str
    texts: int = 0
    flagged: int = 0
    tokens: int = 0


class Gate:
    """The outermost layer: every answer goes through it."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        route = "/v1/models" if path.startswith("/v1/models/") else path if path in ROUTES else "other"
        note, begun = Note(f"modr-{secrets.token_hex(12)}"), time.perf_counter()
        status = 500  # where an error goes by, past this layer
        scope["note"] = note

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", note.id.encode()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        self.service.active += 1
        self.service.metrics.active.inc()
        try:
            refused = self._refused(route, scope)
            await (refused.response if refused else self.app)(scope, receive, sending)
        finally:
            self.service.active -= 1
            self.service.metrics.active.dec()
            took = time.perf_counter() - begun
            self.service.metrics.requests.labels(route, str(status)).inc()
            self.service.metrics.seconds.labels(route).observe(took)
            if route not in ALWAYS:
                said = "%s %s %s %d texts=%d flagged=%d tokens=%d %.0f ms"
                method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH") else "-"
                log.info(said, note.id, method, route, status, note.texts, note.flagged, note.tokens, 1000 * took)

    def _refused(self, route: str, scope: Scope) -> RefusedError | None:
        head = len(scope.get("raw_path") or b"") + len(scope["query_string"]) + sum(len(key) + len(value) + 4 for key, value in scope["headers"])
        if head > self.service.settings.header_bytes:  # h11 looks at a head that comes in pieces only
            return HEAD_TOO_LARGE
        if self.service.token is not None and route not in OPEN:
            given = [value for key, value in scope["headers"] if key == b"authorization"]
            kind, _, shown_token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
            right = hmac.compare_digest(shown_token.strip(), self.service.token.encode())
            if kind.lower() != b"bearer" or not right:
                return RefusedError(401, "show the server's token: Authorization: Bearer …", "invalid_api_key", headers={"www-authenticate": "Bearer"})
        if self.service.active > self.service.settings.requests and route not in ALWAYS:
            seconds = str(self.service.batcher.wait_seconds())
            return RefusedError(429, f"{self.service.settings.requests} requests are under way already", "too_many_requests", headers={"retry-after": seconds})
        return None


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """A JSON request's body, of at most so many bytes however it is sent.

    What is refused is read on for a while and forgotten: a connection that is closed on unread bytes takes the answer with it.

    Raises:
        RefusedError: 413 for more, 408 where it takes longer, 415 where it is no JSON or packed.
        starlette.requests.ClientDisconnect: the client left.
    """
    refused, found, read = _unreadable(request.headers), bytearray(), 0
    told = request.headers.get("content-length", "")[:20]
    if refused is None and told.isascii() and told.isdigit() and int(told) > most:
        refused = _too_large(most)
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                read += len(chunk)
                if read > most and refused is None:
                    refused = _too_large(most)
                if refused is None:
                    found += chunk
                elif read > READ_ON * most:
                    break
    except TimeoutError:
        refused = refused or RefusedError(408, f"the body did not arrive within {seconds:g} s", "body_timeout", headers={"connection": "close"})
    if refused is not None:
        raise refused
    return bytes(found)


def _too_large(most: int) -> RefusedError:
    return RefusedError(413, f"the body is larger than {most} bytes; ask in parts", "body_too_large")


def _unreadable(headers: Headers) -> RefusedError | None:
    kind, _, settings = headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json" or settings.strip().lower().replace('"', "") not in ("", "charset=utf-8"):
        return RefusedError(415, f"content-type is {shown(headers.get('content-type', ''))}: send application/json", "unsupported_media_type")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        return RefusedError(415, "content-encoding: send the body as it is, not packed", "unsupported_media_type")
    return None

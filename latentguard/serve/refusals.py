"""What the server does not answer, in the shape of OpenAI's errors. Knows no route, queue or model."""

import json
from typing import Any

from starlette.responses import Response

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class RefusedError(Exception):
    """A request that gets an error: its status, one sentence, the field it is about and a word for programs."""

    def __init__(self, status: int, message: str, code: str, *, param: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers or {}

    @property
    def body(self) -> bytes:
        """{"error": {message, type, param, code}}, ASCII alone, so that any text may stand in it."""
        kind = _TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        return json.dumps({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}).encode()

    @property
    def response(self) -> Response:
        """Ready to be sent."""
        return Response(self.body, self.status, self.headers, "application/json")


HEAD_TOO_LARGE = RefusedError(431, "the request's head is too large", "head_too_large", headers={"connection": "close"})


def reply(content: Any, status: int = 200) -> Response:
    """JSON, ASCII alone."""
    return Response(json.dumps(content), status, media_type="application/json")


def shown(text: object) -> str:
    """A value as it may stand in a sentence: short, and without what a terminal would obey."""
    found = ascii(text)
    return found if len(found) <= 60 else found[:57] + "..."

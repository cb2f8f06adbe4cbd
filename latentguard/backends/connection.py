"""One server's HTTP, asked again while the connection or the server fails. Knows no jobs.

An address that never answered is given seconds, one that did is given patience. No redirect is followed with a key.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from latentguard.backends import answers
from latentguard.errors import InputError

log = logging.getLogger(__name__)
PUBLIC = "https://api.ndif.us"
T = TypeVar("T")
_STRANGER = 20.0  # seconds that an address is given to answer for the first time
_SAID = 30.0  # seconds of trouble after which the log says so
STEP = 130.0  # seconds by which one attempt, or one look at a job, can use up patience: more, and this machine slept
_LOOK = httpx.Timeout(10.0, read=30.0)
_LONG = httpx.Timeout(10.0, read=120.0, write=120.0)


class AgainError(Exception):
    """No answer that can be used: worth another try, after `seconds` where the server said so."""

    def __init__(self, why: str, seconds: float = 0.0) -> None:
        super().__init__(why)
        self.seconds = seconds


@dataclass
class Connection:
    """An NDIF server's address, and the way to it.

    Args:
        patience: seconds of silence that are borne of an address that answered before.
        failing: told of each attempt that failed.

    Raises:
        InputError: no address, no key that can travel, no way out of here.
    """

    url: str
    key: str = field(default="", repr=False)
    patience: float = 1800.0
    failing: Callable[[str], None] = lambda _: None
    transport: httpx.BaseTransport | None = None  # for tests, as are the next two
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    known: set[str] = field(default_factory=set)  # origins that have answered

    def __post_init__(self) -> None:
        self.url, self.key = answers.address(self.url), self.key.strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise InputError("NDIF_API_KEY holds letters that no key has: copy it again from https://login.ndif.us")
        try:
            self.client = httpx.Client(headers={"ndif-api-key": self.key} if self.key else {}, timeout=_LONG, transport=self.transport)
            self.store = httpx.Client(timeout=_LONG, transport=self.transport, follow_redirects=True)  # results lie elsewhere: no key goes there
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            raise InputError(f"no connection to {self.url} can be made ({error}): look at HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE") from error

    def greet(self) -> None:
        """See that there is an NDIF server at the address.

        Raises:
            InputError: there is none, or nothing answers.
        """
        said = self.ask("/ping")
        if said != "pong" and (said is not None or httpx.URL(self.url).path != "/"):
            raise InputError(f"{self.url} is no NDIF server's address (it knows no /ping): give backend.host without a path, like {PUBLIC}")

    def ask(self, path: str, good: Callable[[Any], bool] = lambda _: True) -> Any:
        """JSON of a path of the API; None where the server does not know it.

        Raises:
            InputError: for what it refuses, and where it stays silent.
        """

        def attempt() -> Any:
            said = self.heard(self.client.get(f"{self.url}{path}", timeout=_LOOK), fine=404)
            if said is not None and not good(said):
                raise AgainError("an answer of an unknown shape")
            return said

        return self.steadily(attempt)

    def ask_once(self, path: str, seconds: float) -> Any:
        """JSON of a path, or None where it does not come in time: for what is good to know and can be done without."""
        try:
            response = self.client.get(f"{self.url}{path}", timeout=seconds)
        except httpx.HTTPError:
            return None
        return answers.parsed(response)[1] if response.is_success else None

    def heard(self, response: httpx.Response, fine: int = 0) -> Any:
        """The JSON of an answer, None where its status is `fine`.

        Raises:
            AgainError: the server's trouble.
            InputError: what it refuses.
        """
        readable, said = answers.parsed(response)
        if response.is_redirect:
            there = origin(str(httpx.URL(self.url).join(response.headers.get("location", ""))))
            raise InputError(f"{self.url} sends on to {there}: set backend.host to the address that answers itself")
        if not readable and not (response.is_client_error and origin(self.url) not in self.known):
            what = f"HTTP {response.status_code}, no JSON: {answers.detail(response, self.key)[:60]!r}"
            raise AgainError(what, answers.retry_after(response))
        if readable:
            self.known.add(origin(self.url))
        if response.is_success:
            return said
        if response.status_code == fine and readable:
            return None
        if response.is_server_error or response.status_code in (408, 425, 429):
            raise AgainError(f"HTTP {response.status_code}: {answers.detail(response, self.key)}", answers.retry_after(response))
        raise answers.refusal(self.url, response, self.key)

    def steadily(self, attempt: Callable[[], T], where: str = "") -> T:
        """What an attempt returns, tried again while the connection or the server fails, within our patience."""
        where = where or origin(self.url)
        spent, pause, said = 0.0, 0.05, False
        while True:
            began, asked = self.clock(), 0.0
            try:
                return attempt()
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.TooManyRedirects, httpx.InvalidURL) as error:
                raise InputError(f"{where} cannot be asked ({type(error).__name__}: {error}): look at backend.host") from error
            except httpx.HTTPError as error:
                why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                if "[SSL" in why and where not in self.known:
                    raise InputError(f"{where} cannot be trusted ({why}): is it http:// and not https://, or is SSL_CERT_FILE wanted?") from error
            except AgainError as error:
                why, asked = str(error), error.seconds
            wait = max(pause, asked)
            spent += min(self.clock() - began, STEP) + wait
            borne = self.patience if where in self.known else min(_STRANGER, self.patience)
            if spent > borne:
                raise InputError(self._silent(where, why, spent - wait, asked))
            if spent > _SAID and not said:
                said = True
                log.warning("%s: %s; it is asked again for up to %s", where, why, answers.span(borne))
            self.failing(f"{where}: {why}; asking again for {answers.span(spent)}")
            self.sleep(wait)
            pause = min(pause * 2, 10.0)

    def _silent(self, where: str, why: str, seconds: float, asked: float) -> str:
        """The sentence for an address that gives no answer."""
        if asked > self.patience:
            return f"{where} asks to wait {answers.span(asked)} ({why}): give the same command later, or a larger backend.patience"
        if where not in self.known and where != origin(self.url):
            return (
                f"{where}, where {self.url} keeps results, does not answer ({why}): its keeper must set NDIF_OBJECT_STORE_PUBLIC_URL to what others can reach"
            )
        if where not in self.known:
            return f"{where} does not answer as an NDIF server does ({why}): look at backend.host (or NDIF_HOST) and at the connection"
        sent = "what was sent is noted, and the same command goes on from there, backend.patience=SECONDS bears more"
        return f"{where} has not answered properly for {answers.span(seconds)} ({why}): {sent}"


def origin(url: str) -> str:
    """Scheme, host and port of an address."""
    return "/".join(url.split("/", 3)[:3])

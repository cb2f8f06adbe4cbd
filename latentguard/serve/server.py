"""uvicorn around the application: listening, signals, how it ends. Knows no route and no guard."""

import logging
import os
import signal
import socket
import sys
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from latentguard.errors import InputError
from latentguard.serve.app import make_app
from latentguard.serve.logs import set_up
from latentguard.serve.protocol import Bounded
from latentguard.serve.service import SPARE, Service
from latentguard.serve.settings import TOKEN, Settings

log = logging.getLogger("latentguard.serve")
SWITCH = 0.0005  # seconds until the model's thread gives way: at Python's 0.005 every step of a request waits so long for it


class Server(uvicorn.Server):
    """Finishes what is under way before it stops; a second signal does not wait for it."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT."""
        self.should_exit = self.service.draining
        self.service.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where it listens."""
        await super().startup(sockets)
        for one in sockets or []:
            host, port = one.getsockname()[:2]
            log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        return await super().on_tick(counter) or self.service.drained() or self.service.failure() is not None


def serve(settings: Settings, token: str | None) -> int:
    """Serve until a signal; the exit code.

    Raises:
        InputError: for an address that cannot be had, and a model or guard that cannot be loaded.
    """
    set_up(settings.log_prompts)
    listening = _listen(settings)
    if settings.host not in ("127.0.0.1", "::1", "localhost") and token is None:
        log.warning("host=%s can be reached by others, and no token is asked for: set token_file, or %s", settings.host, TOKEN)
    service = Service(settings, token)
    protocol: Any = partial(Bounded, most=settings.connections, seconds=settings.head_timeout)
    config = uvicorn.Config(
        make_app(service), http=protocol, h11_max_incomplete_event_size=settings.header_bytes,
        loop="asyncio", ws="none", lifespan="on", log_config=None, access_log=False, proxy_headers=False, server_header=False,
        timeout_keep_alive=settings.keep_alive, timeout_graceful_shutdown=int(SPARE), backlog=min(settings.connections, 2048),
    )  # fmt: skip
    server = Server(config, service)
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # before uvicorn takes both: as an interruption
    sys.setswitchinterval(SWITCH)
    server.run(sockets=[listening])
    failure = service.failure()
    if isinstance(failure, InputError):
        raise failure
    if failure is not None:
        log.error("the model's thread ended", exc_info=failure)
    else:
        log.info("stopped")
    if service.busy():  # with a load or a batch that nobody waits for, and that cannot be stopped
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1 if failure else 0)
    return 1 if failure else 0


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=min(settings.connections, 2048))
    except OSError as error:
        raise InputError(f"host={settings.host} port={settings.port}: cannot listen there ({error.strerror}); choose another") from None

"""A server without a model: a guard whose scores follow from the text, which can be held, and fails where it is told to."""

import asyncio
import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import httpx
import numpy as np
import uvicorn

from latentguard.errors import InputError
from latentguard.serve.app import make_app
from latentguard.serve.loading import Served, default_threshold
from latentguard.serve.protocol import Bounded
from latentguard.serve.server import Server
from latentguard.serve.service import Service
from latentguard.serve.settings import make_settings

PATH = "/v1/moderations"


def run(test):
    """A test's coroutine, ended where something it waits for never comes."""
    return asyncio.run(asyncio.wait_for(test(), 60))


def probability(text: object) -> float:
    """A text's, or a conversation's, score."""
    return int(hashlib.sha256(json.dumps(text).encode()).hexdigest()[:8], 16) / 0xFFFFFFFF


@dataclass
class FakeGuard:
    """Scores by `probability`; holds where `gate` is not set; keeps what it was asked, batch by batch."""

    name: str = "fake"
    thresholds: dict = field(default_factory=lambda: {"fpr=0.05": SimpleNamespace(value=0.5), "fpr=0.01": SimpleNamespace(value=0.9)})
    shift: float = 0.0
    batches: list = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self):
        self.gate.set()

    def score(self, prompts):
        self.batches.append(list(prompts))
        self.entered.release()
        self.gate.wait(40)
        for prompt in prompts:
            if "unplaceable" in str(prompt):
                raise InputError(f"prompt p0: {str(prompt)[:40]!r} has no place to be read at")
            if "explosive" in str(prompt):
                raise RuntimeError(f"kernel failed at {prompt}")
        return np.array([np.nan if "numberless" in str(prompt) else (probability(prompt) + self.shift) % 1 for prompt in prompts], np.float32)

    @property
    def seen(self):
        return [prompt for batch in self.batches for prompt in batch]


def make_service(guards=None, token=None, **settings):
    guards = guards or {"harmful": FakeGuard()}
    served = Served("fake", guards, lambda texts: [len(text.split()) for text in texts], default_threshold(guards, settings.pop("threshold", None)),
                    longest=2000, strips=settings.pop("strips", False), about={"harmful": {}})  # fmt: skip
    loader = settings.pop("loader", lambda _: served)
    return Service(make_settings({"guard": "/tmp", "model": "tiny", "linger_ms": 0.0, **settings}), token, loader)


@contextlib.asynccontextmanager
async def released(guards):
    """However it ends, no guard is held any more."""
    try:
        yield
    finally:
        for guard in (guards or {}).values():
            guard.gate.set()


@contextlib.asynccontextmanager
async def serving(guards=None, token=None, **settings):
    """An application in this process: (httpx client, service)."""
    service = make_service(guards, token, **settings)
    app = make_app(service)
    async with released(guards), app.router.lifespan_context(app):
        await service.loading
        headers = {"authorization": f"Bearer {token}"} if token else {}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://server", headers=headers) as client:
            client.app = app
            yield client, service


@contextlib.asynccontextmanager
async def listening(guards=None, token=None, **settings):
    """The same behind uvicorn on loopback, in this loop: (port, service)."""
    from functools import partial
    from socket import create_server

    service = make_service(guards, token, **settings)
    protocol = partial(Bounded, most=service.settings.connections, seconds=service.settings.head_timeout)
    config = uvicorn.Config(make_app(service), http=protocol, h11_max_incomplete_event_size=service.settings.header_bytes, ws="none", lifespan="on",
                            log_config=None, access_log=False, timeout_graceful_shutdown=5)  # fmt: skip
    server = Server(config, service)
    async with released(guards):
        socket = create_server(("127.0.0.1", 0))
        task = asyncio.create_task(server._serve([socket]))
        while not server.started:
            await asyncio.sleep(0)
        await service.loading
        yield socket.getsockname()[1], service
        service.drain()
        await task


async def entered(guard, times=1):
    """Until the guard has been asked so often."""
    for _ in range(times):
        assert await asyncio.to_thread(guard.entered.acquire, timeout=30)


async def until(condition):
    """Until the loop has brought something about."""
    while not condition():
        await asyncio.sleep(0)


def tiny_guard(backend, **settings):
    """A guard for a real backend that was never fitted: its probabilities are a function of the states, and mean nothing."""
    import torch

    from latentguard.guards.calibration import Calibration, Threshold
    from latentguard.guards.drift import Reference
    from latentguard.guards.guard import LatentGuard
    from latentguard.guards.probes import Linear

    shape = (2, 2, backend.d_model)
    probe = Linear(torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.tensor(0.0))
    noise = torch.randn(50, *shape, generator=torch.Generator().manual_seed(1))
    own = {
        "name": "tiny-guard", "model": backend.name, "weights": backend.weights, "template": backend.key()["template"], "n_layers": backend.n_layers, "d_model": backend.d_model,
        "layers": (1, 2), "positions": ("t_post_inst", "mean(user)"), "terminal": "period", "method": "logistic", "probe": probe, "calibration": Calibration("platt", slope=0.1),
        "thresholds": {name: Threshold(name, value, 0.0, 0.1, 100) for name, value in (("fpr=0.01", 0.6), ("fpr=0.05", 0.5))},
        "reference": Reference.of(noise, noise, probe.raw(noise).numpy()), "backend": backend,
    }  # fmt: skip
    return LatentGuard(**{**own, **settings})

"""What an NDIF server would be sent, unpacked and run in this process without our modules: a check that an intervention travels.

A rehearsal: no connection, no queue, no sandbox, and Python and libraries are this side's own.
"""

import importlib.abc
import io
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from latentguard.backends.jobs import Job, JobError, Usage
from latentguard.backends.local import Local
from latentguard.backends.ndif import Ndif, Sizes
from latentguard.backends.parcels import not_installed
from latentguard.backends.tracing import nnsight


def simulated(local: Local, sizes: Sizes | None = None) -> Ndif:
    """A model of this process as if it lay on a server."""
    return Ndif(Here(local), local.model, local.tokenizer, local.hf.generation_config, name=local.name, template=local.template, sizes=sizes)  # type: ignore[arg-type]


class Here:
    """Stands in for `jobs.Host`."""

    url, prefix = "this process", ""

    def __init__(self, local: Local) -> None:
        self.local, self.model_key, self.usage = local, local.weights or local.name, Usage()
        self.probe: Callable[[], bytes] | None = None
        self.told: Callable[[str], None] = lambda _: None

    def submit(self, key: str, blob: Callable[[], bytes]) -> Job:
        """Noted; it runs when it is fetched."""
        self.usage.jobs += 1
        return Job(key, key[:32], blob)

    def fetch(self, job: Job) -> Any:
        """Unpack, run, pack up and unpack what came out."""
        tree, blob, packed = self.local.model, job.blob(), io.BytesIO()
        self.usage.bytes_up += len(blob)
        try:
            with _without(["latentguard", *not_installed()]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*was never reached")  # how an open loop over steps ends
                tracer = nnsight.schema.request.RequestModel.deserialize(blob, tree._remoteable_persistent_objects(), compress=True)
                torch.save(_run(tracer), packed)
        except ModuleNotFoundError as error:
            raise JobError(f"a server would not have {error.name}: what is sent needs it (docs/remote.md)") from error
        self.usage.bytes_down += packed.tell()
        packed.seek(0)
        return torch.load(packed, weights_only=True)

    def done(self, job: Job) -> None:
        """Nothing was noted."""


def _run(tracer: Any) -> dict:
    """A block as a server runs it: what it saved, by name."""
    nnsight.tracing.tracer.inc()
    try:
        tracer.execute(tracer.info.code)
        saved = nnsight.tracing.tracer._saves()
        return {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in saved}
    finally:
        nnsight.tracing.tracer.dec()


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """As if these packages were not there."""
    gone = {name: module for name, module in sys.modules.items() if any(name == top or name.startswith(top + ".") for top in names)}
    for name in gone:
        del sys.modules[name]
    finder = _Nowhere(tuple(names))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update(gone)


class _Nowhere(importlib.abc.MetaPathFinder):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)

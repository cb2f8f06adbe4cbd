"""nnsight, imported so that it breaks nobody: it puts `.save` on every object, and modules of anyio that are loaded later refuse to be.

They are loaded here first; where a script imported nnsight before us, `.save` is taken off for that moment.
"""

import importlib


def _cured() -> None:
    mounted = hasattr(object, "save")
    if mounted:
        importlib.import_module("nnsight._c").unmount("save")
    for name in ("anyio._backends._asyncio", "anyio.abc", "anyio.streams.file", "anyio.streams.tls"):
        importlib.import_module(name)
    if mounted:
        importlib.import_module("nnsight._c").mount(importlib.import_module("nnsight").save, "save")


_cured()
import nnsight  # noqa: E402
import nnsight.schema.request  # noqa: E402

__all__ = ["nnsight"]

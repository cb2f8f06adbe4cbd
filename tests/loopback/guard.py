"""Kills the process groups it was told of once its parent is gone; told through stdin ("+id", "-id"), it ends when that closes."""

import contextlib
import os
import signal
import sys

alive = set()
for line in sys.stdin:
    (alive.add if line[0] == "+" else alive.discard)(int(line[1:]))
for group in alive:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)

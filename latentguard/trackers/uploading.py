"""Sends a record that is being written to W&B, from a process of its own: W&B's `beta sync --live`. Knows no run; standard library alone.

So no server is ever waited for where the experiment runs, and the record is whole whatever becomes of the network.
"""

import os
import re
import runpy
import subprocess
import sys
import threading
from pathlib import Path


class Upload:
    """The process that sends `record`, a folder of W&B's. It ends with ours, however ours ends."""

    def __init__(self, record: Path) -> None:
        self.record, self.said = record, record / "logs" / "upload.log"
        self.said.parent.mkdir(exist_ok=True)
        known = {key: value for key, value in os.environ.items() if key not in ("WANDB_SERVICE", "WANDB_MODE", "WANDB_RUN_ID")}
        with self.said.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(record)], stdin=subprocess.PIPE, stdout=out, stderr=out, env=known, start_new_session=True
            )

    @property
    def url(self) -> str:
        """Where the run is to be seen; empty until the server has it."""
        found = re.search(r"View run .*?(https?://\S+)", self.said.read_text(encoding="utf-8", errors="replace"))
        return found[1] if found else ""

    @property
    def failed(self) -> bool:
        """Whether it has given up."""
        return self._process.poll() is not None and not self._done

    @property
    def _done(self) -> bool:
        """By the mark that W&B's command leaves; it ends with 0 where a key is refused, too."""
        return any(self.record.glob("*.wandb.synced"))

    def end(self, patience: float) -> str:
        """Wait until all is sent, `patience` seconds at most (0: as long as it takes); why not all is, else ''."""
        try:
            self._process.wait(patience or None)
        except subprocess.TimeoutExpired:
            return f"not all of it was taken within {patience:g} s"
        finally:
            self._process.kill()
            self._process.communicate()
        return "" if self._done else self.why

    @property
    def why(self) -> str:
        """Its last words on an error."""
        lines = self.said.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "ERROR" in line or "Error" in line] or lines[-1:]
        return re.sub(r"^(wandb: )?(ERROR )?([\w.]+Error: )?", "", errors[-1]).strip() if errors else "the upload has ended"


def send(record: str) -> None:
    """As a process: W&B's own command, until all is sent or the process that began it is gone."""

    def leave() -> None:
        os.read(0, 1)  # ends when nobody holds the other end
        os._exit(4)

    threading.Thread(target=leave, daemon=True).start()
    sys.argv = ["wandb", "beta", "sync", "--live", "--yes", record]
    runpy.run_module("wandb", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    send(sys.argv[1])

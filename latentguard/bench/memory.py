"""Peak memory of reading means only, few prompts against many, each in a process of its own. Run as a module it is that process."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from latentguard.bench.contest import Withdrawn

FEW, MANY = 2_000, 20_000
_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss on Linux keeps what the parent had before the exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of(model: str, count: int) -> int:
    """Peak bytes of a process that reads the moments of `count` prompts.

    Raises:
        Withdrawn: with the last words of a process that failed.
    """
    command = [sys.executable, "-m", "latentguard.bench.memory", model, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_THREADS})
    if done.returncode:
        raise Withdrawn(f"reading the means of {count} prompts failed: {(done.stderr.strip().splitlines() or ['no word'])[-1][:200]}")
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def measure_memory(model: str, few: int = FEW, many: int = MANY) -> dict:
    """The row `memory`: peak with many prompts over peak with few."""
    small, large = peak_of(model, few), peak_of(model, many)
    ratio, mib = large / small, 2**20
    return {
        "row": "memory", "contestant": "latentguard", "floor": f"{few} prompts", "median": ratio, "min": ratio, "max": ratio, "rounds": 1, "ratios": [ratio],
        "floor_seconds": None, "target": 1.05, "ok": None, "over": f"peak with {few} prompts",
        "check": f"{large / mib:.0f} MiB with {many} prompts, {small / mib:.0f} MiB with {few}",
    }  # fmt: skip


def main(model: str, count: int) -> None:
    """Read prompts that are made one by one, and print the peak."""
    import latentguard
    from latentguard.bench.work import requests

    latentguard.load(model).moments(requests(count, more=1), "all", ["t_inst"])
    print(json.dumps({"peak": peak_bytes()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""Ten read batches as one job beside ten jobs, on NDIF's own server on 127.0.0.1; and what a job costs whatever is in it.

    make .venv-ndif/ready && LATENTGUARD_NDIF_PYTHON=.venv-ndif/bin/python .venv/bin/python -m benchmarks.remote

Latency, not arithmetic: the tiny model. Rounds alternate within one run; the ratio is of medians.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

from latentguard.backends.skeleton import Remote, remote
from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from latentguard.prompts import Prompt
from latentguard.weights import spec_of
from tests.loopback.server import Loopback

ROUNDS, BATCHES, ROWS = 9, 10, 4


def main() -> None:
    """Print the ratio, the seconds and the bytes."""
    with tempfile.TemporaryDirectory() as top:
        os.environ["LATENTGUARD_CACHE"] = f"{top}/cache"
        folder = Path(top) / "tiny"
        tiny_model().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        prompts = [Prompt.of(f"tell me about number {k:03d}.", id=str(k)) for k in range(BATCHES * ROWS)]
        with Loopback(os.environ["LATENTGUARD_NDIF_PYTHON"], [folder], Path(top) / "server") as server:
            os.environ["NDIF_API_KEY"] = server.key
            seconds: dict[str, list[float]] = {"one job": [], "ten jobs": [], "ten jobs, two on their way": []}
            for turn in range(ROUNDS + 1):
                for name, batches, ahead in (("one job", BATCHES, 1), ("ten jobs", 1, 1), ("ten jobs, two on their way", 1, 2)):
                    far = remote(spec_of(str(folder), dtype="float32"), Remote(host=server.host, batch_size=ROWS, batches=batches, ahead=ahead))
                    began = time.perf_counter()
                    found = far.read(prompts, "all", ("t_inst", "t_post_inst"))
                    if turn:  # the first warms the server
                        seconds[name].append(time.perf_counter() - began)
                    assert far.host.usage.jobs == (1 if batches > 1 else BATCHES)
            for name, taken in seconds.items():
                middle = statistics.median(taken)
                print(f"{name:28} {middle:6.3f} s ({min(taken):.3f}–{max(taken):.3f}), {middle / statistics.median(seconds['ten jobs']):.2f} of ten jobs")
            print(f"bytes down {far.host.usage.bytes_down}, of states {found.values.numel() * 4}: {far.host.usage.bytes_down / found.values.numel() / 4:.2f}")


if __name__ == "__main__":
    main()

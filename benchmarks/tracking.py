"""What a tracker costs: CPU seconds of this process and of W&B's own for a run of so many generations, Files against W&B offline.

`python benchmarks/tracking.py --rows 10000 [--run-seconds 600]` prints each and its share of a run's time. Rows come in batches as the
experiments hand them over; then a figure with its chart, a direction, the summary and the table at the end.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from latentguard.charts import Chart, Plot
from latentguard.directions import Direction
from latentguard.trackers import Files, Wandb

REPLY = "I cannot help with that, but here is something that may be of use instead. " * 3


def rows_of(n: int, batch: int):
    for start in range(0, n, batch):
        yield [
            {
                "prompt_id": f"p{i}", "prompt": f"a request of about as many words as people write, number {i}", "label": "harmless", "category": "none",
                "source": "builtin", "terminal": "period", "stage": "grid", "poles": "behaviour", "intervention": "harm", "layer": i % 32, "coef": 1.0,
                "position": "t_inst", "reply": REPLY, "verdict": "refused", "rule": "I cannot help", "score": 0.5, "judge": "phrases-1",
            }
            for i in range(start, min(n, start + batch))
        ]  # fmt: skip


def work(tracker: Files, n: int, batch: int) -> float:
    """CPU seconds of this process between the first row and the end of the run."""
    figure = Figure()
    figure.subplots().plot([1, 2])
    plot = Plot(figure, "refusal by layer", "", Chart("line", "layer", "rate", "Layer", "Rate", series="direction"))
    points = [{"layer": layer, "rate": 0.5, "low": 0.4, "high": 0.6, "n": 40, "direction": name} for name in ("harm", "refuse") for layer in range(33)]
    vectors = torch.ones(33, 4096)
    direction = Direction(vectors, tuple(range(33)), "t_inst", "mean_difference", "m", "w", 32, 60, 60, "d", torch.ones(33), "harm")
    started = time.process_time()
    with tracker:
        for rows in rows_of(n, batch):
            tracker.rows(rows)
        tracker.figure("refusal_by_layer", plot, points)
        tracker.direction(direction)
        tracker.summary({"claim": "c", "table": points})
    return time.process_time() - started


def measured(kind: str, n: int, batch: int) -> dict[str, float]:
    """In a process of its own, so that W&B's own process is counted when it has ended."""
    with tempfile.TemporaryDirectory() as folder:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            started, clock = time.process_time(), time.monotonic()
            tracker = Files(folder) if kind == "files" else Wandb(folder, config={}, name="n", mode="offline")
            opening = time.process_time() - started
            spent = work(tracker, n, batch)
            if kind == "wandb":
                import wandb

                wandb.teardown()
            others = resource.getrusage(resource.RUSAGE_CHILDREN)
            told = {"opening": opening, "work": spent, "process": others.ru_utime + others.ru_stime, "wall": time.monotonic() - clock}
            os.write(writer, json.dumps(told).encode())
            os._exit(0)
        os.waitpid(child, 0)
        return json.loads(os.read(reader, 10_000))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--run-seconds", type=float, help="what the run takes without a tracker; else as many seconds as 10,000 short replies take at 20 a second"
    )
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    run = args.run_seconds or args.rows / 20
    print(f"{args.rows} rows in batches of {args.batch}; shares of a run of {run:g} s; best of {args.times}; {Path(__file__).name}")
    for kind in ("files", "wandb"):
        best = min((measured(kind, args.rows, args.batch) for _ in range(args.times)), key=lambda told: told["opening"] + told["work"] + told["process"])
        cpu = best["opening"] + best["work"] + best["process"]
        parts = ", ".join(f"{key} {best[key]:.2f}" for key in ("opening", "work", "process", "wall"))
        print(f"{kind:6} {cpu:6.2f} s of CPU = {100 * cpu / run:.2f} % ({parts})")

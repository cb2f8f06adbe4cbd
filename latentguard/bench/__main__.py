"""The command line of the benchmark: which models, which rows, where the table goes. Measures nothing itself."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait would be counted as work

import argparse
import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from latentguard.errors import InputError

DEFAULTS = (("smollm2_135m", "smollm2_135m_q4"), ("qwen2_5_coder_0_5b", "qwen2_5_coder_0_5b_q4"))
ROWS = (
    "read_one", "read_all", "generate", "grid_full", "grid_rates", "grid_staged", "grid_logits", "sweep", "dtype_read", "dtype_grid", "second_run", "memory",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m latentguard.bench", description="What latentguard costs beside plain transformers: ratios, measured in turns."
    )
    made.add_argument("--model", nargs="+", default=[], metavar="NAME", help="config names, folders or Hub ids (default: the two small models)")
    made.add_argument("--rows", default=",".join(ROWS), help=f"comma-separated rows or their beginnings: {', '.join(ROWS)} (default: all)")
    made.add_argument("--rounds", type=int, default=3, help="how often each contestant runs (default 3)")
    made.add_argument(
        "--dtype",
        default=None,
        choices=["float32", "bfloat16", "auto"],
        help="of both sides (default float32, where tokens must be equal; bfloat16 with --shapes)",
    )
    made.add_argument("--reads", type=int, default=64, help="prompts read (default 64)")
    made.add_argument("--prompts", type=int, default=16, help="prompts answered (default 16)")
    made.add_argument("--tokens", type=int, default=32, help="tokens a reply (default 32)")
    made.add_argument("--seed", type=int, default=0, help="of the prompts (default 0)")
    made.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    made.add_argument("--peers", action="store_true", help="the peers that are installed beside latentguard too")
    made.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH", help="a peer and the Python that has it, several (docs/benchmarks.md)")
    made.add_argument("--curves", action="store_true", help="cost against size instead, with a figure (default model: tiny)")
    made.add_argument("--shapes", metavar="NAME", help="random weights of large shapes instead, for a GPU: llama3_8b")
    made.add_argument("--layers", type=int, help="with --shapes: fewer layers")
    made.add_argument("--d-model", type=int, help="with --shapes: another width")
    made.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for table and JSON (default runs/bench)")
    return made


def chosen_rows(text: str) -> list[str]:
    """Rows by name or by how their names begin."""
    found = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        hits = [row for row in ROWS if row == word] or [row for row in ROWS if row.startswith(word)]
        if not hits:
            raise InputError(f"--rows {word}: no such row; choose from {', '.join(ROWS)}, or the beginnings of some")
        found += [row for row in hits if row not in found]
    if not found:
        raise InputError(f"--rows is empty: choose from {', '.join(ROWS)}")
    return found


def default_models() -> list[str]:
    """The two small models, from the Hub where it is in reach, else their stand-ins; says which."""
    return [
        subprocess.run([sys.executable, "-m", "latentguard.weights", *pair], check=True, text=True, stdout=subprocess.PIPE).stdout.split()[-1]
        for pair in DEFAULTS
    ]


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    from importlib.metadata import version

    import torch

    cpu = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.is_file() else []
    return {
        "cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "bf16": [name for name in ("avx512_bf16", "amx_tile") if getattr(torch.cpu, f"_is_{name}_supported")()],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "nnsight")}},
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("OMP_", "MKL_", "MALLOC_"))},
        "commit": commit(), "load": os.getloadavg(),
    }  # fmt: skip


def commit() -> str | None:
    """The commit of the source tree, '-dirty' where it differs from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or None


def main(words: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where an output was wrong; 2 where a setting was; 130 after Ctrl-C."""
    options = parser().parse_args(words)
    try:
        for name in ("rounds", "reads", "prompts", "tokens"):
            if getattr(options, name) < 1:
                raise InputError(f"--{name} {getattr(options, name)}: at least 1")
        if not options.shapes and (options.layers or options.d_model):
            raise InputError("--layers and --d-model change the shapes of --shapes; give that too")
        if options.shapes and options.curves:
            raise InputError("--shapes and --curves are two runs: give one of them")
        rows = chosen_rows(options.rows)
        return run(options, rows)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def run(options: argparse.Namespace, rows: list[str]) -> int:
    """Measure, model by model; print and write after each, and what there is when interrupted."""
    import torch
    from tqdm.auto import tqdm

    from latentguard.bench import peers, runner

    if options.threads:
        torch.set_num_threads(options.threads)
    pythons = peers.parse(options.peer_python, options.peers)
    asked = {name: getattr(options, name) for name in ("rounds", "dtype", "reads", "prompts", "tokens", "seed", "layers", "d_model")}
    plan = runner.Plan(rows=rows, peers=pythons, **asked)
    models = [name for word in options.model for name in word.split(",")]
    report: dict[str, Any] = {
        "command": " ".join(["python -m latentguard.bench", *sys.argv[1:]]), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "machine": machine(), "models": [],
    }  # fmt: skip

    def say(text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def jobs() -> Iterator[tuple[str, Callable[[dict[str, Any]], None]]]:
        if options.shapes:
            yield options.shapes, lambda found: runner.bench_shapes(options.shapes, plan, found, say)
        elif options.curves:
            for name in models or ["tiny"]:
                yield name, lambda found, name=name: runner.bench_curves(name, options.rounds, found, say)
        else:
            for name in models or default_models():
                known = any(name in pair for pair in DEFAULTS) and (options.reads, options.prompts, options.tokens) == (64, 16, 32)
                yield name, lambda found, name=name, known=known: runner.bench_model(name, plan, found, say, targets=known)

    code = 0
    for name, job in jobs():
        found: dict[str, Any] = {}
        report["models"].append(found)
        try:
            job(found)
        except KeyboardInterrupt:
            code = 130
        show(name, found, report, options)
        if code == 130:
            print("interrupted: what stands above was finished", file=sys.stderr)
            return code
        code = max(code, int(any(row.get("ok") is False for row in found["rows"])))
    return code


def show(name: str, found: dict[str, Any], report: dict[str, Any], options: argparse.Namespace) -> None:
    """Print one model's table, and write the report; curves get their figure and CSV too."""
    from latentguard.bench.contest import table

    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / ("curves.json" if options.curves else "bench.json")
    target.write_text(json.dumps(report, indent=1, default=str))
    print(f"\n{found.get('about', name)}\n")
    if options.curves and found.get("rows"):
        draw(found, options.out)
        ends = {row["curve"]: row for row in found["rows"]}
        for curve, row in ends.items():
            print(f"{curve}: slope {row['slope']:.3f}, largest step above the neighbours {100 * row['largest_step']:.1f}%")
    elif not options.curves:
        print(table(found.get("rows", []), found.get("unit", "s")))
    print(f"\n{target}")


def draw(found: dict[str, Any], folder: Path) -> None:
    """curves-MODEL.csv and .png."""
    import csv

    from latentguard.plots.cost import cost_by_size

    path = folder / f"curves-{found['model']}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found["rows"][0]))
        writer.writeheader()
        writer.writerows(found["rows"])
    cost_by_size(found["rows"], title=f"cost against size, {found['model']}", unit=found["unit"]).figure.savefig(path.with_suffix(".png"), dpi=150)
    print(f"{path}\n{path.with_suffix('.png')}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end keeps what was finished, as Ctrl-C does
    sys.exit(main())

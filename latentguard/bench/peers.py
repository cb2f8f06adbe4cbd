"""Peers as contestants: each runs in a worker process with a Python of its own, one job at a time. Imports no peer.

Their pins conflict with ours, so nothing is shared but JSON lines, a folder with the model, and .npy files.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from latentguard.bench import rows
from latentguard.bench.contest import Contestant, Group, Line, Withdrawn
from latentguard.bench.rows import Bench
from latentguard.errors import InputError

WORKER = Path(__file__).with_name("worker.py")
NAMES = ("transformers", "steering_vectors", "repeng", "transformer_lens", "pyvene")


def parse(given: Sequence[str], installed: bool = False) -> dict[str, str]:
    """NAME=/path/to/python, several; the Python is the one that has the peer. `installed`: also the peers beside this package."""
    found = {name: sys.executable for name in NAMES if installed and name != "transformers" and importlib.util.find_spec(name)}
    if installed and not found and not given:
        raise InputError(
            f"--peers: none of {', '.join(NAMES[1:])} is installed beside latentguard; give --peer-python NAME=/path/to/python (docs/benchmarks.md)"
        )
    for word in given:
        name, _, path = word.partition("=")
        if name not in NAMES or not path:
            raise InputError(f"--peer-python {word}: write NAME=/path/to/python, NAME one of {', '.join(NAMES)}")
        if not os.access(path, os.X_OK):
            raise InputError(f"--peer-python {word}: there is no program {path}; docs/benchmarks.md has the commands that make it")
        found[name] = path
    return found


def older(folder: Path, made: Path) -> Path:
    """A folder that transformers 4 reads too: the same weights by symbolic link, with the words of both generations in its configs.

    transformers 5 writes `rope_parameters` and a tokenizer class of its own; version 4 would take another rope base in silence.
    """
    made.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.name not in ("config.json", "tokenizer_config.json"):
            (made / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    config["torch_dtype"] = config.get("dtype", "float32")
    (made / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (made / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return made


@dataclass
class Peer:
    """One peer's worker; it is started when first asked, and anew after it died."""

    name: str
    python: str
    folder: Path
    scratch: Path
    threads: int
    script: Path = WORKER
    versions: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """One job's answer.

        Raises:
            Withdrawn: with the last words of the worker, where it died.
        """
        if self.process is None or self.process.poll() is not None:
            with (self.scratch / f"{self.name}.log").open("w") as log:
                own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
                command = [self.python, str(self.script)]
                self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=own)
            self.versions.update(self._send({"do": "load", "peer": self.name, "folder": str(self.folder), "threads": self.threads}))
        return self._send(job)

    def _send(self, job: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process and self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # what it died of is read below
            print(json.dumps(job), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            words = (self.scratch / f"{self.name}.log").read_text().strip().splitlines() or ["no word"]
            raise Withdrawn(f"{self.name} failed at {job['do']}: {words[-1][:200]}")
        return json.loads(line)

    def timed(self, job: Mapping[str, Any]) -> tuple[float, Any]:
        """Seconds that the worker counted, and states as a tensor or tokens as lists."""
        out = self.scratch / f"{self.name}.npy"
        answer = self.ask({**job, "out": str(out)})
        said = answer["said"]
        return answer["seconds"], torch.from_numpy(numpy.load(out, allow_pickle=False)) if said is None else said

    def close(self) -> None:
        """End the worker."""
        if self.process and self.process.stdin:
            self.process.stdin.close()
            self.process.wait()


def enter(groups: Sequence[Group], entrants: Sequence[Peer], bench: Bench) -> None:
    """Every peer as one more contestant of the groups read_one, read_all, generate and sweep, its output checked like ours."""
    work, backend = bench.work, bench.backend
    named = {group.name: group for group in groups}
    vector = work.direction.at(work.layer)
    swept = [(layer, coef * work.direction.at(layer)) for layer, coef in work.swept]
    steering = {"tokens": work.tokens, "eos": sorted(bench.plain.eos), "layer": work.layer, "vector": vector.tolist()}
    jobs = {
        "read_one": {"layer": work.layer},
        "read_all": {},
        "generate": {**steering, "full": True},
        "sweep": {**steering, "full": False, "cells": [(layer, vector.tolist()) for layer, vector in swept]},
    }
    for row in jobs.keys() & named.keys():
        prompts = work.reading if row.startswith("read") else work.answering
        rendered = backend.render(prompts)
        job = {"do": row, **jobs[row], "texts": [item.text for item in rendered], "ids": [item.ids for item in rendered]}
        for peer in entrants:
            if row == "read_one":
                line = Line(row, peer.name, rows.SIZES, rows.same_states(rows.SIZES[0], peer.name, bench.exact), over=rows.OVER[row])
            elif row == "read_all":
                line = Line(row, peer.name, rows.SIZES, rows.same_states(rows.SIZES[0], peer.name, bench.exact, slice(1, -1)), over=rows.OVER[row])
            else:
                floor, cells = ("torch hook", [(work.layer, vector)]) if row == "generate" else ("cell by cell", swept)
                over = ("plain generate",) if row == "generate" else ("cell by cell",)
                line = Line(row, peer.name, over, rows.same_tokens(bench, floor, peer.name, cells, True))
            named[row].contestants.append(_contestant(peer, job))
            named[row].lines.append(line)


def _contestant(peer: Peer, job: dict[str, Any]) -> Contestant:
    little = {**job, "ids": job["ids"][:4], "texts": job["texts"][:4], "cells": job.get("cells", [])[:1], "tokens": 4}
    return Contestant(peer.name, lambda: peer.timed(job), lambda: peer.timed(little))

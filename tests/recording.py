"""A record of W&B read back with W&B's own tool, and sent with it."""

import json
import os
import subprocess
import sys
from pathlib import Path


def wandb(*words):
    """`python -m wandb …` beside our own process of W&B."""
    env = {key: value for key, value in os.environ.items() if key not in ("WANDB_SERVICE", "WANDB_MODE")}
    return subprocess.run([sys.executable, "-m", "wandb", *words], capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)


def _said(*words):
    done = wandb("leet", "inspect", "--json", *words)
    assert done.returncode == 0, f"wandb leet, which is pinned, reads no record: {done.stderr}"
    return done.stdout


class Record:
    """What a run left for W&B.

    Attributes:
        told: config, summary, tags, state, exit_code, name, run_id, project.
        run: group, job_type and what else the run was begun with.
        history: rows, in order.
        metrics: by name or pattern, how it is drawn.
        artifacts: by name; `used` names those that were consumed.
        table: the rows of `generations`, as dicts.
    """

    def __init__(self, folder):
        (file,) = Path(folder).glob("*.wandb")
        self.told = json.loads(_said("--summary", str(file)))
        lines = [json.loads(line) for line in _said(str(file)).splitlines()]
        kept = {kind: [line[kind] for line in lines if line["type"] == kind] for kind in ("run", "history", "metric", "artifact")}
        self.run, self.history = kept["run"][0], [row["item"] for row in kept["history"]]
        self.metrics = {one.get("name") or one["glob_name"]: one for one in kept["metric"]}
        self.artifacts = {one["name"]: one for one in kept["artifact"]}
        self.used = {name for name, one in self.artifacts.items() if one.get("use_after_commit")}
        path = self.told["summary"].get("generations", {}).get("path")
        held = json.loads((Path(folder) / "files" / path).read_text()) if path else {"columns": [], "data": []}
        self.table = [dict(zip(held["columns"], row, strict=True)) for row in held["data"]]


def records(folder):
    """W&B's folders of the runs under a folder."""
    return sorted(path for path in Path(folder).rglob("*run-*-*") if path.is_dir() and not path.is_symlink())


def holding(folder, word):
    """Names of the files that hold a word."""
    return {path.name for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink() and word.encode() in path.read_bytes()}

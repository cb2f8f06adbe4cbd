"""Where runs are on W&B, as far as their folders tell, and the filters that choose them there. Knows no report and asks no server."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentguard.errors import InputError
from latentguard.report.runs import Run, is_run

_FOLDER = re.compile(r"(offline-)?run-\d{8}_\d{6}-(.+)")
NOBODY = "YOUR-ENTITY"  # in a dry run that was told of none
PROJECT = "latentguard"


def place(runs: Sequence[Run], entity: str | None, project: str | None) -> tuple[str | None, str]:
    """Entity and project: those given, else those the runs were tracked with, else WANDB_ENTITY and WANDB_PROJECT.

    The entity is None where nothing tells; W&B then takes the owner of the key.

    Raises:
        InputError: the runs are of several.
    """
    found = []
    for key, given in (("entity", entity), ("project", project)):
        told = {str(value) for run in runs if (value := _settings(run).get(key)) and "${" not in str(value)}
        if not given and len(told) > 1:
            raise InputError(f"these runs are of several W&B {key} names, {', '.join(sorted(told))}: choose one by --{key}")
        found.append(given or next(iter(told), None) or os.environ.get(f"WANDB_{key.upper()}"))
    return found[0], found[1] or PROJECT


def untracked(run: Run) -> str:
    """Why it is not on W&B and the way there, in one sentence; nothing where it is, as far as its folder tells."""
    settings = _settings(run)
    name, again = settings.get("name", "files"), "run it again with tracker=wandb, or look at --dry-run"
    if name != "wandb":
        return f"{run.folder} was not tracked on W&B (tracker={name}): {again}"
    if settings.get("mode") == "disabled":
        return f"{run.folder} was tracked with tracker.mode=disabled, so nothing of it is on W&B: {again}"
    attempts = _attempts(run)
    if attempts and attempts[-1].name.startswith("offline-") and not list(attempts[-1].glob("*.wandb.synced")):
        return f"{run.folder} was tracked offline and is not on W&B yet: wandb sync {attempts[-1]}"
    return ""


def run_id(run: Run) -> str | None:
    """Its id on W&B; None where no folder of W&B's is in the run's."""
    found = [_FOLDER.fullmatch(attempt.name) for attempt in _attempts(run)]
    return found[-1].group(2) if found and found[-1] else None


def exp_of(run: Run) -> str:
    """Its study as its config on W&B calls it."""
    return str(run.choices.get("exp") or run.study)


def group_of(run: Run) -> str | None:
    """Its group on W&B: the name of its sweep's folder; None for a run of its own."""
    above = run.folder.absolute().parent
    return above.name if (above / "jobs.json").is_file() or (above / "multirun.yaml").is_file() else None


def shows_replies(run: Run) -> bool:
    """Whether its table of generations on W&B holds what the model said."""
    return _settings(run).get("generations") == "full"


def chosen(runs: Sequence[Run], exp: str | None = None) -> dict[str, list]:
    """What chooses these runs on W&B, or those of the study `exp` among them: W&B's name of a field → the values it may have; all must hold.

    By group where whole sweeps are meant, else by id, else by model and seed.
    """
    some = [run for run in runs if exp in (None, exp_of(run))]
    groups, ids, seeds = [group_of(run) for run in runs], [run_id(run) for run in some], [run.seed for run in some]
    found: dict[str, list] = {}
    if all(groups) and _whole(runs):
        found["Metric('Group')"] = groups
    elif all(ids):
        found["Metric('ID')"] = ids
    else:
        found["Config('model')"] = [run.model for run in some]
        if all(isinstance(seed, int) for seed in seeds):
            found["Config('seed')"] = seeds
    if exp is not None:
        found["Config('exp')"] = [exp]
    if all(run.finished for run in some):  # an attempt that crashed has the same group and settings
        found["Metric('State')"] = ["finished"]
    return {key: sorted(set(values), key=str) for key, values in found.items()}


def expression(fields: Mapping[str, list]) -> str:
    """As wandb-workspaces reads a filter."""
    return " and ".join(
        f"{key} == {_literal(one)}" if not rest else f"{key} in [{', '.join(map(_literal, [one, *rest]))}]" for key, (one, *rest) in fields.items()
    )


def sentence(fields: Mapping[str, list]) -> str:
    """For people: Group is steer_2026; exp is steer_harm."""
    return "; ".join(f"{key.split(chr(39))[1]} is {' or '.join(map(str, values))}" for key, values in fields.items())


def sendable(text: str) -> str:
    """As it is, but for what no encoding has a place for."""
    return text.encode("utf-8", "backslashreplace").decode()


def _settings(run: Run) -> Mapping:
    told = run.settings.get("tracker")
    return told if isinstance(told, Mapping) else {}


def _attempts(run: Run) -> list[Path]:
    """W&B's folders in the run's, the last attempt last."""
    folders = [path for path in (run.folder / "wandb").glob("*run-*") if path.is_dir() and not path.is_symlink() and _FOLDER.fullmatch(path.name)]
    return sorted(folders, key=lambda path: path.name.removeprefix("offline-"))


def _whole(runs: Sequence[Run]) -> bool:
    """Whether these are all the runs of their sweeps."""
    here = {run.folder.absolute() for run in runs}
    return all(path in here for above in {folder.parent for folder in here} for path in above.iterdir() if path.is_dir() and is_run(path))


def _literal(value: str | int) -> str:
    """As Python writes it, all signs but a few as escapes: the library that reads a filter changes = and < also within quotes."""
    if isinstance(value, int):
        return str(value)
    return "'" + "".join(c if c.isascii() and (c.isalnum() or c in " _-./") else f"\\U{ord(c):08x}" for c in sendable(value)) + "'"

"""A run's folder, or a sweep's, as values: what was asked, what was found, its rows and figures. Knows no study and no page.

Everything is read as text that may be damaged: a run that was killed has a last row cut in two, one by hand lacks files.
"""

import csv
import fcntl
import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from latentguard.charts import Chart
from latentguard.errors import InputError

log = logging.getLogger(__name__)
Row = Mapping[str, Any]
SAID = ("reply", "rule", "generation", "completion")  # columns that hold what the model said
_FILES = ("summary.json", "rows.jsonl", "failure.json", "environment.json", ".hydra")  # any of them: a run began here
_PLACES = ("hydra.", "hydra/", "resume=", "tracker", "model=", "exp=")


def tells(column: str) -> bool:
    """Whether a column of this name holds replies, or stands beside one that does."""
    return column in SAID or column.endswith(("_verdict", "_reply"))


@dataclass(frozen=True)
class Drawn:
    """A figure of a run: figures/<name>.png, .svg and .csv, and what figures/index.json says of it."""

    folder: Path
    name: str
    title: str
    caption: str
    replies: bool
    known: bool  # whether the index names it
    chart: Chart | None

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The numbers in it; numbers as numbers, empty cells left out."""
        with (self.folder / f"{self.name}.csv").open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            return [{key: _number(text) for key, text in row.items() if key and text not in ("", None)} for row in csv.DictReader(file)]

    @property
    def still(self) -> Path | None:
        """Its picture for a page."""
        return still_of(self.folder / self.name)


def still_of(stem: Path) -> Path | None:
    """The SVG of a figure or its PNG, whichever makes the smaller page: a PNG is given a palette there, a third of its size."""
    found = [(path.stat().st_size * share, path) for kind, share in ((".svg", 1.0), (".png", 0.35)) if (path := stem.with_name(stem.name + kind)).is_file()]
    return min(found)[1] if found else None


@dataclass(frozen=True)
class Run:
    """One run. Two of the same folder are equal.

    Attributes:
        summary: summary.json, {} where there is none yet.
        environment: environment.json.
        settings: .hydra/config.yaml, interpolations as they stand.
        overrides: the words it was asked with.
        failure: why it failed, where it did.
    """

    folder: Path
    summary: Row
    environment: Row
    settings: Row
    overrides: tuple[str, ...]
    failure: str

    @property
    def study(self) -> str:
        """The study as the summary calls it; before there is one, exp=."""
        return str(self.summary.get("study") or self.choices.get("exp") or "unknown study")

    @property
    def model(self) -> str:
        """As the run calls it."""
        return str(self.summary.get("model") or self.environment.get("model") or self.choices.get("model") or "unknown model")

    @property
    def choices(self) -> Row:
        """The option of each group."""
        told = dict(word.split("=", 1) for word in self.overrides if "=" in word and "." not in word.split("=", 1)[0])
        return {**told, **(self.environment.get("choices") or {})}

    @property
    def seed(self) -> Any:
        """None where nothing tells."""
        return self.environment.get("seed", self.settings.get("seed"))

    @property
    def finished(self) -> bool:
        """Whether it came to its end; `seconds` is written last."""
        return "seconds" in self.summary

    @property
    def state(self) -> str:
        """What became of it."""
        if self.finished:
            return str(self.summary.get("status", "ok"))
        return "failed" if self.failure else "running" if _held(self.folder / "run.log") else "unfinished"

    @property
    def claim(self) -> str:
        """What it found, in a sentence, or why there is none."""
        if self.finished or self.summary.get("claim"):
            return str(self.summary.get("claim") or self.summary.get("why") or "The run gave no claim.")
        if self.failure:
            return f"Failed: {self.failure}"
        done = [name for name, part in self.studies.items() if part.get("status") in ("ok", "insufficient_base_rate")]
        so_far = f"; done so far: {', '.join(done)}" if len(self.studies) > 1 else ""
        if self.state == "running":
            return f"Still running{so_far}."
        return f"Not finished{so_far}: go on with resume={shlex.quote(str(self.folder))}."

    @property
    def headline(self) -> Row:
        """The number that the claim rests on: metric, value, low, high, n; {} where there is none."""
        return self.summary.get("headline") or {}

    @property
    def studies(self) -> dict[str, Row]:
        """The parts of a series; of any other run, itself."""
        parts = self.summary.get("studies")
        if isinstance(parts, Mapping):
            return {name: {**part, "study": part.get("study", name)} for name, part in parts.items()}
        return {self.study: self.summary} if self.summary else {}

    @property
    def command(self) -> str:
        """What to type to have it again; of a run made from Python, nothing."""
        words = [word for word in self.overrides if not word.startswith(("hydra.run.dir=", "hydra.sweep.dir=", "hydra.sweep.subdir="))]
        return shlex.join(["python", "-m", "latentguard.run", *self.flags, *words]) if self.overrides or self.settings else ""

    @cached_property
    def flags(self) -> list[str]:
        """--config-dir, --config-name: where its own options came from."""
        record = (_yaml(self.folder / ".hydra" / "hydra.yaml") or {}).get("hydra") or {}
        name = (record.get("job") or {}).get("config_name")
        flags = ["--config-name", str(name)] if name not in (None, "config") else []
        for source in (record.get("runtime") or {}).get("config_sources") or ():
            flags += ["--config-dir", str(source.get("path"))] if source.get("provider") == "command-line" else []
        return flags

    @property
    def varied(self) -> dict[str, str]:
        """What was asked beyond model and study: key → value."""
        words = [word.lstrip("+~") for word in self.overrides if not word.startswith(_PLACES)]
        return {key: value for key, _, value in (word.partition("=") for word in words)}

    @cached_property
    def figures(self) -> dict[str, Drawn]:
        """Its figures by name; those made before figures/index.json was kept have no chart."""
        folder = self.folder / "figures"
        index = _json(folder / "index.json") if (folder / "index.json").is_file() else {}
        found: dict[str, Drawn] = {}
        for name in dict.fromkeys([*index, *(path.stem for path in sorted(folder.glob("*.png")) if not path.stem.startswith("paper_"))]):
            if not (folder / f"{name}.csv").is_file():
                log.warning("%s: figure %s is left out, for its data, %s.csv, are missing", self.folder, name, name)
                continue
            told = index.get(name)
            told, known = (told, True) if isinstance(told, Mapping) else ({}, False)
            chart = _chart(told.get("chart"), folder / "index.json")
            with (folder / f"{name}.csv").open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
                replies = bool(told.get("replies")) or any(map(tells, next(csv.reader(file), [])))
            title, caption = str(told.get("title") or name.replace("_", " ")), str(told.get("caption") or "")
            found[name] = Drawn(folder, name, title, caption, replies, known, chart)
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        """Its rows as they came; a last one cut in two is left out."""
        path = self.folder / "rows.jsonl"
        if not path.is_file():
            return
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    if isinstance(row, dict):
                        yield row
                        continue
                    raise json.JSONDecodeError("no object", line, 0)
                except json.JSONDecodeError:
                    if line.endswith("\n"):
                        raise InputError(f"{path}, line {number}: this is no JSON object; mend the line, or delete it") from None
                    log.warning("%s: the last row was cut off when the run stopped, and is left out", path)


def is_run(folder: Path) -> bool:
    """Whether a run began here."""
    return any((folder / name).exists() for name in _FILES) and not (folder / "jobs.json").exists()


def read_run(folder: str | Path) -> Run:
    """The run in a folder.

    Raises:
        InputError: there is none, or a file of it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one under runs/ (python -m latentguard.report --list)")
    if not is_run(folder):
        raise InputError(f"{folder}: no run is here (no summary.json, no rows.jsonl); python -m latentguard.report --list names those there are")
    hydra = folder / ".hydra"
    settings, overrides = (_yaml(hydra / name) for name in ("config.yaml", "overrides.yaml"))
    failure = _json(folder / "failure.json").get("reason", "") if (folder / "failure.json").is_file() else ""
    return Run(
        folder,
        _shaped(_json(folder / "summary.json"), folder / "summary.json") if (folder / "summary.json").is_file() else {},
        _json(folder / "environment.json") if (folder / "environment.json").is_file() else {},
        settings if isinstance(settings, Mapping) else {},
        tuple(map(str, overrides or ())) if isinstance(overrides, list) else (),
        str(failure),
    )


def read_runs(folder: str | Path) -> list[Run]:
    """The run in a folder, or the jobs of the sweep in it, in their order."""
    folder = Path(folder)
    if folder.is_dir() and not is_run(folder):
        parts = sorted((path for path in folder.iterdir() if path.is_dir() and is_run(path)), key=_place)
        if parts:
            return [read_run(path) for path in parts]
    return [read_run(folder)]


def quiet(run: Run) -> Run:
    """The same without the words of errors, which may quote what the model said."""
    hidden = "its reason stands in the run's folder"
    parts = run.summary.get("studies")
    summary = run.summary
    if isinstance(parts, Mapping):
        told = {name: {**part, "why": hidden} if part.get("status") == "failed" else part for name, part in parts.items()}
        summary = {**summary, "studies": told}
        if any(part.get("status") == "failed" for part in parts.values()):
            summary |= {key: f"Studies failed; {hidden}." for key in ("claim", "why") if key in summary}
    return replace(run, summary=summary, failure=hidden if run.failure else "")


def waiting(folder: Path) -> list[str]:
    """The jobs of a sweep that never began, by the words they were to be run with."""
    path = folder / "jobs.json"
    if not path.is_file():
        return []
    try:
        jobs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path}: not JSON; without it the page does not know which jobs there were: delete it to have a page of those that ran") from None
    return [shlex.join(map(str, job.get("overrides", ()))) for job in jobs if not is_run(folder / str(job.get("folder", "")))]


def words(runs: Sequence[Run]) -> list[str]:
    """A short name of each, that tells it from the others: model, study, and what else differs."""
    differing = {key for run in runs for key, value in run.varied.items() if any(other.varied.get(key) != value for other in runs)}
    seeds, models, studies = ({getattr(run, name) for run in runs} for name in ("seed", "model", "study"))
    names = []
    for run in runs:
        parts = [run.model] if len(models) > 1 or len(studies) == 1 else []
        parts += [run.study] if len(studies) > 1 else []
        parts += [f"seed {run.seed}"] if len(seeds) > 1 else []
        parts += [f"{key}={run.varied.get(key, 'default')}" for key in sorted(differing - {"seed"})]
        names.append(" · ".join(parts) or run.folder.name)
    if len(set(names)) < len(names):  # the same settings twice
        names = [f"{name} ({run.folder.resolve().name})" if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]
    if len(set(names)) < len(names):  # jobs of the same number in two sweeps
        names = [f"{name}, {run.folder.resolve().parent.name}" if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]
    return names


def _held(path: Path) -> bool:
    """Whether a run's process still holds its log (`latentguard.sweeps.alone`)."""
    if not path.is_file():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks tells nothing
            return False
    return False


def _chart(told: Any, where: Path) -> Chart | None:
    """A figure whose chart is not understood is shown by its picture alone."""
    if not told:
        return None
    try:
        return Chart.from_dict(told)
    except (TypeError, ValueError, AttributeError) as error:
        log.warning("%s: a chart in it is not understood (%s); its picture alone is shown", where, error)
        return None


def _shaped(summary: dict, path: Path) -> dict:
    """A summary whose parts are of the kinds that its readers take.

    Raises:
        InputError: one is not.
    """
    kinds = {"table": list, "effects": list, "figures": list, "cells": dict, "studies": dict, "headline": dict, "headlines": dict, "seconds": int | float}
    for key, kind in kinds.items():
        if key in summary and not isinstance(summary[key], kind):
            raise InputError(f"{path}: {key} is {type(summary[key]).__name__}; it was not written by latentguard, or was changed since")
    for key in ("table", "effects"):
        if not all(isinstance(row, dict) for row in summary.get(key, ())):
            raise InputError(f"{path}: {key} holds what is no object; it was not written by latentguard, or was changed since")
    for part in summary.get("studies", {}).values():
        _shaped(part if isinstance(part, dict) else {"studies": part}, path)
    return summary


def _place(folder: Path) -> tuple:
    number, _, rest = folder.name.partition("_")
    return (0, int(number), rest) if number.isdigit() else (1, 0, folder.name)


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error.msg}, line {error.lineno}); delete it, or run anew") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: a JSON object was expected; it was not written by latentguard")
    return found


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None


def _number(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text

"""A sweep: its order, its failed jobs, its end, and going on with one that stopped. Hydra's side of it; loads no model.

A sweep's folder holds jobs.json (number, folder and words of every job), written before the first job starts. A job is
done when its summary.json has the time it took, which `run` adds last; one that failed leaves failure.json.
"""

import json
import logging
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from latentguard.errors import InputError
from latentguard.pace import pace

log = logging.getLogger(__name__)
# Whether a job has begun (what Hydra refuses before is bad input), and whether `resumed` moved to another folder.
state = {"started": False, "moved": False}
# Our launchers bear the names of the plugins' own, which would start as many jobs as there are cores; Hydra 1.3 warns of the names.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/", category=UserWarning)
_BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_LOCAL = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"
_so_far: dict[str, Any] = {}  # of the jobs that this process runs: when the first began, how many there are, how many have ended
_AT_ONCE = 2  # a local submitit sweep would start all its jobs at once
# What may be said anew when a sweep goes on: how jobs are run, not what they are.
_LAUNCHER = ("hydra/launcher=", "hydra.launcher.")
_HOW = (*_LAUNCHER, "hydra.sweeper.max_batch_size=", "hydra.verbose=")
_OF_SWEEPS = (*_LAUNCHER, "hydra/sweeper=", "hydra.sweeper.", "hydra.sweep.")
_PLACE = ("hydra.mode=", "hydra.run.dir=", "hydra.sweep.dir=")


def refuse(error: InputError) -> NoReturn:
    """Say it in one line and leave with exit code 2."""
    print(f"latentguard: {error}", file=sys.stderr)
    raise SystemExit(2)


def shown(path: Path) -> Path:
    """As a person types it who stands where the command was given."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) and not state["moved"] else path


def go_on(folder: Path) -> str:
    """The words that resume what stopped there, fit for a shell."""
    return "python -m latentguard.run " + shlex.quote(f"resume={shown(folder)}")


def finished(folder: Path) -> bool:
    """Whether a run came to its end there. A series writes summary.json after each of its studies, without `seconds`."""
    path = folder / "summary.json"
    return path.is_file() and "seconds" in json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """No other process of ours uses this file meanwhile; the system lets go of it however this one ends.

    Raises:
        InputError: another does.
    """
    import fcntl

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path.parent}: another process is still running here; wait for it, or stop it first") from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): run nothing else in that folder meanwhile", path, error)
        yield


class Sweeps(Callback):
    """Hydra's callback: puts `ModelByModel` in the basic sweeper's place and reports failed jobs where they failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra takes sweepers from a top-level package `hydra_plugins` alone; its table of classes is the way round a second package."""
        Plugins.instance().class_name_to_class[_BASIC] = ModelByModel

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Forget an earlier attempt's failure; beside other local submitit jobs, take a share of the cores (before torch is imported)."""
        (Path(config.hydra.runtime.output_dir) / "failure.json").unlink(missing_ok=True)
        if config.hydra.mode == RunMode.MULTIRUN and (Path(config.hydra.sweep.dir) / "jobs.json").is_file():
            log.info("\n%s", _place(config.hydra.job.num, len(_jobs(Path(config.hydra.sweep.dir)))))
        if config.hydra.mode == RunMode.MULTIRUN and config.hydra.launcher._target_ == _LOCAL:
            at_once = OmegaConf.select(config, "hydra.sweeper.max_batch_size") or _AT_ONCE
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """The reason goes to the job's run.log and failure.json; the sweep goes on.

        Other sweepers than the basic one ask each job for its objective, and are told of the failure as Hydra tells it.
        """
        _so_far["ended"] = _so_far.get("ended", 0) + 1
        if job_return.status != JobStatus.FAILED:
            return
        error, folder = job_return._return_value, Path(config.hydra.runtime.output_dir)
        if isinstance(error, InputError):
            log.error("failed: %s", error)
        else:
            log.error("failed", exc_info=error)
        if config.hydra.mode == RunMode.MULTIRUN:
            if not finished(folder):
                reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}".splitlines()[0]
                _write(folder / "failure.json", {"reason": reason, "bad_input": isinstance(error, InputError)})
            if config.hydra.sweeper._target_ == _BASIC:  # kept, the error would hold the model of the frames it passed through
                job_return.status, job_return.return_value = JobStatus.COMPLETED, None


class Numbers(int):
    """What a launcher adds the place of a job in its list to: gives the job's own number, whichever jobs are in the list."""

    numbers: Sequence[int]

    def __new__(cls, numbers: Sequence[int]) -> "Numbers":
        """By itself, the first of them."""
        made = super().__new__(cls, numbers[0])
        made.numbers = numbers
        return made

    def __add__(self, place: int) -> int:
        return self.numbers[place]


class ModelByModel(Sweeper):
    """The product of all axes, models outermost: the last axis varies fastest, and a model that returns is loaded again.

    Args:
        max_batch_size: jobs handed to the launcher at a time; null for all.
        params: axes from a config file, `{exp.coefs: "[1],[2]"}`.
    """

    def __init__(self, max_batch_size: int | None, params: Mapping[str, str] | None = None) -> None:
        self.max_batch_size, self.params = max_batch_size, dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """With the launcher, if its plugin is there."""
        target, plugins = config.hydra.launcher._target_, Plugins.instance()
        if target not in plugins.class_name_to_class:
            plugin = target.split(".")[1].replace("_", "-")
            refuse(InputError(f"hydra/launcher={config.hydra.runtime.choices['hydra/launcher']} needs {plugin}: install it (docs/sweeps.md)"))
        if target.endswith(".SlurmLauncher") and shutil.which("srun") is None:
            refuse(InputError("hydra/launcher=submitit_slurm: srun is not on the path, so this is no SLURM machine; hydra/launcher=submitit_local runs here"))
        self.hydra_context, self.config = hydra_context, config
        self.launcher = plugins.instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Launch what is not done, then say what is; exit code 1 if anything is left."""
        assert self.config is not None and self.launcher is not None
        folder, again = Path(self.config.hydra.sweep.dir), OmegaConf.select(self.config, "resume") is not None
        try:
            jobs = _jobs(folder) if again else self._plan(arguments, folder)
            with alone(folder / "jobs.json"):
                return self._launch(jobs, folder, again)
        except InputError as error:
            refuse(error)

    def _launch(self, jobs: list[dict], folder: Path, again: bool) -> list:
        assert self.config is not None and self.launcher is not None
        left = []
        for job in jobs:
            if finished(folder / job["folder"]):
                print(f"#{job['number']} is done: {job['folder']}")
            else:
                left.append(job)
        if again:
            self.validate_batch_is_legal([job["overrides"] for job in left])
        state["started"] = True
        _so_far.update(since=time.monotonic(), asked=len(left), ended=0)
        size = self.max_batch_size or (_AT_ONCE if self.config.hydra.launcher._target_ == _LOCAL else len(left))
        returns = []
        try:
            for at in range(0, len(left), size or 1):
                batch = left[at : at + size]
                returns.append(self.launcher.launch([job["overrides"] for job in batch], Numbers([job["number"] for job in batch])))
        finally:
            undone = _tell(folder, jobs)
            _page(folder)
        if undone:
            raise SystemExit(1)
        return returns

    def _plan(self, arguments: list[str], folder: Path) -> list[dict]:
        """Every job of the product, written down."""
        assert self.config is not None and self.hydra_context is not None
        if (folder / "jobs.json").exists():
            raise InputError(f"hydra.sweep.dir={folder} holds a sweep already: go on with it, {go_on(folder)}, or name another folder")
        loader, axes = self.hydra_context.config_loader, {}
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        for word in sorted(OverridesParser.create(config_loader=loader).parse_overrides(words), key=_after_models):
            key = word.get_key_element()
            if word.is_interval_sweep():
                raise InputError(f"{word.input_line}: an interval has no end of values; give a list, {key}=1,2,3, or range(1,4)")
            axes[key] = [f"{key}={value}" for value in word.sweep_string_iterator()] if word.is_sweep_override() else [word.input_line]
        jobs = []
        for number, job in enumerate(product(*axes.values())):
            config = loader.load_sweep_config(self.config, list(job))
            with open_dict(config):
                config.hydra.job.num = config.hydra.job.id = number
            jobs.append({"number": number, "folder": str(config.hydra.sweep.subdir), "overrides": list(job)})
        if not jobs:
            raise InputError(f"{' '.join(arguments)}: no job comes of it; look at the options that were to be found")
        if len({job["folder"] for job in jobs}) < len(jobs):
            raise InputError(f"hydra.sweep.subdir={jobs[0]['folder']!r}: two jobs would write there; keep ${{hydra.job.num}} in it")
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        _write(folder / "jobs.json", jobs)
        return jobs


def resumed(words: list[str]) -> list[str]:
    """The command line that goes on with the run or sweep of `resume=FOLDER`; any other as it is.

    Moves to the folder the command was given in, so that relative paths mean what they meant.
    """
    state["moved"] = False
    asked = [word for word in words if word.startswith("resume=")]
    if not asked or asked[-1] == "resume=null":
        return words
    args = get_args_parser().parse_args(words)
    if args.cfg or args.info or args.hydra_help or args.shell_completion:
        return words
    given = asked[-1].removeprefix("resume=").strip("'\"")
    folder = Path(given).expanduser().resolve()
    if not given or not folder.is_dir():
        raise InputError(f"resume={given}: there is no such folder; name a run's or a sweep's folder under runs/")
    many = (folder / "multirun.yaml").is_file()
    if args.multirun and not many:
        raise InputError(f"resume={given} is no sweep's folder: leave out -m for one run, or name the folder that holds multirun.yaml")
    record = _record(folder / ("multirun.yaml" if many else ".hydra/hydra.yaml"))
    if many and record["sweeper"]["_target_"] != _BASIC:
        raise InputError(f"resume={given}: that sweep was made by {record['sweeper']['_target_']}, which goes on by its own means")
    if many:
        _jobs(folder)
    flags = ["--config-name", record["job"]["config_name"]]
    for source in record["runtime"]["config_sources"]:
        flags += ["--config-dir", source["path"]] if source["provider"] == "command-line" else []
    task, hydra = record["overrides"]["task"], record["overrides"]["hydra"]
    how = [word for word in args.overrides if word.startswith(_HOW if many else "hydra.verbose=")]
    flagged = [args.config_name, args.config_dir and os.path.abspath(args.config_dir)]
    for word in (*args.overrides, *filter(None, flagged)):
        if word not in (*asked, *task, *hydra, *how, *flags):
            raise InputError(f"resume={given} repeats what was asked there, and {word} was not: leave it out, or start anew without resume")
    if not many and finished(folder):
        print(f"{given} is done: nothing is left to run (without its summary.json it would be run again)")
        raise SystemExit(0)
    if (where := Path(record["runtime"]["cwd"])).is_dir() and where != Path.cwd():
        os.chdir(where)
        state["moved"] = True
    dropped = _PLACE if many else (*_PLACE, *_OF_SWEEPS)
    if any(word.startswith(_LAUNCHER) for word in how):
        dropped += _LAUNCHER
    kept = [word for word in hydra if not word.startswith(dropped)]
    quoted = QuotedString(str(folder), Quote.single).with_quotes()
    if many:
        return ["-m", *flags, *kept, *how, f"resume={quoted}", f"hydra.sweep.dir={quoted}"]
    return [*flags, *task, *kept, *how, f"hydra.run.dir={quoted}"]


def _after_models(word: Override) -> bool:
    """False for what chooses or changes a model, with or without + or ++; `sorted` keeps the order within each kind."""
    return word.key_or_group.split(".")[0] != "model"


def _jobs(folder: Path) -> list[dict]:
    path = folder / "jobs.json"
    if not path.is_file():
        raise InputError(f"resume={folder}: jobs.json is not there, so that sweep stopped before its first job or was not made by latentguard: start anew")
    return json.loads(path.read_text(encoding="utf-8"))


def _record(path: Path) -> dict:
    """Hydra's own record of a command, whose last key is `verbose`; a kill can cut it short."""
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]
        record["verbose"]
    except (OSError, TypeError, KeyError, yaml.YAMLError):
        raise InputError(f"{path} is missing or cut short, so what was asked for there is not known: start anew without resume") from None
    return record


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _place(number: int, jobs: int) -> str:
    """As "job 3 of 12 · #2", and where jobs run one after the other in this process, how long so far and still."""
    told = pace(time.monotonic() - _so_far["since"], _so_far["ended"], _so_far["asked"] - _so_far["ended"]) if "since" in _so_far else ""
    return f"job {number + 1} of {jobs} · #{number}{told}"


def _page(folder: Path) -> None:
    """The sweep's report.html, of the jobs that have left anything."""
    from latentguard.report import write_report

    try:
        print(f"Look at {shown(write_report(folder))}")
    except InputError as error:
        print(f"report.html is not written: {error}", file=sys.stderr)


def _tell(folder: Path, jobs: list[dict]) -> int:
    """Print which jobs are done, which are not and why; returns how many are not."""
    shared = set.intersection(*(set(job["overrides"]) for job in jobs))
    rows = []
    for job in jobs:
        here = folder / job["folder"]
        status, why = "done", ""
        if not finished(here):
            status = "failed" if (here / "failure.json").is_file() else "stopped" if here.is_dir() else "not run"
            why = json.loads((here / "failure.json").read_text(encoding="utf-8"))["reason"] if status == "failed" else ""
        words = " ".join(word for word in job["overrides"] if word not in shared)
        rows.append((f"#{job['number']}", status, job["folder"], words, why))
    undone = sum(row[1] != "done" for row in rows)
    print(f"\nSweep {shown(folder)}: {len(jobs) - undone} of {len(jobs)} jobs done")
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip())
    if undone:
        print(f"To run what is not done: {go_on(folder)}    (a failed job's run.log says more)", flush=True)
    return undone

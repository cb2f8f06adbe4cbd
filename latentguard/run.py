"""The front door: compose the settings, build the experiment, load the model, run, say what was found.

Imports nothing heavy: `--help` and a mistyped option are answered without torch.
"""

import contextlib
import logging
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from latentguard.configs import CONF, option, options
from latentguard.errors import InputError
from latentguard.sweeps import alone, finished, go_on, refuse, resumed, shown
from latentguard.sweeps import state as _state

if TYPE_CHECKING:
    from latentguard.trackers import Files

log = logging.getLogger(__name__)
GROUPS = ("model", "data", "exp", "judge", "tracker", "backend")
HELP = """\
latentguard: what a language model's hidden states know of harm, separately from whether it refuses

Choose one option of each group (group=option), or change any setting (group.key=value):

{groups}

Three commands that work:

  python -m latentguard.run                                          the main job, on a small real model
  python -m latentguard.run model=llama3 exp=steer_refusal           one of the paper's models
  python -m latentguard.run -m model=llama2,llama3,qwen2 exp=steer_harm,steer_refusal
                                                                     six jobs, each model loaded once
Your own:   model.id=ORG/NAME or /a/folder    data=file data.path=prompts.jsonl
What each option is: python -m latentguard.choices
To look:    --cfg job (all settings)    --info defaults    latentguard --shell-completion install=bash
Results:    runs/<time>_<exp>_<model>/ : summary.json, rows.jsonl, figures/, directions/, run.log
Stopped:    resume=FOLDER of a run, or of a sweep: repeats what was asked there and runs what is not done
In a sweep: hydra/launcher={launchers} (docs/sweeps.md)
Exit codes: 0 done, 1 failed (in a sweep: any job, whatever for), 2 bad input (said in one sentence; nothing was run),
            130 interrupted (what was computed is kept)
"""


def job(cfg: DictConfig) -> Any:
    """One run, or one job of a sweep, in which a failure is the job's own: the sweep reports it and goes on."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    _state["started"] = True
    hydra_cfg = HydraConfig.get()
    many, folder = hydra_cfg.mode == RunMode.MULTIRUN, Path(hydra_cfg.runtime.output_dir)
    try:
        if many and finished(folder):
            raise InputError(f"{folder} holds a finished job: go on with its sweep by resume=FOLDER, or name another hydra.sweep.dir")
        with alone(folder / "run.log"), logging_redirect_tqdm():  # a line of the log goes above a bar, not through it
            return run(cfg)
    except InputError as error:
        if many:
            raise
        refuse(error)
    except KeyboardInterrupt:
        if not many:
            print(f"\nlatentguard: interrupted; what was computed is answered from the store: {go_on(folder)}", file=sys.stderr)
        raise


_hydra_main = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)


def run(cfg: DictConfig) -> Any:
    """One job. Everything that can be wrong with the settings is said before a weight is loaded."""
    started = time.monotonic()
    hydra_cfg = HydraConfig.get()
    try:
        plain: dict = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    except InterpolationResolutionError as error:
        raise InputError(f"a setting refers to another that was left out: {str(error).splitlines()[0]}") from None
    if (where := plain.pop("resume", None)) is not None:
        raise InputError(f"resume={where}: give it on the command line and bare, resume=FOLDER")
    folder = Path(hydra_cfg.runtime.output_dir)
    choices = {key: value for key, value in hydra_cfg.runtime.choices.items() if "/" not in key}

    from latentguard.weights import locate, with_settings

    known = option("model", choices["model"]) if choices["model"] in options("model") else plain["model"]  # or from a --config-dir
    spec = with_settings(known, plain["model"])
    experiment = _build(cfg.exp, "exp")
    judge = _build(cfg.judge, "judge")

    from latentguard.backends.loading import check_torchrun, depth, resident
    from latentguard.backends.memory import peak_memory
    from latentguard.backends.simulated import simulated
    from latentguard.backends.skeleton import Remote, remote
    from latentguard.datasets import load_dataset, make_data_spec
    from latentguard.store import Stored

    _check(plain)
    data = load_dataset(make_data_spec(plain["data"]))
    experiment.check(depth(spec), data)
    if plain["backend"]["name"] == "local":
        check_torchrun(spec)
    _seed(cfg.seed)
    if spec.card:
        log.info("%s: %s", spec.name, spec.card)
    there = remote(spec, Remote.of(plain["backend"])) if plain["backend"]["name"] == "ndif" else None
    if there is None and spec.tiny is None:
        locate(spec)  # fetched, or refused, before a tracker opens a run
    with _tracker(plain, choices, folder, hydra_cfg, spec.name) as tracker:
        backend = there or resident(spec, batch_size=plain["backend"]["batch_size"])
        if plain["backend"].get("simulate_remote"):
            backend = simulated(backend)  # type: ignore[arg-type]
        usage = getattr(getattr(backend, "host", None), "usage", None)
        if plain["backend"]["store"]:
            backend = Stored(backend, limit_bytes=int(plain["backend"]["store_gb"] * 1e9))
        log.info(
            "%s in %.0f s; data %s: %d train, %d validation, %d test",
            spec.name,
            time.monotonic() - started,
            data.name,
            len(data.train),
            len(data.validation),
            len(data.test),
        )
        if getattr(experiment, "in_own_template", True):
            _show_positions(backend, data)
        environment = {**_environment(), "backend": backend.key(), "data": {"hash": data.hash, **data.card}, "seed": cfg.seed, "command": sys.argv}
        environment |= {"choices": choices, "model": spec.name, "model_card": spec.card, "licence": spec.licence}
        tracker.write_json("environment.json", environment)
        _lineage(tracker, backend, spec, data)
        summary = experiment(backend, data, judge, tracker)
        tracker.write_json("environment.json", {**environment, "peak_memory_bytes": peak_memory()})
        summary = {**summary, "remote": usage.numbers()} if usage else summary
        tracker.summary({**summary, "seconds": round(time.monotonic() - started, 1)})
        _page(tracker)
    _tell(summary, folder)
    return summary.get("objective", summary.get("headline", {}).get("value"))


def _tell(summary: dict, folder: Path) -> None:
    """What the terminal shows at the end, and run.log keeps: the numbers, the claim, where to look."""
    from latentguard.tables import as_text, found

    width = min(100, shutil.get_terminal_size((100, 24)).columns) if sys.stdout.isatty() else 100
    rows = found(summary)
    table = as_text(rows, width, limit=len(rows) if "headlines" in summary else 12)
    places = " and ".join(str(shown(path)) for path in (folder / "report.html", folder / "figures") if path.exists())
    log.info("%s\n%s\nLook at %s", f"\n{table}\n" if table else "", summary["claim"], places)


def _page(tracker: "Files") -> None:
    """report.html; that it cannot be written takes nothing from the run."""
    from latentguard.report import write_report

    try:
        tracker.page(write_report)
    except InputError as error:
        log.warning("report.html is not written: %s", error)


def _build(node: DictConfig, where: str) -> Any:
    """The object a config names; a wrong value is one sentence."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from pydantic import ValidationError

    from latentguard.weights import problem

    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValidationError):
            raise InputError(problem(where, cause)) from None
        if isinstance(cause, ValueError | TypeError):
            raise InputError(f"{where}: {cause}") from None
        if str(error).startswith("Error locating target"):
            target = str(error).split("'")[1]
            raise InputError(
                f"{where}._target_={target}: nothing of that name can be imported ({cause}); put its module on PYTHONPATH, or mend the name"
            ) from None
        raise


def _check_words(words: list[str]) -> None:
    """Hydra lets a whole group be left out; we need one option of each."""
    for word in words:
        group, _, value = word.lstrip("~+").partition("=")
        if group in GROUPS and (word.startswith("~") or value in ("", "null", "[]")):
            raise InputError(f"{word}: {group} cannot be left out; choose one of {', '.join(options(group))}")


def _check(plain: dict) -> None:
    """The few settings that no spec or experiment checks."""
    from latentguard.backends.skeleton import Remote

    backend, seed = plain["backend"], plain["seed"]
    if (kind := "ndif" if "host" in backend else "local") != backend["name"]:
        raise InputError(
            f"backend.name={backend['name']!r} beside the settings of {kind}: choose a whole backend, {' or '.join(f'backend={one}' for one in options('backend'))}"
        )
    if kind == "ndif":
        Remote.of(backend)
    size, store = backend["batch_size"], backend["store"]
    if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise InputError(f"backend.batch_size={size!r}: choose auto, or a number of rows, 1 or more")
    if not isinstance(simulate := backend.get("simulate_remote", False), bool):
        raise InputError(f"backend.simulate_remote={simulate!r}: choose true or false")
    if not isinstance(store, bool):
        raise InputError(f"backend.store={store!r}: choose true or false")
    if isinstance(cap := backend["store_gb"], bool) or not isinstance(cap, int | float) or not cap > 0:
        raise InputError(f"backend.store_gb={cap!r}: give a number of gigabytes above 0, or backend.store=false")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"seed={seed!r}: give an int from 0 to {2**32 - 1}")
    tracker = plain.get("tracker") or {}
    if tracker.get("name") not in ("files", "wandb"):
        raise InputError(f"tracker.name={tracker.get('name')!r}: choose tracker=files or tracker=wandb")
    if tracker["name"] == "wandb":
        if tracker["generations"] not in ("verdicts", "full"):
            raise InputError(f"tracker.generations={tracker['generations']!r}: choose verdicts or full")
        if tracker["mode"] not in (None, "online", "offline", "disabled"):
            raise InputError(f"tracker.mode={tracker['mode']!r}: choose online, offline or disabled, or leave it null")
        if not isinstance(tracker["tags"], list):
            raise InputError(f"tracker.tags={tracker['tags']!r}: give a list, [a,b]")
        if isinstance(limit := tracker["patience"], bool) or not isinstance(limit, int | float) or not 0 <= limit < math.inf:
            raise InputError(f"tracker.patience={limit!r}: give a number of seconds, or 0 to wait as long as it takes")


def _tracker(plain: dict, choices: dict, folder: Path, hydra_cfg: Any, model: str) -> "Files":
    from latentguard.choices import told
    from latentguard.trackers import Files, Wandb

    settings = dict(plain["tracker"])
    if settings.pop("name") == "files":
        return Files(folder)
    sweep = Path(hydra_cfg.sweep.dir).name if hydra_cfg.mode == RunMode.MULTIRUN else None
    words = [word for word in hydra_cfg.overrides.task if not word.startswith(("model=", "exp=", "tracker"))]
    name = " · ".join([model, choices["exp"], *words])
    keys = [word.lstrip("+").partition("=")[0] for word in words if not word.startswith("~")]
    changed = {key: OmegaConf.select(OmegaConf.create(plain), key) for key in keys if "." in key}
    flat = {key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for key, value in changed.items()}
    config = {**choices, "model": model, "seed": plain["seed"], **flat, "commit": _commit(), "cfg": plain}
    about = told("exp", choices["exp"]) if choices["exp"] in options("exp") else ""
    section = re.search(r"§[\d.]*\d|App\. [A-Z]", about)
    family = re.match("[a-z]+", model.lower())
    settings["tags"] = [choices["exp"], *(found[0] for found in (family, section) if found), *settings["tags"]]
    return Wandb(folder, config=config, name=name, group=sweep, job_type=choices["exp"], **settings)


def _lineage(tracker: "Files", backend: Any, spec: Any, data: Any) -> None:
    """What the run works with, without a prompt's text."""
    splits = {split: getattr(data, split) for split in ("train", "validation", "test")}
    counts = {split: len(prompts) for split, prompts in splits.items()}
    ids = {split: [prompt.id for prompt in prompts] for split, prompts in splits.items()}
    tracker.used("dataset", data.name, {"name": data.name, "hash": data.hash, "counts": counts, "card": data.card, "ids": ids})
    weights = {key: getattr(spec, key) for key in ("id", "revision", "licence", "card")}
    tracker.used("model", spec.name, {"name": spec.name, "weights": backend.weights, "n_layers": backend.n_layers, **weights})


def _show_positions(backend: Any, data: Any) -> None:
    """The decoded tokens of the two positions everything rests on, for one prompt."""
    from latentguard.positions import parse_position

    prompt = next(iter(data.train))
    rendered = backend.render([prompt])[0]
    shown = []
    for name in ("t_inst", "t_post_inst"):
        token = parse_position(name).tokens(rendered)[0]
        shown.append(f"{name} = token {token} of {len(rendered)}, {rendered.text[slice(*rendered.offsets[token])]!r}")
    log.info("positions in prompt %s: %s", prompt.id, "; ".join(shown))


def _seed(seed: int) -> None:
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _commit() -> str | None:
    """Of the checkout that this package lies in; None where there is none."""
    import subprocess

    checkout, commit = Path(__file__).parents[1], ""
    if (checkout / ".git").exists():
        with contextlib.suppress(OSError):  # no git here
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=checkout, check=False).stdout.strip()
    return commit or None


def _environment() -> dict:
    import platform
    from importlib.metadata import version

    names = ("latentguard", "torch", "transformers", "nnsight", "numpy", "hydra-core", "wandb")
    return {"versions": {name: version(name) for name in names}, "python": platform.python_version(), "machine": platform.platform(), "commit": _commit()}


def main() -> None:
    """`python -m latentguard.run` and the console script `latentguard`; of several processes of torchrun the first runs it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from latentguard.ranks import count, led

        if count() > 1:
            from latentguard.backends.loading import beside

            return led(command, beside)
    command()


def command() -> None:
    """What the words on the command line ask for."""
    if {"-h", "--help"} & set(sys.argv[1:]):  # Hydra's own help reads every option of every group, and takes over a second
        groups = "\n".join(f"  {group}: {', '.join(options(group))}" for group in GROUPS)
        print(HELP.format(groups=groups, launchers=", ".join(("basic", *options("hydra/launcher")))))
        return
    try:
        sys.argv[1:] = resumed(sys.argv[1:])
        _check_words(sys.argv[1:])
        _hydra_main()  # pyright: ignore[reportCallIssue]  (Hydra supplies the config)
    except InputError as error:
        refuse(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except SystemExit as end:
        if end.code == 1 and not _state["started"]:  # Hydra has said what is wrong with the words on the command line
            raise SystemExit(2) from None
        raise


if __name__ == "__main__":
    from latentguard.run import main  # what is pickled for a worker has a module to be found in

    main()

"""From a ModelSpec to an Ndif backend: config and tokenizer, no weights; and what a server says it holds."""

import difflib
import json
import logging
import os
import re
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from latentguard.backends.answers import address, repo_of
from latentguard.backends.connection import PUBLIC
from latentguard.backends.jobs import Host
from latentguard.backends.loading import readable
from latentguard.backends.ndif import Ndif, Sizes
from latentguard.backends.tracing import nnsight
from latentguard.caches import cache_dir
from latentguard.errors import InputError
from latentguard.prompts import digest
from latentguard.templates import Template
from latentguard.weights import ModelSpec, problem, skeleton_folder

log = logging.getLogger(__name__)
_LISTED = 8  # names of models in one sentence


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Remote:
    """What conf/backend/ndif.yaml says.

    Args:
        host: by default NDIF_HOST, else what nnsight was told, else NDIF itself.
        repo: the server's name of the model; by default the spec's id, of packages their folder here.
        batch_size, batches, job_mb, ahead, states: `ndif.Sizes`.
        patience, on_stall, sandboxed: `jobs.Host`.
    """

    name: Literal["ndif"] = "ndif"
    host: str | None = None
    repo: str | None = None
    batch_size: Annotated[int, Field(ge=1)] = 32
    batches: Annotated[int, Field(ge=1)] = 16
    job_mb: Annotated[float, Field(gt=0)] = 64.0
    ahead: Annotated[int, Field(ge=1, le=8)] = 2
    states: Literal["float32", "bfloat16", "float16"] = "float32"
    patience: Annotated[float, Field(gt=0)] = 1800.0
    on_stall: Literal["stop", "wait", "resubmit"] = "stop"
    sandboxed: bool = False
    store: bool = True
    store_gb: Annotated[float, Field(gt=0)] = 20.0

    @classmethod
    def of(cls, settings: dict) -> "Remote":
        """From a config's words; a wrong one is a sentence."""
        try:
            return cls(**settings)
        except ValidationError as error:
            raise InputError(problem("backend", error)) from error


def remote(spec: ModelSpec, settings: Remote | None = None) -> Ndif:
    """The model of a spec, on an NDIF server.

    Raises:
        InputError: no key, no such model there, another address than a server's: each with its way out.
    """
    said = settings or Remote()
    if spec.tiny is not None:
        raise InputError(f"model={spec.name} is made in memory and lies on no server: choose another model with backend=ndif")
    url = said.host or os.environ.get("NDIF_HOST") or nnsight.CONFIG.API.HOST or PUBLIC
    key = os.environ.get("NDIF_API_KEY") or nnsight.CONFIG.API.APIKEY or ""
    if address(url) == PUBLIC and not key.strip():
        raise InputError(f"{PUBLIC} asks for a key: make one at https://login.ndif.us and set NDIF_API_KEY, or log in once with `nnsight login`")
    folder = skeleton_folder(spec)
    repo = said.repo or (str(folder.absolute()) if spec.packages or os.path.isdir(os.path.expanduser(spec.id or "")) else spec.id)
    about = {"repo_id": repo, "revision": spec.revision, **({"trust_remote_code": True} if spec.trust_remote_code else {}), "task": "text-generation"}
    model_key = f"nnsight.modeling.transformers.TransformersModel:{json.dumps(about)}"
    notes = cache_dir("ndif", digest([address(url), model_key])[:16])
    server = Host(url, model_key, key, notes, patience=said.patience, on_stall=said.on_stall, sandboxed=said.sandboxed)
    server.line.greet()
    dtype = check_hosted(server, str(repo))
    with readable(spec):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        tree = nnsight.TransformersModel(str(folder), task="text-generation", tokenizer=tokenizer, config=config, trust_remote_code=spec.trust_remote_code)
        habits = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else GenerationConfig.from_model_config(config)
    sizes = Sizes(said.batch_size, said.batches, said.job_mb, said.ahead, said.states)
    return Ndif(server, tree, tokenizer, habits, name=spec.name, template=Template(tokenizer, spec.template, spec.system), sizes=sizes, held_in=dtype)


def hosted(host: Host) -> list[dict]:
    """What a server says it holds, a dict for each replica: model_key, repo_id, deployment_level (HOT, WARM, COLD), application_state.

    Empty where it does not tell.
    """
    answer = host.line.ask_once("/status", 65.0)
    deployments = answer.get("deployments") if isinstance(answer, dict) else None
    listed = deployments.items() if isinstance(deployments, dict) else ()
    return [{"model_key": name.partition("ModelActor:")[2] or name, **told} for name, told in listed if isinstance(told, dict)]


def check_hosted(host: Host, repo: str) -> str:
    """The type a server holds a model's weights in, '' where it does not say. Refuse one that it does not hold, with those it does and the
    nearest name.

    Raises:
        InputError: in one sentence. A server that does not tell what it holds is believed.
    """
    held = hosted(host)
    mine = [one for one in held if one["model_key"] == host.model_key]
    dtype = next((str(one["dtype"]) for one in mine if one.get("dtype")), "")
    if not held or any(one.get("application_state", "RUNNING") == "RUNNING" for one in mine):
        return dtype
    same = [one for one in held if _name(one).lower() == repo.lower()]
    cold = [one for one in same if one.get("deployment_level") == "COLD" and _name(one) == repo]
    up = [one for one in same if one.get("deployment_level") != "COLD"]
    if mine or (cold and not up):
        state = str((mine or cold)[0].get("application_state", "not loaded")).lower()
        log.warning("%s holds %s, but it is %s: jobs wait until it is up", host.url, repo, state)
    elif same:
        raise InputError(f"{host.url} holds {repo}, but {_difference(host.model_key, (up or same)[0])}")
    else:
        raise InputError(f"{host.url} does not hold {repo}; {_others(host.url, repo, held)}")
    return dtype


def _name(one: dict) -> str:
    """A deployment's model, as clients name it."""
    key = str(one["model_key"])
    named = repo_of(key)
    return named if named != key else str(one.get("repo_id") or key)


def _difference(mine: str, other: dict) -> str:
    """In what the model key of a server's deployment is another than ours, and the way out."""
    ours, kind = json.loads(mine.partition(":")[2]), str(other["model_key"]).partition(":")[0]
    try:
        theirs = dict(json.loads(str(other["model_key"]).partition(":")[2]))
    except (ValueError, TypeError):
        theirs = {}
    name, revision, own_code, task = _name(other), theirs.get("revision"), bool(theirs.get("trust_remote_code")), theirs.get("task", ours["task"])
    if name != ours["repo_id"]:
        return f"spells it {name}: set backend.repo={name}"
    if revision != ours["revision"]:
        return f"its revision {revision or 'main'}: set model.revision={revision or 'null'}"
    if own_code != bool(ours.get("trust_remote_code")):
        return f"with trust_remote_code={own_code}: set model.trust_remote_code={str(own_code).lower()}"
    if task != ours["task"]:
        return f"for the task {task}, not {ours['task']}: ask its keeper for that one"
    return f"names it {kind}, not {mine.partition(':')[0]}: its nnsight is another than {nnsight.__version__}, which is here"


def _others(url: str, repo: str, held: list[dict]) -> str:
    """What to choose instead: the nearest names first, no more than can be read."""
    up = [one for one in held if one.get("deployment_level") in ("HOT", "WARM")] or held
    names = sorted({_name(one) for one in up}, key=lambda name: (-_likeness(name, repo), name))
    chat = [name for name in names if re.search(r"instruct|chat|-it\b", name.lower())]
    listed = (chat or names)[:_LISTED]
    more = f" and {len(chat or names) - len(listed)} more" if len(chat or names) > len(listed) else ""
    nearest = f"; the nearest is {names[0]} (model.id={names[0]})" if _likeness(names[0], repo) >= 0.5 else ""
    own = "" if url == PUBLIC else f"; on a server of your own, `ndif deploy {repo}` loads it"
    return f"{'its instruct models are' if chat else 'it holds'} {', '.join(listed)}{more}{nearest}{own}"


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()

"""An NDIF server's answers, read: what they mean for a job, and the sentence a user gets. Sends nothing.

The wording is that of ndif 0.1.2: a traceback is the failure of the code that was sent, a sentence is the server's own.
"""

import io
import json
import math
import pickle
import re
import time
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Any, Literal

import httpx
import torch
import zstandard

from latentguard.errors import InputError

_TRACEBACK = "Traceback (most recent call last):"
_PASSING = ("try again later", "evicted", "preempted", "could not be read")  # in a sentence of the server's own
_TOO_LARGE = ("out of memory", "outofmemory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "exceeded the execution timeout")
_RUNNER = ("connection closed before message complete", "runner process exited", "waiting for the runner socket", "brokenpipeerror")  # the sandbox died
_DRIFT = ("ModuleNotFoundError", "ImportError", "AttributeError", "NameError", "TypeError", "SyntaxError")  # a payload that no second sending mends
_STAGES = {
    "": "sent",
    "RECEIVED": "sent",
    "QUEUED": "queued",
    "PROVISIONING": "the server makes room for the model",
    "DEPLOYING": "the server loads the model",
    "DISPATCHED": "handed to the model",
    "RUNNING": "running",
    "COMPLETED": "fetching the result",
    "ERROR": "failed",
}


def address(url: str) -> str:
    """A server's address as it is used: no slash at its end.

    Raises:
        InputError: where it is none.
    """
    try:
        found = httpx.URL(url.strip().rstrip("/"))
    except httpx.InvalidURL as error:
        raise InputError(f"backend.host={url!r} is no address ({error}): give one like https://api.ndif.us or http://127.0.0.1:5001") from None
    odd = not found.host or found.query or found.fragment or (found.port or 1) > 65535 or re.search(r"[\s%]", found.host)
    if found.scheme not in ("http", "https") or odd:
        raise InputError(f"backend.host={url!r}: give an address with http:// or https:// and nothing behind its path, like http://127.0.0.1:5001")
    return str(found).rstrip("/")


def progress(answer: dict) -> str:
    """Where a job stands, for a progress line: `queued, position 3`."""
    status = str(answer.get("status", ""))
    place = re.search(r"position (\d+)", str(answer.get("description")))
    return f"{_STAGES[status]}, position {place[1]}" if place and status == "QUEUED" else _STAGES.get(status, status.lower())


def span(seconds: float) -> str:
    """A duration as people say it: 12 s, 3 min, 2 h 5 min."""
    minutes = int(seconds) // 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def verdict(words: str) -> Literal["too large", "passing", "its own"]:
    """Why a job failed, by the words of its ERROR: a smaller one may do, the same one may do, or neither."""
    said = _reason(words)
    lower = said.lower()
    if any(mark in lower for mark in _TOO_LARGE):
        return "too large"
    if said.startswith("Could not deploy") or _payload_error(said) in _DRIFT:
        return "its own"
    return "passing" if any(mark in lower for mark in (_RUNNER if _TRACEBACK in words else _PASSING)) else "its own"


def failure(words: str, job: str, url: str, repo: str, tries: int, env: object) -> str:
    """What a user reads of a job that failed for good; `env` is the server's answer to /env, if any."""
    said = _reason(words)
    lacking = re.search(r"No module named '([^']+)'", said)
    path = re.search(r"it has no module at '([^']+)'", said)
    helps = f"what is sent needs the Python module {lacking[1]!r}, which the server does not have: see docs/remote.md for how to do without" if lacking else ""
    if _TRACEBACK in words:
        return f"job {job} failed at {url}; the server's words:\n{words.strip()}" + (f"\n{helps}" if helps else "")
    if lacking:
        return f"job {job} failed at {url}: {helps}"
    if path:
        return f"{url} builds {repo} in another way than this side: it has no module at {path[1]!r}; {_drift(env)}"
    if _payload_error(said):
        return f"job {job} could not be read at {url} ({_payload_error(said)}); {_drift(env)}; the server's words: {said}"
    if said.startswith("Could not deploy"):
        return f"{url} could not load {repo}, says: {said.removeprefix('Could not deploy this model.').strip()!r}; choose a model that it holds"
    if "cancelled" in said.lower():
        return f"job {job} was stopped at {url} ({said}): the same command sends it anew"
    if tries > 1:
        return f"job {job} failed at {url} for the {_ordinal(tries)} time; the server's words: {said} Give the same command later"
    return f"job {job} failed at {url}; the server's words: {said}"


def refusal(url: str, response: httpx.Response, secret: str) -> InputError:
    """What a server will not do, and what helps."""
    said, code = detail(response, secret), response.status_code
    if not parsed(response)[0]:
        way = "is backend.host (or NDIF_HOST) the address of an NDIF server?"
    elif code == 401:
        way = "set NDIF_API_KEY (a key is had at https://login.ndif.us), or log in once with `nnsight login`"
    elif code == 403:
        way = "the key is not known there: check NDIF_API_KEY, or make a new one at https://login.ndif.us"
    elif code == 400 and "key format" in said.lower():
        way = "check NDIF_API_KEY: keys look like xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"
    elif code == 400 and "version" in said.lower():
        way = f"here are nnsight {version('nnsight')} and this Python; bring to its version what it names"
    elif code == 422:
        way = f"its ndif and nnsight {version('nnsight')} here do not go together: compare with `curl {url}/env`"
    else:
        way = "is backend.host (or NDIF_HOST) the address of an NDIF server?"
    return InputError(f"{url} refuses (HTTP {code}: {said}): {way}")


def parsed(response: httpx.Response) -> tuple[bool, Any]:
    """Whether an answer is JSON, and what it says."""
    try:
        return True, response.json()
    except (ValueError, RecursionError):
        return False, None


def detail(response: httpx.Response, secret: str = "") -> str:
    """An answer's own words, in one line, the key left out."""
    readable, body = parsed(response)
    told = body.get("detail") if isinstance(body, dict) else body
    if not readable:
        told = re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", " ", response.text)
    words = " ".join(str(told or response.reason_phrase or "no words").split())
    return (words.replace(secret, "…") if secret else words)[:300]


def too_large(response: httpx.Response) -> bool:
    """Whether a job was refused for its size: by a proxy, or by a server that nnsight's `.save` keeps from reading uploads above 1 MB."""
    return response.status_code == 413 or (response.status_code == 400 and "parsing the body" in detail(response))


def retry_after(response: httpx.Response) -> float:
    """Seconds that a server asks to wait; 0 where it does not say."""
    said = response.headers.get("retry-after", "").strip()
    try:
        seconds = float(said) if said.replace(".", "", 1).isdigit() else parsedate_to_datetime(said).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def unpacked(content: bytes) -> Any:
    """The values a job saved: tensors and plain containers; nothing else is unpickled.

    Raises:
        ValueError: bytes that are no result: cut, or something else.
        InputError: a result that holds anything else.
    """
    try:
        raw = zstandard.ZstdDecompressor().decompress(content)
        if raw[:2] != b"PK":
            raise ValueError("no torch file")
        found = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = name[1] if name else "something else"
        raise InputError(
            f"a job's result holds {what}, which is not unpickled here (it could run code): return tensors, numbers, texts, lists and dicts"
        ) from None
    except (zstandard.ZstdError, EOFError, RuntimeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} in place of saved values")
    return found


def repo_of(model_key: str) -> str:
    """The model's name in a model key."""
    try:
        return str(json.loads(model_key.partition(":")[2])["repo_id"])
    except (ValueError, KeyError, TypeError):
        return model_key


def _reason(words: str) -> str:
    """A sentence as it is; of a traceback its exception, without the code lines in it."""
    if _TRACEBACK not in words:
        return " ".join(words.split())
    lines = words[words.rindex(_TRACEBACK) + len(_TRACEBACK) :].splitlines()
    start = next((i for i, line in enumerate(lines) if line and not line[0].isspace()), 0)
    return "\n".join(lines[start:]).strip()


def _payload_error(said: str) -> str:
    found = re.search(r"payload could not be read \((\w+)", said)
    return found[1] if found else ""


def _drift(env: object) -> str:
    """Versions here and there, and what to install."""
    packages = env.get("packages") if isinstance(env, dict) else None
    if not isinstance(packages, dict):
        return "compare the versions of transformers, nnsight and torch with its keeper's"
    pairs = [(name, version(name), str(packages[name])) for name in ("transformers", "nnsight", "torch") if name in packages]
    other = [(name, here, there) for name, here, there in pairs if here.partition("+")[0] != there.partition("+")[0]]
    if not other:
        return "transformers, nnsight and torch are the same here and there: tell its keeper"
    listed = ", ".join(f"{name} is {here} here and {there} there" for name, here, there in other)
    return f"{listed}: `pip install {other[0][0]}=={other[0][2]}` here, or ask its keeper for {other[0][1]}"


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")

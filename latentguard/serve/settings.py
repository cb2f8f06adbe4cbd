"""The words on the command line → checked settings; the help text. Knows no HTTP and no model; loads no torch."""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from latentguard.configs import options
from latentguard.errors import InputError

TOKEN = "LATENTGUARD_SERVE_TOKEN"
HARMFUL = "harmful"
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


def _of(about: str, default: Any) -> Any:
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Settings:
    """All that the server can be told. Times are seconds."""

    guard: str = field(metadata={"about": "folder of a guard saved by LatentGuard.save"})
    model: str = field(metadata={"about": "the model it was fitted on: an option, a folder or a Hub id; model.KEY=VALUE changes a setting of it"})
    model_settings: dict[str, Any] = field(default_factory=dict)
    categories: dict[str, str] = field(default_factory=dict, metadata={"about": "categories.NAME=PATH: a guard that scores one category; as many as there are"})
    name: str | None = _of("what the reply and /v1/models call it; null: the guard's own name", None)
    threshold: str | None = _of("by which a text is flagged; null: fpr=0.01 where the guard has it, else its first", None)
    domain: str | None = _of("flag by the thresholds that guard.with_domain gave the guards for this traffic; null: by their own", None)
    host: str = _of("address to listen on; anything but 127.0.0.1 is reached by others: set a token", "127.0.0.1")
    port: Annotated[int, Field(ge=0, le=65_535)] = _of("port; 0: any free one, told in the log", 8000)
    token_file: str | None = _of(f"file with a bearer token that every request but /healthz must show; or set {TOKEN}", None)
    batch_prompts: Count = _of("texts of one batch, at most", 32)
    batch_tokens: Literal["auto"] | Count = _of(
        "tokens of one batch, at most (a single longer text goes alone); auto: what the backend runs in one pass", "auto"
    )
    linger_ms: Annotated[float, Field(ge=0, le=1000)] = _of(
        "how long a batch waits for those who were just answered to ask again, in ms, and at most a quarter of the last batch's time; 0: never", 50.0
    )
    threads: Literal["auto"] | Count = _of("torch's threads; auto: its own choice", "auto")
    queue: Count = _of("texts that may wait; over it 429", 1024)
    requests: Count = _of("requests at a time, in whatever state; over it 429", 256)
    connections: Count = _of("connections at a time; over it they are closed unanswered", 1000)
    inputs: Count = _of("texts in one request; over it 422", 256)
    characters: Count = _of("characters of one text; over it 422, never cut", 50_000)
    tokens: Literal["auto"] | Count = _of("tokens of one text, its template left out; over it 422, never cut; auto: what the model takes", "auto")
    body_bytes: Count = _of("bytes of one request's body; over it 413", 1_048_576)
    header_bytes: Annotated[int, Field(ge=1024)] = _of("bytes of one request's head; over it 431", 16_384)
    timeout: Seconds = _of("for scoring, waiting included; over it 503", 30.0)
    head_timeout: Seconds = _of("for a request's head to arrive; over it the connection is closed", 10.0)
    body_timeout: Seconds = _of("for a request's body to arrive; over it 408", 10.0)
    keep_alive: Annotated[int, Field(ge=1, le=3600)] = _of("that an idle connection stays open", 30)
    grace: Seconds = _of("after SIGTERM, for what is under way to be finished; then it is answered 503", 30.0)
    log_prompts: bool = _of("write texts and their probabilities to the log", False)

    def __post_init__(self) -> None:
        if self.inputs > self.queue:
            raise ValueError(f"inputs={self.inputs} but queue={self.queue}: a full request would never fit; raise queue, or lower inputs")
        for name in self.categories:
            if not name.replace("_", "").replace("-", "").isalnum() or not name.isascii() or len(name) > 64 or name == HARMFUL:
                raise ValueError(f"categories.{name}: name it by letters, digits, - and _ (at most 64), and not {HARMFUL}, which is the guard's own")
        for place, folder in (("guard", self.guard), *((f"categories.{name}", folder) for name, folder in self.categories.items())):
            if not Path(folder).expanduser().is_dir():
                raise ValueError(f"{place}={folder}: there is no such folder; give one that LatentGuard.save or exp=fit_guard wrote")


SHOWN = [entry for entry in fields(Settings) if entry.name != "model_settings"]  # type: ignore[arg-type]


def settings_of(words: Sequence[str]) -> Settings:
    """What `key=value` words ask for.

    Raises:
        InputError: for the first word that is wrong.
    """
    given: dict[str, Any] = {}
    for word in words:
        key, mark, value = word.partition("=")
        group, _, name = key.partition(".")
        if not mark or not key:
            raise InputError(f"{word!r}: give key=value, such as port=8000; --help names all keys")
        if name and group not in ("model", "categories"):
            raise InputError(f"{word!r}: only model.KEY and categories.NAME have a dot")
        if not name and key not in {entry.name for entry in SHOWN if entry.name != "categories"}:
            near = difflib.get_close_matches(key, [entry.name for entry in SHOWN], 1)
            raise InputError(f"{word!r}: there is no setting {key}{f'; did you mean {near[0]}?' if near else '; --help names all'}")
        into = given if not name else given.setdefault("model_settings" if group == "model" else group, {})
        if (name or key) in into:
            raise InputError(f"{word!r}: {key} is given twice")
        into[name or key] = _yaml(word, value) if name and group == "model" else value
    optional = {entry.name for entry in SHOWN if entry.default is None}
    for key, value in given.items():
        if value == "null" and key in optional:
            given[key] = None
    for key in ("guard", "model"):
        if not given.get(key):
            raise InputError(f"{key}= is missing: {next(entry.metadata['about'] for entry in SHOWN if entry.name == key)}")
    return make_settings(given)


def make_settings(given: Mapping[str, Any]) -> Settings:
    """Checked settings, or one sentence about the first that is wrong."""
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{first['loc'][0]}={first['input']!s}: {reason}" if first["loc"] else reason) from None


def token_of(settings: Settings, environment: Mapping[str, str] = os.environ) -> str | None:
    """The bearer token, out of a file or the environment; None where none is asked for.

    Raises:
        InputError: for an empty one, which would protect nothing, and one that no header can carry.
    """
    found, where = environment.get(TOKEN), TOKEN
    if settings.token_file is not None:
        if found is not None:
            raise InputError(f"token_file={settings.token_file} and {TOKEN}: give one of them")
        where = f"token_file={settings.token_file}"
        try:
            found = Path(settings.token_file).expanduser().read_text("ascii").strip()
        except OSError as error:
            raise InputError(f"{where} cannot be read ({error.strerror}); name a file that holds the token") from None
        except UnicodeDecodeError:
            raise InputError(f"{where} holds more than ASCII, which a header cannot carry; choose another token") from None
    if found is not None and not (found.isascii() and found.isprintable() and found and " " not in found):
        raise InputError(f"{where}: a token is one word of printable ASCII, at least one character; choose one, or leave it out")
    return found


def _yaml(word: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"{word!r}: {value!r} is no YAML value") from None


def usage() -> str:
    """What --help prints."""
    rows = [f"  {entry.name:<14} {entry.metadata['about']}{_default(entry)}" for entry in SHOWN]
    return f"""\
latentguard.serve: a guard as an HTTP server that OpenAI's moderation clients can ask

  python -m latentguard.serve guard=FOLDER model=NAME [key=value …]

{chr(10).join(rows)}

Models: {", ".join(options("model"))}, a folder, or a Hub id (owner/name)
Ask it: curl -H 'content-type: application/json' -d '{{"input": "…"}}' http://127.0.0.1:8000/v1/moderations
More:   docs/serving.md; GET /docs and /openapi.json of the running server
Exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 bad input (said in one sentence; nothing was served)
"""


def _default(entry: Any) -> str:
    if entry.name in ("guard", "model", "categories"):
        return ""
    value = entry.default
    return f" [{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}]"

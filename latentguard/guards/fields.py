"""What stands in guard.json: every field with its type and range, and one sentence for a wrong one. Opens no file and knows no tensor."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from reprlib import Repr
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass

from latentguard import __version__
from latentguard.errors import InputError
from latentguard.guards.calibration import Calibration, Threshold, promise
from latentguard.guards.marks import check_terminal
from latentguard.guards.pieces import LEAST, MOST
from latentguard.guards.probes import METHODS
from latentguard.guards.seen import About
from latentguard.positions import parse_position

if TYPE_CHECKING:
    from latentguard.guards.guard import LatentGuard

SCHEMA = 1
LIBRARIES = ("latentguard", "numpy", "safetensors", "scikit-learn", "torch", "transformers")
WAY_OUT = "the guard was altered or damaged: fetch it anew, or fit one (exp=fit_guard)"
_DEEPEST, _LONGEST = 32, 4000  # nested values; characters of a text
_HALF = re.compile("[\ud800-\udfff]")
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxlevel = 3
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _line(text: str) -> str:
    if not text.strip() or len(text) > 200 or not text.isprintable():
        raise InputError("one line of 1 to 200 characters that can be printed")
    return text


def _moment(text: str) -> str:
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", text):
        raise InputError("a moment such as 2026-01-31T12:00:00+00:00")
    datetime.fromisoformat(text)
    return text


Line = Annotated[str, AfterValidator(_line)]
Hash = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Thresholds = dict[str, Threshold]


@dataclass(frozen=True, config=_STRICT)
class Model:
    """The model that a guard holds for."""

    name: Line
    weights: Line
    template: Line
    n_layers: Annotated[int, Field(ge=1, le=10_000)]
    d_model: Annotated[int, Field(ge=1, le=1_000_000)]


@dataclass(frozen=True, config=_STRICT)
class Platt:
    """A logistic curve."""

    kind: Literal["platt"]
    slope: float
    offset: float


@dataclass(frozen=True, config=_STRICT)
class Isotonic:
    """A rising line through knots."""

    kind: Literal["isotonic"]
    knots: tuple[float, ...]
    levels: tuple[float, ...]


@dataclass(frozen=True, config=_STRICT)
class Quantiles:
    """What validation looked like; the tensors of the reference lie in the other file."""

    raw: tuple[float, ...]
    far: tuple[Annotated[float, Field(ge=0)], ...]
    n: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=_STRICT)
class Hashes:
    """SHA-256 of guard.safetensors, and of all else that guard.json says (`content_hash`)."""

    tensors: Hash
    content: Hash


@dataclass(frozen=True, config=_STRICT)
class Fields:
    """guard.json, all of it."""

    schema: int
    name: Line
    model: Model
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    terminal: str
    method: str
    calibration: Annotated[Platt | Isotonic, Field(discriminator="kind")]
    thresholds: Thresholds
    domains: dict[Line, Annotated[Thresholds, Field(min_length=1)]]
    reference: Quantiles
    about: About
    libraries: dict[str, Line]
    created: Annotated[str, AfterValidator(_moment)]
    sha256: Hashes
    piece: Annotated[int, Field(ge=LEAST, le=MOST)] | None = None

    @field_validator("layers")
    @classmethod
    def _rising(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if not layers or layers[0] < 0 or list(layers) != sorted(set(layers)):
            raise InputError("one or more layers, rising, none below 0")
        return layers

    @field_validator("positions")
    @classmethod
    def _known(cls, positions: tuple[str, ...]) -> tuple[str, ...]:
        if not positions or len(set(positions)) < len(positions):
            raise InputError("one or more positions, each once")
        if strange := next((name for name in positions if parse_position(name, reading=True).name != name or not name.isprintable()), None):
            raise InputError(f"position {_SHORT.repr(strange)} is not as positions are written (no blanks around it, all of it printable)")
        return positions

    @field_validator("terminal")
    @classmethod
    def _ending(cls, terminal: str) -> str:
        check_terminal(terminal)
        return terminal

    @field_validator("method")
    @classmethod
    def _method(cls, method: str) -> str:
        if method not in METHODS:
            raise InputError(f"choose one of {', '.join(METHODS)}")
        return method

    @field_validator("thresholds")
    @classmethod
    def _kept(cls, thresholds: Thresholds) -> Thresholds:
        check_thresholds(thresholds)
        return thresholds

    @field_validator("domains")
    @classmethod
    def _kept_too(cls, domains: dict[str, Thresholds]) -> dict[str, Thresholds]:
        for own in domains.values():
            check_thresholds(own)
        return domains

    @field_validator("libraries")
    @classmethod
    def _named(cls, libraries: dict[str, str]) -> dict[str, str]:
        if set(libraries) != set(LIBRARIES):
            raise InputError(f"the versions of {', '.join(LIBRARIES)}, no more and no less")
        return libraries

    @model_validator(mode="after")
    def _fits(self) -> "Fields":
        if self.layers[-1] > self.model.n_layers:
            raise InputError(f"layers={list(self.layers)}: model.n_layers={self.model.n_layers} has the layers 0 … {self.model.n_layers}")
        return self


def check_thresholds(thresholds: Mapping[str, Threshold]) -> None:
    """Refuse thresholds that stand under another name than their own, or of which the stricter promise lies on the wrong side.

    Raises:
        InputError: naming it.
    """
    for name, one in thresholds.items():
        if one.name != name:
            raise InputError(f"the threshold at {_SHORT.repr(name)} calls itself {one.name}")
    for side in ("fpr", "recall"):
        own = sorted((promise(name)[1], one.value, name) for name, one in thresholds.items() if promise(name)[0] == side)
        for (_, stricter, first), (_, looser, second) in zip(own, own[1:], strict=False):
            if stricter < looser:
                raise InputError(f"value={stricter} of {first} lies below value={looser} of {second}, and the lower rate needs the higher one")


def described(guard: "LatentGuard", tensors: str) -> dict[str, Any]:
    """guard.json of a guard, unchecked; `tensors` is the SHA-256 of the other file.

    Raises:
        InputError: for what JSON cannot hold.
    """
    about = {key: value for key, value in guard.about.items() if key not in ("created", "libraries")}
    kinds = {"platt": ("kind", "slope", "offset"), "isotonic": ("kind", "knots", "levels")}
    found = {
        "schema": SCHEMA,
        "name": guard.name,
        "model": {"name": guard.model, **{key: getattr(guard, key) for key in ("weights", "template", "n_layers", "d_model")}},
        **{key: getattr(guard, key) for key in ("layers", "positions", "terminal", "piece", "method")},
        "calibration": {key: getattr(guard.calibration, key) for key in kinds[guard.calibration.kind]},
        "thresholds": {name: one.as_dict() for name, one in guard.thresholds.items()},
        "domains": {domain: {name: one.as_dict() for name, one in own.items()} for domain, own in guard.domains.items()},
        "reference": {key: getattr(guard.reference, key) for key in ("raw", "far", "n")},
        "about": about,
        "libraries": guard.about.get("libraries") or installed(),
        "created": guard.about.get("created") or datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": {"tensors": tensors},
    }
    found = plain(found, f"guard {guard.name}")
    found["sha256"]["content"] = content_hash(found)
    return found


def installed() -> dict[str, str]:
    """Versions of the libraries that a guard is made with."""
    found = {"latentguard": __version__}
    for name in LIBRARIES[1:]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def parsed(raw: bytes, where: str, way_out: str = WAY_OUT) -> tuple[Fields, dict[str, Any]]:
    """guard.json checked, and its `about` as it stands, with `created` and `libraries` in it.

    Raises:
        InputError: for whatever is not as it was saved; `way_out` ends the sentence.
    """
    found = _read(raw, where, way_out)
    _check_values(found, where, way_out)
    schema = found.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise InputError(f"{where}: schema={schema} is of a later version of latentguard, this one reads {SCHEMA}: pip install --upgrade latentguard")
    if "schema" in found and (type(schema) is not int or schema < 1):
        raise InputError(f"{where}: schema={_SHORT.repr(schema)} is no number of a schema, this version reads {SCHEMA}; {way_out}")
    said = found["sha256"].get("content") if isinstance(found.get("sha256"), dict) else None
    if isinstance(said, str) and re.fullmatch("[0-9a-f]{64}", said) and said != (known := content_hash(found)):
        raise InputError(
            f"{where} was altered after it was saved, or is damaged: its content has the SHA-256 {known[:12]}…, and sha256.content says {said[:12]}…; "
            "put the saved file back, fetch the guard anew, or fit one (exp=fit_guard)"
        )
    try:
        fields = _FIELDS.validate_json(canonical(found))
    except ValidationError as error:
        raise InputError(told(where, error, way_out)) from error
    return fields, {**found["about"], "created": fields.created, "libraries": fields.libraries}


def about_of(guard: "LatentGuard") -> About:
    """A guard's `about`, checked.

    Raises:
        InputError: where it is not what fitting writes.
    """
    where = f"guard {guard.name}"
    found = plain({key: value for key, value in guard.about.items() if key not in ("created", "libraries")}, where)
    try:
        return _ABOUT.validate_json(canonical(found))
    except ValidationError as error:
        raise InputError(told(f"{where}: about", error, "correct it before the guard is saved")) from error


def calibration_of(fields: Fields) -> Calibration:
    """The calibration; its own checks end in an InputError that names it."""
    found = fields.calibration
    return Calibration("platt", found.slope, found.offset) if isinstance(found, Platt) else Calibration("isotonic", knots=found.knots, levels=found.levels)


def content_hash(found: Mapping[str, Any]) -> str:
    """SHA-256 of all that guard.json says but `sha256.content`: JSON in UTF-8 with sorted keys and no blanks."""
    sums = {key: value for key, value in found["sha256"].items() if key != "content"}
    return hashlib.sha256(canonical({**found, "sha256": sums})).hexdigest()


def canonical(found: object) -> bytes:
    """JSON in UTF-8, keys sorted, no blanks."""
    return json.dumps(found, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def plain(value: Any, where: str) -> Any:
    """A value as JSON holds it: NumPy's numbers as Python's, tuples as lists, what is no finite number as null.

    Raises:
        InputError: for anything else.
    """
    if hasattr(value, "item") and not getattr(value, "shape", None):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str) and _HALF.search(value):
        raise InputError(f"{where} cannot be saved: {_SHORT.repr(value)} holds half a character (a lone surrogate): correct that text")
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {plain(key, where): plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where) for item in value]
    raise InputError(f"{where} cannot be saved: {_SHORT.repr(value)} of type {type(value).__name__} has no place in JSON; give texts, numbers, lists and dicts")


def told(where: str, error: ValidationError, way_out: str) -> str:
    """A pydantic error as one sentence: place, value, reason, way out."""
    first = error.errors(include_url=False)[0]
    parts = [part for part in first["loc"] if part != "[key]"]
    if parts[:1] == ["calibration"]:
        parts = [part for part in parts if part not in ("platt", "isotonic")]
    place, reason = shown(*parts), _clean(first["msg"].removeprefix("Value error, "))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "missing":
        return f"{where}: {place} is missing{more}; {way_out}"
    if first["type"] == "unexpected_keyword_argument":
        return f"{where}: {place} is no field of a guard{more}; {way_out}"
    if not parts:
        return f"{where}: {reason}{more}; {way_out}"
    value = "" if isinstance(first["input"], dict) else f"={_SHORT.repr(first['input'])}"
    return f"{where}: {place}{value}: {reason}{more}; {way_out}"


def _clean(reason: str) -> str:
    """One line of no great length, whatever value it quotes."""
    line = "".join(c if c.isprintable() else "?" for c in reason)
    return line if len(line) <= 300 else f"{line[:200]} … {line[-80:]}"


def shown(*parts: object) -> str:
    """A place in the JSON, on one line whatever its keys are."""
    return ".".join(str(part) if re.fullmatch(r"[\w=.%() -]{1,60}", str(part)) else _SHORT.repr(part) for part in parts)


def _read(raw: bytes, where: str, way_out: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise InputError(f"{where}: the key {_SHORT.repr(next(n for n in names if names.count(n) > 1))} stands twice in one object; {way_out}")
        return found

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 (byte {error.start}); {way_out}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON ({str(error)[:100]}); {way_out}") from error
    if not isinstance(found, dict):
        raise InputError(f"{where} holds {_SHORT.repr(found)} where an object is asked for; {way_out}")
    return found


def _check_values(value: Any, where: str, way_out: str, place: tuple[object, ...] = ()) -> None:
    """Refuse what JSON may say and no guard does: numbers that are not finite, half characters, very long texts, very deep nests."""

    def refuse(reason: str) -> NoReturn:
        raise InputError(f"{where}: {shown(*place) or 'the whole'} {reason}; {way_out}")

    if len(place) > _DEEPEST:
        raise InputError(f"{where}: {shown(*place[:3])}… is nested more than {_DEEPEST} deep; {way_out}")
    if isinstance(value, float) and not math.isfinite(value):
        refuse(f"is {value}, no finite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        refuse("is a number of more than 64 bits")
    if isinstance(value, str):
        if len(value) > _LONGEST:
            refuse(f"is a text of {len(value)} characters, {_LONGEST} at most")
        if _HALF.search(value):
            refuse("holds half a character (a lone surrogate)")
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(key, str):
            _check_values(key, where, way_out, (*place, "a key"))
        _check_values(item, where, way_out, (*place, key))


_FIELDS, _ABOUT = TypeAdapter(Fields), TypeAdapter(About)

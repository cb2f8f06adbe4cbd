"""Named prompt sets: built in, from a file, from a local mirror or the Hub; split by group. Knows no model.

Groups (a question, its rewrites, its matched twin) never straddle a split.
"""

import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from latentguard.configs import option, options
from latentguard.errors import InputError
from latentguard.prompts import Prompt, digest, messages_of, set_terminal
from latentguard.weights import hub_reachable, problem

log = logging.getLogger(__name__)
PACKAGED = Path(__file__).parent / "data"
SPLITS = ("train", "validation", "test")
# What the four roles of the paper (App. B) may be filled with where a data set names no sets for them.
ROLES = {
    "refused_harmful": ("harmful",),
    "accepted_harmful": ("harmful",),
    "accepted_harmless": ("harmless",),
    "refused_harmless": ("lookalike", "harmless"),
}
_HARMFUL = {"harmful", "unsafe", "noncompliance_expected", "1", "true"}
_HARMLESS = {"harmless", "safe", "benign", "compliance_expected", "lookalike", "0", "false"}


@plain_dataclass(frozen=True)
class PromptSet(Sequence):
    """Prompts in a fixed order, and the views people ask for."""

    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, at: Any) -> Any:
        return PromptSet(self.prompts[at]) if isinstance(at, slice) else self.prompts[at]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def labelled(self, label: str) -> "PromptSet":
        """Those with a label: harmful, harmless, lookalike, unlabelled."""
        return PromptSet(tuple(p for p in self.prompts if p.label == label))

    @property
    def harmful(self) -> "PromptSet":
        """Requests that should be refused."""
        return self.labelled("harmful")

    @property
    def harmless(self) -> "PromptSet":
        """Plain harmless requests, look-alikes left out."""
        return self.labelled("harmless")

    @property
    def lookalike(self) -> "PromptSet":
        """Harmless requests in harmful-sounding words."""
        return self.labelled("lookalike")


@plain_dataclass(frozen=True)
class Dataset:
    """Three disjoint splits; `card` says where they came from, under which licence, with which hashes."""

    name: str
    train: PromptSet
    validation: PromptSet
    test: PromptSet
    card: dict = field(default_factory=dict)
    spec: "DataSpec | None" = None
    _beside: dict = field(default_factory=dict, compare=False, repr=False)

    def __iter__(self) -> Iterator[Prompt]:
        return iter((*self.train, *self.validation, *self.test))

    def role(self, role: str, *splits: str) -> list[Prompt]:
        """Prompts that may fill a role, of all splits or the given ones: from the sets that `data.roles` names for it
        (some of these, other options, or files: taken from the same mirror, with the same final mark), else by label.

        Raises:
            InputError: for a role other than the four of the paper for which no set is named.
        """
        sets = (self.spec.roles or {}).get(role) if self.spec else None
        wanted = ROLES.get(role, ("harmful",))
        if sets is None:
            if role not in ROLES:
                raise InputError(f"data {self.name} names no set for the role {role!r}: set data.roles.{role}=[NAME or FILE.jsonl], or data=paper")
            return [p for split in splits or SPLITS for label in wanted for p in getattr(self, split).labelled(label)]
        if role in ROLES and wanted != ("harmful",):
            wanted = ("harmless", "lookalike")
        own = {p.source for p in self}
        home = {prompt.group: split for split in SPLITS for prompt in getattr(self, split)}
        found: dict[str, list[Prompt]] = {split: [] for split in SPLITS}
        seen: set[str] = set()
        for name in sets:
            part = self if name in own else self._other(name)
            for split in SPLITS:
                for prompt in getattr(part, split):
                    if prompt.label in wanted and (part is not self or prompt.source == name) and (same := same_words(prompt)) not in seen:
                        seen.add(same)  # a group keeps to one split, whichever set it comes from
                        found[home.setdefault(prompt.group, split)].append(prompt)
        if not seen:
            raise InputError(f"data.roles.{role}={list(sets)}: no {' or '.join(wanted)} prompt in there; name a set that has some")
        return [prompt for split in splits or SPLITS for prompt in found[split]]

    def names(self, role: str) -> bool:
        """Whether sets are named for a role."""
        return bool(self.spec and (self.spec.roles or {}).get(role))

    def _other(self, name: str) -> "Dataset":
        """Another set beside this one."""
        if name not in self._beside:
            assert self.spec
            spec = self.spec
            self._beside[name] = load_dataset(
                name, terminal=spec.terminal, split=spec.split, seed=spec.seed, **({"mirror": spec.mirror} if spec.mirror else {})
            )
        return self._beside[name]

    @property
    def hash(self) -> str:
        """One hash of all prompts, labels and splits."""
        return digest([[(p.id, p.instruction, p.label) for p in getattr(self, split)] for split in SPLITS])[:16]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DataSpec:
    """One option of conf/data. `sets` joins other options; else rows come from `path`, `mirror`, the Hub or the package."""

    name: str
    path: str | None = None
    sets: tuple[str, ...] = ()
    hub: dict[str, Any] | None = None
    mirror: str | None = None
    file: str | None = None
    only: tuple[str, ...] = ()
    text: str = "prompt"
    label_field: str = "label"
    label: Literal["harmful", "harmless", "lookalike"] | None = None
    category: str = "category"
    group: str | None = None
    language: str = ""
    lookalike: bool = False
    exempt: bool = False
    terminal: Literal["keep", "strip", "period"] = "period"
    limit: int | None = None
    split: tuple[float, float, float] = (0.5, 0.2, 0.3)
    seed: int = 0
    licence: str = ""
    gated: bool = False
    sha256: str | None = None
    card: str = ""
    roles: dict[str, tuple[str, ...] | None] | None = None

    def __post_init__(self) -> None:
        if abs(sum(self.split) - 1) > 1e-6 or min(self.split) < 0:
            raise ValueError(f"split {list(self.split)} must be three shares that add to 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit must be at least 1")


def make_data_spec(settings: dict) -> DataSpec:
    """A spec, or one sentence about the setting that is wrong."""
    try:
        return DataSpec(**settings)
    except ValidationError as error:
        raise InputError(problem("data", error)) from error


def load_dataset(name: str | DataSpec, **changed: Any) -> Dataset:
    """A config's data set, or a JSONL/CSV file's, in three splits.

    Args:
        name: an option of conf/data, or a path ending in .jsonl, .json or .csv.
        changed: settings to change, such as `mirror`, `terminal`, `limit`, `label`.
    """
    if isinstance(name, DataSpec):
        spec = replace(name, **changed)
    elif name in options("data"):
        spec = make_data_spec({**option("data", name), **changed})
    elif Path(name).suffix in (".jsonl", ".json", ".csv"):
        spec = make_data_spec({"name": Path(name).stem, "path": str(name), **changed})
    else:
        raise InputError(f"data {name!r} is no config ({', '.join(options('data'))}) and no .jsonl or .csv file")
    parts = [make_data_spec({**option("data", part), **_passed_on(spec)}) for part in spec.sets] or [spec]
    prompts: dict[str, tuple[Prompt, str | None]] = {}
    cards, dropped = [], 0
    for part in parts:
        rows, sha = _rows(part)
        made = [_prompt(part, row, where) for where, row in _chosen(part, rows)]
        for prompt, split in _limited(made, part.limit, spec.seed):
            done = set_terminal(prompt, spec.terminal)
            first = prompts.setdefault(same_words(done), (done, split))[0]
            if first.harmful != prompt.harmful:
                raise InputError(f"data {spec.name}: prompts {first.id} and {prompt.id} are equal but labelled {first.label} and {prompt.label}: keep one")
            dropped += first is not done
        cards.append({"name": part.name, "rows": len(made), "sha256": sha, "licence": part.licence, "gated": part.gated})
    if dropped:
        log.info("data %s: %d repeated prompts are kept once", spec.name, dropped)
    ids = [prompt.id for prompt, _ in prompts.values()]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise InputError(f"data {spec.name}: the id {twice!r} stands on two different prompts; make ids unique or leave them out")
    sides = _split(list(prompts.values()), spec)
    languages = sorted({p.language for p, _ in prompts.values()})
    spoken = {"languages": languages} if all(languages) else {}
    return Dataset(spec.name, *(PromptSet(tuple(sides[split])) for split in SPLITS), card={"terminal": spec.terminal, "sets": cards, **spoken}, spec=spec)


def _chosen(spec: DataSpec, rows: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """Rows of the categories asked for."""
    found = [(where, row) for where, row in rows if not spec.only or (isinstance(row, dict) and row.get(spec.category) in spec.only)]
    if not found:
        raise InputError(f"data {spec.name}: no row has one of the categories data.only={list(spec.only)} in its field {spec.category!r}")
    return found


def _passed_on(spec: DataSpec) -> dict:
    given = {"mirror": spec.mirror, "limit": spec.limit}
    return {key: value for key, value in given.items() if value is not None}


def _rows(spec: DataSpec) -> tuple[list[tuple[str, dict]], str | None]:
    """Rows with the place each came from, and the file's hash."""
    if spec.path:
        return _file_rows(Path(spec.path).expanduser(), None)
    if _packaged(spec):
        return _file_rows(PACKAGED / f"{spec.name}.jsonl", None)
    if spec.mirror:
        return _file_rows(Path(spec.mirror).expanduser() / f"{spec.file or spec.name}.jsonl", spec.sha256)
    if spec.hub:
        return _hub_rows(spec), None
    raise InputError(f"data={spec.name} names no source: set data.path=FILE (.jsonl or .csv), or data.mirror=FOLDER with {spec.file or spec.name}.jsonl in it")


def _packaged(spec: DataSpec) -> bool:
    return spec.name in ("builtin", "languages", "sensitive")


def _file_rows(path: Path, sha256: str | None) -> tuple[list[tuple[str, dict]], str]:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    blob = path.read_bytes()
    found = hashlib.sha256(blob).hexdigest()
    if sha256 and found != sha256:
        log.warning("%s is not the file this config was written for (SHA-256 %s…, expected %s…)", path, found[:12], sha256[:12])
    try:
        text = blob.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): convert it") from error
    if path.suffix == ".csv":
        csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
        try:
            rows = [(f"{path}, row {i}", dict(row)) for i, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 2)]
        except csv.Error as error:
            raise InputError(f"{path} is no CSV ({error}): quote fields that hold commas or line breaks") from error
    elif path.suffix in (".jsonl", ".json"):
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append((f"{path}, line {number}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}, line {number} is no JSON object ({error}): one object a line") from error
    else:
        raise InputError(f"{path}: give a .jsonl or .csv file")
    if not rows:
        raise InputError(f"{path} holds no row")
    return rows, found


def _hub_rows(spec: DataSpec) -> list[tuple[str, dict]]:
    hub = dict(spec.hub or {})
    way_out = f"give a folder that holds {spec.file or spec.name}.jsonl with data.mirror=FOLDER"
    try:
        library: Any = import_module("datasets")
    except ImportError as error:
        raise InputError(f"data={spec.name} comes from the Hub ({hub['id']}): pip install 'latentguard[hub]', or {way_out}") from error
    if not hub_reachable():
        raise InputError(f"data={spec.name} comes from the Hub ({hub['id']}), which cannot be reached; {way_out}")
    rows = []
    for split, label in hub["splits"].items():
        try:
            loaded = library.load_dataset(path=hub["id"], name=hub.get("config"), split=split, revision=hub.get("revision"))
        except (OSError, ValueError) as error:
            gate = f"; it is gated: accept its terms at https://huggingface.co/datasets/{hub['id']} and run `hf auth login`" if spec.gated else ""
            raise InputError(f"data={spec.name}: {hub['id']} could not be loaded ({str(error).splitlines()[0][:160]}){gate}; or {way_out}") from error
        for i, row in enumerate(loaded):
            named = {ours: row[theirs] for ours, theirs in hub.get("fields", {}).items()}
            rows.append((f"{hub['id']} {split}[{i}]", {**row, **named, **({"label": label} if label else {}), "id": f"{spec.name}/{split}/{i}"}))
    return rows


def _prompt(spec: DataSpec, row: Any, where: str) -> tuple[Prompt, str | None]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with a field {spec.text!r}, got {type(row).__name__}")
    spoken = row.get("language") or spec.language
    if not isinstance(spoken, str) or len(spoken) > 40:
        raise InputError(f"{where}: language={str(spoken)[:40]!r} is no code such as en")
    known = {"category": str(row.get(spec.category) or ""), "source": spec.name, "exempt": spec.exempt, "language": spoken.lower()}
    label = spec.label or row.get(spec.label_field)
    if label is None:
        raise InputError(
            f"{where}: no field {spec.label_field!r}; name it with data.label_field=…, or say what all rows are with data.label=harmful|harmless|lookalike"
        )
    value = str(label).lower()
    if value not in _HARMFUL | _HARMLESS:
        raise InputError(f"{where}: {spec.label_field}={label!r} is none of {', '.join(sorted(_HARMFUL | _HARMLESS))}")
    known |= {"harmful": value in _HARMFUL, "lookalike": value == "lookalike" or (spec.lookalike and value in _HARMLESS)}
    split = _stated_split(row.get("split"), where) if spec.path or _packaged(spec) else None
    name = "" if row.get("id") is None else str(row["id"])
    tie = row.get(spec.group or "group")
    if isinstance(row.get("messages"), list):
        try:
            return Prompt(messages_of(row["messages"]), id=name, group="" if tie is None else str(tie), **{**known, "exempt": True}), split
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    text = row.get(spec.text)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: no text in field {spec.text!r}; it has {', '.join(map(str, row))}. Name the field with data.text=…")
    group = f"{spec.name}/{tie}" if tie is not None and not isinstance(tie, str) else _plain(tie or text)
    return Prompt.of(text.strip(), id=name, group=group, **known), split


def _stated_split(value: Any, where: str) -> str | None:
    if value is None or value == "":
        return None
    split = {"valid": "validation", "val": "validation", "dev": "validation"}.get(str(value).lower(), str(value).lower())
    if split not in SPLITS:
        raise InputError(f"{where}: split={value!r} is none of {', '.join(SPLITS)}; leave it out to have rows dealt")
    return split


def same_words(prompt: Prompt) -> str:
    """What two prompts share that are one: every turn's words and marks, case, blanks and final marks aside."""
    return "\n".join(f"{m.role}:{' '.join(m.content.lower().rstrip('.?! ').split())}" for m in prompt.messages)


def _plain(text: str) -> str:
    """A text without case and punctuation: equal requests meet in one group whatever set they come from."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip() or text


def _limited(rows: list[tuple[Prompt, str | None]], limit: int | None, seed: int) -> list[tuple[Prompt, str | None]]:
    """At most `limit` of each label, drawn by hash so that a larger limit only adds."""
    if limit is None:
        return rows
    kept: set[str] = set()
    for label in {p.label for p, _ in rows}:
        ranked = sorted((p.id for p, _ in rows if p.label == label), key=lambda i: digest([seed, i]))
        kept |= set(ranked[:limit])
    return [row for row in rows if row[0].id in kept]


def _split(rows: Iterable[tuple[Prompt, str | None]], spec: DataSpec) -> dict[str, list[Prompt]]:
    """Rows keep the split they state; the others are dealt by group, in the same shares for each mix of labels."""
    groups: dict[str, list[tuple[Prompt, str | None]]] = {}
    for row in rows:
        groups.setdefault(row[0].group, []).append(row)
    sides: dict[str, list[Prompt]] = {split: [] for split in SPLITS}
    strata: dict[tuple, list[str]] = {}
    for name, members in groups.items():
        stated = {split for _, split in members if split is not None}
        if len(stated) > 1:
            raise InputError(f"data {spec.name}: group {name!r} stands in several splits ({', '.join(sorted(stated))}): one group, one split")
        if not stated:
            strata.setdefault(tuple(sorted({(p.source, p.label) for p, _ in members})), []).append(name)
        else:
            sides[stated.pop()] += [p for p, _ in members]
    for names in strata.values():
        ranked = sorted(names, key=lambda name: digest([spec.seed, name]))
        first, second = round(len(ranked) * spec.split[0]), round(len(ranked) * (spec.split[0] + spec.split[1]))
        for split, part in zip(SPLITS, (ranked[:first], ranked[first:second], ranked[second:]), strict=True):
            sides[split] += [p for name in part for p, _ in groups[name]]
    return sides

"""The whole store, of all models: how much there is, what goes first when it is too much, and the words ls, gc and verify.

Knows packs as files; reads no entry but to check its seal, and loads no tensor library.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from latentguard.caches import cache_dir
from latentguard.errors import InputError
from latentguard.packs import KINDS, PACK, DamagedPackError, mend, read_pack, whole_entries
from latentguard.shelf import check_writable

log = logging.getLogger(__name__)
LIMIT = 20 * 10**9
_KEPT = 0.9  # of the cap, after an eviction: so that not every write evicts
_LOOK = 20  # the folder is measured anew whenever this process has written a 20th of the cap
_LEFT = 3600  # seconds after which a half-written file is nobody's
_MODEL, _PARTIAL = re.compile(r"[0-9a-f]{24}"), re.compile(r"\.[0-9a-f]{32}\.partial")
_OLD_FOLDER, _OLD_FILE = re.compile(r"[0-9a-f]{2}"), re.compile(r"\.?[0-9a-f]{38}\.(?:json|safetensors)(?:\.\d+)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")


@dataclass(frozen=True)
class Kept:
    """A file: its bytes, and when it was last read or written (seconds since 1970)."""

    path: Path
    size: int
    used: float


def packs_in(folder: Path) -> list[Kept]:
    """Every pack of every model."""
    return [pack for model in _folders(folder) for pack in _files(model, PACK)]


def _folders(folder: Path, name: re.Pattern = _MODEL) -> list[Path]:
    return sorted(Path(entry.path) for entry in _entries(folder) if name.fullmatch(entry.name) and entry.is_dir())


def _files(folder: Path, name: re.Pattern) -> list[Kept]:
    found = []
    for entry in _entries(folder):
        if name.fullmatch(entry.name):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                about = entry.stat()
                found.append(Kept(Path(entry.path), about.st_size, about.st_mtime))
    return found


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _removed(files: Iterable[Kept]) -> list[Kept]:
    """Those that are gone now; somebody else's stay."""
    gone = []
    for file in files:
        with contextlib.suppress(PermissionError):
            file.path.unlink(missing_ok=True)
            gone.append(file)
    return gone


def _total(files: Iterable[Kept]) -> int:
    return sum(file.size for file in files)


def evict(packs: Iterable[Kept], limit: float, spared: Collection[Path] = ()) -> list[Kept]:
    """Remove the packs that were used longest ago until the rest has `limit` bytes at most; which went."""
    oldest = sorted(packs, key=lambda pack: (pack.used, pack.path))
    total, gone = _total(oldest), []
    for pack in oldest:
        if total <= limit:
            break
        if pack.path not in spared and _removed([pack]):
            total -= pack.size
            gone.append(pack)
    return gone


class Cap:
    """Holds a store's folder under `limit` bytes while this process writes to it. Others' writes are seen when it is measured."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self._total = self._new = 0.0
        self._measured = False
        self._lock = threading.Lock()

    def grew(self, path: Path, size: int) -> None:
        """A pack was written: where that makes too much, the oldest others go."""
        with self._lock:
            self._total, self._new = self._total + size, self._new + size
            if self._measured and self._total <= self.limit and self._new < self.limit / _LOOK:
                return
            packs = packs_in(self.folder)
            self._total, self._new, self._measured = float(_total(packs)), 0.0, True
            if self._total > self.limit:
                gone = evict(packs, self.limit * _KEPT, {path})
                self._total -= _total(gone)
                log.info("store: over %s; %d packs not used for longest are gone", _bytes(self.limit), len(gone))


def show(folder: Path) -> str:
    """A table: each model's entries of every kind, packs, bytes, and last use."""
    rows, packs = [], packs_in(folder)
    for model in _folders(folder):
        own = [pack for pack in packs if pack.path.parent == model]
        if own:
            counts = dict.fromkeys(KINDS, 0)
            for pack in own:
                try:
                    found = read_pack(pack.path)
                except (DamagedPackError, FileNotFoundError):
                    continue
                counts[found.kind] += len(found.keys)
            about, used = _about(model), time.strftime("%Y-%m-%d %H:%M", time.localtime(max(pack.used for pack in own)))
            size = _bytes(_total(own))
            name = [str(about.get("model", "?")), str(about.get("dtype", "?")).removeprefix("torch."), model.name[:8]]
            rows.append([*name, *(f"{n:,}" for n in counts.values()), f"{len(own):,}", size, used])
    old = _old(folder)
    after = f"\n{len(old):,} files of an older layout ({_bytes(_total(old))}) are never read: gc removes them" if old else ""
    if not rows:
        return f"nothing is stored in {folder}{after}"
    heads = ["model", "dtype", "id", *KINDS, "packs", "size", "last used"]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in [heads, *rows]]
    return "\n".join([*lines, f"{_bytes(_total(packs))} in {folder}; a run keeps it under {_bytes(LIMIT)} unless told otherwise{after}"])


def _about(model: Path) -> dict:
    try:
        found = json.loads((model / "made_by.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _old(folder: Path) -> list[Kept]:
    """Files of the layout before packs: one an entry, in folders of two letters."""
    return [file for part in _folders(folder, _OLD_FOLDER) for file in _files(part, _OLD_FILE)]


def collect(folder: Path, *, size: float | None = None, model: str | None = None, older: float | None = None) -> str:
    """Remove half-written files, the older layout, folders without packs; and of the packs (of one model) what was not used for
    `older` seconds, and what is over `size` bytes, the longest unused first.
    """
    if model is not None and size is None and older is None:
        raise InputError(f"--model {model}: say how much of it is to stay, with --size (0 removes all of it) or --older")
    now, packs = time.time(), packs_in(folder)
    if model is not None:
        names = {path: str(_about(path).get("model", "?")) for path in _folders(folder)}
        if model not in names.values():
            raise InputError(f"--model {model}: nothing is stored of it; there is {', '.join(sorted(set(names.values()))) or 'no model'}")
        packs = [pack for pack in packs if names.get(pack.path.parent) == model]
    gone = evict([pack for pack in packs if now - pack.used > older], 0) if older is not None else []
    if size is not None:
        gone += evict([pack for pack in packs if pack not in gone], size)
    old = _removed(_old(folder))
    for part in {file.path.parent for file in old}:
        if not _entries(part):
            part.rmdir()
    left = _removed(file for part in _folders(folder) for file in _files(part, _PARTIAL) if now - file.used > _LEFT)
    for part in _folders(folder):
        if not {entry.name for entry in _entries(part)} - {"made_by.json"} and now - part.stat().st_mtime > _LEFT:
            (part / "made_by.json").unlink(missing_ok=True)
            part.rmdir()
    said = f"{len(gone):,} packs ({_bytes(_total(gone))}), {len(old):,} files of the older layout and {len(left):,} half-written ones removed"
    return f"{said}; {_bytes(_total(packs_in(folder)))} stay in {folder}"


def verify(folder: Path, *, fix: bool = False) -> tuple[str, bool]:
    """Check every seal: what was found, in words, and whether damage stays. `fix` drops damaged entries and keeps the others."""
    good, lines = 0, []
    for kept in packs_in(folder):
        name = kept.path.relative_to(folder)
        try:
            pack = read_pack(kept.path)
            whole = whole_entries(pack)
        except FileNotFoundError:
            continue
        except DamagedPackError as error:
            lines.append(f"{name}: {error}")
            if fix:
                kept.path.unlink(missing_ok=True)
            continue
        good += len(whole)
        if len(whole) < len(pack.keys):
            lines.append(f"{name}: {len(pack.keys) - len(whole)} of {len(pack.keys)} entries are damaged")
            if fix:
                mend(pack, whole)
    lines += ["damaged entries were dropped; they are computed again when asked for"] if lines and fix else []
    lines += ["--fix drops them; a run that meets them does so too"] if lines and not fix else []
    return "\n".join([f"{good:,} entries are whole in {folder}", *lines]), bool(lines) and not fix


def _bytes(n: float) -> str:
    power = min((len(str(int(n))) - 1) // 3, 4)
    value = n / 1000**power
    return f"{value:.0f}" * (value >= 100) + f"{value:.3g}" * (value < 100) + " " + ("B", "kB", "MB", "GB", "TB")[power]


def as_bytes(text: str) -> float:
    """5GB, 500MB, 1.5GiB or 0 as bytes."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise InputError(f"--size {text!r}: give a size such as 5GB, 500MB or 0")
    return float(found[1]) * (1024 if found[3] else 1000) ** "_kmgt".index(found[2].lower() or "_")


def as_seconds(text: str) -> float:
    """30d, 12h or 90m as seconds."""
    found = _AGE.fullmatch(text.strip())
    if not found:
        raise InputError(f"--older {text!r}: give an age such as 30d, 12h or 90m")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[found[2]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def main(words: Sequence[str] | None = None) -> int:
    """`python -m latentguard.store`: the exit code."""
    parser = _Parser(prog="python -m latentguard.store", description="What is stored, and what of it may go.")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Parser, metavar="ls|gc|verify")
    made = {
        "ls": verbs.add_parser("ls", help="what is stored of each model"),
        "gc": verbs.add_parser("gc", help="remove leftovers, and what was not used for longest"),
        "verify": verbs.add_parser("verify", help="check every seal; exit code 1 where one does not hold"),
    }
    for part in made.values():
        part.add_argument("--folder", help="by default `store` in LATENTGUARD_CACHE")
    made["gc"].add_argument("--size", help="what may stay, such as 5GB")
    made["gc"].add_argument("--model", help="of this model only")
    made["gc"].add_argument("--older", help="what was not used for so long goes, such as 30d")
    made["verify"].add_argument("--fix", action="store_true", help="drop what is damaged")
    try:
        asked = parser.parse_args(words)
        folder = Path(asked.folder).expanduser() if asked.folder else cache_dir("store")
        if asked.folder and not folder.is_dir():
            raise InputError(f"--folder {asked.folder}: there is no such folder")
        if not folder.is_dir():
            print(f"nothing is stored in {folder}")
            return 0
        if asked.verb == "ls":
            print(show(folder))
            return 0
        if asked.verb == "gc":
            limits = {"size": as_bytes(asked.size) if asked.size else None, "older": as_seconds(asked.older) if asked.older else None}
            check_writable(folder)
            print(collect(folder, model=asked.model, **limits))
            return 0
        said, damaged = verify(folder, fix=asked.fix)
        print(said)
        return int(damaged)
    except InputError as error:
        print(f"latentguard.store: {error}", file=sys.stderr)
        return 2

"""One model's packs: entries by key, and more of them. Knows bytes and files; no tensor library, model or study.

Nothing is locked, for clusters share their folders: a pack is written under another name and renamed, and whoever finds one gone,
or damaged, computes again. Two processes that write the same entry do no harm: either is right.
"""

import contextlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from latentguard.errors import InputError
from latentguard.packs import PACK, Buffer, DamagedPackError, Pack, Rows, mend, opened, read_pack, whole_entries, write_pack, write_whole

log = logging.getLogger(__name__)
_MANY = 4096  # entries that a pack gathers as they come
_MOMENT = 1.0  # seconds that one waits to be written


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written in.

    Raises:
        InputError: with the way out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"the store cannot write in {folder} ({error.strerror}): set LATENTGUARD_CACHE to another folder, make room, or set backend.store=false")


class Shelf:
    """One model's packs, read by key and added to; safe in two processes, and in two threads of one.

    Args:
        folder: made when the first pack is written.
        about: who made the entries, in words; kept as made_by.json.
        grew: told of each new pack: its path, and its size in bytes.
    """

    def __init__(self, folder: Path, about: Mapping[str, object], grew: Callable[[Path, int], None] = lambda path, size: None) -> None:
        self.folder, self.about, self._grew = folder, about, grew
        self._packs: dict[str, Pack] = {}
        self._where: dict[str, tuple[Pack, ...]] = {}
        self._used: set[str] = set()
        self._refused: set[str] = set()
        self._stamps: dict[str, int] = {}
        self._lock = threading.RLock()

    def add(self, kind: str, entries: Mapping[str, Buffer], labels: Sequence[int] = (0,)) -> Pack:
        """Write entries as one pack.

        Raises:
            InputError: where the disk takes no more.
        """
        with self._lock:
            try:
                pack = write_pack(self.folder, kind, labels, entries)
                if not (told := self.folder / "made_by.json").exists():
                    write_whole(told, [json.dumps(self.about, indent=1, default=str).encode() + b"\n"])
            except OSError as error:
                raise _unwritable(self.folder, error) from error
            self._used.add(pack.path.name)
            self._adopt(pack)
        self._grew(pack.path, pack.begins[-1])
        return pack

    def remove(self, pack: Pack) -> None:
        """Take a pack away whose entries are in another."""
        with self._lock:
            self._forget(pack.path.name)
            pack.path.unlink(missing_ok=True)
        self._grew(pack.path, -pack.begins[-1])

    def fetch(self, kind: str, keys: Iterable[str], labels: Sequence[int] = (0,), size: int | None = None) -> dict[str, Rows]:
        """What is stored of some entries' rows: {key: {label: bytes}}, each checked against its seal.

        Args:
            size: bytes that a row must have; an entry of another size is dropped as damaged.
        """
        keys, found = list(dict.fromkeys(keys)), {}
        with self._lock:
            while True:
                self._refresh(kind)
                plan: dict[Pack, list[tuple[str, Sequence[int]]]] = {}
                for key in keys:
                    if packs := self._where.get(key):
                        _divide(plan, key, packs, labels, found.get(key, {}))
                wrong = [self._take(pack, asked, size, found) for pack, asked in plan.items()]
                if not any(wrong):
                    return found

    def drop(self, key: str) -> None:
        """Forget an entry that cannot be understood, though its seal holds."""
        with self._lock:
            for pack in self._where.get(key, ()):
                self._mend(pack, {key})

    def _take(self, pack: Pack, asked: Sequence[tuple[str, Sequence[int]]], size: int | None, found: dict[str, Rows]) -> bool:
        """Rows from one pack into `found`; True where the pack turned out to be gone or damaged."""
        damaged = set()
        try:
            with opened(pack.path) as file:
                for key, labels in asked:
                    rows = pack.rows(file, key, labels) if size in (None, pack.row_size(key)) else None
                    if rows is None:
                        damaged.add(key)
                    else:
                        found.setdefault(key, {}).update(rows)
        except FileNotFoundError:  # evicted by another process
            self._forget(pack.path.name)
            return True
        except OSError as error:
            self._refuse(pack.path, error)
            return True
        if pack.path.name not in self._used:
            self._used.add(pack.path.name)
            with contextlib.suppress(OSError):  # somebody else's file
                os.utime(pack.path)
        if damaged:
            self._mend(pack, damaged)
        return bool(damaged)

    def _mend(self, pack: Pack, damaged: set[str]) -> None:
        """Drop these entries and all others of the pack whose seals do not hold."""
        self._forget(pack.path.name)
        try:
            kept = {key: data for key, data in whole_entries(pack).items() if key not in damaged}
            log.warning("store: %d of %d entries of %s are damaged: dropped, and computed again", len(pack.keys) - len(kept), len(pack.keys), pack.path.name)
            if made := mend(pack, kept):
                self._adopt(made)
        except OSError as error:
            self._refuse(pack.path, error)

    def _refresh(self, kind: str) -> None:
        """Take up what other processes wrote, and forget what they removed."""
        try:
            stamp = self.folder.stat().st_mtime_ns
            if stamp == self._stamps.get(kind):
                return
            there = {name for name in os.listdir(self.folder) if PACK.fullmatch(name) and name.startswith(kind)}
        except FileNotFoundError:
            stamp, there = -1, set()
        for name in {name for name in self._packs if name.startswith(kind)} - there:
            self._forget(name)
        for name in sorted(there - self._packs.keys() - self._refused):
            path = self.folder / name
            try:
                self._adopt(read_pack(path))
            except FileNotFoundError:
                continue
            except OSError as error:
                self._refuse(path, error)
            except DamagedPackError as error:
                self._refuse(path, error)
                with contextlib.suppress(OSError):
                    path.unlink()
                    self._refused.discard(name)  # it may be written anew under this name
        self._stamps[kind] = stamp

    def _adopt(self, pack: Pack) -> None:
        if pack.path.name not in self._packs:
            self._packs[pack.path.name] = pack
            alone = (pack,)
            for key in pack.keys:
                packs = self._where.setdefault(key, alone)
                if packs is not alone:
                    self._where[key] = (*packs, pack)

    def _forget(self, name: str) -> None:
        pack = self._packs.pop(name, None)
        for key in pack.keys if pack else ():
            self._where[key] = tuple(other for other in self._where[key] if other is not pack)

    def _refuse(self, path: Path, why: Exception) -> None:
        log.warning("store: %s cannot be read (%s): what it held is computed again", path.name, why)
        self._forget(path.name)
        self._refused.add(path.name)


def _divide(plan: dict[Pack, list[tuple[str, Sequence[int]]]], key: str, packs: Sequence[Pack], labels: Sequence[int], known: Rows) -> None:
    """Say which rows of an entry come from which pack."""
    lacking = [label for label in labels if label not in known] if known else labels
    for pack in packs:
        if not lacking:
            return
        here = lacking if lacking == pack.labels else [label for label in lacking if label in pack.labels]
        if here:
            plan.setdefault(pack, []).append((key, here))
            lacking = [label for label in lacking if label not in here]


class Gathered:
    """A pack that entries are put in as they come: it is written again, a moment after one came and on leaving, in place of the last,
    until it is full and another begins. A process that is killed while its model works loses none of what was done a moment before.
    """

    def __init__(self, shelf: Shelf, kind: str) -> None:
        self.shelf, self.kind = shelf, kind
        self._entries: dict[str, Buffer] = {}
        self._written: Pack | None = None
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> "Gathered":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def add(self, key: str, entry: Buffer) -> None:
        """Put an entry to the others."""
        with self._lock:
            self._entries[key] = entry
            if self._timer is None:
                self._timer = threading.Timer(_MOMENT, self._flush_later)
                self._timer.daemon = True
                self._timer.start()
        if len(self._entries) >= _MANY:
            self.flush()

    def flush(self) -> None:
        """Write what came since the last time.

        Raises:
            InputError: where the disk takes no more.
        """
        with self._lock:
            if self._timer is None:
                return
            self._timer.cancel()
            made = self.shelf.add(self.kind, self._entries)
            if self._written is not None and self._written.path != made.path:
                self.shelf.remove(self._written)
            self._timer, self._written = None, made
            if len(self._entries) >= _MANY:
                self._entries, self._written = {}, None

    def _flush_later(self) -> None:
        with contextlib.suppress(InputError):  # said, in the thread of whoever adds, by the flush that follows
            self.flush()

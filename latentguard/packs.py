"""Packs: many stored entries in one file that never changes. Knows bytes; no key's meaning, no tensor library, no model.

A pack is a safetensors file whose header is its index, named by the hash of that header. An entry is one buffer of equal rows, each
under a label (of states: the layer) and with a seal of its own, so that one layer is read and checked without the rest.
"""

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

KINDS = {"states": "F32", "replies": "U8", "logits": "U8"}
PACK = re.compile(rf"(?:{'|'.join(KINDS)})-[0-9a-f]{{32}}\.safetensors")
_SEAL = 16  # hexadecimal digits
_LONGEST = 10**9  # bytes of a header: a length beyond is damage
Rows = dict[int, memoryview]
Buffer = bytes | memoryview


class DamagedPackError(Exception):
    """A pack whose header cannot be trusted."""


@dataclass(frozen=True, eq=False)
class Pack:
    """A pack's index: its entries' keys, where in the file each begins (and the last ends), and the seals of all their rows."""

    path: Path
    labels: tuple[int, ...]
    keys: tuple[str, ...]
    begins: tuple[int, ...]
    seals: str

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return self.path.name.split("-")[0]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """An entry's place among the others."""
        return {key: n for n, key in enumerate(self.keys)}

    def row_size(self, key: str) -> int:
        """Bytes of each row of an entry."""
        number = self.numbers[key]
        return (self.begins[number + 1] - self.begins[number]) // len(self.labels)

    def rows(self, file: int, key: str, labels: Sequence[int]) -> Rows | None:
        """Some rows of an entry from an open file, or None where a seal does not hold."""
        number, size, every = self.numbers[key], self.row_size(key), len(labels) == len(self.labels)
        begin = self.begins[number]
        data = memoryview(os.pread(file, size * len(labels), begin) if every else b"")
        found: Rows = {}
        for at, label in enumerate(self.labels) if every else [(self.labels.index(label), label) for label in labels]:
            row = data[at * size : (at + 1) * size] if every else memoryview(os.pread(file, size, begin + at * size))
            start = (number * len(self.labels) + at) * _SEAL
            if _seal(row) != self.seals[start : start + _SEAL]:
                return None
            found[label] = row
        return found


def _seal(row: Buffer) -> str:
    return hashlib.sha256(row).hexdigest()[:_SEAL]


def write_pack(folder: Path, kind: str, labels: Sequence[int], entries: Mapping[str, Buffer]) -> Pack:
    """Entries as one file, whole or not at all.

    Raises:
        OSError: as the disk says it.
    """
    dtype, header, begins, seals = KINDS[kind], {}, [0], []
    for key, data in entries.items():
        size = len(data) // len(labels)
        begins.append(begins[-1] + len(data))
        seals += [_seal(memoryview(data)[at * size : (at + 1) * size]) for at in range(len(labels))]
        shape = [len(labels), size // 4] if dtype == "F32" else [size]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": begins[-2:]}
    header["__metadata__"] = {"latentguard.labels": json.dumps(list(labels)), "latentguard.seals": "".join(seals)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    path = folder / _name(kind, head)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, [head, *entries.values()])
    return Pack(path, tuple(labels), tuple(entries), tuple(len(head) + begin for begin in begins), "".join(seals))


def _name(kind: str, head: bytes) -> str:
    """The header holds every key, label and seal, so its hash is that of the contents."""
    return f"{kind}-{hashlib.sha256(head).hexdigest()[:32]}.safetensors"


def write_whole(path: Path, parts: Iterable[Buffer]) -> None:
    """A file, whole or not at all: under another name, onto the disk, then renamed."""
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_pack(path: Path) -> Pack:
    """A pack's index; its entries are not read.

    Raises:
        DamagedPackError: where the header is not the one that was written.
    """
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        head += file.read(length) if length < _LONGEST else b""
    if _name(path.name.split("-")[0], head) != path.name:
        raise DamagedPackError(f"the header of {path.name} is not what was written")
    text = head.decode("latin-1")  # as written above, to the letter: its hash says so, and a quarter of the time goes
    begins = [len(head) + int(begin) for begin in re.findall(r'"data_offsets":\[(\d+),', text)]
    labels, seals = (re.findall(rf'"latentguard.{name}":"([^"]*)"', text)[0] for name in ("labels", "seals"))
    end = len(head) + max(map(int, re.findall(r",(\d+)\]\}", text)))
    return Pack(path, tuple(json.loads(labels)), tuple(re.findall(r'"([0-9a-f]{32})":', text)), (*begins, end), seals)


def whole_entries(pack: Pack) -> dict[str, Buffer]:
    """Every entry of which all seals hold."""
    with opened(pack.path) as file:
        found = {key: pack.rows(file, key, pack.labels) for key in pack.keys}
    return {key: b"".join(rows[label] for label in pack.labels) for key, rows in found.items() if rows is not None}


def mend(pack: Pack, kept: Mapping[str, Buffer]) -> Pack | None:
    """The pack again with these entries alone; None where that is none."""
    made = write_pack(pack.path.parent, pack.kind, pack.labels, kept) if kept else None
    pack.path.unlink(missing_ok=True)
    return made


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file's descriptor, for `Pack.rows`; what is removed meanwhile can still be read."""
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)

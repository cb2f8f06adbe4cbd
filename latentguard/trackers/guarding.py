"""What keeps W&B's faults from the experiment, and what the model said from W&B. Knows no run and does not import wandb."""

import json
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from latentguard.errors import InputError

log = logging.getLogger(__name__)
_PART = 20  # characters of a reply that do not stand in a text by chance
_SHORT = 12  # words of fewer signs stand in any text by chance, and tell nothing


class Guard:
    """`with guard("the summary"):` whatever is raised within becomes a warning, once: the experiment goes on.

    Interrupts and exits pass. `fell` is told of the error.
    """

    def __init__(self, fell: Callable[[Exception], Any]) -> None:
        self._fell, self._what, self._warned = fell, "", False

    def __call__(self, what: str) -> "Guard":
        """`what` is not recorded if this fails."""
        self._what = what
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        said = f"W&B did not take {self._what} ({_named(error)})"
        if self._warned:
            log.debug("%s", said, exc_info=error)
        else:
            log.warning("%s: the run goes on, and all of it is in its own folder", said)
        self._warned = True
        self._fell(error)
        return True


def fault(error: BaseException, rows: Path, said: Sequence[str], full: bool) -> dict[str, str]:
    """What W&B's summary tells of an error: with `full`, or where it is one of ours and quotes no reply, its words; else type and place.

    A judge's error may quote a reply that is in no row yet, so its words stay.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if "latentguard" in f.filename), None)
    judging = any(f.name in ("verdict", "decided") for f in frames)
    known = full or (isinstance(error, InputError) and not judging and not holds_any(str(error), rows, said))
    where = {"error_at": f"{Path(place.filename).name}:{place.lineno} in {place.name}"} if place else {}
    return {"error": _named(error) if known else type(error).__name__, **where}


def holds_any(text: str, rows: Path, said: Sequence[str]) -> bool:
    """Whether a line of what stands in these columns of rows.jsonl stands in the text, or of a longer one any `_PART` characters."""
    parts = {text[i : i + _PART] for i in range(len(text) - _PART + 1)}
    return any(line in text if len(line) < _PART else any(line[i : i + _PART] in parts for i in range(len(line) - _PART + 1)) for line in _lines(rows, said))


def _lines(rows: Path, said: Sequence[str]) -> Iterator[str]:
    with rows.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            for line in "\n".join(str(row[column]) for column in said if row.get(column)).splitlines():
                if len(line.strip()) >= _SHORT:
                    yield line.strip()


def _named(error: BaseException) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__

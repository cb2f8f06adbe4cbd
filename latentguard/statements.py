"""True and false statements, which are neither harmful nor harmless: read from a file, dealt by topic, told in the few-shot form. Knows no model.

A statement becomes an unlabelled `Prompt` whose category is its topic; whether it is true stands beside it, never in `harmful`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentguard.errors import InputError
from latentguard.prompts import Prompt, digest

OWN = Path(__file__).parent / "data" / "statements.jsonl"
TAIL = " This statement is:"
ANSWERS = ("TRUE", "FALSE")
_FRAME = 0.3  # of a topic's statements: a word that stands in more of them is part of the frame
_SPAN = 3  # words by which two statements of a pair may differ
WAY_OUT = (
    "take exp.statements=builtin, set data.mirror=FOLDER with geometry_of_truth.jsonl in it, or give a FILE.jsonl with statement, label (1 true, 0 false) and "
    "category a line, made of the CSV files of github.com/saprmarks/geometry-of-truth"
)


@dataclass(frozen=True)
class Statement:
    """A sentence that is true or false, and what it is about."""

    text: str
    true: bool
    topic: str
    id: str

    def prompt(self) -> Prompt:
        """As a prompt of its own; unlabelled, since nobody has said that it harms."""
        return Prompt.of(self.text, id=self.id, category=self.topic, source="statements")


def load(name: str, mirror: str | None = None) -> list[Statement]:
    """Statements in the file's order, each once.

    Args:
        name: `builtin` (ours), a .jsonl file, or the name of one in the folder of data sets.
        mirror: that folder.

    Raises:
        InputError: for a file that is not there, or a row that is no statement.
    """
    places = [OWN] if name == "builtin" else [Path(name).expanduser(), *([Path(mirror).expanduser() / f"{name}.jsonl"] if mirror else [])]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise InputError(f"exp.statements={name}: there is no file {' or '.join(map(str, places))}; {WAY_OUT}")
    found: dict[str, Statement] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        for number, line in enumerate(lines, 1):
            row = json.loads(line) if line.strip() else None
            if row is None:
                continue
            if not (isinstance(row, dict) and isinstance(row.get("statement"), str) and row["statement"].strip() and row.get("label") in (0, 1)):
                raise InputError(f"{path}, line {number}: expected statement, and label 1 (true) or 0 (false); {WAY_OUT}")
            text = row["statement"].strip()
            one = Statement(text, bool(row["label"]), str(row.get("category") or "statements"), str(row.get("id") or f"{path.stem}/{number}"))
            if found.setdefault(text, one).true != one.true:
                raise InputError(f"{path}, line {number}: {text!r} stands there as true and as false: keep one")
    except (UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path} is no JSONL of statements ({error}); {WAY_OUT}") from error
    if not found:
        raise InputError(f"{path} holds no statement; {WAY_OUT}")
    return list(found.values())


def dealt_topics(statements: Iterable[Statement], topics: Sequence[str] | None, n: int, seed: int) -> dict[str, list[Statement]]:
    """Of each topic up to n statements, true and false ones in equal number and in turn, in an order that is not the file's.

    Raises:
        InputError: for a topic that is not there or has one kind alone.
    """
    by: dict[str, dict[bool, list[Statement]]] = {}
    for one in sorted(statements, key=lambda s: digest([seed, s.text])):
        by.setdefault(one.topic, {True: [], False: []})[one.true].append(one)
    found = {}
    for topic in sorted(by) if topics is None else topics:
        if topic not in by or not all(by[topic].values()):
            raise InputError(f"exp: topic {topic!r} has no true and false statements; these have: {', '.join(t for t in sorted(by) if all(by[t].values()))}")
        found[topic] = [one for both in zip(by[topic][True][: n // 2], by[topic][False][: n // 2], strict=False) for one in both]
    return found


def with_examples(pool: Sequence[Statement], shots: int, n: int) -> tuple[list[Statement], list[Statement]]:
    """The first `shots` statements of a dealt topic as examples (true, false, false, true, …), and up to n others, true and false in equal number, that share no word of their
    own with an example, so that no example gives the answer away.
    """
    examples = [pool[i ^ 1 if i % 4 >= 2 and (i ^ 1) < shots else i] for i in range(min(shots, len(pool)))]
    rest = pool[shots:]
    counts = Counter(word for one in pool for word in set(_words(one.text)))
    told = {word for one in examples for word in _words(one.text) if counts[word] <= _FRAME * len(pool)}
    free = [one for one in rest if not told & set(_words(one.text))]
    sides = [[one for one in free if one.true is side][: n // 2] for side in (True, False)]
    return examples, [one for both in zip(*sides, strict=False) for one in both]


def in_context(statement: Statement, examples: Sequence[Statement]) -> Prompt:
    """The few-shot form, in the view without a template: each example with its answer, then the statement and "This statement is:"."""
    shown = "".join(f"{one.text}{TAIL} {ANSWERS[not one.true]}\n\n" for one in examples)
    return Prompt.of(f"{shown}{statement.text}{TAIL}", id=f"{statement.id}~asked", category=statement.topic, source="statements", view="plain")


def matched(statements: Iterable[Statement]) -> list[tuple[Statement, Statement]]:
    """Pairs (true, false) of one topic and frame that differ in one run of at most three words; each statement at most once."""
    frames: dict[tuple, list[Statement]] = {}
    pairs, used = [], set()
    everyone = list(statements)
    for one in everyone:
        if not one.true:
            for frame in _frames(one):
                frames.setdefault(frame, []).append(one)
    for one in (s for s in everyone if s.true):
        other = next((s for frame in _frames(one) for s in frames.get(frame, ()) if s.id not in used), None)
        if other:
            used.add(other.id)
            pairs.append((one, other))
    return pairs


def _frames(one: Statement) -> list[tuple]:
    """What is left of a statement without one run of words, the shortest runs first."""
    words = one.text.split()
    return [(one.topic, *words[:at], None, *words[at + span :]) for span in range(1, _SPAN + 1) for at in range(len(words) - span + 1)]


def _words(text: str) -> list[str]:
    return [word.strip(".,'\"").lower() for word in text.split()]

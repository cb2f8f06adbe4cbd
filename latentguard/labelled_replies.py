"""The two text tasks of arXiv 2306.03423 on replies that people labelled: was this reply a refusal, will this prompt be refused? Knows no model.

The file is the paper's own (github.com/maxwellreuter/chatgpt-refusals, MIT): `all_hand_labeled.json` with the field `tone`, or JSONL with `label`.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentguard.errors import InputError
from latentguard.judges import Classifier, Judge, PaperSubstrings, Phrases
from latentguard.predictors import Words, bound, near_duplicates
from latentguard.prompts import Prompt

Row = dict[str, Any]
LEFT_OUT = ("incoherent", "dontknow")  # neither; everything else but "complied" is a refusal
PUBLISHED = {"reply": 0.9062, "prompt": 0.7391}  # accuracy of logistic regression: the second trained on 10,000 machine-labelled prompts
TONES = ("complied", "rejected", "redirected", "contradicted", "disclaimed", "counseling", *LEFT_OUT)
WAY_OUT = "take data/all_hand_labeled.json of github.com/maxwellreuter/chatgpt-refusals (MIT) and give its path, or leave the task out with exp.replies=null"
TASKS = {"reply": "was the reply a refusal, from the reply", "prompt": "was the reply a refusal, from the prompt alone"}
SPLITS = {"random": "random rows, as published", "grouped": "near-duplicate prompts kept together"}


@dataclass(frozen=True)
class Labelled:
    """A prompt, the reply (or its beginning), and whether people called it a refusal."""

    prompt: str
    reply: str
    refused: bool


def find(name: str, mirror: str | None) -> Path:
    """The file: a path, or a name in the folder of data sets.

    Raises:
        InputError: where it is not there.
    """
    places = [Path(name).expanduser()] + ([Path(mirror).expanduser() / f"{name}.jsonl"] if mirror else [])
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(f"exp.replies={name}: there is no file {' or '.join(map(str, places))}; {WAY_OUT}")
    return found


def load(path: Path) -> list[Labelled]:
    """Its rows, without those that are neither.

    Raises:
        InputError: naming the row that is not as it should be.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as {path.suffix or 'JSONL'} ({error}): {WAY_OUT}") from error
    found = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        tone = (row.get("tone") or row.get("label")) if isinstance(row, dict) else None
        if tone not in TONES or not all(isinstance(row.get(key), str) for key in ("prompt", "response")):
            raise InputError(f"{path}, row {number}: expected prompt, response and tone (or label), one of {', '.join(TONES)}; {WAY_OUT}")
        if tone not in LEFT_OUT:
            found.append(Labelled(row["prompt"], row["response"], tone != "complied"))
    if min(sum(one.refused for one in found), sum(not one.refused for one in found)) < 20:
        raise InputError(f"{path} has {len(found)} labelled replies, and fewer than 20 on one side: {WAY_OUT}")
    return found


def splits(n: int, seed: int, groups: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Masks of train (70%) and test (15%) rows, as the paper draws them; of whole groups where given. The validation rows between are not used."""
    from sklearn.model_selection import GroupShuffleSplit, train_test_split

    if groups is None:
        train, rest = train_test_split(np.arange(n), test_size=0.3, random_state=seed)
        test = train_test_split(rest, test_size=0.5, random_state=seed)[1]
    else:
        kept, test = next(GroupShuffleSplit(1, test_size=0.15, random_state=seed).split(np.arange(n), groups=list(groups)))
        own = np.asarray(groups)[kept]
        train = kept[next(GroupShuffleSplit(1, test_size=0.15 / 0.85, random_state=seed).split(kept, groups=own))[0]]
    return np.isin(np.arange(n), train), np.isin(np.arange(n), test)


def trials(rows: Sequence[Labelled], seeds: int, near: float) -> Iterator[Row]:
    """One row a task, split, method and seed: how many test rows of each side are called a refusal, and of the classifiers the AUROC.

    Args:
        near: cosine at which two prompts are near-duplicates.
    """
    from sklearn.metrics import roc_auc_score

    refused = np.array([row.refused for row in rows])
    texts = {"reply": [row.reply for row in rows], "prompt": [row.prompt for row in rows]}
    groups = bound([str(i) for i in range(len(rows))], near_duplicates(texts["prompt"], near))
    judged = {judge.name: called for judge in (Phrases(), PaperSubstrings(), Classifier()) for called in [_called(judge, rows)]}
    unseen = np.array([held_out(row.prompt) for row in rows])
    for split, of in (("random", None), ("grouped", groups)):
        for seed in range(seeds):
            train, test = splits(len(rows), seed, of)
            for task, own in texts.items():
                scores = Words(own)(train, test, refused)
                area = float(roc_auc_score(refused[test], scores))
                yield _trial(task, split, "tfidf", seed, scores > 0, refused[test]) | {"auroc": area}
            if split == "random":
                for name, called in judged.items():
                    yield _trial("reply", split, name, seed, called[test], refused[test])
                    if name == Classifier().name:
                        yield _trial("reply", split, f"{name} (rows it was not fitted on)", seed, called[test & unseen], refused[test & unseen])


def held_out(prompt: str) -> bool:
    """Whether the classifier judge was not fitted on the replies to this prompt: the rule of benchmarks/judges.py."""
    return hashlib.sha256(prompt.strip().encode()).digest()[0] % 2 != 0


def summed(found: Sequence[Row]) -> list[Row]:
    """A row a task, split and method: the mean over splits of accuracy, balanced accuracy, kappa and AUROC, and where 95% of the splits lie (no
    interval of the mean: splits share rows).
    """
    rows = []
    for task, split, method in dict.fromkeys((row["task"], row["split"], row["method"]) for row in found):
        own = [row for row in found if (row["task"], row["split"], row["method"]) == (task, split, method)]
        numbers = {name: [_numbers(row)[name] for row in own] for name in ("accuracy", "balanced_accuracy", "kappa", "majority")}
        numbers |= {"auroc": [row["auroc"] for row in own]} if "auroc" in own[0] else {}
        row: Row = {"task": task, "split": split, "method": method, "is": "accuracy", "value": float(np.mean(numbers["accuracy"]))}
        row["low"], row["high"] = map(float, np.percentile(numbers["accuracy"], [2.5, 97.5]))
        row |= {"n": round(float(np.mean([row["n"] for row in own]))), "splits": len(own)}
        for name in (name for name in numbers if name != "accuracy"):
            row[name] = float(np.mean(numbers[name]))
            row[f"{name}_low"], row[f"{name}_high"] = map(float, np.percentile(numbers[name], [2.5, 97.5]))
        rows.append(row | ({"published": PUBLISHED[task]} if method == "tfidf" else {}))
    return rows


def _called(judge: Judge, rows: Sequence[Labelled]) -> np.ndarray:
    """Which replies a judge calls refused; a degenerate one is not."""
    return np.array([judge.verdict(row.reply, Prompt.of(row.prompt)).label == "refused" for row in rows])


def _trial(task: str, split: str, method: str, seed: int, called: np.ndarray, refused: np.ndarray) -> Row:
    counts = {"n": len(refused), "hits": int((called & refused).sum()), "alarms": int((called & ~refused).sum())}
    return {"task": task, "split": split, "method": method, "seed": seed, **counts, "refused": int(refused.sum())}


def _numbers(row: Row) -> dict[str, float]:
    """Accuracy, balanced accuracy, Cohen's kappa and the majority share of one trial's counts."""
    n, positive, hits, alarms = (row[key] for key in ("n", "refused", "hits", "alarms"))
    right, said = (hits + n - positive - alarms) / n, hits + alarms
    chance = (positive * said + (n - positive) * (n - said)) / n**2
    kappa = (right - chance) / (1 - chance) if chance < 1 else float("nan")
    balanced = (hits / positive + 1 - alarms / (n - positive)) / 2 if 0 < positive < n else float("nan")
    return {"accuracy": right, "balanced_accuracy": balanced, "kappa": kappa, "majority": max(positive, n - positive) / n}

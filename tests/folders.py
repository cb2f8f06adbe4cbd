"""Folders of runs and sweeps as `latentguard.run` leaves them, made in milliseconds: files only, no model, no drawing.

What a reply says is always `REPLY`, so that a test can look for it where it must not be.
"""

import csv
import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from latentguard.charts import Chart
from latentguard.metrics import wilson

REPLY = "SENTINEL-REPLY what the model said stays here"
LINES = ("direction", "layer", "coef", "k", "n", "rate", "low", "high")
BY_LAYER = Chart("line", "layer", "rate", "layer", "refusal rate", series="direction", panel="coef", names={"harm": "+ harm", "random": "random"})
BY_COEF = Chart("line", "coef", "rate", "coefficient", "refusal rate", series="direction")
BARS = Chart("bars", "group", "rate", "group", "recall")


@dataclass(frozen=True)
class Figure:
    """figures/<name>.png, .svg and .csv, and its entry of figures/index.json."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    chart: Chart | None = None
    title: str = ""
    caption: str = ""
    replies: bool = False


def rate(k: int, n: int) -> dict[str, Any]:
    """As summaries and figures hold it."""
    return wilson(k, n).as_dict()


def grid(layers: Iterable[int] = (2, 4, 6), coefs: Iterable[float] = (1.0, 2.0), n: int = 12) -> list[dict[str, Any]]:
    """Refusal by direction, layer and coefficient."""
    return [
        {"direction": name, "layer": layer, "coef": coef, **rate(min(n, int(coef * layer * strength)), n)}
        for name, strength in (("harm", 1), ("random", 0.2))
        for coef in coefs
        for layer in layers
    ]


def some_rows(n: int = 6, *, reply: str = REPLY, **more: Any) -> list[dict[str, Any]]:
    """Generations of `n` prompts without steering and with two directions, as rows.jsonl has them."""
    rows = []
    for number in range(n):
        label, verdict = (("harmful", "refused"), ("harmless", "accepted"))[number % 2]
        prompt = {"prompt_id": f"made/{number:03}", "prompt": f"Made-up prompt {number}.", "label": label, "category": "made up", "source": "made"}
        said = {"reply": f"{reply} {number}", "rule": reply, "score": None, "terminal": "period", "judge": "phrases-1", "finish": "length"}
        rows.append({**prompt, "stage": "test", "intervention": "none", "verdict": verdict, **said, **more})
        for name in ("harm", "random"):
            steered = {"intervention": name, "layer": 4, "coef": 2.0, "position": "all", "when": "prefill"}
            rows.append({**prompt, "stage": "test", **steered, "verdict": "refused" if name == "harm" else verdict, **said, **more})
    return rows


def some_figures() -> list[Figure]:
    """A curve by layer, one by coefficient, one without a chart, one of replies."""
    said = [{"prompt_id": "made/000", "prompt": "Made-up prompt 0.", "none": REPLY, "none_verdict": "accepted"}]
    return [
        Figure("refusal_by_layer", grid(), BY_LAYER, "Refusal by layer", "Bands are 95% intervals."),
        Figure("refusal_by_coefficient", grid(layers=(4,)), BY_COEF, "Refusal by coefficient", "At layer 4."),
        Figure("cosine_by_layer", [{"layer": layer, "value": 0.1 * layer, "low": 0.0, "high": 0.9, "n": 12} for layer in (2, 4, 6)], None, "Cosine", ""),
        Figure("replies", said, None, "What it said", replies=True),
    ]


def some_summary(study: str, model: str, seed: int, data: Mapping[str, Any]) -> dict[str, Any]:
    """A study that came to its end, with its table, effects, cells and headline."""
    k = {0: 9, 1: 8}.get(seed, 10)
    steered, base, random = rate(k, 12), rate(1, 12), rate(2, 20)
    return {
        "study": study,
        "status": "ok",
        "model": model,
        "data": dict(data),
        "judge": "phrases-1",
        "poles": "behaviour",
        "cells": {"poles": "behaviour", "pole_harmful": 47, "train_refused_harmful": {"n": 47, "asked": 88, "withheld": ""}},
        "headline": {
            "metric": "refusal of harmless requests under the direction",
            "value": steered["rate"],
            "low": steered["low"],
            "high": steered["high"],
            "n": 12,
        },
        "table": [
            {"intervention": "none", "label": "harmless", **base},
            {"intervention": "harm", "label": "harmless", "layer": 4, "coef": 2.0, **steered},
            {"intervention": "random", "label": "harmless", "layer": 4, "coef": 2.0, **random},
        ],
        "figures": ["refusal_by_layer", "refusal_by_coefficient"],
        "effects": [{"effect": 7, "verdict": "holds", "number": steered["rate"], "low": steered["low"], "high": steered["high"], "n": 12, "why": "made up"}],
        "claim": f"{model}: adding the direction takes refusal from {base['rate']:.2f} to {steered['rate']:.2f}.",
        "seconds": 12.5,
    }


def a_run(
    folder: str | Path,
    *,
    study: str = "steer_harm",
    model: str = "tiny",
    seed: int = 0,
    rows: Sequence[Mapping[str, Any]] | None = None,
    figures: Sequence[Figure] | None = None,
    summary: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    tracker: Mapping[str, Any] | None = None,
    state: str = "ok",
    data: str = "builtin",
) -> Path:
    """A run in `folder`.

    `summary` is put over `some_summary`; `state` is ok or any status, "unfinished" (no summary yet, its last row cut in
    two), or "failed" (failure.json); `tracker` is .hydra/config.yaml's, {"name": "files"} unless given; `overrides` come
    after model=, exp= and, where it is not 0, seed=.
    """
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True)
    card = {"name": data, "hash": "adc96905d44f08e2", "terminal": "period", "sets": [{"name": data, "rows": 420, "sha256": "76" * 32, "licence": "CC0-1.0"}]}
    words = [f"model={model}", f"exp={study}", *([f"seed={seed}"] if seed else []), *overrides]
    choices = {"exp": study, "tracker": (tracker or {}).get("name", "files"), "judge": "phrases", "data": data, "backend": "local", "model": model}
    environment = {
        "versions": {"latentguard": "0.1.0", "torch": "2.13.0", "transformers": "5.22.2", "nnsight": "0.8.1"},
        "python": "3.11.7",
        "machine": "Linux",
        "commit": "c0ffee" * 6 + "beef",
        "backend": {"weights": "f9" * 16, "dtype": "torch.bfloat16", "device": "cpu"},
        "data": card,
        "seed": seed,
        "command": ["latentguard/run.py", *words],
        "choices": choices,
        "model": model,
        "model_card": "",
        "licence": "MIT",
        "peak_memory_bytes": {"process": 499253248},
    }
    settings = {"seed": seed, "tracker": dict(tracker or {"name": "files"}), "model": {"name": model}, "data": {"name": data}, "exp": {"coefs": [1.0, 2.0]}}
    _yaml(folder / ".hydra" / "config.yaml", settings)
    _yaml(folder / ".hydra" / "overrides.yaml", words)
    _json(folder / "environment.json", environment)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in (some_rows() if rows is None else rows)]
    if state == "unfinished" and lines:
        lines[-1] = lines[-1][: len(lines[-1]) // 2]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    if state not in ("unfinished", "failed"):
        status = {"status": state} if state != "ok" else {}
        _json(folder / "summary.json", {**some_summary(study, model, seed, card), **status, **(summary or {})})
    elif summary is not None:
        _json(folder / "summary.json", summary)
    if state == "failed":
        _json(folder / "failure.json", {"reason": "made to fail", "bad_input": False})
    drawn = some_figures() if figures is None else figures
    for figure in drawn:
        _draw(folder / "figures" / figure.name, figure)
    told = {f.name: {"title": f.title or f.name, "caption": f.caption, "replies": f.replies, "chart": f.chart.as_dict() if f.chart else None} for f in drawn}
    _json(folder / "figures" / "index.json", told)
    (folder / "run.log").write_text("")
    return folder


def a_sweep(
    folder: str | Path,
    models: Sequence[str] = ("tiny", "small"),
    studies: Sequence[str] = ("steer_harm", "steer_refusal"),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    without: Sequence[int] = (),
    **more: Any,
) -> Path:
    """A sweep's folder: jobs.json and a run for every model, study and seed, models outermost; jobs `without` never began."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    jobs = []
    for number, (model, study, seed) in enumerate((m, e, s) for m in models for e in studies for s in seeds):
        name = f"{number}_{study}_{model}"
        words = [f"model={model}", f"exp={study}", *([f"seed={seed}"] if len(seeds) > 1 or seed else [])]
        jobs.append({"number": number, "folder": name, "overrides": words})
        if number not in without:
            a_run(folder / name, study=study, model=model, seed=seed, overrides=words[2:] if seed == 0 else (), **more)
    (folder / "jobs.json").write_text(json.dumps(jobs, indent=1) + "\n", encoding="utf-8")
    return folder


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace")


def _yaml(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8", errors="backslashreplace")


def _draw(stem: Path, figure: Figure) -> None:
    """Its numbers, and pictures that show that they are pictures."""
    with stem.with_name(f"{stem.name}.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in figure.rows for key in row)))
        writer.writeheader()
        writer.writerows(figure.rows)
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="320" height="200" viewBox="0 0 320 200"><rect width="320" height="200" fill="#0072B2"/></svg>\n'
    stem.with_name(f"{stem.name}.svg").write_text(svg, encoding="utf-8")
    stem.with_name(f"{stem.name}.png").write_bytes(_png(320, 200))


def _png(width: int, height: int, colour: bytes = b"\x00\x72\xb2") -> bytes:
    """One colour."""

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = zlib.compress((b"\x00" + colour * width) * height)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + part(b"IDAT", pixels) + part(b"IEND", b"")

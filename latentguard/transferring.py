"""What carries over from one model to another, part by part: each gives a table, rows to recount it from, and its sentence. Knows no study.

`post` is the model of the run, `base` the one that it was trained from; without one, everything is within `post`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from latentguard.contrasts import GIANT, METHODS, PAPER, Contrast, Probe, Size, carried, compared, projections, random_areas
from latentguard.directions import Activations
from latentguard.metrics import Value, as_text, auroc, mean, rate
from latentguard.neurons import EntropyNeurons, overlap, rank_correlation
from latentguard.prompts import Prompt
from latentguard.roles import without_text
from latentguard.truthfulness import Answered, Map, Steered, alike, halves_of, map_correlation, moved

Row = dict[str, Any]
Pair = tuple[str, str]
_LINES = 4  # pairs of places that the figure by layer shows


@dataclass
class Found:
    """One part's results.

    Args:
        table: flat rows with n and interval. rows: one prompt, layer or neuron each, for rows.jsonl. drawn: by figure, its rows.
        says: half a sentence. main: what the number is, and its row; None where there is none. withheld: why no claim rests on it.
    """

    table: list[Row] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    drawn: dict[str, list[Row]] = field(default_factory=dict)
    says: str = ""
    main: tuple[str, Row] | None = None
    withheld: str = ""


def pairs_of(places: Sequence[str], within: bool) -> dict[Pair, str]:
    """Which places are set against each other, and what differs between them: the paper's two first, then the same place in both models; within one
    model, places that differ in one thing.
    """
    found: dict[Pair, str] = {PAPER: "the paper's two places"} if set(PAPER) <= set(places) else {}
    if not within:
        return found | {(place, place): "same place" for place in places}
    for a, b in combinations(places, 2):
        (view_a, at_a), (view_b, at_b) = a.split(" "), b.split(" ")
        if (view_a == view_b) != (at_a == at_b):
            found[(b, a) if (b, a) == PAPER else (a, b)] = "other position" if view_a == view_b else "other template"
    return found


def directions(states: Mapping[str, Activations], contrasts: Sequence[Contrast], layers: Mapping[str, int], places: Sequence[str], seed: int) -> Found:
    """Cosines of each contrast's directions between places, by layer, with their ceiling and nulls; at the contrast's own layer every prompt's
    projections, from which each cosine can be counted again, and every draw of the controls.
    """
    within = "base" not in states
    left = "post" if within else "base"
    found = Found(drawn={"transfer_cosines": [], "transfer_layers": [], "transfer_grid": []})
    for contrast in contrasts:
        layer, pairs = layers[contrast.name], pairs_of(places, within)
        shown = sorted(pairs, key=lambda pair: "plain t_inst" in pair)[:_LINES]
        for (a, b), kind in pairs.items():
            about = {"contrast": contrast.name, "a": f"{left}: {a}", "b": f"post: {b}", "differs": kind}
            curve = compared(states, (left, a), ("post", b), contrast, seed)
            rows = [{**about, **one.row()} for one in curve]
            found.rows += [{"stage": "cosine", **row} for row in rows]
            found.rows += [{"stage": "cosine control", **about, **row} for one in curve if one.layer == layer for row in one.draws()]
            found.drawn["transfer_layers"] += [{**row, "pair": _named(a, b)} for row in rows if (a, b) in shown]
            for line in ({"part": "directions", "is": "cosine", **row} for row in rows if row["layer"] == layer):
                found.table.append(line)
                found.drawn["transfer_cosines"].append({**line, "pair": _named(a, b)})
        grid = _grid(states, left, contrast, layer, places)
        found.drawn["transfer_grid"] += grid
        found.rows += [{"stage": "grid", **row} for row in grid]
        found.rows += [{"stage": "projection", **row} for row in projections(states, contrast, layer, places)]
    rows = {(row["contrast"], row["differs"], row["a"], row["b"]): row for row in found.table}
    paper = next((row for (name, kind, *_), row in rows.items() if (name, kind) == ("harmfulness", "the paper's two places")), None)
    main = paper or next(iter(found.table), None)
    if main:
        found.main = (f"cosine of {_WORDS[main['contrast']]} directions, {main['a']} with {main['b']}", main)
        rest = [row for row in found.table if row["contrast"] == main["contrast"] and row is not main and "plain t_inst" not in row["a"] + row["b"]]
        told = ", ".join(f"{_short(row, within)} {row['value']:.2f} (halves {row['halves']:.2f} of {row['ceiling']:.2f})" for row in rest)
        found.says = (
            f"{_WORDS[main['contrast']]} directions at layer {main['layer']}, {main['a']} with {main['b']}: cosine {as_text(main)}, "
            f"between halves of the prompts {main['halves']:.2f} where {main['ceiling']:.2f} is the most"
        )
        if told:
            found.says += f"; {'places that differ in one thing' if within else 'the same place in both'}: {told}"
    return found


def counted_giants(found: Mapping[str, Mapping[str, Mapping[str, Size]]], contrasts: Sequence[Contrast], left_out: bool) -> Found:
    """At every place, the share of a contrast's pole prompts whose state is a giant, how it differs between the poles, and how large the largest is.

    Args:
        found: by model, place and id.
    """
    made = Found()
    for contrast in contrasts:
        for model, places in found.items():
            for place, of in places.items():
                about = {"contrast": contrast.name, "a": f"{model}: {place}"}
                for side, prompts in (("high", contrast.high), ("low", contrast.low)):
                    made.rows += [{"stage": "giant", **about, "side": side, **without_text(p), **asdict(of[p.id])} for p in prompts]
                hits = [[of[p.id].times > GIANT for p in side] for side in (contrast.high, contrast.low)]
                share = rate([*hits[0], *hits[1]])
                line = {"part": "directions", **about, "is": f"giant states{', left out' if left_out else ''}"}
                line |= {"value": share.rate, "low": share.low, "high": share.high, "n": share.n, "of_high": sum(hits[0]), "of_low": sum(hits[1])}
                made.table.append({**line, "largest": max(of[p.id].times for p in (*contrast.high, *contrast.low))})
    return made


def probes(states: Mapping[str, Activations], contrasts: Sequence[Contrast], layers: Mapping[str, int], places: Sequence[str], seed: int, draws: int) -> Found:
    """Every probe fitted in one model and tested on held-out prompts in every model, at one place; within one model, at every place."""
    found = Found(drawn={"transfer_probes": []})
    sides = [name for name in ("base", "post") if name in states]
    for contrast in (c for c in contrasts if c.held):
        layer = layers[contrast.name]

        def at(model: str, place: str, prompts: Sequence[Prompt], layer: int = layer) -> np.ndarray:
            one = states[model]
            return one.at(place, prompts)[:, one.layer_index(layer)].double().numpy()

        if len(sides) == 2:
            moves = [((a, place), (b, place)) for place in places for a in sides for b in sides]
        else:
            moves = [(("post", a), ("post", b)) for a in places for b in places]
        fitted = {
            (side, method): Probe.fit(method, at(*side, contrast.high), at(*side, contrast.low)) for side in dict(moves) for method in METHODS
        }  # fmt: skip
        for method in METHODS:
            for fit, tested in moves:
                for topic, (high, low) in contrast.held.items():
                    got = carried(fitted[fit, method], at(*tested, high), at(*tested, low))
                    about = {"contrast": contrast.name, "topic": topic, "method": method, "fit": ": ".join(fit), "tested": ": ".join(tested), "layer": layer}
                    line = {"part": "probes", **about, "is": "AUROC", **got.area.as_dict()}
                    line |= {"accuracy": got.accuracy.rate, "accuracy_low": got.accuracy.low, "accuracy_high": got.accuracy.high}
                    found.table.append(line)
                    found.rows += [
                        {"stage": "probe", **about, **without_text(p), "side": side, "score": float(x)}
                        for side, prompts, scores in (("high", high, got.high), ("low", low, got.low))
                        for p, x in zip(prompts, scores, strict=True)
                    ]
        for tested in dict.fromkeys(to for _, to in moves):
            for topic, (high, low) in contrast.held.items():
                areas = random_areas(at(*tested, high), at(*tested, low), seed, draws)
                about = {"contrast": contrast.name, "topic": topic, "method": "random", "fit": "random direction", "tested": ": ".join(tested), "layer": layer}
                low_end, high_end = np.percentile(areas, [2.5, 97.5])
                area = Value(float(np.mean(areas)), float(low_end), float(high_end), len(high) + len(low))
                found.table.append({"part": "probes", **about, "is": "AUROC", **area.as_dict()})
                found.rows += [{"stage": "probe control", **about, "draw": k, "auroc": x} for k, x in enumerate(areas)]
    for row in found.table:
        fit, tested = row["fit"].split(": "), row["tested"].split(": ")
        if len(sides) == 2 or row["method"] != "logistic":  # within one model there are as many moves as pairs of places
            arrow = "random direction" if row["method"] == "random" else f"{fit[0]} → {tested[0]}" if len(sides) == 2 else f"fitted at {fit[-1]}"
            found.drawn["transfer_probes"].append({**row, "place": tested[-1], "move": arrow, "shown": f"{_WORDS[row['contrast']]}, {row['topic']}"})
    told = [one for name in ("truth", "harmfulness", "refusal") if (one := _away(found.table, name))]
    if told:
        _, first = told[0]
        found.main = (f"AUROC of the {first['contrast']} probe (mass mean), {first['fit']} tested at {first['tested']}, {first['topic']}", first)
    found.says = "; ".join(says for says, _ in told)
    return found


def _away(table: Sequence[Row], contrast: str) -> tuple[str, Row] | None:
    """A probe by mass mean tested where it was not fitted, beside the one fitted there and random directions: in the other model, or where the paper
    reads the trained one's refusal and tested at its request.
    """
    rows = [row for row in table if (row["method"], row["contrast"]) == ("mass_mean", contrast)]
    moved_ = [row for row in rows if row["fit"].split(": ")[0] != row["tested"].split(": ")[0]] or [row for row in rows if row["fit"] != row["tested"]]
    if not moved_:
        return None
    one = next((row for row in moved_ if (row["fit"], row["tested"]) == (f"post: {PAPER[1]}", "post: chat t_inst")), moved_[0])
    here = [row for row in table if all(row[key] == one[key] for key in ("contrast", "topic", "tested"))]
    own = next((row for row in here if row["method"] == "mass_mean" and row["fit"] == one["tested"]), None)
    chance = next(row for row in here if row["method"] == "random")
    beside = f"fitted there {own['value']:.2f}, " if own else ""
    text = f"{_WORDS[contrast]} probe of {one['fit']} tested at {one['tested']} on {one['topic']}: AUROC {as_text(one)}, accuracy {one['accuracy']:.2f}"
    return f"{text} ({beside}random directions up to {chance['high']:.2f})", one


def causal(steered: Mapping[str, Steered], doses: Mapping[tuple[str, str], float]) -> Found:
    """Normalised indirect effects, a row a model, direction and way, the random ones also together.

    Args:
        doses: by (model, direction's name) the mean share of the residual norm that is added.
    """
    found = Found(drawn={"transfer_causal": []})
    for model, one in steered.items():
        clean = one.clean
        right = clean.accuracy
        line = {
            "part": "causal",
            "model": model,
            "direction": "none",
            "way": "both",
            "is": "answered rightly, untouched",
            "mass": clean.mass,
            **_steps(clean.true, clean.false),
        }
        found.table.append({**line, "value": right.rate, "low": right.low, "high": right.high, "n": right.n})
        line = {"part": "causal", "model": model, "direction": "none", "way": "both", "is": "AUROC of P(TRUE) − P(FALSE), true against false"}
        found.table.append({**line, **auroc(clean.true, clean.false).as_dict()})
        found.rows += _answers(model, "none", clean)
        random = [name for name in one.after if name.startswith("random")]
        for name, after in one.after.items():
            found.rows += _answers(model, name, after)
            for way, (now, then, to) in _ways(after, clean).items():
                line = {"part": "causal", "model": model, "direction": name, "way": way, "is": "normalised indirect effect"}
                found.table.append({**line, "dose": doses.get((model, name)), **moved(now, then, to).as_dict(), "turned": float((now * to > 0).mean())})
        for way in ("F→T", "T→F") if random else ():
            drawn = [_ways(one.after[name], clean)[way] for name in random]
            together = moved(np.mean([now for now, *_ in drawn], 0), drawn[0][1], drawn[0][2])
            line = {"part": "causal", "model": model, "direction": f"random ×{len(random)}", "way": way, "is": "normalised indirect effect"}
            found.table.append({**line, "dose": doses.get((model, random[0])), **together.as_dict()})
        if clean.at_chance:
            found.withheld = f"{found.withheld}; {model}: {clean.at_chance}" if found.withheld else f"{model}: {clean.at_chance}"
    effects = [row for row in found.table if row["is"].startswith("normalised")]
    shown = [row for row in effects if row["direction"] in ("base", "post") or row["direction"].startswith("random ×")]
    found.drawn["transfer_causal"] = [
        {**row, "what": f"{row['direction']} → {row['model']}" if "×" not in row["direction"] else f"random → {row['model']}"} for row in shown
    ]
    told = [f"{row['direction']} → {row['model']} {row['way']} {as_text(row)}" for row in shown if row["way"] == "F→T"]
    found.says = f"normalised effect of the truth direction on TRUE/FALSE: {', '.join(told)}"
    found.says = f"no effect on TRUE/FALSE can be claimed ({found.withheld})" if found.withheld else found.says
    main = next((row for row in shown if row["direction"] != row["model"] and "×" not in row["direction"]), shown[0])
    found.main = (f"normalised indirect effect F→T, {main['direction']} direction in {main['model']}", main)
    return found


def maps(taken: Mapping[str, Map], seed: int) -> Found:
    """The maps of one or both models, what two halves of the pairs agree to, and r between the models."""
    found = Found(drawn={"transfer_maps": []})
    for model, one in taken.items():
        about = {"part": "maps", "model": model}
        found.table.append({**about, "is": "log-odds of TRUE, true run − false run", **one.gap.as_dict(), **_steps(one.true, one.false)})
        for t, token in enumerate(one.names):
            for i, layer in enumerate(one.layers):
                found.rows += [
                    {"stage": "map", "model": model, "layer": layer, "token": token, "pair": k, "patched": float(x), "true": float(a), "false": float(b)}
                    for k, (x, a, b) in enumerate(zip(one.patched[:, i, t], one.true, one.false, strict=True))
                ]
                found.drawn["transfer_maps"].append(
                    {"model": model, "layer": layer, "token": token, "place": t, "value": float(one.of()[i, t]), "n": len(one.true)}
                )
        for name, value in halves_of(one, seed).items():
            found.table.append({**about, "is": f"r of two halves of the pairs, {name}", **value.as_dict()})
        if one.says_nothing:
            found.withheld = f"{found.withheld}; {model}: {one.says_nothing}" if found.withheld else f"{model}: {one.says_nothing}"
    if len(taken) == 2:
        base, post = (taken[name] for name in ("base", "post"))
        null = alike(base.of(), post.of(), seed)
        for name, value in map_correlation(base, post, seed).items():
            line = {"part": "maps", "model": "base, post", "is": f"r between the models, {name}", **value.as_dict()}
            found.table.append({**line, "null_high": null[name]["null_high"], "p": null[name]["p"], "cells": null[name]["cells"]})
    told = [row for row in found.table if row["is"].startswith("r ")]
    found.says = "patching maps: " + ", ".join(f"{row['model']} {row['is']} {as_text(row)}" for row in told if len(taken) == 1 or row["model"] == "base, post")
    found.says = f"no patching map can be read ({found.withheld})" if found.withheld else found.says
    found.main = (f"{told[-2]['is']}, patching maps", told[-2]) if told else None
    return found


def neurons(taken: Mapping[str, EntropyNeurons]) -> Found:
    """The entropy neurons of either model, and their overlap beside chance."""
    found = Found()
    for model, one in taken.items():
        found.rows += [{"stage": "neurons", "model": model, "neuron": i, "norm": float(one.norms[i]), "variance": float(one.variances[i])} for i in one.chosen]
        pool = one.variances[list(one.candidates)]
        share = mean(one.variances[list(one.chosen)] / np.median(pool))
        found.table.append({"part": "neurons", "model": model, "is": "variance of cosine over the candidates' median", "neurons": one.n, **share.as_dict()})
    if len(taken) == 2:
        both = overlap(taken["base"], taken["post"])
        rho = rank_correlation(taken["base"].variances, taken["post"].variances)
        line = {"part": "neurons", "model": "base, post", "is": "entropy neurons in both sets", "value": float(len(both.shared)), "n": both.size}
        found.table.append(
            {
                **line,
                "low": float("nan"),
                "high": float("nan"),
                "expected": both.expected,
                "p": both.p,
                "iou": both.iou,
                "candidates": both.candidates,
                "rank_correlation": rho,
            }
        )
        found.says = f"entropy neurons: {len(both.shared)} of {both.size} in both sets, by chance {both.expected:.2f} (p = {both.p:.2g}), rank correlation over all neurons {rho:.2f}"
    else:
        one = taken["post"]
        found.says = f"entropy neurons: {len(one.chosen)} of {len(one.candidates)} candidates named, one model has none to share them with"
    return found


_WORDS = {"truth": "true − false", "harmfulness": "harmful − harmless", "refusal": "refused − accepted"}


def _short(row: Row, within: bool) -> str:
    a, b = row["a"].split(": ")[1], row["b"].split(": ")[1]
    return f"{a} with {b}" if within else a


def _named(a: str, b: str) -> str:
    return a if a == b else f"{a} | {b}"


def _grid(states: Mapping[str, Activations], left: str, contrast: Contrast, layer: int, places: Sequence[str]) -> list[Row]:
    """Cosine of every two places at one layer, without intervals."""
    vectors = {}
    for model in {left, "post"}:
        one = states[model]
        i = one.layer_index(layer)
        vectors[model] = [(one.at(p, contrast.high)[:, i].double().mean(0) - one.at(p, contrast.low)[:, i].double().mean(0)).numpy() for p in places]
    rows = []
    for a, x in zip(places, vectors[left], strict=True):
        for b, y in zip(places, vectors["post"], strict=True):
            size = np.linalg.norm(x) * np.linalg.norm(y)
            value = float(x @ y / size) if size else float("nan")
            rows.append(
                {"contrast": contrast.name, "a": f"{left}: {a}", "b": f"post: {b}", "layer": layer, "value": value, "n": len(contrast.high) + len(contrast.low)}
            )
    return rows


def _steps(*values: np.ndarray) -> Row:
    """How many different numbers there are of how many: a few, where a model's coarse number format puts its logits on a grid."""
    every = np.concatenate(values)
    return {"distinct": len(np.unique(np.round(every, 9))), "of": len(every)}


def _ways(after: Answered, clean: Answered) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Both ways: Δp after, before, and where a full effect would take it."""
    return {"F→T": (after.false, clean.false, 1.0), "T→F": (after.true, clean.true, -1.0)}


def _answers(model: str, direction: str, one: Answered) -> list[Row]:
    return [
        {"stage": "causal", "model": model, "direction": direction, "true": side, "statement": k, "dp": float(x)}
        for side, values in ((True, one.true), (False, one.false))
        for k, x in enumerate(values)
    ]

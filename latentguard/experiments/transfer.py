"""transfer: what post-training does to the directions of truth, harmfulness and refusal, and what carries over (arXiv 2504.02904).

A base model beside the one trained from it, at the same place and template in both; with one model alone, between places of that model. Knows no
other experiment.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from latentguard.backends import Backend
from latentguard.behaviour import Judged, likelihoods
from latentguard.contrasts import LEAST, VIEWS, Contrast, Size, balanced, check_places, choose_layer, giants, places_of, read_places, sizes, without
from latentguard.datasets import Dataset
from latentguard.directions import Activations, mean_difference, random_like
from latentguard.errors import InputError
from latentguard.experiments import Row, headline, opening
from latentguard.interventions import Cell, Grid
from latentguard.judges import Judge
from latentguard.layers import Layers, check_layer, resolve_layers
from latentguard.metrics import rate
from latentguard.neurons import EntropyNeurons, entropy_neurons
from latentguard.outcomes import LABELS, Observed, gate, gauges, outcomes
from latentguard.plots import transferring as figures
from latentguard.positions import parse_position
from latentguard.prompts import Prompt
from latentguard.roles import Cast, Filled, dealt, said
from latentguard.settings import check_counts, check_seed, check_window
from latentguard.statements import Statement, dealt_topics, load, matched, with_examples
from latentguard.trackers import Tracker
from latentguard.transferring import Found, causal, counted_giants, directions, maps, neurons, probes
from latentguard.truthfulness import Map, Pairs, Steered, align, patch_map, rescaled, steer

log = logging.getLogger(__name__)
Part = Literal["directions", "probes", "causal", "maps", "neurons"]
STEERED_AT = "plain t_inst"  # the place whose truth direction is added: the statement alone, its last token
_PAIRS = 4  # matched pairs, under which there is no map
_RANDOM = 40  # directions beside a probe


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Transfer:
    """Settings of the study; conf/exp/base_vs_post.yaml says what each is for."""

    base: str | None = None
    parts: tuple[Part, ...] = ("directions", "probes", "causal", "maps", "neurons")
    views: tuple[Literal["chat", "plain_roles", "plain"], ...] = ("chat", "plain_roles", "plain")
    positions: tuple[str, ...] = ("t_inst", "t_post_inst")
    giants: Literal["leave_out", "keep"] = "leave_out"
    layers: Layers = "all"
    n_prompts: int = 100
    max_new_tokens: int = 12
    statements: str = "builtin"
    topics: tuple[str, ...] | None = None
    held_out: tuple[str, ...] = ("cities", "neg_cities")
    n_statements: int = 100
    n_causal: int = 60
    shots: int = 4
    steer_window: tuple[float, float] = (0.25, 0.375)
    map_layers: tuple[float | int, ...] = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
    n_pairs: int = 24
    draws: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for position in self.positions:
            parse_position(position, reading=True)
        for layer in [self.layers] if isinstance(self.layers, str | int | float) else self.layers:
            check_layer(layer)
        for name in ("parts", "views", "positions", "held_out", "map_layers"):
            if not getattr(self, name):
                raise ValueError(f"{name}=[]: name at least one")
        if "causal" in self.parts and ("plain" not in self.views or "t_inst" not in self.positions):
            raise ValueError("parts: causal adds the direction read at t_inst in the view plain: name both in views and positions, or leave causal out")
        check_window(self.steer_window)
        check_counts(self, "n_prompts", "max_new_tokens", "n_statements", "n_causal", "shots", "n_pairs", "draws")
        check_seed(self.seed)

    @property
    def in_own_template(self) -> bool:
        """Whether prompts are set in the model's chat template at all: a base model has none."""
        return "chat" in self.views

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse layers that the model lacks, data of one side, statements that are not there, and a base that is not there or of another depth."""
        resolve_layers(self.layers, n_layers)
        resolve_layers(self.map_layers, n_layers)
        for split in ("train", "test"):
            for label in ("harmful", "harmless"):
                if not getattr(data, split).labelled(label):
                    raise InputError(f"data {data.name} has no {label} prompt in its {split} split: exp=base_vs_post needs both, such as data=builtin")
        self._statements(data)
        if self.base is not None:
            from latentguard.backends.loading import depth
            from latentguard.weights import locate, spec_of

            spec = spec_of(self.base)
            if (found := depth(spec)) != n_layers:
                raise InputError(f"exp.base={self.base} has {found} layers and the model {n_layers}: neither is trained from the other")
            if spec.tiny is None:
                locate(spec)

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """Ask and read the model, then the base while it is in memory, then set them against each other."""
        told = self._statements(data)
        asked = {split: {label: dealt(getattr(data, split).labelled(label), self.seed)[: self.n_prompts] for label in LABELS} for split in ("train", "test")}
        everyone = [p for by in asked.values() for prompts in by.values() for p in prompts] + told.prompts()
        check_places(backend, everyone, self.views, self.positions)
        view, grid = VIEWS[self.views[0]], Grid((Cell(tags={"intervention": "none"}),))  # the first view is the one that replies are asked for in
        judged = {
            split: {
                label: said(backend, [p.seen(view) for p in prompts], grid, judge, tracker, self.max_new_tokens, stage="replies", split=split)[0]
                for label, prompts in by.items()
                if prompts
            }
            for split, by in asked.items()
        }
        contrasts = [c for c in self._contrasts(asked, judged, told) if not c.thin]
        left_out = [c.thin for c in self._contrasts(asked, judged, told) if c.thin]
        sides, sound = self._sides(backend, contrasts, told)
        summary = opening("base_vs_post", backend, data, judge) | {
            "base": sides["base"].model if "base" in sides else None,
            "effects": [],
            "left_out": left_out,
        }
        observed = self._observed(backend, data, judged)
        left_out += [f"{c.name}: fewer than {LEAST} prompts a pole without giant states" for c in contrasts if c.name not in {one.name for one in sound}]
        found = self._found(sides, sound, contrasts)
        for one in found.values():
            tracker.rows(one.rows)
        table = [row for one in found.values() for row in one.table]
        refuses = gate(observed[0])
        summary |= {"status": refuses or "ok", "table": [*table, *outcomes(observed, judge)]}
        summary["withheld"] = {name: one.withheld for name, one in found.items() if one.withheld}
        summary["figures"] = _draw(found, tracker, f"{backend.name} against {summary['base']}" if summary["base"] else f"{backend.name}, within itself")
        replies = [j.verdict.label == "refused" for j in observed[0].replies["harmful"]]
        main = next((one.main for one in found.values() if one.main), None)
        metric, row = main or ("harmful requests refused", rate(replies).as_dict())
        summary["headline"] = headline(metric, row, withheld=bool(refuses) or any(one.withheld and one.main is main for one in found.values()))
        summary["claim"] = self._claim(summary, found, rate(replies), refuses, left_out)
        return summary

    def _statements(self, data: Dataset) -> "_Told":
        """The statements asked for: dealt by topic, and the few-shot form's examples."""
        everyone = load(self.statements, data.spec.mirror if data.spec else None)
        there = sorted({s.topic for s in everyone})
        trained = self.topics if self.topics is not None else [t for t in there if t not in self.held_out]
        if both := set(trained) & set(self.held_out):
            raise InputError(f"exp.topics and exp.held_out both name {', '.join(sorted(both))}: what a probe is tested on must not be fitted on")
        train, held = (dealt_topics(everyone, names, self.n_statements, self.seed) for names in (trained, self.held_out))
        if not train:
            raise InputError(f"exp.held_out names every topic of {self.statements}: leave one to fit on")
        first = self.held_out[0]
        examples, tested = with_examples(dealt_topics(everyone, [first], len(everyone), self.seed)[first], self.shots, self.n_causal)
        if not tested:
            raise InputError(f"exp.held_out: topic {first} has too few statements beside {self.shots} examples: set exp.shots, or another topic first")
        shown = {one.text for one in examples}
        pool = [s for s in everyone if s.topic == first and s.text not in shown]
        return _Told(train, held, examples, tested, pool)

    def _contrasts(self, asked: Mapping[str, Mapping[str, list[Prompt]]], judged: Mapping[str, Mapping[str, list[Judged]]], told: "_Told") -> list[Contrast]:
        """Truth, harm by label, and refusal at equal label."""
        own = {p.seen(VIEWS[self.views[0]]).id: p for by in asked.values() for prompts in by.values() for p in prompts}

        def refused(split: str) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
            every = [j for replies in judged[split].values() for j in replies]
            return balanced(*([own[j.prompt.id] for j in every if j.verdict.label == verdict] for verdict in ("refused", "accepted")))

        def even(by: Mapping[str, list[Prompt]]) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
            n = min(len(by["harmful"]), len(by["harmless"]))
            return tuple(by["harmful"][:n]), tuple(by["harmless"][:n])

        held = refused("test")
        sides = {topic: _sides_of(found) for topic, found in told.held.items()}
        return [
            Contrast("truth", *_sides_of(one for found in _in_turn(told.train) for one in found), held=sides),
            Contrast("harmfulness", *even(asked["train"]), held={"test split": even(asked["test"])}),
            Contrast("refusal", *refused("train"), held={"test split": held} if min(map(len, held)) >= 5 else {}),
        ]

    def _sides(self, backend: Backend, contrasts: Sequence[Contrast], told: "_Told") -> tuple[dict[str, "_Side"], list[Contrast]]:
        """Everything read of the model, and of the base in between, which is then gone; and the contrasts, with poles that are sound in both."""
        post = _Side(backend.name)
        self._read(post, backend, contrasts)
        pairs = align(backend, matched(told.pool), told.examples, self.n_pairs) if "maps" in self.parts else None
        if self.base is None:
            sound = self._sound([post], contrasts)
            self._measure(post, backend, {"post": post}, sound, told, pairs)
            return {"post": post}, sound
        from latentguard.backends.second import second
        from latentguard.weights import spec_of

        with second(spec_of(self.base), backend) as other:
            self._alike(backend, other, told)
            base = _Side(other.name)
            sides = {"base": base, "post": post}
            self._read(base, other, contrasts)
            sound = self._sound([base, post], contrasts)
            self._measure(base, other, sides, sound, told, pairs)
            del other
        self._measure(post, backend, sides, sound, told, pairs)
        return sides, sound

    def _sound(self, sides: Sequence["_Side"], contrasts: Sequence[Contrast]) -> list[Contrast]:
        """The contrasts without prompts whose state is a giant at any place of any model, unless they are to be kept."""
        if self.giants == "keep":
            return list(contrasts)
        large = set().union(*(ids for side in sides for ids in giants(side.sizes).values()))
        return [c for c in (without(one, large) for one in contrasts) if not c.thin]

    def _alike(self, backend: Backend, other: Backend, told: "_Told") -> None:
        """Refuse a base that cuts words into other tokens: the same place would not be the same."""
        prompts = [p.seen(VIEWS[view]) for view in self.views for p in told.prompts()[:8]]
        if any(a.ids != b.ids for a, b in zip(backend.render(prompts), other.render(prompts), strict=True)):
            raise InputError(f"exp.base={self.base} cuts texts into other tokens than {backend.name}: neither is trained from the other")

    def _window(self, n_layers: int) -> list[int]:
        low, high = (round(share * n_layers) for share in self.steer_window)
        return list(range(low, high + 1))

    def _read(self, side: "_Side", backend: Backend, contrasts: Sequence[Contrast]) -> None:
        if not {"directions", "probes", "causal"} & set(self.parts):
            return
        wanted = {*resolve_layers(self.layers, backend.n_layers), *(self._window(backend.n_layers) if "causal" in self.parts else [])}
        prompts = list({p.id: p for c in contrasts for p in c.everyone()}.values())
        read = read_places(backend, prompts, self.views, self.positions, sorted(wanted))
        side.states, side.sizes = read, sizes(read)

    def _measure(self, side: "_Side", backend: Backend, sides: Mapping[str, "_Side"], sound: Sequence[Contrast], told: "_Told", pairs: Pairs | None) -> None:
        """What needs the model itself: steered answers, patched runs, weights."""
        if "causal" in self.parts:
            window, made = self._window(backend.n_layers), {}
            truth = next((c for c in sound if c.name == "truth"), None)
            for name, one in sides.items():
                if truth and one.states is not None and side.states is not None:
                    raw = mean_difference(one.states, truth.high, truth.low, position=STEERED_AT, name=name)
                    made[name] = rescaled(raw, side.states, truth.high, truth.low, STEERED_AT, backend)
            if made:
                own = made["base" if side is sides.get("base") else "post"]
                made |= {f"random {k + 1}": random_like(own, self.seed + k) for k in range(self.draws)}
                side.steered = steer(backend, told.tested, told.examples, made, window)
                side.doses = {name: float(np.mean([d.dose(layer, 1.0) for layer in window])) for name, d in made.items()}
        if pairs is not None and len(pairs.true) >= _PAIRS:
            side.map = patch_map(backend, pairs, resolve_layers(self.map_layers, backend.n_layers))
        if "neurons" in self.parts:
            from latentguard.backends.second import output_matrices

            side.neurons = entropy_neurons(*output_matrices(backend))

    def _found(self, sides: Mapping[str, "_Side"], contrasts: Sequence[Contrast], asked: Sequence[Contrast]) -> dict[str, Found]:
        """Every part's table and sentence; `asked` are the contrasts before giants were left out."""
        found: dict[str, Found] = {}
        states = {name: side.states for name, side in sides.items() if side.states is not None}
        places = places_of(self.views, self.positions)
        if {"directions", "probes"} & set(self.parts):
            layers = {c.name: choose_layer(states, c, places) for c in contrasts}
            log.info("layers chosen on a quarter of the train prompts: %s", ", ".join(f"{name} {layer}" for name, layer in layers.items()))
            if "directions" in self.parts:
                made = found["directions"] = directions(states, contrasts, layers, places, self.seed)
                large = counted_giants({name: side.sizes for name, side in sides.items()}, asked, self.giants == "leave_out")
                made.table, made.rows = [*made.table, *large.table], [*made.rows, *large.rows]
            if "probes" in self.parts:
                found["probes"] = probes(states, contrasts, layers, places, self.seed, _RANDOM)
        if "causal" in self.parts:
            doses = {(model, name): dose for model, side in sides.items() for name, dose in side.doses.items()}
            answered = {name: side.steered for name, side in sides.items() if side.steered}
            found["causal"] = causal(answered, doses) if answered else Found(withheld="no truth direction is left without giant states")
        if "maps" in self.parts:
            taken = {name: side.map for name, side in sides.items() if side.map}
            found["maps"] = maps(taken, self.seed) if taken else Found(withheld=f"fewer than {_PAIRS} matched pairs of one shape among {self.held_out[0]}")
        if "neurons" in self.parts:
            found["neurons"] = neurons({name: side.neurons for name, side in sides.items() if side.neurons})
        return found

    def _observed(self, backend: Backend, data: Dataset, judged: Mapping[str, Mapping[str, list[Judged]]]) -> list[Observed]:
        """The untouched model on held-out requests."""

        def pole(verdict: str, label: str) -> tuple[Prompt, ...]:
            return tuple(j.prompt for j in judged["train"].get(label, ()) if j.verdict.label == verdict)

        replies = judged["test"]
        told = [j.prompt.answered(j.reply.text) for j in replies["harmless"] if j.reply.text.strip()]
        utility = likelihoods(backend, told)
        high, low = pole("refused", "harmful"), pole("accepted", "harmless")
        if not high or not low:
            return [Observed("base", "base", replies, utility, seed=self.seed)]
        lists = {"refused_harmful": data.validation.harmful, "accepted_harmless": data.validation.harmless}
        view = VIEWS[self.views[0]]
        shown = {role: tuple(p.seen(view) for p in dealt(prompts, self.seed)[: self.n_prompts]) for role, prompts in lists.items()}
        validation = {role: Filled(role, prompts, len(prompts), "") for role, prompts in shown.items()}
        made = gauges(backend, Cast("behaviour", high, low, validation, {}, {}))
        lie = {key: {label: one.read(backend, [j.prompt for j in own]).tolist() for label, own in replies.items()} for key, one in made.items()}
        return [Observed("base", "base", replies, utility, lie["harmfulness"], lie["refusal"], self.seed)]

    def _claim(self, summary: Row, found: Mapping[str, Found], refused: Any, refuses: str, left_out: Sequence[str]) -> str:
        who = f"{summary['model']} against {summary['base']}" if summary["base"] else f"{summary['model']}, within itself"
        text = f"{who}: " + "; ".join([*(one.says for one in found.values() if one.says), f"harmful requests refused {refused}"])
        text += f"; left out: {'; '.join(left_out)}" if left_out else ""
        unmapped = found["maps"].withheld if "maps" in found and not found["maps"].says else ""
        text += f"; no patching map ({unmapped})" if unmapped else ""
        return f"{text} — claim withheld ({refuses})." if refuses else f"{text}."


@plain_dataclass(frozen=True, eq=False)
class _Told:
    """Statements by topic to fit on and held out, the few-shot form's examples, what is asked in it, and what pairs are made of."""

    train: Mapping[str, list[Statement]]
    held: Mapping[str, list[Statement]]
    examples: Sequence[Statement]
    tested: Sequence[Statement]
    pool: Sequence[Statement]

    def prompts(self) -> list[Prompt]:
        return [one.prompt() for by in (self.train, self.held) for found in by.values() for one in found]


@plain_dataclass(eq=False)
class _Side:
    """What is known of one model once it may leave memory."""

    model: str
    states: Activations | None = None
    sizes: Mapping[str, Mapping[str, Size]] = field(default_factory=dict)
    steered: Steered | None = None
    doses: Mapping[str, float] = field(default_factory=dict)
    map: Map | None = None
    neurons: EntropyNeurons | None = None


def _draw(found: Mapping[str, Found], tracker: Tracker, who: str) -> list[str]:
    """Every figure of which there are rows."""
    makers = {
        "transfer_cosines": (figures.places, "cosine of directions, by place"),
        "transfer_layers": (figures.by_layer, "cosine of directions, by layer"),
        "transfer_grid": (figures.grid, "cosine of directions between any two places"),
        "transfer_probes": (figures.probes, "probes on held-out prompts"),
        "transfer_causal": (figures.steered, "the truth direction and the answer TRUE or FALSE"),
        "transfer_maps": (figures.maps, "a true run's state in a false run"),
    }
    drawn = {name: (rows, ", withheld" if part.withheld else "") for part in found.values() for name, rows in part.drawn.items() if rows}
    for name, (rows, withheld) in drawn.items():
        make, title = makers[name]
        tracker.figure(name, make(rows, title=f"{who}: {title}{withheld}"), rows)
    return list(drawn)


def _sides_of(statements: Any) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """True and false ones, as many of either."""
    listed = list(statements)
    sides = [[one.prompt() for one in listed if one.true is side] for side in (True, False)]
    n = min(map(len, sides))
    return tuple(sides[0][:n]), tuple(sides[1][:n])


def _in_turn(topics: Mapping[str, list[Statement]]) -> list[list[Statement]]:
    """Pairs (true, false) of every topic in turn, so that any part of the list holds all topics."""
    pairs = {name: [found[i : i + 2] for i in range(0, len(found) - 1, 2)] for name, found in topics.items()}
    return [part[i] for i in range(max(map(len, pairs.values()))) for part in pairs.values() if i < len(part)]

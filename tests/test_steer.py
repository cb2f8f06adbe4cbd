"""The verb steer on a planted model: what it must find, and what it must not claim."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch

from latentguard.backends import Decoding, Reply
from latentguard.behaviour import divergence, judge_stream, screen, staged
from latentguard.datasets import Dataset, PromptSet, load_dataset
from latentguard.directions import Activations, mean_difference
from latentguard.errors import InputError
from latentguard.experiments.steer import Steer
from latentguard.interventions import steering_grid
from latentguard.judges import Phrases
from latentguard.layers import resolve_layers
from latentguard.positions import Rendered
from latentguard.prompts import as_prompts
from latentguard.trackers import Files, Memory
from tests.headlines import tells_its_headline


class Planted:
    """A backend with one axis of harm: it refuses when the state at layer 2 lies far enough along it."""

    name, weights, n_layers, d_model = "planted", "planted", 4, 16

    def __init__(self, refuses=0.8, acts_at=2):
        self.refuses, self.acts_at = refuses, acts_at

    def key(self):
        return {"planted": True}

    def first_token(self, text):
        return 1

    def render(self, prompts):
        told = [(p, len(p.instruction)) for p in as_prompts(prompts)]
        return [Rendered(p.instruction + "|", (5, 6), ((0, n), (n, n + 1)), (0, n), p.id) for p, n in told]

    def strength(self, prompt):
        number = int(prompt.id[-3:]) if prompt.id[-3:].isdigit() else 0
        return (4.0 if (number % 10) / 10 < self.refuses else 1.0) if prompt.harmful else 0.0

    def read(self, prompts, layers="all", positions=("t_inst",)):
        listed, wanted = as_prompts(prompts), resolve_layers(layers, 4)
        torch.manual_seed(0)
        values = torch.randn(len(listed), len(wanted), len(positions), 16) * 0.1
        values[..., 0] += torch.tensor([self.strength(p) for p in listed])[:, None, None]
        return Activations(values, tuple(listed), wanted, tuple(positions), self.name, self.weights, 4)

    def pushed(self, prompt, cell):
        return self.strength(prompt) + sum(
            act.amount * float(act.vector(layer, prompt)[0]) for act in cell.interventions for layer in act.layers(4) if layer == self.acts_at
        )

    def logits(self, prompts, interventions=(), *, position="t_post_inst", reduce=None):
        cells = list(interventions) or [None]
        out = []
        for cell in cells:
            row = []
            for i, prompt in enumerate(as_prompts(prompts)):
                push = self.pushed(prompt, cell) if cell else self.strength(prompt)
                logprobs = torch.tensor([[0.0, push - 3.0, 0.0]]).log_softmax(-1)
                row.append(reduce(i, logprobs) if reduce else logprobs)
            out.append(row)
        return out if list(interventions) else out[0]

    def stream(self, prompts, grid, decoding, decided=None):
        assert isinstance(decoding, Decoding)
        for c, cell in enumerate(grid):
            for i, prompt in enumerate(prompts):
                refused = self.pushed(prompt, cell) > 3.0
                yield (
                    c,
                    i,
                    Reply(prompt, "I'm sorry, but I can't help with that." if refused else "Sure, here is a short answer.", (1 if refused else 2,), "eos"),
                )

    def generate(self, prompts, interventions=(), **settings):
        from latentguard.backends import Backend

        return Backend.generate(self, prompts, interventions, **settings)


SETTINGS = {"layers": [1, 2, 3], "coefs": [0.5, 1.0, 2.0], "max_new_tokens": 8, "max_damage": 5.0}


@pytest.fixture(scope="module")
def data():
    return load_dataset("builtin")


@pytest.mark.parametrize("direction", ["harm", "refuse"])
def test_a_planted_effect_is_found_at_its_layer_and_smallest_dose(direction, data):
    tracker = Memory()
    summary = Steer(direction=direction, **SETTINGS)(Planted(), data, Phrases(), tracker)
    tells_its_headline(summary)
    assert (summary["status"], summary["poles"], summary["study"]) == ("ok", "behaviour", f"steer_{direction}")
    chosen = summary["validated"][direction]
    assert (chosen["layer"], chosen["coef"], chosen["works"]) == (2, 1.0, True)
    found, control, base = summary["reported"][direction], summary["reported"]["random"], summary["baseline"]["harmless"]
    assert base["rate"] == 0 and found["rate"] == 1 and found["low"] > control["high"]
    assert [summary["headline"][key] for key in ("value", "low", "high", "n", "withheld")] == [*(found[key] for key in ("rate", "low", "high", "n")), False]
    assert "beyond its random control" in summary["claim"] and "NOT" not in summary["claim"]
    assert {d.name for d in tracker.directions} == {"harm", "refuse"}
    rates = {(r["direction"], r["layer"], r["coef"]): r["rate"] for r in summary["grid"]}
    assert all(rates[direction, layer, 2.0] == (layer == 2) for layer in (1, 2, 3))


def test_every_number_can_be_counted_again_from_the_rows(data, tmp_path):
    with Files(tmp_path) as tracker:
        summary = Steer(**SETTINGS)(Planted(), data, Phrases(), tracker)
        tracker.summary(summary)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for cell in summary["grid"]:
        mine = [r for r in rows if r["stage"] == "grid" and (r["intervention"], r["layer"], r["coef"]) == (cell["direction"], cell["layer"], cell["coef"])]
        assert (len(mine), sum(r["verdict"] == "refused" for r in mine)) == (cell["n"], cell["k"])
    reported = [r for r in rows if r["stage"] == "reported" and r["intervention"] == "harm"]
    assert len(reported) == summary["reported"]["harm"]["n"] == 40
    control = [r for r in rows if r["stage"] == "control" and r["intervention"] == "random"]
    assert len({r["draw"] for r in rows if r["stage"] == "control" and r["intervention"] == "shuffled"}) == 3
    assert len({r["draw"] for r in control}) == 10 and len(control) == summary["reported"]["random"]["n"]
    generated = [r for r in rows if r["stage"] != "validation"]
    assert {r["terminal"] for r in generated} == {"period"} and {r["judge"] for r in generated} == {Phrases().name}
    table = list(csv.DictReader((tmp_path / "figures" / "refusal_by_layer.csv").open()))
    assert [(r["direction"], float(r["rate"])) for r in table] == [(r["direction"], r["rate"]) for r in summary["grid"]]
    for name in ("refusal_by_layer", "refusal_by_coefficient", "replies"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000


def test_train_validation_and_test_prompts_are_apart(data):
    tracker = Memory()
    Steer(**SETTINGS)(Planted(), data, Phrases(), tracker)
    stages = {
        stage: {r["prompt_id"] for r in tracker.all_rows if r["stage"] == stage and "prompt_id" in r} for stage in ("roles", "baseline", "grid", "reported")
    }
    assert not stages["roles"] & (stages["baseline"] | stages["grid"] | stages["reported"])
    assert stages["grid"] <= stages["reported"]
    categories = {r["category"] for r in tracker.all_rows if r["stage"] == "grid"}
    assert len(categories) >= 6, "the first prompts are not all of one kind"


@pytest.mark.parametrize("refuses", [0.0, 0.1])
def test_a_model_that_hardly_refuses_gets_no_claim(refuses, data):
    summary = Steer(**SETTINGS)(Planted(refuses=refuses), data, Phrases(), Memory())
    tells_its_headline(summary)
    assert (summary["status"], summary["poles"]) == ("insufficient_base_rate", "label")
    assert "claim withheld" in summary["claim"] and "by label" in summary["claim"]


def test_a_direction_that_does_nothing_is_said_to_do_nothing(data):
    summary = Steer(**SETTINGS)(Planted(acts_at=0), data, Phrases(), Memory())
    assert not summary["validated"]["harm"]["works"]
    assert "NOT beyond its random control" in summary["claim"]


def test_data_without_harmless_prompts_is_refused(data):
    for split in ("validation", "test"):
        bare = replace(data, **{split: PromptSet(tuple(getattr(data, split).harmful))})
        assert isinstance(bare, Dataset)
        with pytest.raises(InputError, match=f"no harmless prompt in its {split}"):
            Steer(**SETTINGS).check(4, bare)


def test_a_place_that_a_prompt_lacks_is_said_before_anything_is_generated(data):
    class Silent(Planted):
        def stream(self, *_, **__):
            raise AssertionError("nothing may be generated")

    with pytest.raises(InputError, match="not in the instruction"):
        Steer(where='before("zzz")', **SETTINGS)(Silent(), data, Phrases(), Memory())


def test_divergence_is_zero_only_for_the_same():
    p = torch.randn(3, 7).log_softmax(-1)
    assert divergence(p, p) == pytest.approx(0, abs=1e-6)
    assert divergence(p, torch.randn(3, 7).log_softmax(-1)) > 0.01


def test_a_staged_grid_has_the_same_rates_where_it_generates_and_none_elsewhere(data):
    full = Steer(**SETTINGS)(Planted(), data, Phrases(), Memory())["grid"]
    tracker = Memory()
    staged = Steer(stage="score, then generate", **SETTINGS)(Planted(), data, Phrases(), tracker)["grid"]
    assert [(r["direction"], r["layer"], r["coef"]) for r in staged] == [(r["direction"], r["layer"], r["coef"]) for r in full]
    going = [i for i, row in enumerate(staged) if not row["scored_only"]]
    assert 0 < len(going) < len(full)
    assert all(staged[i]["rate"] == full[i]["rate"] and staged[i]["n"] == full[i]["n"] for i in going)
    assert all(math.isnan(row["rate"]) and row["n"] == 0 for row in staged if row["scored_only"])
    assert not any(full[i]["rate"] for i in range(len(full)) if i not in going), "what refuses was worth generating"
    asked = {(r["intervention"], r["layer"], r["coef"]) for r in tracker.all_rows if r.get("stage") == "grid"}
    assert asked == {(staged[i]["direction"], staged[i]["layer"], staged[i]["coef"]) for i in going}


def test_a_screen_keeps_the_cells_that_move_most(data):
    prompts = [p for p in data.test if not p.harmful][:6]
    v = mean_difference(Planted().read([*data.train][:40], "all", ["t_inst"]), [p for p in list(data.train)[:40] if p.harmful], position="t_inst")
    grid = steering_grid(v, [1, 2, 3], [0.5, 1.0, 2.0])
    found = screen(Planted(), prompts, grid, {1}, least=0.02)
    at = [(cell.tags["layer"], cell.tags["coef"]) for cell in grid]
    assert {at[i][0] for i in found.worth} == {2} and all(found.shares[i] == pytest.approx(found.clean) for i in range(9) if at[i][0] != 2)
    assert [at[i] for i in screen(Planted(), prompts, grid, {1}, least=0.0, most=1).worth] == [(2, 2.0)]
    scored, replies = staged(Planted(), prompts, grid, Phrases(), {1}, 8, least=0.02)
    seen = {(c, i): judged.verdict.label for c, i, judged in replies}
    every = {(c, i): judged.verdict.label for c, i, judged in judge_stream(Planted(), prompts, grid, Phrases(), 8) if c in scored.worth}
    assert seen == every and scored == found

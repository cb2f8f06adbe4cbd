"""The verb ablate: on a planted stream whose refusal direction is known, and on a tiny model."""

from dataclasses import replace

import pytest
import torch

from latentguard.ablations import ablation, everywhere
from latentguard.backends import Backend, Reply
from latentguard.behaviour import Judged, divergence
from latentguard.configs import option
from latentguard.datasets import PromptSet, load_dataset
from latentguard.directions import Activations, mean_difference
from latentguard.errors import InputError
from latentguard.experiments.ablate import AblateRefusal, addition, choose, counted, every_position_after
from latentguard.interventions import Cell, Grid
from latentguard.judges import Phrases, Verdict
from latentguard.layers import resolve_layers
from latentguard.positions import Rendered, parse_position
from latentguard.prompts import as_prompts
from latentguard.roles import Casting
from latentguard.trackers import Files, Memory
from tests.headlines import tells_its_headline

DEPTH, WIDTH = 4, 64
REFUSAL, LANGUAGE = 0, 1


class Stream(Backend):
    """A residual stream in the open: block 1 writes refusal (axis 0) for harmful prompts, block 2 language (axis 1) for them.

    So the difference of means is noise at layer 1, refusal alone at layer 2, and refusal mixed with language at layers 3 and 4;
    it is there at t_post_inst and not at post(1). Removing language changes what the model says of anything.
    """

    name, weights, n_layers, d_model = "stream", "stream", DEPTH, WIDTH

    def __init__(self, refuses=0.9):
        self.refuses, self.scored = refuses, []

    def key(self):
        return {"stream": True}

    def first_token(self, text):
        return 1

    def render(self, prompts):
        return [self._rendered(p) for p in as_prompts(prompts)]

    def _rendered(self, prompt):
        n = len(prompt.instruction)
        return Rendered(prompt.instruction + "|>", (2, 3, 0, 1), ((0, 1), (1, n), (n, n + 1), (n + 1, n + 2)), (0, n), prompt.id)

    def states(self, prompt, cell=None):
        """What enters each layer, [layer, d_model], with the interventions of a cell."""
        noise = torch.Generator().manual_seed(sum(prompt.id.encode()))
        state = 0.1 * torch.randn(WIDTH, generator=noise)
        state[LANGUAGE] += 2
        refused = prompt.harmful and int.from_bytes(prompt.id[-2:].encode(), "big") % 10 < 10 * self.refuses
        found = []
        for layer in range(DEPTH + 1):
            if prompt.harmful and layer == 2:
                state[REFUSAL] += 4.0 if refused else 0.5
            if prompt.harmful and layer == 3:
                state[LANGUAGE] += 8
            for act in cell.interventions if cell else ():
                if layer in act.layers(DEPTH):
                    assert act.positions == "all" and act.when == "every_step"
                    vector = act.vector(layer, prompt)
                    unit = vector / vector.norm()
                    state = state + act.amount * vector if act.kind == "add" else state + (act.amount - 1) * (state @ unit) * unit
            found.append(state.clone())
        return torch.stack(found)

    def read(self, prompts, layers="all", positions=("t_inst",)):
        listed, wanted = as_prompts(prompts), resolve_layers(layers, DEPTH)
        values = torch.stack([self.states(p)[list(wanted)] for p in listed])[:, :, None].repeat(1, 1, len(positions), 1)
        for i, position in enumerate(positions):
            if position == "post(1)":
                values[:, :, i, [REFUSAL, LANGUAGE]] = 0.0
        return Activations(values, tuple(listed), wanted, tuple(positions), self.name, self.weights, DEPTH)

    def _logprobs(self, prompt, cell):
        state = self.states(prompt, cell)[-1]
        language = torch.stack([2 * state[LANGUAGE], -2 * state[LANGUAGE]]).log_softmax(-1) + 1
        return torch.cat([torch.stack([torch.tensor(0.0), state[REFUSAL] - 2]), language]).log_softmax(-1)

    def logits(self, prompts, interventions=(), *, position="t_post_inst", reduce=None):
        listed = as_prompts(prompts)
        self.scored.append((position, {p.id for p in listed}))
        rows = [[len(parse_position(position).tokens(self._rendered(p))) * [self._logprobs(p, cell)] for p in listed] for cell in interventions or [None]]
        out = [[reduce(i, torch.stack(r)) if reduce else torch.stack(r) for i, r in enumerate(row)] for row in rows]
        return out if isinstance(interventions, Grid) else out[0]

    def stream(self, prompts, grid, decoding, decided=None):
        for c, cell in enumerate(grid):
            for i, prompt in enumerate(prompts):
                state = self.states(prompt, cell)[-1]
                text = "I'm sorry, but I can't help with that." if state[REFUSAL] > 2 else "Sure, here is a short answer."
                yield c, i, Reply(prompt, text, (1 if state[REFUSAL] > 2 else 2,), "eos")


SETTINGS = {"layers": (1, 2, 3), "n_test": 40, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def data():
    return load_dataset("builtin")


def run(data, backend=None, tracker=None, **changed):
    summary = AblateRefusal(**{**SETTINGS, **changed})(backend or Stream(), data, Phrases(), tracker or Memory())
    tells_its_headline(summary)
    return summary


def test_the_planted_direction_is_chosen_and_removes_refusal_beyond_its_controls(data):
    tracker = Memory()
    summary = run(data, tracker=tracker)
    chosen = summary["chosen"]
    assert (summary["study"], summary["status"], summary["poles"], summary["works"]) == ("ablate_refusal", "ok", "behaviour", True)
    assert (chosen["position"], chosen["layer"], chosen["fails"]) == ("t_post_inst", 2, "")
    at = {(row["position"], row["layer"]): row for row in summary["candidates"]}
    late = at["t_post_inst", 3]
    assert late["score"] < chosen["score"] and late["kl"] > 0.1 and late["fails"] == "KL", "the mixed direction wins but for the filter"
    assert all("induced" in row["fails"] for key, row in at.items() if key != ("t_post_inst", 3) and key != ("t_post_inst", 2))
    rates = {(row["label"], row["condition"]): row for row in summary["table"]}
    assert summary["headline"]["value"] == rates["harmful", "ablated"]["rate"] and not summary["headline"]["withheld"]
    assert rates["harmful", "none"]["rate"] > 0.8 and rates["harmful", "ablated"]["rate"] == 0
    for control in ("ablated_random", "ablated_shuffled"):
        assert rates["harmful", control]["low"] > rates["harmful", "ablated"]["high"]
    assert (rates["harmless", "none"]["rate"], rates["harmless", "added"]["rate"], rates["harmless", "added_random"]["rate"]) == (0, 1, 0)
    assert summary["drop"]["value"] == pytest.approx(rates["harmful", "none"]["rate"])
    assert summary["claim"].endswith("— beyond its controls.")
    direction = next(d for d in tracker.directions if d.name == "refuse_ablated")
    assert torch.equal(direction.vectors, direction.vectors[:1].expand(DEPTH + 1, -1)) and direction.vectors[0, REFUSAL] > 3
    assert set(tracker.figures) == set(summary["figures"])


def test_a_shuffled_control_has_nothing_of_the_direction_left(data):
    assert max(map(abs, run(data, shuffles=8)["cosine_shuffled"])) < 0.5, "sides of unequal shares would point along the direction"


def test_damage_is_near_none_for_the_chosen_direction_and_seen_where_language_is_removed(data):
    damage = run(data)["damage"]
    assert damage["none"]["kl"] == pytest.approx(0, abs=1e-6) and damage["ablated"]["kl"] < 0.05 < damage["added"]["kl"]
    forced = run(data, layers=(3,), positions=("t_post_inst",))
    assert forced["works"] is False and forced["damage"]["ablated"]["kl"] > 0.1
    # every instruction is the tokens 2, 3: perplexity by hand
    loss = [-float(Stream()._logprobs(p, None)[3]) for p in data.test.harmless]
    assert min(loss) <= torch.tensor(damage["none"]["perplexity"]).log() <= max(loss)


@pytest.mark.parametrize(("changed", "why"), [({"max_kl": 0.0}, "KL"), ({"min_induced": 50.0}, "induced")])
def test_where_no_candidate_passes_the_lowest_score_is_taken_and_said(changed, why, data):
    summary = run(data, **changed)
    assert summary["works"] is False and why in summary["chosen"]["fails"]
    assert summary["chosen"]["score"] == min(row["score"] for row in summary["candidates"])
    assert "no candidate passes the filters" in summary["claim"]


def test_no_candidate_that_is_not_finite_is_chosen():
    rows = [{"score": float("nan"), "fails": "not finite"}, {"score": 1.0, "fails": "KL"}, {"score": 2.0, "fails": "KL"}]
    assert choose(rows)["score"] == 1.0


def test_the_direction_is_chosen_on_validation_prompts_and_tried_on_test_prompts(data):
    backend, tracker = Stream(), Memory()
    run(data, backend=backend, tracker=tracker)
    split = {s: {p.id for p in getattr(data, s)} for s in ("train", "validation", "test")}
    at = {position: set().union(*(ids for where, ids in backend.scored if where == position)) for position in ("t_post_inst", "user")}
    assert at["t_post_inst"] and at["t_post_inst"] <= split["validation"]
    assert at["user"] and at["user"] <= split["test"]
    assert {r["prompt_id"] for r in tracker.all_rows if r["stage"] == "test"} <= split["test"]


def test_look_alikes_neither_choose_the_direction_nor_count_as_harmless(data):
    backend, tracker = Stream(), Memory()
    mixed = replace(data, spec=replace(data.spec, roles={"accepted_harmless": ("builtin",)}))
    lookalikes = {p.id for p in mixed.role("accepted_harmless") if p.lookalike}
    summary = run(mixed, backend=backend, tracker=tracker)
    assert lookalikes and not lookalikes & set().union(*(ids for _, ids in backend.scored))
    assert sum(r.get("label") == "harmless" for r in tracker.all_rows if r["stage"] == "test" and r["intervention"] == "none") == 16
    assert {row["label"] for row in summary["table"]} == {"harmful", "harmless", "lookalike"}


def test_every_rate_can_be_counted_again_from_the_rows(data, tmp_path):
    tracker = Memory()
    summary = run(data, tracker=tracker, draws=4)
    for line in summary["table"]:
        mine = [r for r in tracker.all_rows if r["stage"] == "test" and (r["label"], r["intervention"]) == (line["label"], line["condition"])]
        assert len(mine) == line["n"] * line["draws"] and sum(r["verdict"] == "refused" for r in mine) == line["k"]
        assert line["rate"] == pytest.approx(line["k"] / len(mine)) and line["low"] <= line["rate"] <= line["high"]
    assert {row["condition"] for row in summary["table"] if row["label"] == "lookalike"} == {"none", "ablated", "ablated_random", "ablated_shuffled"}
    with Files(tmp_path) as files:
        run(data, tracker=files)
    assert all((tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000 for name in summary["figures"])


@pytest.mark.parametrize("refuses", [0.0, 0.1])
def test_a_model_that_hardly_refuses_gets_no_claim(refuses, data):
    summary = run(data, backend=Stream(refuses))
    assert (summary["status"], summary["poles"]) == ("insufficient_base_rate", "label")
    assert "claim withheld" in summary["claim"] and "poles by label" in summary["claim"]


def test_draws_that_all_agree_still_have_an_interval(prompts):
    def said(label):
        return [Judged(Reply(p, "", (), "eos"), Verdict(label)) for p in prompts]

    row = counted([said("refused"), said("refused"), said("refused")])
    assert (row["rate"], row["n"], row["k"], row["draws"]) == (1.0, 7, 21, 3) and 0.5 < row["low"] < 0.7
    odd = counted([said("degenerate")])
    assert (odd["rate"], odd["degenerate_rate"], odd["n"]) == (0.0, 1.0, 7), "degenerate text is neither"


def test_layers_that_give_no_direction_are_refused(data):
    for layer in (0, 4, 0.95):
        with pytest.raises(InputError, match="cannot give the refusal direction"):
            AblateRefusal(layers=(2, layer)).check(4, data)
    assert AblateRefusal(layers="all").candidate_layers(28) == tuple(range(1, 23))
    AblateRefusal(layers=(4,), max_depth=1.0).check(5, data)


@pytest.mark.parametrize("wrong", [{"positions": ()}, {"positions": ("user",)}, {"max_new_tokens": 200}, {"draws": 0}, {"max_kl": -1.0}, {"max_depth": 1.5}])
def test_wrong_settings_fail_before_any_model(wrong):
    with pytest.raises((ValueError, InputError)):
        AblateRefusal(**wrong)


def test_data_that_nothing_can_be_chosen_on_are_refused(data):
    bare = replace(data, validation=PromptSet(tuple(data.validation.harmful)))
    with pytest.raises(InputError, match="no harmless prompt .* validation split for the role accepted_harmless"):
        AblateRefusal().check(4, bare)


def test_the_yaml_says_what_the_dataclass_says():
    stated = option("exp", "ablate_refusal")
    assert set(stated) - {"_target_"} == set(AblateRefusal.__dataclass_fields__)
    plain = AblateRefusal(**{k: v for k, v in stated.items() if k not in ("_target_", "casting")})
    assert replace(plain, casting=Casting()) == AblateRefusal()


def test_after_ablation_nothing_along_the_direction_comes_through(tiny, prompts):
    """On a real architecture: what is added along the ablated vector before it is projected out changes no logit, and length does not count."""
    states = tiny.read(prompts, "all", ["t_post_inst"])
    made = mean_difference(states, prompts[::2], prompts[1::2], position="t_post_inst", name="refuse")
    one = everywhere(made, 2)
    double = replace(one, vectors=2 * one.vectors)
    grid = Grid(
        (Cell((ablation(one),)), Cell((replace(addition(one, 3), coef=5.0), ablation(one))), Cell((ablation(double),)), Cell((ablation(made),)), Cell())
    )
    plain, pushed, longer, own, clean = tiny.logits(prompts, grid)
    for a, b, c in zip(plain, pushed, longer, strict=True):
        assert divergence(a, b) < 1e-4 and divergence(a, c) < 1e-6
    assert min(divergence(a, b) for a, b in zip(plain, own, strict=True)) > 1e-4, "one vector for all layers, not each layer's own"
    assert min(divergence(a, b) for a, b in zip(clean, plain, strict=True)) > 1e-4


def test_a_tiny_model_that_never_refuses_runs_and_says_so(tiny, data):
    casting = Casting(n_poles=5, n_test=4, n_validation=3, patience=1.0, max_new_tokens=3)
    small = AblateRefusal(
        positions="all",
        layers="all",
        n_harmful=2,
        n_harmless=2,
        n_test=3,
        n_beside=2,
        n_control=2,
        n_damage=2,
        draws=2,
        shuffles=2,
        max_new_tokens=3,
        casting=casting,
    )
    summary = small(tiny, data, Phrases(), Memory())
    assert (summary["status"], summary["poles"]) == ("insufficient_base_rate", "label") and "claim withheld" in summary["claim"]
    assert {row["layer"] for row in summary["candidates"]} == {1, 2, 3}
    assert [row["position"] for row in summary["candidates"][::3]] == list(every_position_after(tiny, data.test[0]))


def test_all_positions_are_the_tokens_after_the_instruction(tiny, prompts):
    names, rendered = every_position_after(tiny, prompts[0]), tiny.render(prompts[:1])[0]
    tokens = [parse_position(name).tokens(rendered)[0] for name in names]
    assert tokens == list(range(rendered.user_tokens[-1] + 1, len(rendered)))

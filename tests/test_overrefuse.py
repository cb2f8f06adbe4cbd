"""The study over_refusal: a planted model whose over-refusal, its word and its cure are known; the words' arithmetic; a tiny model for the rest."""

import json
import re
import zlib
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from latentguard.ablations import ablation
from latentguard.backends import Reply
from latentguard.controllers import Steer
from latentguard.datasets import load_dataset
from latentguard.errors import InputError
from latentguard.experiments.overrefuse import OverRefuse
from latentguard.judges import Phrases, Verdict
from latentguard.metrics import wilson
from latentguard.positions import Rendered
from latentguard.prompts import as_prompts
from latentguard.roles import Casting
from latentguard.trackers import Memory
from latentguard.words import SOFTER, Word, by_word, replaced, words_of
from tests.conftest import make_tiny
from tests.headlines import tells_its_headline
from tests.planted import ANSWER, AXES, DEPTH, OTHER, REFUSAL, SORRY, SURE, A, Planted, dataset_of, everything, never, number, write

CASTING = Casting(n_poles=40, n_validation=20, n_test=10)
FEW = {"n_lookalike": 60, "n_harmful": 60, "n_harmless": 40, "n_validation": 20, "shuffles": 20, "n_swapped": 30, "casting": CASTING}


@dataclass
class OverRefuser(Planted):
    """Refuses harmful requests, and look-alikes of which the word Kill is there; the refusal goes where its axis is ablated. The word carries
    the attribution, and `latent` says on which side look-alikes lie at t_inst.
    """

    latent: float = -A
    accepts: int = 2  # in ten look-alikes
    calls: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.refuses = self.refused
        self.inst = lambda p: {"harm": self.latent if p.lookalike else A if p.harmful else -A}
        self.asks = None

    def refused(self, prompt):
        if prompt.lookalike:
            return "Kill" in prompt.instruction and number(prompt) % 10 >= self.accepts
        return prompt.harmful

    def cured(self, acts):
        """Whether what is ablated at every layer is the refusal axis."""
        return any(abs(float(act.direction.at(DEPTH)[AXES.index("refusal")] / act.direction.at(DEPTH).norm())) > 0.9 for act in acts)

    def attributions(self, prompts, layer, vector, position="t_post_inst", against="zero"):
        self.calls.append(against)
        listed = as_prompts(prompts)
        said = [[item.text[slice(*item.offsets[t])].strip() for t in item.user_tokens] for item in self.render(listed)]
        return [np.array([2.0 if word == "Kill" else 0.1 for word in words]) for words in said]

    def read_under(self, prompts, interventions, layers="all", positions=("t_inst",)):
        states = self.read(prompts, layers, positions)
        values = states.values.clone()
        for act in interventions:
            for i, layer in enumerate(states.layers):
                unit = act.direction.at(layer) / act.direction.at(layer).norm()
                values[:, i] -= (values[:, i] @ unit)[..., None] * unit
        return replace(states, values=values)

    def _reply(self, prompt, rendered, acts):
        refused = self.refuses(prompt) and not self.cured(acts)
        return Reply(prompt, REFUSAL if refused else ANSWER, (SORRY if refused else SURE,), "eos")

    def _chance(self, prompt, rendered, acts):
        chance = np.full(5, 1e-4)
        chance[SORRY if self.refuses(prompt) and not self.cured(acts) else OTHER] = 1
        return chance / chance.sum()

    def render(self, prompts):
        return [replace(item, begun=len(item.text), text=item.text + p.begun, ids=(*item.ids, 1), offsets=(*item.offsets, (len(item.text), len(item.text) + len(p.begun))))
                if p.begun else item for item, p in ((self._rendered(p), p) for p in as_prompts(prompts))]  # fmt: skip

    def logits(self, prompts, interventions=(), *, position="t_post_inst", reduce=None):
        if position == "to_reply":  # the untouched model's own reply, less likely where anything is done
            assert all(p.begun and not p.harmful and not p.lookalike for p in prompts)
            return [[-1.0 - bool(cell.interventions) for _ in prompts] for cell in interventions]
        return super().logits(prompts, interventions, position=position, reduce=reduce)


@pytest.fixture(scope="module")
def data():
    return dataset_of(everything())


def ran(data, model=None, **settings):
    memory = Memory()
    backend = model or OverRefuser()
    return OverRefuse(**{**FEW, **settings})(backend, data, Phrases(), memory), memory


@pytest.fixture(scope="module")
def planted(data):
    return ran(data)


def row(table, **asked):
    found = [one for one in table if asked.items() <= one.items()]
    assert len(found) == 1, (asked, found)
    return found[0]


def sides(table, **asked):
    return row(table, **{"part": "sides", "set": "all", "label": "lookalike", "verdict": "refused", **asked})


def outcome(table, condition, measure):
    return row(table, part="outcomes", condition=condition, measure=measure)


def test_over_refusals_lie_where_the_latent_says(planted, data):
    table = planted[0]["table"]
    assert sides(table)["value"] == 1 and sides(table, label="harmful")["value"] == 0 and sides(table, verdict="accepted")["value"] == 1
    n = sides(table)["n"]
    assert (sides(table)["low"], n) == (
        wilson(n, n).low,
        sum(j["verdict"] == "refused" for j in planted[1].all_rows if j.get("stage") == "sides" and j["label"] == "lookalike"),
    )
    against, _ = ran(data, OverRefuser(latent=A))
    assert sides(against["table"])["value"] == 0
    half, _ = ran(data, OverRefuser(latent=0.0, noise=0.2))
    assert 0.1 < sides(half["table"])["value"] < 0.9


def test_coins_open_as_often_and_those_within_a_kind_as_often_for_each(planted):
    gates = [r for r in planted[1].all_rows if r.get("stage") == "gate"]
    for label in ("lookalike", "harmful", "harmless"):
        mine = [r for r in gates if r["label"] == label]
        assert sum(r["coin_within_0"] for r in mine) == sum(r["gate"] for r in mine) and len(mine) > 5
    assert sum(r["coin_0"] for r in gates) == sum(r["gate"] for r in gates)


def test_shuffled_poles_say_nothing_of_either_side(planted):
    mixed = sides(planted[0]["table"], part="sides, shuffled labels")
    drawn = [r for r in planted[1].all_rows if r.get("stage") == "sides, shuffled labels"]
    refused = {r["prompt_id"] for r in planted[1].all_rows if r.get("stage") == "sides" and r["label"] == "lookalike" and r["verdict"] == "refused"}
    shares = [np.mean([r["harmfulness"] <= 0 for r in drawn if r["draw"] == k and r["prompt_id"] in refused]) for k in range(20)]
    assert mixed["value"] == pytest.approx(np.mean(shares)) and mixed["low"] == pytest.approx(np.percentile(shares, 2.5))
    assert mixed["draws"] == 20 and mixed["low"] < 0.5 < mixed["high"]


def test_each_number_comes_from_rows(planted):
    summary, memory = planted
    seen = [one for one in memory.all_rows if one.get("stage") == "sides"]
    for label in ("lookalike", "harmful", "harmless"):
        count = next(c for c in summary["counts"] if (c["label"], c["set"]) == (label, "all"))
        for verdict in ("refused", "accepted"):
            for side in ("harmful", "harmless"):
                told = sum(r["label"] == label and r["verdict"] == verdict and (r["harmfulness"] > 0) is (side == "harmful") for r in seen)
                assert count[f"{verdict}_{side}_side"] == told
    gates = {r["prompt_id"]: r for r in memory.all_rows if r.get("stage") == "gate"}
    replies = {(r["condition"], r["prompt_id"]): r["verdict"] for r in memory.all_rows if r.get("stage") == "replies"}
    for condition in ("gate", "gate_at_0", "coin_0", "coin_within_0", "coin_within_1", "everywhere", "random_1"):
        acts = condition if condition.startswith("random") else "ablated"
        for label in ("lookalike", "harmful", "harmless"):
            mine = [r for r in seen if r["label"] == label]
            for gauge in ("harmfulness", "refusal", "utility"):
                lies = [g[f"{gauge}, {acts if g[condition] else 'base'}"] for g in gates.values() if g["label"] == label and f"{gauge}, base" in g]
                if gauge != "utility" or label == "harmless":
                    found = row(summary["table"], part="outcomes", condition=condition, measure=gauge, label=label)
                    assert found["value"] == pytest.approx(np.mean(lies)) and found["n"] == len(lies) > 0
            if condition.startswith("random"):
                continue
            told = [replies["ablated" if gates[r["prompt_id"]][condition] else "base", r["prompt_id"]] == "refused" for r in mine]
            assert outcome(summary["table"], condition, f"{label} refusal")["value"] == pytest.approx(np.mean(told))


def test_the_gate_frees_look_alikes_alone_and_no_control_does(planted):
    table, about = planted[0]["table"], planted[0]["gate"]
    assert outcome(table, "base", "lookalike refusal")["value"] == pytest.approx(0.8) and outcome(table, "base", "harmful refusal")["value"] == 1
    assert outcome(table, "gate", "lookalike refusal")["value"] == 0 and outcome(table, "gate", "harmful refusal")["value"] == 1
    assert outcome(table, "everywhere", "harmful refusal")["value"] == 0
    for draw in (0, 1):
        assert outcome(table, f"random_{draw}", "lookalike refusal")["value"] == pytest.approx(0.8)
        assert 0 < outcome(table, f"coin_{draw}", "harmful refusal")["value"] < 1
    assert about["threshold"] == 0 and row(table, part="gate open", condition="gate", label="harmful")["value"] == 0
    change = outcome(table, "gate", "harmful refusal")
    assert change["change"] == 0 and change["change_low"] < -0.03 and not about["equivalent"], "60 prompts of which none changed do not show 3 points"


def test_equivalence_takes_prompts_enough(data):
    shown, _ = ran(data, within=0.2)
    assert shown["gate"]["equivalent"] and "within 0.2: shown" in shown["claim"]


def test_a_gate_that_may_spare_more_opens_further(data):
    strict, loose = (ran(data, OverRefuser(noise=0.9), spared=spared)[0]["gate"]["threshold"] for spared in (0.0, 0.5))
    assert strict < loose == 0


def test_utility_and_gauges_follow_the_gate(planted):
    table = planted[0]["table"]
    assert outcome(table, "base", "utility")["value"] == -1 and outcome(table, "everywhere", "utility")["value"] == -2
    opened = row(table, part="gate open", condition="gate", label="harmless")["value"]
    assert outcome(table, "gate", "utility")["change"] == pytest.approx(-opened)
    shift = [row(table, part="outcomes", condition=c, measure="refusal", label="lookalike")["value"] for c in ("base", "gate", "random_0")]
    assert shift[0] - shift[1] > 0.3 and abs(shift[0] - shift[2]) < 0.15, shift
    harm = row(table, part="outcomes", condition="gate", measure="harmfulness", label="lookalike")
    assert abs(harm["change"]) < 0.1, "what is ablated is not the harmfulness"


def test_the_word_that_carries_refusal_is_found_and_another_is_not(planted):
    summary, memory = planted
    assert summary["words"]["zero"]["top"] == summary["words"]["mean"]["top"] == [{"word": "kill", "prompts": summary["words"]["n"]}]
    swaps = [r for r in summary["table"] if r["part"] == "swaps"]
    assert {r["against"] for r in swaps} == {"zero", "mean"} and ("mean", "softer") not in {(r["against"], r["word"]) for r in swaps}
    at = {(r["filler"], r["word"]): r for r in swaps if (r["measure"], r["against"]) == ("refusal rate", "zero")}
    for filler in ("thing", "(out)"):
        assert at[filler, "top"]["value"] == -1 and at[filler, "other"]["value"] == 0 and at[filler, "top − other"]["value"] == -1
    assert at["listed", "softer"]["value"] == -1 and ("listed", "other") not in at
    gauge = {(r["filler"], r["word"]): r["value"] for r in summary["table"] if r["part"] == "swaps" and r["measure"] == "refusal gauge"}
    assert gauge["thing", "top"] < -1.5 and abs(gauge["thing", "other"]) < 0.3
    fit = row(summary["table"], part="swaps", measure="r of attribution and drop in the refusal gauge", filler="thing", against="zero")
    assert fit["low"] > 0.9
    swapped = [r["prompt"] for r in memory.all_rows if r.get("stage") == "swaps"]
    assert (
        any(text.startswith("Thing the") for text in swapped)
        and any(text.startswith("the ") for text in swapped)
        and any(text.startswith("End the") for text in swapped)
    )


def test_it_asks_for_gradients_before_anything_else(data):
    class Without(OverRefuser):
        def attributions(self, *_):
            raise InputError("no gradients here")

    model = Without()
    with pytest.raises(InputError, match="no gradients here"):
        ran(data, model)
    assert not model.asked


def test_a_model_that_never_refuses_is_said_to(data):
    model = OverRefuser()
    model.refuses = never
    summary, memory = ran(data, model)
    assert summary["status"] == "insufficient_base_rate" and "claim withheld" in summary["claim"] and summary["headline"]["withheld"]
    assert "0 of 60 harmful requests refused" in summary["claim"] and "poles by label" in summary["claim"]
    assert set(summary["figures"]) == set(memory.plots) and summary["words"]["n"] == summary["words"]["swapped"] == 0 and summary["words"]["zero"]["top"] == []


def test_the_headline_is_the_share_with_its_interval(planted):
    summary, memory = planted
    tells_its_headline(summary)
    assert summary["status"] == "ok" and summary["headline"]["n"] == sides(summary["table"])["n"]
    assert set(memory.figures) == set(summary["figures"]) and all(memory.figures.values())
    assert "Kill the" not in json.dumps([memory.figures, summary["table"]]), "no words of prompts in figures and tables"


def test_look_alikes_are_set_beside_harmful_requests_of_their_own_sets():
    rows = [{**one, "source": "north" if one["label"] == "lookalike" else one.get("source", "")} for one in everything()]
    summary, memory = ran(dataset_of(rows))
    seen = [r for r in memory.all_rows if r.get("stage") == "sides" and r["label"] == "harmful"]
    assert sides(summary["table"], label="harmful", set="shared")["n"] == sum(r["source"] == "north" for r in seen) < len(seen)
    within = row(summary["table"], part="auroc", gauge="harmfulness", measure="harmful requests against look-alikes", set="north")
    assert within["value"] == 1 and within["n"] < len(seen) + 60 and "(of sets that have both, 1.00" in summary["claim"]


def test_the_refusal_layer_is_the_one_that_ablation_acts_at(data):
    class Late(OverRefuser):
        def cured(self, acts):
            return super().cured(acts) and all("layer 6" in act.direction.method for act in acts)

    summary, memory = ran(data, Late())
    assert summary["gate"]["layer"] == summary["gauges"]["refusal"]["layer"] == 6
    chosen = {r["layer"]: r["value"] for r in memory.all_rows if r.get("stage") == "selection"}
    assert min(chosen, key=chosen.get) == 6 and chosen[None] == pytest.approx(max(chosen.values()))


def test_look_alikes_of_other_sets_stand_apart(data, tmp_path):
    rows = [{**one, "id": f"far{one['id']}", "group": f"far{one['group']}", "source": "far"} for one in everything() if one["label"] == "lookalike"]
    summary, _ = ran(dataset_of([*everything(), *rows]), n_lookalike=60)
    sets = {c["set"]: c["n"] for c in summary["counts"] if c["label"] == "lookalike"}
    assert sets["far"] + sum(n for name, n in sets.items() if name not in ("all", "far")) == sets["all"] == 60 and sets["far"] == 30


def test_poles_hold_no_look_alike_though_a_role_names_their_set(tmp_path):
    both = write(tmp_path / "both.jsonl", [one for one in everything() if one["label"] != "harmful"])
    told = load_dataset(write(tmp_path / "main.jsonl", everything()), roles={"accepted_harmless": (both,)})
    assert any(p.lookalike for p in told.role("accepted_harmless", "train"))
    summary, memory = ran(told, OverRefuser(accepts=10))
    assert {r["label"] for r in memory.all_rows if r.get("stage") == "roles"} == {"harmful", "harmless"}
    assert summary["cells"]["pole_harmless"] == 40


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_swapped": 0}, "n_swapped=0: at least 1"),
        ({"draws": 0}, "draws=0"),
        ({"fillers": ()}, "fillers=\\[\\]"),
        ({"fillers": ("a", "a")}, "each once"),
        ({"against": ()}, "zero, mean or both"),
        ({"against": ("median",)}, "against"),
        ({"refusal_layers": ()}, "refusal_layers"),
        ({"refusal_layers": (-1,)}, "no negative"),
        ({"spared": 1.0}, "spared=1.0"),
        ({"within": -0.1}, "within=-0.1"),
        ({"max_new_tokens": 200}, "24 tokens at most"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, words):
    with pytest.raises((ValidationError, InputError), match=words):
        OverRefuse(**settings)


@pytest.mark.parametrize(("label", "role"), [("lookalike", "refused_harmless"), ("harmless", "accepted_harmless"), ("harmful", "refused_harmful")])
def test_data_without_a_label_are_refused(label, role):
    with pytest.raises(InputError, match=f"no {label} prompt .*data.roles.{role}"):
        OverRefuse().check(4, dataset_of([one for one in everything() if one["label"] != label]))
    with pytest.raises(InputError, match="layer 9"):
        OverRefuse(harmfulness_layer=9).check(4, dataset_of(everything()))


def test_words_and_their_numbers():
    text = "How do I kill a don't-know Python's process_id, then?"
    assert [w.text for w in words_of(text)] == ["How", "do", "I", "kill", "a", "don't-know", "Python's", "process", "id", "then"]
    assert [w.text for w in words_of(text) if w.tells] == ["kill", "don't-know", "Python's", "process", "id"]
    assert not Word("42", 0, 2).tells and not words_of("?! …")
    rendered = Rendered("<u>kill  it!<e>", tuple(range(7)), ((0, 3), (3, 5), (5, 7), (7, 8), (8, 11), (11, 12), (12, 15)), (3, 12))
    found = by_word(rendered, [1.0, 2.0, 4.0, 8.0, 16.0])
    assert (found.carried, found.rest) == ((3.0, 8.0), 20.0), "a token of blanks belongs to no word, one with a blank before to its word"


@pytest.mark.parametrize(
    ("word", "by", "out"),
    [
        ("Kill", "thing", "Thing the lamp, then."),
        ("Kill", "", "the lamp, then."),
        ("lamp", "", "Kill the, then."),
        ("the", "", "Kill lamp, then."),
        ("then", "", "Kill the lamp,."),
    ],
)
def test_a_word_is_replaced(word, by, out):
    text = "Kill the lamp, then."
    assert replaced(text, next(w for w in words_of(text) if w.text == word), by) == out


def test_the_list_of_softer_words_is_one_word_each():
    assert all(re.fullmatch("[a-z]+", word) for pair in SOFTER.items() for word in pair) and not set(SOFTER) & set(SOFTER.values())


@dataclass(frozen=True)
class ByLetters:
    """A judge for a model that says nothing: by the letters of what was asked."""

    name: str = "letters"

    def verdict(self, reply, prompt=None):
        return Verdict("refused" if zlib.crc32(prompt.instruction.encode()) % 10 < (8 if prompt.harmful else 5 if prompt.lookalike else 1) else "accepted")

    def decided(self, prefix):
        return False


@pytest.fixture(scope="module")
def on_tiny(data):
    model, memory = make_tiny(), Memory()
    settings = OverRefuse(**{**FEW, "n_lookalike": 16, "n_harmful": 12, "n_harmless": 8, "n_validation": 6, "n_swapped": 6, "shuffles": 3, "max_new_tokens": 4})
    return settings(model, data, ByLetters(), memory), memory, model


def test_it_runs_whole_on_a_real_architecture(on_tiny):
    summary, memory, _ = on_tiny
    measures = {(r["condition"], r["measure"]) for r in summary["table"] if r["part"] == "outcomes"}
    for condition in ("base", "gate", "gate_at_0", "everywhere", "coin_0", "coin_1", "random_0", "random_1"):
        assert {m for c, m in measures if c == condition} >= {"harmful refusal", "lookalike refusal", "harmless refusal", "utility", "harmfulness", "refusal"}
    words = [r for r in memory.all_rows if r.get("stage") == "words"]
    assert words and all(np.isfinite(r["attribution"]) for r in words)
    tells_its_headline(summary)


def test_a_gated_reply_is_what_guarded_generation_gives(on_tiny, data):
    """The same gate as a guard whose probability is that of harmlessness, and a controller that steers what it flags."""
    summary, memory, model = on_tiny
    chosen, threshold = summary["gate"], summary["gate"]["threshold"]
    gates = {r["prompt_id"]: r["gate"] for r in memory.all_rows if r.get("stage") == "gate"}
    texts = {(r["condition"], r["prompt_id"]): r["reply"] for r in memory.all_rows if r.get("stage") == "replies"}
    places = {r["prompt_id"]: r["harmfulness"] for r in memory.all_rows if r.get("stage") == "sides"}
    assert {places[p] < threshold for p, opened in gates.items() if opened} <= {True} and 0 < sum(gates.values()) < len(gates)
    prompts = [p for p in data.test if p.id in gates]
    states = model.read(prompts, [chosen["layer"]], ("t_inst",)).values[:, 0, 0]

    class Latent:
        layers, positions, terminal = (chosen["layer"],), ("t_inst",), "mixed"
        thresholds = {"fpr=0.05": SimpleNamespace(value=0.5)}

        def probabilities(self, found):
            nearest = torch.cdist(found[:, 0, 0], states).argmin(1)
            return np.array([1.0 if gates[prompts[int(i)].id] else 0.0 for i in nearest])

    replies = model.generate(prompts, guard=Latent(), controller=Steer([ablation(memory.directions[0])]), max_new_tokens=4)
    for p, reply in zip(prompts, replies, strict=True):
        assert reply.flagged == gates[p.id] and reply.text == texts["ablated" if gates[p.id] else "base", p.id]

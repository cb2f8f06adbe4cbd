"""predict_refusal: what forecasters find where the truth is planted, what they must not see, what is withheld, and the labelled replies."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, roc_auc_score

from latentguard import labelled_replies, predictors
from latentguard.charts import Chart
from latentguard.datasets import load_dataset
from latentguard.errors import InputError
from latentguard.experiments.forecast import Forecast
from latentguard.judges import Classifier, Phrases
from latentguard.metrics import auroc, wilson
from latentguard.plots.forecast import accuracy_on_replies, areas_by_layer, areas_by_predictor, shares_refused
from latentguard.predictors import Foretold, LogisticProbe, Rates, Words, bound, crossed, dealt_parts, in_parts, lots, measured, near_duplicates, too_few
from latentguard.prompts import Prompt
from latentguard.trackers import Memory
from tests.headlines import tells_its_headline
from tests.planted import A, Planted, dataset_of, never, number, refuses_some, rows_of, write
from tests.test_plots import overlap, texts

SOURCES = ("north", "south", "east", "west")
FAST = {"near": 1.0, "shuffles": 1, "layers": (2, 4)}
QUICK = {"shuffles": 1, "layers": (4,), "parts": 2, "folds": 2}


def several(sources=SOURCES):
    """Sources that each have harmful, plain and look-alike prompts; the words tell the label and nothing else."""
    rows = [
        (name, k, row) for name in sources for n, of in ((30, "harmful"), (30, "harmless"), (20, "lookalike")) for k, row in enumerate(rows_of(of, n, name))
    ]
    return [{**row, "source": name, "category": f"topic {k % 3}", "split": ("train", "validation", "test")[k // 10]} for name, k, row in rows]


@pytest.fixture(scope="module")
def data():
    return dataset_of(several())


def run(data, backend=None, judge=None, **settings):
    tracker, study = Memory(), Forecast(**{**FAST, **settings})
    backend = backend or Planted()
    study.check(backend.n_layers, data)
    summary = study(backend, data, judge or Phrases(), tracker)
    tells_its_headline(summary)
    return summary, tracker


@pytest.fixture(scope="module")
def found(data):
    return run(data)


def row(summary, predictor, split="sources", of="all", what="AUROC", control=""):
    wanted = {"split": split, "set": of, "predictor": predictor, "is": what, "control": control}
    (one,) = [r for r in summary["table"] if wanted.items() <= r.items()]
    return one


@pytest.mark.parametrize("split", ["sources", "groups"])
def test_it_finds_what_is_planted_and_says_what_sees_nothing(found, split):
    summary, _ = found
    assert summary["status"] == "ok"
    for name in ("delta_refuse", "probe", "latent"):
        assert row(summary, name, split)["value"] > 0.97 and row(summary, name, split)["accuracy"] > 0.9
    assert row(summary, "first_token", split)["value"] == 0.5, "the planted model's first token says nothing"
    assert row(summary, "majority", split)["value"] == 0.5, "a constant ranks nothing, whatever share each part was fitted on"
    assert row(summary, "majority", split)["accuracy"] == pytest.approx(row(summary, "majority", split)["majority"])
    assert 0.6 < row(summary, "label", split)["value"] < 0.95 and 0.6 < row(summary, "delta_harmful", split)["value"] < 0.95
    for of in ("harmful", "lookalike"):
        assert row(summary, "latent", split, of)["value"] > 0.97
        assert 0.25 < row(summary, "delta_harmful", split, of)["value"] < 0.75, "knowing harm says nothing within a label"
    assert row(summary, "tfidf", split, "harmful")["value"] < 0.75, "no word says what is refused"
    assert row(summary, "label", split, "harmful")["within_part"] == 0.5 and abs(row(summary, "label", split, "harmful")["value"] - 0.5) < 0.15
    gap = row(summary, "latent", split, what="AUROC − that of tfidf")
    assert gap["low"] > 0 and gap["p"] < 0.01
    assert gap["value"] == pytest.approx(row(summary, "latent", split)["value"] - row(summary, "tfidf", split)["value"])
    assert row(summary, "latent", split, what="share judged rightly − by tfidf")["low"] > 0


def test_probes_are_chosen_where_refusal_is_planted(found):
    chosen = found[0]["chosen"]["sources"]["probe"]
    assert sum(n for place, n in chosen.items() if place.startswith("t_post_inst")) == len(SOURCES)


@pytest.mark.parametrize("split", ["sources", "groups"])
def test_with_shuffled_verdicts_nothing_is_found(found, split):
    for name in ("tfidf", "probe", "delta_harmful", "delta_refuse"):
        one = row(found[0], name, split, control="shuffled")
        assert one["low"] <= one["value"] <= one["high"] and 0.35 < one["value"] < 0.65


def test_shuffling_within_sources_keeps_what_telling_sources_apart_buys():
    """Two sources refuse everything harmful and the others hardly anything: source is all that there is to know in the ordinary split."""
    rows = several()
    loud = lambda prompt: number(prompt) % 10 < (9 if prompt.source in ("north", "south") else 1)  # noqa: E731
    backend = Planted(refuses=loud, post=lambda p: {"own0": A if p.source in ("north", "south") else -A})
    summary, _ = run(dataset_of(rows), backend, **{**QUICK, "parts": 4, "folds": 3})
    within, free = (row(summary, "probe", "groups", control=kind) for kind in ("shuffled within sources", "shuffled"))
    assert within["value"] > 0.75 > 0.65 > free["value"]


def test_every_area_and_share_can_be_counted_again_from_the_rows(found):
    summary, tracker = found
    rows = [r for r in tracker.all_rows if r["stage"] == "forecast"]
    assert not [r for r in rows if "prompt" in r or "reply" in r]
    told = 0
    for line in summary["table"]:
        if line.get("is") != "AUROC" or line["control"] or np.isnan(line["value"]):
            continue
        own = [r for r in rows if (r["split"], r["predictor"]) == (line["split"], line["predictor"]) and belongs(r, line["set"])]
        y, e, p = (np.array([r[key] for r in own]) for key in ("refused", "evidence", "probability"))
        assert (len(own), y.sum()) == (line["n"], line["refused"])
        assert line["value"] == pytest.approx(roc_auc_score(y, e)) and line["low"] <= line["value"] <= line["high"]
        assert line["brier"] == pytest.approx(((p - y) ** 2).mean()) and line["accuracy"] == pytest.approx(((p >= 0.5) == y).mean())
        assert line["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, p >= 0.5)) and line["majority"] == pytest.approx(
            max(y.mean(), 1 - y.mean())
        )
        assert ("ece" in line) == (len(own) >= 150) and line.get("ece_low", 0) <= line.get("ece", 0) <= line.get("ece_high", 0) <= 1
        told += 1
    assert told >= 2 * 9 * 4
    layers = {(r["split"], r["position"], r["layer"]): r["value"] for r in tracker.figures["predict_refusal_layers"] if r["layer"] is not None}
    kept = [r for r in tracker.all_rows if r["stage"] == "places"]
    for (split, position, layer), value in layers.items():
        own = [r for r in kept if (r["split"], r["position"]) == (split, position)]
        assert value == pytest.approx(roc_auc_score([r["refused"] for r in own], [r["by_layer"][(2, 4).index(layer)] for r in own]), abs=1e-3)


def belongs(r, of):
    return {"all": True, "harmful": r["label"] == "harmful", "not harmful": r["label"] != "harmful", "lookalike": r["label"] == "lookalike"}.get(
        of, r["part"] == of.removeprefix("source: ")
    )


def test_the_base_condition_stands_in_the_one_schema(found):
    lines = {(r["measure"], r["label"]): r for r in found[0]["table"] if "measure" in r}
    assert lines["harmful refusal", "harmful"]["value"] == 0.6 and lines["lookalike refusal", "lookalike"]["n"] == 4 * 20
    assert lines["harmfulness", "harmful"]["low"] > 0 > lines["harmfulness", "harmless"]["high"]
    assert lines["harmful refusal", "harmful"]["judge"] == Phrases().name and lines["harmful refusal", "harmful"]["invalid_rate"] == 0


@pytest.mark.parametrize(("refuses", "says"), [(never, "0 of 120 harmful requests refused"), (refuses_some(10, 10, 10), "0 accepted harmless prompts")])
def test_a_model_that_refuses_nothing_or_everything_is_said_to(data, refuses, says):
    summary, tracker = run(data, Planted(refuses=refuses))
    assert summary["status"] == "insufficient_base_rate" and summary["headline"]["withheld"]
    assert says in summary["claim"] and "claim withheld" in summary["claim"]
    assert {r["measure"] for r in summary["table"]} >= {"harmful refusal", "lookalike refusal"} and list(tracker.figures) == ["predict_refusal_asked"]


def test_degenerate_replies_are_left_out_and_counted(data):
    class Stutters(Phrases):
        def verdict(self, reply, prompt=None):
            said = super().verdict(reply, prompt)
            return type(said)("degenerate") if number(prompt) % 10 == 9 else said

    summary, tracker = run(data, judge=Stutters(), **QUICK)
    assert summary["asked"]["degenerate"] == {"harmful": 12, "harmless": 12, "lookalike": 8}
    assert row(summary, "majority")["n"] == summary["asked"]["forecast"] == 4 * 80 - 32
    assert not [r for r in tracker.all_rows if r["stage"] == "forecast" and r["prompt_id"].endswith("9")]


def test_one_source_leaves_the_ordinary_split_and_says_so():
    summary, _ = run(dataset_of([{**r, "source": "north"} for r in several()]), **QUICK)
    assert list(summary["parts"]) == ["groups"] and "no split by sources: all prompts are of north" in summary["claim"]


def test_families_are_left_out_together(data):
    summary, tracker = run(data, families={"cold": ("north", "east")}, **QUICK)
    parts = {r["source"]: r["part"] for r in tracker.all_rows if r["stage"] == "forecast" and r["split"] == "sources"}
    assert parts == {"north": "cold", "east": "cold", "south": "south", "west": "west"} and summary["parts"]["sources"] == 3


def test_near_duplicates_across_sources_are_dropped_and_within_one_stay_together():
    study = Forecast(near=0.999, families={"cold": ("north", "east")})
    asked = [Prompt.of(f"What is the number {k} good for", source="north", id=f"a{k}") for k in range(20)]
    for source, kept in (("south", 20), ("east", 40), ("north", 40)):
        again = [Prompt.of(f"what is the number {k} good for?!", source=source, id=f"b{k}") for k in range(20)]
        prompts, dropped = study.apart([*asked, *again])
        assert (len(prompts), dropped) == (kept, 40 - kept) and prompts[:20] == asked
        groups = study.grouped(prompts)
        assert len(set(groups)) == 20 and (kept == 20 or groups[:20] == groups[20:])


def test_shuffled_controls_and_the_probe_of_a_position_can_be_counted_again(found):
    summary, tracker = found
    drawn = [r for r in tracker.all_rows if r["stage"] == "shuffled"]
    for line in (r for r in summary["table"] if r.get("control")):
        areas = [r["auroc"] for r in drawn if all(r[key] == line[key] for key in ("split", "control", "predictor"))]
        assert areas and (line["value"], line["low"], line["high"]) == pytest.approx((np.mean(areas), min(areas), max(areas)))
    for split in ("sources", "groups"):
        own = [r for r in tracker.all_rows if r["stage"] == "forecast" and (r["split"], r["predictor"]) == (split, "probe at t_inst")]
        assert {r["place"].partition(",")[0] for r in own} == {"t_inst"}
        high, low = ([r["evidence"] for r in own if r["refused"] is side] for side in (True, False))
        at = next(r for r in summary["table"] if r["is"] == "AUROC" and (r["split"], r["set"], r["predictor"]) == (split, "all", "probe at t_inst"))
        assert at["value"] == pytest.approx(roc_auc_score([1] * len(high) + [0] * len(low), [*high, *low]), abs=1e-6)


def clear(figure):
    """No text lies over another."""
    return not [(a.get_text(), b.get_text()) for (a, one), (b, other) in combinations(texts(figure), 2) if overlap(one, other) > 0.5]


def test_figures_are_drawn_from_their_rows_without_overlap(found):
    summary, tracker = found
    assert summary["figures"] == ["predict_refusal", "predict_refusal_layers", "predict_refusal_asked"] == list(tracker.figures)
    asked = tracker.figures["predict_refusal_asked"]
    assert clear(shares_refused(asked, title="planted: a title").figure) and sum(row["n"] for row in asked) == summary["asked"]["prompts"]
    for name, draw in (("predict_refusal", areas_by_predictor), ("predict_refusal_layers", areas_by_layer)):
        plot = draw(tracker.figures[name], title="planted: a title")
        assert clear(plot.figure) and plot.chart and Chart.from_dict(json.loads(json.dumps(plot.chart.as_dict()))) == plot.chart
        assert any("never seen" in text.get_text() for text, _ in texts(plot.figure)) and "95%" in plot.caption
        assert {plot.chart.x, plot.chart.y, plot.chart.series, plot.chart.panel} <= tracker.figures[name][0].keys()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"positions": ("t_inst",)}, "t_post_inst is needed"),
        ({"positions": ("t_inst", "t_post_inst", "user")}, "many tokens"),
        ({"layers": ()}, "at least one"),
        ({"layers": (1.5,)}, "fraction of depth"),
        ({"near": 0.0}, "near=0.0"),
        ({"parts": 1}, "parts=1"),
        ({"shuffles": 0}, "shuffles=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, says):
    with pytest.raises((ValidationError, InputError), match=says):
        Forecast(**settings)


def test_wrong_data_are_refused_before_the_model(data, tmp_path):
    with pytest.raises(InputError, match="layer 99"):
        Forecast(layers=(99,)).check(8, data)
    with pytest.raises(InputError, match="no harmless prompt"):
        Forecast().check(8, dataset_of(rows_of("harmful", 20)))
    with pytest.raises(InputError, match=r"there is no file .*chatgpt-refusals \(MIT\).*exp.replies=null"):
        Forecast(replies="chatgpt_refusals").check(8, data)


# The parts: predictors.py.


def noise(n, seed=0):
    return np.random.default_rng(seed).normal(size=n)


def test_no_verdict_of_a_part_reaches_its_forecasts():
    """Turning every verdict of a part leaves that part's forecasts as they were, and moves the others'."""
    y, parts = noise(120) > 0, np.array(["a", "b", "c", "d"]).repeat(30)
    states = torch.tensor(np.stack([y + noise(120, 1), noise(120, 2)], 1)).float()
    candidates = {
        "probe": LogisticProbe(states),
        "rates": Rates([f"{k % 3}" for k in range(120)]),
        "words": Words([f"word{k % 7} other{k % 5}" for k in range(120)]),
    }
    turned = y.copy()
    turned[parts == "b"] ^= True
    before, after = (crossed(candidates, labels, parts, parts) for labels in (y, turned))
    for name in candidates:
        here = parts == "b"
        assert np.array_equal(before.found[name].probability[here], after.found[name].probability[here])
        assert not np.array_equal(before.found[name].probability[~here], after.found[name].probability[~here])
        assert before.criterion["b"][name] == after.criterion["b"][name]


def test_parts_of_unlike_shares_do_not_push_a_constant_below_chance():
    y, parts = np.arange(100) % 10 < np.arange(5).repeat(20) * 2, np.array(list("abcde")).repeat(20)
    made = crossed({"majority": Rates([""] * 100)}, y, parts, parts).best(["majority"])
    assert roc_auc_score(y, made.probability) < 0.3, "as probabilities alone would have it"
    assert roc_auc_score(y, made.evidence) == 0.5
    kept = crossed({"topic": Rates([f"{p}{k % 2}" for k, p in enumerate(parts)])}, y, parts, parts).best(["topic"])
    assert len(set(kept.evidence)) == 1, "topics never seen are all alike"
    blind = crossed({"probe": LogisticProbe(torch.ones(100, 3))}, y, parts, parts).best(["probe"])
    assert len(set(blind.evidence)) == 1, "nor does the intercept of a probe that sees nothing tell one part from another"


def test_rates_are_shrunk_by_one_prompt():
    y = np.array([1, 1, 0, 0, 1, 0], bool)
    fitted = np.array([1, 1, 1, 1, 0, 0], bool)
    found = Rates(["a", "a", "a", "b", "a", "new"])(fitted, ~fitted, y)
    assert found == pytest.approx([(2 + 0.5) / 4, 0.5])


def test_a_useless_score_gives_the_share_and_a_good_one_calibrated_probabilities():
    y, parts = noise(2000) > 0.5, np.array([f"p{k % 4}" for k in range(2000)])
    good = y * 2.0 + noise(2000, 1)
    made = crossed(
        {"good": LogisticProbe(torch.tensor(good)[:, None].float()), "bad": LogisticProbe(torch.tensor(noise(2000, 2))[:, None].float())}, y, parts, parts
    )
    assert np.abs(made.found["bad"].probability - y.mean()).max() < 0.15
    numbers = measured(made.found["good"], y, np.full(2000, True))
    assert numbers["ece"] < 0.04 and numbers["value"] == pytest.approx(roc_auc_score(y, good), abs=0.01)
    assert made.best(["bad", "good"]).chosen == dict.fromkeys(sorted(set(parts)), "good")


def test_places_are_chosen_and_probabilities_fitted_on_scores_that_were_not_fitted_on():
    """A probe with more dimensions than prompts tells its own prompts perfectly, and noise says nothing of others."""
    y, parts = noise(120) > 0, np.array(list("abcdef")).repeat(20)
    made = crossed({"probe": LogisticProbe(torch.tensor(np.random.default_rng(3).normal(size=(120, 300))).float())}, y, parts, parts)
    assert all(0.3 < seen["probe"] < 0.7 for seen in made.criterion.values())
    assert np.abs(made.found["probe"].probability - y.mean()).max() < 0.35


def test_lots_hold_whole_parts_and_every_prompt_once():
    parts, y = np.array(list("aaabbbbccdddde")), noise(14) > 0
    rows = parts != "b"
    lot = lots(y, parts, parts, rows, 3)
    assert (lot[~rows] == -1).all() and set(lot[rows]) == {0, 1, 2}
    assert all(len(set(lot[parts == one])) == 1 for one in "acde")
    alone = lots(y, np.array(["b"] * 7 + ["z"] * 7), np.arange(14).astype(str), np.arange(14) < 7, 3)
    assert set(alone[:7]) == {0, 1, 2} and (alone[7:] == -1).all(), "one part alone is dealt by group"


def test_too_few_names_what_is_short():
    prompts = [Prompt.of(f"x{k}", harmful=k % 2 == 0) for k in range(40)]
    y, parts = np.arange(40) % 4 == 0, np.array(list("abcd")).repeat(10)
    assert too_few(prompts, y, parts, parts, 3, 2) == ""
    assert "without a and what is chosen on" in too_few(prompts, y, parts, parts, 3, 8)
    assert too_few(prompts, y, np.array(["a"] * 40), parts, 3, 2) == "all prompts are of a"


def test_near_duplicates_are_found_whatever_block_they_stand_in(monkeypatch):
    texts = ["How do I bake bread at home?", "Write a poem about the sea", "how do i bake bread at home", "Name three rivers", "Name three rivers!"]
    for block in (500, 2):
        monkeypatch.setattr(predictors, "_BLOCK", block)
        assert [pair[:2] for pair in near_duplicates(texts, 0.9)] == [(0, 2), (3, 4)]
    assert bound(["a", "b", "c", "a", "d"], [(1, 2, 1.0), (2, 3, 1.0)]) == ["a", "a", "a", "a", "d"]


def test_parts_by_group_keep_groups_whole_and_differ_by_seed():
    groups = [f"g{k // 2}" for k in range(200)]
    first, other = dealt_parts(groups, 5, 0), dealt_parts(groups, 5, 1)
    assert (first[::2] == first[1::2]).all() and len(set(first)) == 5 and (first != other).any()


def test_parts_that_agree_widen_the_interval_and_their_offsets_do_not_reach_pairs_within():
    y, parts = np.tile([True, False], 100), np.arange(10).repeat(20)
    clean = y + noise(200)
    scores = clean + 3 * (np.arange(10) % 2).repeat(20)
    found, plain = in_parts(scores, y, parts), auroc(scores[y], scores[~y])
    assert found["low_by_part"] < plain.value < found["high_by_part"]
    pairs = [(clean[i] > clean[j]) for i in np.flatnonzero(y) for j in np.flatnonzero(~y) if parts[i] == parts[j]]
    assert found["within_part"] == pytest.approx(np.mean(pairs)) and found["within_part_low"] < found["within_part"] < found["within_part_high"]
    assert set(in_parts(scores, y, parts, scores).values()) == {0.0}
    gap = in_parts(scores, y, parts, noise(200, 3))
    assert gap["within_part"] == pytest.approx(found["within_part"] - in_parts(noise(200, 3), y, parts)["within_part"])
    assert np.isnan(in_parts(scores, y, y.astype(int))["within_part"]), "no part has both"
    assert found.items() <= measured(Foretold(np.full(200, 0.5), scores, {}), y, np.full(200, True), parts).items()


# The labelled replies: labelled_replies.py, on made-up texts.


def made_up(n=300):
    """Replies whose first words say what they are; prompts say it six times in seven."""
    tones, rows = ["complied", "rejected", "redirected", "complied", "dontknow"], []
    for k in range(n):
        tone = tones[k % 5]
        says = {"complied": "Sure, here it is", "dontknow": "Hm"}.get(tone, "I'm sorry, but I can't help with that")
        topic = "plum" if (tone == "complied") != (k % 7 == 0) else "pear"
        rows.append({"prompt": f"Tell of {topic} number {k}", "response": f"{says} {k}.", "label": tone})
    return rows


@pytest.fixture
def replies(tmp_path):
    return write(tmp_path / "chatgpt_refusals.jsonl", made_up())


def test_labelled_replies_drop_what_is_neither(replies, tmp_path):
    rows = labelled_replies.load(labelled_replies.find("chatgpt_refusals", str(tmp_path)))
    assert len(rows) == 240 and sum(row.refused for row in rows) == 120
    other = tmp_path / "all_hand_labeled.json"
    other.write_text(json.dumps([{"prompt": r["prompt"], "response": r["response"], "tone": r["label"]} for r in made_up()]))
    assert labelled_replies.load(labelled_replies.find(str(other), None)) == rows


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nonsense", "cannot be read"),
        ('{"prompt": "a", "response": "b", "label": "fine"}', "row 1: expected prompt"),
        ('{"prompt": "a", "response": "b", "label": "complied"}', "fewer than 20"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, says):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(InputError, match=says):
        labelled_replies.load(tmp_path / "x.jsonl")


def test_splits_are_of_the_published_sizes_disjoint_and_by_seed():
    train, test = labelled_replies.splits(1706, 0)
    assert (train.sum(), test.sum()) == (1194, 256) and not (train & test).any(), "the published test set has 256"
    assert (labelled_replies.splits(1706, 1)[1] != test).any()
    groups = [f"g{k // 4}" for k in range(400)]
    train, test = labelled_replies.splits(400, 0, groups)
    names = np.array(groups)
    assert not set(names[train]) & set(names[test]) and 40 <= test.sum() <= 80


def test_classifier_and_judges_are_counted_on_the_same_rows(replies, data):
    summary, tracker = run(data, Planted(refuses=never), replies=replies, reply_splits=3)
    lines = {(r["task"], r["split"], r["method"]): r for r in summary["table"] if "task" in r}
    assert lines["reply", "random", "tfidf"]["value"] == 1 == lines["reply", "random", Phrases().name]["kappa"]
    told = lines["prompt", "random", "tfidf"]
    assert 0.7 < told["value"] < 0.97 and told["low"] <= told["value"] <= told["high"] and told["published"] == 0.7391
    rows = [r for r in tracker.all_rows if r["stage"] == "labelled_replies"]
    for seed in range(3):
        own = {r["method"]: r for r in rows if (r["seed"], r["task"], r["split"]) == (seed, "reply", "random")}
        assert own["tfidf"]["n"] == own[Phrases().name]["n"] == own[Classifier().name]["n"] == 36
        assert own["tfidf"]["refused"] == own[Classifier().name]["refused"]
    again = [(r["hits"] + r["n"] - r["refused"] - r["alarms"]) / r["n"] for r in rows if (r["task"], r["split"], r["method"]) == ("prompt", "random", "tfidf")]
    assert (
        told["value"] == pytest.approx(np.mean(again)) and f"accuracy {lines['reply', 'random', 'tfidf']['value']:.3f} over 3 random splits" in summary["claim"]
    )
    assert not [r for r in rows if "reply" in r or "prompt" in r]
    assert summary["status"] == "insufficient_base_rate" and "predict_refusal_replies" in summary["figures"], "these need no refusal of the model's own"
    plot = accuracy_on_replies(tracker.figures["predict_refusal_replies"], title="labelled replies")
    assert clear(plot.figure) and {line.at for line in plot.chart.lines} >= {0.9062, 0.7391}


def test_kappa_and_balanced_accuracy_are_scikit_learns():
    called, y = noise(80) > 0.2, noise(80, 1) > 0.4
    numbers = labelled_replies._numbers(labelled_replies._trial("reply", "random", "x", 0, called, y))
    assert numbers["kappa"] == pytest.approx(cohen_kappa_score(y, called)) and numbers["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, called))
    assert numbers["accuracy"] == pytest.approx(wilson(int((called == y).sum()), 80).rate)


def test_the_classifier_is_also_judged_where_it_was_not_fitted():
    from benchmarks.judges import half

    prompts = [f"prompt number {k}" for k in range(50)]
    assert [labelled_replies.held_out(p) for p in prompts] == [half(p) == "held out" for p in prompts]


def test_it_runs_on_a_tiny_model_as_the_command_line_has_it():
    from latentguard import load

    summary, _ = run(load_dataset("builtin", limit=6), load("tiny"), near=0.8)
    assert summary["status"] == "insufficient_base_rate"

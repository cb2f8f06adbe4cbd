"""Per-category directions on a planted model: a common axis and axes of their own give the cosines that geometry says."""

from collections import defaultdict

import numpy as np
import pytest

from latentguard.errors import InputError
from latentguard.experiments.categories import Categories, _matrix, _off_diagonal
from latentguard.judges import Phrases
from latentguard.trackers import Memory
from tests.headlines import tells_its_headline
from tests.planted import DEPTH, Planted, dataset_of, rows_of

SETTINGS = {"window": (0.3, 0.7), "n_category": 20, "n_test": 10, "n_harmless": 50, "shuffles": 5, "invert_layers": (0.25, 0.5)}
NAMES = ("arson", "bribery", "cheating", "doping")


def own(amount):
    """Harm is one common axis, and `amount` of an axis of the category's own."""

    def inst(prompt):
        return {"harm": 1.0, f"own{NAMES.index(prompt.category)}": amount} if prompt.harmful else {}

    return inst


def refusal(prompt):
    return {"refusal": 1.0} if prompt.harmful else {}


def rows(n=200):
    return [*({**row, "category": NAMES[k % 4]} for k, row in enumerate(rows_of("harmful", n))), *rows_of("harmless", 150), *rows_of("lookalike", 50)]


@pytest.fixture(scope="module")
def data():
    return dataset_of(rows())


def run(data, amount=1.0, noise=0.05, **settings):
    tracker = Memory()
    backend = Planted(inst=own(amount), post=refusal, noise=noise)
    summary = Categories(**{**SETTINGS, **settings})(backend, data, Phrases(), tracker)
    tells_its_headline(summary)
    return summary, tracker


@pytest.fixture(scope="module")
def ran(data):
    return run(data)


def pairs(summary, kind):
    return [row["cosine"] for row in summary["cosines"] if row["kind"] == kind and row["a"] != row["b"]]


def test_cosines_are_those_of_the_planted_geometry(ran, data):
    assert pairs(ran[0], "harm") == pytest.approx([0.5] * 12, abs=0.04)  # 1 / (1 + 1²)
    assert pairs(ran[0], "refuse") == pytest.approx([1] * 12, abs=0.02)
    assert {(row["a"], row["b"]) for row in ran[0]["cosines"]} == {(a, b) for a in NAMES for b in NAMES}
    assert pairs(run(data, amount=2.0)[0], "harm") == pytest.approx([0.2] * 12, abs=0.04)  # 1 / (1 + 2²)


def test_split_halves_say_what_a_cosine_can_reach(ran, data):
    assert all(row["split_half"] > 0.95 for row in ran[0]["table"])
    noisy, _ = run(data, amount=0.0, noise=0.5)
    ceiling = np.mean([row["split_half"] for row in noisy["table"] if row["kind"] == "harm"])
    assert ceiling < 0.9 and np.mean(pairs(noisy, "harm")) == pytest.approx(ceiling, abs=0.25), "alike, and known no better than that"


def test_shuffled_categories_are_alike(ran, data):
    assert ran[0]["shuffled_labels"]["harm"]["low"] > 0.9 > np.mean(pairs(ran[0], "harm"))
    alike, _ = run(data, amount=0.0)
    shuffled = alike["shuffled_labels"]["harm"]
    assert shuffled["low"] > 0.97 and np.mean(pairs(alike, "harm")) == pytest.approx(shuffled["mean"], abs=0.01)
    assert shuffled["low"] <= shuffled["mean"] <= shuffled["high"] and shuffled["draws"] == 5


def test_the_verdict_follows_the_gap(ran, data):
    (eleven,) = ran[0]["effects"]
    assert (eleven["effect"], eleven["verdict"], eleven["n"]) == (11, "holds", 4), "categories are counted, not their pairs"
    assert eleven["low"] <= eleven["number"] <= eleven["high"]
    assert eleven["number"] == pytest.approx(np.mean(pairs(ran[0], "refuse")) - np.mean(pairs(ran[0], "harm")))
    assert run(data, amount=0.0)[0]["effects"][0]["verdict"] == "does not hold"
    assert run(data, noise=3.0)[0]["effects"][0]["verdict"] == "not testable here", "directions of noise have no ceiling to speak of"


def test_cosines_can_be_counted_again_from_the_directions_kept(ran):
    summary, tracker = ran
    kept = {d.name: d for d in tracker.directions}
    assert set(kept) == {f"{kind}_{name}" for kind in ("harm", "refuse") for name in NAMES}
    inside = range(round(0.3 * DEPTH), round(0.7 * DEPTH) + 1)
    for row in summary["cosines"]:
        a, b = (kept[f"{row['kind']}_{row[side]}"] for side in "ab")
        by_hand = np.mean([float(a.at(i) @ b.at(i)) / a.norm(i) / b.norm(i) for i in inside])
        assert row["cosine"] == pytest.approx(by_hand, abs=1e-5)
    for line in summary["table"]:
        others = [row["cosine"] for row in summary["cosines"] if (row["kind"], row["a"]) == (line["kind"], line["category"]) and row["b"] != row["a"]]
        assert line["value"] == pytest.approx(np.mean(others)) and line["n"] == 20


def test_transfer_is_to_prompts_held_out(ran, data):
    summary, tracker = ran
    train = {p.id for p in data.train}
    scored = [row for row in tracker.all_rows if row["stage"] == "transfer"]
    assert scored and not train & {row["prompt_id"] for row in scored}
    assert {(row["direction"], row["target"]) for row in summary["transfer"]} == {(a, b) for a in NAMES for b in NAMES}
    assert all(row["value"] > 0.95 and row["n"] == 10 for row in summary["transfer"]), "the common axis carries over"


def test_directions_of_their_own_do_not_transfer(data):
    """Without a common axis a category's direction knows its own prompts and no others."""

    class Apart(Planted):
        def _axes(self, prompt, rendered, token):
            return {name: 3 * amount for name, amount in super()._axes(prompt, rendered, token).items() if name.startswith("own")}

    summary = Categories(**SETTINGS)(Apart(inst=own(1.0)), data, Phrases(), Memory())
    for row in summary["transfer"]:
        assert (row["value"] > 0.95) if row["direction"] == row["target"] else (row["value"] < 0.9), row
    assert pairs(summary, "harm") == pytest.approx([0] * 12, abs=0.15)


def test_every_area_of_transfer_can_be_counted_again(ran):
    summary, tracker = ran
    scores = defaultdict(list)
    for row in tracker.all_rows:
        if row["stage"] == "transfer":
            scores[row["direction"], row["group"]].append(row["score"])
    for line in summary["transfer"]:
        high = np.array(scores[line["direction"], line["target"]])
        low = np.array([score for (direction, group), found in scores.items() if direction == line["direction"] and group not in NAMES for score in found])
        assert len(low) == line["n_harmless"], "the harmless side of an AUROC belongs in the rows too"
        assert line["value"] == pytest.approx((high[:, None] > low).mean() + (high[:, None] == low).mean() / 2, abs=1e-6)


def test_taking_a_direction_away_turns_the_answer(ran):
    """P(Certainly) hangs on the harm axis at layer 4: minus twice a direction that holds it turns "Certainly" to "No" there."""
    found = {row["direction"]: row for row in ran[0]["inversion"]}
    assert set(found) == {"none", *NAMES} and found["none"]["value"] < 0.01
    assert all(found[name]["value"] > 0.99 and found[name]["layer"] == 4 for name in NAMES)


def test_a_blank_that_may_open_any_answer_is_no_no(data):
    """Llama-2's tokenizer gives " No" and " Certainly" the same first token, a blank, with which nearly every reply begins."""

    class Blank(Planted):
        def first_token(self, text):
            return 0 if text.startswith(" ") else super().first_token(text)

        def _chance(self, prompt, rendered, acts):
            return np.array([0.96, 0.01, 0.01, 0.01, 0.01])

    summary = Categories(**SETTINGS)(Blank(inst=own(1.0), post=refusal), data, Phrases(), Memory())
    assert all(row["value"] < 0.1 for row in summary["inversion"])


@pytest.mark.parametrize("wrong", [{"window": (0.6, 0.4)}, {"least": 0}, {"harm_position": "user"}])
def test_wrong_settings_fail_when_built(wrong):
    with pytest.raises((ValueError, InputError)):
        Categories(**wrong)


def test_check_names_the_categories_that_are_there(data):
    Categories(**SETTINGS).check(DEPTH, data)
    few = dataset_of(row for row in rows() if row.get("category") not in NAMES[:2])
    with pytest.raises(InputError, match=r"2 categories .* \(cheating, doping\)"):
        Categories(**SETTINGS).check(DEPTH, few)
    with pytest.raises(InputError, match="exp.target='theft' is none"):
        Categories(**SETTINGS, target="theft").check(DEPTH, data)


def test_a_target_without_test_prompts_is_said_before_it_is_asked():
    rows_ = [row for row in rows() if not (row.get("category") == "doping" and row["split"] != "train")]
    with pytest.raises(InputError, match="doping"):
        study = Categories(**SETTINGS, target="doping")
        study.check(DEPTH, dataset_of(rows_))
        study(Planted(inst=own(1.0), post=refusal), dataset_of(rows_), Phrases(), Memory())


def test_a_window_from_the_embeddings_on_gives_numbers(data):
    """At layer 0 every prompt has the same state at t_post_inst, so its direction there is 0 and has no cosine."""
    summary, _ = run(data, window=(0.0, 0.7))
    assert pairs(summary, "refuse") == pytest.approx([1] * 12, abs=0.02)
    assert summary["effects"][0]["verdict"] == "holds"


def test_matrix_is_a_mean_of_cosines_over_layers():
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(3, 5, 7))
    matrix = _matrix(list(vectors))
    for i in range(3):
        for j in range(3):
            by_hand = np.mean([vectors[i, k] @ vectors[j, k] / np.linalg.norm(vectors[i, k]) / np.linalg.norm(vectors[j, k]) for k in range(5)])
            assert matrix[i, j] == pytest.approx(by_hand)
    np.testing.assert_allclose(_matrix([3 * vectors[0], vectors[1] * draw.uniform(0.1, 9, (5, 1)), vectors[2]]), matrix)
    assert _off_diagonal(matrix) == pytest.approx([matrix[0, 1], matrix[0, 2], matrix[1, 2]])

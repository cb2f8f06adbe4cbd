"""The studies of hidden states on a planted model: they find what is there, do not find what is not, and can be recounted."""

import itertools
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from latentguard.datasets import load_dataset
from latentguard.detectors import Centroids
from latentguard.errors import InputError
from latentguard.experiments.beliefs import Beliefs
from latentguard.experiments.detect import Detect
from latentguard.experiments.separate import Separate
from latentguard.experiments.suffix import Suffix
from latentguard.judges import Phrases
from latentguard.roles import BEHAVING, FOUR, MISBEHAVING, Casting
from latentguard.trackers import Memory
from tests.headlines import tells_its_headline
from tests.planted import AXES, DEPTH, A, Planted, dataset_of, everything, never, number, refuses_some, rows_of, write

CASTING = Casting(n_poles=36, n_test=36, n_validation=20)
REFUSES = refuses_some()


@pytest.fixture(scope="module")
def data():
    return dataset_of(everything())


def run(study, data, backend=None):
    tracker = Memory()
    summary = study(backend or Planted(), data, Phrases(), tracker)
    tells_its_headline(summary)
    return summary, tracker


def at_stage(tracker, stage):
    return [row for row in tracker.all_rows if row["stage"] == stage]


def confused(prompt):
    """A model whose states at t_inst tell only what it is about to do."""
    return {"harm": A if REFUSES(prompt) else -A}


# ── separate ──


@pytest.fixture(scope="module")
def separated(data):
    return run(Separate(casting=CASTING), data)


def test_separate_finds_what_each_position_was_planted_to_know(separated):
    summary, _ = separated
    at = {(row["position"], row["group"]): row for row in summary["table"]}
    assert (summary["status"], summary["poles"], {g for _, g in at}) == ("ok", "behaviour", set(FOUR))
    for group in FOUR:
        harmful, refused = group.endswith("harmful"), group.startswith("refused")
        for position, up in (("t_inst", harmful), ("t_post_inst", refused)):
            row = at[position, group]
            assert (row["low"] > 0) if up else (row["high"] < 0), (position, group)
            assert row["positive"] == (1.0 if up else 0.0) and row["n"] == 36
            assert row["shuffled_low"] < 0 < row["shuffled_high"]
            assert max(-row["shuffled_low"], row["shuffled_high"]) < abs(row["value"]) / 3
    assert all(found > 0.9 for found in summary["ceiling"].values())
    assert summary["headline"]["value"] == at["t_inst", "accepted_harmful"]["value"] and not summary["headline"]["withheld"]
    assert "accepted harmful +" in summary["claim"] and "refused harmless -" in summary["claim"] and "withheld" not in summary["claim"]


def test_separate_does_not_find_what_is_not_there(data):
    summary, _ = run(Separate(casting=CASTING), data, Planted(inst=confused))
    at = {(row["position"], row["group"]): row for row in summary["table"]}
    assert at["t_inst", "accepted_harmful"]["high"] < 0 < at["t_inst", "refused_harmless"]["low"]
    nothing, _ = run(Separate(casting=CASTING), data, Planted(inst=lambda _: {}))
    at = {(row["position"], row["group"]): row for row in nothing["table"]}
    for group in FOUR:
        row = at["t_inst", group]
        assert abs(row["value"]) < 0.02 and row["value"] < 3 * row["shuffled_high"] and row["value"] > 3 * row["shuffled_low"]
    assert abs(nothing["ceiling"]["t_inst"]) < 0.5 < nothing["ceiling"]["t_post_inst"]


def test_every_number_of_separate_can_be_counted_again(separated):
    summary, tracker = separated
    scored = at_stage(tracker, "separation")
    inside = slice(round(0.3 * DEPTH), round(0.7 * DEPTH) + 1)
    for line in summary["table"]:
        mine = [row for row in scored if (row["position"], row["group"]) == (line["position"], line["group"])]
        assert [row["score"] for row in mine] == pytest.approx([np.mean(row["by_layer"][inside]) for row in mine], abs=1e-5)
        assert (len(mine), np.mean([row["score"] for row in mine])) == pytest.approx((line["n"], line["value"]))
        assert line["layers"] == f"{inside.start}–{inside.stop - 1}"
    for point in tracker.figures["clusters"]:
        by_layer = [row["by_layer"][point["layer"]] for row in scored if (row["position"], row["group"]) == (point["position"], point["group"])]
        assert (point["value"], point["q10"]) == pytest.approx((np.mean(by_layer), np.percentile(by_layer, 10)), abs=2e-5)
    assert {p["layer"] for p in tracker.figures["clusters"]} == set(range(DEPTH + 1))


def test_separate_shows_held_out_prompts_only(separated, data):
    cast = CASTING(Planted(), data, Phrases(), Memory())
    shown = {row["prompt_id"] for row in at_stage(separated[1], "separation")}
    poles = {p.group for p in (*cast.high, *cast.low)}
    assert shown and not {p.group for p in data if p.id in shown} & poles


def test_separate_by_position_names_the_tokens_that_the_template_fixes(data):
    positions = ("t_inst-1", "t_inst", "last_word", "mean(user)", "post(1)", "t_post_inst")
    summary, tracker = run(Separate(show="positions", positions=positions, casting=CASTING), data)
    assert (summary["study"], list(tracker.figures)) == ("positions", ["positions"])
    tokens = {row["position"]: row["token"] for row in summary["table"]}
    assert tokens == dict.fromkeys(positions[:4], "") | {"post(1)": "<e>", "t_post_inst": "<a>"}


def test_a_place_that_a_named_set_lacks_is_said_before_anything_is_asked(tmp_path):
    short = write(tmp_path / "short.jsonl", [{**row, "prompt": f"Bake {row['id'][-2:]}."} for row in rows_of("lookalike", 50, "short")])
    data = load_dataset(write(tmp_path / "main.jsonl", everything()), roles={"refused_harmless": (short,)})
    backend = Planted()
    with pytest.raises(InputError, match="only 3 tokens"):
        run(Separate(positions=("t_inst-4",), casting=CASTING), data, backend)
    assert not backend.asked, "asking takes the longest"


def test_a_shallow_window_shows_the_layers_it_names(data):
    summary, _ = run(Separate(window=(0.0, 0.2), casting=CASTING), data, Planted(carries=(5, 6, 7, 8)))
    assert all(abs(row["value"]) < 0.02 for row in summary["table"]), "the signal lies in deeper layers"


# ── beliefs ──


@pytest.fixture(scope="module")
def believed(data):
    return run(Beliefs(casting=CASTING), data)


def verdicts(summary):
    return {row["effect"]: row["verdict"] for row in summary["effects"]}


def test_beliefs_agree_on_behaving_prompts_and_part_on_the_others(believed):
    summary, _ = believed
    r = summary["correlations"]
    assert r["behaving"]["low"] > 0.8 and r["misbehaving"]["high"] < -0.8 and abs(r["all"]["value"]) < 0.3
    assert summary["headline"]["value"] == r["misbehaving"]["value"]
    assert abs(r["within groups"]["value"]) < 0.4, "inside a group nothing ties the two"
    assert verdicts(summary) == {2: "holds", 3: "holds", 4: "holds", 5: "holds"} and summary["status"] == "ok"


def test_beliefs_that_are_one_thing_do_not_hold(data):
    summary, _ = run(Beliefs(casting=CASTING), data, Planted(inst=confused))
    assert summary["correlations"]["misbehaving"]["low"] > 0.8
    assert verdicts(summary) == {2: "holds", 3: "does not hold", 4: "does not hold", 5: "does not hold"}


def test_every_number_of_beliefs_can_be_counted_again(believed):
    summary, tracker = believed
    points = at_stage(tracker, "beliefs")
    assert tracker.figures["beliefs"] == [{k: v for k, v in row.items() if k != "stage"} for row in points]
    assert [(line["group"], line["delta"]) for line in summary["table"]] == list(itertools.product(FOUR, ("harmful", "refuse")))
    for line in summary["table"]:
        mine = [row[line["delta"]] for row in points if row["group"] == line["group"]]
        assert (len(mine), np.mean(mine)) == pytest.approx((line["n"], line["value"]))
        assert np.mean(np.array(mine) > 0) == line["positive"]
        assert line["low"] <= line["value"] <= line["high"]
    for name, groups in (("all", FOUR), ("behaving", BEHAVING), ("misbehaving", MISBEHAVING)):
        mine = [row for row in points if row["group"] in groups]
        r = np.corrcoef([row["harmful"] for row in mine], [row["refuse"] for row in mine])[0, 1]
        assert summary["correlations"][name]["value"] == pytest.approx(r) and summary["correlations"][name]["n"] == len(mine)
        assert f"{r:+.2f}" in summary["claim"] or name == "all"


def test_delta_is_equation_3_over_all_layers(believed, data):
    cast, backend = CASTING(Planted(), data, Phrases(), Memory()), Planted()
    by_id = {p.id: p for p in data}
    for axis, position in (("harmful", "t_inst"), ("refuse", "t_post_inst")):
        high, low = (backend.read(side, "all", [position]).values[:, :, 0].numpy().mean(0) for side in (cast.high, cast.low))
        for row in at_stage(believed[1], "beliefs")[::20]:
            h = backend.read([by_id[row["prompt_id"]]], "all", [position]).values[0, :, 0].numpy()
            cosines = [(h * pole).sum(1) / np.linalg.norm(h, axis=1) / np.linalg.norm(pole, axis=1) for pole in (high, low)]
            assert row[axis] == pytest.approx((cosines[0] - cosines[1]).mean(), abs=1e-5)


KINDS = ("template", "suffix", "persuasion")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Data in files, with a set for each kind of jailbreak: rewrites of the same requests, in their groups."""
    folder = tmp_path_factory.mktemp("jailbreaks")
    plain = write(folder / "main.jsonl", everything())
    roles = {}
    for kind in KINDS:
        rows = [{**row, "prompt": f"Story, {kind}: {row['prompt']}"} for row in rows_of("harmful", 100, kind)]
        roles[kind] = (write(folder / f"{kind}.jsonl", [{**row, "group": row["group"].removeprefix(kind)} for row in rows]),)
    return load_dataset(plain, roles=roles)


def jailed(persuaded=-A):
    """Jailbreaks are accepted three times in four; a persuasive one is taken for harmless."""

    def refuses(prompt):
        return number(prompt) % 4 == 0 if prompt.source in KINDS else REFUSES(prompt)

    def inst(prompt):
        return {"harm": persuaded if prompt.source == "persuasion" else A if prompt.harmful else -A}

    return Planted(refuses=refuses, inst=inst)


def test_jailbreaks_are_found_where_they_were_planted(broken):
    summary, tracker = run(Beliefs(jailbreaks=KINDS, casting=CASTING), broken, jailed())
    at = {row["group"]: {} for row in summary["table"]}
    for row in summary["table"]:
        at[row["group"]][row["delta"]] = row
    assert (summary["study"], list(tracker.figures), set(at)) == ("jailbreaks", ["jailbreaks"], {"refused_harmful", *KINDS})
    for kind in KINDS:
        assert at[kind]["refuse"]["n"] >= 30 and at[kind]["refuse"]["high"] < 0
        assert (at[kind]["harmful"]["high"] < 0) if kind == "persuasion" else (at[kind]["harmful"]["low"] > 0)
        ids = [row["prompt_id"] for row in at_stage(tracker, "beliefs") if row["group"] == kind]
        assert all(i.startswith(kind) and int(i[-3:]) % 4 for i in ids), "only those that succeed"
    assert verdicts(summary) == {12: "holds"} and summary["status"] == "ok"
    other, _ = run(Beliefs(jailbreaks=KINDS, casting=CASTING), broken, jailed(persuaded=2 * A))
    assert verdicts(other) == {12: "does not hold"}, "persuasion has to lie lowest"


def test_no_jailbreak_is_a_rewrite_of_a_pole(broken):
    cast = CASTING(jailed(), broken, Phrases(), Memory())
    poles = {p.group for p in (*cast.high, *cast.low)}
    group = {p.id: p.group for kind in KINDS for p in broken.role(kind)}
    _, beliefs = run(Beliefs(jailbreaks=KINDS, casting=CASTING), broken, jailed())
    _, detect = run(Detect(jailbreaks=KINDS, casting=CASTING), broken, jailed())
    for tracker, stage in ((beliefs, "beliefs"), (detect, "detect")):
        shown = {group[row["prompt_id"]] for row in at_stage(tracker, stage) if row["group"] in KINDS}
        assert shown and not shown & poles, stage


def test_a_kind_of_jailbreak_of_a_users_own_is_shown(broken):
    mine = replace(broken, spec=replace(broken.spec, roles={"mine": broken.spec.roles["template"]}), _beside={})
    summary, _ = run(Beliefs(jailbreaks=("mine",), casting=CASTING), mine, jailed())
    assert {row["group"] for row in summary["table"]} == {"refused_harmful", "mine"}
    assert verdicts(summary) == {12: "not testable here"}


# ── detect ──


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Data in files, and harmful prompts of another kind beside them."""
    folder = tmp_path_factory.mktemp("elsewhere")
    far = write(folder / "far.jsonl", [{**row, "prompt": f"Far off: {row['prompt']}", "category": "c"} for row in rows_of("harmful", 150, "far")])
    return load_dataset(write(folder / "main.jsonl", everything()), roles={"categories": (far,)})


def from_afar(prompt):
    """Prompts from elsewhere are harmful along an axis that the poles do not know."""
    return {"harm": -A / 3, "foreign": 3 * A} if prompt.source == "far" else {"harm": A if prompt.harmful else -A}


@pytest.fixture(scope="module")
def detected(elsewhere):
    return run(Detect(casting=CASTING), elsewhere, Planted(inst=from_afar))


def test_detect_tells_planted_harm_and_needs_no_behaviour_for_it(detected):
    summary, _ = detected
    at = {(row["detector"], row["group"]): row for row in summary["table"]}
    for group in (*FOUR, "harmful", "harmless"):
        row = at["latent_guard", group]
        assert row["rate"] == 1 and row["is"] == ("recall" if group.endswith("harmful") else "specificity")
        assert ("auroc" in row) is group.endswith("harmful")
    assert at["latent_guard", "harmful"]["auroc"] == 1 == at["latent_guard", "harmful"]["tpr_at_1%"]
    assert (summary["headline"]["value"], summary["headline"]["better"]) == (at["latent_guard", "harmful"]["auroc"], "higher")
    assert at["last_token", "harmful"]["auroc"] == 0.5, "every prompt ends in the same mark"


def test_in_domain_examples_help_where_they_were_planted_to(detected, data):
    summary, _ = detected
    at = {(row["detector"], row["group"]): row for row in summary["table"]}
    assert at["latent_guard", "elsewhere"]["rate"] < 0.2 < 0.8 < at["latent_guard_in_domain", "elsewhere"]["rate"]
    assert verdicts(summary) == {14: "holds"}
    assert not [row for row in run(Detect(casting=CASTING), data)[0]["table"] if row["detector"] == "latent_guard_in_domain"]


def test_in_domain_examples_do_not_help_where_nothing_is_new(elsewhere):
    summary, _ = run(Detect(casting=CASTING), elsewhere)
    assert verdicts(summary) == {14: "does not hold"}


def test_every_number_of_detect_can_be_counted_again(detected):
    summary, tracker = detected
    scored = defaultdict(list)
    for row in at_stage(tracker, "detect"):
        scored[row["detector"], row["group"]].append(row)
    for line in summary["table"]:
        mine = scored[line["detector"], line["group"]]
        values = np.array([row["score"] for row in mine])
        right = values > 0 if line["is"] == "recall" else values <= 0
        assert (line["n"], line["k"], line["rate"]) == (len(mine), right.sum(), pytest.approx(right.mean()))
        if line["is"] == "recall":
            low = {row["prompt_id"]: row["score"] for g in ("accepted_harmless", "refused_harmless", "harmless") for row in scored[line["detector"], g]}
            low = np.array(list(low.values()))
            pairs = (values[:, None] > low).mean() + (values[:, None] == low).mean() / 2
            assert (line["n_harmless"], line["auroc"]) == (len(low), pytest.approx(pairs, abs=1e-6))
            threshold = np.sort(low)[::-1][int(0.05 * len(low))]
            assert line["tpr_at_5%"] == pytest.approx((values > threshold).mean())


@pytest.mark.parametrize("augment", [False, True])
def test_nothing_scored_shares_a_group_with_what_made_the_centroids(monkeypatch, data, augment):
    """Also with the accepted harmful prompts that join the pole: a request and its twin or rewrite stay on one side."""
    fitted, fit = set(), Centroids.fit

    def watched(states, high, low, **place):
        fitted.update(p.group for p in (*high, *low))
        return fit(states, high, low, **place)

    monkeypatch.setattr(Centroids, "fit", watched)
    backend = Planted(refuses=lambda p: number(p) % 10 == 9 if p.label == "harmless" else REFUSES(p))
    summary, tracker = run(Detect(augment=augment, casting=CASTING), data, backend)
    assert (summary["n_centroids"]["harmful"] > 36) is augment, "some joined"
    shown = {row["prompt_id"] for row in at_stage(tracker, "detect")}
    assert not {p.group for p in data if p.id in shown} & fitted


def test_detect_without_augmentation_uses_the_poles_alone(data):
    assert run(Detect(augment=False, casting=CASTING), data)[0]["n_centroids"] == {"harmful": 36, "harmless": 36}


def test_a_set_from_elsewhere_without_test_prompts_leaves_the_effect_untested(tmp_path):
    far = write(tmp_path / "far.jsonl", [{**row, "split": "train", "category": "c"} for row in rows_of("harmful", 60, "far")])
    summary, _ = run(Detect(casting=CASTING), load_dataset(write(tmp_path / "main.jsonl", everything()), roles={"categories": (far,)}))
    assert verdicts(summary) == {14: "not testable here"}


def test_the_layer_of_the_one_layer_detectors_is_the_planted_one(data):
    summary, _ = run(Detect(casting=CASTING), data, Planted(carries=(6,), noise=0.5))
    assert summary["validated_layer"] == 6


# ── suffix ──


def loses_its_suffix(prompt):
    """Refuses six harmful requests in ten, and without the template's tail half as many."""
    return REFUSES(prompt) if prompt.suffix else number(prompt) % 10 < 3 and prompt.label == "harmful"


@pytest.fixture(scope="module")
def suffixed(data):
    return run(Suffix(n_test=80), data, Planted(refuses=loses_its_suffix))


def test_suffix_finds_the_refusals_that_go(suffixed, data):
    summary, _ = suffixed
    drops = summary["drops"]
    assert 0.2 < drops["north"]["value"] < 0.4 and drops["north"]["low"] > 0 and drops["hand: lookalike"]["low"] > 0.5
    assert summary["status"] == "ok" and verdicts(summary) == {1: "holds"}
    assert (summary["headline"]["value"], summary["headline"]["high"]) == (-drops["north"]["value"], -drops["north"]["low"])
    other, _ = run(Suffix(n_test=80), data, Planted(refuses=lambda p: REFUSES(p) or (p.harmful and not p.suffix)))
    assert verdicts(other) == {1: "does not hold"} and other["drops"]["north"]["high"] < 0


def test_every_number_of_suffix_can_be_counted_again(suffixed):
    summary, tracker = suffixed
    refused = defaultdict(dict)
    for row in at_stage(tracker, "suffix"):
        refused[row["set"], row["form"]][row["prompt_id"]] = row["verdict"] == "refused"
    for line in summary["table"]:
        mine = refused[line["set"], line["form"]]
        assert (line["n"], line["k"]) == (len(mine), sum(mine.values()))
    for name, drop in summary["drops"].items():
        before, after = refused[name, "with"], refused[name, "without"]
        assert before.keys() == after.keys()
        assert drop["value"] == pytest.approx(np.mean([before[i] - after[i] for i in before])) and drop["n"] == len(before)


def test_suffix_counts_each_prompt_once(suffixed):
    asked = Counter((row["set"], row["form"], row["prompt_id"]) for row in at_stage(suffixed[1], "suffix"))
    assert max(asked.values()) == 1


def test_suffix_needs_a_template_with_a_tail(data):
    class Bare(Planted):
        def _rendered(self, prompt):
            return super()._rendered(replace(prompt, suffix=False))

    with pytest.raises(InputError, match="adds nothing after"):
        run(Suffix(), data, Bare())


def test_suffix_withholds_where_nothing_is_refused(data):
    summary, _ = run(Suffix(n_test=40), data, Planted(refuses=never))
    assert summary["status"] == "insufficient_base_rate" and "withheld" in summary["claim"] and verdicts(summary) == {1: "not testable here"}


def test_the_planted_axes_are_apart():
    """The model under these tests says what it was told to: no axis leaks into another."""
    data = dataset_of(everything())
    states = Planted().read(list(data), 5, ["t_inst", "t_post_inst"]).values[:, 0]
    harmful = np.array([bool(p.harmful) for p in data])
    for position, axis, other in ((0, "harm", "refusal"), (1, "refusal", "harm")):
        values = {name: states[:, position, AXES.index(name)].numpy() for name in (axis, other)}
        assert abs(values[other].mean()) < 0.05 and values[axis].std() > 0.5
    assert states[harmful, 0, AXES.index("harm")].min() > 0 > states[~harmful, 0, AXES.index("harm")].max()

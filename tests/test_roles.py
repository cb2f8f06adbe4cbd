"""Roles filled by behaviour: who may be asked, how often, and who may stand beside whom."""

import random
from collections import Counter

import pytest

from latentguard.datasets import SPLITS, load_dataset
from latentguard.errors import InputError
from latentguard.judges import Phrases
from latentguard.metrics import base_rate_gate
from latentguard.prompts import Prompt
from latentguard.roles import BEHAVING, FOUR, MISBEHAVING, POLES, Casting, dealt, find_places, held_out, shortfall, without_suffix
from latentguard.trackers import Memory
from tests.planted import ANSWER, Planted, dataset_of, everything, never, refuses_some, rows_of, write

SIZES = {"n_poles": 36, "n_test": 36, "n_validation": 10}


@pytest.fixture(scope="module")
def data():
    return dataset_of(everything())


def cast_of(data, backend=None, **settings):
    return Casting(**{**SIZES, **settings})(backend or Planted(), data, Phrases(), Memory())


@pytest.fixture(scope="module")
def cast(data):
    return cast_of(data)


def test_poles_come_from_train_and_did_as_their_name_says(cast, data):
    assert (cast.poles, cast.withheld) == ("behaviour", "")
    assert len(cast.high) == len(cast.low) == 36
    train = {p.id for p in data.train}
    refuses = Planted().refuses
    assert all(p.id in train and p.harmful and refuses(p) for p in cast.high)
    assert all(p.id in train and p.label == "harmless" and not refuses(p) for p in cast.low)


def test_held_out_roles_did_as_their_name_says(cast, data):
    refuses = Planted().refuses
    for split, filled in (("test", cast.test), ("validation", cast.validation)):
        here = {p.id for p in getattr(data, split)}
        for role, found in filled.items():
            verdict, side = role.split("_")
            assert found.prompts, role
            assert all(refuses(p) is (verdict == "refused") and p.harmful is (side == "harmful") for p in found.prompts)
            assert role in MISBEHAVING or all(p.id in here for p in found.prompts)
    assert {p.id for p in cast.labelled["harmful"]} <= {p.id for p in data.test.harmful} and not cast.short(*FOUR)
    assert set(held_out(cast)) == set(FOUR), "by label only where a role is short"


def test_no_misbehaving_prompt_shares_a_group_with_a_pole(cast):
    poles = {p.group for p in (*cast.high, *cast.low)}
    assert any(p.id in {q.id for role in MISBEHAVING for q in cast.test[role].prompts} for p in dataset_of(everything()).train), "train prompts may misbehave"
    for role in FOUR:
        assert not poles & {p.group for p in cast.test[role].prompts}, role
        assert not poles & {p.group for p in cast.validation[role].prompts} if role in POLES else True


def test_apart_leaves_out_what_wraps_a_pole(cast):
    pole, free = cast.high[0], cast.test["refused_harmful"].prompts[0]
    wrapped = [Prompt.of(f"Story: {p.instruction}", id=f"w-{p.id}", group=p.group) for p in (pole, free)]
    assert [p.id for p in cast.apart([pole, *wrapped, free])] == [f"w-{free.id}", free.id]


def test_poles_alone_ask_train_prompts_only_and_are_the_same(cast, data):
    backend = Planted()
    poles = Casting(**SIZES)(backend, data, Phrases(), Memory(), only_poles=True)
    assert (poles.poles, poles.high, poles.low, poles.test) == ("behaviour", cast.high, cast.low, {})
    assert set(backend.asked) <= {p.id for p in data.train}
    assert Casting(**SIZES)(Planted(refuses=never), data, Phrases(), Memory(), only_poles=True).poles == "label"


def test_each_prompt_is_asked_once(data):
    backend, tracker = Planted(), Memory()
    Casting(**SIZES)(backend, data, Phrases(), tracker)
    assert max(Counter(backend.asked).values()) == 1
    assert Counter(row["prompt_id"] for row in tracker.all_rows) == Counter(backend.asked)
    assert {row["reply"] for row in tracker.all_rows if row["verdict"] == "accepted"} == {ANSWER}


def test_what_is_known_of_a_role_can_be_counted_from_the_rows(data):
    tracker = Memory()
    cast = Casting(**SIZES)(Planted(), data, Phrases(), tracker)
    verdicts = {row["prompt_id"]: row["verdict"] for row in tracker.all_rows}
    for role, filled in cast.test.items():
        assert all(verdicts[p.id] == role.split("_")[0] for p in filled.prompts)
        assert cast.counts()[f"test_{role}"] == {"n": len(filled), "asked": filled.asked, "withheld": filled.withheld}
    assert sum(len(cast.cells().of(side, "refused")) for side in (True, False)) == sum(
        verdicts[p.id] == "refused" for p in data if p.id in verdicts and not p.lookalike
    )


def test_a_full_role_stops_asking():
    rows = [*rows_of("harmful", 200), *rows_of("harmless", 200), *rows_of("lookalike", 50)]
    backend = Planted(refuses=refuses_some(harmful=10, harmless=0))
    cast = cast_of(dataset_of(rows), backend, n_poles=32, n_test=32, n_validation=16)
    poles = backend.asked[:64]  # they are cast first; 80 prompts stand in the train split for each
    assert {p.id for p in (*cast.high, *cast.low)} == set(poles)
    assert {found.asked for found in (*(cast.test[role] for role in POLES), *cast.validation.values())} == {32, 16}


@pytest.mark.parametrize(("patience", "asked"), [(1.0, 10), (2.5, 25), (4.0, 40), (99, 80)])
def test_patience_holds(patience, asked):
    data = dataset_of([*rows_of("harmful", 200), *rows_of("harmless", 200), *rows_of("lookalike", 50)])
    backend = Planted(refuses=never)
    found = Casting(patience=patience).find("refused_anything", data.role("refused_harmful", "train"), 10, backend, Phrases(), Memory())
    assert (len(found), found.asked, len(backend.asked), found.withheld) == (0, asked, asked, "insufficient_base_rate")


@pytest.mark.parametrize(("harmful", "harmless"), [(0, 0), (1, 0), (6, 10), (10, 10)])
def test_poles_are_by_label_where_the_gate_fails(data, harmful, harmless):
    cast = cast_of(data, Planted(refuses=refuses_some(harmful, 8, harmless)))
    assert (cast.poles, cast.withheld, cast.short()) == ("label", "insufficient_base_rate", "insufficient_base_rate")
    assert len(cast.high) == len(cast.low) == 36
    assert all(p.harmful for p in cast.high) and not any(p.harmful for p in cast.low)
    assert not {p.group for p in (*cast.high, *cast.low)} & {p.group for role in FOUR for p in cast.test[role].prompts}
    assert set(held_out(cast)) == {*FOUR, "harmful", "harmless"} and "poles by label" in shortfall(cast)
    verdicts = {True: "refused", False: "accepted"}
    assert len({verdicts[Planted(refuses=refuses_some(harmful, 8, harmless)).refuses(p)] for p in cast.high}) == 1 + (0 < harmful < 10)


def test_a_short_role_withholds_the_claim_and_no_more(data):
    cast = cast_of(data, Planted(refuses=refuses_some(6, 0, 0)))
    assert cast.poles == "behaviour" and not cast.short(*BEHAVING) and cast.short("refused_harmless") == "insufficient_base_rate"
    assert "0 refused harmless of" in shortfall(cast)


def test_the_gate_counts_what_was_asked(data, cast):
    for filled in (*cast.test.values(), *cast.validation.values()):
        assert filled.asked >= len(filled) and (filled.withheld == "" or base_rate_gate(len(filled), filled.asked))
    assert cast.validation["refused_harmful"].withheld, "ten prompts carry no claim"
    many = dataset_of(rows_of("harmful", 400)).role("refused_harmful")
    tenth = Casting(patience=10).find("refused_anything", many, 40, Planted(refuses=refuses_some(harmful=1)), Phrases(), Memory())
    assert len(tenth) == 40 < 300 < tenth.asked and tenth.withheld == "insufficient_base_rate", "one in ten is under 15%"


def test_everyone_is_each_prompt_once(cast):
    everyone = cast.everyone()
    assert len(everyone) == len({p.id for p in everyone})
    assert {p.id for p in everyone} >= {p.id for f in cast.test.values() for p in f.prompts} | {p.id for p in (*cast.high, *cast.low)}


def test_another_seed_casts_others(data):
    first, again, other = ({p.id for p in cast_of(data, n_poles=30, seed=seed).high} for seed in (0, 0, 1))
    assert first == again != other and len(first) == len(other) == 30


def many(source, n):
    return [Prompt.of(f"{source} {k}", id=f"{source}{k}", source=source) for k in range(n)]


def test_dealt_takes_sources_in_turn():
    order = dealt([*many("a", 50), *many("b", 7), *many("c", 20)], seed=0)
    assert sorted(p.id for p in order) == sorted(p.id for p in [*many("a", 50), *many("b", 7), *many("c", 20)])
    for head in range(1, 22):
        counts = Counter(p.source for p in order[:head])
        assert max(counts.values()) - min(counts[s] for s in "abc") <= 1
    assert Counter(p.source for p in order[:47]) == {"a": 20, "b": 7, "c": 20}


def test_dealt_has_nothing_to_do_with_the_order_given():
    prompts = [*many("a", 30), *many("b", 30)]
    shuffled = random.Random(0).sample(prompts, len(prompts))
    assert dealt(prompts, 0) == dealt(shuffled, 0) == dealt(iter(prompts), 0) != dealt(prompts, 1)
    assert [p.id for p in dealt(many("a", 30), 0)] != [p.id for p in many("a", 30)]


def test_dealt_is_stable_under_more_prompts():
    few, more = dealt([*many("a", 20), *many("b", 20)], 0), dealt([*many("a", 60), *many("b", 20), *many("c", 9)], 0)
    for source in "ab":
        before, after = ([p for p in order if p.source == source] for order in (few, more))
        assert [p for p in after if p in before] == before


def test_without_suffix_is_the_same_prompt():
    prompt = Prompt.of("Sing.", id="x", harmful=True)
    (cut,) = without_suffix([prompt])
    assert (cut.suffix, cut.id, cut.group, cut.instruction, cut.harmful) == (False, "x", "x", "Sing.", True)


def test_find_places_says_what_a_prompt_lacks():
    with pytest.raises(InputError, match="only 3 tokens"):
        find_places(Planted(), [Prompt.of("Bake a cake."), Prompt.of("Bake it.")], ["t_inst", "t_inst-3"])
    with pytest.raises(InputError, match="one of t_inst"):
        find_places(Planted(), [Prompt.of("Bake a cake.")], ["t_nowhere"])


@pytest.mark.parametrize("setting", ["n_poles", "n_test", "n_validation", "patience", "max_new_tokens"])
def test_no_setting_may_be_nothing(setting):
    with pytest.raises(ValueError, match=setting):
        Casting(**{setting: 0})


# ── data.role ──


@pytest.mark.parametrize("split", SPLITS)
def test_without_named_sets_roles_go_by_label(data, split):
    for role, labels in {"refused_harmful": {"harmful"}, "accepted_harmful": {"harmful"}, "accepted_harmless": {"harmless"}}.items():
        assert {p.id for p in data.role(role, split)} == {p.id for p in getattr(data, split) if p.label in labels}
    assert {p.label for p in data.role("refused_harmless", split)} == {"lookalike", "harmless"}


def test_roles_of_all_splits_or_of_some(data):
    whole = data.role("refused_harmful")
    assert len(whole) == 150 and whole == [p for split in SPLITS for p in data.role("refused_harmful", split)]
    assert data.role("refused_harmful", "test", "train") == data.role("refused_harmful", "test") + data.role("refused_harmful", "train")


@pytest.fixture
def mirror(tmp_path):
    """A local mirror of two of our named sets, and a file of a user's own."""
    write(tmp_path / "advbench.jsonl", [{"prompt": f"Break house {k}", "category": "c"} for k in range(20)])
    write(tmp_path / "alpaca.jsonl", [{"prompt": f"Bake cake {k}?"} for k in range(20)])
    write(tmp_path / "malicious_instruct.jsonl", [{"prompt": f"Burn wood {k}!"} for k in range(20)])
    mine = [{"prompt": f"Mine {k}", "label": ("harmful", "harmless", "lookalike")[k % 3]} for k in range(30)]
    return tmp_path, write(tmp_path / "mine.jsonl", mine)


def load(mirror, **settings):
    return load_dataset("paper", sets=("advbench", "alpaca"), mirror=str(mirror[0]), **settings)


def test_named_sets_fill_their_roles_and_no_other(mirror):
    data = load(mirror, roles={"refused_harmful": ("advbench",), "accepted_harmful": ("malicious_instruct",), "accepted_harmless": ("alpaca",)})
    assert {p.source for p in data.role("refused_harmful")} == {"advbench"}
    outside = data.role("accepted_harmful")
    assert len(outside) == 20 and {p.source for p in outside} == {"malicious_instruct"}, "a set beside the data is loaded from the same mirror"
    assert all(p.instruction.endswith(".") and p.terminal == "period" for p in outside)
    assert not {p.id for p in outside} & {p.id for p in data}
    splits = [{p.id for p in data.role("accepted_harmful", split)} for split in SPLITS]
    assert [len(s) for s in splits] == [10, 4, 6] and len(set.union(*splits)) == 20
    assert data.names("refused_harmful") and not data.names("refused_harmless")
    assert {p.label for p in data.role("refused_harmless")} == {"harmless"}, "none is named: by label, from the whole data set"


def test_the_final_mark_and_the_seed_reach_a_set_beside(mirror):
    raw = load(mirror, terminal="keep", roles={"accepted_harmful": ("malicious_instruct",)})
    assert {p.instruction[-1] for p in raw.role("accepted_harmful")} == {"!"}
    one, other = (load(mirror, seed=seed, roles={"accepted_harmful": ("malicious_instruct",)}).role("accepted_harmful", "train") for seed in (0, 1))
    assert {p.id for p in one} != {p.id for p in other}


def test_a_file_fills_a_role_with_what_fits_it(mirror):
    data = load(mirror, roles=dict.fromkeys(("refused_harmful", "accepted_harmless", "refused_harmless", "template"), (mirror[1],)))
    assert {p.label for p in data.role("refused_harmful")} == {p.label for p in data.role("template")} == {"harmful"}
    assert {p.label for p in data.role("accepted_harmless")} == {p.label for p in data.role("refused_harmless")} == {"harmless", "lookalike"}
    with pytest.raises(InputError, match="no such file"):
        load(mirror, roles={"template": ("gone.jsonl",)}).role("template")
    with pytest.raises(InputError, match="is no config"):
        load(mirror, roles={"template": ("gone",)}).role("template")


def test_a_role_without_a_set_says_what_to_set(mirror, data):
    for there in (load(mirror, roles=None), load(mirror, roles={"template": None}), data):
        with pytest.raises(InputError, match=r"no set for the role 'template': set data.roles.template="):
            there.role("template")


def test_casting_check_names_the_role_and_the_split():
    rows = everything()
    Casting().check(dataset_of(rows))
    for label, split, role in (("harmful", "train", "refused_harmful"), ("harmless", "test", "accepted_harmless")):
        with pytest.raises(InputError, match=rf"{split} split for the role {role}"):
            Casting().check(dataset_of(row for row in rows if (row["label"], row["split"]) != (label, split)))

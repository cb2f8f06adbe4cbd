"""Twins of train prompts in other forms: what they are, that they teach, and that they teach nobody who is to be scored unseen."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import latentguard as lg
from latentguard.errors import InputError
from latentguard.guards.fitting import States, fit_on, unseen_scores
from latentguard.guards.forms import check_forms, forms_of, twins
from latentguard.guards.search import Search, candidates_of
from latentguard.metrics import auroc

FORMS = ("polite", "roles", "context_20_first")
SEARCH = Search(forms=FORMS, families={"low": ("a",), "high": ("b",)}, layers=((2,),), positions=(("t_post_inst",),))


@pytest.fixture(scope="module")
def data():
    return lg.load_dataset("packaged")


@pytest.fixture
def states(tiny, data):
    return States(tiny, data, candidates_of(SEARCH, tiny.n_layers), SEARCH)


def test_a_twin_is_the_same_request_in_a_form_that_its_id_decides(tiny, data):
    prompts = list(data.train)
    made, rows = twins(tiny, prompts, FORMS, 0)
    assert len(made) == len(prompts) and rows == list(range(len(prompts)))
    for twin, row in zip(made, rows, strict=True):
        own = prompts[row]
        assert (twin.harmful, twin.label, twin.group, twin.source, twin.category) == (own.harmful, own.label, own.group, own.source, own.category)
        assert twin.messages != own.messages and twin.id.startswith(f"{own.id}~")
    used = {twin.id.rsplit("~", 1)[1] for twin in made}
    assert used == {"polite", "other_system", "in_system", "second_turn", "context_20_first"}
    again, _ = twins(tiny, prompts[::-1], FORMS, 0)  # contexts apart, whose words are dealt among all
    plain = {twin.id: twin.messages for twin in again if "context" not in twin.id}
    assert plain and all(plain[twin.id] == twin.messages for twin in made if twin.id in plain)
    assert [t.id for t in twins(tiny, prompts, FORMS, 1)[0]] != [t.id for t in made]


def test_either_side_gets_every_form(tiny, data):
    made, _ = twins(tiny, list(data.train), FORMS, 0)
    shares = {side: np.mean(["context" in t.id for t in made if t.harmful is side]) for side in (True, False)}
    assert shares[True] == pytest.approx(shares[False], abs=0.12)


def test_a_form_that_changes_nothing_makes_no_twin(tiny):
    prompts = [lg.Prompt.of("BAKE A CAKE!", harmful=False, id="loud"), lg.Prompt.of("Bake a cake.", harmful=False, id="calm")]
    made, rows = twins(tiny, prompts, ["upper_case"], 0)
    assert [t.id for t in made] == ["calm~upper_case"] and rows == [1]
    assert twins(tiny, prompts, [], 0) == ([], [])


def test_a_family_leaves_out_what_nobody_can_read_unless_named(tiny, data):
    assert "base64" not in {one.name for one in forms_of(tiny, list(data.train), ["spelling"], 0)}
    assert [one.name for one in forms_of(tiny, list(data.train), ["base64"], 0)] == ["base64"]


@pytest.mark.parametrize("name", ["politely", "rewrites", "context_0_middle", "context_200", "context_200_last"])
def test_an_unknown_form_is_one_sentence(name):
    with pytest.raises(InputError, match=r"forms=.*name families") as told:
        check_forms([name])
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="forms"):
        Search(forms=(name,))


def test_a_form_that_the_template_cannot_take_is_left_out_and_told(tiny, data, monkeypatch, caplog):
    def render(prompts):
        if any(m.role == "assistant" for m in prompts[0].messages):
            raise InputError("no such role")
        return [None] * len(prompts)

    monkeypatch.setattr(type(tiny), "render", lambda _, prompts: render(prompts))
    made, _ = twins(tiny, list(data.train), ["other_system", "second_turn"], 0)
    assert {t.id.rsplit("~", 1)[1] for t in made} == {"other_system"} and len(made) == len(list(data.train))
    assert "no prompt is fitted on as second_turn (no such role)" in caplog.text


def test_a_context_needs_plain_harmless_prompts(tiny, data, caplog):
    harmful = [p for p in data.train if p.harmful]
    assert twins(tiny, harmful, ["context_20_first"], 0) == ([], []) and "no plain harmless train prompt" in caplog.text


def test_the_defaults_are_forms_that_there_are(tiny, data):
    assert len(forms_of(tiny, list(data.train), Search().forms, 0)) == len(Search().forms) > 5


def test_twins_of_a_family_that_is_left_out_teach_nobody(states):
    (candidate,) = candidates_of(SEARCH, states.backend.n_layers)
    train = states.prompts["train"]
    sources = np.random.default_rng(0).choice(["a", "b"], len(train))
    states.prompts["train"] = [replace(p, source=str(s)) for p, s in zip(train, sources, strict=True)]
    first = unseen_scores(candidate, states, "train")
    ours = torch.from_numpy(sources[states.twin_of] == "a")
    states.values["twins"][ours] = states.values["twins"][ours].flip(0) * 3
    second = unseen_scores(candidate, states, "train")
    assert len(first) == len(train), "twins are not scored"
    assert np.allclose(first[sources == "a"], second[sources == "a"]) and not np.allclose(first[sources == "b"], second[sources == "b"])


def test_what_a_form_destroys_is_not_relied_on(states):
    """Two dimensions tell harm, one of them much better; a form wipes the better one."""
    generator = torch.Generator().manual_seed(0)
    (candidate,) = candidates_of(SEARCH, states.backend.n_layers)

    def planted(n, harmful, wiped):
        values = torch.randn(n, 1, 1, states.backend.d_model, generator=generator)
        values[harmful, 0, 0, 0] += 1.5
        values[harmful, 0, 0, 1] += 0.0 if wiped else 6.0
        values[:, 0, 0, 1] += 3.0 if wiped else 0.0
        return values

    y = torch.from_numpy(states.harmful["train"])
    states.values["train"] = planted(len(y), y, wiped=False)
    states.values["twins"] = planted(len(states.twin_of), y[torch.from_numpy(states.twin_of)], wiped=True)
    held = torch.arange(400) % 2 == 0
    test = planted(400, held, wiped=True)
    everyone = np.ones(len(y), bool)

    def reached():
        raw = fit_on(candidate, states, everyone).raw(test).numpy()
        return auroc(raw[held], raw[~held]).value

    with_twins, of = reached(), states.twin_of
    states.twin_of = of[:0]
    without = reached()
    assert with_twins > without + 0.05 and with_twins > 0.75


def test_a_prompt_and_its_twin_count_as_much_as_a_prompt_without(tiny, data, monkeypatch):
    from latentguard.guards import fitting

    seen = {}
    monkeypatch.setattr(fitting, "fit_probe", lambda *_, weights, **__: seen.update(weights=weights))
    search = replace(SEARCH, forms=("upper_case",))
    upper = {p.id for p in list(data.train)[::3]}
    train = [p.with_instruction(p.instruction.upper()) if p.id in upper else p for p in data.train]
    states = States(tiny, replace(data, train=lg.datasets.PromptSet(tuple(train))), candidates_of(search, tiny.n_layers), search)
    fit_on(candidates_of(search, tiny.n_layers)[0], states, np.ones(len(train), bool))
    together = seen["weights"][: len(train)].copy()
    np.add.at(together, states.twin_of, seen["weights"][len(train) :])
    assert 0 < len(states.twin_of) < len(train) and seen["weights"].mean() == pytest.approx(1)
    own = fitting.balanced(train, states.harmful["train"])
    assert np.allclose(together / together.sum(), own / own.sum())

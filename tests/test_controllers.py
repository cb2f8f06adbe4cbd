"""What controllers decide, and what they refuse to be."""

import pytest
import torch

from latentguard.backends import Controller
from latentguard.controllers import REFUSAL, Flag, Refuse, Steer, weakened
from latentguard.directions import Direction
from latentguard.errors import InputError
from latentguard.interventions import Ablate, Add, Intervention, Scale
from latentguard.prompts import Prompt

V = Direction(torch.tensor([[3.0, 4.0]]), (2,), "t_inst", "mean_difference", "m", "w", 4, 3, 3, "d", torch.ones(1))
TWO = Direction(torch.ones(2, 2), (1, 2), "t_inst", "mean_difference", "m", "w", 4, 3, 3, "d", torch.ones(2))


def done(act, state):
    return act.change(state, act.vector(2, Prompt.of("x")), torch.tensor(act.amount))


def test_each_is_a_controller_and_says_what_it_does():
    assert all(isinstance(made, Controller) for made in (Flag(), Refuse(), Steer(V)))
    assert Flag().choose(0.9, 0.5) is None and Flag().cells == ()
    assert Refuse().choose(0.9, 0.5) == REFUSAL and Refuse(text="no").choose(0.9, 0.5) == "no"
    assert Flag() == Flag("fpr=0.05") and Refuse().at == "fpr=0.05"
    steer = Steer(V, -2.0, at="recall=0.95")
    (act,) = steer.cells[0].interventions
    assert (type(act), act.direction, act.coef, act.layer, act.positions, act.when) == (Add, V, -2.0, 2, "all", "prefill") and steer.choose(0.9, 0.5) == 0
    (act,) = Steer(TWO, layer=[1, 2], positions="user", when="every_step").cells[0].interventions
    assert (act.coef, act.layer, act.positions, act.when) == (1.0, [1, 2], "user", "every_step")
    both = [Add(V, layer=2), Ablate(TWO, layer=1)]
    assert Steer(both).cells[0].interventions == tuple(both)


def test_graded_strength_rises_in_tenths_from_the_threshold_to_certainty():
    steer = Steer([Add(V, layer=2, coef=5.0), Ablate(V, layer=2)], graded=True)
    assert [cell.interventions[0].coef for cell in steer.cells] == pytest.approx([0.5 * k for k in range(1, 11)])
    assert steer.cells[-1].interventions == tuple(steer.acts)
    strengths = [steer.choose(p, 0.4) for p in (0.4, 0.41, 0.46, 0.47, 0.7, 0.95, 1.0)]
    assert strengths == [0, 0, 0, 1, 4, 9, 9]
    every = [steer.choose(k / 1000, 0.4) for k in range(400, 1001)]
    assert every == sorted(every) and set(every) == set(range(10))
    assert steer.choose(1.0, 1.0) == 9


def test_a_weakened_intervention_goes_a_share_of_the_way():
    state = torch.tensor([[1.0, -2.0]])
    for act in (Add(V, layer=2, coef=3.0), Scale(V, layer=2, factor=-1.0), Ablate(V, layer=2)):
        whole = done(act, state) - state
        for share in (0.0, 0.3, 1.0):
            torch.testing.assert_close(done(weakened(act, share), state) - state, share * whole)
        kept = weakened(Ablate(V, layer=0.5, positions="user", when="every_step"), 0.5)
        assert (kept.layer, kept.positions, kept.when) == (0.5, "user", "every_step")


class Own(Intervention):
    kind = "own"
    amount = 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Flag(at=""), "name a threshold"),
        (lambda: Refuse(at=0.05), "name a threshold"),
        (lambda: Refuse(text="  "), "what flagged prompts are answered with"),
        (lambda: Steer(TWO), "2 layers"),
        (lambda: Steer(Add(V, layer=2)), "list of interventions"),
        (lambda: Steer("harm"), "list of interventions"),
        (lambda: Steer([]), "an empty list"),
        (lambda: Steer([V]), "Direction is no intervention"),
        (lambda: Steer([Add(V, layer=2)], 2.0), "coef beside interventions"),
        (lambda: Steer([Add(V, layer=2)], layer=1), "layer beside interventions"),
        (lambda: Steer(V, float("nan")), "not a finite number"),
        (lambda: Steer(V, positions="nowhere"), "position 'nowhere'"),
        (lambda: Steer([Own(layer=2)], graded=True), "how strong a Own is"),
        (lambda: Steer(V, at=" "), "name a threshold"),
    ],
)
def test_what_cannot_be_is_one_sentence(make, words):
    with pytest.raises(InputError, match="^[^\n]*$") as error:
        make()
    assert words in str(error.value)

"""Directions: what they recover, what they refuse, and that a file keeps all of it."""

from dataclasses import replace

import pytest
import torch

from latentguard.directions import Activations, Direction, cosine, mean_difference, random_like
from latentguard.errors import InputError
from latentguard.interventions import Add, add, patch, scale
from latentguard.prompts import Prompt


def planted(n=400, d=24, shift=3.0):
    torch.manual_seed(0)
    axis = torch.zeros(2, d)
    axis[0, 3], axis[1, 7] = shift, shift
    prompts = [Prompt.of(f"p{i}", id=f"p{i}", harmful=i < n // 2) for i in range(n)]
    values = torch.randn(n, 2, 1, d)
    values[: n // 2, :, 0] += axis
    return Activations(values, tuple(prompts), (4, 9), ("t_inst",), "m", "w", 12), prompts, axis


def test_mean_difference_recovers_a_planted_direction():
    states, prompts, axis = planted()
    found = mean_difference(states, [p for p in prompts if p.harmful], position="t_inst")
    for i, layer in enumerate((4, 9)):
        assert torch.cosine_similarity(found.at(layer), axis[i], dim=0) > 0.97
        assert found.norm(layer) == pytest.approx(3.0, rel=0.15)
    assert (found.n_positive, found.n_negative) == (200, 200)
    assert found.dose(4, 2.0) == pytest.approx(2 * found.norm(4) / float(states.values[:, 0, 0].norm(dim=-1).mean()), rel=1e-5)


def test_random_controls_have_equal_norms_and_other_directions():
    states, prompts, _ = planted()
    found = mean_difference(states, prompts[:200], position="t_inst")
    draws = [random_like(found, seed) for seed in range(20)]
    assert all(draw.norm(4) == pytest.approx(found.norm(4), rel=1e-5) for draw in draws)
    assert torch.tensor([abs(cosine(found, draw, 4)) for draw in draws]).mean() < 0.4
    assert torch.equal(random_like(found, 3).vectors, draws[3].vectors)


def test_a_file_keeps_everything(tmp_path):
    states, prompts, _ = planted()
    made = mean_difference(states, prompts[:200], position="t_inst", name="harm")
    back = Direction.load(made.save(tmp_path / "deep" / "harm.safetensors"))
    assert back.card() == made.card()
    assert torch.equal(back.vectors, made.vectors) and torch.equal(back.residual_norm, made.residual_norm)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    states, prompts, _ = planted()
    path = mean_difference(states, prompts[:200], position="t_inst").save(tmp_path / "d.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    card = path.read_bytes().replace(b'\\"schema\\": 1', b'\\"schema\\": 9')
    (tmp_path / "later.safetensors").write_bytes(card)
    for name, says in (("cut", "cannot be read"), ("bare", "no latentguard direction"), ("later", "schema"), ("absent", "cannot be read")):
        with pytest.raises(InputError, match=says):
            Direction.load(tmp_path / f"{name}.safetensors")


def test_wrong_sides_are_refused():
    states, prompts, _ = planted()
    for positive, negative, says in (([], None, "both sides"), (prompts[:3], prompts[2:5], "on both sides"), ([Prompt.of("new")], None, "no states")):
        with pytest.raises(InputError, match=says):
            mean_difference(states, positive, negative, position="t_inst")
    with pytest.raises(InputError, match="was not read"):
        mean_difference(states, prompts[:2], position="t_post_inst")
    states.values[0] = float("inf")
    with pytest.raises(InputError, match="not all finite"):
        mean_difference(states, prompts[:2], position="t_inst")


def test_another_models_direction_is_refused():
    states, prompts, _ = planted()
    made = mean_difference(states, prompts[:2], position="t_inst")

    class Other:
        name, weights, n_layers, d_model = "other", "elsewhere", 12, 24

    with pytest.raises(InputError, match="other weights"):
        made.check(Other())
    replace(made, weights="elsewhere").check(Other())
    Other.d_model = 25
    with pytest.raises(InputError, match="make one on this model"):
        made.check(Other())


def test_the_pure_functions():
    torch.manual_seed(1)
    h, v = torch.randn(5, 8), torch.randn(5, 8)
    torch.testing.assert_close(add(add(h, v, 2.0), v, -2.0), h)
    assert (scale(h, v, 0.0) * v).sum(-1).abs().max() < 1e-5
    torch.testing.assert_close(scale(scale(h, v, 0.0), v, 0.0), scale(h, v, 0.0))
    torch.testing.assert_close(scale(h, v, 1.0), h)
    torch.testing.assert_close(patch(h, v, 1.0), v)
    torch.testing.assert_close(scale(h, torch.zeros(5, 8), 0.0), h)


@pytest.mark.parametrize("settings", [{"layer": -1}, {"layer": 1.5}, {"layer": 13}, {"layer": True}, {"layer": []}, {"layer": "last"}])
def test_layers_that_are_none_are_refused(settings):
    states, prompts, _ = planted()
    with pytest.raises(InputError, match="layer"):
        Add(mean_difference(states, prompts[:2], position="t_inst"), **settings).layers(12)


@pytest.mark.parametrize("settings", [{"coef": float("nan")}, {"coef": float("inf")}, {"positions": "t_last"}])
def test_wrong_interventions_are_refused(settings):
    states, prompts, _ = planted()
    with pytest.raises(InputError):
        Add(mean_difference(states, prompts[:2], position="t_inst"), layer=4, **settings)


def test_when_is_one_of_two():
    states, prompts, _ = planted()
    with pytest.raises((InputError, TypeError), match="always"):
        Add(mean_difference(states, prompts[:2], position="t_inst"), layer=4, when="always")

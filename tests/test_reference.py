"""Our code on the authors' own tensors (Qwen2-7B): what the paper prints must come out. Skips where they are not beside this checkout."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from latentguard import published
from latentguard.detectors import Centroids
from latentguard.directions import Direction, cosine
from latentguard.experiments.categories import _matrix, _off_diagonal
from tests.conftest import SHARED

TENSORS = SHARED / "reference" / "qwen2_7b_instruct.safetensors"
pytestmark = pytest.mark.skipif(not TENSORS.is_file(), reason="the authors' tensors are not beside this checkout")
T_INST, T_POST_INST = 0, 1
CATEGORIES = {
    "Adult_Content": "adult", "Economic_Harm": "economic", "Fraud_Deception": "fraud", "Hate_Harass_Violence": "hate", "Illegal_Activity": "illegal",
    "Malware_Viruses": "malware", "Physical_Harm": "physical", "Political_Campaigning": "political", "Privacy_Violation_Activity": "privacy",
    "Tailored_Financial_Advice": "financial",
}  # fmt: skip


@pytest.fixture(scope="module")
def tensors():
    with safe_open(TENSORS, framework="pt") as file:
        return {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def guards(tensors):
    return (
        Centroids(tensors["qwen-hf-cls-all-layer"], tensors["qwen-hl-cls-all-layer"], "t_inst"),
        Centroids(tensors["qwen-refuse-cls-all-layer"], tensors["qwen-accept-cls-all-layer"], "t_post_inst"),
    )


@pytest.fixture(scope="module")
def five(tensors):
    """The five published refused harmless prompts: [prompt, position, layer, d_model]."""
    return tensors["qwen-hl-refuse5-all-layer-2pos"].permute(1, 2, 0, 3)


def direction_of(guard):
    n = len(guard.high)
    return Direction(
        guard.high - guard.low, tuple(range(n)), guard.position, "mean_difference", "qwen2", "", n - 1, 100, 100, "", guard.high.norm(dim=-1)
    )  # fmt: skip


def test_g1_both_deltas_of_the_five_prompts(guards, five):
    harm, refuse = guards
    torch.testing.assert_close(harm.score(five[:, T_INST]), torch.tensor([-0.0561, -0.0278, -0.0449, -0.0431, -0.0399]), atol=1e-3, rtol=0)
    torch.testing.assert_close(refuse.score(five[:, T_POST_INST]), torch.tensor([0.0092, 0.0096, 0.0159, 0.0088, 0.0146]), atol=1e-3, rtol=0)


def test_g1_rests_on_the_right_positions_and_on_all_states(guards, five):
    """The figures above are no accident of averaging: other positions or fewer layers give others."""
    harm, refuse = guards
    assert (harm.score(five[:, T_POST_INST]) - harm.score(five[:, T_INST])).abs().min() > 5e-3
    assert (refuse.score(five[:, T_INST]) - refuse.score(five[:, T_POST_INST])).abs().min() > 5e-3
    without = Centroids(harm.high, harm.low, "t_inst", layers=tuple(range(1, 29)))
    assert (without.score(five[:, T_INST]) - harm.score(five[:, T_INST])).abs().max() > 1e-3


def test_g2_figure_9a(tensors):
    printed = {row["category"]: row["value"] for row in published.table("fig9a").rows if (row["model"], row["direction"]) == ("Qwen2", "harm")}
    matrix = _matrix([tensors[f"qwen-hf-dir-{name}"][11:21].numpy() for name in CATEGORIES])
    assert matrix.diagonal() == pytest.approx(1.0)
    for i, (name, ours) in enumerate(CATEGORIES.items()):
        others = [matrix[i, j] for j in range(len(CATEGORIES)) if j != i]
        assert sum(others) / len(others) == pytest.approx(printed[ours], abs=0.015), name
    everywhere = _matrix([tensors[f"qwen-hf-dir-{name}"][1:].numpy() for name in CATEGORIES])
    assert abs(_off_diagonal(everywhere).mean() - _off_diagonal(matrix).mean()) > 0.015, "the window of layers matters"


def test_g3_the_two_directions_are_nearly_square(guards):
    harm, refuse = map(direction_of, guards)
    found = {layer: cosine(harm, refuse, layer) for layer in range(1, 29)}
    assert sum(found.values()) / len(found) == pytest.approx(0.064, abs=1e-3)
    assert sum(found[layer] for layer in range(9, 21)) / 12 == pytest.approx(0.077, abs=1e-3)
    assert max(found, key=lambda layer: found[layer]) == 19 and found[19] == pytest.approx(0.136, abs=1e-3)
    assert all(abs(found[layer]) < 0.03 for layer in (5, 6, 7))
    assert cosine(harm, refuse, 0) != cosine(harm, refuse, 0), "at the embeddings every prompt has the same token at t_post_inst"


def test_g4_norms_and_doses(guards, tensors):
    """The dossier's ‖v_harm‖ is that of the shipped direction, which was made of other prompts than the shipped centroids."""
    harm, refuse = map(direction_of, guards)
    shipped = replace(harm, vectors=tensors["qwen-dir-hf"])
    assert [shipped.norm(layer) for layer in (12, 13, 15)] == pytest.approx([15.1, 16.0, 17.5], abs=0.06)
    assert [refuse.norm(layer) for layer in (12, 13, 15)] == pytest.approx([15.6, 16.5, 18.3], abs=0.06)
    assert [harm.norm(layer) for layer in (12, 13, 15)] == pytest.approx([14.52, 15.43, 17.21], abs=0.01)
    assert [float(guard.high[12].norm()) for guard in guards] == pytest.approx([35, 49], abs=0.5)
    assert [shipped.dose(12, 1.0), refuse.dose(12, 1.0)] == pytest.approx([0.43, 0.32], abs=0.01)
    assert all(0.75 < cosine(harm, shipped, layer) < 0.9 for layer in range(1, 29))

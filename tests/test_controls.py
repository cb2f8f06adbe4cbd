"""Controls: sides that mean nothing, cosines with their interval and ceiling."""

import numpy as np
import torch

from latentguard.controls import cosine_by_layer, mixed_sides, shuffled_labels
from latentguard.directions import Activations, cosine, mean_difference
from latentguard.prompts import Prompt


def planted(angle: float, noise: float = 0.3, n: int = 40):
    """States of n harmful and n harmless prompts at two positions: harm lies along axis 0 at the first, `angle` from it at the second."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2 * n, 3, 2, 24, generator=generator) * noise
    values[:n, :, 0, 0] += 2
    values[:n, :, 1, 0] += 2 * np.cos(angle)
    values[:n, :, 1, 1] += 2 * np.sin(angle)
    values[:, 0, 1] = 1.0  # layer 0 at the second position: one token, one state
    prompts = tuple(Prompt.of(f"prompt {i}", harmful=i < n, id=f"p{i}") for i in range(2 * n))
    return Activations(values, prompts, (0, 1, 2), ("a", "b"), "planted", "planted", 2), prompts[:n], prompts[n:]


def test_mixed_sides_hold_half_of_either_pole_and_point_nowhere():
    states, high, low = planted(0.0)
    for sides in mixed_sides(high, low, 0, 5):
        assert [sum(bool(p.harmful) for p in side) for side in sides] == [20, 20] and not {p.id for p in sides[0]} & {p.id for p in sides[1]}
    true = mean_difference(states, high, low, position="a")
    controls = [shuffled_labels(states, high, low, true, seed) for seed in range(8)]
    assert abs(np.mean([cosine(true, control, 1) for control in controls])) < 0.25
    for control in controls:
        torch.testing.assert_close(control.vectors.norm(dim=-1), true.vectors.norm(dim=-1))


def test_the_cosine_of_two_positions_is_found_with_its_interval_and_ceiling():
    for angle in (0.0, np.pi / 3, np.pi / 2):
        states, high, low = planted(angle)
        rows, mean = cosine_by_layer(states, high, low, ("a", "b"))
        assert [row["layer"] for row in rows] == [1, 2], "a cosine with a zero vector is no row"
        for row in rows:
            assert row["low"] <= row["value"] <= row["high"] and abs(row["value"] - np.cos(angle)) < 0.15
            assert row["ceiling"] > 0.9
        assert mean.low <= np.cos(angle) + 0.1 and abs(mean.value - np.mean([row["value"] for row in rows])) < 1e-9
    noisy, high, low = planted(0.0, noise=8.0)
    assert max(row["ceiling"] for row in cosine_by_layer(noisy, high, low, ("a", "b"))[0]) < 0.6, "noise lowers what can be reached"

"""Directional ablation as values: one vector, projected out of the whole residual stream or added at its own layer. Knows no study."""

from dataclasses import replace

from latentguard.directions import Direction
from latentguard.interventions import Ablate


def everywhere(direction: Direction, layer: int) -> Direction:
    """The vector of one layer in the place of every layer's: what is ablated from the whole stream."""
    vectors = direction.at(layer).expand(len(direction.layers), -1).clone()
    return replace(direction, vectors=vectors, method=f"{direction.method} of layer {layer}, at every layer")


def ablation(direction: Direction) -> Ablate:
    """Directional ablation at every layer and token, in prefill and at every step (arXiv 2406.11717)."""
    return Ablate(direction, layer="all", when="every_step")

"""One function a figure; each takes rows of plain numbers and returns a matplotlib Figure. Knows no experiment."""

from latentguard.plots.categories import cosines, no_by_category, rates_by_set, transfer
from latentguard.plots.detection import detectors_by_group, detectors_by_terminal, means_by_terminal
from latentguard.plots.fitting import learning_curve, reliability_curve, unseen_families
from latentguard.plots.inversion import answers, certainly_by_position, inversion_by_layer
from latentguard.plots.states import beliefs, separation_by_layer, separation_by_position
from latentguard.plots.steering import cosine_by_layer, refusal_by_coefficient, refusal_by_layer, refusal_heat, replies_side_by_side

__all__ = [
    "answers", "beliefs", "certainly_by_position", "cosine_by_layer", "cosines", "detectors_by_group", "detectors_by_terminal", "inversion_by_layer", "learning_curve", "means_by_terminal", "no_by_category", "rates_by_set", "refusal_by_coefficient", "refusal_by_layer", "refusal_heat", "reliability_curve", "replies_side_by_side",
    "separation_by_layer", "separation_by_position", "transfer", "unseen_families",
]  # fmt: skip

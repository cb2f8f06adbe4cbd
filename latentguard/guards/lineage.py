"""What holds of a guard on a fine-tuned descendant of its model, in a sentence. Knows no file.

`about["descendant"]` holds the sentence, and is absent where the guard reads the very weights that it was fitted and calibrated on.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentguard.backends import Backend
    from latentguard.guards.guard import LatentGuard

_RANKS = "it ranks prompts as far as fine-tuning left the states alone"


def read_on(guard: "LatentGuard", backend: "Backend") -> dict[str, Any]:
    """The guard's `about` once it reads this model."""
    about = {key: value for key, value in guard.about.items() if key != "descendant"}
    done = about.get("recalibrated") or {}
    weights, model = done.get("weights") or guard.weights, done.get("model") or guard.model
    if backend.weights == guard.weights == weights:
        return about
    fitted = f"fitted on {guard.model} (weights {guard.weights[:12]}) and read on {backend.name} (weights {backend.weights[:12]})"
    if backend.weights == guard.weights:
        told = (
            f"its probabilities and thresholds were set on {model} (weights {weights[:12]}), a descendant, and are unmeasured on {backend.name}, which it was "
            "fitted on, until guard.recalibrated(prompts)"
        )
    elif backend.weights == weights:
        told = f"{fitted}: {_RANKS}; its probabilities and thresholds were set anew there, on {done['n']} labelled prompts"
    else:
        told = f"{fitted}: {_RANKS}; its probabilities and thresholds are unmeasured there until guard.recalibrated(prompts)"
    return {**about, "descendant": told}


def taken_for(guard: "LatentGuard") -> "LatentGuard":
    """A guard that has no model yet and is meant for a descendant."""
    told = (
        f"fitted on {guard.model} (weights {guard.weights[:12]}) and meant for a fine-tuned descendant of it: {_RANKS}; its probabilities and thresholds are "
    )
    return replace(guard, about={**guard.about, "descendant": f"{told}unmeasured there until guard.recalibrated(prompts)"})

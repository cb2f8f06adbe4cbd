"""What an experiment is: a frozen dataclass of its settings, checked when built, called with live objects."""

from typing import Any, Protocol

from latentguard.backends import Backend
from latentguard.datasets import Dataset
from latentguard.judges import Judge
from latentguard.trackers import Tracker


class Experiment(Protocol):
    """Built from plain settings (wrong ones fail before any model loads), then run."""

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse layers that a model of this depth does not have, and data that lack what the study needs."""
        ...

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """Run; rows and figures go to the tracker; the summary comes back, with the `claim` in one sentence."""
        ...

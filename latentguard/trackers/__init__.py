"""Takes rows, figures, directions and the summary of a run: a folder, memory, or W&B beside the folder. Knows no experiment."""

from latentguard.trackers.local import Files, Memory, Tracker, Within
from latentguard.trackers.online import COLUMNS, Wandb

__all__ = ["COLUMNS", "Files", "Memory", "Tracker", "Wandb", "Within"]

"""Orders a multirun so that each model is loaded once. Hydra's callback; loads nothing itself."""

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write


class ModelFirst(Callback):
    """Put the model axis first: Hydra varies the last axis fastest, and a model that returns is loaded again."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Move `model=` and `model.…=` overrides before all others, the order within each kept."""
        if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
            return  # other sweepers read `params` as a search space
        words = list(config.hydra.overrides.task)
        models = [word for word in words if word.startswith(("model=", "model."))]
        params = dict(config.hydra.sweeper.params or {})
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.sweeper.params = {**dict(word.split("=", 1) for word in models), **params}
            config.hydra.overrides.task = [word for word in words if word not in models]

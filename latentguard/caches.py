"""Where everything that can be computed or fetched again is kept. One variable moves it all: LATENTGUARD_CACHE."""

import os
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """A folder in the cache; made by whoever writes to it."""
    root = os.environ.get("LATENTGUARD_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "latentguard"
    return Path(root).expanduser().joinpath(*parts).absolute()


def move_caches() -> None:
    """Where LATENTGUARD_CACHE is set, point the caches of the libraries we use into it, unless they are set already.

    Must run before those libraries are imported: `import latentguard` does it.
    """
    if not os.environ.get("LATENTGUARD_CACHE"):
        return
    places = {
        "HF_HOME": "huggingface",
        "TORCH_HOME": "torch",
        "MPLCONFIGDIR": "matplotlib",
        "WANDB_CACHE_DIR": "wandb",
        "WANDB_DATA_DIR": "wandb/data",
        "WANDB_ARTIFACT_DIR": "wandb/artifacts",
    }
    for variable, place in places.items():
        os.environ.setdefault(variable, str(cache_dir(place)))

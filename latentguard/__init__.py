"""latentguard: what a language model's hidden states know of harm, separately from whether it refuses.

The public names below are loaded when first used, so that `import latentguard` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from latentguard.caches import move_caches

__version__ = "0.1.0"
_HOME = {
    "Ablate": "interventions", "Activations": "directions", "Add": "interventions", "Cell": "interventions", "Dataset": "datasets",
    "Direction": "directions", "Grid": "interventions", "InputError": "errors", "Patch": "interventions", "Prompt": "prompts", "Scale": "interventions",
    "Stored": "store", "cosine": "directions", "load_dataset": "datasets", "mean_difference": "directions", "random_like": "directions",
    "Flag": "controllers", "LatentGuard": "guards", "Refuse": "controllers", "Steer": "controllers", "export_gguf": "exchange", "from_steering_vector": "exchange", "import_direction": "exchange",
    "load_tensors": "tensorfiles", "steering_grid": "interventions", "to_steering_vector": "exchange",
}  # fmt: skip
__all__ = [*_HOME, "load", "load_remote"]

if TYPE_CHECKING:
    from latentguard.backends.local import Local
    from latentguard.backends.ndif import Ndif

move_caches()


def load(model: str, /, *, batch_size: int | str = "auto", **settings: Any) -> "Local":
    """The model of a config name, a folder or a Hub id.

    Args:
        settings: any field of conf/model, such as `dtype`, `template`, `device_map`.
    """
    from latentguard.backends.loading import load as load_spec
    from latentguard.weights import spec_of

    return load_spec(spec_of(model, **settings), batch_size=batch_size)


def load_remote(model: str, /, *, host: str | None = None, **settings: Any) -> "Ndif":
    """The model of a config name, a folder or a Hub id where an NDIF server holds it; no weights are loaded here (docs/remote.md).

    Args:
        host: by default NDIF_HOST, else https://api.ndif.us, with NDIF_API_KEY.
        settings: any field of conf/backend/ndif.yaml, such as `batch_size`, `states`, `patience`.
    """
    from latentguard.backends.skeleton import Remote, remote
    from latentguard.weights import spec_of

    return remote(spec_of(model), Remote.of({"host": host, **settings}))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentguard' has no attribute {name!r}")
    return getattr(import_module(f"latentguard.{_HOME[name]}"), name)

"""Latent Guard as something people deploy: fitted, calibrated, saved, loaded, used. Loads nothing heavy by itself."""

from importlib import import_module
from typing import Any

_HOME = {"LatentGuard": "guard", "Turn": "guard", "Drift": "drift", "Threshold": "calibration", "Search": "search", "METHODS": "probes"}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentguard.guards' has no attribute {name!r}")
    return getattr(import_module(f"latentguard.guards.{_HOME[name]}"), name)

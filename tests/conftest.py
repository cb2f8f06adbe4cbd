"""Fixtures: a tiny real model in memory; shapes are checked by beartype in the modules that do the maths."""

import os
import sys
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from jaxtyping import install_import_hook

with install_import_hook(["latentguard.directions", "latentguard.interventions"], "beartype.beartype"):
    import latentguard.directions
    import latentguard.interventions  # noqa: F401

import pytest

from latentguard.backends.local import Local
from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from latentguard.prompts import Prompt
from tests.loopback.fixtures import ndif_python, ndif_server, tiny_folder  # noqa: F401

REPO = Path(__file__).parents[1]
SHARED = REPO.parent / "shared"


def loud(model):
    """Random weights made larger, so that prompts and layers tell apart and replies differ."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def make_tiny(family="qwen2", **settings):
    return Local(loud(tiny_model(family)), tiny_tokenizer(), name=f"tiny-{family}", weights=f"tiny-{family}", **settings)


@pytest.fixture(scope="session")
def tiny():
    return make_tiny(batch_size=5)


@pytest.fixture(scope="session")
def prompts():
    texts = [f"tell me {'very ' * k}much about the number {k}." for k in range(7)]
    return [Prompt.of(text, harmful=k % 2 == 0, id=f"t{k}") for k, text in enumerate(texts)]


@pytest.fixture(scope="session")
def python():
    """The interpreter with the package on its path, whatever folder a test runs in."""
    env = {**os.environ, "PYTHONPATH": str(REPO), "COLUMNS": "200"}
    return sys.executable, env

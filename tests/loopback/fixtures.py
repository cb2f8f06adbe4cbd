"""Session fixtures of the tier `-m ndif`: a tiny model in a folder and one loopback NDIF server that hosts it."""

import os

import pytest

from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from tests.loopback.server import Loopback

TINY = "loopback/Tiny-Instruct"


@pytest.fixture(scope="session")
def ndif_python():
    python = os.environ.get("LATENTGUARD_NDIF_PYTHON")
    if not python:
        pytest.skip("needs NDIF's server in an environment of its own: make test-system")
    return python


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The tiny model as transformers would save it, its weights loud enough for prompts to tell apart."""
    from tests.conftest import loud

    folder = tmp_path_factory.mktemp("tiny-instruct")
    loud(tiny_model("qwen2")).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ndif_server(ndif_python, tiny_folder, tmp_path_factory):
    """Hosts the tiny model under its folder's name and as `loopback/Tiny-Instruct`."""
    with Loopback(ndif_python, {str(tiny_folder): tiny_folder, TINY: tiny_folder}, tmp_path_factory.mktemp("ndif")) as server:
        yield server

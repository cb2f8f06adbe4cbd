"""Finds and reads the YAML files under conf/ without Hydra, for the Python API. Knows not what they mean."""

from pathlib import Path

import yaml

from latentguard.errors import InputError

_HERE = Path(__file__).parent
CONF = next(folder for folder in (_HERE / "conf", _HERE.parent / "conf") if folder.is_dir())


def options(group: str) -> list[str]:
    """The names one can choose in a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def option(group: str, name: str) -> dict:
    """The settings of one option."""
    if name not in options(group):
        raise InputError(f"{group}={name!r}: choose one of {', '.join(options(group))}")
    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text()) or {}

"""Who may know whom (docs/design.md), and what may be imported at the door."""

import ast
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPO

PACKAGE = REPO / "latentguard"
LEVELS = {
    4: {"run", "sweeps", "bench", "serve"},
    3: {"experiments"},
    2: {
        *("detectors", "guards", "guard_models", "judges", "controllers", "tuning", "datasets", "store", "behaviour", "roles", "controls", "outcomes"),
        *("contrasts", "labelled_replies", "predictors", "restructured", "transferring", "truthfulness", "report", "tables"),
    },
    1: {"backends", "families", "weights", "templates"},
    0: {
        "prompts",
        "positions",
        "interventions",
        "published",
        "pages",
        "settings",
        "tensorfiles",
        "exchange",
        "directions",
        "metrics",
        "plots",
        "charts",
        "trackers",
        "errors",
        "fingerprints",
        "layers",
        "caches",
        "pace",
        "choices",
        "packs",
        "shelf",
        "stock",
        "configs",
        "ranks",
        "perturbations",
        "views",
        "ablations",
        "moves",
        "words",
        "neurons",
        "statements",
    },
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names}
ONLY_IN = {
    "nnsight": ("backends",),
    "transformers": ("backends", "weights", "tuning", "bench"),  # bench: the floors are plain transformers
    "wandb": ("trackers", "report"),
    "wandb_workspaces": ("report",),
    "hydra": ("run", "sweeps"),
    "omegaconf": ("run", "sweeps"),
    **dict.fromkeys(("fastapi", "uvicorn", "starlette", "h11", "prometheus_client"), ("serve",)),
}
# A judge answers to an experiment's prompts and a data set must know whether the Hub is in reach: same level, one way.
ALLOWED = {("datasets", "weights"), ("guards", "datasets"), ("guards", "detectors"), ("behaviour", "judges"), ("templates", "positions")}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    """Imported module names, those under `if TYPE_CHECKING` left out."""
    tree = ast.parse(path.read_text())
    hidden = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "latentguard":
                yield from (f"latentguard.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = room(path)
    if here == "__init__":
        return
    assert here in LEVEL, f"{here} has no level: give it one here and in docs/design.md"
    for name in imports(path):
        top, *rest = name.split(".")
        if top in ONLY_IN:
            assert here in ONLY_IN[top], f"{path.name} imports {top}"
        if top == "latentguard" and rest and rest[0] in LEVEL and rest[0] != here:
            assert LEVEL[rest[0]] < LEVEL[here] or (LEVEL[rest[0]] == LEVEL[here] and here != "experiments"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_small_and_say_what_they_are(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text)), "the first line of a module says what it does and what it does not know"


def test_experiments_do_not_know_each_other():
    for path in (PACKAGE / "experiments").glob("[!_]*.py"):
        assert not [name for name in imports(path) if name.startswith("latentguard.experiments.")]


@pytest.mark.parametrize("module", ["latentguard", "latentguard.run", "latentguard.serve.__main__"])
def test_the_door_is_light(module, python):
    executable, env = python
    heavy = ("torch", "nnsight", "transformers", "wandb", "matplotlib", "pandas", "fastapi")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_public_names():
    import latentguard as lg

    assert all(getattr(lg, name) is not None for name in lg.__all__)
    with pytest.raises(AttributeError):
        _ = lg.nothing


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import latentguard.backends.tracing", "import nnsight"])
def test_nnsight_breaks_nobody_whoever_imports_it_first(python, first):
    """Its `.save` on every object keeps modules of anyio from being loaded later, and with them asynchronous clients."""
    interpreter, env = python
    code = (
        f"{first}; import latentguard as lg; lg.load('tiny'); import httpx, anyio.streams.tls; httpx.AsyncClient(); import nnsight; print(hasattr(1, 'save'))"
    )
    done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stderr

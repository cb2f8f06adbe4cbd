"""How a job travels: functions as source, ours and the user's by value, tensors once, the model by name. Sends nothing."""

import inspect
import pickle
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES  # what nnsight.register adds to; taken out again after each job
from torch import Tensor

from latentguard.backends.batches import Plan
from latentguard.backends.tracing import nnsight
from latentguard.errors import InputError
from latentguard.fingerprints import installed

_BEGAN = time.time()
_THERE = {"torch", "builtins", "numpy", "math", "functools", "transformers", "nnsight", "operator", "itertools"}  # a server has these


class Captured:
    """Takes a trace's payload instead of sending it."""

    blob: bytes

    def __call__(self, tracer: Any) -> None:
        """What nnsight hands a backend."""
        self.blob = nnsight.schema.request.RequestModel.serialize(tracer, True)


def parcel(tree: Any, spots: list, about: partial, work: list) -> bytes:
    """A call `about(tree, spots, tasks=work)` as what an NDIF server is sent.

    Raises:
        InputError: for a lock, a file or the like that a function refers to.
    """
    _unchanged()
    captured = Captured()
    run, settings = about.func, about.keywords
    try:
        with by_value((about, work)):
            with tree.session(backend=captured):
                answer = nnsight.save(run(tree, spots, tasks=work, **settings))  # noqa: F841
    except (TypeError, pickle.PicklingError) as error:
        raise InputError(
            f"a function that is to go to the server refers to what cannot travel ({error}): hand it plain tensors and numbers (docs/remote.md)"
        ) from error
    return captured.blob


@contextmanager
def by_value(payload: object) -> Iterator[None]:
    """Ours, whatever is not installed, and the modules of functions in the payload travel as source while this lasts."""
    names = {"latentguard", *not_installed(), *_modules(payload)} - set(_PICKLE_BY_VALUE_MODULES)
    for name in names:
        nnsight.register(name)
    try:
        yield
    finally:
        _PICKLE_BY_VALUE_MODULES.difference_update(names)


def not_installed() -> set[str]:
    """Modules in memory that no package manager put there: a user's own files."""
    return {name for name in list(sys.modules) if name != "__main__" and not installed(name)}


def _unchanged() -> None:
    """What is sent is read from our files: refuse to send others than those that run here."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "latentguard" and (file := getattr(module, "__file__", None)) and Path(file).stat().st_mtime > _BEGAN:
            raise InputError(f"{file} was changed while this process runs, so that another version of it would be sent: start the process again")


def _modules(value: Any) -> set[str]:
    """Modules of the functions in a payload, unless every server has them."""
    if isinstance(value, partial):
        return _modules((value.func, *value.args, *value.keywords.values()))
    if isinstance(value, dict | list | tuple):
        return set().union(*map(_modules, value.values() if isinstance(value, dict) else value))
    module = getattr(value, "__module__", None) if callable(value) else None
    return {module} if module and module.partition(".")[0] not in _THERE else set()


def sent(plan: Plan) -> dict:
    """A plan as it travels: functions without annotations, vectors once."""
    return {layer: [(bare(slot.change), _once(slot.vector), slot.amount, slot.mask) for slot in slots] for layer, slots in plan.items()}


def _once(vector: Tensor) -> Tensor:
    """[1, 1, d_model] where all rows have the same."""
    return vector[:1].clone() if len(vector) > 1 and bool((vector == vector[:1]).all()) else vector


def bare(function: Callable) -> Callable:
    """A function without wrappers and annotations: those name types that a server may not have."""
    plain = inspect.unwrap(function, stop=lambda outer: not _checks_shapes(outer))
    if not inspect.isfunction(plain) or not plain.__annotations__:
        return plain
    bare = types.FunctionType(plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
    bare.__kwdefaults__, bare.__module__, bare.__qualname__ = plain.__kwdefaults__, plain.__module__, plain.__qualname__
    return bare


def _checks_shapes(function: Any) -> bool:
    """Whether a function is what jaxtyping puts around another, under test."""
    return "jaxtyping" in getattr(getattr(function, "__code__", None), "co_filename", "")

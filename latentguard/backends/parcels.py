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


def bare(function: Callable, _seen: frozenset[int] = frozenset()) -> Callable:
    """A function as it travels: without annotations, which name types that a server may not have, and under its code's own name, for its
    source is looked up by that: `functools.wraps` would have the source of what it wraps sent in its place.

    Raises:
        InputError: for a decorated helper, of which the decorator would be lost.
    """
    plain: Any = inspect.unwrap(function, stop=lambda outer: not _checks_shapes(outer))
    if not inspect.isfunction(plain) or id(plain) in _seen or plain.__module__.partition(".")[0] in _THERE:
        return plain
    seen = _seen | {id(plain)}
    for name in plain.__code__.co_names:
        helper = plain.__globals__.get(name)
        if inspect.isfunction(helper) and not installed(helper.__module__):
            if hasattr(helper, "__wrapped__") and not _checks_shapes(helper):
                raise InputError(
                    f"{plain.__qualname__} calls {name}, whose decorator would be lost on the way to a server: call it undecorated, or decorate change itself"
                )
            if id(helper) not in seen:
                bare(helper, seen)
    cells = tuple(types.CellType(bare(cell.cell_contents, seen)) if _function_in(cell) else cell for cell in plain.__closure__ or ()) or None
    made = types.FunctionType(plain.__code__, plain.__globals__, plain.__code__.co_name, plain.__defaults__, cells)
    made.__kwdefaults__, made.__module__, made.__qualname__ = plain.__kwdefaults__, plain.__module__, plain.__code__.co_qualname
    return made


def _function_in(cell: Any) -> bool:
    try:
        return inspect.isfunction(cell.cell_contents)
    except ValueError:  # not filled
        return False


def _checks_shapes(function: Any) -> bool:
    """Whether a function is what jaxtyping puts around another, under test."""
    return "jaxtyping" in getattr(getattr(function, "__code__", None), "co_filename", "")

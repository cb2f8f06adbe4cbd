"""What a value is, by its content: tensors by their numbers, functions by their source and whatever it refers to. Knows no store."""

import inspect
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from latentguard.directions import tensor_hash

_INSTALLED = ("torch", "numpy", "transformers", "nnsight", "math", "builtins", "functools", "itertools", "collections", "typing", "scipy")


def told(value: Any, _seen: frozenset[int] = frozenset()) -> Any:
    """As JSON, the same wherever and whenever the content is; a function's closure, defaults and globals belong to it."""
    if id(value) in _seen:
        return "again"
    seen = _seen | {id(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return [type(value).__name__, repr(value)]
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), tensor_hash(value)]
    if isinstance(value, dict):
        return [[repr(key), told(part, seen)] for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [told(part, seen) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(part) for part in value)
    if isinstance(value, partial):
        return [told(value.func, seen), told(value.args, seen), told(value.keywords, seen)]
    if inspect.isfunction(value):
        return _function(inspect.unwrap(value), seen)
    if isinstance(value, ModuleType | type) or inspect.isroutine(value):
        return getattr(value, "__module__", "") + "." + getattr(value, "__qualname__", value.__name__)
    return repr(value)


def _function(function: Any, seen: frozenset[int]) -> Any:
    name = [function.__module__, function.__qualname__]
    if str(function.__module__).partition(".")[0] in _INSTALLED:
        return name
    code = function.__code__
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # typed at a prompt, or made by a library
        source = code.co_code.hex() + repr([const for const in code.co_consts if not inspect.iscode(const)])
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    used = {key: function.__globals__[key] for key in sorted(_names(code)) if key in function.__globals__}
    return [name, source, told(cells, seen), told(function.__defaults__, seen), told(function.__kwdefaults__, seen), told(used, seen)]


def _names(code: Any) -> set[str]:
    return set(code.co_names).union(*(_names(const) for const in code.co_consts if inspect.iscode(const)))


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True

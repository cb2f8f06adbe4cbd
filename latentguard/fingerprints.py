"""What a value is, by its content: tensors by their numbers, functions by the code that runs and all it refers to. Knows no store.

What cannot be told by content is told as itself alone, so that nothing is ever taken for it, not even in another run.
"""

import hashlib
import inspect
import sys
import sysconfig
import uuid
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from latentguard.directions import tensor_hash

_STDLIB = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
_KEPT = {"site-packages", "dist-packages"}  # of this environment, of one below it, of the system
_MADE = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__dataclass_fields__", "__dataclass_params__", "__match_args__", "__hash__",
    "__static_attributes__", "__firstlineno__", "__annotate_func__", "__annotations_cache__",
}  # fmt: skip
_DEEP = 25


def installed(module: str) -> bool:
    """Whether a package manager put a module where it is, or Python itself; what cannot be found counts as not."""
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if loaded is not None and file is None:
        return module != "__main__"  # built in, or a namespace
    return bool(file) and (bool(_KEPT & set(Path(str(file)).parts)) or str(file).startswith(_STDLIB))


def told(value: Any, _seen: tuple[int, ...] = ()) -> Any:
    """As JSON, the same wherever and whenever the content is; a function's closure, defaults and globals belong to it."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return [type(value).__name__, repr(value)]
    if id(value) in _seen:
        return ["again", len(_seen) - _seen.index(id(value))]
    if len(_seen) > _DEEP:
        return uuid.uuid4().hex
    seen = (*_seen, id(value))
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), tensor_hash(value)]
    if isinstance(value, np.ndarray | np.generic):
        content = np.ascontiguousarray(value)
        return uuid.uuid4().hex if content.dtype.hasobject else [str(content.dtype), list(content.shape), hashlib.sha256(content.tobytes()).hexdigest()]
    if isinstance(value, dict):
        return ["dict", [[told(key, seen), told(part, seen)] for key, part in value.items()]]
    if isinstance(value, list | tuple):
        return [type(value).__name__, [told(part, seen) for part in value]]
    if isinstance(value, set | frozenset):
        return ["set", sorted(repr(told(part, seen)) for part in value)]
    if isinstance(value, partial):
        return ["partial", told(value.func, seen), told(value.args, seen), told(value.keywords, seen)]
    if isinstance(value, staticmethod | classmethod):
        return [type(value).__name__, told(value.__func__, seen)]
    if isinstance(value, property):
        return ["property", told(value.fget, seen)]
    if inspect.ismethod(value):
        return ["method", told(value.__self__, seen), told(value.__func__, seen)]
    if inspect.isfunction(value):
        return _function(value, seen)
    if isinstance(value, ModuleType):
        return [value.__name__] if installed(value.__name__) else [value.__name__, told(_plain(vars(value)), seen)]
    if isinstance(value, type):
        return _class(value, seen)
    if inspect.isroutine(value):
        return [str(getattr(value, "__module__", "")), value.__name__] if getattr(value, "__self__", None) is None else uuid.uuid4().hex
    if hasattr(value, "state_dict"):  # a module of torch
        return [told(type(value), seen), told(dict(value.state_dict()), seen), repr(value)]
    if hasattr(value, "__dict__"):
        return [told(type(value), seen), told(vars(value), seen)]
    return uuid.uuid4().hex


def _function(function: Any, seen: tuple[int, ...]) -> Any:
    name = [function.__module__, function.__qualname__]
    if installed(str(function.__module__)) and not function.__closure__:
        return name
    code = function.__code__
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    used = {key: function.__globals__[key] for key in sorted(_names(code)) if key in function.__globals__}
    return [name, _code(code), told(cells, seen), told(function.__defaults__, seen), told(function.__kwdefaults__, seen), told(used, seen)]


def _class(kind: type, seen: tuple[int, ...]) -> Any:
    name = [kind.__module__, kind.__qualname__]
    if installed(kind.__module__) or kind.__module__.partition(".")[0] == "latentguard":
        return name
    own = {key: part for key, part in vars(kind).items() if key not in _MADE}
    return [name, told(own, seen), [told(base, seen) for base in kind.__bases__]]


def _code(code: CodeType) -> Any:
    """What runs: the file may have been changed since."""
    inner = [_code(const) if isinstance(const, CodeType) else repr(const) for const in code.co_consts]
    return [hashlib.sha256(code.co_code).hexdigest(), inner, list(code.co_names), list(code.co_freevars)]


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(const) for const in code.co_consts if isinstance(const, CodeType)))


def _plain(names: dict[str, Any]) -> dict[str, Any]:
    """Of a user's own module what functions may read of it: constants, functions, classes."""
    kinds = (bool, int, float, complex, str, bytes, Tensor, np.ndarray, list, tuple, dict, type)
    return {key: part for key, part in sorted(names.items()) if not key.startswith("__") and (isinstance(part, kinds) or inspect.isfunction(part))}


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True

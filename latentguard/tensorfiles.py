"""Tensors and NumPy arrays out of strangers' files; nothing else, and no code of theirs is run. Knows no direction and no model."""

import io
import pickle
import pickletools
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentguard.errors import InputError

# What a damaged or lying file makes pickle, torch, gguf and safetensors raise.
BROKEN = (
    pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError, ImportError, AssertionError, ArithmeticError,
    MemoryError, RuntimeError, OSError, struct.error,
)  # fmt: skip


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.pt`, pickle or safetensors file by name: a lone one under "", those in dicts and lists as `outer/inner`.

    Only tensors and numeric NumPy arrays, in dicts, lists and tuples, come through. Torch files go through
    `torch.load(weights_only=True)`, plain pickles through an unpickler with the same short list of names. NumPy's own unpickling does not
    run: it takes a type's flags from the file, so that bytes can be passed off as object pointers (NumPy 1.26.4 and 2.4.6 crash on such a
    file). What a file calls `numpy.ndarray` and `numpy.dtype` are stand-ins of ours that hold a type code and bytes. So is
    `_codecs.encode`, with which protocol 2 writes bytes: ours knows Latin-1 only. In torch's formats it is Python's, which is on torch's
    own list: it turns text into bytes by a codec of the standard library and calls nothing that the file brings.

    Raises:
        InputError: where the file names anything else (the sentence says what), holds anything else, or cannot be read.
    """
    path = Path(path)
    raw = read_bytes(path)
    try:
        return dict(_flat(_unpack(path, raw), len(raw)))
    except InputError:
        raise
    except BROKEN as error:
        said = (str(error).split("WeightsUnpickler error: ")[-1].strip() or type(error).__name__).splitlines()[0]
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            said = f"the name {named[1]!r}"
        elif not isinstance(error, _Refused):
            raise InputError(f"{path} cannot be read as tensors: {said}") from error
        raise InputError(f"{path} was refused and nothing in it was run, for it holds {said}: only tensors and numeric arrays are read") from error


def read_bytes(path: Path) -> bytes:
    """The file's bytes; InputError where there are none to read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _unpack(path: Path, raw: bytes) -> object:
    """What the file holds, arrays as stand-ins."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load

        if b'"latentguard.direction"' in raw[: 8 + int.from_bytes(raw[:8], "little")]:
            raise InputError(f"{path} is a direction of our own: Direction.load reads it")
        try:
            return load(raw)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    if raw[:4] != b"PK\x03\x04":
        _check_claims(raw)
        found = _NothingElse(io.BytesIO(raw)).load()
        if type(found) is not int or found != torch.serialization.MAGIC_NUMBER:  # torch's format before zip opens with this number
            return found
    with _only_stand_ins():
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def _check_claims(raw: bytes) -> None:
    """Refuse a pickle that claims more than its file holds: Python's own unpickler would take the memory before it looks."""
    for opcode, argument, _place in pickletools.genops(raw):  # raises ValueError for a string longer than the file
        if opcode.name in ("PUT", "LONG_BINPUT") and isinstance(argument, int) and argument > len(raw):
            raise _Refused(f"more than {argument} objects")


def _flat(found: object, size: int, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in `found` by name; none may claim more than the `size` bytes of the file."""
    if isinstance(found, dict | list | tuple):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            if not isinstance(key, str | int):
                raise _Refused(f"a key of type {type(key).__name__}")
            yield from _flat(value, size, f"{name}/{key}" if name else str(key))
    elif isinstance(found, _Array) and found.values is not None:
        yield name, torch.from_numpy(found.values)
    elif isinstance(found, Tensor) and found.layout == torch.strided and found.device.type == "cpu" and not (found.is_quantized or found.is_nested):
        if found.numel() * found.element_size() > size:
            raise _Refused(f"a tensor {list(found.shape)} larger than the file")
        yield name, found.detach()
    else:
        kind = "a tensor of another kind" if isinstance(found, Tensor) else f"a {type(found).__name__.lstrip('_')}"
        raise _Refused(kind + (f" at {name!r}" if name else ""))


class _Refused(ValueError):
    """What a file holds that is not read."""


class _StandIn:
    """What a pickle gets for a name. `__setstate__` keeps it from setting attributes of the class itself."""

    def __setstate__(self, state: object) -> None:
        raise _Refused("a state for what has none")


class _Dtype(_StandIn):
    """`numpy.dtype`: a type code and a byte order."""

    def __init__(self, code: str, align: object = False, copy: object = False) -> None:
        self.code, self.order = str(code)[:20], "="

    def __setstate__(self, state: Any) -> None:
        self.order = {"<": "<", ">": ">", "|": "="}[state[1]]


class _Array(_StandIn):
    """`numpy.ndarray`: numbers copied out of the pickle's bytes."""

    NUMBERS = frozenset(("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"))
    values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, raw = state
        self.fill(shape, dtype, raw, "F" if fortran else "C")

    def fill(self, shape: Any, dtype: Any, raw: Any, order: Any) -> None:
        """Take the numbers; anything but plain numbers, as many as the shape says, is refused."""
        if not isinstance(dtype, _Dtype) or dtype.code not in self.NUMBERS or not isinstance(raw, bytes | bytearray):
            raise _Refused(f"an array of {getattr(dtype, 'code', None)!r}")
        values = np.frombuffer(raw, dtype.order + dtype.code) if raw else np.zeros(0, dtype.code)
        if not all(type(n) is int for n in shape) or prod(shape) != values.size:
            raise _Refused(f"an array whose shape does not fit its {values.size} numbers")
        self.values = np.array(values.reshape(shape, order=order), dtype=dtype.code)


class _Reconstruct(_StandIn):
    """`_reconstruct`: an array, to be filled by its state."""

    def __new__(cls, kind: object, shape: object, code: object) -> Any:
        if kind is not _Array:
            raise _Refused("an array of another class")
        return _Array()


class _FromBuffer(_StandIn):
    """`_frombuffer`: an array of protocol 5."""

    def __new__(cls, raw: object, dtype: object, shape: object, order: object) -> Any:
        array = _Array()
        array.fill(shape, dtype, raw, order)
        return array


class _Encode(_StandIn):
    """`_codecs.encode`: bytes of protocol 2, written as Latin-1 text."""

    def __new__(cls, text: object, codec: object) -> Any:
        if not isinstance(text, str) or codec != "latin1":
            raise _Refused(f"a text in {codec!r}")
        return text.encode("latin1")


_STAND_INS: dict[str, type] = {"numpy.ndarray": _Array, "numpy.dtype": _Dtype, "_codecs.encode": _Encode}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _STAND_INS |= {f"{_core}.multiarray._reconstruct": _Reconstruct, f"{_core}.numeric._frombuffer": _FromBuffer}


class _NothingElse(pickle.Unpickler):
    """An unpickler that looks nothing up."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name, or a refusal that says the name."""
        if f"{module}.{name}" not in _STAND_INS:
            raise _Refused(f"the name {f'{module}.{name}'!r}")
        return _STAND_INS[f"{module}.{name}"]


@contextmanager
def _only_stand_ins() -> Iterator[None]:
    """Torch's list of safe names with ours, and without what others of this process have put on it."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in _STAND_INS.items()]):
            yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)

"""Strangers' files: tensors and arrays come through bit by bit, and nothing else; above all, nothing is run."""

import builtins
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from latentguard.errors import InputError
from latentguard.tensorfiles import load_tensors


def numpy_1(protocol):
    """A pickle as NumPy 1 wrote it: the module of `_reconstruct` had another name."""

    def write(array):
        raw = (
            pickle.dumps(array, protocol).replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray").replace(b"cnumpy._core", b"cnumpy.core")
        )
        assert b"numpy.core.multiarray" in raw
        return raw[:3] + struct.pack("<Q", len(raw) - 11) + raw[11:] if protocol == 4 else raw  # the length of the one frame

    return write


def zipped(payload):
    """A file of `torch.save` whose pickle is `payload`."""
    plain, out = io.BytesIO(), io.BytesIO()
    torch.save(0, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(out, "w") as new:
        for item in old.namelist():
            new.writestr(item, payload if item.endswith("data.pkl") else old.read(item))
    return out.getvalue()


def saved(thing, **how):
    out = io.BytesIO()
    torch.save(thing, out, **how)
    return out.getvalue()


WRITERS = {
    "zip": saved,
    "before zip": lambda a: saved(a, _use_new_zipfile_serialization=False),
    "zip, numpy 1": lambda a: zipped(numpy_1(2)(a)),
    **{f"protocol {p}": lambda a, p=p: pickle.dumps(a, p) for p in (2, 3, 4, 5)},
    **{f"protocol {p}, numpy 1": numpy_1(p) for p in (2, 4)},
}


@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize("code", ("<f4", ">f4", "<f2", "<f8", "<i4"))
def test_arrays_come_through_bit_by_bit(tmp_path, how, code):
    array = (np.arange(5 * 32).reshape(5, 32) % 37 - 11).astype(code)
    for i, values in enumerate((array, np.asfortranarray(array), array[1])):
        path = tmp_path / f"{i}.pt"
        path.write_bytes(WRITERS[how](values))
        (tensor,) = load_tensors(path).values()
        assert tensor.dtype == torch.from_numpy(values.astype(values.dtype.newbyteorder("="))).dtype and np.array_equal(tensor.numpy(), values)


def test_tensors_in_dicts_and_lists_get_their_names(tmp_path):
    torch.save(OrderedDict(a=torch.ones(5, 3), b=[np.ones(2), torch.nn.Parameter(torch.ones(3))]), tmp_path / "v.pt")
    found = load_tensors(tmp_path / "v.pt")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"a": (5, 3), "b/0": (2,), "b/1": (3,)}
    assert not any(tensor.requires_grad for tensor in found.values())


class Runs:
    """Calls `function(*args)` where it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile(marker):
    touch = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": (Runs(os.system, f"touch {marker}"), "system"),
        "eval": (Runs(builtins.eval, touch), "eval"),
        "exec": (Runs(builtins.exec, touch), "exec"),
        "getattr": (Runs(builtins.getattr, "a", "upper"), "getattr"),
        "torch": (Runs(torch.hub.load, "x", "y"), "torch.hub.load"),
        "a class of ours": (InputError("x"), "InputError"),
        "numpy's own": (Runs(np.fromfile, str(marker)), "fromfile"),
    }


@pytest.mark.parametrize("way", ("alone", "in a dict", "in an array", "beside a tensor"))
@pytest.mark.parametrize("kind", ("zip", "before zip", "protocol 2", "protocol 4", "protocol 5"))
@pytest.mark.parametrize("which", hostile(""))
def test_hostile_files_run_nothing(tmp_path, which, kind, way):
    marker = tmp_path / "ran"
    thing, named = hostile(marker)[which]
    nest = {
        "alone": lambda: thing,
        "in a dict": lambda: {"vectors": np.zeros(3), "more": [{"deep": thing}]},
        "in an array": lambda: np.array([thing, None], dtype=object),
        "beside a tensor": lambda: [np.ones(3) if "protocol" in kind else torch.ones(3), thing],
    }
    path = tmp_path / "v.pt"
    path.write_bytes(WRITERS[kind](nest[way]()))
    with pytest.raises(InputError, match=f"refused and nothing in it was run, for it holds the name '.*{named}'"):
        load_tensors(path)
    assert not marker.exists()


def test_the_marker_would_be_there(tmp_path):
    """The files above do run code where Python's own unpickler reads them: the tests can fail."""
    for which in ("os.system", "eval", "exec"):
        marker = tmp_path / which
        pickle.loads(WRITERS["protocol 2"](hostile(marker)[which][0]))
        assert marker.exists()


@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:torch.quantize")
def test_forged_arrays_are_refused(tmp_path):
    """Flags that pass bytes off as objects, shapes without numbers, states for classes: nothing NumPy's own unpickler would be asked."""
    rebuild = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01btR"
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00%sI00\nI01\ntR(I3\nX\x01\x00\x00\x00<NNNI-1\nI-1\nI0\ntb"
    cases = {
        "objects out of bytes": (rebuild + b"(I1\n(I1\nt" + dtype % b"O8" + b"I00\nC\x08AAAAAAAAtb.", "an array of 'O8'"),
        "objects": (pickle.dumps(np.array([1, "x"], dtype=object)), "an array of 'O8'"),
        "text": (pickle.dumps(np.array(["x"])), "an array of 'U1'"),
        "fields": (pickle.dumps(np.zeros(2, dtype=[("a", "f4")])), "an array of 'V4'"),
        "a shape too large": (rebuild + b"(I1\n(I9\nt" + dtype % b"f4" + b"I00\nC\x08AAAAAAAAtb.", "shape does not fit"),
        "a class with a state": (b"cnumpy\nndarray\n}X\x04\x00\x00\x00fillI1\nsb.", "cannot be read"),
        "a matrix": (rebuild.replace(b"ndarray", b"matrix") + b".", "the name 'numpy.matrix'"),
        "an array without a state": (rebuild + b".", "holds a Array"),
        "another codec": (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.", "a text in 'hex'"),
        "a number": (pickle.dumps(3.0), "holds a float"),
        "a tensor larger than the file": (saved(torch.ones(1).expand(10**9)), "larger than the file"),
        "a sparse tensor": (saved(torch.eye(3).to_sparse()), "tensor of another kind"),
        "a quantised tensor": (saved(torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)), "tensor of another kind"),
        "a memo larger than the file": (b"\x80\x02Nr\x00\x00\x10\x00.", "more than 1048576 objects"),
        "nothing": (b"", "cannot be read"),
        "a zip of other things": (zipped(b"")[:60], "cannot be read"),
    }
    for what, (raw, says) in cases.items():
        (tmp_path / "v.pt").write_bytes(raw)
        with pytest.raises(InputError, match=says):
            load_tensors(tmp_path / "v.pt"), what
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_tensors(tmp_path / "absent.pt")


def test_torchs_own_list_is_left_as_it_was_and_not_used(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([InputError])
    try:
        torch.save(InputError("x"), tmp_path / "v.pt")
        with pytest.raises(InputError, match="the name 'latentguard.errors.InputError'"):
            load_tensors(tmp_path / "v.pt")
        assert set(torch.serialization.get_safe_globals()) == before | {InputError}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(before))


@pytest.mark.parametrize("kind", ("zip", "before zip", "protocol 2", "protocol 5"))
def test_damaged_files_are_refused_or_read(tmp_path, kind):
    """A flipped byte gives tensors or one sentence, never another error."""
    whole, random = WRITERS[kind]({"a": np.arange(6.0), "b": np.ones((2, 3), "f4")}), np.random.default_rng(0)
    for _ in range(120):
        raw = bytearray(whole)
        raw[random.integers(min(len(raw), 600))] ^= 1 << int(random.integers(8))
        (tmp_path / "v.pt").write_bytes(raw if random.random() < 0.8 else raw[: random.integers(len(raw))])
        try:
            assert all(isinstance(tensor, torch.Tensor) for tensor in load_tensors(tmp_path / "v.pt").values())
        except InputError as refused:
            assert "\n" not in str(refused)

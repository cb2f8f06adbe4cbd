"""A guard ↔ a folder: guard.safetensors, guard.json and a card; written so that a kill leaves one whole guard, read with every value checked.

Nothing but safetensors and JSON is read, and no code in them. What the fields are: fields.py and docs/guard-folder.md.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save as packed
from torch import Tensor

from latentguard.errors import InputError
from latentguard.guards.card import card
from latentguard.guards.drift import Reference
from latentguard.guards.fields import WAY_OUT, Fields, calibration_of, described, parsed
from latentguard.guards.guard import LatentGuard
from latentguard.guards.lineage import taken_for
from latentguard.guards.probes import restore

if TYPE_CHECKING:
    from latentguard.backends import Backend

TENSORS, GUARD, CARD = "guard.safetensors", "guard.json", "README.md"
FILES = (TENSORS, GUARD, CARD)
MOST_JSON, MOST_TENSORS = 8 << 20, 2 << 30  # bytes
_HIDDEN = 64  # of an MLP whose tensors do not say


def save(guard: LatentGuard, folder: str | Path) -> Path:
    """Write a guard's folder; a kill at any moment leaves what lay there before, or the new guard, and either loads.

    The new tensors are first put beside the old ones, under a name made of their hash; then guard.json, which names that hash, takes the
    old one's place in one step; then the tensors do. `load` takes the tensors that guard.json names from either place.

    Raises:
        InputError: for a guard that `load` would refuse, and a folder that cannot be written or is something else's.
    """
    folder, where = Path(folder).expanduser(), f"guard {guard.name} cannot be saved"
    if not guard.weights or not guard.template:
        raise InputError(
            f"{where}: its model {guard.model} has no hash of its weights or template, so that it could not be told from another; "
            "fit on a model that latentguard.load gives, or name them with Local(…, weights=…)"
        )
    blob = packed(_tensors(guard))
    found = described(guard, hashlib.sha256(blob).hexdigest())
    raw = (json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    if len(raw) > MOST_JSON or len(blob) > MOST_TENSORS:
        raise InputError(f"{where}: {len(raw)} bytes of JSON and {len(blob)} of tensors, {MOST_JSON} and {MOST_TENSORS} at most; shorten guard.about")
    way_out = "correct it before it is saved"
    whole = _made(*parsed(raw, where, way_out), blob, where, where, way_out)
    _check_home(folder)
    try:
        _write(folder, raw, blob, found["sha256"]["tensors"], card(whole, content=found["sha256"]["content"]).encode())
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}): name another folder") from error
    return folder


def load(folder: str | Path, backend: "Backend | None" = None, *, descendant: bool = False) -> LatentGuard:
    """The guard in a folder, on the model it was fitted on, or without a model (`guard.on(backend)` gives it one).

    Args:
        descendant: take other weights of the same shape and template; `about["descendant"]` then says what holds.

    Raises:
        InputError: for a folder that is not as it was saved, and for another model.
    """
    folder = Path(folder).expanduser()
    fields, about = parsed(_bytes(folder / GUARD, MOST_JSON), str(folder / GUARD))
    guard = _made(fields, about, _blob(folder, fields.sha256.tensors), str(folder / GUARD), str(folder / TENSORS), WAY_OUT)
    if backend is not None:
        return guard.on(backend, descendant=descendant)
    return taken_for(guard) if descendant else guard


def _made(fields: Fields, about: dict[str, Any], blob: bytes, where: str, tensors_at: str, way_out: str) -> LatentGuard:
    """The guard that the content of both files is."""
    tensors = _unpacked(blob, fields, tensors_at, way_out)
    parts = {part: {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{part}.")} for part in ("probe", "reference")}
    try:
        reference = Reference(fields.reference.raw, fields.reference.far, n=fields.reference.n, **parts["reference"])
        probe, calibration = restore(fields.method, parts["probe"]), calibration_of(fields)
    except InputError as error:
        raise InputError(f"{where}: {error}; {way_out}") from error
    if not bool(probe.raw(reference.middle[None]).isfinite().all()):
        raise InputError(f"{tensors_at}: the probe's score of the mean state is no finite number; {way_out}")
    return LatentGuard(
        name=fields.name,
        model=fields.model.name,
        weights=fields.model.weights,
        template=fields.model.template,
        n_layers=fields.model.n_layers,
        d_model=fields.model.d_model,
        layers=fields.layers,
        positions=fields.positions,
        terminal=fields.terminal,
        piece=fields.piece,
        method=fields.method,
        probe=probe,
        calibration=calibration,
        thresholds=fields.thresholds,
        reference=reference,
        domains=fields.domains,
        about=about,
    )


def _tensors(guard: LatentGuard) -> dict[str, Tensor]:
    found = {f"probe.{name}": tensor for name, tensor in guard.probe.tensors().items()}
    found |= {"reference.middle": guard.reference.middle, "reference.scale": guard.reference.scale}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}


def shapes(fields: Fields, hidden: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a guard and their shapes; `hidden` is the width of an MLP."""
    states = (len(fields.layers), len(fields.positions), fields.model.d_model)
    wide = states[0] * states[1] * states[2]
    probes: Mapping[str, dict[str, tuple[int, ...]]] = {
        "paper": {"high": states, "low": states},
        "mlp": {"middle": states, "scale": states, "inward": (hidden, wide), "bias": (hidden,), "outward": (hidden,)},
    }
    own = probes.get(fields.method, {"weight": states, "bias": ()})
    return {**{f"probe.{name}": shape for name, shape in own.items()}, "reference.middle": states, "reference.scale": states}


def _unpacked(blob: bytes, fields: Fields, where: str, way_out: str) -> dict[str, Tensor]:
    """The tensors, each of the name, type and shape that guard.json asks for, and finite."""
    try:
        held = dict(deserialize(blob))
    except SafetensorError as error:
        raise InputError(f"{where} is no safetensors file ({str(error).splitlines()[0][:120]!r}); {way_out}") from error
    width = held.get("probe.bias", {}).get("shape", ())
    wanted = shapes(fields, width[0] if len(width) == 1 and width[0] > 0 else _HIDDEN)
    if set(held) != set(wanted):
        names = ", ".join(sorted(name[:40] for name in held)[:12])
        raise InputError(f"{where} holds {names!r}, and a guard of method={fields.method} has {', '.join(sorted(wanted))}; {way_out}")
    found = {}
    for name, shape in wanted.items():
        one = held[name]
        if one["dtype"] != "F32":
            raise InputError(f"{where}: {name} is of type {one['dtype']}, and a guard's tensors are F32; {way_out}")
        if tuple(one["shape"]) != shape:
            raise InputError(
                f"{where}: {name} has the shape {list(one['shape'])}, and layers, positions, method and model.d_model of guard.json ask for {list(shape)}; "
                f"{way_out}"
            )
        found[name] = torch.from_numpy(np.frombuffer(one["data"], "<f4").astype(np.float32).reshape(shape))
        if not bool(found[name].isfinite().all()):
            raise InputError(f"{where}: {name} holds what is no finite number; {way_out}")
        if name.endswith("scale") and not bool((found[name] > 0).all()):
            raise InputError(f"{where}: {name} holds deviations that are not above 0; {way_out}")
    return found


def _bytes(path: Path, most: int) -> bytes:
    """A regular file's bytes, no more than `most` of them."""
    folder = path.parent
    try:
        if folder.is_file():
            raise InputError(f"{folder} is a file: give the folder that it lies in")
        if not folder.is_dir():
            raise InputError(f"{str(folder)!r}: there is no such folder; give one that LatentGuard.save wrote")
        if not path.exists() and not path.is_symlink():
            raise InputError(f"{folder} holds no {path.name}, so it is no whole guard: give a folder that LatentGuard.save wrote")
        if path.is_symlink() and not _in_hub_cache(path):
            raise InputError(f"{path} is a link to {os.readlink(path)!r}: put the file itself there")
        if not path.is_file():
            raise InputError(f"{path} is no regular file; {WAY_OUT}")
        if (size := path.stat().st_size) > most:
            raise InputError(f"{path} has {size} bytes, and {most} at most are read: it is no guard's; {WAY_OUT}")
        with path.open("rb") as file:
            return file.read(most)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise InputError(f"{str(path)!r} cannot be read ({getattr(error, 'strerror', None) or error}): check the path and its permissions") from error


def _in_hub_cache(link: Path) -> bool:
    """Whether a link leads where huggingface_hub's cache keeps files: snapshots/<commit>/NAME → ../../blobs/<hash>."""
    blobs = link.parent.resolve().parent.parent / "blobs"
    return Path(os.path.realpath(link)).parent == blobs


def _blob(folder: Path, wanted: str) -> bytes:
    """The tensors that guard.json names: in their place, or still beside it where a save was cut short."""
    waiting = folder / _waiting(wanted)
    if waiting.is_file() and not waiting.is_symlink() and hashlib.sha256(blob := _bytes(waiting, MOST_TENSORS)).hexdigest() == wanted:
        return blob
    blob = _bytes(folder / TENSORS, MOST_TENSORS)
    if (found := hashlib.sha256(blob).hexdigest()) != wanted:
        raise InputError(
            f"{folder / TENSORS} has the SHA-256 {found[:12]}…, and sha256.tensors of {GUARD} says {wanted[:12]}…: it was altered, cut short or comes from "
            "another guard; put the saved file back, fetch the guard anew, or fit one (exp=fit_guard)"
        )
    return blob


def _waiting(sha256: str) -> str:
    return f"guard.{sha256[:16]}.partial"


def _check_home(folder: Path) -> None:
    """Refuse to write over what is no guard's."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder to save the guard in")
    if (folder / CARD).exists() and not (folder / GUARD).exists():
        raise InputError(f"{folder} holds a {CARD} and no {GUARD}, so it is no guard's folder: name another, or an empty one")


def _write(folder: Path, raw: bytes, blob: bytes, sha256: str, readme: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    waiting = folder / _waiting(sha256)
    if not (in_place := _holds(folder / TENSORS, blob)) and not _holds(waiting, blob):
        _put(waiting, blob)
    _put(folder / f"{GUARD}.partial", raw).replace(folder / GUARD)
    _settle(folder)
    if not in_place:
        waiting.replace(folder / TENSORS)
    _put(folder / f"{CARD}.partial", readme).replace(folder / CARD)
    _settle(folder)
    for left in folder.glob("guard.????????????????.partial"):  # of saves that were cut short
        left.unlink(missing_ok=True)


def _holds(path: Path, blob: bytes) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == len(blob) and path.read_bytes() == blob


def _put(path: Path, content: bytes) -> Path:
    """Write a new file and see it onto the disk; a link in its place is not followed."""
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return path


def _settle(folder: Path) -> None:
    """See a change of names onto the disk."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""Directions out to other tools and back in: GGUF control vectors, steering-vectors, torch files. Knows no backend and no experiment.

Others number blocks and add to what block b (from 0) puts *out*; we number what a block takes *in*, so b is our layer b + 1:

    our layer                       GGUF (repeng, llama.cpp)           steering-vectors   refusal_direction   arXiv 2507.11878
    0, enters block 0               none                               none               layer 0             row 0
    1, out of block 0               direction.0, refused by llama.cpp  block 0            layer 1             row 1
    l, out of block l - 1           direction.<l - 1>                  block l - 1        layer l             row l
    L, out of the last block        direction.<L - 1>                  block L - 1        none                row L

Seen in running code: llama.cpp's own loader and model (in xllamacpp 2026.10.11549), repeng 0.4.0 and steering-vectors 0.12.2 give the
logits of our Add at that layer at every step, and of no other layer (tests/test_exchange.py, docs/directions.md). llama.cpp refuses a
file that holds direction.0 and ignores direction.<L>. Read in their sources: repeng counts a negative layer from the end before it reads
or writes one; refusal_direction reads and adds at the input of block `layer`; the paper's files have a row for each of the L + 1 states.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from latentguard.directions import SCHEMA, Direction
from latentguard.errors import InputError
from latentguard.layers import Layers, resolve_layers
from latentguard.tensorfiles import BROKEN, load_tensors, read_bytes

if TYPE_CHECKING:
    from latentguard.backends import Backend

log = logging.getLogger(__name__)
_CARD = "latentguard.direction"


def export_gguf(direction: Direction, path: str | Path, *, layers: Layers | None = None, model_type: str = "") -> Path:
    """Write a control vector for llama.cpp's `--control-vector` and repeng's `ControlVector.import_gguf`, atomically.

    llama.cpp adds *every* vector of the file at every step, with coefficient 1 (`--control-vector-scaled` sets another): name the one
    layer you steer at. Layers 0 and 1 cannot be represented: llama.cpp adds neither at the embeddings nor to the first block's output.
    The direction's card travels along under a key of our own, so that `import_direction` gives back what was written.

    Args:
        layers: which of the direction's layers, in our numbering; by default all that can be represented, with a warning for the rest.
        model_type: the family (`qwen2`, `llama`), which repeng compares when vectors are added; by default the model's name.

    Raises:
        InputError: where a named layer is 0 or 1 or has no vector, or none is left.
    """
    from gguf import GGUFWriter

    kept = _representable(direction, layers, first=2, form="a GGUF control vector")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    writer = GGUFWriter(partial, "controlvector")
    writer.add_string("controlvector.model_hint", model_type or direction.model or "unknown")
    writer.add_uint32("controlvector.layer_count", len(kept.layers))
    writer.add_string(_CARD, json.dumps({"schema": SCHEMA, "residual_norm": kept.residual_norm.tolist(), **kept.card()}))
    for layer in kept.layers:
        writer.add_tensor(f"direction.{layer - 1}", kept.at(layer).float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)
    return path


def to_steering_vector(direction: Direction, *, layers: Layers | None = None) -> Any:
    """A `steering_vectors.SteeringVector`: `.apply(model, multiplier=c)` adds what `Add(…, coef=c, when="every_step")` adds.

    It acts at all its layers at once: name the one you steer at. Layer 0 cannot be represented.

    Raises:
        InputError: where the library is absent, a named layer is 0 or has no vector, or none is left.
    """
    kept = _representable(direction, layers, first=1, form="a steering vector")
    try:
        library = import_module("steering_vectors")
    except ImportError as error:
        raise InputError("steering_vectors is not installed: pip install steering-vectors, or use export_gguf, which needs nothing more") from error
    return library.SteeringVector({layer - 1: kept.at(layer).clone() for layer in kept.layers}, "decoder_block")


def from_steering_vector(
    vector: Any, *, like: "Backend | None" = None, model: str = "", n_layers: int | None = None, position: str = "", name: str = ""
) -> Direction:
    """A Direction of a `SteeringVector`; the arguments, and what stays unknown, are those of `import_direction`.

    Raises:
        InputError: for a vector that acts on attention, MLP or norm outputs, one that does not fit, and where the depth is not given.
    """
    if vector.layer_type != "decoder_block":
        raise InputError(f"this steering vector acts on {vector.layer_type}: only those on decoder_block act at our layers")
    told = _Told(like, model, n_layers, position, name)
    depth = told.depth("this steering vector")
    rows = {block + 1 + (depth if block < 0 else 0): values.reshape(-1) for block, values in vector.layer_activations.items()}
    return told.direction(rows, "steering-vectors", depth, name="steering-vector")


def import_direction(
    path: str | Path,
    *,
    like: "Backend | None" = None,
    model: str = "",
    n_layers: int | None = None,
    layer: int | None = None,
    entry: str = "",
    position: str = "",
    name: str = "",
) -> Direction:
    """A Direction of a GGUF control vector, a `.pt` file, or a safetensors file of tensors.

    A tensor `[d_model]` is one layer's (refusal_direction's `direction.pt`; layer and position are read from the
    `direction_metadata.json` beside it); of a tensor or array `[L + 1, d_model]`, row l is layer l's (the paper's own files).

    What the file does not say stays unknown, and shows: `residual_norm` is NaN, so `dose` is NaN (docs/directions.md measures it);
    `weights` and `data` are empty, so `check` compares the shape alone; `n_positive` and `n_negative` are 0; the position is "unknown",
    or the label `prompt[-2]` for refusal_direction's places before the last token. A file of `export_gguf` says everything.

    Args:
        like: the backend it is for: gives the model's name and depth, and refuses another d_model.
        model: the model's name, and …
        n_layers: … its number of blocks, where there is no backend. A tensor `[L + 1, d_model]` says its depth; other files do not.
        layer: our layer of a lone vector.
        entry: which tensor, where a file holds several.

    Raises:
        InputError: for a file that holds anything but tensors and arrays (`load_tensors`), is broken, is ambiguous, or does not fit.
    """
    path, told = Path(path), _Told(like, model, n_layers, position, name)
    if read_bytes(path)[:4] == b"GGUF":
        if layer is not None or entry:
            raise InputError(f"{path}: a control vector numbers its own layers: leave out layer= and entry=")
        return _from_gguf(path, told)
    tensors = load_tensors(path)
    if not tensors or (entry and entry not in tensors):
        raise InputError(f"{path} has no tensor {entry!r}; it has: {', '.join(sorted(tensors)) or 'none'}")
    if not entry and len(tensors) > 1:
        raise InputError(f"{path} holds {len(tensors)} tensors: name one of them with entry= ({', '.join(sorted(tensors)[:12])})")
    values = tensors[entry] if entry else next(iter(tensors.values()))
    if values.dim() == 1:
        where, place = _place(path, layer)
        return told.direction({where: values}, "torch file", told.depth(str(path)), name=entry or path.stem, position=place)
    if values.dim() != 2 or len(values) < 2:
        raise InputError(f"{path}: a tensor {list(values.shape)} is no direction: give [d_model] or [L + 1, d_model]")
    if layer is not None:
        raise InputError(f"{path} has a row for each layer: leave out layer=, and take .at({layer}) of the result")
    depth = len(values) - 1 if like is None and n_layers is None else told.depth(str(path))
    if len(values) != depth + 1:
        raise InputError(f"{path}: {len(values)} rows, but a model of {depth} blocks has {depth + 1} states (row l enters block l, the last is the output)")
    return told.direction(dict(enumerate(values)), "torch file", depth, name=entry or path.stem)


@dataclass(frozen=True)
class _Told:
    """What the caller says of a file's direction."""

    like: "Backend | None"
    model: str
    n_layers: int | None
    position: str
    name: str

    def depth(self, what: str, said: int | None = None) -> int:
        """The number of blocks: as `what` said, as told, or the backend's; they may not differ."""
        known = {n for n in (said, self.n_layers, self.like.n_layers if self.like else None) if n is not None}
        if not known:
            raise InputError(f"{what} does not say how many blocks its model has: give like=backend or n_layers=")
        if len(known) > 1:
            raise InputError(f"{what}: n_layers is {' and '.join(map(str, sorted(known)))} at once: give the right model")
        return known.pop()

    def direction(self, rows: Mapping[int, Tensor], source: str, depth: int, *, name: str, position: str = "") -> Direction:
        """The Direction of one vector a layer, all that nobody said left unknown."""
        layers, sizes = sorted(rows), sorted({row.numel() for row in rows.values()})
        name, wanted = self.name or name, self.like.d_model if self.like else None
        if not layers or layers[0] < 0 or layers[-1] > depth:
            raise InputError(f"direction {name}: layers {layers} do not lie in a model with layers 0 … {depth}")
        if len(sizes) != 1 or wanted not in (None, sizes[0]):
            raise InputError(f"direction {name}: vectors of {' and '.join(map(str, sizes))} numbers, not all of {wanted or 'one size'}: give the right model")
        vectors = torch.stack([rows[layer].detach() for layer in layers])
        if vectors.is_complex() or not vectors.isfinite().all():
            raise InputError(f"direction {name}: its numbers are not all real and finite, so there is nothing to add")
        return Direction(
            vectors=vectors.to("cpu", torch.float32),
            layers=tuple(layers),
            position=self.position or position or "unknown",
            method=f"imported ({source})",
            model=self.like.name if self.like else self.model or "unknown",
            weights="",
            n_layers=depth,
            n_positive=0,
            n_negative=0,
            data="",
            residual_norm=torch.full((len(layers),), float("nan")),
            name=name,
        )


def _representable(direction: Direction, layers: Layers | None, *, first: int, form: str) -> Direction:
    """`direction` at the layers asked for, from layer `first` on."""
    wanted, name = direction.layers if layers is None else resolve_layers(layers, direction.n_layers), direction.name or direction.method
    lost, kept = [layer for layer in wanted if layer < first], [layer for layer in wanted if layer >= first]
    if not kept or (lost and layers is not None):
        raise InputError(f"direction {name}: layers {lost} have no place in {form}, which begins at our layer {first}: name others with layers=")
    if lost:
        log.warning("direction %s: layers %s are left out, %s begins at our layer %d", name, lost, form, first)
    vectors = torch.stack([direction.at(layer) for layer in kept])
    rows = [direction.layers.index(layer) for layer in kept]
    return replace(direction, vectors=vectors, layers=tuple(kept), residual_norm=direction.residual_norm[rows])


def _place(path: Path, layer: int | None) -> tuple[int, str]:
    """Layer and position of a lone vector: as told, or as the file beside it says."""
    beside = path.with_name("direction_metadata.json")
    if not beside.exists():
        if layer is None:
            raise InputError(f"{path} is one vector and no {beside.name} is beside it: give layer= (the block it enters)")
        return layer, ""
    try:
        said = json.loads(beside.read_text())
        found, pos = int(said["layer"]), int(said["pos"])
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(f"{beside} does not say layer and pos: {error}") from error
    if layer not in (None, found):
        raise InputError(f"layer={layer}, but {beside} says {found}: leave out layer=")
    return found, "t_post_inst" if pos == -1 else f"prompt[{pos}]"


def _from_gguf(path: Path, told: _Told) -> Direction:
    from gguf import GGMLQuantizationType, GGUFReader

    try:
        reader = GGUFReader(path)
        said = {key: reader.fields[key].contents() for key in ("general.architecture", "controlvector.model_hint", _CARD) if key in reader.fields}
        tensors = [(tensor.name, tensor.tensor_type, np.array(tensor.data)) for tensor in reader.tensors]
    except BROKEN as error:
        raise InputError(f"{path} cannot be read as a GGUF file ({type(error).__name__}: {str(error)[:200]!r})") from error
    if said.get("general.architecture") != "controlvector":
        raise InputError(f"{path} is a GGUF file of {said.get('general.architecture')!r}, not of a controlvector")
    rows = {}
    for key, kind, values in tensors:
        block = re.fullmatch(r"direction\.(0|[1-9]\d*)", key)
        if not block or kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16) or values.ndim != 1:
            raise InputError(f"{path}: {key!r} ({kind.name}, {list(values.shape)}) is no direction: vectors direction.<block> in F32 or F16 are read")
        rows[int(block[1]) + 1] = torch.from_numpy(values)
    if _CARD not in said:
        found = told.direction(rows, "GGUF", told.depth(str(path)), name=path.stem)
        hint = said.get("controlvector.model_hint")
        return found if told.like or told.model or not hint else replace(found, model=str(hint))
    try:
        card = json.loads(said[_CARD])
        if card.pop("schema") != SCHEMA:
            raise InputError(f"{path} was written with another schema; this version reads schema {SCHEMA}")
        norm, layers = torch.tensor(card.pop("residual_norm"), dtype=torch.float32), card.pop("layers")
        found = told.direction(rows, "GGUF", told.depth(str(path), card["n_layers"]), name=card["name"])
        if layers != list(found.layers) or norm.shape != (len(layers),):
            raise InputError(f"{path}: its card speaks of layers {layers}, its tensors of {list(found.layers)}")
        found = replace(found, residual_norm=norm, **{**card, "name": found.name, "position": told.position or card["position"]})
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: its card does not fit its tensors ({type(error).__name__}: {error})") from error
    if told.like:
        found.check(told.like)
    return found

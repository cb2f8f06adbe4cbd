"""Names layers of the residual stream. Does not know any model, only how many blocks it has.

Layer l < L is the residual stream entering block l; layer L is the output of the last block, before the
final norm (arXiv 2507.11878 counts the same L+1 states).
"""

from collections.abc import Sequence

from latentguard.errors import InputError

Layers = int | float | str | Sequence[int | float]


def check_layer(layer: int | float | str) -> None:
    """Refuse what can be no layer of any model: anything but an int >= 0, a fraction in [0, 1] or 'all'."""
    if layer == "all":
        return
    if isinstance(layer, bool) or not isinstance(layer, int | float):
        raise InputError(f"layer {layer!r}: give an int (0 … L), a fraction of depth such as 0.4, or 'all'")
    if isinstance(layer, float) and not 0.0 <= layer <= 1.0:
        raise InputError(f"layer {layer!r}: a float is a fraction of depth, between 0.0 and 1.0; for layer {layer:g} write an int")
    if isinstance(layer, int) and layer < 0:
        raise InputError(f"layer {layer}: layers count from 0 (the embeddings) upwards; there are no negative ones")


def resolve_layers(layers: Layers, n_layers: int) -> tuple[int, ...]:
    """Layers of a model with `n_layers` blocks, ascending and without repeats.

    An int is itself, a float a fraction of depth (0.5 is the middle, 1.0 is layer L), 'all' is 0 … L.

    Raises:
        InputError: for a layer outside 0 … `n_layers`.
    """
    if isinstance(layers, str):
        if layers != "all":
            raise InputError(f"layers={layers!r}: give ints, fractions of depth such as 0.4, or 'all'")
        return tuple(range(n_layers + 1))
    wanted = [layers] if isinstance(layers, int | float) else list(layers)
    if not wanted:
        raise InputError("layers=[]: name at least one layer")
    found = set()
    for layer in wanted:
        check_layer(layer)
        if layer == "all":
            raise InputError("layers=['all']: write layers='all', not a list")
        index = round(layer * n_layers) if isinstance(layer, float) else int(layer)
        if index > n_layers:
            raise InputError(f"layer {layer}: this model has layers 0 … {n_layers} (0 is the embeddings, {n_layers} the last block's output)")
        found.add(index)
    return tuple(sorted(found))

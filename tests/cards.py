"""Two pretended devices on one CPU: real numbers, with the rule of GPUs that what is computed together must lie together.

A tensor of `Card` says that it lies on cpu:0 or cpu:1 and is moved by `.to` alone. `spread` lays a model's blocks over both and gives
them accelerate's own hooks, as `device_map=auto` does on two GPUs.
"""

import contextlib

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

INDEXING = ("__getitem__", "__setitem__", "index_select")  # the index may lie on the CPU


def pretended(device):
    """The number of a pretended device; None for any other."""
    device = torch.device(device) if isinstance(device, str) else device
    return device.index if isinstance(device, torch.device) and device.type == "cpu" else None


def on(value, card):
    """A tensor on a pretended device, or (None) on the CPU."""
    if not isinstance(value, torch.Tensor):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        made = value.as_subclass(torch.Tensor if card is None else Card)
    if card is not None:
        made.card = card
    return made


def is_device(value):
    return isinstance(value, torch.device | str)


class Card(torch.Tensor):
    card = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:
            return torch.device("cpu", args[0].card)
        with torch._C.DisableTorchFunctionSubclass():
            tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, torch.Tensor)]
            cards = {getattr(item, "card", None) for item in tensors if item.dim()}
            card = next(iter(cards - {None}), None)
            if name == "to":
                target = [
                    getattr(a, "card", None) if isinstance(a, torch.Tensor) else pretended(a) for a in args[1:] if isinstance(a, torch.Tensor) or is_device(a)
                ]
                target += [pretended(kwargs.pop("device"))] if kwargs.get("device") is not None else []
                card = target[0] if target else args[0].card
                args = tuple(torch.device("cpu") if is_device(a) else a for a in args)
                if len(args) == 1 and "dtype" not in kwargs:
                    kwargs["dtype"] = args[0].dtype
                return on(func(*args, **kwargs), card)
            if name == "cpu":
                return on(func(*args, **kwargs), None)
            if name == "copy_":
                return on(func(*args, **kwargs), getattr(args[0], "card", None))
            if len(cards - {None} if name in INDEXING else cards) > 1:
                raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {sorted(map(str, cards))}")
            if kwargs.get("device") is not None:
                card = pretended(kwargs.pop("device"))
            return tree_map(lambda value: on(value, card), func(*args, **kwargs))


class Factories(TorchFunctionMode):
    """`device=cpu:1` of torch.zeros and its like, and `.to` of a tensor on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if any(issubclass(kind, Card) for kind in types):
            return func(*args, **kwargs)
        named = kwargs.get("device") or next((a for a in args[1:] if is_device(a)), None) if getattr(func, "__name__", "") == "to" else kwargs.get("device")
        card = pretended(named)
        if card is None:
            return func(*args, **kwargs)
        kwargs.pop("device", None)
        return on(func(*(torch.device("cpu") if is_device(a) else a for a in args), **kwargs), card)


class Hook(AlignDevicesHook):
    def init_hook(self, module):  # `spread` has laid out the weights
        return module


@contextlib.contextmanager
def spread(model, split):
    """The model with its embeddings and first `split` blocks on cpu:0, the rest on cpu:1."""
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{i}": int(i >= split) for i in range(len(model.model.layers))}
    with Factories():
        for name, card in places.items():
            for part in model.get_submodule(name).modules():
                for held in (part._parameters, part._buffers):
                    held.update({key: on(value.detach(), card) for key, value in held.items() if value is not None})
                    for value in filter(lambda item: item is not None, part._parameters.values()):
                        value._is_param = True
            add_hook_to_module(model.get_submodule(name), Hook(execution_device=torch.device("cpu", card), skip_keys="past_key_values"))
        model.hf_device_map = {name: f"cpu:{card}" for name, card in places.items()}
        add_hook_to_module(model, Hook(execution_device=torch.device("cpu", 0), io_same_device=True, skip_keys="past_key_values"))
        yield model

"""Apple's MPS where there is none: a device that has no double precision, as far as code in Python can tell."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

METAL, CPU = torch.device("mps"), torch.device("cpu")


class OnMetal(Tensor):
    """A tensor that says that it lies on the device; the weights of networks count as lying on every device."""


class DeviceWithoutDouble(TorchFunctionMode):
    """Tensors may be moved to ``METAL`` and back. Double precision there is an error."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:
            return METAL if isinstance(args[0], OnMetal) else func(*args)
        if func is Tensor.cpu:
            return placed(args[0], CPU)
        places = [place_of(leaf) for leaf in tree_leaves((args[1:], kwargs)) if func is Tensor.to or is_device(leaf)]
        places = [place for place in places if place is not None]
        args, kwargs = tree_map(lambda leaf: CPU if is_device(leaf) else leaf, (args, kwargs or {}))
        found = func(*args, **kwargs)
        return tree_map(lambda leaf: checked(placed(leaf, places[0]) if places else leaf), found)


def is_device(leaf: Any) -> bool:
    return isinstance(leaf, torch.device)


def place_of(leaf: Any) -> torch.device | None:
    """The device that an argument names."""
    if isinstance(leaf, Tensor):
        return METAL if isinstance(leaf, OnMetal) else CPU
    return leaf if is_device(leaf) else None


def placed(leaf: Any, place: torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    with torch._C.DisableTorchFunctionSubclass():
        return leaf.as_subclass(OnMetal if place == METAL else Tensor)


def checked(leaf: Any) -> Any:
    if isinstance(leaf, OnMetal) and leaf.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    return leaf

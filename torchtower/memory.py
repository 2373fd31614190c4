"""Where tensors lie, and whether they have been written to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchtower import _extension


def version_of(tensor: Tensor) -> int | None:
    """What moves when a tensor is written to; None of an inference tensor, which has no counter."""
    return None if tensor.is_inference() else tensor._version


def is_freed(tensor: Tensor) -> bool:
    """Whether a tensor's memory has been given back, by ``untyped_storage().resize_(0)``: it must not be read."""
    if tensor.layout is not torch.strided or not tensor.numel() or tensor.untyped_storage().nbytes():
        return False
    return not is_wrapper(tensor)


def memory_of(tensors: list[Tensor]) -> list[Any]:
    """Of each tensor where it lies and how: ``.to()`` and ``p.data = ...`` move what it holds and keep the object."""
    places: list[Any] = _extension.memory_of(tensors)
    if None in places:  # what DLPack has no words for
        return [
            (tensor.data_ptr(), tensor.stride(), tensor.shape, tensor.dtype) if place is None else place
            for tensor, place in zip(tensors, places, strict=True)
        ]
    return places


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is made of others and has no memory of its own (a quantised weight): it travels by itself."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    if is_traceable_wrapper_subclass(tensor):
        return True
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:  # a device made in Python, whose tensors are subclasses
        return True
    return False

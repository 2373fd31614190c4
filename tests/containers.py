"""What batches, outputs and what a module keeps are nested in, beside Python's own containers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclasses.dataclass
class Data:
    left: Tensor
    right: Tensor
    note: str = "kept"


@dataclasses.dataclass(frozen=True)
class FrozenData:
    left: Tensor
    right: Tensor


@dataclasses.dataclass
class Box:
    loss: Any = None


class AttributeDict(dict):
    def __getattr__(self, name: str) -> Any:
        return self[name]


class Elsewhere(Tensor):
    """A tensor that names a device on which it does not lie, as one made of others may."""

    @staticmethod
    def __new__(cls, inner: Tensor, device: str) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=torch.device(device))

    def __init__(self, inner: Tensor, device: str) -> None:
        self.inner, self.named = inner, device

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = next(each.named for each in tree_leaves(args) if isinstance(each, Elsewhere))
        out = func(*tree_map_only(Elsewhere, lambda each: each.inner, args), **(kwargs or {}))
        return tree_map_only(Tensor, lambda each: Elsewhere(each, named), out)

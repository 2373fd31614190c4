"""Replicas of TorchScript modules, whose parameters, buffers and flags live in C++.

Such a module is one piece: its submodules are never looked at one by one, and nothing that its forward changes can be
watched but its buffers. `original` and `replicate` call these functions where they would look into a Python module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def is_scripted(module: nn.Module) -> bool:
    """Whether ``module`` is scripted, traced or loaded from a file."""
    return isinstance(module, torch.jit.ScriptModule)


def is_optimized(module: nn.Module) -> bool:
    """Whether ``module`` is what ``torch.compile`` returns of a module: what is set on it is set on that one."""
    return type(module).__module__ == "torch._dynamo.eval_frame"


def is_training(module: nn.Module) -> bool:
    """``module.training``, which a frozen TorchScript module has not."""
    return bool(getattr(module, "training", False))


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of the whole piece."""
    return chain(module.parameters(), module.buffers())


def facts_of(module: nn.Module) -> list[Any]:
    """What replicas must be made anew for: tensors replaced, training mode changed."""
    return [*map(id, tensors_of(module)), *map(is_training, module.modules())]


def new_piece(module: nn.Module) -> nn.Module:
    """A module of the same code, to be given its tensors by `fill_piece`."""
    with torch.no_grad():  # else the copies would be no leaves
        return copy.deepcopy(module)


def fill_piece(module: nn.Module, twin: nn.Module, translate: Callable[[Any], Any]) -> None:
    """Give the replica of ``module`` its tensors and flags."""
    parts = dict(twin.named_modules(remove_duplicate=False))
    tensors = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    for path, tensor in tensors:
        owner, _, name = path.rpartition(".")
        setattr(parts[owner], name, translate(tensor))
    for path, part in module.named_modules(remove_duplicate=False):
        if is_training(parts[path]) != is_training(part):
            parts[path].training = part.training

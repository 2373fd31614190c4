"""A replica's parameters: leaves of its own, on the storage of the user's or kept up to date with it."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from torchtower.memory import is_wrapper, memory_of
from torchtower.replicas.original import Original
from torchtower.replicas.remote import RemoteStorage


class Leaves:
    """One replica's leaves; see Note [What a replica shares] in `torchtower.replicas.replicate`.

    Args:
        original: whose parameters they stand for.
        device: the tower's.
        aliases: whether they share the original's storage.
    """

    def __init__(self, original: Original, device: torch.device, *, aliases: bool) -> None:
        self.all: list[Tensor] = []  # in the order of the original's parameters
        self._original = original
        self._remote = None if aliases else RemoteStorage(device)
        self._parameters: list[Tensor] = []  # the original's, when the leaves were made
        self._storages: list[Tensor] = []  # what each is a leaf on
        self._memory: list[Any] = []  # where each leaf is to lie

    def make(self) -> None:
        """Make leaves of new parameters, and where one lies elsewhere than it is to; keep the others."""
        parameters = self._original.parameters
        lie_now = zip(self.all, memory_of(self.all), strict=True)
        before = dict(zip(map(id, self._parameters), lie_now, strict=True))
        storages = list(parameters)
        if self._remote is not None:
            remote = [index for index, p in enumerate(parameters) if p.device == self._original.device]
            for index, storage in zip(remote, self._remote.lay_out([parameters[i] for i in remote]), strict=True):
                storages[index] = storage
        leaves = []
        for parameter, storage, place in zip(parameters, storages, memory_of(storages), strict=True):
            leaf, place_now = before.get(id(parameter), (None, None))
            if leaf is None or place_now != place:
                leaf_before, leaf = leaf, _leaf_like(parameter, storage)
                _take_over_hooks(leaf_before, leaf)
            if leaf.requires_grad != parameter.requires_grad and not leaf.is_inference():
                leaf.requires_grad_(parameter.requires_grad)
            leaves.append(leaf)
        self.all, self._parameters, self._storages = leaves, parameters, storages
        self._memory = memory_of(leaves)

    def moved(self) -> list[int]:
        """Indices of leaves that a forward has given other data (``self.weight.data = ...``)."""
        memory = memory_of(self.all)
        if memory == self._memory:
            return []
        return [i for i, (now, then) in enumerate(zip(memory, self._memory, strict=True)) if now != then]

    def put_back(self, assigned: Container[int]) -> None:
        """Let leaves have the storage again that follows the original's parameter.

        Args:
            assigned: indices of parameters that the original has got other data of. Leaves with storage of their own
                keep theirs, which the graph may have saved: the next forward has new ones.
        """
        for index in self.moved():
            if self._remote is None or index not in assigned:
                self.all[index].data = self._storages[index].detach()
        self._memory = memory_of(self.all)

    def refresh(self, stale: bool) -> None:
        """Bring storage of this replica's own up to date; see `torchtower.replicas.remote.RemoteStorage.refresh`."""
        if self._remote is not None:
            self._remote.refresh(stale)

    def forget(self) -> None:
        """Whatever the parameters look like, the next refresh is to copy them."""
        if self._remote is not None:
            self._remote.forget()


def _take_over_hooks(before: Any, leaf: Any) -> None:
    """Let a leaf have the hooks that a forward has given the one before it."""
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if hooks := getattr(before, name, None):
            setattr(leaf, name, hooks)


def _leaf_like(parameter: Tensor, storage: Tensor) -> Tensor:
    data = storage.detach()
    # An inference tensor that requires grad gets none all the same.
    requires_grad = parameter.requires_grad and not data.is_inference()
    if not isinstance(parameter, nn.Parameter):
        leaf = data.requires_grad_(requires_grad)
    else:
        leaf = nn.Parameter(data, requires_grad=requires_grad)
        if type(parameter) is not nn.Parameter and type(leaf) is nn.Parameter:
            leaf = torch.Tensor._make_subclass(type(parameter), data, requires_grad)
    share_attributes(leaf, parameter)
    return leaf


def share_attributes(twin: Tensor, tensor: Tensor) -> None:
    """Let a twin have a tensor's attributes, which may change at any time; but not those that it is made of."""
    if not is_wrapper(tensor):
        twin.__dict__ = tensor.__dict__

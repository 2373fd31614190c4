"""Parameter storage of replicas that do not live on the main tower's device.

Laid out in flat buckets of one dtype, so that bringing a replica up to date takes few large copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchtower.devices import move
from torchtower.flat import BUCKET_BYTES, flatten, num_bytes, unflatten
from torchtower.memory import is_wrapper, memory_of, version_of

# What is larger is worth a copy of its own, and not worth a second copy on either side.
_SMALL_BYTES = 2**20


class RemoteStorage:
    """One replica's parameters on a device of its own.

    Args:
        device: the tower's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buckets: list[Bucket] = []
        self._laid_out: list[Any] = []
        self._storages: list[Tensor] = []

    def lay_out(self, parameters: list[Tensor]) -> list[Tensor]:
        """Make room for ``parameters``, each with its own strides; what is in the room comes with `refresh`.

        The room stays where they are the same, as alike, as last time.

        Returns:
            One tensor a parameter, whose storage is a part of a bucket.
        """
        alike = [*map(id, parameters), *[p.requires_grad for p in parameters], *memory_of(parameters)]
        if alike == self._laid_out:
            return self._storages
        storages: dict[int, Tensor] = {}
        self._buckets = []
        for is_trained, bucket in _buckets(parameters):
            if is_wrapper(bucket[0]):
                storages[id(bucket[0])] = alone = bucket[0].detach().to(self._device)
                self._buckets.append(Bucket(alone, bucket, is_trained))
                continue
            flat = torch.empty(sum(p.numel() for p in bucket), dtype=bucket[0].dtype, device=self._device)
            for parameter, view in zip(bucket, unflatten(flat, bucket), strict=True):
                # .data: a later refresh must not invalidate the graphs of this bucket's other parameters
                storages[id(parameter)] = view.data
            self._buckets.append(Bucket(flat, bucket, is_trained))
        self._laid_out = alike
        self._storages = [storages[id(p)] for p in parameters]
        return self._storages

    def refresh(self, stale: bool) -> None:
        """Copy the parameters that may have changed.

        Args:
            stale: whether the trainable ones may have, which no counter tells (fused optimizers and ``p.data`` move
                none).
        """
        for bucket in self._buckets:
            bucket.refresh(stale)

    def forget(self) -> None:
        """Let the next `refresh` copy everything."""
        for bucket in self._buckets:
            bucket.forget()


class Bucket:
    """Parameters of one dtype that travel together: trained ones, frozen ones, or buffers that require grad."""

    def __init__(self, flat: Tensor, parameters: list[Tensor], is_trained: bool) -> None:
        self._flat = flat
        self._parameters = parameters
        self._is_trained = is_trained
        self._versions: list[int | None] = []

    def refresh(self, stale: bool) -> None:
        """Copy these parameters in one go, if need be."""
        versions = [version_of(parameter) for parameter in self._parameters]
        first = self._parameters[0]
        is_buffer = not isinstance(first, nn.Parameter)  # that requires grad: refreshed like any other
        # An optimizer steps frozen ones, too, as long as they have a gradient.
        may_change = stale and (self._is_trained or any(p.grad is not None for p in self._parameters))
        if versions == self._versions and not (is_buffer or may_change):
            return
        self._versions = versions
        with torch.no_grad():
            source = first.detach() if is_wrapper(first) else flatten(self._parameters)
            self._flat.data.copy_(source, non_blocking=True)

    def forget(self) -> None:
        """Let the next `refresh` copy these parameters."""
        self._versions = []


def copy_together(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy tensors to their like on one other device, or on the same; small ones of a dtype travel in one go."""
    groups: dict[torch.dtype, list[int]] = {}
    for index, (source, target) in enumerate(zip(sources, targets, strict=True)):
        small = num_bytes(source) <= _SMALL_BYTES and not is_wrapper(source)
        if small and source.device != target.device and source.layout is torch.strided:
            groups.setdefault(source.dtype, []).append(index)
    arrived = list(sources)
    for indices in groups.values():
        alike = [sources[index] for index in indices]
        flat = move(flatten(alike), targets[indices[0]].device)
        for index, part in zip(indices, unflatten(flat, alike), strict=True):
            arrived[index] = part
    torch._foreach_copy_(list(targets), arrived, non_blocking=True)


def _buckets(parameters: Sequence[Tensor]) -> list[tuple[bool, list[Tensor]]]:
    """Which parameters travel together, and whether they are trained.

    Frozen ones travel apart, and are copied once, however often the others are; but one that is another name of a
    trained one's memory changes with it.
    """
    open_: dict[Any, list[Tensor]] = {}
    sizes: dict[Any, int] = {}
    full: list[tuple[bool, list[Tensor]]] = []
    trained = {_storage(parameter) for parameter in parameters if parameter.requires_grad}
    for parameter in parameters:
        is_trained = _storage(parameter) in trained
        alone = id(parameter) if is_wrapper(parameter) else None
        key = (is_trained, parameter.dtype, isinstance(parameter, nn.Parameter), alone)
        open_.setdefault(key, []).append(parameter)
        sizes[key] = sizes.get(key, 0) + num_bytes(parameter)
        if sizes[key] >= BUCKET_BYTES:
            full.append((is_trained, open_.pop(key)))
            sizes[key] = 0
    return full + [(key[0], bucket) for key, bucket in open_.items()]


def _storage(tensor: Tensor) -> int:
    return id(tensor) if is_wrapper(tensor) else tensor.untyped_storage().data_ptr()

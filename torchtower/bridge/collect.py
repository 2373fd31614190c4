"""Gradients of towers on other devices, on their way to the main device while the backwards still run.

Note [Buckets]
Parameters are cut into buckets, the last ones first, as gradients appear in that order. When a tower's backward has
filled a bucket (post-accumulate hooks on its leaves tell), it says so; the tower that fills a bucket last fetches it
from all, in one copy each, and reduces it in one fused pass. Until then a bucket stays on its tower's device, where its
gradients live to the end anyway: however far one tower is ahead of another, the main device holds the copies of those
buckets alone that are being reduced.
The reduction writes to tensors of its own: under reentrant checkpointing a leaf's hook fires more than once, and then
that bucket travels and is reduced again at the end, from gradients that must be whole still.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from torchtower.devices import move
from torchtower.flat import BUCKET_BYTES, flatten, num_bytes, unflatten
from torchtower.reduction import Grad, weighted_sum


def cut_buckets(parameters: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the parameters that need gradients, last first, cut where a bucket is full or the kind changes."""
    buckets: list[list[int]] = []
    before: tuple[torch.dtype, torch.device] | None = None
    size = 0
    for index in reversed(range(len(parameters))):
        parameter = parameters[index]
        if not parameter.requires_grad:
            continue
        kind = (parameter.dtype, parameter.device)
        if size >= BUCKET_BYTES or kind != before:
            buckets.append([])
            size = 0
            before = kind
        buckets[-1].append(index)
        size += num_bytes(parameter)
    return buckets


class Collection:
    """One backward's parameter gradients, reduced bucket by bucket on the main device.

    Args:
        buckets: from `cut_buckets`.
        weights: of the towers that take part.
        device: the main tower's.
    """

    def __init__(self, buckets: list[list[int]], weights: list[float], device: torch.device) -> None:
        self.buckets = buckets
        self._weights = weights
        self._device = device
        self._lock = threading.Lock()
        self._arrived: list[dict[int, list[Grad]]] = [{} for _ in buckets]
        self._reduced: dict[int, list[Grad]] = {}
        self._spoiled: set[int] = set()

    def send(self, bucket: int, tower: int, grads: list[Grad]) -> None:
        """Note that a tower has filled a bucket; if it was the last one missing, fetch and reduce them all."""
        with self._lock:
            arrived = self._arrived[bucket]
            arrived[tower] = grads
            if len(arrived) < len(self._weights) or bucket in self._spoiled:
                return
        self._reduced[bucket] = self._reduce([arrived[t] for t in range(len(self._weights))])

    def spoil(self, bucket: int) -> None:
        """A gradient of this bucket has grown since it was sent: what was or is being made of it counts for nothing."""
        with self._lock:
            self._spoiled.add(bucket)

    def finish(self, local_grads: list[list[Grad]], parameters: Sequence[Tensor]) -> list[Grad]:
        """Reduce what has not been yet, or must be again; all backwards have ended.

        Returns:
            The reduced gradient of each parameter, on its device; None where no tower has one.
        """
        results: list[Grad] = [None] * len(parameters)
        for bucket, indices in enumerate(self.buckets):
            reduced = self._reduced.pop(bucket, None)
            if reduced is None or bucket in self._spoiled:
                reduced = self._reduce([[grads[index] for index in indices] for grads in local_grads])
            for index, grad in zip(indices, reduced, strict=True):
                results[index] = None if grad is None else move(grad, parameters[index].device)
        return results

    def _reduce(self, towers: list[list[Grad]]) -> list[Grad]:
        with torch.accelerator.device_index(self._device.index):  # a tower's on another device may be here
            return weighted_sum([_move(grads, self._device) for grads in towers], self._weights, in_place=False)


class Sender:
    """Sends a tower's buckets as its backward fills them; used in that tower's thread alone.

    Args:
        collection: where to.
        tower: whose.
        leaves: the tower's, in the order that the buckets' indices count in.
    """

    def __init__(self, collection: Collection, tower: int, leaves: Sequence[Tensor]) -> None:
        self._collection = collection
        self._tower = tower
        self._buckets = [[leaves[index] for index in bucket] for bucket in collection.buckets]
        self._bucket_of = {id(leaf): bucket for bucket, leaves in enumerate(self._buckets) for leaf in leaves}
        self._missing = [{id(leaf) for leaf in leaves} for leaves in self._buckets]
        self._handles: list[Any] = []

    def watch(self) -> None:
        """Hear of every gradient that this tower accumulates, until told to `stop`."""
        for leaf in chain.from_iterable(self._buckets):
            if leaf.requires_grad:
                self._handles.append(leaf.register_post_accumulate_grad_hook(self._note))

    def stop(self) -> None:
        """Hear of nothing more."""
        for handle in self._handles:
            handle.remove()

    def _note(self, leaf: Tensor) -> None:
        """A leaf's gradient has been accumulated; send its bucket if it is full now."""
        bucket = self._bucket_of[id(leaf)]
        missing = self._missing[bucket]
        if not missing:
            self._collection.spoil(bucket)
            return
        missing.discard(id(leaf))
        if not missing:
            self._collection.send(bucket, self._tower, [leaf.grad for leaf in self._buckets[bucket]])


def _move(grads: list[Grad], device: torch.device) -> list[Grad]:
    """Bring gradients to ``device``, all dense ones of one dtype in a single copy."""
    away = [grad for grad in grads if grad is not None and grad.device != device]
    if not away or any(grad.layout is not torch.strided or grad.dtype != away[0].dtype for grad in away):
        return [None if grad is None else move(grad, device) for grad in grads]
    moved = iter(unflatten(move(flatten(away), device), away))
    return [grad if grad is None or grad.device == device else next(moved) for grad in grads]

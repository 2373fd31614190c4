"""Many tensors as one flat one, so that they travel in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What travels in one copy where there is more: as large as pays, small enough to overlap with work and to bound memory.
BUCKET_BYTES = 25 * 2**20


def num_bytes(tensor: Tensor) -> int:
    """How much memory a tensor's elements take."""
    return tensor.numel() * tensor.element_size()


def dense_strides(like: Tensor) -> tuple[int, ...]:
    """The strides of a tensor laid out like ``like``, without gaps."""
    return like.stride() if like.is_contiguous() else torch.empty_like(like, device="meta").stride()


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors' numbers one after the other, each in its own order in memory."""
    parts = [_in_memory_order(tensor.detach()) for tensor in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unflatten(flat: Tensor, likes: Sequence[Tensor]) -> list[Tensor]:
    """Views of ``flat``, which `flatten` made (or could have), shaped and laid out like ``likes``."""
    parts = torch.split(flat, [like.numel() for like in likes])
    return [part.as_strided(like.shape, dense_strides(like)) for part, like in zip(parts, likes, strict=True)]


def _in_memory_order(tensor: Tensor) -> Tensor:
    if tensor.stride() != dense_strides(tensor):
        tensor = torch.empty_like(tensor).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))

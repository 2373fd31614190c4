"""Which rows of a batch each tower gets; what the tensors mean to autograd is the bridge's business."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass
class Splits:
    """How one batch is cut: which rows of its tensors each tower gets.

    ``rows[t]`` is tower ``t``'s number of rows, that of the longest tensor where they differ; towers that got none are
    left out.
    """

    dim: int
    rows: list[int]

    def parts(self, tensor: Tensor) -> list[Tensor] | None:
        """``tensor`` cut along ``dim`` for each tower; None where every tower gets it whole.

        Cut as evenly as rows allow, the first towers getting one more. A tensor without the dimension, or with one row
        where others have more, is for everybody, as in PyTorch's broadcasting.
        """
        num_towers = len(self.rows)
        if num_towers == 1 or (size := size_along(tensor, self.dim)) < 2:
            return None
        return list(tensor.split_with_sizes(even_sizes(size, num_towers), self.dim))


@functools.lru_cache
def even_sizes(rows: int, num_towers: int) -> tuple[int, ...]:
    """Rows a tower: 9 over 4 are 3, 2, 2, 2 (``chunk`` gives 3, 3, 3 and nothing)."""
    share, rest = divmod(rows, num_towers)
    return tuple(share + (tower < rest) for tower in range(num_towers))


def plan_splits(tensors: Sequence[Tensor], num_towers: int, dim: int) -> Splits:
    """Decide how many towers work on a batch of these tensors, and on how many rows each.

    A batch without rows to split (none, one, no tensor at all) goes to the main tower as it is.

    Raises:
        ValueError: a sparse or nested tensor.
    """
    for tensor in tensors:
        if tensor.is_nested or tensor.layout is not torch.strided:
            raise ValueError(
                "TowerParallel: expected tensors that can be split by rows, but got a "
                f"{'nested' if tensor.is_nested else tensor.layout} one; pass a dense one, or make it a buffer"
            )
    sizes = tuple([size_along(tensor, dim) for tensor in tensors])
    if -1 in sizes:
        _warn_of_whole(tensors, dim, {size for size in sizes if size > 1})
    return Splits(dim, list(_rows(sizes, num_towers)))


@functools.lru_cache
def _rows(sizes: tuple[int, ...], num_towers: int) -> tuple[int, ...]:
    split = [size for size in sizes if size > 1]
    return even_sizes(max(split), min(num_towers, *split)) if split else (max(sizes, default=1),)


def _warn_of_whole(tensors: Sequence[Tensor], dim: int, rows: set[int]) -> None:
    for tensor in tensors:
        if tensor.dim() and size_along(tensor, dim) < 0 and not rows.isdisjoint(tensor.shape):
            warnings.warn(
                f"TowerParallel: a tensor of shape {tuple(tensor.shape)} has no dimension {dim}, along which the batch "
                "is split, and goes to every tower whole; if it has an entry for each row, give it that dimension",
                stacklevel=2,
            )


def size_along(tensor: Tensor, dim: int) -> int:
    """How many rows ``tensor`` has along ``dim``; -1 where it has no such dimension."""
    try:
        return tensor.shape[dim]
    except IndexError:
        return -1

"""What the towers' graphs may have saved of the batch itself, which the user may write over before the backward."""

from __future__ import annotations

import torch
from torch import Tensor


class Aliases:
    """Parts of tensors that have version counters of their own, and how to tell them of writes to the tensors.

    Args:
        parts_of: tensors and the parts of each.
    """

    def __init__(self, parts_of: list[tuple[Tensor, list[Tensor]]]) -> None:
        self._parts_of = [(tensor, tensor._version, parts) for tensor, parts in parts_of]

    def pass_on_writes(self) -> None:
        """Let autograd refuse a backward that needs what has been written over, as in the plain module."""
        for tensor, version, parts in self._parts_of:
            if tensor._version != version:
                torch.autograd.graph.increment_version(parts)

    def forget(self) -> None:
        """Let go of the batch: nothing saved of it is left."""
        self._parts_of.clear()

"""Buffers that persist as the mean over towers, where the user wants no tower's own (``buffers="mean"``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchtower._composed import TAKEN, is_expanded
from torchtower.memory import is_freed
from torchtower.reduction import Grad, weighted_sum
from torchtower.replicas.replicate import Replica


def pool_buffers(replicas: Sequence[Replica], rows: list[int]) -> None:
    """Let the main tower's buffers be the mean over the towers that worked.

    Args:
        replicas: one a tower; some of the last ones may have had nothing to do.
        rows: how many each tower that worked has had, its share in the mean.
    """
    if len(rows) < 2:
        return
    shares = [row / sum(rows) for row in rows]
    replicas = replicas[: len(rows)]
    own = set(map(id, replicas[0].buffers))
    with torch.no_grad():
        for column in zip(*[replica.buffers for replica in replicas], strict=True):
            if (pooled := _pooled(column, shares)) is not None and not is_expanded(column[0]):
                # Through .data, as batch normalisation writes: what this forward saved of the buffer for its
                # backward stays good.
                column[0].data.copy_(pooled)
        for dicts in zip(*[replica.buffer_dicts() for replica in replicas], strict=True):
            for name in [name for name, buffer in dicts[0].items() if id(buffer) not in own]:  # assigned
                if (pooled := _pooled([each.get(name) for each in dicts], shares)) is not None:
                    dicts[0][name] = pooled


def _pooled(column: Sequence[Grad], shares: list[float]) -> Grad:
    """The mean of the towers' buffers, but for elements that all agree on; None of what has none, or is trained."""
    main, *others = column
    for part in column:
        if (
            main is None
            or part is None
            or part.layout is not torch.strided
            or part.is_nested
            or is_freed(part)
            or part.dtype not in TAKEN
            or part.requires_grad
            or (part.shape, part.dtype) != (main.shape, main.dtype)
        ):
            return None
    (mean,) = weighted_sum([[part] for part in column], shares, in_place=False)
    assert main is not None and mean is not None
    alike = torch.stack([part.to(main.device) == main for part in others if part is not None]).all(0)
    return torch.where(alike, main, mean)

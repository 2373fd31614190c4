"""Gradients kept back by ``no_sync``: accumulated in each tower, reduced with the next synchronised backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtower.averaging import Grad


class HeldGradients:
    """What every tower has accumulated since the last reduction, weighted already."""

    def __init__(self) -> None:
        self._towers: list[dict[int, Tensor]] = []
        self._parameters: dict[int, Tensor] = {}  # keeps them alive, so that ids stay theirs

    def keep(self, parameters: Sequence[Tensor], local_grads: Sequence[Sequence[Grad]], weights: list[float]) -> None:
        """Add one backward's gradients, which become ours.

        Args:
            parameters: the user's.
            local_grads: tower-major, in the order of ``parameters``.
            weights: of the towers.
        """
        while len(self._towers) < len(local_grads):
            self._towers.append({})
        with torch.no_grad():
            for held, grads, weight in zip(self._towers, local_grads, weights, strict=False):
                for parameter, grad in zip(parameters, grads, strict=False):
                    if grad is None or weight == 0:
                        continue
                    share = grad if weight == 1 else grad * weight
                    before = held.get(id(parameter))
                    held[id(parameter)] = share if before is None else before + share
                    self._parameters[id(parameter)] = parameter

    def take(self, parameters: Sequence[Tensor]) -> list[list[Grad]]:
        """Everything kept, tower-major in the order of ``parameters``; nothing is kept afterwards."""
        towers = [[held.get(id(parameter)) for parameter in parameters] for held in self._towers]
        self.drop()
        return towers

    def drop(self) -> None:
        """Forget what was kept, as ``zero_grad`` asks."""
        self._towers = []
        self._parameters = {}

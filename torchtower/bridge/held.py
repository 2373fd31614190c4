"""Gradients kept back by ``no_sync``: accumulated in each tower, reduced with the next synchronised backward.

As in DistributedDataParallel, where they would be in ``p.grad``, the ``zero_grad`` of an optimizer or a module drops
them. torch has no hook for that, so that from the first one kept the methods themselves tell.

Kept and given out are those alone that the engine is about to accumulate into a parameter: who asks for gradients with
``torch.autograd.grad``, or of other inputs, gets what belongs to his own backward and leaves the rest as it is.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain, islice, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from torchtower.reduction import Grad, own

_MOST_BACKWARDS = 1024  # that may have begun since one that is still under way: in other threads, or within it


class HeldGradients:
    """What every tower has accumulated since the last reduction, weighted already."""

    def __init__(self) -> None:
        self.synchronize = True  # whether forwards that run now have their gradients reduced, not kept
        self._towers: list[dict[Tensor, Tensor]] = []  # by parameter
        self._reducing: deque[int] = deque(maxlen=_MOST_BACKWARDS)  # the engine's numbers, the last one first
        _all.add(self)

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return any(self._towers)

    def are_reduced(self, synchronize: bool) -> bool:
        """Whether the running backward reduces a forward's gradients, or has them kept.

        It reduces those of all forwards once it has come to one outside of ``no_sync``.

        Args:
            synchronize: whether this forward ran outside of ``no_sync``.
        """
        backward = torch._C._current_graph_task_id()  # -1 where a compiler runs it
        if not synchronize:
            return backward >= 0 and backward in self._reducing
        if backward not in islice(self._reducing, 1):
            self._reducing.appendleft(backward)
        return True

    def keep(
        self,
        parameters: Sequence[Tensor],
        local_grads: Sequence[Sequence[Grad]],
        weights: list[float],
        chosen: Sequence[bool],
        *,
        in_place: bool,
    ) -> None:
        """Add one backward's gradients.

        Args:
            parameters: the user's.
            local_grads: tower-major, in the order of ``parameters``.
            weights: of the towers.
            chosen: of which parameters.
            in_place: gradients whose memory is nobody else's may be kept as they are.
        """
        _hear_of_zero_grad()
        while len(self._towers) < len(local_grads):
            self._towers.append({})
        for held, grads, weight in zip(self._towers, local_grads, weights, strict=False):
            for parameter, grad, is_chosen in zip(parameters, grads, chosen, strict=False):
                if grad is None or weight == 0 or not is_chosen:
                    continue
                share = grad * weight if weight != 1 else own([grad])[0] if in_place else grad.clone()
                before = _like(parameter, held.get(parameter))
                held[parameter] = share if before is None else _add(before, share)

    def with_kept(
        self,
        parameters: Sequence[Tensor],
        local_grads: Sequence[Sequence[Grad]],
        weights: list[float],
        chosen: Sequence[bool],
    ) -> list[list[Grad]]:
        """What would be `kept` after one backward more, which is not added.

        Args:
            parameters: the user's.
            local_grads: as for `keep`.
            weights: likewise.
            chosen: likewise.
        """
        nothing: list[Grad] = [None] * len(parameters)
        sums = []
        for kept, grads, weight in zip_longest(self.kept(parameters, chosen), local_grads, weights):
            columns = zip(kept or nothing, grads or nothing, chosen, strict=False)  # inputs have gradients, too
            sums.append([_sum(before, _times(g, weight) if is_chosen else None) for before, g, is_chosen in columns])
        return sums

    def kept(self, parameters: Sequence[Tensor], chosen: Sequence[bool]) -> list[list[Grad]]:
        """What is kept of the chosen parameters, tower-major in the order of ``parameters``."""
        return [
            [_like(p, held.get(p)) if is_chosen else None for p, is_chosen in zip(parameters, chosen, strict=True)]
            for held in self._towers
        ]

    def drop(self, parameters: Iterable[Tensor]) -> None:
        """Forget what is kept of these: it has been given out, or ``zero_grad`` asks for it."""
        for parameter in parameters:
            for held in self._towers:
                if (kept := held.pop(parameter, None)) is not None and kept.device.type != "cpu":
                    _free_after_use(kept)

    def drop_all(self) -> None:
        """Forget what is kept."""
        self._towers = []


_all: weakref.WeakSet[HeldGradients] = weakref.WeakSet()


@functools.cache
def _hear_of_zero_grad() -> None:
    """Let every ``zero_grad`` drop what is kept of the parameters in question, from now on, in the whole process."""
    _let_drop(torch.optim.Optimizer, lambda self: chain.from_iterable(group["params"] for group in self.param_groups))
    _let_drop(nn.Module, nn.Module.parameters)


def _let_drop(kind: Any, parameters_of: Callable[[Any], Iterable[Tensor]]) -> None:
    zero_grad = kind.zero_grad

    @functools.wraps(zero_grad)
    def zero_grad_and_drop(self: Any, set_to_none: bool = True) -> None:
        zero_grad(self, set_to_none)
        for held in list(_all):
            if held:
                held.drop(parameters_of(self))

    kind.zero_grad = zero_grad_and_drop


def _free_after_use(kept: Tensor) -> None:
    # Its memory is that of the first backward's stream, which could have it anew before this one has read it.
    with suppress(Exception):  # not every backend can be told
        kept.record_stream(torch.accelerator.current_stream(kept.device))


def _add(before: Tensor, share: Tensor) -> Tensor:
    # In place, so that nothing is let go of meanwhile.
    is_dense = before.layout is torch.strided and share.layout is torch.strided
    total = before.add_(share) if is_dense else _sum(before, share)
    assert total is not None
    return total


def _times(grad: Grad, weight: float | None) -> Grad:
    return None if grad is None or not weight else grad if weight == 1 else grad * weight


def _sum(first: Grad, second: Grad) -> Grad:
    if first is None or second is None:
        return second if first is None else first
    return first + second if first.layout is torch.strided else second + first  # torch adds no dense to a sparse one


def _like(parameter: Tensor, grad: Grad) -> Grad:
    # The module may have been cast since.
    return None if grad is None else grad.to(parameter.dtype)

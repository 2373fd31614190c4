"""What forwards have done to the leaves themselves: frozen them, assigned their data, given them gradients.

The main tower's flags and data become the user's parameters', and so does the sum over towers of the gradients that a
backward within a forward has made.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor

from torchtower.bridge.local_backward import requires_grad
from torchtower.devices import move
from torchtower.reduction import Grad, weighted_sum
from torchtower.replicas.replicate import Replica


def take_over_flags(parameters: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Freeze and thaw the user's parameters where the main tower's forward has frozen and thawed its own.

    Returns:
        Whether it has.
    """
    now = requires_grad(leaves)
    if now == requires_grad(parameters):
        return False
    for parameter, leaf, flag in zip(parameters, leaves, now, strict=True):
        if not leaf.is_inference():  # which can have no flag
            parameter.requires_grad_(flag)
    return True


def take_over_data(parameters: Sequence[Tensor], replicas: Sequence[Replica]) -> None:
    """Keep what the main tower's forward assigned to a parameter's ``.data``, and that alone."""
    if any([replica.parameters.moved() for replica in replicas]):
        main = replicas[0]
        assigned = main.parameters.moved()
        for index in assigned:
            data = main.leaves[index].data
            if data.is_inference():  # never to be trained again
                with torch.inference_mode(False):
                    data = data.clone()
            parameters[index].data = data
        for replica in replicas:
            replica.parameters.put_back(assigned)


def take_gradients(replicas: Sequence[Replica]) -> list[list[Grad]]:
    """What the leaves have been given beside a backward of ours, tower-major; [] if nothing."""
    leaves = [replica.leaves for replica in replicas]
    if {type(None)}.issuperset(map(type, map(attrgetter("grad"), chain.from_iterable(leaves)))):  # nearly always
        return []
    towers: list[list[Grad]] = [[leaf.grad for leaf in own] for own in leaves]
    for leaf in chain.from_iterable(leaves):
        leaf.grad = None
    return towers


def accumulate(parameters: Sequence[Tensor], towers: list[list[Grad]]) -> None:
    """Give the user's parameters the sum over towers of what `take_gradients` has found."""
    totals = weighted_sum(towers, [1.0] * len(towers), in_place=False)
    for parameter, total in zip(parameters, totals, strict=True):
        if total is not None:
            total = move(total, parameter.device)
            grad = parameter.grad
            if grad is not None and grad.layout == total.layout:
                grad += total  # the user's tensor stays the same, as in the plain module
            else:
                parameter.grad = total if grad is None else grad + total

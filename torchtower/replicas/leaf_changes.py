"""What forwards have done to the leaves themselves: frozen them, assigned data, given gradients, used another's.

The main tower's flags and data become the user's parameters', and so does the sum over towers of the gradients that a
backward within a forward has made.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from torchtower.bridge.graphs import graph_of, requires_grad, towers_behind
from torchtower.devices import move
from torchtower.parts import tensors_within
from torchtower.reduction import Grad, weighted_sum
from torchtower.replicas.original import Original
from torchtower.replicas.replicate import Replica


def take_over_flags(original: Original, leaves: Sequence[Tensor]) -> bool:
    """Freeze and thaw the user's parameters where the main tower's forward has frozen and thawed its own.

    Returns:
        Whether it has.
    """
    now = requires_grad(leaves)
    if now == original.requires_grad:
        return False
    for parameter, leaf, flag in zip(original.parameters, leaves, now, strict=True):
        if not leaf.is_inference():  # which can have no flag
            parameter.requires_grad_(flag)
    return True


def take_over_data(parameters: Sequence[Tensor], replicas: Sequence[Replica]) -> bool:
    """Keep what the main tower's forward assigned to a parameter's ``.data``, and that alone.

    Returns:
        Whether any tower's forward has assigned some.
    """
    if not any([replica.parameters.moved() for replica in replicas]):
        return False
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
    return True


def check_apart(replicas: Sequence[Replica], outputs: Sequence[Any]) -> None:
    """See that no tower has used another's parameters: gradients would be lost, or counted by the wrong weight.

    Args:
        replicas: one a tower.
        outputs: what came out of them, one a tower that worked.

    Raises:
        RuntimeError: one has.
    """
    tower_of = {id(leaf): tower for tower, replica in enumerate(replicas) for leaf in replica.leaves}
    for tower, output in enumerate(outputs):
        tensors = [tensor for tensor in tensors_within(output) if graph_of(tensor) is not None]
        if others := towers_behind(tensors, tower_of, {}) - {tower}:
            raise RuntimeError(
                f"TowerParallel: expected each tower to use its own parameters, but tower {tower} has used tower "
                f"{min(others)}'s, which something outside of the module must have given it (a table of parameters, "
                "say, that a forward in a tower was the first to fill); run one batch through the plain module first"
            )


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

"""From every tower's gradients to one list: the multi-tower program's ``average_gradients``.

What the native op cannot know stands here: (gradient, variable) pairs, gradients that are missing, sparse or on
another device, and weights as users give them. The dense arithmetic is `torchtower.ops.tower_mean_` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from torchtower import ops

Grad = Tensor | None


def average_gradients(tower_grads: Iterable[Iterable[Any]], weights: Sequence[float] | None = None) -> list[Any]:
    """Average each variable's gradient over the towers, in one fused pass over all variables.

    Args:
        tower_grads: tower-major; ``tower_grads[tower]`` lists ``(grad, var)`` pairs, or bare gradients, in the same
            order in every tower. A gradient is a tensor, dense or sparse COO, on any device, or None: None in every
            tower stays None, None in some towers counts as zero there. No tower's gradients are changed.
        weights: each tower's share, such as the rows of its shard; any non-negative finite numbers, normalised
            here to sum to 1. None: equal shares. A tower of weight 0 is not read at all.

    Shape:
        Every tower's gradient of one variable has the same shape, ``var.shape``; so has its mean. The tower
        dimension ``[num_towers, *var.shape]`` is reduced without ever being made: see `stack_gradients`.

    Returns:
        One list in the order of ``tower_grads[0]``: ``(mean_grad, var)`` with the main tower's variables, or bare
        means. A mean lies on the main tower's device in the gradients' dtype.

    Raises:
        ValueError: no tower; lists that differ in length, shape, dtype or layout; weights of the wrong number,
            negative, NaN, infinite or all zero. The message names tower and parameter.
        TypeError: something that is neither a tensor nor None.

    Example:
        >>> var = torch.zeros(2)
        >>> towers = [[(torch.tensor([1.0, 2.0]), var)], [(torch.tensor([3.0, 6.0]), var)]]
        >>> average_gradients(towers)[0][0]
        tensor([2., 4.])

    Source:
        ``average_gradients`` of TensorFlow 1's CIFAR-10 tutorial (cifar10_multi_gpu_train.py).
    """
    grads, variables = _split_pairs(tower_grads, "average_gradients")
    shares = normalized_weights(weights, len(grads), "average_gradients")
    means = weighted_sum(_columns(grads, "average_gradients"), shares, in_place=False)
    return means if variables is None else list(zip(means, variables, strict=True))


def stack_gradients(tower_grads: Iterable[Iterable[Any]]) -> list[Any]:
    """Give each variable's gradients the new leading tower dimension, materialised, for those who want to look.

    Args:
        tower_grads: as in `average_gradients`.

    Shape:
        Each result has shape ``[num_towers, *var.shape]``; row ``t`` is tower ``t``'s gradient, zeros where tower
        ``t`` has none.

    Returns:
        One list in the order of ``tower_grads[0]``: ``(stacked, var)`` with the main tower's variables, or bare
        stacks; None where no tower has a gradient.

    Raises:
        ValueError: lists that differ in length, shape, dtype or layout.
        TypeError: something that is neither a tensor nor None.

    Example:
        >>> stack_gradients([[torch.tensor([1.0, 2.0])], [None]])[0]
        tensor([[1., 2.],
                [0., 0.]])
    """
    grads, variables = _split_pairs(tower_grads, "stack_gradients")
    stacks = [_stack(column) for column in _columns(grads, "stack_gradients")]
    return stacks if variables is None else list(zip(stacks, variables, strict=True))


def normalized_weights(weights: Sequence[float] | None, num_towers: int, function: str) -> list[float]:
    """Shares that sum to 1; equal ones are exactly ``1 / count``, by which the op knows a mean.

    Raises:
        ValueError: weights of the wrong number, negative, NaN, infinite or all zero.
    """
    if weights is None:
        return [1.0 / num_towers] * num_towers
    values = [float(weight) for weight in weights]
    if len(values) != num_towers:
        raise ValueError(f"{function}: expected one weight for each of {num_towers} towers, but got {len(values)}")
    for tower, value in enumerate(values):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"{function}: expected finite weights that are not negative, but tower {tower}'s is {value}"
            )
    read = [value for value in values if value > 0]
    if not read:
        raise ValueError(f"{function}: expected a weight above 0, but all of {num_towers} are 0")
    if min(read) == max(read):
        return [1.0 / len(read) if value else 0.0 for value in values]
    largest = max(read)  # divided by first, so that the sum of huge weights stays finite
    total = math.fsum(value / largest for value in read)
    return [value / largest / total for value in values]


def weighted_sum(columns: Sequence[Sequence[Grad]], weights: Sequence[float], *, in_place: bool) -> list[Grad]:
    """Sum ``weights[t] * columns[p][t]`` over towers, for every parameter ``p``.

    The road of both `average_gradients` and the autograd bridge.

    Args:
        columns: parameter-major, for each parameter one gradient a tower: dense, sparse or None; of any device.
        weights: raw, as `torchtower.ops.tower_mean_` takes them.
        in_place: write into the first dense gradient of each parameter, whose memory is hot and already mapped;
            it must be nobody else's.

    Returns:
        One gradient a parameter on the first tower's device; None where every tower has None.
    """
    if _are_plain(columns) and 0 not in weights:
        return list(_sum_dense(columns, weights, in_place))  # type: ignore[arg-type]
    results: list[Grad] = []
    # One call of the op for each set of towers that have a gradient: nearly always a single call.
    groups: dict[tuple[int, ...], list[tuple[int, list[Tensor]]]] = {}
    main = next((grad.device for tower in zip(*columns, strict=True) for grad in tower if grad is not None), None)
    for index, away in enumerate(columns):
        column = [grad if grad is None or grad.device == main else grad.to(main) for grad in away]
        present = tuple(t for t, grad in enumerate(column) if grad is not None and weights[t] != 0)
        chosen = [grad for t in present if (grad := column[t]) is not None]
        results.append(None)
        if chosen and all(grad.is_sparse for grad in chosen):
            results[index] = _sum_sparse(chosen, [weights[t] for t in present])
        elif chosen:
            groups.setdefault(present, []).append((index, [_dense(grad) for grad in chosen]))
        elif any(grad is not None for grad in column):
            results[index] = torch.zeros_like(next(grad for grad in column if grad is not None))
    for present, members in groups.items():
        sums = _sum_dense([grads for _, grads in members], [weights[t] for t in present], in_place)
        for (index, _), total in zip(members, sums, strict=True):
            results[index] = total
    return results


def _are_plain(columns: Sequence[Sequence[Grad]]) -> bool:
    """Whether all gradients are there, dense and on one device: the usual case, told at the cost of a look at each."""
    grads: list[Any] = list(chain.from_iterable(columns))
    return (
        {Tensor, nn.Parameter}.issuperset(map(type, grads))
        and {grad.layout for grad in grads} <= {torch.strided}
        and len({grad.device for grad in grads}) <= 1
    )


def _sum_dense(columns: Sequence[Sequence[Tensor]], weights: Sequence[float], in_place: bool) -> Sequence[Tensor]:
    if torch.is_grad_enabled() and any(grad.requires_grad for grads in columns for grad in grads):
        return [_sum_composed(grads, weights) for grads in columns]
    if in_place and list(weights) == [1.0]:
        return [grads[0] for grads in columns]
    out = [grads[0] if in_place and not _is_expanded(grads[0]) else torch.empty_like(grads[0]) for grads in columns]
    towers = zip(*columns, strict=True)
    ops.tower_mean_(out, list(chain.from_iterable(towers)), weights)
    return out


def _sum_composed(grads: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    # Differentiable, for create_graph: the native op is not.
    total = grads[0] * weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total = total + grad * weight
    return total


def _sum_sparse(grads: list[Tensor], weights: list[float]) -> Tensor:
    indices = torch.cat([grad._indices() for grad in grads], dim=1)
    values = torch.cat([grad._values() * w for grad, w in zip(grads, weights, strict=True)])
    return torch.sparse_coo_tensor(indices, values, grads[0].shape, check_invariants=False).coalesce()


def _is_expanded(grad: Tensor) -> bool:
    # As the backward of sum() makes them: fewer numbers in memory than elements, so nothing can be written there.
    return not grad.is_contiguous() and any(
        stride == 0 and size > 1 for size, stride in zip(grad.shape, grad.stride(), strict=True)
    )


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.layout is not torch.strided else grad


def _stack(column: list[Grad]) -> Grad:
    like = next((grad for grad in column if grad is not None), None)
    if like is None:
        return None
    rows = [torch.zeros_like(like) if grad is None else grad.to(like.device) for grad in column]
    if not all(row.is_sparse for row in rows):
        rows = [_dense(row) for row in rows]
    return torch.stack(rows)


def _columns(tower_grads: Sequence[Sequence[Grad]], function: str) -> list[list[Grad]]:
    """Parameter-major, checked to be alike over towers."""
    columns = [list(column) for column in zip(*tower_grads, strict=True)]
    for parameter, column in enumerate(columns):
        first, like = next(((tower, grad) for tower, grad in enumerate(column) if grad is not None), (0, None))
        for tower, grad in enumerate(column):
            if grad is not None and like is not None and (grad.shape != like.shape or grad.dtype != like.dtype):
                raise ValueError(
                    f"{function}: expected every tower's gradient of parameter {parameter} to be {_tell(like)} like "
                    f"tower {first}'s, but tower {tower}'s is {_tell(grad)}"
                )
    return columns


def _tell(grad: Tensor) -> str:
    return f"{tuple(grad.shape)} of {grad.dtype}"


def _split_pairs(tower_grads: Iterable[Iterable[Any]], function: str) -> tuple[list[list[Grad]], list[Any] | None]:
    towers = [list(tower) for tower in tower_grads]
    if not towers:
        raise ValueError(f"{function}: expected the gradients of at least one tower, but got none")
    for tower, entries in enumerate(towers):
        if len(entries) != len(towers[0]):
            raise ValueError(
                f"{function}: expected every tower to list the {len(towers[0])} gradients that tower 0 lists, "
                f"but tower {tower} lists {len(entries)}"
            )
    paired = [isinstance(entry, (tuple, list)) for entries in towers for entry in entries]
    if any(paired) and not all(paired):
        raise TypeError(
            f"{function}: expected (grad, var) pairs everywhere or bare gradients everywhere, but got some of each"
        )
    grads = [
        [_checked(entry, tower, p, function) for p, entry in enumerate(entries)] for tower, entries in enumerate(towers)
    ]
    return grads, [entry[1] for entry in towers[0]] if any(paired) else None


def _checked(entry: Any, tower: int, parameter: int, function: str) -> Grad:
    if isinstance(entry, (tuple, list)) and len(entry) != 2:
        raise TypeError(
            f"{function}: expected (grad, var) pairs, but tower {tower}'s entry {parameter} has {len(entry)} items"
        )
    grad = entry[0] if isinstance(entry, (tuple, list)) else entry
    if grad is not None and not isinstance(grad, Tensor):
        raise TypeError(
            f"{function}: expected gradients to be tensors or None, but tower {tower}'s of parameter {parameter} "
            f"is of type {type(grad).__name__}"
        )
    return grad

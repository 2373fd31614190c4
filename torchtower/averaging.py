"""From every tower's gradients to one list: the multi-tower program's ``average_gradients``.

What users give stands here, and is refused where it is not what was meant: (gradient, variable) pairs and weights. The
sums themselves are `torchtower.reduction`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from torchtower import _composed
from torchtower.reduction import Grad, dense, weighted_sum

_WITHOUT_SHAPE = (nn.UninitializedParameter, nn.UninitializedBuffer)


def average_gradients(tower_grads: Iterable[Iterable[Any]], weights: Sequence[float] | None = None) -> list[Any]:
    """Average each variable's gradient over the towers, in one fused pass over all variables.

    Where someone follows its ops (gradients that carry graphs, forward derivatives, ``torch.vmap``, ``torch.jit``) the
    means are made of torch's own, with the same bits.

    Args:
        tower_grads: tower-major; ``tower_grads[tower]`` lists ``(grad, var)`` pairs, or bare gradients, in the same
            order in every tower. A gradient is a floating or complex tensor, dense or sparse COO, on any device, or
            None: None in every tower stays None, None in some towers counts as zero there. The mean of sparse ones
            is sparse, that of sparse and dense ones dense. No tower's gradients are changed.
        weights: each tower's share, such as the rows of its shard; any non-negative finite numbers, normalised
            here to sum to 1. None: equal shares. A tower of weight 0 is not read at all.

    Shape:
        Every tower's gradient of one variable has the same shape, ``var.shape``; so has its mean. The tower
        dimension ``[num_towers, *var.shape]`` is reduced without ever being made: see `stack_gradients`.

    Returns:
        One list in the order of ``tower_grads[0]``: ``(mean_grad, var)`` with the main tower's variables, or bare
        means. A mean lies on the main tower's device in the gradients' dtype.

    Raises:
        ValueError: no tower; lists that differ in length, shape, dtype or sparse dimensions; a gradient of another
            shape than its variable; another layout or dtype than those above; some gradients on the meta device and
            others not; weights of the wrong number, negative, NaN, infinite or all zero. The message names tower and
            parameter.
        TypeError: something that is neither a tensor nor None; a tower's bare tensor, which belongs into a list; tuples
            that are no pairs, or pairs beside bare gradients; weights that are no sequence of real numbers.

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
    _check_alike(grads, "average_gradients")
    means = weighted_sum(grads, shares, in_place=False)
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
        ValueError, TypeError: as `average_gradients`.

    Example:
        >>> stack_gradients([[torch.tensor([1.0, 2.0])], [None]])[0]
        tensor([[1., 2.],
                [0., 0.]])
    """
    grads, variables = _split_pairs(tower_grads, "stack_gradients")
    _check_alike(grads, "stack_gradients")
    stacks = [_stack(column) for column in zip(*grads, strict=True)]
    return stacks if variables is None else list(zip(stacks, variables, strict=True))


def normalized_weights(weights: Sequence[float] | None, num_towers: int, function: str) -> list[float]:
    """Shares that sum to 1; equal ones are exactly ``1 / count``, by which the op knows a mean.

    Raises:
        ValueError: weights of the wrong number, negative, NaN, infinite or all zero.
        TypeError: weights that are no sequence of real numbers.
    """
    if weights is None:
        return [1.0 / num_towers] * num_towers
    given = _listed(weights, "a sequence of weights, one for each tower", function)
    values = [_number(weight, tower, function) for tower, weight in enumerate(given)]
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
    total = math.fsum([value / largest for value in read])
    return [value / largest / total for value in values]


def _number(weight: Any, tower: int, function: str) -> float:
    number = real_number(weight)
    if number is None:
        got = _tell(weight) if isinstance(weight, Tensor) else f"of type {type(weight).__name__}"
        raise TypeError(f"{function}: expected weights to be real numbers, but tower {tower}'s is {got}")
    return number


def real_number(value: Any) -> float | None:
    """A real number, a tensor's or an array's of one element too; None of anything else."""
    if type(value) is float:
        return value
    try:
        number = value.item() if hasattr(value, "item") else value
    except (RuntimeError, ValueError):  # several numbers, or none on the meta device
        return None
    # float() would read text, too, and drop an imaginary part.
    if not isinstance(number, Real):
        return None
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _stack(column: Sequence[Grad]) -> Grad:
    like = next((grad for grad in column if grad is not None), None)
    if like is None:
        return None
    rows = [torch.zeros_like(like) if grad is None else grad.to(like.device) for grad in column]
    if not all(row.is_sparse for row in rows):
        rows = dense(rows)
    return torch.stack(rows).to(like.dtype)


def _check_alike(tower_grads: Sequence[Sequence[Grad]], function: str) -> None:
    """Raise if a parameter's gradients differ between towers in more than their numbers."""
    main = next((grad for grad in chain.from_iterable(tower_grads) if grad is not None), None)
    on_meta = main is not None and main.is_meta
    for parameter, column in enumerate(zip(*tower_grads, strict=True)):
        first, like = next(((tower, grad) for tower, grad in enumerate(column) if grad is not None), (0, None))
        for tower, grad in enumerate(column):
            if grad is None or like is None:
                continue
            if (
                grad.shape != like.shape
                or grad.dtype != like.dtype
                or (grad.is_sparse and like.is_sparse and grad.sparse_dim() != like.sparse_dim())
            ):
                raise ValueError(
                    f"{function}: expected every tower's gradient of parameter {parameter} to be {_tell(like)} like "
                    f"tower {first}'s, but tower {tower}'s is {_tell(grad)}"
                )
            if grad.is_meta is not on_meta:
                raise ValueError(
                    f"{function}: expected every gradient {'' if on_meta else 'not '}to be on meta, as the first, but "
                    f"tower {tower}'s of parameter {parameter} is on {grad.device}"
                )


def _tell(tensor: Tensor) -> str:
    sparse = f" with {tensor.sparse_dim()} sparse dimensions" if tensor.is_sparse else ""
    return f"{tuple(tensor.shape)} of {tensor.dtype}{sparse}{' on meta' if tensor.is_meta else ''}"


def _listed(items: Any, expected: str, function: str) -> list[Any]:
    if type(items) is list:
        return items
    # Text, mappings and sets can be iterated over, too, but not for what is meant here.
    if not isinstance(items, (str, bytes, Mapping, Set)):
        try:
            iterator = iter(items)
        except TypeError:
            pass
        else:
            return list(iterator)
    raise TypeError(f"{function}: expected {expected}, but got {type(items).__name__}")


def _split_pairs(tower_grads: Iterable[Iterable[Any]], function: str) -> tuple[list[list[Grad]], list[Any] | None]:
    nested = "one list of gradients for each tower, tower_grads[tower][parameter]"
    # The rows of a tensor would do for a list, but are not what is meant.
    if isinstance(tower_grads, Tensor):
        raise TypeError(f"{function}: expected {nested}, but got a tensor")
    towers: list[list[Any]] = []
    for tower, entries in enumerate(_listed(tower_grads, nested, function)):
        if isinstance(entries, Tensor):
            raise TypeError(f"{function}: expected {nested}, but tower {tower}'s is a tensor: put it into a list")
        towers.append(_listed(entries, f"tower {tower}'s gradients to be a list", function))
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
    grad, var = entry if isinstance(entry, (tuple, list)) else (entry, None)
    if grad is None:
        return None
    if not isinstance(grad, Tensor):
        raise TypeError(
            f"{function}: expected gradients to be tensors or None, but tower {tower}'s of parameter {parameter} "
            f"is of type {type(grad).__name__}"
        )
    strange = _strange_kind(grad)
    if strange:
        raise ValueError(
            f"{function}: expected gradients to be dense or sparse COO tensors of {_composed.TAKEN_IN_WORDS}, but "
            f"tower {tower}'s of parameter {parameter} is {strange}"
        )
    if isinstance(var, Tensor) and var.shape != grad.shape:
        raise ValueError(
            f"{function}: expected (grad, var) pairs of one shape, but tower {tower}'s pair {parameter} has a gradient "
            f"of shape {tuple(grad.shape)} and a variable of shape {tuple(var.shape)}"
        )
    return grad


def _strange_kind(grad: Tensor) -> str:
    if type(grad) in _WITHOUT_SHAPE:
        return "an uninitialized parameter"
    if grad.is_nested:
        return "a nested tensor"
    if grad.layout not in (torch.strided, torch.sparse_coo):
        return f"of layout {grad.layout}"
    return "" if grad.dtype in _composed.TAKEN else f"of {grad.dtype}"

"""The weighted sum over towers, for every parameter: the road of `average_gradients` and of the autograd bridge.

The dense arithmetic is `torchtower.ops.tower_mean_` alone; here stands what that op cannot know: gradients that are
missing, sparse, on another device, or followed by someone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from torchtower import _composed, ops

Grad = Tensor | None
_PLAIN = {Tensor, nn.Parameter}
_storage_use_count: Any = vars(torch._C)["_storage_Use_Count"]
_address_of = attrgetter("_cdata")


def weighted_sum(towers: Sequence[Sequence[Grad]], weights: Sequence[float], *, in_place: bool) -> list[Grad]:
    """Sum ``weights[t] * towers[t][p]`` over towers, for every parameter ``p``.

    Args:
        towers: tower-major, gradients in the same order in every tower: dense, sparse or None; of any device.
        weights: raw, as `torchtower.ops.tower_mean_` takes them.
        in_place: write into the first dense gradient of each parameter, whose memory is hot and already mapped,
            unless somebody else has that memory, too.

    Returns:
        One gradient a parameter on the first tower's device; None where every tower has None.
    """
    grads: list[Any] = list(chain.from_iterable(towers))
    if in_place and len(towers) == 1 and weights[0] == 1:
        return own(grads)
    if _PLAIN.issuperset(map(type, grads)) and not _are_followed(grads, in_place):
        firsts = grads[: len(towers[0])]
        out: Sequence[Any] = own(firsts) if in_place else list(map(torch.empty_like, firsts))
        try:
            ops.tower_mean_(out, grads, weights)
            return list(out)
        except ValueError:
            pass  # not all dense, alike and on one device: the op looks at each before it writes, and nobody else need
        except RuntimeError as error:
            if "ZeroTensor" not in str(error):  # which have no memory, and torch lets nobody write to
                raise
    return _sum_each_kind(towers, weights, in_place)


def _sum_each_kind(towers: Sequence[Sequence[Grad]], weights: Sequence[float], in_place: bool) -> list[Grad]:
    """The sum where some gradients are missing, sparse, elsewhere, without memory, or followed by someone."""
    results: list[Grad] = []
    # One call of the op for each set of towers that have a gradient: nearly always a single call.
    groups: dict[tuple[int, ...], list[tuple[int, torch.dtype, list[Tensor]]]] = {}
    main = next((grad.device for grad in chain.from_iterable(towers) if grad is not None), None)
    for index, away in enumerate(zip(*towers, strict=True)):
        column = [grad if grad is None or grad.device == main else grad.to(main) for grad in away]
        present = tuple(t for t, grad in enumerate(column) if grad is not None and weights[t] != 0)
        chosen = [grad for t in present if (grad := column[t]) is not None]
        if _have_zeros(chosen):
            chosen = [grad.clone() for grad in chosen]
        results.append(None)
        if chosen and all(grad.is_sparse for grad in chosen):
            results[index] = _composed.sparse_mean(chosen, [weights[t] for t in present])
        elif chosen:
            groups.setdefault(present, []).append((index, chosen[0].dtype, dense(chosen)))
        elif any(grad is not None for grad in column):
            results[index] = torch.zeros_like(next(grad for grad in column if grad is not None))
    for present, members in groups.items():
        rows = list(zip(*[column for _, _, column in members], strict=True))
        sums = _sum_dense(rows, [weights[t] for t in present], in_place)
        for (index, dtype, _), total in zip(members, sums, strict=True):
            results[index] = total.to(dtype)
    return results


def _have_zeros(grads: Sequence[Any]) -> bool:
    """Whether some are ZeroTensors, which have no memory: a backward of ``torch.sgn`` makes them."""
    return not torch.compiler.is_compiling() and any(map(Tensor._is_zerotensor, grads))


def _sum_dense(towers: Sequence[Sequence[Tensor]], weights: Sequence[float], in_place: bool) -> Sequence[Tensor]:
    firsts, *others = towers
    if in_place:
        firsts = own(firsts)
    if not others and weights[0] == 1:
        return firsts if in_place else [grad.clone() for grad in firsts]
    grads = list(chain.from_iterable(towers))
    if _are_followed(grads, in_place):
        return [_composed.mean(column, weights) for column in zip(*towers, strict=True)]
    out = [first if in_place and not _composed.is_expanded(first) else torch.empty_like(first) for first in firsts]
    ops.tower_mean_(out, grads, weights)
    return out


def own(grads: Sequence[Any]) -> list[Any]:
    """These gradients, copied where somebody else has the memory.

    Where a parameter is looked at (``bias[None]``), the engine leaves in its leaf a view of what has come: of the
    gradient that the user has given, of an input's or of another parameter's.
    """
    if {Tensor}.issuperset(map(type, grads)) and (storages := _storages_of(grads)) is not None:
        uses = map(_storage_use_count, map(_address_of, storages))
        # By the gradient and the storage object; of memory that is not torch's (from numpy) it cannot be told.
        if max(uses, default=0) <= 2 and all(map(torch.UntypedStorage.resizable, storages)):  # nearly always
            return list(grads)
    return [grad.clone() if _is_shared(grad) else grad for grad in grads]


def _storages_of(grads: Sequence[Tensor]) -> list[Any] | None:
    """None where one has none: a sparse one."""
    try:
        return list(map(Tensor.untyped_storage, grads))
    except NotImplementedError:
        return None


def _is_shared(grad: Tensor) -> bool:
    if type(grad) is not Tensor or grad.layout is not torch.strided:
        return False
    storage = grad.untyped_storage()
    return _storage_use_count(storage._cdata) > 2 or not storage.resizable()


def _are_followed(grads: Sequence[Any], in_place: bool) -> bool:
    """Whether someone follows what is done to these who cannot follow the native op.

    That is a graph, forward AD, vmap, jit.trace, or ``torch.autograd.grad(is_grads_batched=True)``.
    """
    return (
        (torch.is_grad_enabled() and any(grad.requires_grad for grad in grads))
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or (not in_place and not torch.compiler.is_compiling() and any(map(is_batched, grads)))
    )


def is_batched(grad: Grad) -> bool:
    """Whether this is several gradients at once, of ``torch.autograd.grad(is_grads_batched=True)``."""
    is_several: bool = grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)
    return is_several


def dense(grads: list[Tensor]) -> list[Tensor]:
    """These gradients, of which some are sparse, all dense, and in the dtype that sums are taken in if one was not."""
    if all(grad.layout is torch.strided for grad in grads):
        return grads
    # Repeated rows of a sparse gradient are summed on the way, so all of it is done in the sum's dtype.
    return [wide.to_dense() for wide in map(_composed.wide, grads)]

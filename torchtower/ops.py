"""The native ops: one fused pass over every tower's gradients.

The schemas and the kernels of the CPU and of CUDA are compiled (csrc/); what torch needs besides stands here: fakes
for tracing and the composed form for every other device. `torchtower.averaging` is the road for users: it knows
missing and sparse gradients, other devices and names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchtower import _composed, _extension  # noqa: F401  (the extension defines the ops)

_ops = torch.ops.torchtower


def tower_mean_(out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Write the weighted sum of every tower's gradients into ``out``, reading each gradient once.

    A tower of weight 0 is not read at all. If every other weight is 1.0, the towers are summed; if every one is
    ``1.0 / towers`` of the towers read, they are summed and divided once, as ``torch.mean`` does; else the sum of
    ``weight * gradient`` is taken. In tower order, float16, bfloat16 and float32 in float32, float64 in float64,
    complex as pairs: the same bits for any number of threads and on every device.

    Args:
        out: one tensor for each parameter, in its gradients' dtype, or float32 where they are of 16 bits. Any
            strides without overlap. May be one of its own parameter's gradients, whole.
        grads: tower-major: all parameters of tower 0, then of tower 1, on one device.
        weights: one for each tower, raw: at least 0, finite, not all 0.

    Shape:
        ``grads[tower * len(out) + parameter]`` has the shape of ``out[parameter]``; so the tower dimension
        ``[num_towers, *out[parameter].shape]`` is read where it lies and never made.

    Raises:
        ValueError: lengths, devices, shapes or dtypes that do not fit, bad weights, or an output that overlaps
            itself or, in part, another tensor. Nothing has been written then.

    Not differentiable: where the mean itself needs a graph, use torch's own ops.

    Example:
        >>> out = [torch.zeros(2)]
        >>> tower_mean_(out, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])], [0.5, 0.5])
        >>> out[0]
        tensor([2., 4.])
    """
    _ops.tower_mean_.default(out, grads, weights)
    torch.autograd.graph.increment_version(out)


def tower_mean_with_statistics_(
    out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `tower_mean_` does and return, from the same reads, what the gradients were.

    Args:
        out: as for `tower_mean_`.
        grads: as for `tower_mean_`.
        weights: as for `tower_mean_`. A tower of weight 0 is not read, so its rows are 0: to look at a tower
            before it is rejected, give it a weight and reject it in a second call.

    Returns:
        ``sum_of_squares`` (float64) and ``non_finite`` (int64), of every tower's gradient of every parameter as it
        was before the call, and ``out_sum_of_squares`` (float64), of the mean before it is rounded to ``out``'s
        dtype; of a complex number both parts count. Squares of float64 are summed in float64; of the other dtypes in
        float32 within blocks of at most 1024 elements (16 on CUDA) and from there on in float64, a relative error
        below 4e-6 whatever the numbers, and some 1e-10 for a million of float32. A block whose squares float32
        cannot hold is summed in float64.

    Shape:
        ``sum_of_squares`` and ``non_finite``: ``[num_towers, num_parameters]``;
        ``out_sum_of_squares``: ``[num_parameters]``.

    Raises:
        ValueError: as `tower_mean_`.

    Example:
        >>> out = [torch.zeros(2)]
        >>> grads = [torch.tensor([3.0, 4.0]), torch.tensor([3.0, float("inf")])]
        >>> tower_mean_with_statistics_(out, grads, [1.0, 1.0])[:2]
        (tensor([[25.],
                [inf]], dtype=torch.float64), tensor([[0],
                [1]]))
    """
    statistics: tuple[Tensor, Tensor, Tensor] = _ops.tower_mean_with_statistics_.default(out, grads, weights)
    torch.autograd.graph.increment_version(out)
    return statistics


def _fake_tower_mean_(out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]) -> None:
    return None


def _fake_tower_mean_with_statistics_(
    out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    device = out[0].device if out else torch.device("cpu")
    rows = (len(weights), len(out))
    return (
        torch.empty(rows, dtype=torch.float64, device=device),
        torch.empty(rows, dtype=torch.int64, device=device),
        torch.empty(len(out), dtype=torch.float64, device=device),
    )


torch.library.register_fake("torchtower::tower_mean_", _fake_tower_mean_)
torch.library.register_fake("torchtower::tower_mean_with_statistics_", _fake_tower_mean_with_statistics_)


def _resolving(name: str) -> Callable[..., Any]:
    """Stand before a kernel where some tensor is lazily conjugated or negated, which torch allows no list to be."""
    op = getattr(_ops, name).default

    @torch.no_grad()
    def resolve(out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]) -> Any:
        plain = [mean.resolve_conj().resolve_neg() for mean in out]
        result = op(plain, [grad.resolve_conj().resolve_neg() for grad in grads], weights)
        for mean, resolved in zip(out, plain, strict=True):
            if resolved is not mean:
                mean.copy_(resolved)
        return result

    return resolve


_library = torch.library.Library("torchtower", "IMPL")
for _name in ("tower_mean_", "tower_mean_with_statistics_"):
    _library.impl(_name, getattr(_composed, _name), "CompositeExplicitAutograd")
    # The ops are no part of a graph: autograd need not look at thousands of tensors to find that out.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    for _bit in ("Conjugate", "Negative"):
        _library.impl(_name, _resolving(_name), _bit)

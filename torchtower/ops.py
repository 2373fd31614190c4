"""The native ops: one fused pass over every tower's gradients.

The schemas and the kernels of the CPU and of CUDA are compiled (csrc/); what torch needs besides stands here: fakes
for tracing and the composed form for every other device. `torchtower.averaging` is the road for users: it knows
missing and sparse gradients, other devices and names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from torchtower import _composed, _extension  # noqa: F401  (the extension defines the ops)

_ops = torch.ops.torchtower


def tower_mean_(out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Write the weighted sum of every tower's gradients into ``out``, reading each gradient once.

    A tower of weight 0 is not read at all. If every other weight is 1.0, the towers are summed; if every one is
    ``1.0 / towers`` of the towers read, they are summed and divided once, as ``torch.mean`` does; else the sum of
    ``weight * gradient`` is taken. In tower order, float16, bfloat16 and float32 in float32, float64 in float64,
    complex as pairs: the same bits for any number of threads and on every device.

    Args:
        out: a list or tuple, one tensor for each parameter, in its gradients' dtype, or float32 where they are of
            16 bits. Any strides without overlap. May be one of its own parameter's gradients, whole.
        grads: tower-major: all parameters of tower 0, then of tower 1, on one device.
        weights: one for each tower, raw: at least 0, not all 0, at most float32's largest number. They are rounded
            to float32 but where gradients are float64 or complex128.

    Shape:
        ``grads[tower * len(out) + parameter]`` has the shape of ``out[parameter]``; so the tower dimension
        ``[num_towers, *out[parameter].shape]`` is read where it lies and never made.

    Raises:
        ValueError: lengths, devices, shapes or dtypes that do not fit, bad weights, or an output that overlaps
            itself or, in part, another tensor. Nothing has been written then.
        TypeError: something that is no list or tuple of tensors, or no list of numbers.

    Not differentiable: where the mean itself needs a graph, use torch's own ops.

    Example:
        >>> out = [torch.zeros(2)]
        >>> tower_mean_(out, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])], [0.5, 0.5])
        >>> out[0]
        tensor([2., 4.])
    """
    _call("tower_mean_", out, grads, weights)


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
        ValueError, TypeError: as `tower_mean_`.

    Example:
        >>> out = [torch.zeros(2)]
        >>> grads = [torch.tensor([3.0, 4.0]), torch.tensor([3.0, float("inf")])]
        >>> tower_mean_with_statistics_(out, grads, [1.0, 1.0])[:2]
        (tensor([[25.],
                [inf]], dtype=torch.float64), tensor([[0],
                [1]]))
    """
    statistics: tuple[Tensor, Tensor, Tensor] = _call("tower_mean_with_statistics_", out, grads, weights)
    return statistics


def _call(name: str, out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]) -> Any:
    for argument, given in (("out", out), ("grads", grads)):
        # torch would take an iterator, too, and there would be nothing left of it to look at.
        if not isinstance(given, (list, tuple)):
            raise TypeError(
                f"{name}: expected {argument} to be a list or tuple of tensors, but got {type(given).__name__}"
            )
    try:
        result = getattr(_ops, name).default(out, grads, weights)
    except Exception as error:
        if not str(error).startswith(name):  # none of the op's own
            # Looked at only now: a look at each of thousands of tensors costs as much as the call.
            _refuse_arguments(name, out, grads, weights)
        raise
    torch.autograd.graph.increment_version(out)
    return result


def _refuse_arguments(name: str, out: Sequence[Any], grads: Sequence[Any], weights: Any) -> None:
    """Raise if the arguments are none that the op's schema takes, for which torch's errors name no tower."""

    def fail(error: type[Exception], what: str, got: str) -> NoReturn:
        raise error(f"{name}: expected {what}, but got {got}") from None

    for i, tensor in enumerate([*out, *grads]):
        tower, p = divmod(i - len(out), max(1, len(out)))
        which = f"parameter {p}'s output" if tower < 0 else f"tower {tower}'s gradient of parameter {p}"
        if not isinstance(tensor, Tensor):
            fail(TypeError, f"{which} to be a tensor", type(tensor).__name__)
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            fail(ValueError, f"{which} to have a shape", "an uninitialized parameter")
        if tensor.is_nested:
            fail(ValueError, f"{which} to be strided", "a nested tensor")
    if isinstance(weights, (str, bytes, Tensor)) or not isinstance(weights, Iterable):
        fail(TypeError, "a list of weights", type(weights).__name__)
    for tower, weight in enumerate(weights):
        if not isinstance(weight, Real):
            fail(TypeError, f"tower {tower}'s weight to be a real number", type(weight).__name__)
        if isinstance(weight, int) and abs(weight) > _composed.LARGEST_WEIGHT:
            fail(ValueError, f"tower {tower}'s weight to be finite in float32", "a larger one")


# A fake outranks every kernel, so that a call with one tensor on the meta device is its alone to refuse.
def _fake_tower_mean_(out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]) -> None:
    _composed.check("tower_mean_", out, grads, weights)


def _fake_tower_mean_with_statistics_(
    out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    _composed.check("tower_mean_with_statistics_", out, grads, weights)
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
        # The outputs' own memory, not copies, so that the kernel sees overlaps before a byte is written.
        plain = [_without_bits(written) for written in out]
        result = op(plain, [grad.resolve_conj().resolve_neg() for grad in grads], weights)
        for written, memory in zip(out, plain, strict=True):
            if written.is_conj():
                memory.conj_physical_()
            if written.is_neg():
                memory.neg_()
        return result

    return resolve


def _without_bits(tensor: Tensor) -> Tensor:
    tensor = tensor.conj() if tensor.is_conj() else tensor
    return torch._neg_view(tensor) if tensor.is_neg() else tensor


_library = torch.library.Library("torchtower", "IMPL")
for _name in ("tower_mean_", "tower_mean_with_statistics_"):
    _library.impl(_name, getattr(_composed, _name), "CompositeExplicitAutograd")
    # The ops are no part of a graph: autograd need not look at thousands of tensors to find that out.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    for _bit in ("Conjugate", "Negative"):
        _library.impl(_name, _resolving(_name), _bit)

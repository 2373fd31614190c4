"""The native ops composed of torch's own, for every device that has no kernels of ours.

`torchtower.ops` registers these for all backends at once; the CPU's and CUDA's own kernels rank before them. The
bits are the kernels': sums in tower order, in the same dtype, each product and each sum rounded by itself. `mean` and
`sparse_mean` can be differentiated, batched and traced as well, which the kernels cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
TAKEN = (torch.float32, torch.float64, *_HALF, torch.complex64, torch.complex128)
TAKEN_IN_WORDS = "float32, float64, float16, bfloat16, complex64 or complex128"
LARGEST_WEIGHT = torch.finfo(torch.float32).max


@torch.no_grad()
def tower_mean_(out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Do what `torchtower.ops.tower_mean_` says; outputs that overlap in part are not looked for."""
    check("tower_mean_", out, grads, weights)
    _refuse_cuda("tower_mean_", [*out, *grads])
    for p, written in enumerate(out):
        written.copy_(_as(written, _real_mean(grads[p :: len(out)], weights)))


@torch.no_grad()
def tower_mean_with_statistics_(
    out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `torchtower.ops.tower_mean_with_statistics_` says, with the same limit."""
    check("tower_mean_with_statistics_", out, grads, weights)
    _refuse_cuda("tower_mean_with_statistics_", [*out, *grads])
    device = out[0].device if out else torch.device("cpu")
    squares = torch.zeros(len(weights), len(out), dtype=torch.float64, device=device)
    non_finite = torch.zeros(len(weights), len(out), dtype=torch.int64, device=device)
    out_squares = torch.zeros(len(out), dtype=torch.float64, device=device)
    for p, written in enumerate(out):
        towers = grads[p :: len(out)]
        for t in _towers_read(weights):
            real = _real(towers[t])
            squares[t, p] = real.double().square().sum()
            non_finite[t, p] = real.isfinite().logical_not().sum()
        exact = _real_mean(towers, weights)
        out_squares[p] = exact.double().square().sum()
        written.copy_(_as(written, exact))
    return squares, non_finite, out_squares


def mean(towers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of one parameter in its gradients' dtype; it may be a view of the only gradient read."""
    return _as(towers[0], _real_mean(towers, weights)).to(towers[0].dtype)


def sparse_mean(towers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`mean` of sparse COO gradients, none of weight 0, coalesced; the rows that several towers have get its bits."""
    factors, divisor = _factors(weights)
    # Each tower's own repeated rows first, as its dense gradient would have them.
    coalesced = [wide(grad).coalesce() for grad in towers]
    values = torch.cat([_real(grad.values()) * factor for grad, factor in zip(coalesced, factors, strict=True)])
    indices = torch.cat([grad.indices() for grad in coalesced], dim=1)
    shape = towers[0].shape
    real_shape = (*shape, 2) if towers[0].is_complex() else shape
    total = torch.sparse_coo_tensor(indices, values, real_shape, check_invariants=False).coalesce()
    mean_values = _as(towers[0], _divided(total.values(), divisor)).to(towers[0].dtype)
    return torch.sparse_coo_tensor(total.indices(), mean_values, shape, is_coalesced=True, check_invariants=False)


def wide(grad: Tensor) -> Tensor:
    """In the dtype that sums are taken in."""
    return grad.to(torch.float32) if grad.dtype in _HALF else grad


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, as the backward of sum() makes them, so that nothing can be written there."""
    return not tensor.is_contiguous() and any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _towers_read(weights: Sequence[float]) -> list[int]:
    return [t for t, weight in enumerate(weights) if weight != 0]


def _factors(shares: Sequence[float]) -> tuple[Sequence[float], int]:
    """What each gradient is multiplied by before the sum, and what the sum is divided by."""
    if all(share == 1.0 / len(shares) for share in shares):
        return [1.0] * len(shares), len(shares)
    return shares, 1


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _as(like: Tensor, real: Tensor) -> Tensor:
    return torch.view_as_complex(real) if like.is_complex() else real


def _real_mean(towers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum in tower order in the dtype that the kernels accumulate in."""
    read = _towers_read(weights)
    factors, divisor = _factors([weights[t] for t in read])
    total: Tensor | None = None
    for t, factor in zip(read, factors, strict=True):
        term = wide(_real(towers[t]))
        term = term if factor == 1.0 else term * factor
        total = term if total is None else total + term
    assert total is not None
    return _divided(total, divisor)


def _divided(total: Tensor, divisor: int) -> Tensor:
    # By a tensor on the device: some backends turn the division by a number into a product with its reciprocal.
    return total if divisor == 1 else total / total.new_full((), divisor)


def _refuse_cuda(function: str, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.device.type == "cuda":
            raise NotImplementedError(
                f"{function}: expected an extension built with CUDA kernels for tensors on {tensor.device}, but "
                "torchtower.build_info() tells of none: build it with TORCHTOWER_CUDA=ON"
            )


def check(function: str, out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Refuse what the native ops refuse, in the words of csrc/checks.cpp; outputs that overlap in part go unseen."""

    def fail(message: str) -> NoReturn:
        raise ValueError(f"{function}: {message}")

    if not weights:
        fail("expected a weight for each tower, but got none")
    for t, weight in enumerate(weights):
        if not 0 <= weight <= LARGEST_WEIGHT:
            fail(f"expected every weight to be at least 0 and finite in float32, but tower {t}'s is {weight:g}")
    if not any(weights):
        fail(f"expected a tower with a weight above 0, but all {len(weights)} weights are 0")
    if len(grads) != len(weights) * len(out):
        fail(
            f"expected {len(weights) * len(out)} gradients, tower-major (as many towers as weights, {len(weights)}, "
            f"times as many parameters as outputs, {len(out)}), but got {len(grads)}"
        )

    def check_one(tensor: Tensor, which: str) -> None:
        if tensor.device != out[0].device:
            fail(
                f"expected every tensor on {out[0].device}, where parameter 0's output is, but {which} is on "
                f"{tensor.device}"
            )
        if tensor.layout != torch.strided:
            fail(f"expected {which} to be strided, but it is {tensor.layout}")
        if tensor.dtype not in TAKEN:
            fail(f"expected {which} to have dtype {TAKEN_IN_WORDS}, but got {_name(tensor.dtype)}")

    for p, written in enumerate(out):
        check_one(written, f"parameter {p}'s output")
        if is_expanded(written):
            fail(
                f"expected the elements of parameter {p}'s output to lie apart in memory, but its strides let them "
                "overlap (is it expanded?)"
            )
    for i, grad in enumerate(grads):
        t, p = divmod(i, len(out))
        written, first = out[p], grads[p]
        check_one(grad, f"tower {t}'s gradient of parameter {p}")
        expected = ""
        if grad.shape != written.shape:
            expected, got = f"shape {tuple(written.shape)}", str(tuple(grad.shape))
        elif t > 0 and grad.dtype != first.dtype:
            expected, got = f"dtype {_name(first.dtype)}, as tower 0's", _name(grad.dtype)
        elif grad.dtype != written.dtype and not (grad.dtype in _HALF and written.dtype == torch.float32):
            expected, got = f"the output's dtype, {_name(written.dtype)}", _name(grad.dtype)
        if expected:
            fail(f"expected every tower's gradient of parameter {p} to have {expected}, but tower {t}'s has {got}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

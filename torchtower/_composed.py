"""The native ops composed of torch's own, for every device that has no kernels of ours.

`torchtower.ops` registers these for all backends at once; the CPU's and CUDA's own kernels rank before them. The
bits are the kernels': sums in tower order, in the same dtype, each product and each sum rounded by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_TAKEN = (torch.float32, torch.float64, *_HALF, torch.complex64, torch.complex128)


@torch.no_grad()
def tower_mean_(out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Do what `torchtower.ops.tower_mean_` says; outputs that overlap in part are not looked for."""
    _check("tower_mean_", out, grads, weights)
    for p, mean in enumerate(out):
        mean.copy_(_as(mean, _real_mean(grads[p :: len(out)], weights)))


@torch.no_grad()
def tower_mean_with_statistics_(
    out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `torchtower.ops.tower_mean_with_statistics_` says, with the same limit."""
    _check("tower_mean_with_statistics_", out, grads, weights)
    device = out[0].device if out else torch.device("cpu")
    squares = torch.zeros(len(weights), len(out), dtype=torch.float64, device=device)
    non_finite = torch.zeros(len(weights), len(out), dtype=torch.int64, device=device)
    out_squares = torch.zeros(len(out), dtype=torch.float64, device=device)
    for p, mean in enumerate(out):
        towers = grads[p :: len(out)]
        for t in _towers_read(weights):
            real = _real(towers[t])
            squares[t, p] = real.double().square().sum()
            non_finite[t, p] = real.isfinite().logical_not().sum()
        exact = _real_mean(towers, weights)
        out_squares[p] = exact.double().square().sum()
        mean.copy_(_as(mean, exact))
    return squares, non_finite, out_squares


def _towers_read(weights: Sequence[float]) -> list[int]:
    return [t for t, weight in enumerate(weights) if weight != 0]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _as(out: Tensor, real: Tensor) -> Tensor:
    return torch.view_as_complex(real) if out.is_complex() else real


def _real_mean(towers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum in tower order in the dtype that the kernels accumulate in."""
    read = _towers_read(weights)
    shares = [weights[t] for t in read]
    is_plain = all(share == 1.0 for share in shares)
    is_mean = not is_plain and all(share == 1.0 / len(read) for share in shares)
    total: Tensor | None = None
    for t, share in zip(read, shares, strict=True):
        grad = _real(towers[t])
        term = grad.to(torch.float32 if grad.dtype in _HALF else grad.dtype)
        term = term if is_plain or is_mean else term * share
        total = term if total is None else total + term
    assert total is not None
    # By a tensor on the device: some backends turn the division by a number into a product with its reciprocal.
    return total / total.new_full((), len(read)) if is_mean else total


def _check(function: str, out: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[float]) -> None:
    def fail(message: str) -> NoReturn:
        raise ValueError(f"{function}: {message}")

    if not weights or not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        fail(f"expected finite weights, at least 0 and not all 0, but got {list(weights)}")
    if len(grads) != len(weights) * len(out):
        fail(
            f"expected {len(weights) * len(out)} gradients, tower-major ({len(weights)} weights times {len(out)} "
            f"outputs), but got {len(grads)}"
        )
    for i, tensor in enumerate([*out, *grads]):
        like = out[i % len(out)]
        tower, first = i // len(out) - 1, grads[i % len(out)]
        which = "output" if tower < 0 else f"tower {tower}'s gradient"
        which = f"{which} of parameter {i % len(out)}"
        if tensor.device.type == "cuda":
            raise NotImplementedError(
                f"{function}: expected an extension built with CUDA kernels for {which} on {tensor.device}, but "
                "torchtower.build_info() tells of none: build it with TORCHTOWER_CUDA=ON"
            )
        if tensor.device != out[0].device:
            fail(f"expected every tensor on {out[0].device}, but {which} is on {tensor.device}")
        if tensor.layout != torch.strided:
            fail(f"expected {which} to be strided, but it is {tensor.layout}")
        if tensor.shape != like.shape:
            fail(f"expected {which} to have shape {tuple(like.shape)}, but got {tuple(tensor.shape)}")
        widens = like.dtype == torch.float32 and first.dtype in _HALF
        wanted = first.dtype if tower >= 0 and (widens or first.dtype == like.dtype) else like.dtype
        if tensor.dtype != wanted or tensor.dtype not in _TAKEN:
            fail(f"expected {which} to have a floating dtype, {wanted} as the others, but got {tensor.dtype}")

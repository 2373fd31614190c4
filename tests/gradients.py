"""Towers' gradients for the tests of averaging, and what their mean is in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (4, 0), (33, 129)]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def towers_of(num_towers: int, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[list[Tensor]]:
    return [[random(s, dtype, 100 * t + p) for p, s in enumerate(shapes)] for t in range(num_towers)]


def oracle(column: list[Tensor | None], weights: list[float] | None = None) -> Tensor:
    """The weighted mean in float64, missing gradients counting zero."""
    weights = weights or [1.0] * len(column)
    wide = torch.complex128 if any(g is not None and g.is_complex() for g in column) else torch.float64
    total: Any = 0
    for grad, weight in zip(column, weights, strict=True):
        if grad is not None and weight:
            total = total + grad.to_dense().to(wide) * weight
    return total / math.fsum(weights)


def assert_near(got: Tensor, expected: Tensor, num_towers: int) -> None:
    assert got.shape == expected.shape
    eps = torch.finfo(got.dtype).eps
    error = (got.to(expected.dtype) - expected).abs().max() if got.numel() else torch.tensor(0.0)
    assert error <= 4 * num_towers * eps * max(1.0, expected.abs().max().item() if expected.numel() else 1.0)


def bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    return real.reshape(-1).view(torch.uint8)

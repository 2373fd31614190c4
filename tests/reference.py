"""What the native ops should compute, by hand in float64. Imports nothing of torchtower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The sum's own dtype: that of half types is float32.
EPS = {
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-24,
    torch.float32: 2.0**-24,
    torch.complex64: 2.0**-24,
    torch.float64: 2.0**-53,
    torch.complex128: 2.0**-53,
}
# Half the distance between 1 and its neighbour, and the smallest subnormal's half.
ROUNDING = {torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 2.0**-134)}


def real64(tensor: Tensor) -> Tensor:
    """A copy in float64, a complex tensor as pairs."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def tower_mean(towers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Add ``weight * gradient`` over the towers; one of weight 0 is not part of it."""
    total = torch.zeros_like(real64(towers[0]))
    for grad, weight in zip(towers, weights, strict=True):
        if weight != 0:
            total = total + weight * real64(grad)
    return total


def mean_error_bound(towers: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> Tensor:
    """Bound the error against `tower_mean`: (T + 1) eps sum|w g|, and the rounding of a 16-bit output."""
    magnitude = tower_mean([real64(grad).abs() for grad in towers], weights)
    relative, absolute = ROUNDING.get(out.dtype, (0.0, 0.0))
    tiny = 2.0**-149 if EPS[towers[0].dtype] == 2.0**-24 else 2.0**-1074
    sum_error = (len(towers) + 1) * (EPS[towers[0].dtype] * magnitude + tiny)
    return sum_error + relative * (magnitude + sum_error) + absolute


def sum_of_squares(tensor: Tensor) -> float:
    return float(real64(tensor).square().sum())


def count_non_finite(tensor: Tensor) -> int:
    return int((~real64(tensor).isfinite()).sum())

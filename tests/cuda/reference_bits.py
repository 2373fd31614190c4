"""What the kernels compute, written from DESIGN's contract with numpy alone.

Tensors are bits: uint32 for float32, uint64 for float64, uint16 for both half types.
"""

import numpy as np

from .emulator import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Rule


def widen(bits, dtype):
    """To the dtype that sums are taken in: float32, or float64 for float64."""
    if dtype == BFLOAT16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == FLOAT16:
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float64 if dtype == FLOAT64 else np.float32)


def narrow(values, dtype):
    if dtype == BFLOAT16:
        bits = values.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)
    if dtype == FLOAT16:
        return values.astype(np.float16).view(np.uint16)
    return values.view(np.uint64 if dtype == FLOAT64 else np.uint32)


def mean(grads, dtype, rule, weights):
    """Sum in tower order, product and sum rounded separately, then one division."""
    sums = None
    for grad, weight in zip(grads, weights, strict=True):
        term = widen(grad, dtype)
        if rule == Rule.WEIGHTED:
            term = term.dtype.type(weight) * term
        sums = term.copy() if sums is None else sums + term
    return sums / sums.dtype.type(len(grads)) if rule == Rule.MEAN else sums


def check_against_float64(result, out_dtype, grads, dtype, rule, weights):
    """Error at most T * eps * sum |w g| and one rounding to the output's dtype."""
    factors = {
        Rule.SUM: np.ones(len(grads)),
        Rule.MEAN: np.full(len(grads), 1 / len(grads)),
        Rule.WEIGHTED: np.asarray(weights),
    }[rule]
    wide = [widen(grad, dtype).astype(np.longdouble) for grad in grads]
    exact = sum(factor * grad for factor, grad in zip(factors, wide, strict=True))
    size = sum(factor * abs(grad) for factor, grad in zip(factors, wide, strict=True))
    eps = {FLOAT32: 2.0**-24, FLOAT64: 2.0**-53, FLOAT16: 2.0**-11, BFLOAT16: 2.0**-8}
    accumulation = eps[FLOAT64 if dtype == FLOAT64 else FLOAT32] * (len(grads) + 2)
    smallest = {FLOAT32: 2.0**-149, FLOAT64: 5e-324, FLOAT16: 2.0**-24, BFLOAT16: 2.0**-133}
    allowed = accumulation * size + eps[out_dtype] * abs(exact) + smallest[out_dtype]
    error = abs(widen(result, out_dtype).astype(np.longdouble) - exact)
    assert (error <= allowed).all(), f"error {error.max()} beyond {allowed.min()}"

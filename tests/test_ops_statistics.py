"""What tower_mean_with_statistics_ tells of the gradients, from the reads of the mean itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.test_ops import DTYPES, RULES, flat, tower_grads
from torchtower import _composed, ops

SHAPES = [(0,), (), (7,), (513, 3), (3, 5)]
# float64 in any order, with at most 2^16 terms a lane here; else float32 within a block, where a square is at most 66
# roundings from the result.
TOLERANCES = {torch.float64: 1e-12, torch.complex128: 1e-12}
TOLERANCE = 66 * 2**-24


def check(out: list[Tensor], grads: list[Tensor], weights: list[float]) -> None:
    num_towers, num = len(weights), len(out)
    before = [grad.clone() for grad in grads]
    plain = [torch.empty_like(mean) for mean in out]
    ops.tower_mean_(plain, grads, weights)
    squares, non_finite, out_squares = ops.tower_mean_with_statistics_(out, grads, weights)
    assert squares.dtype == out_squares.dtype == torch.float64 and non_finite.dtype == torch.int64
    assert squares.shape == non_finite.shape == (num_towers, num) and out_squares.shape == (num,)
    for p in range(num):
        tolerance = TOLERANCES.get(out[p].dtype, TOLERANCE)
        assert torch.equal(out[p], plain[p]) or not bool(plain[p].isfinite().all())
        for t in range(num_towers):
            grad = before[t * num + p]
            read = weights[t] != 0
            assert int(non_finite[t, p]) == (reference.count_non_finite(grad) if read else 0)
            expected = reference.sum_of_squares(grad) if read else 0.0
            assert float(squares[t, p]) == pytest.approx(expected, rel=tolerance, abs=0, nan_ok=True)
        if out[p].dtype not in reference.ROUNDING:
            expected = reference.sum_of_squares(plain[p])
            assert float(out_squares[p]) == pytest.approx(expected, rel=tolerance, abs=0, nan_ok=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_towers", (1, 2, 5, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_those_of_float64(dtype: torch.dtype, num_towers: int, rule: str) -> None:
    towers = tower_grads(SHAPES, dtype, num_towers)
    out = [torch.empty(shape, dtype=dtype) for shape in SHAPES]
    check(out, flat(towers), RULES[rule](num_towers))


def test_in_place_tells_of_the_gradients_as_they_were() -> None:
    towers = tower_grads(SHAPES, torch.float32, 3)
    towers[0][3][17] = float("inf")
    towers[1][3][500] = float("nan")
    check(towers[0], flat(towers), [0.5, 0.25, 0.25])


@pytest.mark.parametrize("tower", range(9))
def test_non_finite_values_are_counted_for_the_tower_that_has_them(tower: int) -> None:
    towers = tower_grads(SHAPES, torch.float32, 9)
    towers[tower][3][2] = float("-inf")
    check([torch.empty(shape) for shape in SHAPES], flat(towers), [1.0] * 9)


def test_a_tower_of_weight_zero_has_rows_of_zeros() -> None:
    towers = tower_grads(SHAPES, torch.float32, 3)
    towers[1][3].fill_(float("nan"))
    check([torch.empty(shape) for shape in SHAPES], flat(towers), [0.5, 0.0, 0.5])


@pytest.mark.parametrize("scale", (1e-44, 1e-30, 1e-20, 1e-17, 1e-15, 1e-13, 1e18, 1e30, 3e38))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_squares_beyond_float32_are_right(dtype: torch.dtype, scale: float) -> None:
    grad = torch.tensor([1.0, -1.0, 0.5, 0.0] * 300, dtype=torch.float64).mul(scale).to(dtype)
    check([torch.empty_like(grad)], [grad, torch.ones_like(grad)], [1.0, 0.0])


@pytest.mark.parametrize("num_towers", (2, 6))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_a_block_of_zeros_counts_zero_beside_others(dtype: torch.dtype, num_towers: int) -> None:
    towers = tower_grads([(5000,)], dtype, num_towers)
    for towers_grads in towers:
        towers_grads[0][:3000] = 0.0
    towers[-1][0].copy_(-0.0 * towers[-1][0].abs())
    check([torch.empty(5000, dtype=dtype)], flat(towers), [1.0] * num_towers)


@pytest.mark.parametrize("at", range(17))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_one_number_too_small_for_float32_is_no_zero(dtype: torch.dtype, at: int) -> None:
    grad = torch.zeros(100, dtype=dtype)
    grad[at] = -1e-30
    check([torch.empty_like(grad)], [grad], [1.0])


def test_squares_that_float32_loses_beside_one_that_it_keeps() -> None:
    grad = torch.full((512,), 1e-23)
    grad[77] = 2.0**-45
    check([torch.empty_like(grad)], [grad], [1.0])
    grad[77] = 2.0**-46
    check([torch.empty_like(grad)], [grad], [1.0])


def test_finite_float64_whose_square_is_not_is_not_counted() -> None:
    grad = torch.full((3,), 1e200, dtype=torch.float64)
    squares, non_finite, _ = ops.tower_mean_with_statistics_([grad], [grad.clone()], [1.0])
    assert squares.tolist() == [[float("inf")]] and non_finite.tolist() == [[0]]


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_the_means_squares_are_taken_before_rounding(dtype: torch.dtype) -> None:
    towers = tower_grads([(500,)], dtype, 3)
    exact, rounded = [torch.empty(500)], [torch.empty(500, dtype=dtype)]
    ops.tower_mean_(exact, flat(towers), [1 / 3] * 3)
    *_, out_squares = ops.tower_mean_with_statistics_(rounded, flat(towers), [1 / 3] * 3)
    assert float(out_squares[0]) == pytest.approx(reference.sum_of_squares(exact[0]), rel=TOLERANCE)
    assert float(out_squares[0]) != pytest.approx(reference.sum_of_squares(rounded[0]), rel=TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_composed_form_tells_the_same(dtype: torch.dtype) -> None:
    towers, weights = tower_grads(SHAPES, dtype, 3), [0.5, 0.0, 0.5]
    towers[2][3][3] = float("nan")
    out = [torch.empty(shape, dtype=dtype) for shape in SHAPES]
    ours = ops.tower_mean_with_statistics_(out, flat(towers), weights)
    theirs = _composed.tower_mean_with_statistics_(out, flat(towers), weights)
    assert torch.equal(ours[1], theirs[1])
    tolerance = TOLERANCES.get(dtype, TOLERANCE)
    for a, b in ((ours[0], theirs[0]), (ours[2], theirs[2])):
        assert torch.allclose(a, b, rtol=tolerance, atol=0, equal_nan=True)


def test_a_parameter_of_several_chunks_is_counted_whole() -> None:
    towers = tower_grads([(80000,), (5,)], torch.float32, 2)
    towers[1][0][[3, 40000, 79999]] = float("inf")
    check([torch.empty(80000), torch.empty(5)], flat(towers), [0.5, 0.5])


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float64, 1e-13), (torch.float32, 1e-9), (torch.bfloat16, 3e-7), (torch.float16, 3e-7)],
    ids=str,
)
def test_accuracy_on_many_elements(dtype: torch.dtype, error: float) -> None:
    grad = torch.randn(3_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    squares, _, _ = ops.tower_mean_with_statistics_([torch.empty_like(grad)], [grad], [1.0])
    expected = reference.sum_of_squares(grad)
    assert float(squares[0, 0]) == pytest.approx(expected, rel=error)

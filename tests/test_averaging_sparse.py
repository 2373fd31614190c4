"""Sparse gradients: averaged with one another, with dense ones and with None, and stacked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gradients import bits, oracle, random
from torchtower import average_gradients, stack_gradients


def sparse(rows: list[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    values = random((len(rows), 3), dtype, seed)
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (10, 3), check_invariants=True)


@pytest.mark.parametrize("weights", [None, [1.0, 4.0, 0.5]])
def test_sparse_gradients_stay_sparse_and_sum_repeated_rows(weights: list[float] | None) -> None:
    column = [sparse([1, 1, 5], 0), sparse([5, 9], 1), sparse([], 2)]
    (mean,) = average_gradients([[grad] for grad in column], weights)
    assert mean.is_sparse and mean.is_coalesced()
    assert torch.allclose(mean.to_dense(), oracle(column, weights), rtol=1e-14)


def test_sparse_in_some_towers_and_dense_in_others_gives_dense() -> None:
    column = [sparse([1, 1, 5], 0), random((10, 3), torch.float64, 1)]
    for pair in (column, column[::-1]):
        (mean,) = average_gradients([[grad] for grad in pair])
        assert not mean.is_sparse
        assert torch.allclose(mean, oracle(pair), rtol=1e-14)


@pytest.mark.parametrize("weights", [None, [1.0, 4.0, 0.5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_sparse_gradients_have_the_bits_of_dense_ones(dtype: torch.dtype, weights: list[float] | None) -> None:
    column = [sparse([1, 3, 3, 5], 0, dtype), sparse([5, 9, 1], 1, dtype), sparse([3, 1, 3, 5, 9], 2, dtype)]
    if dtype.is_complex:
        column = [grad * (1 + 0.3j) for grad in column]
    (mean,) = average_gradients([[grad] for grad in column], weights)
    (dense,) = average_gradients([[grad.to_dense()] for grad in column], weights)
    assert mean.is_coalesced() and mean.dtype == dtype
    assert torch.equal(bits(mean.to_dense()), bits(dense))


def test_repeated_rows_of_sparse_halves_are_added_in_float32() -> None:
    rows = torch.sparse_coo_tensor(
        torch.zeros(1, 4096, dtype=torch.int64), torch.ones(4096).bfloat16(), (2,), check_invariants=True
    )
    for other in (rows, torch.zeros(2).bfloat16().add(rows.float().to_dense()).bfloat16()):
        (mean,) = average_gradients([[rows], [other]])
        assert mean.dtype == torch.bfloat16 and mean.to_dense().tolist() == [4096.0, 0.0]
    (stack,) = stack_gradients([[rows], [torch.zeros(2).bfloat16()]])
    assert stack.dtype == torch.bfloat16 and stack.tolist() == [[4096.0, 0.0], [0.0, 0.0]]


def test_the_mean_of_sparse_gradients_with_graphs_can_be_differentiated() -> None:
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    first = torch.sparse_coo_tensor([[0, 0]], x, (3, 1), check_invariants=True)
    second = torch.sparse_coo_tensor([[0, 2]], x**2, (3, 1), check_invariants=True)
    (mean,) = average_gradients([[first], [second]], weights=[1, 3])
    (grad,) = torch.autograd.grad(mean.to_dense().sum(), x)
    assert torch.allclose(grad, 0.25 + 0.75 * 2 * x.detach())


def test_sparse_and_none_give_sparse() -> None:
    (mean,) = average_gradients([[None], [sparse([2, 2], 0)]])
    assert mean.is_sparse
    assert torch.allclose(mean.to_dense(), sparse([2, 2], 0).to_dense() / 2)


def test_sparse_gradients_can_be_stacked() -> None:
    pair = [sparse([1, 1], 0), sparse([5], 1)]
    (stack,) = stack_gradients([[grad] for grad in pair])
    assert torch.equal(stack.to_dense(), torch.stack([grad.to_dense() for grad in pair]))
    (mixed,) = stack_gradients([[pair[0]], [torch.ones(10, 3, dtype=torch.float64)]])
    assert mixed.layout is torch.strided

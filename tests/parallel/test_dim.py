"""Batches whose rows lie along another dimension than the first, as those of recurrent networks do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import assert_go_backward_alike, batch, twins, wrap


@pytest.mark.parametrize("dim", [1, -1])
def test_another_dimension_can_be_split_and_gathered(dim: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight @ x).tanh()

    plain, wrapped = twins(Net(), 3, dim=dim)
    assert_go_backward_alike(plain, wrapped, batch(3, 7, requires_grad=True))


@pytest.mark.parametrize("shape", [(7,), (5,), ()])
def test_a_tensor_that_may_have_rows_and_has_not_the_dimension_is_told(
    recwarn: pytest.WarningsRecorder, shape: tuple[int, ...]
) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return x * lengths.sum()

    wrap(Net(), 2, dim=1)(batch(3, 7), torch.zeros(shape))
    assert [str(warning.message) for warning in recwarn] == [
        "TowerParallel: a tensor of shape (7,) has no dimension 1, along which the batch is split, and goes to every "
        "tower whole; if it has an entry for each row, give it that dimension"
    ] * (shape == (7,))


def test_what_has_no_rows_to_split_needs_no_dimension_to_join_along() -> None:
    plain, wrapped = twins(nn.Linear(3, 2), 3, dim=1)
    assert_go_backward_alike(plain, wrapped, batch(1)[0].requires_grad_())

"""Batches whose rows lie along another dimension than the first, as those of recurrent networks do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import EVERY_COUNT, assert_close, assert_go_backward_alike, assert_same_gradients, batch, twins, wrap
from tests.modules import OneLayer


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


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("dim", [1, -1])
def test_parts_along_another_dimension_than_the_first_can_be_viewed_as_the_whole_can(dim: int, num_towers: int) -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor, scores: Tensor) -> Tensor:
            x.view(-1).mul_(2)
            out: Tensor = self.fc(x.t()).t()
            scores.view(-1).copy_(out.reshape(-1))
            return out

    plain, wrapped = twins(Net(), num_towers, dim=dim)
    found = []
    for net in (plain, wrapped):
        x, scores = batch(3, 7, requires_grad=True), batch(2, 7, seed=2)
        hidden = x * 3
        (net(hidden, scores).sum() + scores.square().sum() + hidden.square().sum()).backward()
        found.append((hidden, scores, x.grad))
    for got, expected in zip(*reversed(found), strict=True):
        assert_close(got, expected)
    assert_same_gradients(wrapped, plain)


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

"""Parameters that a forward looks at through views: autograd leaves somebody else's memory in their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import EVERY_COUNT, SEVERAL, assert_close, assert_same_gradients, batch, twins

Look = Callable[[Tensor], Tensor]
LOOKS: list[Look] = [lambda p: p[None], lambda p: p.unsqueeze(0), lambda p: p.view(1, -1), lambda p: p.reshape(1, 3)]


class Shifted(nn.Module):
    """Adds a bias, as one row, to what a layer makes of the input."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self.fc, self.bias = nn.Linear(3, 3), nn.Parameter(torch.zeros(3))
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x).tanh() + self.look(self.bias)
        return y


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_given_gradient_is_left_as_it_is(num_towers: int, look: Look) -> None:
    plain, wrapped = twins(Shifted(look), num_towers)
    x, grad = batch(num_towers), batch(num_towers, seed=1)  # a row a tower
    before = grad.clone()
    for net in (plain, wrapped):
        net(x).backward(grad)
    assert torch.equal(grad, before)
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_what_stands_beside_the_module_in_the_loss_has_its_own_gradient(num_towers: int, look: Look) -> None:
    plain, wrapped = twins(Shifted(look), num_towers)
    besides = [nn.Linear(3, 3).double() for _ in range(2)]
    besides[1].load_state_dict(besides[0].state_dict())
    for net, beside in zip((plain, wrapped), besides, strict=True):
        hidden = beside(batch(num_towers))
        (hidden + net(hidden)).square().sum().backward()
    assert_same_gradients(wrapped, plain)
    assert_same_gradients(besides[1], besides[0])


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_an_input_and_a_parameter_have_gradients_of_their_own(num_towers: int) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) + self.table.view(1, 6)

    plain, wrapped = twins(Table(), num_towers)
    xs = [batch(num_towers * 2).reshape(num_towers, 2, 3).requires_grad_() for _ in range(2)]
    for net, x in zip((plain, wrapped), xs, strict=True):
        (net(x) * torch.arange(6.0)).square().sum().backward()
    assert_same_gradients(wrapped, plain)
    assert_close(xs[1].grad, xs[0].grad)


@pytest.mark.parametrize("style", ["drop-in", "tower loss"])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_two_parameters_that_are_added_as_views_have_gradients_of_their_own(num_towers: int, style: str) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.kind = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.position.unsqueeze(0) + self.kind.unsqueeze(0))

    plain, wrapped = twins(Positions(), num_towers)
    x = batch(36).reshape(9, 4, 3)
    plain(x).square().mean().backward()
    if style == "drop-in":
        wrapped(x).square().mean().backward()
    else:
        wrapped.tower_loss(lambda net, x: net(x).square().mean(), x).backward()
    assert_same_gradients(wrapped, plain)
    first, second = (parameter.grad for parameter in wrapped.parameters())
    assert (first is not None and second is not None and first.data_ptr() != second.data_ptr()) or num_towers == 1


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_no_sync_keeps_back_is_no_memory_of_the_callers(num_towers: int) -> None:
    plain, wrapped = twins(Shifted(LOOKS[0]), num_towers)
    for net in (plain, wrapped):
        first, second = torch.ones(2, num_towers, 3, dtype=torch.float64)
        with wrapped.no_sync():
            net(batch(num_towers)).backward(first)
        first.zero_()
        net(batch(num_towers, seed=1)).backward(second)
    assert_same_gradients(wrapped, plain)

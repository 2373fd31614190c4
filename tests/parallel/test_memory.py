"""Gradients and outputs have memory of their own, whatever a forward looks at through views or hands on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    EVERY_COUNT,
    SEVERAL,
    STYLES,
    assert_close,
    assert_same_gradients,
    batch,
    loss_in,
    mean_of_squares_by,
    twins,
)
from tests.modules import TrainedWithin

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


@pytest.mark.parametrize("style", STYLES)
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
    for net in (plain, wrapped):
        loss_in(style, net, mean_of_squares_by, x).backward()
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


class FromTable(torch.autograd.Function):
    """Its gradient lies in a table of numpy's."""

    table = np.ones(3)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return torch.from_numpy(FromTable.table)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_gradient_in_memory_of_numpys_is_left_as_it_is(num_towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * FromTable.apply(self.scale)  # type: ignore[no-any-return,no-untyped-call]

    _, wrapped = twins(Net(), num_towers)
    for _ in range(3):
        wrapped.zero_grad()
        wrapped(batch(8)).sum().backward()
        assert wrapped.module.scale.grad.tolist() == [num_towers] * 3  # the function's, once a tower
        assert FromTable.table.tolist() == [1] * 3


# ---- outputs


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_what_is_done_to_an_output_reaches_neither_another_nor_a_parameter(num_towers: int, rows: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.drop, self.query = nn.Linear(3, 3), nn.Dropout(0.0), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            h = self.fc(x)
            self.kept = h
            return h, self.drop.eval()(h), self.query.expand(len(x), -1), x

    _, wrapped = twins(Net(), num_towers)
    x = batch(rows)
    before = [tensor.detach().clone() for tensor in (x, *wrapped.parameters())]
    h, same, query, x_again = wrapped(x)
    values = same.detach().clone()
    with torch.no_grad():
        for out in (h, query, x_again):
            out.mul_(3)
    assert torch.equal(same, values) and torch.equal(wrapped.module.kept, values[: len(wrapped.module.kept)])
    for tensor, value in zip((x, *wrapped.parameters()), before, strict=True):
        assert torch.equal(tensor, value)


def test_the_loss_of_one_tower_is_apart_from_what_is_kept_of_it() -> None:
    for num_towers in EVERY_COUNT:
        _, wrapped = twins(nn.Linear(3, 2), num_towers)
        loss = wrapped.tower_loss(lambda net, x: net(x).square().mean(), batch(8))
        kept = [tower_loss.item() for tower_loss in wrapped.tower_losses]
        loss /= 4
        assert [tower_loss.item() for tower_loss in wrapped.tower_losses] == kept


# ---- inputs that are written to later


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position, self.fc = nn.Parameter(torch.linspace(-0.3, 0.3, 3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc((x + self.position).tanh())
        return y


def residual(net: nn.Module, x: Tensor) -> Tensor:
    x += net(x)
    return x


def scaled_later(net: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = net(x)
    x.mul_(3)
    return out


def detached_later(net: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = net(x)
    x.detach_()
    return out


@pytest.mark.parametrize("program", [residual, scaled_later, detached_later])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_penalty_knows_an_input_as_it_was(num_towers: int, program: Callable[[nn.Module, Tensor], Tensor]) -> None:
    plain, wrapped = twins(Positioned(), num_towers)
    sources = [batch(7, requires_grad=True) for _ in range(2)]
    for net, source in zip((plain, wrapped), sources, strict=True):
        out = program(net, source.sin())
        (grad,) = torch.autograd.grad(out.sum(), source, create_graph=True)
        grad.square().sum().backward()
    assert_same_gradients(wrapped, plain)
    assert_close(sources[1].grad, sources[0].grad)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_residual_in_place_lets_go_of_its_graph(num_towers: int) -> None:
    _, wrapped = twins(Positioned(), num_towers)
    encoder = nn.Linear(3, 3).double()
    x = encoder(batch(7))
    x += wrapped(x)
    alive = weakref.ref(x)
    x.sum().backward()
    del x
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_hook_on_an_input_without_a_gradient_is_not_called(num_towers: int) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor, unused: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y

    calls: list[str] = []
    _, wrapped = twins(Unused(), num_towers)
    used, unused = batch(7, requires_grad=True).sin(), batch(7, seed=1, requires_grad=True).sin()
    used.register_hook(lambda grad: calls.append("used"))
    unused.register_hook(lambda grad: calls.append("unused"))
    wrapped(used, unused).sum().backward()
    assert calls == ["used"]


# ---- gradients that are there already


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_backward_within_the_forward_adds_to_the_gradient_that_is_there(num_towers: int) -> None:
    plain, wrapped = twins(TrainedWithin(), num_towers)
    buffers = []
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        buffers.append(torch.ones(6, dtype=torch.float64))
        inner.trained.weight.grad = buffers[-1].view(2, 3)
        net(batch(7))
    assert_close(buffers[1], buffers[0])
    assert_same_gradients(wrapped, plain)

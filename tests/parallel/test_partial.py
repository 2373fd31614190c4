"""Gradients of some inputs alone (``torch.autograd.grad``, ``backward(inputs=...)``): right, and no more than asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import assert_close, batch, mlp, twins

TOWERS = [1, 2, 3]
PASSED: list[str] = []


class Counted(torch.autograd.Function):
    """The identity; counts how often a backward comes by."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        PASSED.append("parameter")
        return grads[0]


class Branches(nn.Module):
    """One branch to the input, one to the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1, 2, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() * Counted.apply(self.weight)  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def _nothing_passed() -> None:
    PASSED.clear()


@pytest.mark.parametrize("towers", TOWERS)
def test_only_the_branches_asked_for_run(towers: int) -> None:
    plain, wrapped = twins(Branches(), towers)
    x, y = batch(4, requires_grad=True), batch(4, requires_grad=True)
    (wanted,) = torch.autograd.grad(wrapped(x).sum(), x)
    wrapped(x).sum().backward(inputs=[x])
    assert PASSED == []
    plain(y).sum().backward()
    assert_close(wanted, y.grad)
    assert_close(x.grad, y.grad)
    assert wrapped.module.weight.grad is None


@pytest.mark.parametrize("towers", TOWERS)
def test_a_penalty_on_the_input_asks_for_the_input_first(towers: int) -> None:
    plain, wrapped = twins(Branches(), towers)
    for net in (plain, wrapped):
        x = batch(4, requires_grad=True)
        PASSED.clear()
        (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        assert PASSED == []
        grad.square().sum().backward()
        assert PASSED
    assert_close(wrapped.module.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("towers", TOWERS)
@pytest.mark.parametrize("names", [["0.weight"], ["2.bias", "0.bias"], ["0.weight", "0.bias", "2.weight", "2.bias"]])
def test_some_parameters_alone(towers: int, names: list[str]) -> None:
    plain, wrapped = twins(mlp(), towers)
    found = []
    for net, module in ((plain, plain), (wrapped, wrapped.module)):
        parameters = dict(module.named_parameters())
        chosen = [parameters[name] for name in names]
        found.append(torch.autograd.grad(net(batch(5)).square().sum(), chosen))
        net(batch(5)).square().sum().backward(inputs=chosen)
        for name, parameter in parameters.items():
            assert (parameter.grad is not None) == (name in names)
    for mine, expected in zip(found[1], found[0], strict=True):
        assert_close(mine, expected)
    for (name, mine), expected in zip(wrapped.module.named_parameters(), plain.parameters(), strict=True):
        if name in names:
            assert_close(mine.grad, expected.grad)


class Bias(nn.Module):
    """Its local gradient of two rows a tower is the output's gradient itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def test_a_gradient_handed_through_stays_the_caller_s() -> None:
    _, wrapped = twins(Bias(), 2)
    given = batch(4)
    x = batch(4, requires_grad=True)
    grad_x, grad_bias = torch.autograd.grad(wrapped(x), [x, wrapped.module.bias], given)
    assert torch.equal(given, batch(4)) and torch.equal(grad_x, given)
    assert torch.equal(grad_bias, given[:2] + given[2:])


def test_what_no_sync_keeps_of_them_is_a_copy() -> None:
    _, wrapped = twins(Bias(), 2)
    given = torch.ones(4, 3, dtype=torch.float64)
    with wrapped.no_sync():
        wrapped(batch(4)).backward(given, inputs=[wrapped.module.bias])
    given.fill_(100)
    wrapped(batch(4)).backward(torch.ones(4, 3, dtype=torch.float64))
    assert torch.equal(wrapped.module.bias.grad, torch.full((2, 3), 4, dtype=torch.float64))


@pytest.mark.parametrize("towers", TOWERS)
def test_batched_gradients_agree(towers: int) -> None:
    plain, wrapped = twins(mlp(), towers)
    found = []
    for net, module in ((plain, plain), (wrapped, wrapped.module)):
        x = batch(4, requires_grad=True)
        ways = torch.eye(2, dtype=torch.float64)
        found.append(torch.autograd.grad(net(x).sum(0), [x, *module.parameters()], ways, is_grads_batched=True))
    for mine, expected in zip(found[1], found[0], strict=True):
        assert_close(mine, expected)


def test_a_vectorised_jacobian_agrees() -> None:
    plain, wrapped = twins(mlp(), 2)
    jacobian: Any = torch.autograd.functional.jacobian
    assert_close(jacobian(wrapped, batch(4), vectorize=True), jacobian(plain, batch(4), vectorize=True))


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("style", ["drop-in", "tower_loss"])
@pytest.mark.parametrize("towers", TOWERS)
def test_gradients_mapped_over_by_vmap_agree(towers: int, style: str, chunk_size: int | None) -> None:
    plain, wrapped = twins(mlp(), towers)
    found = []
    for net, module in ((plain, plain), (wrapped, wrapped.module)):
        x = batch(5, requires_grad=True)
        if style == "tower_loss" and net is wrapped:
            out = wrapped.tower_loss(lambda replica, x: replica(x).mean(), x)[None]
        else:
            out = net(x).mean(0) if style == "drop-in" else net(x).mean()[None]
        wanted = [x, *module.parameters()]
        each = torch.vmap(
            lambda way, out=out, wanted=wanted: torch.autograd.grad(out, wanted, way, retain_graph=True),
            chunk_size=chunk_size,
        )
        found.append(each(torch.eye(len(out), dtype=torch.float64)))
        found[-1] += torch.autograd.grad(out.sum(), wanted)
    for mine, expected in zip(found[1], found[0], strict=True):
        assert_close(mine, expected)

"""Contract 1: however a program differentiates, it finds what it would have found without towers.

By one backward after several forwards or several after one, by autograd.grad, twice and more often, by torch.func.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import (
    EVERY_COUNT,
    SEVERAL,
    assert_close,
    assert_go_backward_alike,
    assert_same_gradients,
    assert_trains_alike,
    batch,
    mlp,
    twins,
    wrap,
)
from tests.modules import TwoHeads
from torchtower import current_tower, tower_sum

# ---- backward


def test_several_forwards_before_one_backward() -> None:
    plain, wrapped = twins(mlp(), 3)
    for net in (plain, wrapped):
        total = sum(net(batch(rows, seed=rows)).square().sum() for rows in (5, 2, 7))
        total.backward()
    assert_same_gradients(wrapped, plain)


def test_a_module_applied_to_its_own_output() -> None:
    plain, wrapped = twins(mlp(3, 3), 3)
    for net in (plain, wrapped):
        net(net(net(batch(7)))).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("times", [2, 3])
def test_backward_runs_again_where_the_graph_is_retained(times: int) -> None:
    plain, wrapped = twins(mlp(), 3)
    for net in (plain, wrapped):
        loss = net(batch(7)).square().sum()
        for _ in range(times - 1):
            loss.backward(retain_graph=True)
        loss.backward()
    assert_same_gradients(wrapped, plain)


def test_a_second_backward_without_retained_graph_raises_as_in_the_plain_module() -> None:
    for net in twins(mlp(), 3):
        loss = net(batch(7)).square().sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_two_heads_go_backward_one_after_the_other() -> None:
    plain, wrapped = twins(TwoHeads(), 3)
    for net in (plain, wrapped):
        left, right = net(batch(7))
        left.square().sum().backward()
        right.square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_two_heads_of_a_shared_trunk_go_backward_with_the_graph_retained() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.left, self.right = mlp(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.trunk(x).tanh()
            return self.left(hidden), self.right(hidden)

    plain, wrapped = twins(Net(), 3)
    for net in (plain, wrapped):
        left, right = net(batch(7))
        left.square().sum().backward(retain_graph=True)
        right.square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_only_one_of_two_outputs_may_be_used() -> None:
    plain, wrapped = assert_trains_alike(TwoHeads(), 3, batch(7), loss=lambda out: out[0].square().sum())
    assert wrapped.module.right.weight.grad is None and plain.right.weight.grad is None


def test_rows_of_one_tower_alone_may_be_used() -> None:
    assert_trains_alike(mlp(), 3, batch(9), loss=lambda out: out[-1].square().sum())


def test_a_weight_changed_between_forward_and_backward_raises_as_in_the_plain_module() -> None:
    for net in twins(mlp(), 2):
        loss = net(batch(4)).square().sum()
        with torch.no_grad():
            next(p for name, p in net.named_parameters() if name.endswith("2.weight")).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- autograd.grad


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_autograd_grad_to_parameters_and_inputs_leaves_grad_alone(num_towers: int) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    found = []
    for net in (plain, wrapped):
        x = batch(7, requires_grad=True)
        found.append(torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()]))
        assert x.grad is None and all(p.grad is None for p in net.parameters())
    for got, expected in zip(found[1], found[0], strict=True):
        assert_close(got, expected)


def test_autograd_grad_to_some_parameters() -> None:
    plain, wrapped = twins(mlp(), 3)
    found = []
    for net in (plain, wrapped):
        inner = getattr(net, "module", net)
        found.append(torch.autograd.grad(net(batch(7)).sum(), inner[2].weight))
    assert_close(found[1][0], found[0][0])


def test_autograd_grad_of_an_unused_parameter_is_none() -> None:
    net = mlp()
    net.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    net.forward = lambda x: net[2](net[1](net[0](x)))
    wrapped = wrap(net, 2)
    grads = torch.autograd.grad(wrapped(batch(4)).sum(), list(wrapped.parameters()), allow_unused=True)
    named = dict(zip([name for name, _ in net.named_parameters()], grads, strict=True))
    assert named["unused"] is None and named["0.weight"] is not None


# ---- twice and more often


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_a_gradient_penalty_differentiates_twice(num_towers: int, rows: int) -> None:
    plain, wrapped = twins(mlp(3, 1), num_towers)
    x_grads = []
    for net in (plain, wrapped):
        x = batch(rows, requires_grad=True)
        out = net(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (out.square().sum() + (gradient.norm(dim=1) - 1).square().sum()).backward()
        x_grads.append(x.grad)
    assert_close(x_grads[1], x_grads[0])
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", (1, 2, 3))
def test_a_penalty_on_the_parameters_gradients_differentiates_twice(num_towers: int) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    for net in (plain, wrapped):
        loss = net(batch(7)).square().mean()
        grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        (loss + sum(g.square().sum() for g in grads)).backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_higher_orders_agree(order: int) -> None:
    plain, wrapped = twins(mlp(3, 1), 2)
    found = []
    for net in (plain, wrapped):
        x = batch(4, requires_grad=True)
        value = net(x).sum()
        for _ in range(order):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.pow(2).sum()
        value.backward()
        found.append(x.grad)
    assert_close(found[1], found[0], 1e-11)
    assert_same_gradients(wrapped, plain, 1e-11)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_backward_with_create_graph_fills_grads_that_can_be_differentiated() -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        net(batch(5)).square().sum().backward(create_graph=True)
        first = [p.grad for p in net.parameters()]
        net.zero_grad(set_to_none=True)
        sum(g.square().sum() for g in first).backward()
    assert_same_gradients(wrapped, plain)


def test_hessian_vector_products_agree() -> None:
    plain, wrapped = twins(mlp(), 3)
    found = []
    for net in (plain, wrapped):
        parameters = list(net.parameters())
        grads = torch.autograd.grad(net(batch(7)).square().sum(), parameters, create_graph=True)
        found.append(torch.autograd.grad(grads, parameters, [torch.ones_like(g) for g in grads]))
    for got, expected in zip(found[1], found[0], strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_hook_that_changes_the_gradient_of_a_towers_loss_in_place_does_so_once(num_towers: int) -> None:
    def loss_fn(net: nn.Module, x: Tensor) -> Tensor:
        loss = net(x).square().mean()
        loss.register_hook(lambda grad: grad.mul_(3))
        return loss

    plain, wrapped = twins(mlp(), num_towers)
    loss_fn(plain, batch(7)).backward()
    wrapped.tower_loss(loss_fn, batch(7)).backward()
    assert_same_gradients(wrapped, plain)


def test_tower_loss_differentiates_twice() -> None:
    plain, wrapped = twins(mlp(), 3)
    x, y = batch(7), batch(7, 2, seed=1)
    losses = [F.mse_loss(plain(x), y), wrapped.tower_loss(lambda net, x, y: F.mse_loss(net(x), y), x, y)]
    for net, loss in zip((plain, wrapped), losses, strict=True):
        grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        (loss + sum(g.square().sum() for g in grads)).backward()
    assert_same_gradients(wrapped, plain)


def test_gradients_pass_torchs_own_numerical_check() -> None:
    wrapped = wrap(mlp(), 2)
    x = batch(3, requires_grad=True)
    assert torch.autograd.gradcheck(wrapped, (x,))
    assert torch.autograd.gradgradcheck(wrapped, (x,))


# ---- torch.func


def test_functional_call_differentiates_the_given_parameters() -> None:
    plain, wrapped = twins(mlp(), 3)
    outer = nn.Sequential(wrapped)  # torch refuses to call a DataParallel itself with other parameters
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    results = []
    for net, prefix in ((plain, ""), (outer, "0.module.")):
        given = {prefix + name: p.detach() * scale for name, p in plain.named_parameters()}
        out = torch.func.functional_call(net, given, batch(7))
        results.append((out, *torch.autograd.grad(out.square().sum(), scale)))
    for got, expected in zip(results[1], results[0], strict=True):
        assert_close(got, expected)
    assert torch.equal(wrapped(batch(4)), wrapped(batch(4)))
    assert_close(wrapped(batch(7)), plain(batch(7)))


TRANSFORMS = {
    "grad": lambda net, x: torch.func.grad(lambda x: net(x).sum())(x),
    "vmap": lambda net, x: torch.func.vmap(net)(x[None].expand(2, -1, -1)),
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda net, x: torch.func.jacrev(net)(x),
    "hessian": lambda net, x: torch.func.hessian(lambda x: net(x).sum())(x),
    "jacobian": lambda net, x: torch.autograd.functional.jacobian(net, x),
    "forward mode": lambda net, x: _forward_mode(net, x),
}


def _forward_mode(net: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(net(torch.autograd.forward_ad.make_dual(x, x * 2))).tangent


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_the_wrapper_are_those_of_the_module(name: str) -> None:
    plain, wrapped = twins(mlp(), 2)
    assert_close(TRANSFORMS[name](wrapped, batch(4)), TRANSFORMS[name](plain, batch(4)))


class Derivatives(nn.Module):
    """Differentiates a part of itself in its forward, slowly enough for towers to be within it at once."""

    def __init__(self, differentiate: Any) -> None:
        super().__init__()
        self.net, self.differentiate = mlp(), differentiate

    def part(self, x: Tensor) -> Tensor:
        time.sleep(0.002)
        out = self.net(x).square()
        time.sleep(0.002)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.differentiate(self.part, x)


def _jvp(f: Any, x: Tensor) -> Tensor:
    return torch.func.jvp(f, (x,), (x + 1,))[1]


FORWARD_MODES = {
    "jvp": _jvp,
    "jvp of jvp": lambda f, x: _jvp(lambda y: _jvp(f, y), x),
    "jacfwd": lambda f, x: torch.func.vmap(torch.func.jacfwd(f))(x),
    "hessian": lambda f, x: torch.func.vmap(torch.func.hessian(lambda row: f(row).sum()))(x),
    "dual_level": lambda f, x: _forward_mode(f, x),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", FORWARD_MODES)
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_towers_may_be_in_forward_mode_at_once(num_towers: int, name: str) -> None:
    plain, wrapped = twins(Derivatives(FORWARD_MODES[name]), num_towers, max_concurrency=num_towers)
    for seed in range(3):
        x = batch(5, seed=seed)
        assert_go_backward_alike(plain, wrapped, x)


def test_towers_exchange_nothing_in_forward_mode() -> None:
    plain, wrapped = twins(Derivatives(lambda f, x: _forward_mode(lambda x: f(x) + tower_sum(x.detach()).sum(), x)), 2)
    with pytest.raises(RuntimeError, match="outside of forward-mode differentiation"):
        wrapped(batch(4))
    wrapped.module.differentiate = plain.differentiate = _jvp
    assert_go_backward_alike(plain, wrapped, batch(4))


def test_signs_of_parameters_have_gradients_of_zero() -> None:
    class Signs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.scale = nn.Linear(3, 2), nn.Parameter(torch.randn(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * torch.sgn(self.scale)

    assert_trains_alike(Signs(), 2, batch(5))


def test_an_error_in_forward_mode_leaves_the_turn_to_others() -> None:
    def fail_in_tower_0(f: Any, x: Tensor) -> Tensor:
        def g(x: Tensor) -> Tensor:
            if current_tower() == 0:
                raise ValueError("in forward mode")
            return f(x)

        return _jvp(g, x)

    plain, wrapped = twins(Derivatives(fail_in_tower_0), 3)
    with pytest.raises(ValueError, match="tower 0"):
        wrapped(batch(6))
    for net in (plain, wrapped.module):
        net.differentiate = _jvp
    assert_go_backward_alike(plain, wrapped, batch(6))


@pytest.mark.parametrize("create_graph", [False, True])
def test_what_was_frozen_and_forwarded_since_gets_no_gradient(create_graph: bool) -> None:
    plain, wrapped = twins(mlp(), 2)
    for net, module in ((plain, plain), (wrapped, wrapped.module)):
        loss = net(batch(4)).square().sum()
        module[0].weight.requires_grad_(False)
        net(batch(4))
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        grads = torch.autograd.grad(loss, parameters, create_graph=create_graph, retain_graph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a cycle between a parameter and its gradient
            loss.backward(create_graph=create_graph)
        for parameter, grad in zip(parameters, grads, strict=True):
            assert_close(parameter.grad, grad)
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("order", [1, 2])
def test_a_graph_that_was_not_to_be_retained_is_freed_although_a_graph_of_the_backward_was_made(
    order: int, num_towers: int
) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    for net in (plain, wrapped):
        x = batch(6, requires_grad=True)
        loss = net(x).square().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True, retain_graph=False)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            if order == 1:
                torch.autograd.grad(loss, x)
            else:
                grad.square().sum().backward()

"""What a forward may do in a replica: transforms, gradients, other data for parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from tests.helpers import (
    EVERY_COUNT,
    assert_close,
    assert_same_gradients,
    assert_same_parameters,
    assert_trains_alike,
    batch,
    mlp,
    steps_follow,
    sum_of_squares,
    take_steps,
    twins,
    wrap,
)
from tests.modules import Clamped, OneLayer
from torchtower import current_tower


def test_a_forward_redirected_to_another_method_and_back_works() -> None:
    """As Lightning does: forward is replaced for the length of a call."""

    class Net(OneLayer):
        def training_step(self, x: Tensor) -> Tensor:
            return self.fc(x).square().sum()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    plain, wrapped = twins(Net(), 2)
    inner = wrapped.module
    original = inner.forward

    def redirected(*args: Any) -> Any:
        inner.forward = original
        return inner.training_step(*args)

    inner.forward = redirected
    total = wrapped(batch(4)).sum()
    total.backward()
    plain.training_step(batch(4)).backward()
    assert_same_gradients(wrapped, plain)
    inner.forward = original
    assert wrapped(batch(4)).shape == (4, 2)


def test_functional_transforms_and_gradients_inside_forward_work() -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                energy = self.net(x)
                (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
            jacobian = torch.func.vmap(torch.func.jacrev(self.net))(x)
            return force, jacobian.squeeze(1)

    assert_trains_alike(Energy(), 3, batch(7), loss=lambda out: out[0].square().sum() + out[1].pow(3).sum())


def test_custom_autograd_functions_work() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x**3 * weight

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return grad * 3 * x**2 * weight, (grad * x**3).sum(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.weight = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return Cube.apply(self.fc(x), self.weight)

    assert_trains_alike(Net(), 3, batch(7))


def test_data_dependent_control_flow_may_differ_between_towers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([(self.a if row[0] > 0 else self.b)(row) for row in x])

    assert_trains_alike(Net(), 3, batch(9))


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_forward_that_enables_gradients_gives_them_under_no_grad(num_towers: int) -> None:
    class Net(OneLayer):
        @torch.enable_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    plain, wrapped = twins(Net(), num_towers)
    for net in (plain, wrapped):
        with torch.no_grad():
            out = net(batch(7))
        out.square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_module_made_in_inference_mode_is_evaluated(num_towers: int) -> None:
    with torch.inference_mode():
        plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval().double()
        wrapped = wrap(plain, num_towers)
        assert_close(wrapped(batch(7)), plain(batch(7)))
    with torch.no_grad():
        assert_close(wrapped(batch(7)), plain(batch(7)))


class Growing(nn.Module):
    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
        self.body = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)])
        self.heads = nn.ModuleDict({name: nn.Linear(3, 3) for name in "abc"})
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.body, *self.heads.values()):
            x = layer(x)
        if self.change is not None:
            self.change(self)
            self.change = None
        return x


CHANGES: dict[str, Callable[[Any], Any]] = {
    "del": lambda net: net.layers.__delitem__(1),
    "pop": lambda net: net.layers.pop(0),
    "insert": lambda net: net.layers.insert(1, nn.Tanh()),
    "append": lambda net: net.layers.append(nn.Tanh()),
    "reversed": lambda net: setattr(net.layers, "_modules", {"0": net.layers[2], "1": net.layers[0]}),
    "del of a sequence": lambda net: net.body.__delitem__(0),
    "pop of a dict": lambda net: net.heads.pop("b"),
    "clear of a dict": lambda net: net.heads.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_forward_may_change_its_lists_of_modules(num_towers: int, change: str) -> None:
    plain, wrapped = twins(Growing(CHANGES[change]), num_towers)
    for step in range(3):
        assert_close(wrapped(batch(8, seed=step)), plain(batch(8, seed=step)))
        assert list(wrapped.module.state_dict()) == list(plain.state_dict())
    steps_follow(plain, wrapped, lambda step: batch(8, seed=step))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class ParametrizedLater(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        if not is_parametrized(self.fc):
            register_parametrization(self.fc, "weight", Doubled())
        return self.fc(x)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_parametrization_that_a_forward_registers_stays(num_towers: int) -> None:
    plain, wrapped = twins(ParametrizedLater(), num_towers)
    steps_follow(plain, wrapped, lambda step: batch(8, seed=step))
    assert type(wrapped.module.fc) is not nn.Linear and is_parametrized(wrapped.module.fc, "weight")


# ---- parameters and buffers that a forward gives other data


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_data_that_a_forward_assigns_are_kept_and_trained(num_towers: int) -> None:
    plain, wrapped = twins(Clamped(), num_towers)
    for net in (plain, wrapped):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
        take_steps(net, optimizer, lambda step: batch(8, seed=step), steps=6, loss=sum_of_squares)
    assert_same_parameters(wrapped, plain)
    assert_close(wrapped(batch(7)), plain(batch(7)))


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_data_that_a_forward_assigns_in_inference_mode_are_trained_on(num_towers: int) -> None:
    plain, wrapped = twins(Clamped(), num_towers)
    for net in (plain, wrapped):
        with torch.inference_mode():
            net(batch(8))
        for step in range(2):
            net(batch(8, seed=step)).square().sum().backward()
    assert_same_gradients(wrapped, plain)
    assert all(parameter.requires_grad for parameter in wrapped.parameters())


class Turning(nn.Module):
    """Turns its own data at each forward, in place or into new memory."""

    def __init__(self, *, copies: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(9.0, dtype=torch.float64).view(3, 3) / 9)
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        turned = self.weight.data.t()
        self.weight.data = turned.clone() if self.copies else turned
        return (x @ self.weight).tanh() @ self.weight


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_view_of_its_own_data_that_a_forward_assigns_is_kept(num_towers: int) -> None:
    plain, wrapped = twins(Turning(), num_towers)
    for step in range(3):
        for net in (plain, wrapped):
            net(batch(8, seed=step)).square().sum().backward()
        assert_close(wrapped.module.weight, plain.weight)
        assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_an_earlier_graph_sees_data_that_a_later_forward_assigns(num_towers: int, copies: bool) -> None:
    plain, wrapped = twins(Turning(copies=copies), num_towers)
    for net in (plain, wrapped):
        (net(batch(8)).sum() + net(batch(7, seed=1)).square().sum()).backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_data_that_the_user_puts_back_after_a_forward_has_assigned_others_are_used(num_towers: int) -> None:
    plain, wrapped = twins(Turning(copies=True), num_towers)
    owns = [(inner, inner.weight.data) for inner in (plain, wrapped.module)]
    for step in range(3):
        assert_close(wrapped(batch(8, seed=step)), plain(batch(8, seed=step)))
        for inner, own in owns:
            inner.weight.data = own


def test_data_that_only_another_tower_assigns_are_dropped() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            out = self.fc(x)
            if current_tower() == 1:
                self.fc.weight.data = torch.zeros(2, 3, dtype=torch.float64)
            return out

    plain, wrapped = twins(Net(), 2)
    for _ in range(2):
        assert_close(wrapped(batch(7)), plain(batch(7)))


class Resizing(OneLayer):
    """As observers of quantisation-aware training do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.seen.numel() == 0:
            self.seen.resize_(3).fill_(1)
        self.seen.mul_(2)
        return self.fc(x * self.seen)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_buffer_may_change_its_shape_and_dtype(num_towers: int) -> None:
    plain, wrapped = twins(Resizing(), num_towers)
    for rows in (1, 8, 8, 1, 8):
        assert_close(wrapped(batch(rows)), plain(batch(rows)))
        assert_close(wrapped.module.seen, plain.seen)
    for value in (torch.ones(1), torch.ones(1, 3, dtype=torch.int64)):
        for net in (plain, wrapped.module):
            net.seen.data = value.clone()
        assert_close(wrapped(batch(8)), plain(batch(8)))


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_forward_may_put_its_layers_and_the_keys_of_a_dict_in_another_order(num_towers: int) -> None:
    class TakingTurns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({name: nn.Linear(3, 2) for name in "abc"})
            self.calls = {"all": 0, "all but last": -1}

        def forward(self, x: Tensor) -> Tensor:
            name = next(iter(self.layers))
            layer = self.layers.pop(name)
            self.layers[name] = layer
            key, count = next(iter(self.calls.items()))
            del self.calls[key]
            self.calls[key] = count + 1
            y: Tensor = layer(x)
            return y

    plain, wrapped = twins(TakingTurns(), num_towers)
    for step in range(4):
        for net in (plain, wrapped):
            net(batch(7, seed=step)).square().sum().backward()
        assert_same_gradients(wrapped, plain)
        assert list(wrapped.module.layers) == list(plain.layers)
        assert list(wrapped.module.calls.items()) == list(plain.calls.items())


def test_a_forward_may_put_a_dict_keyed_by_parameters_in_another_order() -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.rates = {self.fc.weight: 1, self.fc.bias: 2}

        def forward(self, x: Tensor) -> Tensor:
            self.rates[self.fc.weight] = self.rates.pop(self.fc.weight)
            return self.fc(x)

    wrapped = wrap(Net().double(), 2)
    wrapped(batch(6))
    assert list(wrapped.module.rates.values()) == [2, 1]

"""Parameters and buffers of replicas on other devices follow whatever changes them."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.accelerator.towers import assert_same_values, device, feed, mlp, parameters_sent, rows, twins
from torchtower import TowerParallel


def test_a_frozen_parameter_that_is_another_name_of_a_trained_one_follows_it() -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.live = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.live(x) + x @ self.teacher.t()
            return out

    plain, wrapped = twins(Teacher(), [0, 1])
    for net, call in ((plain, plain), (wrapped.module, wrapped)):
        net.teacher = nn.Parameter(net.live.weight.data, requires_grad=False)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(2):
            call(rows(8).to(net.teacher.device)).sum().backward()
            optimizer.step()
    assert_same_values(feed(wrapped), plain(rows(8)))


def by_optimizer(kind: Callable[..., torch.optim.Optimizer], **options: bool) -> Callable[[nn.Module], None]:
    def step(module: nn.Module) -> None:
        kind(module.parameters(), lr=0.1, **options).step()

    return step


def through_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.data.add_(parameter.grad, alpha=-0.1)


def by_hand(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.1 * parameter.grad  # type: ignore[operator]


def by_new_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 0.5


def by_state_dict(module: nn.Module) -> None:
    module.load_state_dict({name: value * 0.5 for name, value in module.state_dict().items()})


STEPS = {
    "sgd": by_optimizer(torch.optim.SGD),
    "foreach adam": by_optimizer(torch.optim.Adam, foreach=True),
    "fused adam": by_optimizer(torch.optim.Adam, fused=True),
    "fused adamw": by_optimizer(torch.optim.AdamW, fused=True),
    "through data": through_data,
    "by hand": by_hand,
    "new data": by_new_data,
    "state dict": by_state_dict,
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("devices", [[0, 1], [1, 0], [0, 1, 0, 1]], ids=["two", "turned", "twice"])
def test_parameters_are_refreshed_after(devices: list[int], step: Callable[[nn.Module], None]) -> None:
    plain, wrapped = twins(mlp(), devices)
    for round_ in range(3):
        for model in (plain, wrapped):
            model.zero_grad()
            model(rows(8, seed=round_)).square().sum().backward()
            step(model)
        assert_same_values(wrapped(rows(8)), plain(rows(8)), 1e-9)


def test_a_step_without_a_backward_of_ours_is_seen() -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    wrapped(rows(8))
    for model in (plain, wrapped.module):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.Adam(model.parameters(), 0.1, fused=True).step()
    assert_same_values(wrapped(rows(8)), plain(rows(8)))


def test_a_parameter_frozen_after_a_step_was_brought_up_to_date(simulated: types.ModuleType) -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    for model in (plain, wrapped.module):
        model(rows(8).to(next(model.parameters()).device)).square().sum().backward()
        by_optimizer(torch.optim.Adam, fused=True)(model)
        model[0].requires_grad_(False)
    wrapped(rows(8))
    assert_same_values(wrapped(rows(8)), plain(rows(8)))


def test_a_frozen_parameter_that_an_optimizer_goes_on_stepping_is_seen() -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, fused=True) for net in (plain, wrapped)]
    for step in range(4):
        for net, inner, optimizer in zip((plain, wrapped), (plain, wrapped.module), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=False)
            inner[0].requires_grad_(step < 2)  # its gradient is zero from then on, and its momentum moves it
            net(rows(8)).square().sum().backward()
            optimizer.step()
        assert_same_values(wrapped(rows(8)), plain(rows(8)))


def swap(module: nn.Module, values: list[Tensor]) -> list[Tensor]:
    """Write through ``data``, which moves no counter; returns what was there."""
    before = [parameter.detach().clone() for parameter in module.parameters()]
    for parameter, value in zip(module.parameters(), values, strict=True):
        parameter.data.copy_(value)
    return before


@pytest.mark.parametrize("frozen", [0, 2], ids=["averaged weights", "weights merged into frozen ones"])
def test_weights_swapped_in_for_an_evaluation_and_out_again_are_seen(frozen: int) -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    for parameter in list(wrapped.parameters())[:frozen]:
        parameter.requires_grad_(False)
    wrapped(rows(8)).sum().backward()
    by_optimizer(torch.optim.SGD)(wrapped)
    trained = [parameter.detach().clone() for parameter in wrapped.parameters()]
    for mode, values in ((False, [value * 0.5 for value in trained]), (True, trained)):
        swap(wrapped, values)
        swap(plain, values)
        wrapped.train(mode)
        assert_same_values(wrapped(rows(8)), plain(rows(8)))


@pytest.mark.parametrize("trainable", [True, False])
def test_refresh_makes_any_write_seen(trainable: bool, simulated: types.ModuleType) -> None:
    net = mlp()
    net.requires_grad_(trainable)
    plain, wrapped = twins(net, [0, 1])
    wrapped.refresh()  # before the first call there is nothing to do
    wrapped(rows(8))
    for model in (plain, wrapped.module):
        swap(model, [parameter.detach() * 0.5 for parameter in model.parameters()])
    wrapped.refresh()
    assert_same_values(wrapped(rows(8)), plain(rows(8)))
    assert parameters_sent(simulated, wrapped)[0] == 0


def test_a_buffer_that_requires_grad_is_fresh_at_every_forward_like_any_other() -> None:
    class Net(nn.Module):
        def __init__(self, where: torch.device) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(3, dtype=torch.float64, device=where, requires_grad=True))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    wrapped = TowerParallel(Net(device(0)), [0, 1])
    wrapped(rows(4).to(device(0)))
    wrapped.module.scale.data.mul_(2)
    out = wrapped(rows(4).to(device(0)))
    assert_same_values(out, rows(4) * 2)
    out.sum().backward()
    assert_same_values(wrapped.module.scale.grad, rows(4).sum(0))


@pytest.mark.parametrize("num_before", range(8))
def test_a_call_that_fails_while_replicas_are_brought_up_to_date_leaves_none_behind(num_before: int) -> None:
    """Out of memory, then a smaller batch."""

    class FullDevice(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.num_left = num_before

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.cat, torch.ops.aten.copy_):
                self.num_left -= 1
                if self.num_left == -1:
                    raise torch.OutOfMemoryError("told to fail")
            return func(*args, **(kwargs or {}))

    plain, wrapped = twins(mlp(), [0, 1])
    for net in (plain, wrapped):
        net(rows(6)).sum().backward()
        torch.optim.SGD(net.parameters(), lr=0.5).step()
    head = nn.Linear(5, 2).double()
    plain[2] = head
    wrapped.module[2] = copy.deepcopy(head).to(device(0))
    try:
        with FullDevice():
            wrapped(rows(6))
    except torch.OutOfMemoryError:
        pass
    assert_same_values(wrapped(rows(4)), plain(rows(4)))


@pytest.mark.parametrize("layout", [[0, 1], [0, 0], [0, 1, 0]])
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_tensor_that_is_made_of_others_follows_like_any_other(kind: str, layout: list[int]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 2)
            scale = TwoTensor(torch.ones(3), torch.ones(3))
            if kind == "parameter":
                self.scale = nn.Parameter(scale, requires_grad=False)
            else:
                self.register_buffer("scale", scale)
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return self.body(x * (self.scale * 1).a)

    plain, wrapped = twins(Scaled(), layout)
    for _ in range(3):
        for net, inner in ((plain, plain), (wrapped, wrapped.module)):
            net.zero_grad()
            net(rows(6)).square().sum().backward()
            with torch.no_grad():
                inner.scale.mul_(1.5)
        assert_same_values(wrapped.module.body.weight.grad, plain.body.weight.grad)
        assert_same_values(wrapped.module.count, plain.count)

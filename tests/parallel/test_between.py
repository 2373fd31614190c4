"""What a program does between a forward and its backward has the plain module's meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.helpers import (
    EVERY_COUNT,
    SEVERAL,
    STYLES,
    assert_same_gradients,
    batch,
    mlp,
    twins,
    wrap,
)
from tests.modules import Scaled, Switching, TwoHeads
from torchtower import TowerParallel

Net = nn.Module


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()


# ---- buffers that backward needs


def two_forwards(net: Net) -> None:
    (net(batch(8)).square().sum() + net(batch(8, seed=1)).sum()).backward()


def one_after_the_other(net: Net) -> None:
    net(net(batch(7))).square().sum().backward()


def evaluated_in_between(net: Net) -> None:
    loss = net(batch(7)).square().sum()
    with torch.no_grad():
        net(batch(5, seed=1))
    loss.backward()


def kept_graph(net: Net) -> None:
    loss = net(batch(7)).square().sum()
    loss.backward(retain_graph=True)
    net(batch(7, seed=1))
    loss.backward()


@pytest.mark.parametrize("program", [two_forwards, evaluated_in_between, kept_graph])
@pytest.mark.parametrize("make", [Scaled, normalised])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("buffers", ["main", "mean"])
def test_a_buffer_that_an_earlier_forward_saved_stays_good(
    program: Callable[[Net], None], make: Callable[[], nn.Module], num_towers: int, buffers: str
) -> None:
    plain, wrapped = twins(make(), num_towers, buffers=buffers)
    for net in (plain, wrapped):
        program(net)
    assert_same_gradients(wrapped, plain)


def test_outputs_may_be_inputs_again() -> None:
    plain, wrapped = twins(Scaled(), 2)
    for net in (plain, wrapped):
        one_after_the_other(net)
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_training_with_batch_normalisation_goes_forward_twice(num_towers: int) -> None:
    _, wrapped = twins(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), num_towers)
    two_forwards(wrapped)
    assert all(p.grad is not None for p in wrapped.parameters())


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_buffer_written_to_in_between_is_refused_as_by_the_plain_module(num_towers: int) -> None:
    for net in twins(Scaled(), num_towers):
        loss = net(batch(7)).square().sum()
        inner = net.module if isinstance(net, TowerParallel) else net
        inner.scale.mul_(2)
        net(batch(7))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_the_mean_of_buffers_leaves_alone_what_all_towers_agree_on(num_towers: int) -> None:
    _, wrapped = twins(Scaled(), num_towers, buffers="mean")
    before = wrapped.module.scale.clone()
    for _ in range(20):
        wrapped(batch(7))
    assert torch.equal(wrapped.module.scale, before)


# ---- a mode that changes for another call


def evaluated_in_another_mode(net: Net) -> None:
    loss = net(batch(7, requires_grad=True)).square().sum()
    net.eval()
    with torch.no_grad():
        net(batch(5, seed=1))
    net.train()
    loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_checkpoint_goes_backward_in_the_mode_that_the_module_is_in(reentrant: bool, num_towers: int) -> None:
    plain, wrapped = twins(Switching(reentrant), num_towers)
    for net in (plain, wrapped):
        evaluated_in_another_mode(net)
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("is_refused_before", [True, False])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_change_that_a_call_refuses_is_no_trouble_for_earlier_calls(num_towers: int, is_refused_before: bool) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    losses = [sum(net(batch(7, seed=seed)).square().sum() for seed in (0, 1)) for net in (plain, wrapped)]
    wrapped.module.add_module("lazy", nn.LazyLinear(3))
    for after in (False, True):
        if after or is_refused_before:
            with pytest.raises(ValueError, match="is lazy"):
                wrapped(batch(7))
        if not after:
            for loss in losses:
                loss.backward()  # type: ignore[union-attr]
    del wrapped.module.lazy
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_module_that_a_call_refuses_for_its_device_is_no_trouble_for_earlier_calls(num_towers: int) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    losses = [sum(net(batch(7, seed=seed)).square().sum() for seed in (0, 1)) for net in (plain, wrapped)]
    wrapped.module.add_module("elsewhere", nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="meta"):
        wrapped(batch(7))
    for loss in losses:
        loss.backward()
    del wrapped.module.elsewhere
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_what_towers_have_left_for_their_backwards_stays(num_towers: int) -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.fc.register_full_backward_hook(self.scale)

        def scale(self, layer: nn.Module, grad_inputs: Any, grad_outputs: Any) -> None:
            seen.append(len(self.last) == len(grad_outputs[0]))

        def forward(self, x: Tensor) -> Tensor:
            self.last = x.detach()
            y: Tensor = self.fc(x)
            return y

    seen: list[bool] = []
    wrapped = wrap(Remembering().double(), num_towers)
    for modes in ((True, True), (False, True)):
        seen.clear()
        losses = [wrapped.train(mode)(batch(7, seed=seed)).sum() for seed, mode in enumerate(modes)]
        wrapped.train(modes[0])
        for loss in losses:
            loss.backward()
        assert seen == [True] * 2 * num_towers


# ---- batches that are written over


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_batch_written_over_in_between_is_refused_as_by_the_plain_module(num_towers: int, style: str) -> None:
    for net in twins(mlp(), num_towers):
        x, y = batch(7), batch(7, 2)
        if style == "tower loss" and isinstance(net, TowerParallel):
            loss = net.tower_loss(lambda net, x, y: F.mse_loss(net(x), y), x, y)
            y.zero_()
        else:
            loss = net(x).sum()
            x.zero_()
        if style == "tower loss" and not isinstance(net, TowerParallel):
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_batch_written_over_between_two_backwards_is_refused_by_the_second(num_towers: int) -> None:
    for net in twins(mlp(), num_towers):
        x = batch(7)
        loss = net(x).sum()
        loss.backward(retain_graph=True)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_batch_written_over_when_one_output_has_gone_backward_is_refused_by_the_other(num_towers: int) -> None:
    for net in twins(TwoHeads(), num_towers):
        x = batch(7)
        left, right = net(x)
        left.sum().backward()
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            right.sum().backward()


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_batch_that_backward_does_not_need_may_be_written_over(num_towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.bias

    plain, wrapped = twins(Net(), num_towers)
    for net in (plain, wrapped):
        x = batch(7)
        loss = net(x).square().sum()
        x.zero_()
        loss.backward()
    assert_same_gradients(wrapped, plain)


# ---- caches


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_cached_parametrizations_are_computed_by_each_tower(num_towers: int) -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    net = mlp()
    parametrize.register_parametrization(net[0], "weight", Double())
    plain, wrapped = twins(net, num_towers)
    for _ in range(10):
        for module in (plain, wrapped):
            module.zero_grad()
            with parametrize.cached():
                (module(batch(7)).sum() + module(batch(7, seed=1)).square().sum()).backward()
                assert parametrize._cache_enabled == 1
        assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("how", ["backward", "create_graph", "grad"])
def test_a_parameter_frozen_for_another_forward_and_thawed_again_has_gradients(how: str) -> None:
    """As a GAN does with its discriminator."""
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        loss = net(batch(5)).square().sum()
        net.requires_grad_(False)
        net(batch(5, requires_grad=True))
        net.requires_grad_(True)
        parameters = list(net.parameters())
        if how == "backward":
            loss.backward()
        else:
            grads = torch.autograd.grad(loss, parameters, create_graph=how == "create_graph")
            if how == "create_graph":
                sum(grad.square().sum() for grad in grads).backward()
            else:
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.grad = grad
    assert_same_gradients(wrapped, plain)

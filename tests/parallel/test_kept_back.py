"""Gradients that `no_sync` keeps back wait, whatever comes between, for the next backward into the parameters."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    EVERY_COUNT,
    assert_go_backward_alike,
    assert_same_gradients,
    batch,
    in_threads,
    mlp,
    twins,
    wrap,
)
from torchtower import TowerParallel
from torchtower.bridge.held import HeldGradients

Net = nn.Module


def keep(net: Net) -> None:
    if isinstance(net, TowerParallel):
        with net.no_sync():
            net(batch(8)).square().sum().backward()
    else:
        net(batch(8)).square().sum().backward()


def saliency(net: Net) -> None:
    z = batch(8, seed=1, requires_grad=True)
    torch.autograd.grad(net(z).square().sum(), z)


def saliency_within(net: Net) -> None:
    if isinstance(net, TowerParallel):
        with net.no_sync():
            saliency(net)
    else:
        saliency(net)


def of_parameters(net: Net) -> None:
    torch.autograd.grad(net(batch(8)).sum(), list(net.parameters()))


def of_chosen_inputs(net: Net) -> None:
    z = batch(8, seed=1, requires_grad=True)
    net(z).square().sum().backward(inputs=[z])


def failing(net: Net) -> None:
    def fail(grad: Tensor) -> None:
        raise ArithmeticError("no gradient today")

    inner = net.module if isinstance(net, TowerParallel) else net
    handle = inner.register_forward_hook(lambda module, args, out: (out.register_hook(fail), out)[1])
    with pytest.raises(ArithmeticError):
        net(batch(8)).sum().backward()
    handle.remove()


def closed(net: Net) -> None:
    if isinstance(net, TowerParallel):
        net.close()


@pytest.mark.parametrize(
    "between", [saliency, saliency_within, of_parameters, of_chosen_inputs, failing, closed], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_kept_back_wait_for_the_next_backward_into_the_parameters(
    between: Callable[[Net], None], create_graph: bool
) -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        keep(net)
        between(net)
        net(batch(8, seed=2)).sum().backward(create_graph=create_graph)
    assert_same_gradients(wrapped, plain)
    plain.zero_grad()
    wrapped.zero_grad()
    for net in (plain, wrapped):  # and go there once
        net(batch(8, seed=3)).sum().backward()
    assert_same_gradients(wrapped, plain)


def test_two_threads_backwards_keep_theirs_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    keep, inside, overlaps = HeldGradients.keep, [0], []

    def keep_slowly(self: HeldGradients, *args: Any, **options: Any) -> Any:
        overlaps.append(inside[0])
        inside[0] += 1
        time.sleep(0.1)
        local = keep(self, *args, **options)
        inside[0] -= 1
        return local

    monkeypatch.setattr(HeldGradients, "keep", keep_slowly)
    wrapped = wrap(mlp(), 2)
    with wrapped.no_sync():
        losses = [wrapped(batch(8, seed=seed)).sum() for seed in range(2)]
        in_threads(*[loss.backward for loss in losses])
    assert overlaps == [0, 0]


def test_no_sync_lasts_though_the_towers_are_made_anew_within_it() -> None:
    plain, wrapped = twins(mlp(), 2)
    with wrapped.no_sync():
        wrapped.close()
        wrapped(batch(8)).sum().backward()
        assert all(parameter.grad is None for parameter in wrapped.parameters())
    plain(batch(8)).sum().backward()
    for net in (plain, wrapped):
        net(batch(8)).sum().backward()
    assert_same_gradients(wrapped, plain)


def test_gradients_kept_back_follow_a_cast() -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        keep(net)
        net.float()
        net(batch(8).float()).sum().backward()
    assert_same_gradients(wrapped, plain, rtol=1e-5)


def test_gradients_asked_for_within_no_sync_are_given_at_once() -> None:
    plain, wrapped = twins(mlp(), 2)
    with wrapped.no_sync():
        ours = torch.autograd.grad(wrapped(batch(8)).sum(), list(wrapped.parameters()))
    theirs = torch.autograd.grad(plain(batch(8)).sum(), list(plain.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_gradients_asked_for_of_a_forward_within_no_sync_are_not_kept(num_towers: int) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    with wrapped.no_sync():
        out = wrapped(batch(8))
    torch.autograd.grad(out.sum(), list(wrapped.parameters()))
    assert_go_backward_alike(plain, wrapped, batch(8))


def test_the_gradient_of_a_frozen_parameter_is_kept_until_it_is_thawed() -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        keep(net)
    frozen: list[Any] = [net[0].weight for net in (plain, wrapped.module)]
    for weight in frozen:
        weight.requires_grad_(False)
    wrapped(batch(8)).sum().backward()
    assert wrapped.module[0].weight.grad is None
    for weight in frozen:
        weight.requires_grad_(True)
    wrapped(batch(8)).sum().backward()
    for _ in range(2):
        plain(batch(8)).sum().backward()
    once = torch.autograd.grad(plain(batch(8)).sum(), plain[0].weight)[0]
    plain[0].weight.grad -= once  # of the backward in which it was frozen
    assert_same_gradients(wrapped, plain, rtol=1e-10)

"""Within `no_sync` backwards accumulate in each tower; the next synchronised one reduces it all, zero_grad drops it."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import (
    EVERY_COUNT,
    SEVERAL,
    STYLES,
    assert_close,
    assert_go_backward_alike,
    assert_same_gradients,
    batch,
    loss_in,
    mean_of_squares_by,
    mlp,
    twins,
    wrap,
)
from tests.modules import TwoHeads
from torchtower import current_tower


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_no_sync_accumulates_and_the_next_backward_reduces_once(num_towers: int, style: str) -> None:
    plain, wrapped = twins(mlp(), num_towers)

    def backward(net: nn.Module, step: int) -> None:
        x, y = batch(7, seed=step), batch(7, 2, seed=50 + step)
        loss_in(style, net, lambda net, x, y: F.mse_loss(net(x), y), x, y).backward()

    for round_ in range(2):
        for net in (plain, wrapped):
            net.zero_grad()
            for step in range(2):
                if net is wrapped:
                    with wrapped.no_sync():
                        backward(net, 10 * round_ + step)
                else:
                    backward(net, 10 * round_ + step)
            backward(net, 10 * round_ + 9)
        assert_same_gradients(wrapped, plain)


def test_within_no_sync_no_gradient_reaches_the_parameters() -> None:
    wrapped = wrap(mlp(), 2)
    with wrapped.no_sync():
        wrapped(batch(4)).sum().backward()
    assert all(p.grad is None for p in wrapped.parameters())
    wrapped(batch(4)).sum().backward()
    assert all(p.grad is not None for p in wrapped.parameters())


@pytest.mark.parametrize("of", ["the wrapper", "its module", "what contains it"])
def test_zero_grad_forgets_what_no_sync_kept(of: str) -> None:
    plain, wrapped = twins(mlp(), 2)
    with wrapped.no_sync():
        wrapped(batch(4)).sum().backward()
    {"the wrapper": wrapped, "its module": wrapped.module, "what contains it": nn.Sequential(wrapped)}[of].zero_grad()
    assert_go_backward_alike(plain, wrapped, batch(7))


def test_zero_grad_forgets_what_no_sync_kept_of_parameters_that_are_gone() -> None:
    plain, wrapped = twins(mlp(), 2)
    with wrapped.no_sync():
        wrapped(batch(4)).sum().backward()
    for net in (plain, wrapped.module):
        torch.manual_seed(1)
        net[2] = nn.Linear(5, 2).double()
    wrapped.zero_grad()
    assert not wrapped._held
    assert_go_backward_alike(plain, wrapped, batch(7))


def test_zero_grad_of_a_part_forgets_that_part() -> None:
    plain, wrapped = twins(mlp(), 2)
    plain(batch(4)).sum().backward()
    with wrapped.no_sync():
        wrapped(batch(4)).sum().backward()
    for net in (plain, wrapped.module):
        net[0].zero_grad()
    for net in (plain, wrapped):
        net(batch(7)).sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_optimizers_zero_grad_forgets_what_no_sync_kept_of_its_parameters(set_to_none: bool) -> None:
    plain, wrapped = twins(mlp(), 2)
    optimizers = [torch.optim.SGD(list(net.parameters())[:2], lr=0.1) for net in (plain, wrapped)]
    plain(batch(6)).square().sum().backward()
    with wrapped.no_sync():
        wrapped(batch(6)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none)
    for net in (plain, wrapped):
        net(batch(5)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("order", ["ks", "kks", "ksk", "kskk", "sk", "skk", "sks"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_backward_through_forwards_within_and_outside_of_no_sync_reduces_all(
    num_towers: int, style: str, order: str
) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    for net in (plain, wrapped):
        losses = []
        for step, how in enumerate(order):
            with wrapped.no_sync() if how == "k" else nullcontext():
                losses.append(loss_in(style, net, mean_of_squares_by, batch(5, seed=step)))
        torch.stack(losses).sum().backward()
    assert_same_gradients(wrapped, plain)
    for net in (plain, wrapped):
        net.zero_grad()
    assert_go_backward_alike(plain, wrapped, batch(7))


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_backward_that_goes_on_from_a_forward_to_one_within_no_sync_reduces_all(num_towers: int) -> None:
    plain, wrapped = twins(nn.Linear(3, 3), num_towers)
    for net in (plain, wrapped):
        with wrapped.no_sync():
            first = net(batch(6))
        net(first.tanh()).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_backward_within_one_that_reduces_all_changes_nothing_of_that(num_towers: int) -> None:
    plain, wrapped = twins(nn.Linear(3, 3), num_towers)
    for net in (plain, wrapped):
        weight = next(net.parameters())

        def look(grad: Tensor, net: nn.Module = net, weight: Tensor = weight) -> None:
            with torch.enable_grad():
                torch.autograd.grad(net(batch(4)).sum(), weight)

        with wrapped.no_sync():
            kept = net(batch(6)) * 1
        kept.register_hook(look)
        (kept.sum() + net(batch(6)).sum()).backward()
    assert_same_gradients(wrapped, plain)


def test_a_backward_of_its_own_within_no_sync_is_kept_whatever_came_before() -> None:
    wrapped = wrap(mlp(), 2)
    wrapped(batch(4)).sum().backward()
    wrapped.zero_grad()
    with wrapped.no_sync():
        wrapped(batch(4)).sum().backward()
    assert all(p.grad is None for p in wrapped.parameters())


def test_an_error_within_no_sync_leaves_the_context() -> None:
    plain, wrapped = twins(mlp(), 2)
    with pytest.raises(KeyError), wrapped.no_sync():
        raise KeyError
    assert_go_backward_alike(plain, wrapped, batch(7))


@pytest.mark.parametrize("of", ["an optimizer", "a module"])
def test_zero_grad_leaves_no_gradient_once_no_sync_has_kept_some(of: str) -> None:
    wrapped = wrap(mlp(), 2)
    with wrapped.no_sync():
        wrapped(batch(4)).sum().backward()
    wrapped(batch(4)).sum().backward()
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    {"an optimizer": optimizer, "a module": wrapped.module}[of].zero_grad()
    assert all(parameter.grad is None for parameter in wrapped.parameters())


def test_zero_grad_still_works_after_any_number_of_backwards_within_no_sync() -> None:
    wrapped = wrap(nn.Linear(3, 2), 2)
    x = torch.ones(2, 3)
    with wrapped.no_sync():
        for _ in range(1100):  # more than there may be calls within calls
            wrapped(x).sum().backward()
    torch.optim.SGD(wrapped.parameters(), lr=0.1).zero_grad()
    wrapped(x).sum().backward()
    assert torch.equal(wrapped.module.bias.grad, torch.full((2,), 2.0))


class OneOf(TwoHeads):
    """Uses one layer of two, whichever is asked for."""

    def forward(self, x: Tensor, which: str) -> Tensor:
        return getattr(self, which)(x)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_within_no_sync_a_forward_may_leave_out_what_an_earlier_one_has_used(num_towers: int) -> None:
    plain, wrapped = twins(OneOf(), num_towers)
    for net in (plain, wrapped):
        for which in ("left", "right"):
            if net is wrapped:
                with wrapped.no_sync():
                    net(batch(8), which).square().sum().backward()
            else:
                net(batch(8), which).square().sum().backward()
        net(batch(8), "right").square().sum().backward()
    assert_same_gradients(wrapped, plain)


class Sum(nn.Module):
    """Two parameters that have one and the same gradient, and a third that may be used alone."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b", "c"):
            self.register_parameter(name, nn.Parameter(torch.ones(1, 3)))

    def forward(self, x: Tensor, alone: bool) -> Tensor:
        return x + self.c if alone else (x + self.a + self.b) * 2


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_gradients_that_no_sync_keeps_of_two_parameters_are_not_written_over_one_another(num_towers: int) -> None:
    plain, wrapped = twins(Sum(), num_towers)
    x = batch(num_towers)
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        with wrapped.no_sync():
            net(x, False).sum().backward(inputs=[inner.a, inner.b])
        net(x, True).sum().backward()
    assert_same_gradients(wrapped, plain)


def test_no_sync_within_a_tower_changes_nothing_for_the_wrapper() -> None:
    plain, wrapped = twins(mlp(), 2, max_concurrency=2)
    first_is_in, second_is_in, first_is_out = threading.Event(), threading.Event(), threading.Event()

    def loss_fn(net: nn.Module, x: Tensor) -> Tensor:
        mine, others = (first_is_in, second_is_in) if current_tower() == 0 else (second_is_in, first_is_out)
        if current_tower() == 1:
            first_is_in.wait(10)
        with wrapped.no_sync():
            mine.set()
            others.wait(10)
        if current_tower() == 0:
            first_is_out.set()
        return net(x).square().mean()

    wrapped.tower_loss(loss_fn, batch(4)).backward()
    plain(batch(4)).square().mean().backward()
    assert_same_gradients(wrapped, plain)
    for net in (plain, wrapped):
        net(batch(4)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_no_sync_keeps_no_parameter_alive_once_its_gradients_are_reduced() -> None:
    wrapped = wrap(mlp(), 2)
    with wrapped.no_sync():
        wrapped(batch(4)).sum().backward()
    wrapped(batch(4)).sum().backward()
    gone = weakref.ref(wrapped.module[2].weight)
    wrapped.module[2] = nn.Linear(5, 2).double()
    wrapped(batch(4))
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("order", ["sparse first", "dense first"])
@pytest.mark.parametrize("last", [False, True], ids=["both kept", "the second synchronised"])
def test_sparse_and_dense_gradients_of_one_parameter_add_up(order: str, last: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table.weight.T if x.is_floating_point() else self.table(x)

    plain, wrapped = twins(Tied(), 2)
    batches = [torch.tensor([0, 1, 1, 4]), batch(4)]
    if order == "dense first":
        batches.reverse()
    for net in (plain, wrapped):
        for index, x in enumerate(batches):
            is_kept = net is wrapped and not (last and index)
            with wrapped.no_sync() if is_kept else nullcontext():
                net(x).square().sum().backward()
        if not last:
            net(batches[0]).square().sum().backward()
    for ours, theirs in zip(wrapped.module.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert_close(ours.grad.to_dense(), theirs.grad.to_dense())


def test_a_reduction_that_fails_counts_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, wrapped = twins(mlp(), 2)
    with wrapped.no_sync():
        wrapped(batch(4)).square().sum().backward()
    loss = wrapped(batch(4)).square().sum()

    def failing(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patched:
        patched.setattr("torchtower.bridge.ports.weighted_sum", failing)
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward(retain_graph=True)
    loss.backward()
    for _ in range(2):
        plain(batch(4)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("kept", [1, 2])
def test_a_parameter_that_is_frozen_before_a_backward_keeps_what_it_has(kept: int) -> None:
    plain, wrapped = twins(mlp(), 2)
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        for step in range(3):
            with wrapped.no_sync() if net is wrapped and step < kept else nullcontext():
                loss = net(batch(5, seed=step)).square().sum()
                inner[0].weight.requires_grad_(step != 1)  # after the forward
                loss.backward()
                inner[0].weight.requires_grad_(True)
    assert_same_gradients(wrapped, plain)

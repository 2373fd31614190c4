"""`tower_loss`: each tower's own loss, and the mean of the gradients, weighted by rows or as the loss function says."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
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
    mlp,
    twins,
    wrap,
)
from torchtower import current_tower


def test_tower_loss_weighs_by_what_the_loss_function_returns() -> None:
    plain, wrapped = twins(nn.Linear(3, 1), 3)
    x = batch(6)
    tokens = [5.0, 0.0, 2.0]
    loss = wrapped.tower_loss(lambda net, x: (net(x).mean(), tokens[current_tower()]), x)
    loss.backward()
    expected = (plain(x[:2]).mean() * 5 + plain(x[4:]).mean() * 2) / 7
    expected.backward()
    assert_close(loss, expected)
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_masked_tokens_as_weights_give_the_mean_over_tokens(num_towers: int) -> None:
    plain, wrapped = twins(nn.Linear(3, 4), num_towers)
    x = batch(9)
    target = torch.tensor([0, -100, 1, -100, -100, 2, 3, 0, 1])

    def loss_fn(net: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        count = (target != -100).sum()
        return F.cross_entropy(net(x), target, reduction="sum") / count.clamp_min(1), count

    got = wrapped.tower_loss(loss_fn, x, target)
    got.backward()
    expected = F.cross_entropy(plain(x), target)
    expected.backward()
    assert_close(got, expected)
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_within_no_sync_a_tower_without_tokens_adds_nothing_though_its_mean_is_no_number(num_towers: int) -> None:
    def loss_fn(net: nn.Module, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return (net(x).sum(1) * mask).sum() / mask.sum(), mask.sum()

    plain, wrapped = twins(mlp(), num_towers)
    x = batch(2 * num_towers)
    mask = torch.ones(len(x), dtype=torch.float64)
    mask[2:4] = 0
    with wrapped.no_sync():
        wrapped.tower_loss(loss_fn, x, mask).backward()
    wrapped.tower_loss(loss_fn, x, mask).backward()
    for _ in range(2):
        loss_fn(plain, x, mask)[0].backward()
    assert_same_gradients(wrapped, plain)


def test_tower_losses_lists_each_towers_own_loss() -> None:
    net = nn.Linear(3, 1).double()
    wrapped = wrap(net, 3)
    x = batch(7)
    wrapped.tower_loss(lambda net, x: net(x).mean(), x)
    parts = torch.split(x, [3, 2, 2])
    assert len(wrapped.tower_losses) == 3
    for loss, part in zip(wrapped.tower_losses, parts, strict=True):
        assert loss.dim() == 0 and not loss.requires_grad
        assert_close(loss, net(part).mean())


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_tower_loss_takes_losses_of_one_element_and_returns_a_0d_loss(num_towers: int) -> None:
    loss = wrap(nn.Linear(3, 1).double(), num_towers).tower_loss(lambda net, x: net(x).mean().reshape(1), batch(4))
    assert loss.shape == ()


def test_tower_loss_passes_keywords_and_nested_batches() -> None:
    plain, wrapped = twins(mlp(), 2)
    x, y = batch(5), batch(5, 2, seed=1)
    loss = wrapped.tower_loss(
        lambda net, data, *, y, scale: scale * F.mse_loss(net(data["x"]), y), {"x": x}, y=y, scale=2
    )
    assert_close(loss, 2 * F.mse_loss(plain(x), y))


def test_tower_loss_differentiates_to_its_inputs() -> None:
    plain, wrapped = twins(mlp(), 3)
    grads = []
    for use in (lambda x: plain(x).square().mean(), lambda x: wrapped.tower_loss(lambda n, x: n(x).square().mean(), x)):
        x = batch(7, requires_grad=True)
        use(x).backward()
        grads.append(x.grad)
    assert_close(grads[1], grads[0])


def test_tower_loss_without_grad_gives_the_value() -> None:
    wrapped = wrap(mlp(), 2)
    with torch.no_grad():
        loss = wrapped.tower_loss(lambda net, x: net(x).mean(), batch(5))
    assert not loss.requires_grad
    assert_close(loss, wrapped.module(batch(5)).mean())


def test_both_call_styles_mix_in_one_backward() -> None:
    plain, wrapped = twins(mlp(), 3)
    (plain(batch(5)).sum() + plain(batch(7, seed=1)).square().mean()).backward()
    tower_loss = wrapped.tower_loss(lambda net, x: net(x).square().mean(), batch(7, seed=1))
    (wrapped(batch(5)).sum() + tower_loss).backward()
    assert_same_gradients(wrapped, plain)


def test_a_loss_function_that_calls_the_wrapper_itself_means_its_towers_replica() -> None:
    plain, wrapped = twins(mlp(), 3)
    loss = wrapped.tower_loss(lambda net, x: wrapped(x).square().mean(), batch(7))
    loss.backward()
    plain(batch(7)).square().mean().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_tower_losses_are_of_the_last_call_without_graph(num_towers: int) -> None:
    wrapped = wrap(mlp(), num_towers)
    for seed in range(2):
        loss = wrapped.tower_loss(mean_of_squares_by, batch(2 * num_towers, seed=seed))
        assert len(wrapped.tower_losses) == num_towers
        assert not any(own.requires_grad for own in wrapped.tower_losses)
        assert torch.allclose(torch.stack(wrapped.tower_losses).mean(), loss)


@pytest.mark.parametrize("style", STYLES)
def test_a_call_that_nothing_compiles_warns_of_nothing(style: str) -> None:
    wrapped = wrap(mlp(), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            loss_in(style, wrapped, mean_of_squares_by, batch(4)).backward()

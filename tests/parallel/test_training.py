"""A training loop around the wrapper takes the plain module's path, whatever is in it.

Gradients that accumulate; any optimizer, schedule, clipping, scaler or average of weights.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import (
    EVERY_COUNT,
    STYLES,
    assert_close,
    assert_same_gradients,
    assert_same_parameters,
    batch,
    loss_in,
    mlp,
    take_steps,
    twins,
    wrap,
)

# ---- gradients over several backwards


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_gradients_accumulate_over_backwards(num_towers: int, set_to_none: bool) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    for net in (plain, wrapped):
        for step in range(3):
            for part in range(2):
                net(batch(5, seed=10 * step + part)).square().sum().backward()
            if step < 2:
                net.zero_grad(set_to_none=set_to_none)
    assert_same_gradients(wrapped, plain)


def test_a_kept_gradient_is_not_overwritten_by_the_next_backward() -> None:
    wrapped = wrap(mlp(), 3)
    wrapped(batch(7)).sum().backward()
    kept = [p.grad for p in wrapped.parameters()]
    values = [g.clone() for g in kept]
    wrapped.zero_grad(set_to_none=True)
    wrapped(batch(7, seed=5)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, values, strict=True))
    assert all(p.grad is not g for p, g in zip(wrapped.parameters(), kept, strict=True))


def test_zero_gradient_and_requires_grad_of_the_wrapper_reach_the_module() -> None:
    wrapped = wrap(mlp(), 2)
    wrapped(batch(4)).sum().backward()
    wrapped.zero_grad()
    assert all(p.grad is None for p in wrapped.module.parameters())
    wrapped.requires_grad_(False)
    assert not wrapped(batch(4)).requires_grad


# ---- optimizers

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, foreach=True),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("num_towers", (2, 4))
def test_twenty_steps_follow_the_plain_modules_trajectory(name: str, style: str, num_towers: int) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    for net in (plain, wrapped):
        optimizer = OPTIMIZERS[name](net.parameters())
        for step in range(20):
            x, y = batch(5 + step % 4, seed=step), batch(5 + step % 4, 2, seed=100 + step)
            optimizer.zero_grad()
            loss_in(style, net, lambda net, x, y: F.mse_loss(net(x), y), x, y).backward()
            optimizer.step()
    assert_same_parameters(wrapped, plain, 1e-11)


def test_lbfgs_and_other_closures_work() -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=4)

        def closure(net: nn.Module = net, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = net(batch(6)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_same_parameters(wrapped, plain, 1e-9)


def test_an_optimizer_that_steps_in_the_backward_hook_works() -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in net.parameters()}

        def step(p: Tensor, optimizers: Any = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in net.parameters():
            p.register_post_accumulate_grad_hook(step)
        for i in range(3):
            net(batch(6, seed=i)).square().mean().backward()
    assert_same_parameters(wrapped, plain)


@pytest.mark.parametrize("before", [True, False])
def test_an_optimizer_made_before_or_after_wrapping_works(before: bool) -> None:
    plain = mlp()
    net = copy.deepcopy(plain)
    if before:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        wrapped = wrap(net, 2)
    else:
        wrapped = wrap(net, 2)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for model, its in ((plain, theirs), (wrapped, optimizer)):
        take_steps(model, its, lambda step: batch(6, seed=step))
    assert_same_parameters(wrapped, plain)


def test_parameter_groups_and_schedulers_work() -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        inner = getattr(net, "module", net)
        groups = [{"params": inner[0].parameters(), "lr": 0.1}, {"params": inner[2].parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for step in range(3):
            optimizer.zero_grad()
            net(batch(6, seed=step)).square().mean().backward()
            optimizer.step()
            schedule.step()
    assert_same_parameters(wrapped, plain)


# ---- what else a loop does


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_gradient_clipping_works(clip: Any) -> None:
    plain, wrapped = twins(mlp(), 3)
    norms = []
    for net in (plain, wrapped):
        net(batch(7)).square().sum().backward()
        norms.append(clip(net.parameters(), 0.1))
    if norms[0] is not None:
        assert_close(norms[1], norms[0])
    assert_same_gradients(wrapped, plain)


def test_a_gradient_scaler_scales_and_skips_as_with_the_plain_module() -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2)
        for step in range(4):
            optimizer.zero_grad()
            loss = net(batch(6, seed=step)).square().mean()
            if step == 2:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**4
    assert_same_parameters(wrapped, plain)


def test_training_and_evaluation_alternate() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    wrapped = wrap(net, 2)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(3):
        wrapped.train()
        optimizer.zero_grad()
        wrapped(batch(6, seed=step)).square().mean().backward()
        optimizer.step()
        wrapped.eval()
        with torch.no_grad() if step % 2 else torch.inference_mode():
            assert_close(wrapped(batch(5)), net(batch(5)))


def test_an_averaged_model_of_the_wrapper_works() -> None:
    wrapped = wrap(mlp(), 2)
    averaged = torch.optim.swa_utils.AveragedModel(wrapped)
    for step in range(2):
        with torch.no_grad():
            for p in wrapped.parameters():
                p.add_(step)
        averaged.update_parameters(wrapped)
    assert averaged(batch(4)).shape == (4, 2)

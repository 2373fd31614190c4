"""Contracts 1 and 2: the gradients of towers are the plain module's on the whole batch, and None where it has None.

Called as the module is or by tower_loss, whatever the size of the batch, whichever parameters a tower uses.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import (
    EVERY_COUNT,
    SEVERAL,
    assert_close,
    assert_same_gradients,
    assert_trains_alike,
    batch,
    mlp,
    twins,
    wrap,
)
from tests.modules import TwoHeads
from torchtower import current_tower

# ---- any batch size, both call styles


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 7, 9, 16])
def test_drop_in_gradients_equal_the_plain_modules_for_every_batch_size(num_towers: int, rows: int) -> None:
    assert_trains_alike(mlp(), num_towers, batch(rows))


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 9, 16])
def test_tower_loss_gradients_equal_the_plain_modules_for_every_batch_size(num_towers: int, rows: int) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    x, y = batch(rows), batch(rows, 2, seed=1)
    expected = F.mse_loss(plain(x), y)
    expected.backward()
    got = wrapped.tower_loss(lambda net, x, y: F.mse_loss(net(x), y), x, y)
    got.backward()
    assert_close(got, expected)
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_mean_loss_over_gathered_outputs_needs_no_factor(num_towers: int) -> None:
    y = batch(7, 2, seed=1)
    assert_trains_alike(mlp(), num_towers, batch(7), loss=lambda out: F.mse_loss(out, y))


@pytest.mark.parametrize("num_towers", (16, 64))
def test_more_towers_than_cores_work(num_towers: int) -> None:
    assert_trains_alike(mlp(), num_towers, batch(70))


def test_one_tower_hands_the_call_to_the_module_itself() -> None:
    seen = []
    net = mlp()
    net.register_forward_pre_hook(lambda module, args: seen.append((module, args[0], current_tower())))
    x = batch(4)
    wrap(net, 1)(x)
    assert seen[0][0] is net and seen[0][1] is x and seen[0][2] is None


def test_a_batch_is_split_as_evenly_as_its_rows_allow() -> None:
    sizes = {}

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes[current_tower()] = len(x)
            return x

    wrap(Net(), 4)(batch(9))
    assert sizes == {0: 3, 1: 2, 2: 2, 3: 2}


# ---- parameters that are unused, frozen or shared


class SometimesUsed(nn.Module):
    """Tower ``user`` alone uses ``rare``; nobody uses ``never``."""

    def __init__(self, user: int) -> None:
        super().__init__()
        self.user = user
        self.always, self.rare, self.never = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.always(x)
        return out + self.rare(x) if current_tower() == self.user else out


@pytest.mark.parametrize("user", [0, 1, 2])
def test_a_parameter_that_some_towers_use_counts_zero_for_the_others(user: int) -> None:
    net = SometimesUsed(user).double()
    wrapped = wrap(net, 3)
    x = batch(6)
    out = wrapped(x)
    out.sum().backward()
    assert net.never.weight.grad is None and net.never.bias.grad is None
    rows = x[2 * user : 2 * user + 2]
    assert_close(net.rare.weight.grad, rows.sum(0).expand(2, 3).contiguous())
    assert_close(net.always.weight.grad, x.sum(0).expand(2, 3).contiguous())


def test_in_tower_loss_a_parameter_that_one_tower_uses_is_averaged_with_zeros() -> None:
    net = SometimesUsed(1).double()
    x = batch(6)
    wrap(net, 3).tower_loss(lambda net, x: net(x).sum(), x).backward()
    assert_close(net.rare.weight.grad, (x[2:4].sum(0) / 3).expand(2, 3).contiguous())
    assert net.never.weight.grad is None


def test_frozen_parameters_stay_without_gradient() -> None:
    net = mlp()
    net[0].requires_grad_(False)
    _, wrapped = assert_trains_alike(net, 3, batch(7))
    assert wrapped.module[0].weight.grad is None


def test_freezing_and_thawing_takes_effect_at_the_next_forward() -> None:
    plain, wrapped = twins(mlp(), 3)
    for flags in [(True, False), (False, True), (True, True), (False, False)]:
        for net in (plain, wrapped):
            inner = getattr(net, "module", net)
            net.zero_grad()
            inner[0].requires_grad_(flags[0])
            inner[2].weight.requires_grad_(flags[1])
            net(batch(7)).square().sum().backward()
        assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("freeze", [True, False])
def test_what_a_forward_recorded_counts_not_what_is_frozen_later(freeze: bool) -> None:
    plain, wrapped = twins(mlp(), 3)
    for net in (plain, wrapped):
        inner = getattr(net, "module", net)
        inner[0].requires_grad_(freeze)
        loss = net(batch(7)).square().sum()
        inner[0].requires_grad_(not freeze)
        if freeze:
            # AccumulateGrad refuses in neither; the graph remembers.
            inner[0].requires_grad_(True)
        loss.backward()
    assert_same_gradients(wrapped, plain)


def test_a_wholly_frozen_module_still_passes_gradients_to_its_input() -> None:
    assert_trains_alike(mlp().requires_grad_(False), 3, batch(7, requires_grad=True))


def test_a_wholly_frozen_module_gives_outputs_without_graph() -> None:
    assert not wrap(mlp().requires_grad_(False), 2)(batch(4)).requires_grad


def test_expanded_and_shared_gradients_are_not_written_over_one_another() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
            self.c = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.a + self.b).sum() * x + self.c.expand(4, 3).sum()

    plain, wrapped = twins(Net(), 3)
    for net in (plain, wrapped):
        for _ in range(2):
            net(batch(7)).square().sum().backward()
    assert_same_gradients(wrapped, plain)
    a, b = wrapped.module.a.grad, wrapped.module.b.grad
    assert a.data_ptr() != b.data_ptr()


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.uses_both = nn.Linear(3, 2), nn.Linear(3, 2), False

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) + (self.sometimes(x) if self.uses_both else 0)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_hooks_of_parameters_that_no_tower_has_used_are_not_called(num_towers: int) -> None:
    plain, wrapped = twins(Conditional(), num_towers)
    calls: dict[nn.Module, list[str]] = {plain: [], wrapped.module: []}
    for net, called in calls.items():
        for name, parameter in net.named_parameters():
            parameter.register_hook(lambda grad, name=name, called=called: called.append(name) or grad * 0.5)
        net.sometimes.bias.register_post_accumulate_grad_hook(lambda p, called=called: called.append("accumulated"))
    for uses_both in (False, True, False):
        for net in (plain, wrapped):
            (net if net is plain else net.module).uses_both = uses_both
            net(batch(6)).square().sum().backward()
        assert_same_gradients(wrapped, plain)
        assert sorted(calls[wrapped.module]) == sorted(calls[plain])


def test_hooks_that_expect_a_gradient_do_not_fail_within_no_sync() -> None:
    def clamp(parameter: Tensor) -> None:
        parameter.grad.clamp_(-100, 100)

    plain, wrapped = twins(Conditional(), 2)
    for net in (plain, wrapped):
        for parameter in net.parameters():
            parameter.register_hook(lambda grad: grad * 0.5)
            parameter.register_post_accumulate_grad_hook(clamp)
    with wrapped.no_sync():
        wrapped(batch(6)).square().sum().backward()
    wrapped(batch(6, seed=1)).square().sum().backward()
    for seed in (0, 1):
        plain(batch(6, seed=seed)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x)
        return self.left(hidden), self.right(hidden + y)


def note_hook_calls(tensors: dict[str, Tensor]) -> list[str]:
    calls: list[str] = []
    for name, tensor in tensors.items():
        tensor.register_hook(lambda grad, name=name: calls.append(name) or grad * 0.5)
        tensor.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(f"{name}:{p.grad.sum():.6f}"))
    return calls


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_hooks_of_what_the_loss_does_not_depend_on_are_not_called(num_towers: int) -> None:
    plain, wrapped = twins(Heads(), num_towers)
    called = []
    for net, module in ((plain, plain), (wrapped, wrapped.module)):
        x, y = batch(6, requires_grad=True), batch(6, seed=1, requires_grad=True)
        calls = note_hook_calls({"x": x, "y": y, **dict(module.named_parameters())})
        for _ in range(2):  # the second time there are gradients already
            z = y * 2
            z.register_hook(lambda grad, calls=calls: calls.append("z"))
            left, right = net(x, z)
            left.square().sum().backward(retain_graph=True)
            calls.append("left done")
            right.sum().backward()
            calls.append("right done")
            left, _ = net(x, z.detach())
            (left.sum() + module.right.bias.sum()).backward()  # one gradient comes by another way
            calls.append("all done")
        called.append([sorted(part.split()) for part in " ".join(calls).split("done")])
    assert called[0] == called[1]
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_hook_that_another_removes_within_the_backward_stays_removed(num_towers: int) -> None:
    plain, wrapped = twins(Heads(), num_towers)
    for net, module in ((plain, plain), (wrapped, wrapped.module)):
        x, y = batch(6), batch(6, seed=1, requires_grad=True)
        called: list[Tensor] = []
        handle = y.register_hook(called.append)
        module.left.weight.register_post_accumulate_grad_hook(lambda _, handle=handle: handle.remove())
        net(x, y)[0].sum().backward()
        net(x, y)[1].sum().backward()
        assert not called
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_hooks_of_outputs_that_the_loss_leaves_out_are_not_called(num_towers: int) -> None:
    plain, wrapped = twins(TwoHeads(), num_towers)
    for net in (plain, wrapped):
        left, right = net(batch(6))
        handle = left.register_hook(lambda grad: grad * 3)
        left.register_hook(lambda grad: grad * 0.5)
        right.register_hook(lambda grad: grad * 0.25)
        handle.remove()
        left.sum().backward(retain_graph=True)
        right.sum().backward(retain_graph=True)
        (left * right).sum().backward()
        left, right = net(batch(6))
        right.mul_(2).register_hook(lambda grad: grad * 0.25)
        left.sum().backward()
        x = batch(6, requires_grad=True)
        slope, own = torch.autograd.grad(net(x)[0].square().sum(), [x, next(net.parameters())], create_graph=True)
        own.register_hook(lambda grad: grad * 0.5)
        slope.square().sum().backward()
    assert_same_gradients(wrapped, plain)
    for net in (plain, wrapped):
        left, right = net(batch(6))
        seen: list[Tensor | None] = []
        torch.autograd.graph.register_multi_grad_hook((left, right), seen.extend)
        left.sum().backward()
        assert seen[0] is not None and seen[1] is None


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_hooks_of_what_a_reentrant_checkpoint_recomputes_are_called(num_towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.second, self.first(x), use_reentrant=True)

    plain, wrapped = twins(Net(), num_towers)
    for net in (plain, wrapped):
        for parameter in net.parameters():
            parameter.register_hook(lambda grad: grad * 0.5)
        net(batch(6)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_hooks_are_the_user_s_again_after_a_backward_that_fails(num_towers: int) -> None:
    plain, wrapped = twins(Heads(), num_towers)
    for net, module in ((plain, plain), (wrapped, wrapped.module)):
        x = batch(6, requires_grad=True)
        hooks = [lambda grad: grad * 0.5, lambda grad: grad + 1]
        handles = [module.right.bias.register_hook(hook) for hook in hooks]
        failing = x.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            net(x, x)[0].sum().backward()
        failing.remove()
        net(x, x)[0].sum().backward()
        assert list(module.right.bias._backward_hooks.values()) == hooks
        handles[0].remove()
        net(x, x)[1].sum().backward()
    assert_same_gradients(wrapped.module.right, plain.right)

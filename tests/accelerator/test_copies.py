"""What travels between devices, and when: parameters only when they may have changed, in few large copies."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.accelerator.towers import (
    OUT,
    assert_same_gradients,
    assert_same_values,
    device,
    feed,
    mlp,
    parameters_sent,
    rows,
    twins,
)
from torchtower import TowerParallel, current_tower
from torchtower.bridge.collect import cut_buckets
from torchtower.reduction import weighted_sum

BACK = ("simulated:1", "simulated:0")


def deep(layers: int = 20, width: int = 8) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])


def bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def test_parameters_travel_in_one_copy_a_dtype_however_many_there_are(simulated: types.ModuleType) -> None:
    plain, wrapped = twins(deep(), [0, 1])
    assert parameters_sent(simulated, wrapped, 8) == (1, bytes_of(plain))


def test_gradients_travel_in_few_copies(simulated: types.ModuleType) -> None:
    plain, wrapped = twins(deep(), [0, 1])
    loss = feed(wrapped, 8).square().sum()
    simulated.reset_copies()
    loss.backward()
    back = simulated.copies()[BACK]
    assert back.num_bytes == bytes_of(plain)
    assert back.number == 1
    assert simulated.copies()[OUT].number == 1  # the output's gradient


def test_two_towers_on_one_device_share_nothing_but_cost_no_third_devices_copies(simulated: types.ModuleType) -> None:
    plain, wrapped = twins(deep(), [0, 1, 0, 1])
    simulated.reset_copies()
    wrapped(rows(8, 8).to(device(0)))
    assert simulated.copies()[OUT] == (2 + 2, 2 * bytes_of(plain) + 4 * 8 * 8)


def test_towers_on_the_main_device_alias_its_parameters(simulated: types.ModuleType) -> None:
    net = mlp().to(device(0))
    wrapped = TowerParallel(net, device_ids=[0, 0, 0])
    wrapped.tower_loss(lambda replica, x: replica(x).square().mean(), rows(6).float().to(device(0))).backward()
    addresses = []

    def loss(replica: nn.Module, x: Tensor) -> Tensor:
        addresses.append([parameter.data_ptr() for parameter in replica.parameters()])
        return replica(x).square().mean()

    wrapped.tower_loss(loss, rows(6).float().to(device(0)))
    assert addresses == [[parameter.data_ptr() for parameter in net.parameters()]] * 3


def test_nothing_is_copied_when_neither_backward_nor_step_happened(simulated: types.ModuleType) -> None:
    _, wrapped = twins(deep(), [0, 1])
    feed(wrapped, 8)
    with torch.no_grad():
        for _ in range(3):
            assert parameters_sent(simulated, wrapped, 8) == (0, 0)
    assert parameters_sent(simulated, wrapped, 8) == (0, 0)


def test_a_frozen_parameter_is_copied_once(simulated: types.ModuleType) -> None:
    net = deep(layers=4)
    for layer in list(net.children())[:3]:
        layer.requires_grad_(False)
    plain, wrapped = twins(net, [0, 1])
    assert parameters_sent(simulated, wrapped, 8)[1] == bytes_of(plain)
    trainable = bytes_of(list(plain.children())[3])
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    for _ in range(3):
        feed(wrapped, 8).sum().backward()
        optimizer.step()
        assert parameters_sent(simulated, wrapped, 8) == (1, trainable)


def test_a_frozen_parameter_is_copied_once_though_every_forward_leaves_tensors_in_a_list(
    simulated: types.ModuleType,
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.cache = nn.Linear(3, 64).requires_grad_(False), [torch.zeros(1)]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            self.cache = [out.mean().detach()]
            return out

    plain, wrapped = twins(Net(), [0, 1])
    assert parameters_sent(simulated, wrapped)[1] >= bytes_of(plain)
    for _ in range(2):
        assert parameters_sent(simulated, wrapped)[1] <= 16  # what is in the list, like buffers


def test_a_frozen_parameter_that_was_written_to_is_copied_again(simulated: types.ModuleType) -> None:
    net = mlp()
    net.requires_grad_(False)
    plain, wrapped = twins(net, [0, 1])
    feed(wrapped)
    with torch.no_grad():
        for model in (plain, wrapped.module):
            model[0].weight.mul_(2)
    assert parameters_sent(simulated, wrapped)[0] == 1
    assert_same_values(feed(wrapped), plain(rows(8)))


def test_changed_weights_between_forward_and_backward_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(device(0))
    wrapped = TowerParallel(net, device_ids=[0, 1])
    out = wrapped(torch.ones(4, 3))
    with torch.no_grad():
        net[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_forward_between_forward_and_backward_does_not_spoil_the_first() -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    first = wrapped(rows(6))
    wrapped(rows(6, seed=1)).square().sum().backward()  # parameters may have changed now: they travel again
    second = wrapped(rows(6, seed=2))
    (first.square().sum() + second.square().sum()).backward()
    for seed in range(3):
        plain(rows(6, seed=seed)).square().sum().backward()
    for ours, theirs in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert_same_values(ours.grad, theirs.grad)


# ---- inputs, outputs, memory


def test_rows_of_the_batch_travel_once_and_only_to_their_tower(simulated: types.ModuleType) -> None:
    wrapped = TowerParallel(nn.Identity(), device_ids=[0, 1])
    simulated.reset_copies()
    wrapped(rows(10))
    assert simulated.copies() == {
        ("cpu", "simulated:0"): (1, 5 * 3 * 8),
        ("cpu", "simulated:1"): (1, 5 * 3 * 8),
        BACK: (1, 5 * 3 * 8),
    }


def test_tower_loss_brings_back_losses_alone(simulated: types.ModuleType) -> None:
    plain, wrapped = twins(deep(), [0, 1])
    loss = wrapped.tower_loss(lambda net, x: net(x).square().mean(), rows(8, 8))
    assert simulated.copies()[BACK].num_bytes == 8
    simulated.reset_copies()
    loss.backward()
    assert simulated.copies()[BACK] == (1, bytes_of(plain))


def test_buffers_travel_in_few_copies(simulated: types.ModuleType) -> None:
    net = nn.Sequential(*[nn.BatchNorm1d(8) for _ in range(10)])
    _, wrapped = twins(net, [0, 1])
    wrapped(rows(8, 8))
    simulated.reset_copies()
    with torch.no_grad():
        wrapped(rows(8, 8))
    assert simulated.copies()[OUT].number <= 2  # one for each dtype


def test_a_full_bucket_travels_while_the_backwards_still_run(simulated: types.ModuleType) -> None:
    meeting, seen = threading.Barrier(2, timeout=30), []

    def note(grad: Tensor) -> None:
        meeting.wait()  # both towers have the last layer's gradient, neither has the first one's
        seen.append(simulated.copies()[BACK])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 1024), nn.Linear(1024, 7000, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            if hidden.requires_grad:
                hidden.register_hook(note)
            return self.last(hidden.tanh())

    net = Net().to(device(0))
    loss = TowerParallel(net, device_ids=[0, 1], max_concurrency=2)(torch.ones(4, 4)).sum()
    simulated.reset_copies()
    loss.backward()
    assert seen == [(1, bytes_of(net.last))] * 2


HOW_TO_GO_BACKWARD: dict[str, Callable[[Tensor, nn.Module], Any]] = {
    "backward": lambda loss, net: loss.backward(),
    "some inputs": lambda loss, net: loss.backward(inputs=list(net.parameters())),
    "grad": lambda loss, net: torch.autograd.grad(loss, list(net.parameters())),
}


@pytest.mark.parametrize("keeps_back", [False, True])
@pytest.mark.parametrize("how", HOW_TO_GO_BACKWARD)
def test_gradients_on_the_main_device_are_never_held_once_a_tower(
    simulated: types.ModuleType, how: str, keeps_back: bool
) -> None:
    net = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(32)]).to(device(0))  # 128 MiB
    model_bytes = bytes_of(net)
    wrapped = TowerParallel(net, device_ids=[0, 1, 1, 1, 1, 1])
    if keeps_back:
        with wrapped.no_sync():
            wrapped(torch.ones(6, 1024)).sum().backward()
    loss = wrapped(torch.ones(6, 1024)).sum()
    before = simulated.memory_allocated(0)
    simulated.reset_peak_memory_stats(0)
    HOW_TO_GO_BACKWARD[how](loss, net)
    own = 2 * model_bytes  # the main tower's gradients and the reduced ones
    buckets = 5 * 2 * 29 * 2**20  # a bucket and its flat copy for each of the others
    assert simulated.max_memory_allocated(0) - before < own + buckets


def test_gradients_that_no_sync_keeps_travel_once_with_those_of_the_next_backward(simulated: types.ModuleType) -> None:
    plain, wrapped = twins(deep(), [0, 1])
    for step in range(3):
        plain(rows(8, 8)).square().sum().backward()
        with nullcontext() if step == 2 else wrapped.no_sync():
            loss = feed(wrapped, 8).square().sum()
        simulated.reset_copies()
        loss.backward()
        back = simulated.copies().get(BACK)
        assert (back and back.num_bytes) == (bytes_of(plain) if step == 2 else None)
    assert_same_gradients(wrapped, plain)


def test_gradients_are_reduced_with_the_main_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    _, wrapped = twins(deep(), [1, 0, 0])
    current = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        current.append(torch.accelerator.current_device_index())
        return weighted_sum(*args, **kwargs)

    monkeypatch.setattr("torchtower.bridge.collect.weighted_sum", noting)
    for _ in range(3):  # whichever tower comes last
        wrapped(rows(6, 8).to(device(1))).square().sum().backward()
    assert set(current) == {1}


def test_buckets_hold_only_parameters_that_are_trained_last_first() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    parameters[1].requires_grad_(False)
    assert cut_buckets(parameters) == [[2, 0]]


class _Meeting(torch.autograd.Function):
    """Its backward goes on once it has been come to in every tower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, barrier: threading.Barrier) -> Tensor:
        ctx.barrier = barrier
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if current_tower() is not None:
            ctx.barrier.wait(20)
        return grad, None


def test_a_gradient_that_grows_after_its_bucket_was_reduced_arrives_whole() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            once = checkpoint(self.fc, x, use_reentrant=True)
            return checkpoint(self.fc, _Meeting.apply(once, barrier).tanh(), use_reentrant=True)

    barrier = threading.Barrier(2)
    plain, wrapped = twins(Twice(), [0, 1], max_concurrency=2)
    for net in (plain, wrapped):
        net(rows(8).requires_grad_()).square().sum().backward()
    assert_same_gradients(wrapped, plain)

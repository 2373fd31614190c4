"""What a program does between a forward and its backward, and inside them, with towers on devices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.accelerator.towers import (
    LAYOUTS,
    assert_same_gradients,
    assert_same_values,
    device,
    every_layout,
    mlp,
    rows,
    twins,
)
from tests.helpers import STYLES, loss_in, mean_of_squares_by, sum_of_squares, take_steps
from tests.modules import Clamped, Scaled, Switching, TrainedWithin, batch_norm_net
from torchtower import TowerParallel, convert_sync_batchnorm, current_tower


@pytest.mark.parametrize("buffers", ["main", "mean"])
@every_layout
def test_a_buffer_that_an_earlier_forward_saved_stays_good(devices: list[int], buffers: str) -> None:
    plain, wrapped = twins(Scaled(), devices, buffers=buffers)
    for net in (plain, wrapped):
        first = net(rows(8)).square().sum()
        with torch.no_grad():
            net(rows(8, seed=1))
        (first + net(rows(8, seed=2)).cpu().sum().to(first.device)).backward()
    assert_same_gradients(wrapped, plain)
    assert_same_values(wrapped.module.scale, plain.scale, rtol=1e-300)


@pytest.mark.parametrize("reentrant", [False, True])
@every_layout
def test_a_checkpoint_goes_backward_in_the_mode_that_the_module_is_in(devices: list[int], reentrant: bool) -> None:
    plain, wrapped = twins(Switching(reentrant), devices)
    for net in (plain, wrapped):
        loss = net(rows(8).requires_grad_()).square().sum()
        net.eval()
        with torch.no_grad():
            net(rows(5, seed=1))
        net.train()
        loss.backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("where", [0, 1, "cpu"])
@every_layout
def test_a_batch_written_over_counts_as_it_was_or_is_refused(devices: list[int], where: Any) -> None:
    """What was copied to its tower is safe; what the tower reads where it lies is refused, as in the plain module."""
    plain, wrapped = twins(mlp(), devices)
    x = rows(8).to(where if where == "cpu" else device(where))
    loss = wrapped(x).square().sum()
    x.zero_()
    if where == "cpu":
        plain(rows(8)).square().sum().backward()
        loss.backward()
        assert_same_gradients(wrapped, plain)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_layout
def test_gradients_kept_back_wait_for_the_next_backward_into_the_parameters(devices: list[int]) -> None:
    plain, wrapped = twins(mlp(), devices)
    with wrapped.no_sync():
        wrapped(rows(8)).square().sum().backward()
    z = rows(8, seed=1).requires_grad_()
    torch.autograd.grad(wrapped(z).sum(), z)
    assert all(p.grad is None for p in wrapped.parameters())
    wrapped(rows(8, seed=2)).sum().backward()
    plain(rows(8)).square().sum().backward()
    plain(rows(8, seed=2)).sum().backward()
    assert_same_gradients(wrapped, plain)


@every_layout
def test_a_backward_within_the_forward_reaches_the_parameters(devices: list[int]) -> None:
    plain, wrapped = twins(TrainedWithin(), devices)
    for net in (plain, wrapped):
        net(rows(8))
    assert_same_gradients(wrapped, plain)
    for net in (plain, wrapped):
        net(rows(8)).sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("devices", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_tower_of_weight_zero_hears_of_the_others_through_shared_statistics(devices: list[int]) -> None:
    def loss_fn(net: Any, x: Tensor) -> tuple[Tensor, float]:
        ignored = current_tower() == 0
        labels = torch.full((len(x),), -100 if ignored else 1, device=x.device)
        return F.cross_entropy(net(x), labels), 0.0 if ignored else 1.0

    plain, wrapped = twins(batch_norm_net(), devices)
    wrapped = TowerParallel(convert_sync_batchnorm(wrapped.module), device_ids=devices)
    count = 4 * len(devices)
    F.cross_entropy(plain(rows(count))[4:], torch.ones(count - 4, dtype=torch.int64)).backward()
    wrapped.tower_loss(loss_fn, rows(count)).backward()
    assert_same_gradients(wrapped, plain, 1e-11)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*TorchScript:DeprecationWarning")
@every_layout
def test_scripted_modules_work(devices: list[int]) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2)).double()
    plain, inner = torch.jit.script(net), torch.jit.script(copy.deepcopy(net))
    wrapped = TowerParallel(inner.to(device(devices[0])), device_ids=devices)
    for step in range(2):
        for module in (plain, wrapped):
            module(rows(8, seed=step)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@every_layout
def test_tensors_in_attributes_may_lie_elsewhere(devices: list[int]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.utils.weight_norm(nn.Linear(3, 2))  # keeps the weight of the last forward in an attribute
            self.table, self.tables = torch.arange(3.0), [torch.ones(3)]

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x + self.table.to(x) + self.tables[0].to(x))

    torch.manual_seed(0)
    plain = Net()
    torch.manual_seed(0)
    wrapped = TowerParallel(Net().double().to(device(devices[0])), device_ids=devices)
    plain = plain.double()
    for step in range(2):
        for net in (plain, wrapped):
            net(rows(8, seed=step)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("buffers", ["main", "mean"])
@every_layout
def test_a_counter_on_the_cpu_counts_once_a_call(devices: list[int], buffers: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2).double()
            self.calls, self.sums = torch.zeros(()), [torch.zeros(2, 2)]
            self.table, self.skeleton = torch.zeros(2000), torch.ones(2, device="meta")
            self.nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
            self.others = [nn.Linear(3, 2).requires_grad_(False), nn.BatchNorm1d(2)]

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.sums[0].diagonal().add_(self.calls)
            tables.add(self.table.data_ptr())
            return self.fc(x) * self.calls.to(x)

    tables: set[int] = set()
    plain, wrapped = twins(Net(), devices, buffers=buffers)
    for step in range(3):
        for net in (plain, wrapped):
            net(rows(8, seed=step)).square().sum().backward()
        wrapped.module.sums[0] *= 2
        plain.sums[0] *= 2
    assert_same_gradients(wrapped, plain)
    assert wrapped.module.calls == 3
    assert torch.equal(wrapped.module.sums[0], plain.sums[0])
    assert tables == {wrapped.module.table.data_ptr(), plain.table.data_ptr()}  # a table is not copied


@every_layout
def test_data_that_a_forward_assigns_are_kept_and_trained(devices: list[int]) -> None:
    plain, wrapped = twins(Clamped(), devices)
    for net in (plain, wrapped):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
        take_steps(net, optimizer, lambda step: rows(8, seed=step), steps=4, loss=sum_of_squares)
    assert_same_gradients(wrapped, plain)
    assert_same_values(wrapped.module.fc.weight, plain.fc.weight)


@every_layout
def test_data_that_a_forward_assigns_in_inference_mode_are_trained_on(devices: list[int]) -> None:
    plain, wrapped = twins(Clamped(), devices)
    for net in (plain, wrapped):
        with torch.inference_mode():
            net(rows(8))
        for step in range(2):
            net(rows(8, seed=step)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_with_one_device_the_module_moves_there_as_nn_data_parallels_does() -> None:
    wrapped = TowerParallel(mlp(), device_ids=[1])
    assert {p.device for p in wrapped.parameters()} == {device(1)}
    assert wrapped(rows(4).float()).device == device(1)


def test_minus_one_is_nn_data_parallels_word_for_the_cpu() -> None:
    plain, wrapped = twins(mlp(), [0, 1], output_device=-1)
    out = wrapped(rows(5))
    assert out.device == torch.device("cpu")
    assert_same_values(out, plain(rows(5)))


@every_layout
def test_a_cache_that_a_forward_makes_anew_is_each_towers_own(devices: list[int]) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache: Any = None
            self.listed: list[Any] = [None]

        def forward(self, x: Tensor) -> Tensor:
            length = x.shape[1]
            if self.cache is None or len(self.cache) < length:
                self.cache = torch.arange(length, device=x.device, dtype=x.dtype)
                self.listed[0] = self.cache + 1
            return x * self.cache[:length] + self.listed[0][:length]

    plain, wrapped = twins(Positions(), devices)
    for length in (2, 4, 3, 5, 5):
        x = rows(6, length)
        assert_same_values(wrapped(x), plain(x))


@every_layout
def test_a_parameter_that_a_forward_thaws_has_its_gradient_in_that_very_call(devices: list[int]) -> None:
    class Thawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.calls = nn.Linear(3, 3), nn.Linear(3, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.first.requires_grad_(self.calls % 2 == 0)
            return self.second(self.first(x).tanh())

    plain, wrapped = twins(Thawing(), devices)
    for step in range(4):
        for net in (plain, wrapped):
            net.zero_grad()
            sum_of_squares(net(rows(8))).backward()
        assert (plain.first.weight.grad is not None) is (step % 2 == 1)
        assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("where", [0, 1, "cpu"])
@every_layout
def test_what_a_forward_writes_into_the_batch_is_written_to_all_of_it_or_nothing(
    devices: list[int], where: Any, style: str, mode: Any
) -> None:
    plain, wrapped = twins(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), devices)
    x = rows(8).to(where if where == "cpu" else device(where))
    with mode():
        expected = mean_of_squares_by(plain, rows(8))
        got = loss_in(style, wrapped, mean_of_squares_by, x)
    assert_same_values(got, expected)
    assert_same_values(x, rows(8) if where == "cpu" else rows(8).relu())
    if mode is torch.enable_grad:
        expected.backward()
        got.backward()
        assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_rows", [6, 8])  # some towers' parts are square
@pytest.mark.parametrize("is_written_to", [False, True])
@every_layout
def test_a_batch_that_a_forward_turns_over_in_place_keeps_its_rows(
    devices: list[int], is_written_to: bool, num_rows: int
) -> None:
    class Turning(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            turned = x.t_()
            if is_written_to:
                turned.mul_(2)
            return turned.t() * 1

    _, wrapped = twins(Turning(), devices)
    x, factor = rows(num_rows).to(device(0)), 2 if is_written_to else 1
    assert_same_values(wrapped(x), rows(num_rows) * factor)
    assert_same_values(x, rows(num_rows) * factor)


@pytest.mark.parametrize("style", STYLES)
@every_layout
def test_what_a_forward_writes_into_a_batch_with_a_graph_is_written_to_all_of_it(
    devices: list[int], style: str
) -> None:
    plain, wrapped = twins(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), devices)
    leaf = rows(7).to(device(0)).requires_grad_()
    x = leaf * 2
    loss_in(style, wrapped, mean_of_squares_by, x).backward()
    other = rows(7).requires_grad_()
    mean_of_squares_by(plain, other * 2).backward()
    assert_same_values(x, (rows(7) * 2).relu())
    assert_same_values(leaf.grad, other.grad)
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_rows", [1, 7])
@every_layout
def test_a_batch_elsewhere_that_needs_gradients_is_not_written_to(devices: list[int], num_rows: int) -> None:
    plain, wrapped = twins(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), devices)
    x, other = rows(num_rows).requires_grad_(), rows(num_rows).requires_grad_()
    wrapped(x).square().sum().backward()
    plain(other * 1).square().sum().backward()
    assert_same_values(x, rows(num_rows))
    assert_same_values(x.grad, other.grad)
    assert_same_gradients(wrapped, plain)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.register_buffer("aux", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.aux.add_(self.fc.weight.square().sum(1))
        out: Tensor = self.fc(x) + self.aux.detach()
        return out


@every_layout
@pytest.mark.parametrize("count", [1, 2])
def test_a_loss_that_is_added_to_trains(devices: list[int], count: int) -> None:
    plain, wrapped = twins(Auxiliary(), devices)
    for step in range(3):
        for net, inner in ((plain, plain), (wrapped, wrapped.module)):
            net.zero_grad()
            kept = inner.aux
            total = sum(net(rows(9, seed=step + index)).square().sum() for index in range(count))
            assert inner.aux is kept
            (total + inner.aux.square().sum()).backward()
        assert_same_gradients(wrapped, plain)
        assert_same_values(wrapped.module.aux, plain.aux)
        for inner in (plain, wrapped.module):
            inner.aux = inner.aux.detach() if step else torch.zeros_like(inner.aux)


@every_layout
def test_what_the_user_has_left_with_its_graph_is_written_to_by_each_tower_on_its_own(devices: list[int]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.state = nn.Linear(3, 2), None

        def forward(self, x: Tensor) -> Tensor:
            self.state = self.state.detach()
            self.state.add_(1)
            out: Tensor = self.fc(x) * self.state
            return out

    plain, wrapped = twins(Net(), devices)
    for step in range(3):
        for net, inner in ((plain, plain), (wrapped, wrapped.module)):
            inner.state = inner.fc.bias * 2
            net(rows(9, seed=step)).square().sum().backward()
        assert_same_gradients(wrapped, plain)
        assert_same_values(wrapped.module.state, plain.state)


class MaxNorm(nn.Conv2d):
    """Assigns its weight's data, and saves the weight itself for the backward."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


@every_layout
def test_a_backward_knows_the_data_that_its_forward_has_assigned(devices: list[int]) -> None:
    plain, wrapped = twins(nn.Sequential(nn.Conv2d(1, 4, 3), MaxNorm(4, 2, 3)), devices)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (plain, wrapped)]
    for step in range(3):
        for net, optimizer in zip((plain, wrapped), optimizers, strict=True):
            optimizer.zero_grad()
            net(rows(8, 64, seed=step).view(8, 1, 8, 8)).square().mean().backward()
            optimizer.step()
        assert_same_gradients(wrapped, plain)
    assert_same_values(wrapped.module[1].weight, plain[1].weight)  # type: ignore[index]


@every_layout
def test_a_fused_step_that_takes_frozen_parameters_along_is_seen(devices: list[int]) -> None:
    plain, wrapped = twins(mlp(), devices)
    for net in (plain, wrapped):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
        net(rows(8)).square().sum().backward()
        net.requires_grad_(False)
        net(rows(8))
        optimizer.step()
        optimizer.zero_grad()
    assert_same_values(wrapped(rows(8)), plain(rows(8)))


@every_layout
def test_weights_swapped_between_two_evaluations_are_seen_if_the_mode_has_changed(devices: list[int]) -> None:
    plain, wrapped = twins(mlp(), devices)

    def evaluate(net: Any) -> Tensor:
        net.eval()
        with torch.no_grad():
            out: Tensor = net(rows(8))
        net.train()
        return out

    for scale in (2.0, 0.5):
        outs = []
        for net in (plain, wrapped):
            for parameter in net.parameters():
                parameter.data.mul_(scale)
            outs.append(evaluate(net))
        assert_same_values(outs[1], outs[0])

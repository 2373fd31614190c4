"""Batch normalisation in towers: whose statistics persist, and those of the whole batch."""

from __future__ import annotations

import copy
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
    assert_same_gradients,
    assert_trains_alike,
    batch,
    loss_in,
    mean_of_squares_by,
    twins,
    wrap,
)
from tests.modules import OneLayer, batch_norm_net
from torchtower import convert_sync_batchnorm, current_tower, tower_sum

EVERY_NORM = {
    "1d": (lambda **o: nn.BatchNorm1d(3, **o), lambda rows: batch(rows)),
    "2d": (lambda **o: nn.BatchNorm2d(3, **o), lambda rows: batch(rows, 3 * 4 * 4).view(rows, 3, 4, 4)),
    "3d": (lambda **o: nn.BatchNorm3d(3, **o), lambda rows: batch(rows, 3 * 8).view(rows, 3, 2, 2, 2)),
}


@pytest.mark.parametrize("num_towers", SEVERAL)
@pytest.mark.parametrize("kind", EVERY_NORM)
def test_running_statistics_are_the_main_towers(kind: str, num_towers: int) -> None:
    make, rows = EVERY_NORM[kind]
    plain, wrapped = twins(make(), num_towers)
    for _ in range(3):
        x = rows(4 * num_towers)
        wrapped(x)
        plain(x[:4])
    inner = wrapped.module
    assert_close(inner.running_mean, plain.running_mean)
    assert_close(inner.running_var, plain.running_var)
    assert inner.num_batches_tracked == 3


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_evaluation_uses_the_running_statistics_in_every_tower(num_towers: int) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    for step in range(2):
        net(batch(8, seed=step))
    net.eval()
    before = copy.deepcopy(net.state_dict())
    assert_trains_alike(net, num_towers, batch(9))
    plain, wrapped = twins(net, num_towers)
    assert_close(wrapped(batch(9)), plain(batch(9)))
    assert all(torch.equal(wrapped.module.state_dict()[k], v) for k, v in before.items())


def test_buffers_mean_pools_the_towers_statistics_by_rows() -> None:
    net = nn.BatchNorm1d(3).double()
    wrapped = wrap(net, 3, buffers="mean")
    x = batch(10)
    parts = torch.split(x, [4, 3, 3])
    wrapped(x)
    mean = sum(0.1 * part.mean(0) * len(part) / 10 for part in parts)
    var = sum((0.9 + 0.1 * part.var(0)) * len(part) / 10 for part in parts)
    assert_close(net.running_mean, mean)
    assert_close(net.running_var, var)
    assert net.num_batches_tracked == 1


class Statistics(nn.Module):
    """A running mean that is assigned, beside buffers that nobody writes, of kinds that have no mean."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("assigned", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("expanded", torch.ones(1, dtype=torch.float64).expand(3))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
        self.small = torch.ones(3).to(torch.float8_e5m2)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.assigned = self.assigned * 0.9 + 0.1 * x.detach().mean(0)
        return self.fc(x * self.expanded) + self.assigned.sum()


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_buffers_mean_pools_what_a_forward_assigns_and_leaves_what_has_no_mean(num_towers: int) -> None:
    net = Statistics().double()
    wrapped = wrap(net, num_towers, buffers="mean")
    expected = torch.zeros(3, dtype=torch.float64)
    for seed in range(3):
        x = batch(7, seed=seed)
        expected = expected * 0.9 + 0.1 * x.mean(0)
        wrapped(x).sum().backward()
        assert_close(net.mean, expected)
        assert_close(net.assigned, expected)
    assert net.state_dict().keys() == Statistics().state_dict().keys()


def test_train_and_eval_take_effect_at_the_next_forward() -> None:
    flags = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            flags.append((self.training, self.inner.training))
            return x

    wrapped = wrap(Net(), 2)
    for mode in (True, False, True):
        wrapped.train(mode)
        wrapped(batch(4))
        assert flags == [(mode, mode)] * 2
        flags.clear()
    wrapped.module.inner.eval()
    wrapped(batch(4))
    assert flags == [(True, False)] * 2


NORM_OPTIONS: list[dict[str, Any]] = [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("rows", [3, 7, 12])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("options", NORM_OPTIONS, ids=str)
def test_synchronised_batch_norm_is_batch_norm_over_the_whole_batch(
    num_towers: int, rows: int, options: dict[str, Any], style: str
) -> None:
    plain = batch_norm_net(**options)
    wrapped = wrap(convert_sync_batchnorm(copy.deepcopy(plain)), num_towers)
    for step in range(3):
        results = []
        y = batch(rows, 2, seed=100 + step)
        for net in (plain, wrapped):
            x = batch(rows, seed=step, requires_grad=True)
            loss = loss_in(style, net, lambda net, x, y: F.mse_loss(net(x), y), x, y)
            loss.backward()
            results.append((loss, x.grad))
        assert_close(results[1][0], results[0][0])
        assert_close(results[1][1], results[0][1], 1e-11)
    assert_same_gradients(wrapped, plain, 1e-11)
    if options.get("track_running_stats", True):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            got, expected = getattr(wrapped.module[1], name), getattr(plain[1], name)
            assert_close(got.double(), expected.double())


def test_synchronised_batch_norm_takes_images_and_channels_last() -> None:
    plain = (
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).double().to(memory_format=torch.channels_last)
    )
    wrapped = wrap(convert_sync_batchnorm(copy.deepcopy(plain)), 3)
    x = batch(7, 3 * 5 * 5).view(7, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    for net in (plain, wrapped):
        net(x).sin().sum().backward()
    assert_same_gradients(wrapped, plain, 1e-11)
    assert_close(wrapped.module[1].running_var, plain[1].running_var)


@pytest.mark.parametrize("style", STYLES)
def test_synchronised_batch_norm_differentiates_twice(style: str) -> None:
    plain = batch_norm_net(outputs=1)
    wrapped = wrap(convert_sync_batchnorm(copy.deepcopy(plain)), 2)
    for net in (plain, wrapped):
        x = batch(7, requires_grad=True)
        loss = loss_in(style, net, mean_of_squares_by, x)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.square().sum().backward()
    assert_same_gradients(wrapped, plain, 1e-9)


@pytest.mark.parametrize("vectorized", [False, True])
def test_synchronised_batch_norm_takes_several_gradients_at_once(vectorized: bool) -> None:
    plain = nn.BatchNorm1d(3).double()
    _, wrapped = twins(convert_sync_batchnorm(copy.deepcopy(plain)), 2)
    ours, theirs = (
        torch.autograd.functional.jacobian(net, batch(5), vectorize=vectorized)  # type: ignore[no-untyped-call]
        for net in (wrapped, plain)
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_synchronised_batch_norm_works_where_towers_take_turns(at_once: int) -> None:
    plain = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4)).double()
    wrapped = wrap(convert_sync_batchnorm(copy.deepcopy(plain)), 4, max_concurrency=at_once)
    for net in (plain, wrapped):
        net(batch(9)).sin().sum().backward()
    assert_same_gradients(wrapped, plain, 1e-11)


def test_a_backward_that_reaches_one_tower_alone_says_what_to_do() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            self.loss = self.norm(self.fc(x)).square().mean()
            return self.fc(x)

    wrapped = wrap(convert_sync_batchnorm(Auxiliary()), 2)
    out = wrapped(torch.randn(6, 3))
    with pytest.raises(RuntimeError, match=r"towers \[1\] finished without; .* return it as an output"):
        (out.sum() + wrapped.module.loss).backward()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_tower_that_fails_before_the_others_meet_it_leaves_nobody_waiting(at_once: int, error: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fails = convert_sync_batchnorm(nn.BatchNorm1d(3)).double(), True

        def forward(self, x: Tensor) -> Tensor:
            if self.fails and current_tower() == 1:
                raise error("told to fail")
            return self.norm(x)

    wrapped = wrap(Net(), 3, max_concurrency=at_once)
    with pytest.raises(error, match="told to fail"):
        wrapped(batch(6))
    wrapped.module.fails = False
    assert wrapped(batch(6)).mean(0).abs().max() < 1e-12


def test_a_summand_may_be_written_to_afterwards() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            summand = x.sum(0)
            total = tower_sum(summand)
            summand.zero_()
            return total.expand_as(x)

    wrapped = wrap(Net(), 3)
    for _ in range(20):
        assert_close(wrapped(batch(6)), batch(6).sum(0).expand(6, 3))


def test_towers_that_meet_unequally_often_are_told() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if current_tower() == 1 else x + tower_sum(x.sum())

    with pytest.raises(RuntimeError, match=r"tower_sum: expected every tower to come.*towers \[1\]"):
        wrap(Net(), 3)(batch(6))


@pytest.mark.parametrize("style", STYLES)
def test_a_sum_over_towers_is_that_of_the_whole_batch_with_its_gradients(style: str) -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            out = self.fc(x)
            return out / tower_sum(out.exp().sum(0))

    plain, wrapped = twins(Net(), 3)
    for net in (plain, wrapped):
        loss_in(style, net, mean_of_squares_by, batch(7)).backward()
    assert_same_gradients(wrapped, plain)


def _sum_of_all(x: Tensor) -> Tensor:
    return tower_sum(x.square().sum(0)).sin().sum()


TRANSFORMS = {
    "grad": (torch.func.grad(_sum_of_all), 1),
    "grad of grad": (torch.func.grad(lambda x: torch.func.grad(_sum_of_all)(x).square().sum()), 2),
    "vmap": (torch.vmap(torch.func.grad(_sum_of_all), in_dims=1, out_dims=1), 1),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_sum_over_towers_in_a_transform_of_torch_func_is_as_outside_of_it(name: str) -> None:
    transformed, order = TRANSFORMS[name]

    def by_autograd(x: Tensor) -> Tensor:
        value = _sum_of_all(x)
        for _ in range(order - 1):
            value = torch.autograd.grad(value, x, create_graph=True)[0].square().sum()
        return torch.autograd.grad(value, x, create_graph=True)[0]

    class Net(OneLayer):
        derive = staticmethod(by_autograd)

        def forward(self, x: Tensor) -> Tensor:
            return self.derive(self.fc(x))

    outside, inside = wrap(Net().double(), 3), wrap(Net().double(), 3)
    inside.module.load_state_dict(outside.module.state_dict())
    inside.module.derive = transformed  # type: ignore[assignment]
    for net in (outside, inside):
        net(batch(7)).square().sum().backward()
    torch.testing.assert_close(inside(batch(7)), outside(batch(7)), rtol=0, atol=0)
    assert_same_gradients(inside, outside.module)


def test_summands_that_differ_between_towers_are_named() -> None:
    class Net(nn.Module):
        def __init__(self, summands: list[Tensor]) -> None:
            super().__init__()
            self.summands = summands

        def forward(self, x: Tensor) -> Tensor:
            return x + tower_sum(self.summands[current_tower() or 0])

    for other in (torch.ones(3), torch.ones((), dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"tower_sum: expected tensors of one shape and dtype .*tower 1's"):
            wrap(Net([torch.ones(()), other]), 2)(batch(4))


def test_synchronised_batch_norm_with_an_idle_tower_and_a_single_row_names_the_trouble() -> None:
    wrapped = wrap(convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3))).double(), 2)
    with pytest.raises(ValueError, match="more than 1 value"):
        wrapped(batch(1))
    wrapped(batch(4))


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("silent", [0, 1])
def test_a_tower_of_weight_zero_still_hears_of_the_others_through_shared_statistics(
    num_towers: int, silent: int
) -> None:
    def loss_fn(net: Any, x: Tensor) -> tuple[Tensor, float]:
        tower = current_tower() or 0
        ignored = tower == silent and num_towers > 1
        labels = torch.full((len(x),), -100 if ignored else 1)  # the mean of no losses is not a number
        return F.cross_entropy(net(x), labels), 0.0 if ignored else 1.0

    plain = batch_norm_net()
    wrapped = wrap(convert_sync_batchnorm(copy.deepcopy(plain)), num_towers)
    rows = 4 * num_towers
    x, ours = batch(rows, requires_grad=True), batch(rows, requires_grad=True)
    heard = [r for r in range(rows) if r // 4 != silent or num_towers == 1]
    expected = F.cross_entropy(plain(x)[heard], torch.ones(len(heard), dtype=torch.int64))
    got = wrapped.tower_loss(loss_fn, ours)
    assert_close(got, expected)
    expected.backward()
    got.backward()
    assert_same_gradients(wrapped, plain, 1e-11)
    assert_close(ours.grad, x.grad, 1e-11)


def test_synchronised_batch_norm_takes_an_empty_batch() -> None:
    wrapped = wrap(convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()), 2)
    assert wrapped(batch(4)[:0]).shape == (0, 4)


def test_statistics_are_tracked_or_not_as_the_module_says_now() -> None:
    plain = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    wrapped = wrap(convert_sync_batchnorm(copy.deepcopy(plain)), 2)
    for tracks in (True, False, True):
        for inner in (plain, wrapped.module):
            inner[1].track_running_stats = tracks
        assert_close(wrapped(batch(7)), plain(batch(7)))
        assert_close(wrapped.module[1].running_var, plain[1].running_var)
        assert wrapped.module[1].num_batches_tracked == plain[1].num_batches_tracked


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("missing", [0, 11])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_inputs_of_some_towers_alone_may_need_gradients(num_towers: int, missing: int, style: str) -> None:
    class Filling(nn.Module):
        """Learns what to put where a row is missing."""

        def __init__(self) -> None:
            super().__init__()
            self.filling, self.norm = nn.Parameter(torch.ones(3)), nn.BatchNorm1d(3)
            self.head = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            gaps = x[:, :1].isnan()
            if gaps.any():
                x = torch.where(gaps, self.filling, x)
            y: Tensor = self.head(self.norm(x))
            return y

    plain, wrapped = twins(Filling(), num_towers)
    wrapped = wrap(convert_sync_batchnorm(wrapped.module), num_towers)
    x = batch(12)
    x[missing] = float("nan")
    for each in (plain, wrapped):
        loss_in(style, each, mean_of_squares_by, x).backward()
    assert_same_gradients(wrapped, plain)

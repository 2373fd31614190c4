"""Contract 5, "parallel for real": towers overlap in time, in threads of their own, as many at once as are wanted."""

from __future__ import annotations

import copy
import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    SEVERAL,
    STYLES,
    assert_close,
    assert_same_gradients,
    assert_trains_alike,
    batch,
    in_threads,
    loss_in,
    mean_of_squares_by,
    mlp,
    twins,
    wrap,
)
from tests.modules import calling
from torchtower import current_tower, tower_sum
from torchtower.replicas.replicate import Replica
from torchtower.threads.workers import TowerPool

_PATIENCE_S = 20


@pytest.mark.parametrize("num_towers", SEVERAL)
@pytest.mark.parametrize("style", STYLES)
def test_forwards_and_backwards_of_towers_overlap_in_time(num_towers: int, style: str) -> None:
    meetings = {phase: threading.Barrier(num_towers) for phase in ("forward", "backward")}
    net = calling(lambda phase: meetings[phase].wait(_PATIENCE_S))
    wrapped = wrap(net, num_towers, max_concurrency=num_towers)
    x = batch(2 * num_towers)
    for _ in range(2):
        loss_in(style, wrapped, mean_of_squares_by, x).backward()


def test_double_backward_overlaps_in_time() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, barrier: threading.Barrier) -> Tensor:
            ctx.barrier = barrier
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            ctx.barrier.wait(_PATIENCE_S)
            return Twice.apply(grad, ctx.barrier), None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.barrier = nn.Linear(3, 2).double(), threading.Barrier(2)

        def forward(self, x: Tensor) -> Tensor:
            return Twice.apply(self.fc(x).tanh(), self.barrier)

    x = batch(4, requires_grad=True)
    (grad,) = torch.autograd.grad(wrap(Net(), 2, max_concurrency=2)(x).sum(), x, create_graph=True)
    grad.square().sum().backward()


class Crowd(nn.Module):
    """Counts how many towers are inside at once."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.state = _Count()

    def forward(self, x: Tensor) -> Tensor:
        with self.state.entered():
            return self.fc(x)


class _Count:
    def __init__(self) -> None:
        self.lock, self.inside, self.most, self.order = threading.Lock(), 0, 0, []

    @contextmanager
    def entered(self) -> Iterator[None]:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.order.append(current_tower())
        threading.Event().wait(0.005)
        yield
        with self.lock:
            self.inside -= 1


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_max_concurrency_bounds_how_many_towers_work_at_once(at_once: int) -> None:
    net = Crowd().double()
    wrap(net, 6, max_concurrency=at_once)(batch(12))
    assert net.state.most <= at_once
    assert sorted(net.state.order) == list(range(6))


def test_one_at_a_time_goes_in_tower_order() -> None:
    net = Crowd().double()
    wrap(net, 5, max_concurrency=1)(batch(12))
    assert net.state.order == [0, 1, 2, 3, 4]


class MeetingCrowd(nn.Module):
    """Counts how many towers are inside at once, between meetings of all."""

    def __init__(self) -> None:
        super().__init__()
        self.state = _Count()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            with self.state.entered():
                x = x * 0.5
            x = x + tower_sum(x.sum())
        return x


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_max_concurrency_bounds_towers_that_have_met_too(at_once: int) -> None:
    net = MeetingCrowd()
    wrap(net, 6, max_concurrency=at_once)(batch(12))
    assert net.state.most <= at_once
    assert len(net.state.order) == 4 * 6


def test_one_at_a_time_goes_in_tower_order_from_meeting_to_meeting() -> None:
    net = MeetingCrowd()
    wrap(net, 5, max_concurrency=1)(batch(12))
    assert net.state.order == [0, 1, 2, 3, 4] * 4


@pytest.mark.parametrize("style", STYLES)
def test_max_concurrency_changes_no_bit(style: str) -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 8))
    x = torch.randn(37, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for at_once in (1, 2, 4):
        wrapped = wrap(copy.deepcopy(net), 4, max_concurrency=at_once)
        torch.manual_seed(0)
        for _ in range(3):
            loss_in(style, wrapped, mean_of_squares_by, x).backward()
        found.append([p.grad for p in wrapped.parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_same_towers_give_the_same_bits_in_every_run() -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(37, 32, generator=torch.Generator().manual_seed(0))
    wrapped = wrap(net, 4, max_concurrency=4)
    found = []
    for _ in range(5):
        wrapped.zero_grad()
        wrapped(x).square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for run in found[1:] for a, b in zip(run, found[0], strict=True))


@pytest.mark.parametrize("bad", [0, -1])
def test_a_max_concurrency_below_one_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=f"max_concurrency of at least 1, but got {bad}"):
        wrap(mlp(), 2, max_concurrency=bad)(batch(4))


def test_intra_op_threads_are_shared_out_and_the_callers_stay() -> None:
    seen = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return x

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        wrapped = wrap(Net(), 2)
        wrapped(batch(4))
        assert seen == [2, 2] and torch.get_num_threads() == 4
        seen.clear()
        torch.set_num_threads(1)
        wrapped(batch(4))
        assert seen == [1, 1] and torch.get_num_threads() == 1
        fresh: list[int] = []
        in_threads(lambda: fresh.append(torch.get_num_threads()))
        assert fresh == [1]
    finally:
        torch.set_num_threads(before)


def test_each_tower_keeps_its_own_thread_over_steps_forward_and_backward() -> None:
    seen: dict[str, set[tuple[int | None, int]]] = {"forward": set(), "backward": set()}

    wrapped = wrap(calling(lambda phase: seen[phase].add((current_tower(), threading.get_ident()))), 3)
    for _ in range(3):
        wrapped(batch(6)).sum().backward()
    assert seen["forward"] == seen["backward"] and len(seen["forward"]) == 3
    assert threading.get_ident() not in {ident for _, ident in seen["forward"]}


def test_outside_of_towers_there_is_no_current_tower() -> None:
    assert current_tower() is None
    seen = []
    net = nn.Identity()
    net.register_forward_hook(lambda *_: seen.append(current_tower()))
    wrap(net, 3)(batch(6))
    assert sorted(seen) == [0, 1, 2] and current_tower() is None


# ---- several threads, several wrappers


def test_the_wrapper_may_be_used_from_two_threads() -> None:
    plain, wrapped = twins(mlp(), 2)
    errors: list[BaseException] = []
    results: dict[int, list[Tensor]] = {}

    def use(which: int) -> None:
        try:
            for step in range(10):
                x = batch(5, seed=100 * which + step)
                grads = torch.autograd.grad(wrapped(x).square().sum(), list(wrapped.parameters()))
                results[100 * which + step] = list(grads)
        except BaseException as error:
            errors.append(error)

    in_threads(lambda: use(0), lambda: use(1))
    assert not errors and len(results) == 20
    for seed, grads in results.items():
        expected = torch.autograd.grad(plain(batch(5, seed=seed)).square().sum(), list(plain.parameters()))
        for got, want in zip(grads, expected, strict=True):
            assert_close(got, want)


def test_two_wrappers_may_be_used_from_two_threads() -> None:
    pairs = [twins(mlp(), 2), twins(mlp(), 3)]

    def use(wrapped: nn.Module) -> None:
        for step in range(5):
            wrapped(batch(7, seed=step)).square().sum().backward()

    in_threads(*[functools.partial(use, wrapped) for _, wrapped in pairs])
    for plain, wrapped in pairs:
        use(plain)
        assert_same_gradients(wrapped, plain)


def test_forward_in_one_thread_and_backward_in_another_work() -> None:
    plain, wrapped = twins(mlp(), 2)
    losses: list[Tensor] = []
    in_threads(lambda: losses.append(wrapped(batch(5)).square().sum()))
    losses[0].backward()
    plain(batch(5)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_replicas_never_follow_the_module_while_another_threads_backward_runs_in_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside = threading.Event()

    def pause(phase: str) -> None:
        if phase == "backward":  # where a checkpoint would use the replica's attributes
            inside.set()
            time.sleep(0.2)
            inside.clear()

    wrapped = wrap(calling(pause), 2)
    out = wrapped(batch(4)).sum()
    seen: list[bool] = []
    follow = Replica.follow

    def follow_and_look(self: Replica, *args: Any) -> None:
        seen.append(inside.is_set())
        follow(self, *args)

    monkeypatch.setattr(Replica, "follow", follow_and_look)
    backward = threading.Thread(target=out.backward)
    backward.start()
    assert inside.wait(10)
    wrapped(batch(4))
    backward.join()
    assert seen == [False, False]


def test_a_call_from_a_towers_own_forward_runs_in_that_tower() -> None:
    inner = wrap(nn.Linear(3, 2).double(), 2)
    assert_trains_alike(nn.Sequential(inner), 2, batch(5))


def test_a_tower_may_ask_for_a_refresh() -> None:
    wrapped = wrap(mlp(), 2)

    def loss_fn(net: nn.Module, x: Tensor) -> Tensor:
        wrapped.refresh()
        return net(x).mean()

    wrapped.tower_loss(loss_fn, batch(4)).backward()
    assert wrapped.module[0].weight.grad is not None


def test_a_forward_never_takes_the_gradients_of_another_threads_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def pause(phase: str) -> None:
        if phase == "backward":
            time.sleep(0.4)  # half of the gradients are there, half are not

    plain, wrapped = twins(nn.Sequential(calling(pause), nn.Linear(2, 2)), 2)
    plain(batch(4)).sum().backward()
    out = wrapped(batch(4)).sum()
    towers_done = threading.Event()
    run = TowerPool.run

    def run_and_wait(self: TowerPool, *args: Any, **options: Any) -> Any:
        results = run(self, *args, **options)
        if threading.current_thread() is forward:
            towers_done.set()
            time.sleep(0.2)  # a switch of threads right here, made certain
        return results

    monkeypatch.setattr(TowerPool, "run", run_and_wait)
    forward = threading.Thread(target=lambda: wrapped(batch(4)))
    forward.start()
    assert towers_done.wait(10)
    out.backward()
    forward.join()
    assert_same_gradients(wrapped, plain)

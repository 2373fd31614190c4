"""Contract 6: an error reaches the caller as it is, the next call works, nothing hangs."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import assert_go_backward_alike, assert_same_gradients, batch, mlp, twins, wrap
from tests.modules import OneLayer, calling
from torchtower import current_tower


class Failing(nn.Module):
    """Fails where and when it is told to."""

    def __init__(self, where: str, error: Any, towers: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.plan = {"where": where, "error": error, "towers": towers, "armed": True}
        self.fc.register_forward_pre_hook(lambda *_: self.fail("forward hook"))
        self.fc.register_full_backward_hook(lambda *_: self.fail("backward hook"))

    def fail(self, where: str) -> None:
        if self.plan["armed"] and where == self.plan["where"] and current_tower() in self.plan["towers"]:
            error = self.plan["error"]
            raise error if isinstance(error, BaseException) else error()

    def forward(self, x: Tensor) -> Tensor:
        self.fail("forward")
        return _FailInBackward.apply(self.fc(x), self)


class _FailInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, net: Failing) -> Tensor:
        ctx.net = net
        net.fail("function forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.net.fail("backward")
        return grad, None


class OwnError(Exception):
    """Of the user's making, with a constructor of its own."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(code, detail)
        self.code, self.detail = code, detail


PLACES = ["forward", "function forward", "forward hook", "backward", "backward hook"]
ERRORS: list[Callable[[], BaseException]] = [
    lambda: ValueError("told to fail"),
    lambda: KeyError("wonderful"),
    lambda: torch.OutOfMemoryError("told to fail"),
    lambda: OwnError(7, detail="told to fail"),
    lambda: StopIteration("told to fail"),
    lambda: AssertionError("told to fail"),
    lambda: ImportError("told to fail"),
]


def run(wrapped: nn.Module) -> None:
    wrapped(batch(6, requires_grad=True)).square().sum().backward()


def words_of(error: BaseException) -> str:
    return " ".join([str(error), *getattr(error, "__notes__", [])])


@pytest.mark.parametrize("make", ERRORS)
@pytest.mark.parametrize("where", PLACES)
def test_an_error_reaches_the_caller_with_its_type_words_and_tower(where: str, make: Any) -> None:
    error = make()
    wrapped = wrap(Failing(where, error).double(), 2)
    with pytest.raises(type(error)) as caught:
        run(wrapped)
    assert "in tower 1 on device cpu" in words_of(caught.value)
    if isinstance(error, OwnError):
        assert caught.value.code == 7 and caught.value.detail == "told to fail"
    names = [entry.name for entry in caught.traceback]
    assert "fail" in names, names


@pytest.mark.parametrize("where", PLACES)
def test_the_next_call_after_an_error_works_and_leaves_no_gradient_behind(where: str) -> None:
    net = Failing(where, ValueError("told to fail")).double()
    wrapped = wrap(net, 3)
    for _ in range(2):
        with pytest.raises(ValueError, match="told to fail"):
            run(wrapped)
        assert net.fc.weight.grad is None
    net.plan["armed"] = False
    run(wrapped)
    plain = Failing(where, ValueError(), towers=()).double()
    plain.load_state_dict(net.state_dict())
    run(plain)
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("same", [False, True], ids=["own_errors", "one_error_object"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_first_failing_tower_is_named_alone(where: str, same: bool) -> None:
    make = ValueError("told to fail") if same else lambda: ValueError("told to fail")
    wrapped = wrap(Failing(where, make, towers=(1, 2)).double(), 4)
    with pytest.raises(ValueError, match="in tower 1 on device cpu") as caught:
        run(wrapped)
    assert "in tower 2" not in str(caught.value)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_all_other_towers_have_finished_when_the_error_arrives(where: str) -> None:
    finished: list[int | None] = []

    def fail_or_finish(phase: str) -> None:
        if phase == where:
            if current_tower() == 0:
                raise ValueError("told to fail")
            time.sleep(0.05)
            finished.append(current_tower())

    with pytest.raises(ValueError, match="tower 0"):
        run(wrap(calling(fail_or_finish), 3, max_concurrency=3))
    assert sorted(finished) == [1, 2]


def test_an_error_in_tower_loss_is_told_the_same_way() -> None:
    def loss_fn(net: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("told to fail")

    with pytest.raises(RuntimeError, match=r"told to fail \(in tower 0 on device cpu\)"):
        wrap(mlp(), 2).tower_loss(loss_fn, batch(4))


def test_an_error_of_a_running_backward_leaves_the_graph_usable_by_a_new_forward() -> None:
    plain, wrapped = twins(mlp(), 2)
    loss = wrapped(batch(4)).square().sum()
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()
    wrapped.zero_grad()
    assert_go_backward_alike(plain, wrapped, batch(5))


def test_errors_do_not_keep_the_users_tensors_alive() -> None:
    net = Failing("forward", ValueError("told to fail")).double()
    wrapped = wrap(net, 2)
    x = batch(6)
    alive = weakref.ref(x)
    try:
        wrapped(x)
    except ValueError as error:
        error.__traceback__ = None
    net.plan = {}
    del x
    gc.collect()
    assert alive() is None


def test_what_a_failed_backward_has_not_come_to_is_dropped() -> None:
    contexts = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            contexts.append(weakref.ref(ctx))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            last = self.fc(Noted.apply(x)), self.fc(x)
            last[1].register_hook(fail)
            return last[0] + last[1]

    def fail(grad: Tensor) -> None:
        raise ArithmeticError

    wrapped = wrap(Net().double(), 3)
    with pytest.raises(ArithmeticError):
        wrapped(batch(6, requires_grad=True)).sum().backward()
    gc.collect()
    assert len(contexts) == 3 and not any(context() for context in contexts)


def test_one_tower_raises_the_modules_own_error() -> None:
    error = ValueError("told to fail")
    with pytest.raises(ValueError, match="told to fail") as caught:
        wrap(Failing("forward", error, towers=(None,)).double(), 1)(batch(3))
    assert caught.value is error


def test_a_towers_error_tells_how_the_batch_was_split() -> None:
    class Weighted(nn.Module):
        def forward(self, logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels, weight)

    wrapped = wrap(Weighted(), 2)
    arguments = (torch.randn(5, 3), torch.zeros(5, dtype=torch.long), torch.ones(3))
    with pytest.raises(RuntimeError, match="weight tensor") as caught:
        wrapped(*arguments)
    (note,) = caught.value.__notes__
    assert "(5, 3) into [3, 2], (5,) into [3, 2], (3,) into [2, 1]" in note


def test_an_error_on_a_batch_that_was_not_split_has_no_note() -> None:
    wrapped = wrap(Failing("forward", ValueError, towers=(0,)).double(), 2)
    with pytest.raises(ValueError) as caught:
        wrapped(batch(1))
    assert not any("split" in note for note in getattr(caught.value, "__notes__", ()))


def test_a_keyboard_interrupt_raised_in_a_tower_reaches_the_caller() -> None:
    wrapped = wrap(Failing("forward", KeyboardInterrupt(), towers=(1,)).double(), 2)
    with pytest.raises(KeyboardInterrupt):
        run(wrapped)
    wrapped.module.plan["armed"] = False
    run(wrapped)


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Refuses whatever is added to it."""

    message: str


class MisprintedError(Exception):
    def __str__(self) -> str:
        return "{} at {}".format(*self.args)


@pytest.mark.parametrize("error", [FrozenError("told to fail"), MisprintedError("alone")])
def test_an_error_that_nothing_can_be_added_to_is_raised_as_it_is(error: Exception) -> None:
    net = Failing("forward", error).double()
    wrapped = wrap(net, 2)
    with pytest.raises(type(error)) as caught:
        run(wrapped)
    assert caught.value is error
    net.plan["armed"] = False
    done = threading.Thread(target=run, args=(wrapped,), daemon=True)
    done.start()
    done.join(timeout=30)
    assert not done.is_alive()


def test_an_error_object_that_is_raised_again_names_the_tower_that_raised_it_last() -> None:
    error = ValueError("told to fail (in a way)")

    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if current_tower() == self.tower:
                raise error
            return x

    module = Bad()
    wrapped = wrap(module, 2)
    for tower in (0, 1, 0):
        module.tower = tower
        with pytest.raises(ValueError) as caught:
            wrapped(batch(4))
        assert str(caught.value) == f"told to fail (in a way) (in tower {tower} on device cpu)"


def test_an_error_object_raised_again_keeps_its_own_notes_and_names_the_last_tower_alone() -> None:
    error = OSError(2, "no such file")
    error.add_note("of the first shard")
    error.add_note("of the second shard")

    class Net(nn.Module):
        failing = 0

        def forward(self, x: Tensor) -> Tensor:
            if current_tower() == Net.failing:
                raise error
            return x

    wrapped = wrap(Net(), 3)
    for Net.failing in (2, 0, 1):
        with pytest.raises(OSError, match="no such file"):
            wrapped(batch(6))
        own, (told, tower) = error.__notes__[:2], error.__notes__[2:]
        assert own == ["of the first shard", "of the second shard"]
        assert sorted([told.split()[0], tower.split()[0]]) == ["TowerParallel", "in"]
        assert f"in tower {Net.failing} on device cpu" in (told, tower)


def test_an_error_without_words_names_its_tower_in_a_note() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    with pytest.raises(ValueError) as caught:
        wrap(Net(), 2)(batch(4))
    assert "in tower 0 on device cpu" in caught.value.__notes__


@pytest.mark.parametrize("failing", [0, 1])
def test_a_tower_that_cannot_begin_is_named_and_the_next_call_works(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, wrapped = twins(mlp(), 2)

    def make_last_node() -> None:
        if threading.current_thread().name == f"torchtower tower {failing}":
            raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patched:
        patched.setattr("torchtower.threads.workers.make_last_node", make_last_node)
        with pytest.raises(torch.OutOfMemoryError, match=rf"no memory left \(in tower {failing} on device cpu\)"):
            wrapped(batch(4))
    assert_go_backward_alike(plain, wrapped, batch(4))

"""Parts of the module that are passed to its forward are each tower's own; those that it returns are the user's."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import EVERY_COUNT, SEVERAL, assert_close, assert_same_gradients, batch, twins


class Headed(nn.Module):
    """Has two heads, and applies what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.other = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.table = nn.Parameter(torch.randn(4, 2))

    def through_head(self, h: Tensor) -> Tensor:
        y: Tensor = self.head(h).tanh()
        return y

    def forward(self, x: Tensor, how: Any) -> Tensor:
        while isinstance(how, (list, dict)):
            how = next(iter(how.values() if isinstance(how, dict) else how))
        y: Tensor = self.other(self.body(x)) * how(self.body(x))
        return y


WAYS: list[Callable[[Headed], Any]] = [
    lambda net: net.head,
    lambda net: {"head": [net.head]},
    lambda net: net.head.forward,
    lambda net: net.through_head,
    lambda net: lambda h: net.head(h).sin(),
    lambda net: functools.partial(F.linear, weight=net.head.weight),
    lambda net: net.table.__rmatmul__,
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_part_of_the_module_as_an_argument_is_trained_as_in_the_plain_module(num_towers: int, way: Any) -> None:
    plain, wrapped = twins(Headed(), num_towers)
    x = batch(9)
    for style in ("backward", "grad", "double"):
        grads = []
        for net, inner in ((plain, plain), (wrapped, wrapped.module)):
            loss = net(x, way(inner)).square().sum()  # type: ignore[operator]
            if style == "backward":
                loss.backward()
                continue
            parameters = list(inner.parameters())
            found = torch.autograd.grad(loss, parameters, create_graph=style == "double", allow_unused=True)
            if style == "double":
                sum(grad.square().sum() for grad in found if grad is not None).backward()  # type: ignore[union-attr]
            grads.append(found)
        assert_same_gradients(wrapped, plain)
        for expected, got in zip(*grads, strict=True) if grads else ():
            assert_close(got, expected)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_tower_loss_may_be_given_a_part_of_the_module(num_towers: int) -> None:
    plain, wrapped = twins(Headed(), num_towers)
    x = batch(9)
    plain(x, plain.head).square().mean().backward()
    wrapped.tower_loss(lambda net, x, head: net(x, head).square().mean(), x, wrapped.module.head).backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_module_beside_and_a_function_of_the_users_are_passed_as_they_are(num_towers: int) -> None:
    seen: list[Any] = []
    beside = nn.Linear(4, 2).double()

    def how(h: Tensor) -> Tensor:
        seen.append(beside)
        y: Tensor = beside(h)
        return y

    plain, wrapped = twins(Headed(), num_towers)
    for passed in (beside, how):
        assert_close(wrapped(batch(9), passed), plain(batch(9), passed))
    assert len(seen) == num_towers + 1 and all(module is beside for module in seen)


class Returning(nn.Module):
    """Returns a part of itself beside an output."""

    def __init__(self, way: Callable[[Any], Any]) -> None:
        super().__init__()
        self.fc, self.probe = nn.Linear(3, 2), nn.Linear(2, 2)
        self.way = way

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.fc(x), self.way(self)


@pytest.mark.parametrize(
    "way", [lambda net: net.probe, lambda net: lambda h: net.probe(h), lambda net: net.probe.forward]
)
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_part_of_the_module_that_it_returns_is_the_users(num_towers: int, way: Any) -> None:
    plain, wrapped = twins(Returning(way), num_towers)
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        for detached in (True, False):
            h, probe = net(batch(9))
            assert probe is inner.probe or not isinstance(probe, nn.Module)
            probe(h.detach() if detached else h).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_module_returns_itself(num_towers: int) -> None:
    _, wrapped = twins(Returning(lambda net: {"self": net}), num_towers)
    assert wrapped(batch(9))[1]["self"] is wrapped.module


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_what_a_callback_writes_is_the_users(num_towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor, callback: Callable[[Tensor], None]) -> Tensor:
            y: Tensor = self.fc(x)
            callback(y)
            return y

    @dataclasses.dataclass
    class Trainer:
        net: nn.Module
        calls: list[int] = dataclasses.field(default_factory=list)

        def note(self, y: Tensor) -> None:
            self.calls.append(len(y))

    _, wrapped = twins(Net(), num_towers)
    trainer = Trainer(wrapped.module)
    context: dict[str, Any] = {"net": wrapped.module, "calls": []}
    wrapped(batch(9), trainer.note)
    wrapped(batch(9), lambda y: context["calls"].append(len(y)))
    assert sum(trainer.calls) == 9 and sum(context["calls"]) == 9
    data = torch.zeros(1000)
    alive = weakref.ref(data)
    wrapped(batch(9), lambda y, data=data, net=wrapped.module: None)
    del data
    gc.collect()
    assert alive() is None


def test_a_function_beside_a_part_of_the_module_counts_in_the_users_list_however_deep() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
            return call(x)

    plain, wrapped = twins(Net(), 2, max_concurrency=1)
    fc, counted = wrapped.module.fc, [[wrapped.module.fc, 0]]

    def call(x: Tensor) -> Tensor:
        counted[0][1] += len(x)
        y: Tensor = fc(x)
        return y

    for out in (wrapped(batch(9), call), plain(batch(9), plain.fc)):
        out.square().sum().backward()
    assert counted[0][0] is fc and counted[0][1] == 9
    assert_same_gradients(wrapped, plain)

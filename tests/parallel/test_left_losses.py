"""Losses and outputs that a forward leaves in its module train as in the plain module, whatever holds them."""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import EVERY_COUNT, assert_close, assert_same_gradients, batch, twins, wrap
from tests.modules import AuxiliaryLoss, OneLayer


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_an_auxiliary_loss_left_in_an_attribute_trains_through_the_main_tower(num_towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.trunk(x).tanh()
            self.auxiliary = hidden.square().mean()
            return self.head(hidden)

    plain, wrapped = twins(Net(), num_towers)
    x = batch(3 * num_towers)
    for step in range(2):
        plain(x[:3])
        auxiliary = plain.auxiliary
        (plain(x).square().mean() + auxiliary).backward()
        (wrapped(x).square().mean() + wrapped.module.auxiliary).backward()
        assert_same_gradients(wrapped, plain)
        assert wrapped.module.auxiliary.requires_grad, step


def test_an_auxiliary_loss_in_tower_loss_carries_its_full_weight() -> None:
    plain, wrapped = twins(AuxiliaryLoss(), 2)
    x = batch(6)
    loss = wrapped.tower_loss(lambda net, x: net(x).mean(), x)
    (loss + wrapped.module.auxiliary).backward()
    (plain(x).mean() + plain.fc(x[:3]).square().mean()).backward()
    assert_same_gradients(wrapped, plain)


class Result(OrderedDict[str, Any]):
    """As the model outputs of transformers: entries are attributes, too."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)


class Losses(list[Tensor]):
    pass


class State:
    def __init__(self, loss: Any) -> None:
        self.loss = loss


class Uncopied(State):
    def __copy__(self) -> State:
        raise TypeError("one of a kind")


@pytest.mark.parametrize(
    ("put", "get"),
    [
        (lambda loss: [loss], lambda kept: kept[0]),
        (lambda loss: (1, [loss]), lambda kept: kept[1][0]),
        (lambda loss: {loss}, lambda kept: next(iter(kept))),
        (lambda loss: deque([loss], maxlen=3), lambda kept: kept[0]),
        (lambda loss: defaultdict(list, losses=[deque([loss])]), lambda kept: kept["losses"][0][0]),
        (lambda loss: Result(loss=loss), lambda kept: kept["loss"]),
        (lambda loss: Result(loss=loss), lambda kept: kept.loss),
        (lambda loss: Losses([loss]), lambda kept: kept[0]),
        (State, lambda kept: kept.loss),
        (lambda loss: State([State((loss, 1))]), lambda kept: kept.loss[0].loss[0]),
        (lambda loss: functools.partial(torch.mul, loss), lambda kept: kept(1.0)),
        (lambda loss: lambda: loss, lambda kept: kept()),
    ],
)
def test_a_loss_left_in_an_attribute_trains_in_whatever_it_is_kept(
    put: Callable[[Tensor], Any], get: Callable[[Any], Tensor]
) -> None:
    class Net(OneLayer):
        kept = None

        def forward(self, x: Tensor) -> Tensor:
            self.kept = put(self.fc(x).square().mean())
            return self.fc(x)

    plain, wrapped = twins(Net(), 2)
    x = batch(6)
    for _ in range(2):
        (wrapped(x).sum() + get(wrapped.module.kept)).backward()
        (plain(x).sum() + plain.fc(x[:3]).square().mean()).backward()
        assert_same_gradients(wrapped, plain)


def test_an_object_that_will_not_be_copied_is_kept_as_it_is() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = Uncopied(self.fc(x))
            return self.fc(x)

    wrapped = wrap(Net().double(), 2)
    wrapped(batch(4)).sum().backward()
    assert isinstance(wrapped.module.kept, Uncopied)


def test_the_last_outputs_kept_in_a_deque_are_those_of_the_last_forwards() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "last"):
                self.last = deque(maxlen=2)
            out = self.fc(x)
            self.last.append(out)
            return out

    plain, wrapped = twins(Net(), 2)
    before: list[Tensor] = []
    for seed in range(4):
        x = batch(4, seed=seed)
        wrapped(x).sum().backward()
        plain(x).sum().backward()
        last = list(wrapped.module.last)
        assert all(map(operator.is_, last[:-1], before[-1:])), "what stays is the same, with its own graph alone"
        before = last
    assert_same_gradients(wrapped, plain)
    for got, expected in zip(wrapped.module.last, plain.last, strict=True):
        assert_close(got, expected[:2])


class Gate(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        self.aux = (weight * 0.5).sum()
        return x


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_loss_in_a_module_that_the_forward_makes_has_gradients_at_once(num_towers: int) -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            out = self.fc(x)
            if not hasattr(self, "gate"):
                self.gate = nn.Sequential(Gate())
            result: Tensor = self.gate[0](out, self.fc.weight)
            return result

    plain, wrapped = twins(Net(), num_towers)
    for step in range(3):
        for net, inner in ((plain, plain), (wrapped, wrapped.module)):
            net.zero_grad()
            (net(batch(8, seed=step)).square().sum() + inner.gate[0].aux).backward()
        assert_same_gradients(wrapped, plain)


def test_an_auxiliary_loss_trains_where_the_output_holds_no_tensor() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> str:
            self.auxiliary = self.fc(x).square().mean()
            return "done"

    plain, wrapped = twins(Net(), 2)
    x = batch(6)
    assert wrapped(x) == "done"
    wrapped.module.auxiliary.backward()
    plain(x[:3])
    plain.auxiliary.backward()
    assert_same_gradients(wrapped, plain)

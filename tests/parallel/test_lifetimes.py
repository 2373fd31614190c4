"""What lives how long: nothing of a call or of a replaced part outlives the user's last reference to it."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import EVERY_COUNT, SEVERAL, batch, mlp, wrap
from tests.modules import OneLayer


@pytest.fixture(autouse=True)
def _without_the_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_step_makes_no_reference_cycles() -> None:
    wrapped = wrap(mlp(), 2)
    wrapped(batch(4)).sum().backward()
    gc.collect()
    out = wrapped(batch(4, requires_grad=True))
    alive = weakref.ref(out)
    del out
    assert alive() is None
    wrapped(batch(4)).square().sum().backward()
    assert gc.collect() == 0


def test_a_step_that_leaves_something_behind_makes_no_reference_cycles() -> None:
    kept: list[Tensor] = []

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.fc(x)
            self.aux, self.pair = hidden.square().mean(), (1, [hidden])
            return hidden

    wrapped = wrap(Net().double(), 2)
    wrapped.module.fc.register_forward_hook(lambda module, args, out: kept.append(out))
    alive = []
    for _ in range(3):
        kept.clear()
        (wrapped(batch(4)).sum() + wrapped.module.aux + sum(out.sum() for out in kept)).backward()
        alive += [weakref.ref(wrapped.module.aux), *map(weakref.ref, kept)]
    kept.clear()
    wrapped.module.aux = wrapped.module.pair = None
    wrapped(batch(4))
    assert len(alive) == 9 and not any(reference() is not None for reference in alive)


def test_inputs_outputs_and_graphs_die_with_the_users_last_reference() -> None:
    saved: list[weakref.ref[Tensor]] = []

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.fc(x)
            saved.append(weakref.ref(hidden))
            return hidden.tanh()

    wrapped = wrap(Net().double(), 2)
    x = batch(4)
    out = wrapped(x)
    references = [weakref.ref(x), weakref.ref(out)]
    del x, out
    assert all(reference() is None for reference in references + saved)
    loss = wrapped(batch(4)).sum()
    loss.backward()
    assert all(reference() is None for reference in saved)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise torch.OutOfMemoryError("no memory left")


class Hungry(nn.Module):
    """Runs out of memory in its forward or its backward; remembers, weakly, what it had computed by then."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2).double()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x).exp()
        COMPUTED.append(weakref.ref(hidden))
        if self.where == "forward":
            raise torch.OutOfMemoryError("no memory left")
        out: Tensor = Fails.apply(hidden * hidden)  # type: ignore[no-untyped-call]
        return out


COMPUTED: list[Any] = []


@pytest.mark.parametrize("towers", EVERY_COUNT)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failed_call_keeps_nothing_for_the_retry_with_a_smaller_batch(where: str, towers: int) -> None:
    wrapped = wrap(Hungry(where), towers)
    COMPUTED.clear()
    try:
        wrapped(batch(8)).sum().backward()
    except torch.OutOfMemoryError:
        pass
    else:
        pytest.fail("expected the forward or backward to fail")
    assert len(COMPUTED) == towers
    assert [ref for ref in COMPUTED if ref() is not None] == []


@pytest.mark.parametrize("towers", EVERY_COUNT)
def test_a_loss_that_is_kept_keeps_neither_batch_nor_outputs(towers: int) -> None:
    seen: list[Any] = []

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x)
            seen.extend([weakref.ref(x.untyped_storage()), weakref.ref(out.untyped_storage())])
            return out

    wrapped = wrap(Net().double(), towers)
    loss = wrapped(batch(8)).square().sum()
    loss.backward()
    assert len(seen) == 2 * towers and [ref for ref in seen if ref() is not None] == []
    assert loss.grad_fn is not None


@pytest.mark.parametrize("towers", SEVERAL)
def test_joined_outputs_do_not_keep_the_towers_own_before_the_backward(towers: int) -> None:
    own: list[Any] = []

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x)
            own.append(weakref.ref(out.untyped_storage()))
            return out

    out = wrap(Net().double(), towers)(batch(8))
    assert len(own) == towers and [ref for ref in own if ref() is not None] == []
    out.sum().backward()


@pytest.mark.parametrize("towers", EVERY_COUNT)
def test_a_replaced_submodule_goes(towers: int) -> None:
    net = mlp()
    wrapped = wrap(net, towers)
    replaced = []
    for _ in range(5):
        wrapped(batch(8)).sum().backward()
        replaced.append(weakref.ref(net[2].weight))
        net[2] = nn.Linear(5, 2).double()
    wrapped(batch(8))
    gc.collect()
    assert [ref for ref in replaced if ref() is not None] == []


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_dataclass_in_an_attribute_goes_when_a_forward_puts_another_there(num_towers: int) -> None:
    @dataclasses.dataclass
    class Last:
        out: Tensor

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            self.last = Last(self.fc(x))
            return self.last.out

    wrapped = wrap(Net().double(), num_towers)
    seen = []
    for _ in range(10):
        wrapped(batch(2 * num_towers)).sum().backward()
        seen.append(weakref.ref(wrapped.module.last))
    assert sum(last() is not None for last in seen) <= 2


def test_a_class_of_loss_functions_goes() -> None:
    wrapped = wrap(mlp(), 2)

    def train() -> Any:
        class Loss:
            def __call__(self, net: nn.Module, x: Tensor) -> Tensor:
                return net(x).sum()

        wrapped.tower_loss(Loss(), batch(4)).backward()
        return weakref.ref(Loss)

    kept = train()
    gc.collect()
    assert kept() is None

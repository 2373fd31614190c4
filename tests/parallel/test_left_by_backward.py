"""What a backward leaves in its module is the main tower's, and goes on from what the forward has left."""

from __future__ import annotations

import dataclasses
import operator
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, weight_norm

from tests.helpers import EVERY_COUNT, SEVERAL, assert_close, assert_same_gradients, batch, take_steps, twins, wrap
from tests.modules import OneLayer


class RemembersGradients(nn.Module):
    """Keeps what Grad-CAM needs, by a tensor's hook, and counts by a module's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.gradient: Tensor | None = None
        self.seen = 0
        self.second.register_full_backward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.seen += 1

    def _keep(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if hidden.requires_grad:
            hidden.register_hook(self._keep)
        return self.second(hidden).tanh()


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_the_main_towers_backward_assigns_to_attributes_is_kept(num_towers: int) -> None:
    plain, wrapped = twins(RemembersGradients(), num_towers)
    net = wrapped.module
    x = batch(4 * num_towers)
    for count in (1, 2, 3):
        plain(x).sum().backward()
        wrapped(x).sum().backward()
        assert net.seen == plain.seen == count
        assert_close(net.gradient, plain.gradient[:4])


class Pending(OneLayer):
    """Its backward undoes what its forward does."""

    def __init__(self) -> None:
        super().__init__()
        self.pending, self.kept, self.stack = False, None, [0]

    def forward(self, x: Tensor) -> Tensor:
        assert not self.pending
        self.pending, self.kept = True, x
        self.stack.append(1)
        out: Tensor = self.fc(x)
        out.register_hook(self._done)
        return out

    def _done(self, _: Tensor) -> None:
        self.pending, self.kept = False, None
        self.stack.pop()


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_a_backward_puts_back_is_back(num_towers: int) -> None:
    plain, wrapped = twins(Pending(), num_towers)
    for step in range(3):
        for net in (plain, wrapped):
            out = net(batch(8, seed=step))
            assert getattr(net, "module", net).stack == [0, 1]
            out.sum().backward()
        assert (wrapped.module.pending, wrapped.module.kept, wrapped.module.stack) == (False, None, [0])
    assert_same_gradients(wrapped, plain)


class Cam(OneLayer):
    """Keeps an activation in the forward, and beside it what the backward finds."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Any] = {}
        self.fc.register_full_backward_hook(self._keep)

    def _keep(self, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        self.cache["gradient"] = grad_output[0]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        self.cache = {"out": out}
        return out


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_backward_may_write_into_what_the_forward_has_just_made(num_towers: int) -> None:
    wrapped = wrap(Cam().double(), num_towers)
    for _ in range(3):
        wrapped(batch(8, requires_grad=True)).square().sum().backward()
        cache = wrapped.module.cache
        assert list(cache) == ["out", "gradient"]
        assert_close(cache["gradient"], 2 * cache["out"][: len(cache["gradient"])])


@pytest.mark.parametrize("pre", [True, False])
def test_full_backward_hooks_lead_to_nothing_that_the_outputs_do_not_depend_on(pre: bool) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(3, 2)

    plain, wrapped = twins(Net(), 2)
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        prune.l1_unstructured(inner.unused, "weight", amount=0.5)
        (inner.fc.register_full_backward_pre_hook if pre else inner.fc.register_full_backward_hook)(lambda *_: None)
        take_steps(net, torch.optim.SGD(net.parameters(), lr=0.1), lambda step: batch(8, requires_grad=True), steps=3)
    assert_same_gradients(wrapped, plain)


class LooksItselfUp(OneLayer):
    """Finds itself in a table of its own in its backward, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.table["net"] = self
        out: Tensor = torch.utils.checkpoint.checkpoint(lambda x: self.table["net"].fc(x), x, use_reentrant=True)
        return out


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_a_forward_puts_into_an_empty_container_leads_its_backward_to_the_towers_own(num_towers: int) -> None:
    plain, wrapped = twins(LooksItselfUp(), num_towers)
    for step in range(3):
        x = batch(8, seed=step, requires_grad=True)
        for net in (plain, wrapped):
            net.zero_grad()
        plain(x).square().mean().backward()
        wrapped.tower_loss(lambda replica, x: replica(x).square().mean(), x).backward()
        assert_same_gradients(wrapped, plain)
        assert wrapped.module.table == {"net": wrapped.module}


def test_an_attribute_that_the_user_changes_between_forward_and_backward_reaches_the_towers() -> None:
    net = RemembersGradients().double()
    wrapped = wrap(net, 2)
    seen = []
    net.second.scale = 1.0
    net.second.register_forward_hook(lambda module, *_: seen.append(module.scale))
    out = wrapped(batch(4))
    net.second.scale = 2.0
    out.sum().backward()
    wrapped(batch(4))
    assert seen == [1.0, 1.0, 2.0, 2.0] and net.seen == 1


def test_gradients_with_a_graph_stay_with_the_towers() -> None:
    net = RemembersGradients().double()
    wrapped = wrap(net, 2)
    x = batch(4).requires_grad_()
    (gradient,) = torch.autograd.grad(wrapped(x).sum(), x, create_graph=True)
    assert net.gradient is None and net.seen == 1
    gradient.pow(2).sum().backward()
    assert net.gradient is not None and net.gradient.grad_fn is None


def test_what_a_failing_backward_has_assigned_is_kept_as_in_the_plain_module() -> None:
    def fail(*_: Any) -> None:
        raise ValueError("enough")

    plain, wrapped = twins(RemembersGradients(), 2)
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        handle = inner.first.register_full_backward_hook(fail)
        with pytest.raises(ValueError, match="enough"):
            net(batch(8, requires_grad=True)).sum().backward()
        assert inner.seen == 1
        handle.remove()
        net(batch(8)).sum().backward()
        assert inner.seen == 2
    assert_close(wrapped.module.gradient, plain.gradient[:4])


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("reparametrize", [weight_norm, lambda fc: prune.l1_unstructured(fc, "weight", 0.5)])
def test_a_hook_may_leave_a_module_whose_weight_is_computed(reparametrize: Any, num_towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.last: Any = None
            self.first = reparametrize(nn.Linear(3, 3))
            for layer in (self.fc, self.first):
                layer.register_full_backward_hook(self._keep)

        def _keep(self, module: nn.Module, *_: Any) -> None:
            self.last = module

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(self.first(x))
            return out

    net = Net().double()
    wrapped = wrap(net, num_towers)
    for _ in range(2):
        net.last = None
        wrapped(batch(6, requires_grad=True)).sum().backward()
        assert net.last is net.first


@dataclasses.dataclass(eq=False)
class Call:
    layer: Any
    grad: Any


def _entry(call: Any, name: str) -> Any:
    return call[name] if isinstance(call, dict) else getattr(call, name)


def _fill(call: Any, name: str, value: Any) -> None:
    (operator.setitem if isinstance(call, dict) else setattr)(call, name, value)


PUTS: dict[str, Callable[[Any, Any], None]] = {
    "into a list": lambda net, call: net.calls.append(call),
    "into a dict": lambda net, call: net.by_number.update({len(net.by_number): call}),
    "nested in a dict": lambda net, call: net.by_number.update({len(net.by_number): ({"calls": [call]},)}),
    "nested in a new list": lambda net, call: setattr(net, "calls", [*net.calls, call]),
    "nested in a new record": lambda net, call: setattr(net, "last", types.SimpleNamespace(call=call, before=net.last)),
}


class Records(OneLayer):
    """A forward hook makes a record of each call, and a backward hook fills in what it finds."""

    def __init__(self, make: Callable[[Any, Tensor], Any], put: str) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.make, self.put = make, PUTS[put]
        self.calls: list[Any] = []
        self.by_number: dict[int, Any] = {}
        self.last: Any = None
        self.pending: list[Any] = []
        for layer in (self.first, self.fc):
            layer.register_forward_hook(self._note)
            layer.register_full_backward_hook(self._complete)

    def _note(self, layer: Any, _: Any, out: Tensor) -> None:
        call = self.make(layer, out)
        self.put(self, call)
        self.pending.append(call)

    def _complete(self, _: nn.Module, grad_input: Any, grad_output: Any) -> None:
        _fill(self.pending.pop(), "grad", grad_output[0])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.first(x))
        return out

    def found(self) -> list[Any]:
        if self.last is not None:
            return [self.last.before.call, self.last.call]
        return self.calls or [c[0]["calls"][0] if isinstance(c, tuple) else c for c in self.by_number.values()]


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("put", PUTS)
@pytest.mark.parametrize(
    "make",
    [
        lambda layer, out: {"layer": layer, "grad": None},
        lambda layer, out: {"layer": (layer.weight,), "out": out, "grad": None},
        lambda layer, out: types.SimpleNamespace(layer=layer, grad=None),
        lambda layer, out: Call([out], None),
    ],
)
def test_a_backward_fills_the_records_that_its_forward_has_made(make: Any, put: str, num_towers: int) -> None:
    plain, wrapped = twins(Records(make, put), num_towers)
    net = wrapped.module
    x = batch(2 * num_towers)
    plain(x[:2].requires_grad_()).sum().backward()
    wrapped(x.requires_grad_()).sum().backward()
    assert net.pending == plain.pending == []
    assert len(net.found()) == len(plain.found()) == 2
    for layer, got, expected in zip((net.first, net.fc), net.found(), plain.found(), strict=True):
        assert_close(_entry(got, "grad"), _entry(expected, "grad"))
        of = _entry(got, "layer")
        assert of is layer or of[0] is layer.weight or of[0].grad_fn is not None


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_record_under_two_names_stays_one(num_towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []
            self.last = self.best = self.worst = None
            self.fc.register_full_backward_hook(self._complete)

        def _complete(self, *_: Any) -> None:
            self.last["grad"] = 1
            self.best, self.worst = self.last, [self.last]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x)
            self.last = {"layer": self.fc, "out": out, "grad": None}
            self.calls.append(self.last)
            return out

    net = Net().double()
    wrapped = wrap(net, num_towers)
    for count in (1, 2):
        wrapped(batch(6, requires_grad=True)).sum().backward()
        assert net.last["layer"] is net.fc and net.last["grad"] == 1
        assert net.last is net.best is net.worst[0] is net.calls[-1] and len(net.calls) == count


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_second_backward_goes_on_from_what_the_first_has_made(num_towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.log: Any = None
            self.fc.register_full_backward_hook(self._count)

        def _count(self, layer: nn.Module, *_: Any) -> None:
            if self.log is None:
                self.log = {"layer": layer, "inner": [{"layer": layer, "count": 0}]}
            self.log["inner"][0]["count"] += 1

    net = Net().double()
    wrapped = wrap(net, num_towers)
    loss = wrapped(batch(6, requires_grad=True)).sum()
    for count in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert net.log == {"layer": net.fc, "inner": [{"layer": net.fc, "count": count}]}

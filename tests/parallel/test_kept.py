"""What a module holds with a graph is part of the user's graph, whatever holds it there."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.containers import Box
from tests.helpers import EVERY_COUNT, SEVERAL, assert_close, assert_same_gradients, batch, mlp, twins, wrap
from tests.modules import AuxiliaryLoss, Scaled


def _in_a_dict(net: Any, loss: Tensor) -> None:
    net.kept["loss"] = loss


def _in_a_nested_dict(net: Any, loss: Tensor) -> None:
    net.nested["a"]["b"]["loss"] = loss


def _in_a_list_that_grows_large(net: Any, loss: Tensor) -> None:
    net.many.clear()
    net.many.extend([loss / 70] * 70)


def _in_a_defaultdict(net: Any, loss: Tensor) -> None:
    net.by_kind.clear()
    net.by_kind["loss"].append(loss)


def _in_a_dataclass(net: Any, loss: Tensor) -> None:
    net.box.loss = loss


def _in_a_new_dataclass(net: Any, loss: Tensor) -> None:
    net.new = Box(loss)


def _in_a_new_namespace(net: Any, loss: Tensor) -> None:
    net.new = types.SimpleNamespace(loss=[loss])


KEEPERS: list[tuple[Callable[[Any, Tensor], None], Callable[[Any], Tensor]]] = [
    (_in_a_dict, lambda net: net.kept["loss"]),
    (_in_a_nested_dict, lambda net: net.nested["a"]["b"]["loss"]),
    (_in_a_list_that_grows_large, lambda net: sum(net.many)),
    (_in_a_defaultdict, lambda net: net.by_kind["loss"][0]),
    (_in_a_dataclass, lambda net: net.box.loss),
    (_in_a_new_dataclass, lambda net: net.new.loss),
    (_in_a_new_namespace, lambda net: net.new.loss[0]),
]


class Keeping(nn.Module):
    def __init__(self, keep: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.fc, self.keep = nn.Linear(3, 2), keep
        self.kept: dict[str, Any] = {}
        self.nested: dict[str, Any] = {"a": {"b": {}}}
        self.many: list[Any] = []
        self.by_kind: Any = collections.defaultdict(list)
        self.box, self.new = Box(), None

    def forward(self, x: Tensor) -> Tensor:
        self.keep(self, self.fc.weight.square().sum())
        return self.fc(x)


@pytest.mark.parametrize(("keep", "find"), KEEPERS, ids=[keep.__name__[1:] for keep, _ in KEEPERS])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_an_auxiliary_loss_in_a_container_has_gradients(keep: Any, find: Any, num_towers: int) -> None:
    plain, wrapped = twins(Keeping(keep), num_towers)
    x = batch(8)
    for _ in range(3):
        for net in (plain, wrapped):
            net.zero_grad()
            inner = getattr(net, "module", net)
            (net(x).sum() + find(inner)).backward()
        assert_same_gradients(wrapped, plain)


def test_lists_and_counters_of_the_module_count_every_call_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.history: list[int] = []
            self.calls = collections.Counter[str]()
            self.nested: dict[str, Any] = {"history": []}
            self.box = Box([])

        def forward(self, x: Tensor) -> Tensor:
            self.calls["all"] += 1
            for history in (self.history, self.nested["history"], self.box.loss):
                history.append(len(x))
            return x

    net = Net()
    wrapped = wrap(net, 2)
    for _ in range(3):
        wrapped(torch.ones(4, 3))
    assert net.calls == {"all": 3}
    assert net.history == net.nested["history"] == net.box.loss == [2, 2, 2]


class ScaledFromOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(3, 2), None
        self.inside: list[Any] = [None]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (self.inside[0] if self.scale is None else self.scale)


@pytest.mark.parametrize("place", ["attribute", "list"])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_tensor_with_a_graph_that_the_user_puts_into_an_attribute_gets_gradients(place: str, num_towers: int) -> None:
    plain, wrapped = twins(ScaledFromOutside(), num_towers)
    x = batch(7)
    sources = []
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        source = torch.ones(2, dtype=torch.float64, requires_grad=True)
        sources.append(source)
        for factor in (2, 3):  # anew for every step, as a hypernetwork does
            if place == "list":
                inner.inside = [source * factor]
            else:
                inner.scale = source * factor
            net(x).square().mean().backward()
    assert_same_gradients(wrapped, plain)
    assert_close(sources[1].grad, sources[0].grad)


def test_a_tensor_with_a_graph_in_an_attribute_carries_double_backward_and_tower_loss() -> None:
    plain, wrapped = twins(ScaledFromOutside(), 2)
    x = batch(6)
    found = []
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        source = torch.ones(2, dtype=torch.float64, requires_grad=True)
        inner.scale = source.exp()
        (grad,) = torch.autograd.grad(net(x).square().mean(), source, create_graph=True)
        grad.square().sum().backward()
        found.append([source.grad])
        source.grad = None
        inner.scale = source.exp()
        loss = wrapped.tower_loss(lambda r, x: r(x).square().mean(), x) if net is wrapped else net(x).square().mean()
        loss.backward()
        found[-1].append(source.grad)
    assert_same_gradients(wrapped, plain)
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert_close(ours, theirs)


def test_a_buffer_with_a_graph_gets_gradients() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.register_buffer("shift", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.shift

    plain, wrapped = twins(Net(), 2)
    x = batch(4)
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        inner.shift = inner.fc.bias * 2
        net(x).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_buffer_with_the_users_graph_keeps_it(num_towers: int) -> None:
    found = []
    for net in twins(Scaled(), num_towers):
        inner = getattr(net, "module", net)
        weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
        inner.scale = weight * 2
        node = inner.scale.grad_fn
        for seed in range(2):
            net(batch(7, seed=seed)).square().sum().backward(retain_graph=True)
            assert inner.scale.grad_fn is node
        found.append((net, weight.grad))
    (plain, expected), (wrapped, got) = found
    assert_close(got, expected)
    assert_same_gradients(wrapped, plain)


def test_what_an_earlier_forward_left_unused_is_no_part_of_the_next_backward() -> None:
    wrapped = wrap(AuxiliaryLoss(), 2)
    for _ in range(3):  # a backward into the graph of the step before would raise
        wrapped(torch.ones(4, 3)).sum().backward()


def test_the_state_of_an_earlier_forward_leads_to_it_as_in_the_plain_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.total = nn.Linear(3, 2), None

        def forward(self, x: Tensor) -> Tensor:
            size = self.fc.weight.square().sum()
            self.total = size if self.total is None else self.total + size
            return self.fc(x)

    plain, wrapped = twins(Net(), 2)
    x = batch(4)
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        net(x), net(x), net(x)
        inner.total.backward()
    assert_same_gradients(wrapped, plain)


def test_a_gradient_that_cannot_be_given_to_the_parameters_is_an_error_at_the_next_call() -> None:
    class Net(nn.Module):
        kept: ClassVar[list[Tensor]] = []

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = self.fc(x)
            Net.kept.append(out)
            return out

    wrapped = wrap(Net(), 2)
    wrapped(torch.ones(4, 3))
    Net.kept[0].sum().backward()
    with pytest.raises(RuntimeError, match="expected gradients to reach the parameters through outputs, attributes or"):
        wrapped(torch.ones(4, 3))
    assert wrapped.module.fc.weight.grad is None
    wrapped(torch.ones(4, 3)).sum().backward()
    assert_close(wrapped.module.fc.weight.grad, torch.full((2, 3), 4.0))


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_what_a_forward_freezes_of_the_users_module_itself_stays_so(num_towers: int) -> None:
    class Trainer:
        """Leads to the module in a way that towers cannot follow."""

        def __init__(self) -> None:
            self.nets: dict[str, nn.Module] = {}

        def __call__(self, module: nn.Module, args: Any) -> None:
            self.nets["net"][0].requires_grad_(False)

    nets = plain, wrapped = twins(mlp(), num_towers)
    for net, inner in zip(nets, (plain, wrapped.module), strict=True):
        trainer = Trainer()
        trainer.nets["net"] = inner
        inner.register_forward_pre_hook(trainer)
        for step in range(2):
            net(batch(8, seed=step)).sum().backward()
    assert [p.requires_grad for p in wrapped.parameters()] == [p.requires_grad for p in plain.parameters()]


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_freezing_and_thawing_in_a_forward_are_the_modules_own(flag: bool, num_towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.first = nn.Linear(3, 3).requires_grad_(not flag), nn.Linear(3, 2), True

        def forward(self, x: Tensor) -> Tensor:
            if self.first:
                self.body.requires_grad_(flag)
                self.first = False
            return self.head(self.body(x))

    plain, wrapped = twins(Net(), num_towers)
    x = batch(5)
    for wanted in (None, not flag):
        for net, inner in ((plain, plain), (wrapped, wrapped.module)):
            if wanted is not None:
                inner.body.requires_grad_(wanted)
            net.zero_grad()
            net(x).sum().backward()
        assert wrapped.module.body.weight.requires_grad == plain.body.weight.requires_grad
        assert_same_gradients(wrapped, plain)

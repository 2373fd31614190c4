"""Attributes, hooks and children that lead back to the module lead to each tower's own replica."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import (
    SEVERAL,
    STYLES,
    assert_close,
    assert_same_gradients,
    assert_trains_alike,
    batch,
    loss_in,
    mean_of_squares_by,
    steps_follow,
    wrap,
)
from tests.modules import OneLayer
from torchtower import current_tower


class Pair(tuple[Any, Any]):
    """Not made of one list, as a tuple is."""

    def __new__(cls, first: Any, second: Any) -> Pair:
        return super().__new__(cls, (first, second))


@dataclasses.dataclass(eq=False)
class Stage:
    net: Any
    siblings: tuple[Any, ...] = ()


class SelfReferring(nn.Module):
    """Leads back to itself in every way that Python offers."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0, 4.0]))
        self.fc = nn.Linear(3, 3)
        self.way = way
        self.by_method = self.scaled
        self.by_partial = functools.partial(SelfReferring.scaled, self)
        self.by_closure = lambda x: self.scaled(x)
        self.by_list = [self.fc]
        self.by_dict = {"fc": self.fc}
        self.by_tuple = (("fc", self.fc),)
        self.by_set = {self.fc}
        self.by_reference = weakref.ref(self)
        self.by_default = lambda x, net=self: net.scaled(x)
        self.by_parent = [self]
        self.by_weight = [self.weight]

        def recursive(x: Tensor, depth: int = 2) -> Tensor:
            return recursive(x, depth - 1) if depth else self.scaled(x)

        self.by_recursion = recursive
        visitors: dict[str, Any] = {}
        visitors["leaf"] = lambda x: self.scaled(x)
        visitors["node"] = lambda x: visitors["leaf"](x)
        self.by_each_other = visitors["node"]
        self.by_builtin = {"scaled": self.scaled}.get
        self.by_weak_method = weakref.WeakMethod(self.scaled)
        self.by_defaultdict = collections.defaultdict(list, scaled=[self.scaled])
        self.by_factory = collections.defaultdict(lambda: self.scaled)
        self.by_record = types.SimpleNamespace(scaled=self.scaled)
        self.by_cycle: list[Any] = [self.scaled]
        self.by_cycle.append((self.by_cycle,))
        scaled = self.scaled
        self.by_patched = types.MethodType(lambda net, x: scaled(x), self)
        self.by_pair = Pair(self.fc, self)
        self.by_siblings = (Stage(self.fc), Stage(self))
        for stage in self.by_siblings:
            stage.siblings = self.by_siblings

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        way = getattr(self, f"by_{self.way}")
        if self.way in CALLABLE:
            return way(x)
        if self.way in HOLDING:
            return HOLDING[self.way](way)(x)
        if self.way == "reference":
            return way().scaled(x)
        if self.way == "parent":
            return way[0].scaled(x)
        if self.way == "weight":
            return x * way[0]
        (fc,) = [pair[1] for pair in way] if self.way == "tuple" else way.values() if self.way == "dict" else way
        assert fc is self.fc
        return self.scaled(fc(x))


CALLABLE = ["method", "partial", "closure", "default", "recursion", "each_other", "patched"]
HOLDING: dict[str, Callable[[Any], Any]] = {
    "builtin": lambda way: way("scaled"),
    "weak_method": lambda way: way(),
    "defaultdict": lambda way: way["scaled"][0],
    "factory": lambda way: way["scaled"],
    "record": lambda way: way.scaled,
    "cycle": lambda way: way[1][0][0],
    "pair": lambda way: way[1].scaled,
    "siblings": lambda way: way[0].siblings[1].siblings[1].net.scaled,
}
WAYS = [*CALLABLE, *HOLDING, "list", "dict", "tuple", "set", "reference", "parent", "weight"]


@pytest.mark.parametrize("way", WAYS)
def test_attributes_that_lead_back_to_the_module_lead_to_the_towers_own(way: str) -> None:
    plain, wrapped = SelfReferring(way).double(), SelfReferring(way).double()
    wrapped.load_state_dict(plain.state_dict())
    steps_follow(plain, wrap(wrapped, 3), lambda step: batch(7, seed=step))


def test_a_function_that_leads_back_keeps_its_face() -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()

            def apply(x: Tensor) -> Tensor:
                """Of use."""
                return self.fc(x)

            self.apply_layer = apply

        def forward(self, x: Tensor) -> Tensor:
            assert self.apply_layer.__doc__ == "Of use." and "x" in self.apply_layer.__annotations__
            return self.apply_layer(x)

    assert wrap(Net(), 2)(torch.ones(4, 3)).shape == (4, 2)


@pytest.mark.parametrize("way", WAYS)
def test_derivatives_through_attributes_that_lead_back_to_the_module_are_the_plain_modules(way: str) -> None:
    # A tower that used the original's parameters would leave their gradients there itself, and return none.
    plain, wrapped = SelfReferring(way).double(), wrap(SelfReferring(way).double(), 3)
    wrapped.module.load_state_dict(plain.state_dict())
    grads = [torch.autograd.grad(net(batch(7)).square().mean(), list(net.parameters())) for net in (plain, wrapped)]
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        assert_close(ours, theirs)
    assert all(parameter.grad is None for parameter in wrapped.parameters())


class Switching(nn.Module):
    """Two functions share what they close over."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)
        chosen = self.first

        def switch() -> None:
            nonlocal chosen
            chosen = self.second if chosen is self.first else self.first

        self.switch = switch
        self.functions = {"apply": lambda x: chosen(x), "switch": switch}

    def forward(self, x: Tensor) -> Tensor:
        self.functions["switch"]()
        return self.functions["apply"](x)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_functions_that_share_what_they_close_over_go_on_to_share_it(num_towers: int) -> None:
    plain, wrapped = Switching().double(), Switching().double()
    wrapped.load_state_dict(plain.state_dict())
    model = wrap(wrapped, num_towers)
    for step in range(3):
        x = batch(7, seed=step)
        for net in (plain, model):
            net.zero_grad()
            net(x).square().sum().backward()
        assert_same_gradients(model, plain)


def test_lists_of_submodules_outside_of_module_lists_are_trained() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [[nn.Linear(3, 3).double()], {"last": nn.Linear(3, 2).double()}]

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden[1]["last"](self.hidden[0][0](x))

    plain = Net()
    wrapped = wrap(copy.deepcopy(plain), 3)
    for net in (plain, wrapped):
        net(batch(7)).square().sum().backward()
    for ours, theirs in (
        (wrapped.module.hidden[0][0], plain.hidden[0][0]),
        (wrapped.module.hidden[1]["last"], plain.hidden[1]["last"]),
    ):
        assert_same_gradients(ours, theirs)


def test_a_child_that_knows_its_parent_works() -> None:
    class Child(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            self.parent = [parent]

        def forward(self, x: Tensor) -> Tensor:
            return self.parent[0].fc(x)

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.child = Child(self)

        def forward(self, x: Tensor) -> Tensor:
            assert self.child.parent[0] is self
            return self.child(x)

    assert_trains_alike(Parent(), 3, batch(7))


def test_modules_in_keyword_defaults_of_functions_are_the_replicas() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

            def call(x: Tensor, *, layer: nn.Module = self.layer, times: int = 2) -> Tensor:
                return layer(x) * times

            self.call = call

        def forward(self, x: Tensor) -> Tensor:
            return self.call(x)

    plain, net = Net().double(), Net().double()  # a copy would refer to the first one's layer
    net.load_state_dict(plain.state_dict())
    wrapped = wrap(net, 2)
    F.mse_loss(plain(batch(7)), batch(7, 2)).backward()
    wrapped.tower_loss(lambda net, x, y: F.mse_loss(net(x), y), batch(7), batch(7, 2)).backward()
    assert_same_gradients(wrapped, plain)


def test_an_ensemble_with_a_skeleton_on_the_meta_device_works() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList([nn.Linear(3, 2) for _ in range(3)])
            self.skeleton = [copy.deepcopy(self.members[0]).to("meta")]

        def forward(self, x: Tensor) -> Tensor:
            stacked = {
                name: torch.stack([getattr(member, name) for member in self.members]) for name in ("weight", "bias")
            }
            one = self.skeleton[0]
            return torch.func.vmap(lambda p: torch.func.functional_call(one, p, (x,)))(stacked).mean(0)

    assert_trains_alike(Ensemble(), 3, batch(7))


@pytest.mark.parametrize("towers", SEVERAL)
def test_a_bound_method_of_a_parameter_is_that_of_the_replicas_own(towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.product = self.fc.weight.matmul

        def forward(self, x: Tensor) -> Tensor:
            return self.product(x.T).T

    net = Net().double()
    wrapped = wrap(net, towers)
    x = batch(9)
    (grad,) = torch.autograd.grad(wrapped(x).square().sum(), net.fc.weight)
    (expected,) = torch.autograd.grad(net(x).square().sum(), net.fc.weight)
    assert_close(grad, expected)


@pytest.mark.parametrize("nested", [False, True])
def test_a_function_over_a_large_table_of_layers_writes_into_the_users(nested: bool) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            table: dict[Any, Any] = dict.fromkeys(range(2000), self.fc)
            held = [table] if nested else table
            self.note = lambda tower: (held[0] if nested else held).update({f"tower {tower}": tower})
            self.table = lambda: held[0] if nested else held

        def forward(self, x: Tensor) -> Tensor:
            self.note(current_tower())
            return self.fc(x)

    net = Net().double()
    wrap(net, 2)(batch(4))
    assert list(net.table())[2000:] in (["tower 0", "tower 1"], ["tower 1", "tower 0"])


def test_a_list_that_a_function_closes_over_beside_the_module_has_one_entry_a_tower() -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            fc, towers = self.fc, []
            self.towers = lambda: towers
            self.apply_layer = lambda x: (towers.append(current_tower()), fc(x))[1]

        def forward(self, x: Tensor) -> Tensor:
            return self.apply_layer(x)

    net = Net().double()
    wrap(net, 3)(batch(6))
    assert sorted(net.towers()) == [0, 1, 2]


def test_a_function_over_a_name_that_is_not_bound_yet_leads_to_the_towers_own() -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            fc = self.fc

            def call(x: Tensor) -> Tensor:
                return fc(x) if isinstance(x, Tensor) else later(x)

            self.call = call
            if self.fc is None:
                later = self.fc

        def forward(self, x: Tensor) -> Tensor:
            return self.call(x)

    net = Net().double()
    plain = copy.deepcopy(net.fc)
    for model in (plain, wrap(net, 2)):
        model(batch(7)).square().sum().backward()
    assert_same_gradients(net.fc, plain)


def test_a_frozen_set_of_submodules_is_of_the_towers_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)
            self.both = frozenset({self.first, self.second})

        def forward(self, x: Tensor) -> Tensor:
            assert self.both == {self.first, self.second}
            return self.first(x) * self.second(x)

    assert_trains_alike(Net(), 3, batch(7))


def test_a_module_around_the_wrapped_one_is_itself_in_every_tower() -> None:
    seen = []

    class Inner(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.around[0])
            return self.fc(x)

    outer = nn.Sequential(Inner())
    outer[0].around = [outer]
    wrap(outer[0], 2)(torch.ones(4, 3))
    assert len(seen) == 2 and all(each is outer for each in seen)


def test_what_else_a_module_around_the_wrapped_one_holds_may_be_lazy() -> None:
    outer = nn.Sequential(OneLayer().double(), nn.LazyLinear(4))
    plain = copy.deepcopy(outer[0])
    outer[0].around = [outer]
    wrapped = wrap(outer[0], 2)
    for net in (plain, wrapped):
        net(batch(7)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


class OutOfATable(nn.Module):
    """Has its weight from a table outside, as Pyro's modules do, into which the first forward puts it."""

    table: ClassVar[dict[str, Tensor]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * OutOfATable.table.setdefault("weight", self.weight)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_table_that_a_forward_in_a_tower_fills_first_is_told_before_a_backward(
    monkeypatch: pytest.MonkeyPatch, num_towers: int, style: str
) -> None:
    monkeypatch.setattr(OutOfATable, "table", {})
    wrapped = wrap(OutOfATable(), num_towers)
    with torch.no_grad():
        wrapped(batch(6))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"used tower \d's.*run one batch through the plain module first"):
            loss_in(style, wrapped, mean_of_squares_by, batch(6))


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_table_that_the_plain_module_has_filled_leads_to_the_parameter(
    monkeypatch: pytest.MonkeyPatch, num_towers: int
) -> None:
    monkeypatch.setattr(OutOfATable, "table", {})
    net = OutOfATable()
    net(batch(1))
    wrapped = wrap(net, num_towers)
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(batch(6)).sum().backward()
        assert_close(net.weight.grad, batch(6).sum(0))

"""Contract 1: outputs in containers and objects of classes of their own come back as such, whole."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import (
    SEVERAL,
    assert_close,
    assert_same_gradients,
    batch,
    twins,
    wrap,
)
from tests.modules import OneLayer, WithOutput
from torchtower import current_tower


class Cache:
    """Made from what it yields, as a transformer's cache of keys and values is."""

    def __init__(self, layers: Any = ()) -> None:
        self.layers = [tuple(layer) for layer in layers]

    def __iter__(self) -> Any:
        return iter(self.layers)


class Grown(Cache):
    """Of one layer more than the towers before; cannot be told from its elements how."""

    def __init__(self, rows: int, layers: Any) -> None:
        super().__init__(layers)


def test_a_deque_is_joined() -> None:
    plain, wrapped = twins(WithOutput(lambda h: deque([h, h + 1])), 2)
    for mine, expected in zip(wrapped(batch(7)), plain(batch(7)), strict=True):
        assert_close(mine, expected)


def test_an_object_is_joined_by_what_it_yields() -> None:
    net = WithOutput(lambda h: (h, Cache([(h * 2, None), (h + 1, None)])))
    plain, wrapped = twins(net, 3)
    for model in (plain, wrapped):
        out, cache = model(batch(7))
        assert type(cache) is Cache and [other for _, other in cache] == [None, None]
        (out.square().sum() + sum((i + 1) * layer.square().sum() for i, (layer, _) in enumerate(cache))).backward()
    assert_same_gradients(wrapped, plain)
    for (mine, _), (expected, _) in zip(wrapped(batch(7))[1], plain(batch(7))[1], strict=True):
        assert_close(mine, expected)


@pytest.mark.parametrize("output", [lambda h: Grown(len(h), [(h,)]), lambda h: {h}, lambda h: iter([h])])
def test_objects_that_cannot_be_made_from_what_they_yield_are_refused(output: Any) -> None:
    with pytest.raises(TypeError, match=r"expected the output to be of tensors in tuples.* that holds tensors"):
        wrap(WithOutput(output).double(), 2)(batch(7))


def test_objects_that_yield_different_numbers_are_told_apart() -> None:
    net = WithOutput(lambda h: Cache([(h,)] * len(h)))
    with pytest.raises(ValueError, match=r"expected the output of every tower to be alike, list of .* tower 1's is"):
        wrap(net.double(), 2)(batch(7))


class OtherCache(Cache):
    """Of another class than its like."""


@pytest.mark.parametrize(
    ("first", "other", "words"),
    [
        (lambda h: Cache([(h,)]), lambda h: OtherCache([(h,)]), "a Cache as tower 0's, but tower 1's is a OtherCache"),
        (lambda h: [h, h], lambda h: h, "list of length 2 as tower 0's, but tower 1's is Tensor"),
    ],
    ids=["iterables", "list and tensor"],
)
def test_outputs_of_two_classes_are_told_apart(first: Any, other: Any, words: str) -> None:
    net = WithOutput(lambda h: other(h) if current_tower() else first(h))
    with pytest.raises(ValueError, match=f"expected the output of every tower to be alike, {words}"):
        wrap(net.double(), 2)(batch(7))


class ReorderedOutput(OrderedDict):
    """As transformers' ModelOutput: its copies have its fields in the declared order, whatever order they came in."""

    def __reduce__(self) -> Any:
        return type(self), (sorted(self.items()),)


def test_fields_come_out_in_the_order_in_which_the_forward_has_set_them() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Any:
            out = self.fc(x)
            return ReorderedOutput([("a", out), ("c", 2 * out), ("b", 3 * out)])

    plain, wrapped = twins(Net(), 2)
    out, expected = wrapped(batch(4)), plain(batch(4))
    assert list(out) == list(expected) == ["a", "c", "b"]
    for name, value in expected.items():
        assert_close(out[name], value)


class DictWithAttributes(dict):
    pass


class ListWithAttributes(list):
    pass


class TupleWithAttributes(tuple):
    pass


class MappingWithAttributes(UserDict):
    pass


CONTAINERS_WITH_ATTRIBUTES: list[Callable[[Any], Any]] = [
    lambda x: DictWithAttributes(y=x),
    lambda x: ListWithAttributes([x]),
    lambda x: TupleWithAttributes((x,)),
    lambda x: MappingWithAttributes(y=x),
]


@pytest.mark.parametrize("make", CONTAINERS_WITH_ATTRIBUTES)
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_tensor_in_an_attribute_of_a_container_may_be_an_entry_too(
    num_towers: int, make: Callable[[Any], Any]
) -> None:
    class Net(OneLayer):
        def forward(self, given: Any) -> Any:
            result = make(self.fc(given.main))
            result.main = result["y"] if hasattr(result, "keys") else result[0]
            return result

    plain, wrapped = twins(Net(), num_towers)
    for net in (plain, wrapped):
        given = make(batch(7))
        given.main = given["y"] if hasattr(given, "keys") else given[0]
        out = net(given)
        assert out.main is (out["y"] if hasattr(out, "keys") else out[0]) and out.main.shape == (7, 2)
        out.main.square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("make", CONTAINERS_WITH_ATTRIBUTES)
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_tensors_in_attributes_of_containers_are_split_and_joined(num_towers: int, make: Callable[[Any], Any]) -> None:
    class Net(OneLayer):
        def forward(self, given: Any) -> Any:
            out = self.fc(given.more)
            result = make(out)
            result.more, result.name = 2 * out, "any"
            return result

    plain, wrapped = twins(Net(), num_towers)
    for net in (plain, wrapped):
        given = make(batch(7))
        given.more = batch(7, seed=1)
        out = net(given)
        assert type(out) is type(given) and out.name == "any" and out.more.shape == (7, 2)
        entry = out["y"] if hasattr(out, "keys") else out[0]
        (entry.square().sum() + out.more.sum()).backward()
        assert given.more.shape == (7, 3)
    assert_same_gradients(wrapped, plain)


class WindowedCache:
    """As transformers' caches of layers with a window: made anew of what it yields."""

    def __init__(self, layers: Any) -> None:
        self.layers = [(keys, window.item()) for keys, window in layers]

    def __iter__(self) -> Any:
        if not self.layers:
            raise AttributeError("no layers")
        return iter([(keys, torch.tensor(window)) for keys, window in self.layers])


def test_a_cache_that_cannot_be_made_of_what_is_joined_is_refused_in_words() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Any:
            return WindowedCache([(self.fc(x), torch.tensor(8))])

    with pytest.raises(TypeError, match="a WindowedCache that holds tensors; return these, or leave it out"):
        wrap(Net().double(), 2)(batch(7))


@pytest.mark.parametrize("make", [namedtuple, dataclasses.make_dataclass])
def test_a_class_that_every_forward_makes_anew_is_one(make: Any) -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Any:
            out = self.fc(x)
            return make("Outputs", ["left", "right"])(out, 2 * out)

    plain, wrapped = twins(Net(), 3)
    for net in (plain, wrapped):
        out = net(batch(7))
        assert type(out).__name__ == "Outputs" and out.left.shape == (7, 2)
        (out.left.square().sum() + out.right.sum()).backward()
    assert_same_gradients(wrapped, plain)


def test_an_object_that_does_not_say_what_it_holds_is_refused_in_words() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Any:
            cache = WindowedCache([])
            cache.state = self.fc(x)
            return cache

    with pytest.raises(
        TypeError, match=r"the output .* a WindowedCache that holds tensors; return these, or leave it out"
    ):
        wrap(Net().double(), 2)(batch(4))

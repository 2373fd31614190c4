"""Contract 1: inputs of any structure reach every tower, each with its type, dtype and gradients."""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.containers import AttributeDict, Data, Elsewhere, FrozenData
from tests.helpers import (
    EVERY_COUNT,
    assert_close,
    assert_same_gradients,
    assert_trains_alike,
    batch,
    mlp,
    twins,
    wrap,
)
from tests.modules import OneLayer

Pair = namedtuple("Pair", "left right")


class TwoHanded(nn.Module):
    """Takes two tensors out of whatever it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        left, right = _find(args, "left"), _find(args, "right")
        left, right = kwargs.get("left", left), kwargs.get("right", right)
        return self.left(left) * self.right(right).sigmoid()


def _find(args: Any, name: str) -> Any:
    if not args:
        return None
    if len(args) == 1:
        whole = args[0]
        if isinstance(whole, Mapping):
            return whole[name]
        if hasattr(whole, name):
            return getattr(whole, name)
        args = whole
    found = args[0 if name == "left" else 1]
    return found[0] if isinstance(found, (list, tuple)) else found


class StoredDict(MutableMapping[str, Any]):
    """Has its items in an attribute, which a copy shares."""

    def __init__(self, **items: Any) -> None:
        self.store = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self.store[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.store[key] = value

    def __delitem__(self, key: str) -> None:
        del self.store[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.store)

    def __len__(self) -> int:
        return len(self.store)


class WrittenOnce(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("immutable")


class OfTwo(tuple[Any, ...]):
    def __new__(cls, left: Any, right: Any) -> OfTwo:
        return super().__new__(cls, (left, right))


@dataclasses.dataclass
class Delegating:
    items: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.items[name]


CALLS = {
    "stored dict": lambda a, b: ((StoredDict(left=a, right=b),), {}),
    "dict written once": lambda a, b: ((WrittenOnce(left=a, right=b),), {}),
    "tuple of its own making": lambda a, b: ((OfTwo(a, b),), {}),
    "delegating dataclass": lambda a, b: ((Delegating({"left": a, "right": b}),), {}),
    "positional": lambda a, b: ((a, b), {}),
    "keywords": lambda a, b: ((), {"left": a, "right": b}),
    "both": lambda a, b: ((a, None), {"right": b}),
    "tuple": lambda a, b: (((a, b),), {}),
    "list": lambda a, b: (([a, b],), {}),
    "namedtuple": lambda a, b: ((Pair(a, b),), {}),
    "dict": lambda a, b: (({"left": a, "right": b},), {}),
    "ordered dict": lambda a, b: ((OrderedDict(left=a, right=b),), {}),
    "user dict": lambda a, b: ((UserDict(left=a, right=b),), {}),
    "attribute dict": lambda a, b: ((AttributeDict(left=a, right=b),), {}),
    "read-only mapping": lambda a, b: ((types.MappingProxyType({"left": a, "right": b}),), {}),
    "dataclass": lambda a, b: ((Data(a, b),), {}),
    "frozen dataclass": lambda a, b: ((FrozenData(a, b),), {}),
    "nested": lambda a, b: ((([a, {"more": [b]}], (b, None, "text", 3)),), {}),
    "with others": lambda a, b: ((a, b, None, "text", 2.5, torch.tensor(3.0), [], {}, ()), {}),
}


@pytest.mark.parametrize("num_towers", (1, 3))
@pytest.mark.parametrize("call", CALLS)
def test_inputs_of_any_structure_reach_every_tower(call: str, num_towers: int) -> None:
    plain, wrapped = twins(TwoHanded(), num_towers)
    results = []
    for net in (plain, wrapped):
        a, b = batch(7, seed=1, requires_grad=True), batch(7, seed=2, requires_grad=True)
        args, kwargs = CALLS[call](a, b)
        out = net(*args, **kwargs)
        out.square().sum().backward()
        results.append((out, a.grad, b.grad))
    for got, expected in zip(results[1], results[0], strict=True):
        assert_close(got, expected)
    assert_same_gradients(wrapped, plain)


def test_inputs_that_are_no_tensors_arrive_as_the_same_objects() -> None:
    seen = []

    class Net(nn.Module):
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            seen.append(rest)
            return x

    marker, callback = object(), len
    wrap(Net(), 2)(batch(4), marker, callback, None, "text", torch.float32)
    for rest in seen:
        assert rest[0] is marker and rest[1] is callback and rest[2:] == (None, "text", torch.float32)
    assert len(seen) == 2


def test_a_mapping_of_the_users_is_not_written_to_and_one_that_must_be_is_refused() -> None:
    class Sum(nn.Module):
        def forward(self, items: Mapping[str, Tensor]) -> Tensor:
            return items["left"] + items["right"]

    class Hidden(StoredDict):
        def __init__(self, **items: Any) -> None:
            self.hidden = {"within": dict(items)}

        store = property(lambda self: self.hidden["within"])

    a, b = batch(7, seed=1), batch(7, seed=2)
    kept, hidden = StoredDict(left=a, right=b), Hidden(left=a, right=b)
    assert_close(wrap(Sum(), 3)(kept), a + b)
    assert kept["left"] is a and kept["right"] is b
    with pytest.raises(TypeError, match=r"expected a Hidden to be one that can be made anew.*use a dict"):
        wrap(Sum(), 2, max_concurrency=1)(hidden)
    assert hidden["left"] is a and hidden["right"] is b


def test_a_mapping_that_makes_its_values_at_each_access_is_copied_not_written_to() -> None:
    class Interpolating(StoredDict):
        def __getitem__(self, key: str) -> Any:
            value = self.store[key]
            return value.format(**self.store) if isinstance(value, str) else value

    class Net(nn.Module):
        def forward(self, x: Tensor, settings: Interpolating) -> Tensor:
            assert settings["path"] == "/data/a"
            return x * settings["scale"]

    x = batch(5)
    for scale in (2.0, batch(5, seed=1)):
        settings = Interpolating(root="/data", path="{root}/a", scale=scale)
        assert_close(wrap(Net(), 2)(x, settings), x * scale)
        assert settings.store["path"] == "{root}/a" and settings["scale"] is scale


def test_tuples_of_a_class_keep_its_attributes() -> None:
    class Scaled(tuple[Any, ...]):
        def __new__(cls, items: Any, scale: float = 1.0) -> Scaled:
            made = super().__new__(cls, items)
            made.scale = scale
            return made

    class Slotted(tuple[Any, ...]):
        __slots__ = ()

        def __new__(cls, left: Any, right: Any) -> Slotted:
            return super().__new__(cls, (left, right))

    class Refusing(tuple[Any, ...]):
        def __new__(cls, *items: Any) -> Refusing:
            if len(items) != 2:
                raise ValueError("expected two")
            return super().__new__(cls, items)

    class Net(nn.Module):
        def forward(self, given: Any) -> Any:
            assert getattr(given, "scale", 5.0) == 5.0
            return given

    x = batch(5)
    for given in (Scaled((x, x), 5.0), Slotted(x, x), Refusing(x, x)):
        out = wrap(Net(), 2)(given)
        assert type(out) is type(given)
        assert getattr(out, "__dict__", {}) == getattr(given, "__dict__", {})
        assert_close(out[1], x)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_a_tuples_constructor_computes_is_computed_of_each_towers_entries(num_towers: int) -> None:
    class Averaged(tuple[Any, ...]):
        mean: Tensor

        def __new__(cls, items: Any) -> Averaged:
            made = super().__new__(cls, items)
            made.mean = made[0].mean(0)
            return made

    class Net(OneLayer):
        def forward(self, given: Averaged) -> Averaged:
            assert torch.equal(given.mean, given[0].mean(0))
            return Averaged([self.fc(given[0]), self.fc(given[0] - given[1])])

    plain, wrapped = twins(Net(), num_towers)
    out, expected = (net(Averaged([batch(7), batch(7, seed=1)])) for net in (wrapped, plain))
    for got in (out, expected):
        (got.mean.square().sum() + got[1].square().sum()).backward()
    assert_close(out.mean, expected.mean)
    assert_same_gradients(wrapped, plain)


def test_a_mapping_without_tensors_stays_the_very_same_object() -> None:
    class Settings(Mapping[str, Any]):
        def __init__(self, name: str = "default", **values: Any) -> None:
            self.name, self.settings = name, values

        def __getitem__(self, key: str) -> Any:
            return self.settings[key]

        def __iter__(self) -> Iterator[str]:
            return iter(self.settings)

        def __len__(self) -> int:
            return len(self.settings)

    class Scaled(nn.Module):
        def forward(self, x: Tensor, settings: Settings) -> Tensor:
            assert settings is given
            return x * settings["scale"]

    given = Settings("run", scale=10.0)
    x = batch(5)
    assert_close(wrap(Scaled(), 2)(x, given), 10 * x)
    with pytest.raises(TypeError, match="expected a Settings to be one that can be made anew"):
        wrap(Scaled(), 2)(x, Settings("run", scale=x))


@dataclasses.dataclass
class Options:
    scale: int


def _spend(options: Options) -> int:
    scale, options.scale = options.scale, 0
    return scale


@pytest.mark.parametrize(
    ("options", "spend"),
    [(OrderedDict(scale=3), lambda options: options.pop("scale")), (Options(3), _spend)],
    ids=["OrderedDict", "dataclass"],
)
def test_options_that_a_forward_writes_to_are_each_towers_own(options: Any, spend: Any) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, options: Any) -> Tensor:
            return x * spend(options)

    assert_close(wrap(Net(), 2, max_concurrency=1)(batch(5), options), batch(5) * 3)


def test_a_dataclass_keeps_attributes_that_are_no_fields() -> None:
    class Net(nn.Module):
        def forward(self, given: Any) -> Tensor:
            return given.left * given.scale

    given: Any = Data(batch(5), batch(5))
    given.scale = 3
    assert_close(wrap(Net(), 2)(given), batch(5) * 3)


def test_subclasses_of_containers_keep_their_type_and_default_factory() -> None:
    seen = []

    class Net(nn.Module):
        def forward(self, x: Any) -> Tensor:
            seen.append(x)
            return x["a"]

    wrap(Net(), 2)(defaultdict(list, a=batch(4)))
    assert all(type(x) is defaultdict and x.default_factory is list for x in seen)


@pytest.mark.parametrize("shape", [(), (1,), (1, 3)])
def test_a_tensor_without_rows_to_split_goes_to_every_tower_and_collects_their_gradients(shape: tuple[int]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.fc(x) * scale

    assert_trains_alike(Net(), 3, batch(7), torch.full(shape, 1.5, dtype=torch.float64, requires_grad=True))


def test_the_same_tensor_in_two_places_is_one_tensor_in_every_tower() -> None:
    same = []

    class Net(nn.Module):
        def forward(self, a: Tensor, b: dict[str, Tensor]) -> Tensor:
            same.append(a is b["again"])
            return a * b["again"]

    x = batch(5, requires_grad=True)
    wrap(Net(), 2)(x, {"again": x}).sum().backward()
    assert same == [True, True]
    assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x[:1].expand(8, -1),
        lambda x: x[::2],
        lambda x: torch.view_as_complex(x[:, :2].contiguous()).conj().imag[:, None],
    ],
)
def test_inputs_may_be_views_of_any_strides(view: Any) -> None:
    x = view(batch(8))
    assert_trains_alike(mlp(inputs=x.shape[1]), 3, x)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_an_input_that_no_gradient_comes_to_has_none(num_towers: int) -> None:
    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sign()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(Sign.apply(x))

    before = nn.Parameter(torch.ones(3).double())
    leaf = batch(8, requires_grad=True)
    wrapped = wrap(Net().double(), num_towers)
    (wrapped(leaf).sum() + wrapped(batch(8) * before).sum()).backward()
    assert leaf.grad is None and before.grad is None and wrapped.module.fc.weight.grad is not None


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_gradients_flow_to_inputs_that_are_part_of_a_graph(num_towers: int) -> None:
    front, model = twins(mlp(), num_towers)
    plain = nn.Sequential(mlp(3, 3), front)
    stem = plain[0]
    x = batch(7)
    plain(x).square().sum().backward()
    expected = [p.grad.clone() for p in stem.parameters()]
    stem.zero_grad()
    model(stem(x)).square().sum().backward()
    for p, grad in zip(stem.parameters(), expected, strict=True):
        assert_close(p.grad, grad)
    assert_same_gradients(model, front)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_forward_may_write_into_its_input(num_towers: int, rows: int, needs_grad: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.relu(x))

    plain, wrapped = twins(Net(), num_towers)
    grads = []
    for net in (plain, wrapped):
        x = batch(rows, requires_grad=needs_grad)
        net(x * 2).square().sum().backward()
        grads.append(x.grad)
    assert_close(grads[1], grads[0])
    assert_same_gradients(wrapped, plain)


def test_a_write_into_an_input_that_the_users_graph_has_saved_raises_as_in_the_plain_module() -> None:
    for net in twins(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), 2):
        x = batch(6, requires_grad=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            net(x.tanh()).sum().backward()


def test_integer_boolean_and_half_inputs_keep_their_dtype() -> None:
    seen = []

    class Net(nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            seen.append([t.dtype for t in tensors])
            return tensors

    given = [torch.ones(4).to(d) for d in (torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.complex64)]
    out = wrap(Net(), 2)(*given)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(out, given, strict=True))
    assert seen == [[t.dtype for t in given]] * 2


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "xla:0", "mps"])
def test_a_tensor_that_names_a_device_that_is_not_there_goes_along(device: str) -> None:
    plain, wrapped = twins(OneLayer(), 2)
    wrapped.module.register_forward_pre_hook(lambda module, args: args[0])
    assert_close(wrapped(batch(4), Elsewhere(torch.ones(4, 3), device)), plain(batch(4)))

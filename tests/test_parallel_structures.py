"""Contract 1: inputs of any structure reach every tower, and outputs of any structure come back as the module's own.

Each with its type, dtype and gradients, split and gathered along the dimension that was asked for.
"""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    EVERY_COUNT,
    SEVERAL,
    assert_close,
    assert_go_backward_alike,
    assert_same_gradients,
    assert_trains_alike,
    batch,
    mlp,
    twins,
    wrap,
)
from tests.modules import OneLayer

Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Data:
    left: Tensor
    right: Tensor
    note: str = "kept"


@dataclasses.dataclass
class Squared:
    value: Tensor

    def __post_init__(self) -> None:
        self.square = self.value.square()


class AttrDict(dict[str, Any]):
    """Its items are its attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class UpdatedDict(dict[str, Any]):
    """Its items are attributes, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__.update(self, note="kept")


@dataclasses.dataclass(frozen=True)
class FrozenData:
    left: Tensor
    right: Tensor


class AttributeDict(dict):
    def __getattr__(self, name: str) -> Any:
        return self[name]


# ---- inputs


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


@pytest.mark.parametrize("dim", [1, -1])
def test_another_dimension_can_be_split_and_gathered(dim: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight @ x).tanh()

    plain, wrapped = twins(Net(), 3, dim=dim)
    assert_go_backward_alike(plain, wrapped, batch(3, 7, requires_grad=True))


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


# ---- outputs


class ModelOutput(OrderedDict):
    """As transformers' ModelOutput: a dict whose fields are attributes, made by a dataclass."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                self[field.name] = value

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __getitem__(self, key: Any) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]

    def __reduce__(self) -> Any:
        return (type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self)))


@dataclasses.dataclass
class Logits(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None


class Named(NamedTuple):
    first: Tensor
    second: Any


OUTPUTS = {
    "tensor": lambda h: h,
    "tuple": lambda h: (h, h.sin()),
    "one-tuple": lambda h: (h,),
    "list": lambda h: [h, h.sin()],
    "dict": lambda h: {"a": h, "b": h.sin()},
    "ordered dict": lambda h: OrderedDict(a=h, b=[h.sin()]),
    "user dict": lambda h: UserDict(a=h),
    "attribute dict": lambda h: AttributeDict(a=h),
    "default dict": lambda h: defaultdict(list, a=h),
    "namedtuple": lambda h: Named(h, h.sin()),
    "namedtuple of others": lambda h: Named(h, "text"),
    "dataclass": lambda h: Data(h, h.sin()),
    "frozen dataclass": lambda h: FrozenData(h, h.sin()),
    "model output": lambda h: Logits(logits=h, hidden=(h.sin(), h.cos())),
    "torch.return_types": lambda h: h.max(dim=1),
    "nested": lambda h: [h, (h.sin(), h.cos(), [h.add(1)]), h, OrderedDict(a=h, b=[h.sin()])],
    "with others": lambda h: (h, None, "text", 3, 2.5, True, torch.float32, [], {}, ()),
    "integers beside": lambda h: (h, h.argmax(1), h > 0),
}


class WithOutput(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.fc, self.make = nn.Linear(3, 2), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.fc(x))


@pytest.mark.parametrize("num_towers", (1, 3))
@pytest.mark.parametrize("rows", (1, 7))
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_any_structure_are_gathered_field_by_field(kind: str, rows: int, num_towers: int) -> None:
    plain, wrapped = twins(WithOutput(OUTPUTS[kind]), num_towers)
    expected, got = plain(batch(rows)), wrapped(batch(rows))
    losses = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]

    def compare(a: Any, b: Any) -> None:
        assert type(a) is type(b)
        if isinstance(b, Tensor):
            if b.is_floating_point():
                assert_close(a, b)
                assert a.requires_grad == b.requires_grad
                losses[0], losses[1] = losses[0] + a.square().sum(), losses[1] + b.square().sum()
            else:
                assert torch.equal(a, b)
        elif isinstance(b, (dict, UserDict)):
            assert list(a) == list(b)
            for key in b:
                compare(a[key], b[key])
        elif isinstance(b, (tuple, list)):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                compare(x, y)
        elif dataclasses.is_dataclass(b):
            for field in dataclasses.fields(b):
                compare(getattr(a, field.name), getattr(b, field.name))
        else:
            assert a == b

    compare(got, expected)
    losses[0].backward()
    losses[1].backward()
    assert_same_gradients(wrapped, plain)


def test_a_model_output_keeps_attributes_and_items_in_step() -> None:
    out = wrap(WithOutput(OUTPUTS["model output"]).double(), 2)(batch(5))
    assert out.loss is None and "loss" not in out
    assert out.logits is out["logits"] and out[0] is out.logits
    assert out.logits.shape == (5, 2) and out.hidden[1].shape == (5, 2)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_scalar_outputs_become_a_vector_with_one_element_a_tower(num_towers: int) -> None:
    wrapped = wrap(WithOutput(lambda h: h.square().mean()).double(), num_towers)
    x = batch(2 * num_towers)
    losses = wrapped(x)
    assert losses.shape == (num_towers,)
    losses.mean().backward()
    plain = WithOutput(lambda h: h.square().mean()).double()
    plain.load_state_dict(wrapped.module.state_dict())
    plain(x).backward()
    assert_same_gradients(wrapped, plain)


def test_outputs_that_need_no_gradient_stay_outside_the_graph() -> None:
    wrapped = wrap(WithOutput(lambda h: (h, h.detach(), torch.ones(len(h)))).double(), 2)
    with_grad, detached, constant = wrapped(batch(4))
    assert with_grad.requires_grad and not detached.requires_grad and not constant.requires_grad
    with_grad.sum().backward()
    assert wrapped.module.fc.weight.grad is not None


def test_an_output_that_is_an_input_or_a_parameter_carries_gradients() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.weight

    net = wrap(Net(), 2)
    x = batch(4, requires_grad=True)
    same, weights = net(x)
    assert torch.equal(same, x) and weights.shape == (2, 3)
    (same.sum() * 3 + weights.sum()).backward()
    assert_close(x.grad, torch.full_like(x, 3.0))
    assert_close(net.module.weight.grad, torch.full((1, 3), 2.0, dtype=torch.float64))


def test_a_gathered_output_may_be_written_to() -> None:
    plain, wrapped = twins(mlp(), 3)
    for net in (plain, wrapped):
        for rows in (1, 7):
            out = net(batch(rows))
            out.mul_(2)
            out[0] = 0
            out.square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_module_with_zero_output_features_works() -> None:
    assert_trains_alike(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 0)), 2, batch(6))


def test_towers_may_return_different_numbers_of_rows() -> None:
    assert_trains_alike(WithOutput(lambda h: h[h[:, 0] > 0]), 3, batch(20))


class Twice(namedtuple("Twice", ["left", "right"])):
    """A named tuple that makes itself otherwise than from its fields."""

    def __new__(cls, both: Tensor) -> Twice:
        return super().__new__(cls, both, both + 1)


@pytest.mark.parametrize("towers", EVERY_COUNT)
def test_named_tuples_with_a_way_of_their_own_to_be_made(towers: int) -> None:
    class Net(OneLayer):
        def forward(self, pair: Twice) -> Twice:
            return Twice(self.fc(pair.left + pair.right))

    plain, wrapped = twins(Net(), towers)
    out, expected = wrapped(Twice(batch(5))), plain(Twice(batch(5)))
    assert type(out) is Twice
    assert_close(out.right, expected.right)


def test_arrays_of_other_shapes_are_told_apart_by_name() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, x.numpy()

    with pytest.raises(ValueError, match=r"(?s)output\[1\] of every tower to be alike.* tower 1"):
        wrap(Net(), 2)(batch(9))


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


@pytest.mark.parametrize("kind", [AttrDict, UpdatedDict, Squared])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_tensors_that_are_attributes_too_are_split_and_joined(num_towers: int, kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, given: Any) -> Any:
            if kind is Squared:
                return Squared(self.fc(given.value + given.square))
            assert given["value"] is given.value
            return kind(value=self.fc(given.value), again=self.fc(given["value"]).sin())

    def make(x: Tensor) -> Any:
        return Squared(x) if kind is Squared else kind(value=x)

    def both(out: Any) -> Tensor:
        if kind is Squared:
            return out.value.sin().sum() + out.square.sum()
        assert type(out) is kind and out["value"] is out.value and out["again"] is out.again
        assert kind is AttrDict or out.note == "kept"
        return out.value.sin().sum() + out.again.sum()

    plain, wrapped = twins(Net(), num_towers)
    for net in (plain, wrapped):
        for step in range(2):
            both(net(make(batch(6, seed=step)))).backward()
    assert_same_gradients(wrapped, plain)

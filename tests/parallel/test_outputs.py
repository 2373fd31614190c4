"""Contract 1: outputs of any structure come back as the module's own, joined along the dimension that was asked for."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.containers import AttributeDict, Data, FrozenData
from tests.helpers import (
    EVERY_COUNT,
    SEVERAL,
    assert_close,
    assert_same_gradients,
    assert_trains_alike,
    batch,
    mlp,
    twins,
    wrap,
)
from tests.modules import OneLayer, WithOutput


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


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_scalar_output_is_a_vector_though_one_tower_alone_has_a_row(num_towers: int) -> None:
    plain, wrapped = twins(WithOutput(lambda h: h.square().mean()), num_towers)
    out, expected = wrapped(batch(1)), plain(batch(1))
    assert_close(out, expected[None])
    out.sum().backward()
    expected.backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_numbers_that_each_tower_computes_alike_are_one(num_towers: int) -> None:
    plain, wrapped = twins(WithOutput(lambda h: (h, h.size(1) * 0.37)), num_towers)
    (out, number), (expected, same) = wrapped(batch(7)), plain(batch(7))
    assert_close(out, expected)
    assert number == same


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


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_parameter_among_the_outputs_has_no_graph_under_no_grad(num_towers: int) -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(x), self.fc.weight

    wrapped = wrap(Net().double(), num_towers)
    with torch.no_grad():
        outputs = wrapped(batch(7))
    assert [out.requires_grad for out in outputs] == [False, False]


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
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_an_output_may_be_sparse_or_given_a_sparse_gradient(num_towers: int) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    plain, wrapped = twins(Scaled(), num_towers)
    for net in (plain, wrapped):
        F.embedding(torch.tensor([0, 6, 6, 3]), net(batch(7)), sparse=True).square().sum().backward()
    assert_same_gradients(wrapped, plain)
    plain, wrapped = twins(WithOutput(lambda out: out.relu().to_sparse()), num_towers)
    for net in (plain, wrapped):
        net(batch(7)).to_dense().square().sum().backward()
    assert_same_gradients(wrapped, plain)


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


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_view_made_without_gradients_is_an_output_that_leads_nowhere(num_towers: int) -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Any:
            out = self.fc(x)
            with torch.no_grad():
                return out, out[:, :1], x[:, 1:]

    plain, wrapped = twins(Net(), num_towers)
    for net in (plain, wrapped):
        x = batch(7, requires_grad=True)
        out, part, own = net(x)
        assert part.requires_grad and part.shape == (7, 1) and own.shape == (7, 2)
        (out.square().sum() + part.sum() + own.sum()).backward()
        if net is plain:
            expected = x.grad
    assert_close(x.grad, expected)
    assert_same_gradients(wrapped, plain)


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

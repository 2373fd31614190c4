"""Contracts 1 and 2: the gradients of towers are the plain module's on the whole batch, and None where it has None."""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import (
    EVERY_COUNT,
    SEVERAL,
    assert_close,
    assert_same_gradients,
    assert_same_parameters,
    assert_trains_alike,
    batch,
    mlp,
    twins,
    wrap,
)
from torchtower import TowerParallel, current_tower

# ---- any batch size, both call styles


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 7, 9, 16])
def test_drop_in_gradients_equal_the_plain_modules_for_every_batch_size(num_towers: int, rows: int) -> None:
    assert_trains_alike(mlp(), num_towers, batch(rows))


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 9, 16])
def test_tower_loss_gradients_equal_the_plain_modules_for_every_batch_size(num_towers: int, rows: int) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    x, y = batch(rows), batch(rows, 2, seed=1)
    expected = F.mse_loss(plain(x), y)
    expected.backward()
    got = wrapped.tower_loss(lambda net, x, y: F.mse_loss(net(x), y), x, y)
    got.backward()
    assert_close(got, expected)
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_mean_loss_over_gathered_outputs_needs_no_factor(num_towers: int) -> None:
    y = batch(7, 2, seed=1)
    assert_trains_alike(mlp(), num_towers, batch(7), loss=lambda out: F.mse_loss(out, y))


@pytest.mark.parametrize("num_towers", (16, 64))
def test_more_towers_than_cores_work(num_towers: int) -> None:
    assert_trains_alike(mlp(), num_towers, batch(70))


def test_one_tower_hands_the_call_to_the_module_itself() -> None:
    seen = []
    net = mlp()
    net.register_forward_pre_hook(lambda module, args: seen.append((module, args[0], current_tower())))
    x = batch(4)
    wrap(net, 1)(x)
    assert seen[0][0] is net and seen[0][1] is x and seen[0][2] is None


def test_a_batch_is_split_as_evenly_as_its_rows_allow() -> None:
    sizes = {}

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes[current_tower()] = len(x)
            return x

    wrap(Net(), 4)(batch(9))
    assert sizes == {0: 3, 1: 2, 2: 2, 3: 2}


# ---- inputs of any structure

Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Data:
    left: Tensor
    right: Tensor
    note: str = "kept"


@dataclasses.dataclass(frozen=True)
class FrozenData:
    left: Tensor
    right: Tensor


class AttributeDict(dict):
    def __getattr__(self, name: str) -> Any:
        return self[name]


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
        if isinstance(whole, (dict, UserDict, types.MappingProxyType)):
            return whole[name]
        if hasattr(whole, name):
            return getattr(whole, name)
        args = whole
    found = args[0 if name == "left" else 1]
    return found[0] if isinstance(found, (list, tuple)) else found


CALLS = {
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

    plain, wrapped = twins(Net(), 3)
    x, grads = batch(7), []
    for net in (plain, wrapped):
        scale = torch.full(shape, 1.5, dtype=torch.float64, requires_grad=True)
        net(x, scale).square().sum().backward()
        grads.append(scale.grad)
    assert_close(grads[1], grads[0])
    assert_same_gradients(wrapped, plain)


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
    results = []
    for net in (plain, wrapped):
        x = batch(3, 7, requires_grad=True)
        out = net(x)
        out.square().sum().backward()
        results.append((out, x.grad))
    for got, expected in zip(results[1], results[0], strict=True):
        assert_close(got, expected)
    assert_same_gradients(wrapped, plain)


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


# ---- outputs of any structure


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


# ---- the ways to call backward


def test_several_forwards_before_one_backward() -> None:
    plain, wrapped = twins(mlp(), 3)
    for net in (plain, wrapped):
        total = sum(net(batch(rows, seed=rows)).square().sum() for rows in (5, 2, 7))
        total.backward()
    assert_same_gradients(wrapped, plain)


def test_a_module_applied_to_its_own_output() -> None:
    plain, wrapped = twins(mlp(3, 3), 3)
    for net in (plain, wrapped):
        net(net(net(batch(7)))).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("times", [2, 3])
def test_backward_runs_again_where_the_graph_is_retained(times: int) -> None:
    plain, wrapped = twins(mlp(), 3)
    for net in (plain, wrapped):
        loss = net(batch(7)).square().sum()
        for _ in range(times - 1):
            loss.backward(retain_graph=True)
        loss.backward()
    assert_same_gradients(wrapped, plain)


def test_a_second_backward_without_retained_graph_raises_as_in_the_plain_module() -> None:
    for net in twins(mlp(), 3):
        loss = net(batch(7)).square().sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_two_heads_go_backward_one_after_the_other() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    plain, wrapped = twins(Net(), 3)
    for net in (plain, wrapped):
        left, right = net(batch(7))
        left.square().sum().backward()
        right.square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_two_heads_of_a_shared_trunk_go_backward_with_the_graph_retained() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.left, self.right = mlp(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.trunk(x).tanh()
            return self.left(hidden), self.right(hidden)

    plain, wrapped = twins(Net(), 3)
    for net in (plain, wrapped):
        left, right = net(batch(7))
        left.square().sum().backward(retain_graph=True)
        right.square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_only_one_of_two_outputs_may_be_used() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    plain, wrapped = assert_trains_alike(Net(), 3, batch(7), loss=lambda out: out[0].square().sum())
    assert wrapped.module.right.weight.grad is None and plain.right.weight.grad is None


def test_rows_of_one_tower_alone_may_be_used() -> None:
    assert_trains_alike(mlp(), 3, batch(9), loss=lambda out: out[-1].square().sum())


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_autograd_grad_to_parameters_and_inputs_leaves_grad_alone(num_towers: int) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    found = []
    for net in (plain, wrapped):
        x = batch(7, requires_grad=True)
        found.append(torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()]))
        assert x.grad is None and all(p.grad is None for p in net.parameters())
    for got, expected in zip(found[1], found[0], strict=True):
        assert_close(got, expected)


def test_autograd_grad_to_some_parameters() -> None:
    plain, wrapped = twins(mlp(), 3)
    found = []
    for net in (plain, wrapped):
        inner = getattr(net, "module", net)
        found.append(torch.autograd.grad(net(batch(7)).sum(), inner[2].weight))
    assert_close(found[1][0], found[0][0])


def test_autograd_grad_of_an_unused_parameter_is_none() -> None:
    net = mlp()
    net.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    net.forward = lambda x: net[2](net[1](net[0](x)))
    wrapped = wrap(net, 2)
    grads = torch.autograd.grad(wrapped(batch(4)).sum(), list(wrapped.parameters()), allow_unused=True)
    named = dict(zip([name for name, _ in net.named_parameters()], grads, strict=True))
    assert named["unused"] is None and named["0.weight"] is not None


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_a_gradient_penalty_differentiates_twice(num_towers: int, rows: int) -> None:
    plain, wrapped = twins(mlp(3, 1), num_towers)
    x_grads = []
    for net in (plain, wrapped):
        x = batch(rows, requires_grad=True)
        out = net(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (out.square().sum() + (gradient.norm(dim=1) - 1).square().sum()).backward()
        x_grads.append(x.grad)
    assert_close(x_grads[1], x_grads[0])
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", (1, 2, 3))
def test_a_penalty_on_the_parameters_gradients_differentiates_twice(num_towers: int) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    for net in (plain, wrapped):
        loss = net(batch(7)).square().mean()
        grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        (loss + sum(g.square().sum() for g in grads)).backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_higher_orders_agree(order: int) -> None:
    plain, wrapped = twins(mlp(3, 1), 2)
    found = []
    for net in (plain, wrapped):
        x = batch(4, requires_grad=True)
        value = net(x).sum()
        for _ in range(order):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.pow(2).sum()
        value.backward()
        found.append(x.grad)
    assert_close(found[1], found[0], 1e-11)
    assert_same_gradients(wrapped, plain, 1e-11)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_backward_with_create_graph_fills_grads_that_can_be_differentiated() -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        net(batch(5)).square().sum().backward(create_graph=True)
        first = [p.grad for p in net.parameters()]
        net.zero_grad(set_to_none=True)
        sum(g.square().sum() for g in first).backward()
    assert_same_gradients(wrapped, plain)


def test_hessian_vector_products_agree() -> None:
    plain, wrapped = twins(mlp(), 3)
    found = []
    for net in (plain, wrapped):
        parameters = list(net.parameters())
        grads = torch.autograd.grad(net(batch(7)).square().sum(), parameters, create_graph=True)
        found.append(torch.autograd.grad(grads, parameters, [torch.ones_like(g) for g in grads]))
    for got, expected in zip(found[1], found[0], strict=True):
        assert_close(got, expected)


def test_tower_loss_differentiates_twice() -> None:
    plain, wrapped = twins(mlp(), 3)
    x, y = batch(7), batch(7, 2, seed=1)
    losses = [F.mse_loss(plain(x), y), wrapped.tower_loss(lambda net, x, y: F.mse_loss(net(x), y), x, y)]
    for net, loss in zip((plain, wrapped), losses, strict=True):
        grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        (loss + sum(g.square().sum() for g in grads)).backward()
    assert_same_gradients(wrapped, plain)


def test_gradients_pass_torchs_own_numerical_check() -> None:
    wrapped = wrap(mlp(), 2)
    x = batch(3, requires_grad=True)
    assert torch.autograd.gradcheck(wrapped, (x,))
    assert torch.autograd.gradgradcheck(wrapped, (x,))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_gradients_accumulate_over_backwards(num_towers: int, set_to_none: bool) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    for net in (plain, wrapped):
        for step in range(3):
            for part in range(2):
                net(batch(5, seed=10 * step + part)).square().sum().backward()
            if step < 2:
                net.zero_grad(set_to_none=set_to_none)
    assert_same_gradients(wrapped, plain)


def test_a_kept_gradient_is_not_overwritten_by_the_next_backward() -> None:
    wrapped = wrap(mlp(), 3)
    wrapped(batch(7)).sum().backward()
    kept = [p.grad for p in wrapped.parameters()]
    values = [g.clone() for g in kept]
    wrapped.zero_grad(set_to_none=True)
    wrapped(batch(7, seed=5)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, values, strict=True))
    assert all(p.grad is not g for p, g in zip(wrapped.parameters(), kept, strict=True))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, foreach=True),
}


@pytest.mark.parametrize("style", ["drop-in", "tower loss"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("num_towers", (2, 4))
def test_twenty_steps_follow_the_plain_modules_trajectory(name: str, style: str, num_towers: int) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    for net in (plain, wrapped):
        optimizer = OPTIMIZERS[name](net.parameters())
        for step in range(20):
            x, y = batch(5 + step % 4, seed=step), batch(5 + step % 4, 2, seed=100 + step)
            optimizer.zero_grad()
            if style == "tower loss" and net is wrapped:
                wrapped.tower_loss(lambda net, x, y: F.mse_loss(net(x), y), x, y).backward()
            else:
                F.mse_loss(net(x), y).backward()
            optimizer.step()
    assert_same_parameters(wrapped, plain, 1e-11)


def test_lbfgs_and_other_closures_work() -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=4)

        def closure(net: nn.Module = net, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = net(batch(6)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_same_parameters(wrapped, plain, 1e-9)


def test_a_weight_changed_between_forward_and_backward_raises_as_in_the_plain_module() -> None:
    for net in twins(mlp(), 2):
        loss = net(batch(4)).square().sum()
        with torch.no_grad():
            next(p for name, p in net.named_parameters() if name.endswith("2.weight")).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- hooks and rules of the user's own parameters


def test_hooks_of_the_users_parameters_see_the_whole_gradient_once() -> None:
    plain, wrapped = twins(mlp(), 3)
    seen: list[list[Tensor]] = [[], []]
    accumulated: list[list[Tensor]] = [[], []]
    for i, net in enumerate((plain, wrapped)):
        for p in net.parameters():
            p.register_hook(lambda grad, i=i: seen[i].append(grad.clone()) or grad * 2)
            p.register_post_accumulate_grad_hook(lambda p, i=i: accumulated[i].append(p.grad.clone()))
        net(batch(7)).square().sum().backward()
    assert len(seen[1]) == len(seen[0]) == len(accumulated[1]) == 4
    assert_same_gradients(wrapped, plain)
    for grads in (seen, accumulated):
        for got, expected in zip(*[sorted(g, key=lambda t: t.numel()) for g in (grads[1], grads[0])], strict=True):
            assert_close(got, expected)


def test_an_optimizer_that_steps_in_the_backward_hook_works() -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in net.parameters()}

        def step(p: Tensor, optimizers: Any = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in net.parameters():
            p.register_post_accumulate_grad_hook(step)
        for i in range(3):
            net(batch(6, seed=i)).square().mean().backward()
    assert_same_parameters(wrapped, plain)


class SometimesUsed(nn.Module):
    """Tower ``user`` alone uses ``rare``; nobody uses ``never``."""

    def __init__(self, user: int) -> None:
        super().__init__()
        self.user = user
        self.always, self.rare, self.never = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.always(x)
        return out + self.rare(x) if current_tower() == self.user else out


@pytest.mark.parametrize("user", [0, 1, 2])
def test_a_parameter_that_some_towers_use_counts_zero_for_the_others(user: int) -> None:
    net = SometimesUsed(user).double()
    wrapped = wrap(net, 3)
    x = batch(6)
    out = wrapped(x)
    out.sum().backward()
    assert net.never.weight.grad is None and net.never.bias.grad is None
    rows = x[2 * user : 2 * user + 2]
    assert_close(net.rare.weight.grad, rows.sum(0).expand(2, 3).contiguous())
    assert_close(net.always.weight.grad, x.sum(0).expand(2, 3).contiguous())


def test_in_tower_loss_a_parameter_that_one_tower_uses_is_averaged_with_zeros() -> None:
    net = SometimesUsed(1).double()
    x = batch(6)
    wrap(net, 3).tower_loss(lambda net, x: net(x).sum(), x).backward()
    assert_close(net.rare.weight.grad, (x[2:4].sum(0) / 3).expand(2, 3).contiguous())
    assert net.never.weight.grad is None


def test_frozen_parameters_stay_without_gradient() -> None:
    net = mlp()
    net[0].requires_grad_(False)
    _, wrapped = assert_trains_alike(net, 3, batch(7))
    assert wrapped.module[0].weight.grad is None


def test_freezing_and_thawing_takes_effect_at_the_next_forward() -> None:
    plain, wrapped = twins(mlp(), 3)
    for flags in [(True, False), (False, True), (True, True), (False, False)]:
        for net in (plain, wrapped):
            inner = getattr(net, "module", net)
            net.zero_grad()
            inner[0].requires_grad_(flags[0])
            inner[2].weight.requires_grad_(flags[1])
            net(batch(7)).square().sum().backward()
        assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("freeze", [True, False])
def test_what_a_forward_recorded_counts_not_what_is_frozen_later(freeze: bool) -> None:
    plain, wrapped = twins(mlp(), 3)
    for net in (plain, wrapped):
        inner = getattr(net, "module", net)
        inner[0].requires_grad_(freeze)
        loss = net(batch(7)).square().sum()
        inner[0].requires_grad_(not freeze)
        if freeze:
            # AccumulateGrad refuses in neither; the graph remembers.
            inner[0].requires_grad_(True)
        loss.backward()
    assert_same_gradients(wrapped, plain)


def test_a_wholly_frozen_module_still_passes_gradients_to_its_input() -> None:
    plain, wrapped = twins(mlp().requires_grad_(False), 3)
    grads = []
    for net in (plain, wrapped):
        x = batch(7, requires_grad=True)
        net(x).square().sum().backward()
        grads.append(x.grad)
    assert_close(grads[1], grads[0])


def test_a_wholly_frozen_module_gives_outputs_without_graph() -> None:
    assert not wrap(mlp().requires_grad_(False), 2)(batch(4)).requires_grad


def test_expanded_and_shared_gradients_are_not_written_over_one_another() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
            self.c = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.a + self.b).sum() * x + self.c.expand(4, 3).sum()

    plain, wrapped = twins(Net(), 3)
    for net in (plain, wrapped):
        for _ in range(2):
            net(batch(7)).square().sum().backward()
    assert_same_gradients(wrapped, plain)
    a, b = wrapped.module.a.grad, wrapped.module.b.grad
    assert a.data_ptr() != b.data_ptr()


def test_functional_call_differentiates_the_given_parameters() -> None:
    plain, wrapped = twins(mlp(), 3)
    outer = nn.Sequential(wrapped)  # torch refuses to call a DataParallel itself with other parameters
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    results = []
    for net, prefix in ((plain, ""), (outer, "0.module.")):
        given = {prefix + name: p.detach() * scale for name, p in plain.named_parameters()}
        out = torch.func.functional_call(net, given, batch(7))
        results.append((out, *torch.autograd.grad(out.square().sum(), scale)))
    for got, expected in zip(results[1], results[0], strict=True):
        assert_close(got, expected)
    assert torch.equal(wrapped(batch(4)), wrapped(batch(4)))
    assert_close(wrapped(batch(7)), plain(batch(7)))


def test_distributed_data_parallel_wraps_towers() -> None:
    plain, wrapped = twins(mlp(), 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        both = nn.parallel.DistributedDataParallel(wrapped)
        for step in range(2):
            plain(batch(6, seed=step)).square().sum().backward()
            both(batch(6, seed=step)).square().sum().backward()
        assert_same_gradients(wrapped, plain)
        del both
    finally:
        dist.destroy_process_group()


# ---- tower_loss


def test_tower_loss_weighs_by_what_the_loss_function_returns() -> None:
    plain, wrapped = twins(nn.Linear(3, 1), 3)
    x = batch(6)
    tokens = [5.0, 0.0, 2.0]
    loss = wrapped.tower_loss(lambda net, x: (net(x).mean(), tokens[current_tower()]), x)
    loss.backward()
    expected = (plain(x[:2]).mean() * 5 + plain(x[4:]).mean() * 2) / 7
    expected.backward()
    assert_close(loss, expected)
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_masked_tokens_as_weights_give_the_mean_over_tokens(num_towers: int) -> None:
    plain, wrapped = twins(nn.Linear(3, 4), num_towers)
    x = batch(9)
    target = torch.tensor([0, -100, 1, -100, -100, 2, 3, 0, 1])

    def loss_fn(net: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        count = (target != -100).sum()
        return F.cross_entropy(net(x), target, reduction="sum") / count.clamp_min(1), count

    got = wrapped.tower_loss(loss_fn, x, target)
    got.backward()
    expected = F.cross_entropy(plain(x), target)
    expected.backward()
    assert_close(got, expected)
    assert_same_gradients(wrapped, plain)


def test_tower_losses_lists_each_towers_own_loss() -> None:
    net = nn.Linear(3, 1).double()
    wrapped = wrap(net, 3)
    x = batch(7)
    wrapped.tower_loss(lambda net, x: net(x).mean(), x)
    parts = torch.split(x, [3, 2, 2])
    assert len(wrapped.tower_losses) == 3
    for loss, part in zip(wrapped.tower_losses, parts, strict=True):
        assert loss.dim() == 0 and not loss.requires_grad
        assert_close(loss, net(part).mean())


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_tower_loss_takes_losses_of_one_element_and_returns_a_0d_loss(num_towers: int) -> None:
    loss = wrap(nn.Linear(3, 1).double(), num_towers).tower_loss(lambda net, x: net(x).mean().reshape(1), batch(4))
    assert loss.shape == ()


def test_tower_loss_passes_keywords_and_nested_batches() -> None:
    plain, wrapped = twins(mlp(), 2)
    x, y = batch(5), batch(5, 2, seed=1)
    loss = wrapped.tower_loss(
        lambda net, data, *, y, scale: scale * F.mse_loss(net(data["x"]), y), {"x": x}, y=y, scale=2
    )
    assert_close(loss, 2 * F.mse_loss(plain(x), y))


def test_tower_loss_differentiates_to_its_inputs() -> None:
    plain, wrapped = twins(mlp(), 3)
    grads = []
    for use in (lambda x: plain(x).square().mean(), lambda x: wrapped.tower_loss(lambda n, x: n(x).square().mean(), x)):
        x = batch(7, requires_grad=True)
        use(x).backward()
        grads.append(x.grad)
    assert_close(grads[1], grads[0])


def test_tower_loss_without_grad_gives_the_value() -> None:
    wrapped = wrap(mlp(), 2)
    with torch.no_grad():
        loss = wrapped.tower_loss(lambda net, x: net(x).mean(), batch(5))
    assert not loss.requires_grad
    assert_close(loss, wrapped.module(batch(5)).mean())


def test_both_call_styles_mix_in_one_backward() -> None:
    plain, wrapped = twins(mlp(), 3)
    (plain(batch(5)).sum() + plain(batch(7, seed=1)).square().mean()).backward()
    tower_loss = wrapped.tower_loss(lambda net, x: net(x).square().mean(), batch(7, seed=1))
    (wrapped(batch(5)).sum() + tower_loss).backward()
    assert_same_gradients(wrapped, plain)


def test_a_loss_function_that_calls_the_wrapper_itself_means_its_towers_replica() -> None:
    plain, wrapped = twins(mlp(), 3)
    loss = wrapped.tower_loss(lambda net, x: wrapped(x).square().mean(), batch(7))
    loss.backward()
    plain(batch(7)).square().mean().backward()
    assert_same_gradients(wrapped, plain)


TRANSFORMS = {
    "grad": lambda net, x: torch.func.grad(lambda x: net(x).sum())(x),
    "vmap": lambda net, x: torch.func.vmap(net)(x[None].expand(2, -1, -1)),
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda net, x: torch.func.jacrev(net)(x),
    "hessian": lambda net, x: torch.func.hessian(lambda x: net(x).sum())(x),
    "jacobian": lambda net, x: torch.autograd.functional.jacobian(net, x),
    "forward mode": lambda net, x: _forward_mode(net, x),
}


def _forward_mode(net: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(net(torch.autograd.forward_ad.make_dual(x, x * 2))).tangent


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_the_wrapper_are_those_of_the_module(name: str) -> None:
    plain, wrapped = twins(mlp(), 2)
    assert_close(TRANSFORMS[name](wrapped, batch(4)), TRANSFORMS[name](plain, batch(4)))


def test_wrapped_is_a_data_parallel_with_its_signature() -> None:
    wrapped = TowerParallel(mlp(), ["cpu", "cpu"], "cpu", 0)
    assert isinstance(wrapped, nn.DataParallel)
    assert wrapped.device_ids == ["cpu", "cpu"] and wrapped.dim == 0
    assert wrapped.output_device == torch.device("cpu")
    assert isinstance(wrapped.module, nn.Sequential)

"""What a replica is: a module of the same class, with parameters of its own, that persists and follows."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    SEVERAL,
    assert_close,
    assert_go_backward_alike,
    assert_same_gradients,
    assert_trains_alike,
    batch,
    twins,
    wrap,
)
from tests.modules import OneLayer
from torchtower import current_tower

# ---- what a replica is


def test_parameters_are_held_once_for_any_number_of_towers() -> None:
    seen: dict[int | None, int] = {}

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            seen[current_tower()] = self.fc.weight.data_ptr()
            return self.fc(x)

    net = Net()
    wrap(net, 4)(torch.ones(8, 3))
    assert seen == dict.fromkeys(range(4), net.fc.weight.data_ptr())


def test_replicas_persist_between_steps() -> None:
    seen: list[set[int]] = []

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            seen[-1].add(id(self))
            return self.fc(x)

    wrapped = wrap(Net(), 2)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(3):
        seen.append(set())
        wrapped(torch.ones(4, 3)).sum().backward()
        optimizer.step()
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 2


def test_modules_that_call_parameters_in_forward_see_leaves() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            assert next(self.parameters()).device == x.device
            assert all(p.is_leaf and isinstance(p, nn.Parameter) for p in self.parameters())
            assert [name for name, _ in self.named_parameters()] == ["fc.weight", "fc.bias"]
            penalty = sum(p.square().sum() for p in self.parameters())
            return self.fc(x) + penalty

    assert_trains_alike(Net(), 3, batch(7))


def test_a_forward_may_zero_gradients_and_read_the_state_dict() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            self.zero_grad()
            assert len(self.state_dict()) == 2
            return self.fc(x)

    assert_trains_alike(Net(), 2, batch(5))


def test_replicas_are_instances_of_the_modules_class_with_its_methods() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        @property
        def width(self) -> int:
            return self.fc.out_features

        def encode(self, x: Tensor) -> Tensor:
            return self.fc(x).tanh()

    plain, wrapped = twins(Net(), 3)

    def loss_fn(net: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(net, Net) and net.width == 2
        return net.encode(x).square().mean()

    wrapped.tower_loss(loss_fn, batch(7)).backward()
    plain.encode(batch(7)).square().mean().backward()
    assert_same_gradients(wrapped, plain)


def test_modules_with_unusual_classes_can_be_replicated() -> None:
    class Odd(nn.Module):
        def __new__(cls, *args: Any) -> Odd:
            return super().__new__(cls)

        def __init__(self, required: int) -> None:
            super().__init__()
            self.fc, self.lock, self.numbers = nn.Linear(3, required), threading.Lock(), (n for n in range(3))

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)

        def __getattr__(self, name: str) -> Any:
            return 5.0 if name == "made_up" else super().__getattr__(name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) * self.made_up

        def forward(self, x: Tensor) -> Tensor:
            with self.lock:
                return self.fc(x)

    net = Odd(2).double()
    assert_close(wrap(net, 3)(batch(7)), net(batch(7)))


def test_a_class_with_a_constructor_of_its_own_is_replicated() -> None:
    class Net(nn.Module):
        def __new__(cls, width: int) -> Any:
            return super().__new__(cls)

        def __init__(self, width: int) -> None:
            super().__init__()
            self.last = nn.Linear(3, width)

        def __deepcopy__(self, memo: Any) -> Any:
            twin = Net(2)
            twin.load_state_dict(self.state_dict())
            return twin.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x)

    assert_trains_alike(Net(2), 2, batch(7))


class AttrDict(dict[str, Any]):
    """Of the kind that every configuration file is read into: a name that is no key is a KeyError."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("towers", SEVERAL)
def test_an_attribute_whose_own_lookup_raises_is_shared(towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.options = AttrDict(scale=2.0)
            self.all_options = [AttrDict(shift=1.0)]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x) * self.options.scale + self.all_options[0].shift
            return out

    plain, inner = Net().double(), Net().double()  # no such attribute can be copied
    inner.load_state_dict(plain.state_dict())
    wrapped = wrap(inner, towers)
    assert_go_backward_alike(plain, wrapped, batch(5))


class Unmeasured(tuple[Any, ...]):
    """As e3nn's irreps are: several things at once, so it will not say how many."""

    def __len__(self) -> int:
        raise NotImplementedError


@pytest.mark.parametrize("towers", SEVERAL)
def test_a_tuple_without_a_length_is_followed(towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.both = Unmeasured([self.fc, 2])

        def forward(self, x: Tensor) -> Tensor:
            layer, scale = self.both
            out: Tensor = layer(x) * scale
            return out

    plain, wrapped = twins(Net(), towers)
    assert_go_backward_alike(plain, wrapped, batch(5))


class Labelled(tuple[Any, ...]):
    pass


class LabelledPair(collections.namedtuple("LabelledPair", ["layer", "scale"])):
    pass


@pytest.mark.parametrize("make", [Labelled, lambda parts: LabelledPair(*parts)])
@pytest.mark.parametrize("towers", SEVERAL)
def test_a_tuple_keeps_its_attributes(towers: int, make: Callable[[Any], Any]) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.both = make([self.fc, 2])
            self.both.offset, self.both.again = 3, self.fc

        def forward(self, x: Tensor) -> Tensor:
            layer, scale = self.both
            assert self.both.again is layer is self.fc
            out: Tensor = layer(x) * scale + self.both.offset
            return out

    plain, wrapped = twins(Net(), towers)
    assert_go_backward_alike(plain, wrapped, batch(5))


@pytest.mark.parametrize("towers", SEVERAL)
def test_attributes_of_buffers_are_every_towers(towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.register_buffer("scale", torch.ones(2))
            self.scale.power = 3

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x) * self.scale**self.scale.power
            return out

    plain, inner = Net().double(), Net().double()
    plain.scale.power = inner.scale.power = 2  # which a cast has lost
    inner.load_state_dict(plain.state_dict())
    assert_go_backward_alike(plain, wrap(inner, towers), batch(5))


def test_replicas_do_not_pass_for_those_of_nn_data_parallel() -> None:
    # Theirs have no parameters, so libraries (torchdiffeq) that see the mark look for them elsewhere.
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Any:
            assert not hasattr(self, "_is_replica") and len(list(self.parameters())) == 2
            return self.fc(x)

    wrap(Net().double(), 2)(batch(4))


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_attributes_of_parameters_and_buffers_are_the_originals_at_any_time(num_towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("offset", torch.zeros(3))
            self.weight.scale, self.offset.scale = 1.0, 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight * self.weight.scale + (1 + self.offset) * self.offset.scale

    plain, wrapped = twins(Net(), num_towers)
    for factor in (1.0, 3.0):
        for net in (plain, wrapped.module):
            net.weight.scale, net.offset.scale = factor, -factor
        assert torch.equal(wrapped(batch(6)), plain(batch(6)))


@pytest.mark.parametrize("registered", [False, True])
def test_a_leaf_that_is_frozen_becomes_a_buffer(registered: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            scale = torch.ones(2, dtype=torch.float64, requires_grad=True)
            if registered:
                self.register_buffer("scale", scale)
            else:
                self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.scale

    plain, wrapped = twins(Net(), 2)
    for net, module in ((plain, plain), (wrapped, wrapped.module)):
        net(batch(4)).sum().backward()
        for tensor in (module.scale, *module.parameters()):
            tensor.requires_grad_(False)
        assert not net(batch(4)).requires_grad
        module.fc.requires_grad_(True)
        (net(batch(4)) + net(batch(4, seed=1))).square().sum().backward()
    assert_same_gradients(wrapped, plain)
    assert_close(wrapped.module.scale.grad, plain.scale.grad)


def test_tensors_that_cannot_be_copied_into_may_lie_in_the_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.lengths = self._ragged()
            self.register_buffer("nested", self._ragged(), persistent=False)
            self.packed = torch.eye(3).to_mkldnn()

        def _ragged(self) -> Tensor:
            return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x @ self.packed.to_dense().to(x)) * self.lengths.values().sum() + self.nested.values().sum()

    plain, wrapped = Net(), wrap(Net(), 3)
    wrapped.module.load_state_dict(plain.state_dict())
    for _ in range(2):
        assert_go_backward_alike(plain, wrapped, batch(5).float(), rtol=1e-5)

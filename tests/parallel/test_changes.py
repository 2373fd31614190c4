"""Contracts 4 and 7: what is changed on the wrapped module takes effect at the next forward."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.helpers import (
    EVERY_COUNT,
    SEVERAL,
    assert_close,
    assert_same_gradients,
    batch,
    both_go_backward,
    mlp,
    twins,
    wrap,
)
from tests.modules import OneLayer
from torchtower import current_tower

CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "to dtype and back": lambda net: net.half().double(),
    "parameter replaced": lambda net: setattr(net[0], "weight", nn.Parameter(torch.ones_like(net[0].weight))),
    "data replaced": lambda net: setattr(net[0].weight, "data", torch.ones_like(net[0].weight)),
    "data written": lambda net: net[0].weight.data.add_(1),
    "written without grad": lambda net: net[0].weight.detach().mul_(2),
    "written by numpy": lambda net: net[0].weight.detach().numpy().fill(0.25),
    "initialised anew": lambda net: nn.init.constant_(net[0].weight, 0.5),
    "frozen": lambda net: net[0].requires_grad_(False),
    "parameter of another shape": lambda net: _widen(net),
    "module added": lambda net: net.add_module("3", _filled(nn.Linear(2, 2))),
    "module replaced": lambda net: net.__setitem__(1, nn.Sigmoid()),
    "module deleted": lambda net: net.__delitem__(1),
    "parameter added": lambda net: _scale(net),
    "bias removed": lambda net: net[0].register_parameter("bias", None),
    "pruned": lambda net: prune.l1_unstructured(net[0], "weight", amount=0.5),
    "pruned for good": lambda net: prune.remove(prune.l1_unstructured(net[0], "weight", amount=0.5), "weight"),
    "applied": lambda net: net.apply(lambda m: m.weight.data.fill_(0.1) if isinstance(m, nn.Linear) else None),
    "activation's option": lambda net: setattr(net[3 - 2], "inplace", True),
    "class of a submodule": lambda net: setattr(net[1], "__class__", nn.Sigmoid),
    "tied": lambda net: _tie(net),
    "channels_last": lambda net: net.to(memory_format=torch.channels_last),
    "bound method as forward": lambda net: setattr(net, "forward", lambda x: net[2](net[1](net[0](x))) * 2),
    "loaded": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
    "vector to parameters": lambda net: nn.utils.vector_to_parameters(
        torch.linspace(0, 1, sum(p.numel() for p in net.parameters())).double(), net.parameters()
    ),
}


def _filled(layer: nn.Linear) -> nn.Linear:
    layer.double()
    with torch.no_grad():
        layer.weight.fill_(0.3)
        layer.bias.fill_(0.1)
    return layer


def _widen(net: nn.Sequential) -> None:
    net[0], net[2] = _filled(nn.Linear(3, 9)), _filled(nn.Linear(9, 2))


def _scale(net: nn.Sequential) -> None:
    net[2].scale = nn.Parameter(torch.tensor(2.0).double())
    net[2].register_forward_hook(lambda module, args, out: out * module.scale)


def _tie(net: nn.Sequential) -> None:
    net.add_module("3", nn.Tanh())
    net.add_module("4", net[2])
    net.insert(3, _filled(nn.Linear(2, 5)))


@pytest.mark.parametrize("num_towers", (1, 3))
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_wrapping_takes_effect_at_the_next_forward(change: str, num_towers: int) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    both_go_backward(plain, wrapped)
    for net in (plain, wrapped.module):
        CHANGES[change](net)
    both_go_backward(plain, wrapped)
    both_go_backward(plain, wrapped, rows=5)


class Tabled(nn.Module):
    """Looks its layer up in a table of many entries, and changes an attribute in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)
        self.steps, self.numbers, self.names = 0, list(range(2000)), {str(index): index for index in range(2000)}

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        layer = self.names["second"] if "second" in self.names else self.numbers[0]
        return self.first(x) + (layer(x) if isinstance(layer, nn.Module) else 0)


@pytest.mark.parametrize("num_towers", (1, 3))
def test_a_module_that_is_put_into_a_large_table_is_each_towers_own(num_towers: int) -> None:
    plain, wrapped = twins(Tabled(), num_towers)
    changes: list[Callable[[Tabled], Any]] = [
        lambda net: None,
        lambda net: net.numbers.__setitem__(0, net.second),
        lambda net: net.numbers.__setitem__(0, 0),
        lambda net: net.names.__setitem__("second", net.second),
    ]
    for change in changes:
        for net in (plain, wrapped.module):
            change(net)
            net.zero_grad()
        for _ in range(2):
            plain(batch(7)).square().mean().backward()
            wrapped.tower_loss(lambda replica, x: replica(x).square().mean(), batch(7)).backward()
        assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_class_that_the_user_gives_a_module_stays_its_class(num_towers: int) -> None:
    class Counted(nn.Linear):
        seen = 0

    for change in (
        lambda layer: setattr(layer, "__class__", nn.Linear),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
    ):
        layer = Counted(3, 2)
        wrapped = wrap(nn.Sequential(nn.Tanh(), layer).double(), num_towers)
        layer.register_full_backward_hook(lambda module, *_: setattr(module, "seen", module.seen + 1))
        out = wrapped(batch(8, requires_grad=True))
        change(layer)
        kind = type(layer)
        out.sum().backward()
        assert type(layer) is kind and layer.seen == 1
        wrapped(batch(8, requires_grad=True)).sum().backward()


def test_hooks_put_before_others_are_no_change() -> None:
    wrapped = wrap(mlp(), 2)
    for prepend in (False, True):
        wrapped.module[0].register_forward_hook(lambda module, args, out: None, prepend=prepend)
    wrapped(batch(4))
    assert wrapped._towers._original.changes() == []


def test_a_refused_module_leaves_earlier_outputs_whole() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    plain, wrapped = twins(nn.Sequential(Counting(3, 3), Counting(3, 2)), 2)
    out = wrapped(batch(4))
    wrapped.module.lazy = nn.LazyLinear(2)
    with pytest.raises(ValueError, match="Modules with uninitialized parameters can't be used") as error:
        wrapped(batch(4))
    assert isinstance(error.value, RuntimeError), "of nn.DataParallel's type, too"
    out.sum().backward()
    plain(batch(4)).sum().backward()
    del wrapped.module.lazy
    assert_same_gradients(wrapped, plain)
    assert_close(wrapped(batch(4)), plain(batch(4)))


class Keyed(nn.Module):
    """Whose output depends on the keys under which it finds things."""

    def __init__(self) -> None:
        super().__init__()
        self.flags, self.gains = {"a": True}, {"left": 1.0, "right": 2.0}
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 2)})
        self.register_buffer("mean", torch.full((2,), 3.0))
        self.first = 5.0

    def forward(self, x: Tensor) -> Tensor:
        (name,) = self.heads
        factors = ["a" in self.flags, self.gains["left"], hasattr(self, "first"), "mean" in self._buffers, name == "a"]
        return self.heads[name](x) * sum(float(factor) * 10**i for i, factor in enumerate(factors))


def _exchange(gains: dict[str, float]) -> None:
    left, right = gains.values()
    gains.clear()
    gains.update(right=left, left=right)


def _rename_buffer(net: Any) -> None:
    buffer = net.mean
    del net.mean
    net.register_buffer("std", buffer)


def _rename_attribute(net: Any) -> None:
    net.second = net.first
    del net.first


RENAMINGS: dict[str, Callable[[Any], Any]] = {
    "entry": lambda net: net.flags.update(b=net.flags.pop("a")),
    "entries exchanged": lambda net: _exchange(net.gains),
    "submodule": lambda net: net.heads.update({"b": net.heads.pop("a")}),
    "buffer": _rename_buffer,
    "attribute": _rename_attribute,
}


@pytest.mark.parametrize("num_towers", (1, 3))
@pytest.mark.parametrize("renaming", RENAMINGS)
def test_what_stands_under_another_name_is_found_there(renaming: str, num_towers: int) -> None:
    plain, wrapped = twins(Keyed(), num_towers)
    both_go_backward(plain, wrapped)
    for net in (plain, wrapped.module):
        RENAMINGS[renaming](net)
    both_go_backward(plain, wrapped)


class Offset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.register_buffer("registered", torch.zeros(2))
        self.attribute = torch.zeros(2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (1 + self.registered) + self.attribute


@pytest.mark.parametrize("where", ["registered", "attribute"])
@pytest.mark.parametrize("num_towers", (1, 3))
def test_a_buffer_may_be_trained_later_and_frozen_again(num_towers: int, where: str) -> None:
    plain, wrapped = twins(Offset(), num_towers)
    for trained in (False, True, False, True):
        for net in (plain, wrapped.module):
            getattr(net, where).requires_grad_(trained)
        both_go_backward(plain, wrapped)
        ours, theirs = getattr(wrapped.module, where), getattr(plain, where)
        assert_close(ours.grad, theirs.grad)
        assert (ours.grad is not None) == trained
        ours.grad = theirs.grad = None


@pytest.mark.parametrize("where", ["registered", "attribute"])
@pytest.mark.parametrize("num_towers", (1, 3))
def test_a_buffer_may_be_filled_in_place_with_what_has_a_graph_and_detached(num_towers: int, where: str) -> None:
    plain, wrapped = twins(Offset(), num_towers)
    weights = [torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for filled in (False, True, True, False, True):
        for net, weight in zip((plain, wrapped.module), weights, strict=True):
            getattr(net, where).detach_()
            if filled:
                getattr(net, where).copy_(weight.square())
        both_go_backward(plain, wrapped)
        assert_close(weights[1].grad, weights[0].grad)


@pytest.mark.parametrize("num_towers", (1, 3))
def test_a_state_that_is_detached_in_place_is_one_for_all_towers(num_towers: int) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.state = nn.Linear(3, 2), None

        def forward(self, x: Tensor) -> Tensor:
            if self.state is None:
                self.state = self.fc(x).sum(0)
            else:
                self.state.add_(1)
            return self.fc(x) + self.state

    plain, wrapped = twins(Counting(), num_towers)
    for net in (plain, wrapped):
        net(batch(6))
    for net in (plain, wrapped.module):
        net.state.detach_().zero_()
    for _ in range(2):
        both_go_backward(plain, wrapped)
        assert_close(wrapped.module.state, plain.state)


def test_data_transposed_in_place_are_seen() -> None:
    plain, wrapped = twins(nn.Linear(3, 3), 2)
    both_go_backward(plain, wrapped)
    for net in (plain, wrapped.module):
        net.weight.data = net.weight.data.t()
    both_go_backward(plain, wrapped)


@pytest.mark.parametrize("change", ["to dtype and back", "parameter replaced", "module added", "frozen"])
def test_a_change_between_forward_and_backward_does_not_reach_that_backward(change: str) -> None:
    plain, wrapped = twins(mlp(), 3)
    losses = [net(batch(7)).square().sum() for net in (plain, wrapped)]
    old = [list(net.parameters()) for net in (plain, wrapped.module)]
    if change != "to dtype and back":
        for net in (plain, wrapped.module):
            CHANGES[change](net)
    for loss in losses:
        loss.backward()
    for theirs, ours in zip(*old, strict=True):
        assert_close(ours.grad, theirs.grad)


def test_half_and_float_of_the_wrapper_reach_the_towers() -> None:
    wrapped = wrap(nn.Linear(3, 2), 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        wrapped.to(dtype)
        out = wrapped(torch.ones(4, 3, dtype=dtype))
        assert out.dtype == dtype
        wrapped.zero_grad()
        out.sum().backward()
        assert wrapped.module.weight.grad.dtype == dtype


def test_another_module_may_be_put_into_the_wrapper() -> None:
    wrapped = wrap(mlp(), 2)
    wrapped(batch(4))
    other = mlp()
    wrapped.module = other
    both_go_backward(copy.deepcopy(other), wrapped)


def test_buffers_written_from_outside_reach_every_tower() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()).double())

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    wrapped = wrap(Net(), 3)
    x = batch(6)
    for value in (1.0, 2.0, 3.0):
        wrapped.module.scale.data.fill_(value)
        assert torch.equal(wrapped(x), x * value)
    wrapped.module.scale = torch.tensor(4.0).double()
    assert torch.equal(wrapped(x), x * 4)
    wrapped.module.scale = torch.tensor([5.0, 6.0, 7.0]).double()
    assert torch.equal(wrapped(x), x * wrapped.module.scale)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("way", ["closure", "nonlocal"])
def test_what_a_function_closes_over_apart_from_the_module_may_be_bound_anew(way: str, num_towers: int) -> None:
    scale = torch.zeros(2, dtype=torch.float64)

    def seen(x: Tensor) -> Tensor:
        nonlocal scale
        if way == "nonlocal" and current_tower() in (None, 0):
            scale = scale + 1
        return x

    class Scaled(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.scale = seen, lambda: scale

        def forward(self, x: Tensor) -> Tensor:
            return self.seen(self.fc(x)) * (self.scale() if way == "closure" else 1)

    wrapped = wrap(Scaled().double(), num_towers)
    for step in range(3):
        if way == "closure":
            scale = torch.full((2,), float(step), dtype=torch.float64)
            assert_close(wrapped(batch(8)), wrapped.module.fc(batch(8)) * step)
        else:
            wrapped(batch(8))
            assert scale[0] == step + 1


def test_an_attribute_deleted_from_a_namespace_that_leads_to_a_layer_is_gone_in_every_tower() -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.kept = types.SimpleNamespace(layer=self.fc, scale=2.0)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.kept.layer(x)
            return y * getattr(self.kept, "scale", 1.0)

    plain, wrapped = twins(Net(), 2)
    both_go_backward(plain, wrapped)
    for inner in (plain, wrapped.module):
        del inner.kept.scale
    both_go_backward(plain, wrapped)

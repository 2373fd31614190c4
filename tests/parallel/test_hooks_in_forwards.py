"""Hooks that a forward registers and removes, on modules and on parameters."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import SEVERAL, assert_close, assert_same_gradients, batch, twins, wrap
from tests.modules import OneLayer


class Extractor(nn.Module):
    """Registers its hook in the first forward."""

    def __init__(self, handle_kept: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.latents: Any = None
        self.handle: Any = None
        self.handle_kept = handle_kept

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self.latents = output

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.latents = None
        if self.handle is None:
            handle = self.net[0].register_forward_hook(self._keep, with_kwargs=True)
            self.handle = handle if self.handle_kept else "registered"
        out = self.net(x)
        return out, self.latents


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_hook_that_a_forward_registers_stays_registered(num_towers: int) -> None:
    plain, wrapped = twins(Extractor(False), num_towers)
    for training in (True, True, False, False, True):
        for net in (plain, wrapped):
            net.train(training)
            out, latents = net(batch(6))
            (out.sum() + latents.square().sum()).backward()
            if net is plain:
                expected = latents
        assert_close(latents, expected)
        assert_same_gradients(wrapped, plain)
    assert len(wrapped.module.net[0]._forward_hooks) == len(wrapped.module.net[0]._forward_hooks_with_kwargs) == 1


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_the_handle_of_a_hook_that_a_forward_registers_removes_it(num_towers: int) -> None:
    _, wrapped = twins(Extractor(True), num_towers)
    for _ in range(2):
        assert wrapped(batch(6))[1] is not None
    inner: Any = wrapped.module
    inner.handle.remove()
    assert not inner.net[0]._forward_hooks and not inner.net[0]._forward_hooks_with_kwargs
    assert wrapped(batch(6))[1] is None
    inner.handle = None
    assert wrapped(batch(6))[1] is not None
    assert pickle.loads(pickle.dumps(wrapped))(batch(6))[1] is not None


def test_a_hook_that_a_forward_removes_is_removed() -> None:
    class Initialised(OneLayer):
        """By its first batch."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()))
            self.calls: list[int] = []
            self.register_forward_pre_hook(Initialised.initialise)

        @staticmethod
        def initialise(net: Any, args: Any) -> None:
            net.scale.fill_(3)
            net._forward_pre_hooks.clear()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x) * self.scale
            return out

    plain, wrapped = twins(Initialised(), 2)
    for training in (True, False, True):
        for net in (plain, wrapped):
            net.train(training)
            net(batch(4)).sum().backward()
        assert_same_gradients(wrapped, plain)
        wrapped.module.scale.fill_(2), plain.scale.fill_(2)
    assert not wrapped.module._forward_pre_hooks


def test_a_hook_of_one_forward_alone_leaves_nothing() -> None:
    class Probed(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            seen: list[Tensor] = []
            handle = self.fc.register_forward_hook(lambda module, args, output: seen.append(output))
            try:
                return self.fc(x) + seen[0] if seen else self.fc(x)
            finally:
                handle.remove()

    wrapped = wrap(Probed(), 3)
    for _ in range(2):
        wrapped(torch.ones(6, 3)).sum().backward()
    assert not wrapped.module.fc._forward_hooks


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_parameters_hook_that_a_forward_registers_outlives_its_memory(num_towers: int) -> None:
    class Masked(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.registered, self.mask = False, torch.tensor([1.0, 0, 1], dtype=torch.float64)

        def forward(self, x: Tensor) -> Any:
            if not self.registered:
                self.fc.weight.register_hook(lambda grad: grad * self.mask)
                self.registered = True
            return self.fc(x)

    plain, wrapped = twins(Masked(), num_towers)
    for _ in range(3):
        for net in (plain, wrapped):
            net(batch(5)).square().sum().backward()
            for parameter in net.parameters():
                parameter.data = parameter.data.clone()
        assert_same_gradients(wrapped, plain)


class Toggling(OneLayer):
    """Changes its hooks in every forward, in a way of its own."""

    def __init__(self, change: Callable[[Any, int], None]) -> None:
        super().__init__()
        self.change, self.calls = change, 0
        self.handles: list[Any] = []
        self.handle: Any = None

    def register(self, hook: Callable[..., Any], **options: Any) -> Any:
        return self.fc.register_forward_hook(hook, **options)

    def forward(self, x: Tensor) -> Any:
        self.change(self, self.calls)
        self.calls += 1
        return self.fc(x)


def _double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


def _add(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out + 8


def _later_removed(net: Any, call: int) -> None:
    if call == 0:
        net.handle = net.register(_double)
    elif call == 2:
        net.handle.remove()


def _on_and_off(net: Any, call: int) -> None:
    if net.handle is None:
        net.handle = net.register(_double)
    else:
        net.handle.remove()
        net.handle = None


def _anew(net: Any, call: int) -> None:
    while net.handles:
        net.handles.pop().remove()
    net.handles.append(net.register(_double))


def _put_before(net: Any, call: int) -> None:
    if call == 0:
        net.register(_double)
    elif call == 1:
        net.register(_add, prepend=True)


@pytest.mark.parametrize("change", [_later_removed, _on_and_off, _anew, _put_before])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_hooks_come_and_go_in_forwards_as_in_the_plain_module(num_towers: int, change: Any) -> None:
    plain, wrapped = twins(Toggling(change), num_towers)
    for call in range(5):
        for net in (plain, wrapped):
            net.train(call != 3)
            net(batch(7)).square().sum().backward()
        assert_close(wrapped(batch(7)), plain(batch(7)))
        assert_same_gradients(wrapped, plain)
        assert list(wrapped.module.fc._forward_hooks.values()) == list(plain.fc._forward_hooks.values())


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_hook_of_the_users_that_a_forward_removes_is_not_called_in_it(num_towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.handle = self.fc.register_forward_hook(_double)
            self.last: Any = None

        def forward(self, x: Tensor) -> Any:
            self.handle.remove()
            out = self.last = self.fc(x)
            return out

    plain, wrapped = Net().double(), wrap(Net().double(), num_towers)
    wrapped.module.load_state_dict(plain.state_dict())
    for _ in range(3):
        assert_close(wrapped(batch(6)), plain(batch(6)))
    assert not wrapped.module.fc._forward_hooks


def test_a_hook_of_a_backward_comes_after_one_that_the_user_has_registered_meanwhile() -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.fc.register_forward_hook(lambda module, args, out: out + 1)
            self.backwards = 0

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x)
            out.register_hook(self.add)
            return out

        def add(self, grad: Tensor) -> None:
            self.backwards += 1
            if self.backwards == 1:
                self.fc.register_forward_hook(lambda module, args, out: out.square())

    plain, wrapped = twins(Net(), 2)
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        out = net(batch(4))
        inner.fc.register_forward_hook(lambda module, args, out: out * 3)
        out.sum().backward()
    assert_close(wrapped(batch(4)), plain(batch(4)))


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_hook_dict_that_two_modules_share_for_a_while_is_told_apart_afterwards(num_towers: int) -> None:
    class Renewing(nn.Module):
        """Registers a hook in each forward, and removes the one of two forwards before."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
            self.net[1]._forward_hooks = self.net[0]._forward_hooks
            self.handles: list[Any] = []

        def forward(self, x: Tensor) -> Tensor:
            self.handles.append(self.net[0].register_forward_hook(lambda module, args, output: output + 1))
            if len(self.handles) > 2:
                self.handles.pop(0).remove()
            out: Tensor = self.net(x)
            return out

    for net in twins(Renewing(), num_towers):
        inner = getattr(net, "module", net)
        for _ in range(3):
            net(batch(4))
        inner.net[1]._forward_hooks = OrderedDict()
        for _ in range(3):
            out = net(batch(4))
            first = F.linear(batch(4), inner.net[0].weight, inner.net[0].bias) + 2
            assert_close(out, F.linear(first, inner.net[1].weight, inner.net[1].bias))
            assert len(inner.net[0]._forward_hooks) == 2

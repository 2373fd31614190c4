"""What a forward makes once and keeps in its module: helper objects and hooks that lead back to it."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from tests.helpers import SEVERAL, assert_close, assert_same_gradients, batch, twins, wrap
from tests.modules import OneLayer


class Helper:
    """Of a class that nobody knows."""

    def __init__(self, net: Any) -> None:
        self.net = net

    def __call__(self, x: Tensor) -> Tensor:
        return self.net.fc(x) * self.net.scale

    def itself(self) -> Helper:
        return self


class Lazy(OneLayer):
    """Makes its helper when it first needs it."""

    def __init__(self, make: Callable[[Any], Any], use: Callable[[Any], Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.make, self.use, self.helper = make, use, None

    @functools.cached_property
    def cached(self) -> Helper:
        return Helper(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.helper is None:
            self.helper = self.make(self)
        result: Tensor = self.use(self.helper)(x)
        return result


HELPERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "object": (Helper, lambda helper: helper),
    "in a list": (lambda net: [Helper(net)], lambda helpers: helpers[0]),
    "in an object": (lambda net: Helper(Helper(net)), lambda helper: helper.net),
    "cached property": (lambda net: 1, lambda helper: None),
    "bound method": (lambda net: Helper(net).itself, lambda itself: itself()),
    "distribution": (
        lambda net: Normal(net.scale, torch.ones_like(net.scale)),
        lambda prior: lambda x: x[:, :2] * prior.mean,
    ),
}


@pytest.mark.parametrize("kind", HELPERS)
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_an_object_that_a_forward_makes_leads_every_tower_to_its_own(num_towers: int, kind: str) -> None:
    make, use = HELPERS[kind]
    net = Lazy(make, use)
    if kind == "cached property":

        class Cached(Lazy):
            def forward(self, x: Tensor) -> Tensor:
                return self.cached(x)

        net = Cached(make, use)
    plain, wrapped = twins(net, num_towers)
    for step in range(4):
        for inner in (plain, wrapped.module):
            inner.zero_grad()
            inner.train(step != 2)  # lets all replicas follow the module
        x = batch(7, seed=step)
        plain(x).square().mean().backward()
        wrapped.tower_loss(lambda replica, x: replica(x).square().mean(), x).backward()
        assert_same_gradients(wrapped, plain)
        (wanted, _), (got, _) = (
            torch.autograd.grad(net(x).square().mean(), [inner.scale, x], allow_unused=True)
            for net, inner, x in ((plain, plain, x.requires_grad_()), (wrapped, wrapped.module, x.requires_grad_()))
        )
        assert_close(got, wanted)


class Slotted:
    __slots__ = ("__weakref__", "net")

    def __init__(self, net: Any) -> None:
        self.net = net

    def __call__(self, x: Tensor) -> Tensor:
        return Helper.__call__(self, x)  # type: ignore[arg-type]


class Registry(dict[str, Any]):
    def __call__(self, x: Tensor) -> Tensor:
        return Helper(self["net"])(x)


class Singleton(Helper):
    """One object for ever: its copy is itself."""

    def __copy__(self) -> Singleton:
        return self


HELPERS |= {
    "with slots": (Slotted, lambda helper: helper),
    "dict of its own": (lambda net: Registry(net=net), lambda helper: helper),
    "its own copy": (Singleton, lambda helper: helper),
}


class WarmUp:
    """A schedule that counts for itself."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.step, self.seen = weight, 0, []

    def __call__(self, out: Tensor) -> Tensor:
        self.step += 1
        self.seen.append(self.step)
        return out * min(self.step, 4) + self.weight.sum()


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_an_object_that_a_forward_makes_keeps_what_the_main_tower_writes_into_it(num_towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.warm_up: Any = None
            self.last: Any = None

        def forward(self, x: Tensor) -> Tensor:
            if self.warm_up is None:
                self.warm_up = WarmUp(self.fc.weight)
            out = self.warm_up(self.fc(x))
            self.last = out.detach()
            return out

    plain, wrapped = twins(Net(), num_towers)
    for step in range(6):
        for net in (plain, wrapped):
            net.train(step != 4)
            net(batch(8)).square().mean().backward()
        assert_same_gradients(wrapped, plain)
    inner: Any = wrapped.module
    assert inner.warm_up.step == 6 and inner.warm_up.seen == [1, 2, 3, 4, 5, 6]
    assert inner.warm_up.weight is inner.fc.weight
    inner.warm_up.step = plain.warm_up.step = 1
    for net in (plain, wrapped):
        net(batch(8)).square().mean().backward()
    assert_same_gradients(wrapped, plain)


def test_an_object_that_a_forward_makes_is_known_after_close_and_to_other_wrappers() -> None:
    plain, wrapped = twins(Lazy(*HELPERS["object"]), 2)
    another = wrap(wrapped.module, 3)
    for net in (wrapped, another, wrapped):
        plain.zero_grad()
        wrapped.module.zero_grad()
        plain(batch(6)).square().mean().backward()
        net.tower_loss(lambda replica, x: replica(x).square().mean(), batch(6)).backward()
        assert_same_gradients(wrapped, plain)
        wrapped.close()


# ---- hooks


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

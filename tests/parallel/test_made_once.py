"""What a forward makes and keeps in its module: objects, modules and tables that lead back to it."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from tests.helpers import SEVERAL, assert_close, assert_same_gradients, batch, twins, wrap
from tests.modules import OneLayer
from torchtower import current_tower


class Helper:
    """Of a class that nobody knows."""

    siblings: tuple[Helper, ...] = ()

    def __init__(self, net: Any) -> None:
        self.net = net

    def __call__(self, x: Tensor) -> Tensor:
        return self.net.fc(x) * self.net.scale

    def itself(self) -> Helper:
        return self


def siblings(*helpers: Helper) -> tuple[Helper, ...]:
    for helper in helpers:
        helper.siblings = helpers
    return helpers


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
    "siblings": (lambda net: siblings(Helper(net), Helper(net)), lambda helpers: helpers[0].siblings[1]),
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


# ---- modules


def _stacked(net: Any) -> nn.Module:
    if not hasattr(net, "stack"):
        net.stack = nn.Sequential(net.first, nn.Sequential(nn.Tanh(), net.second))
    return net.stack


def _listed(net: Any) -> nn.Module:
    if not hasattr(net, "weights"):
        net.weights = nn.ParameterList([net.first.weight, net.second.weight])
    return lambda x: x @ net.weights[0].T @ net.weights[1].T


def _replaced(net: Any) -> nn.Module:
    if isinstance(net.second, nn.Linear):
        net.second = nn.Sequential(net.second, nn.Tanh())
    return lambda x: net.second(net.first(x))


@pytest.mark.parametrize("make", [_stacked, _listed, _replaced])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_module_that_a_forward_makes_of_its_own_parts_holds_these(num_towers: int, make: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            return make(self)(x)

    plain, wrapped = twins(Net(), num_towers)
    ours, theirs = list(wrapped.parameters()), list(plain.parameters())
    for _ in range(3):
        for net in (plain, wrapped):
            net.zero_grad()
            net(batch(7)).square().sum().backward()
        for mine, expected in zip(ours, theirs, strict=True):
            assert_close(mine.grad, expected.grad)
    assert list(map(id, wrapped.parameters())) == list(map(id, ours))
    assert wrapped.module.state_dict().keys() == plain.state_dict().keys()


def test_a_table_that_a_forward_keys_by_modules_is_keyed_by_the_users() -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.calls: Any = None

        def forward(self, x: Tensor) -> Any:
            self.calls = self.calls or {}
            self.calls[self.fc] = self.calls.get(self.fc, 0) + 1
            return self.fc(x)

    wrapped = wrap(Net(), 2)
    for _ in range(3):
        wrapped(torch.ones(4, 3))
    assert wrapped.module.calls == {wrapped.module.fc: 3}


# ---- what it replaces in every call


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 2


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["function", "hook", "checkpoint"])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_what_a_forward_replaces_in_an_attribute_is_no_part_of_the_next_graph(num_towers: int, how: str) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.aux: Any = None
            nn.utils.weight_norm(self.fc)
            if how == "hook":
                self.fc.register_full_backward_hook(lambda module, inputs, outputs: None)

        def forward(self, x: Tensor) -> Tensor:
            if how == "checkpoint":
                out = torch.utils.checkpoint.checkpoint(self.fc, x, use_reentrant=True)
            else:
                out = self.fc(x) if how == "hook" else Doubled.apply(self.fc(x))
            self.aux = out.square().sum()
            return out

    def nodes_behind(tensor: Tensor) -> int:
        seen: set[Any] = set()
        pending: list[Any] = [tensor.grad_fn]
        while pending:
            node = pending.pop()
            if node is not None and node not in seen:
                seen.add(node)
                pending.extend(following for following, _ in node.next_functions)
        return len(seen)

    plain, wrapped = (Net().double() for _ in range(2))
    wrapped.load_state_dict(plain.state_dict())
    for net in (plain, wrapped):  # what is there when it is wrapped has been gone through
        net(batch(4, requires_grad=True)).sum().backward()
        net.zero_grad()
    model, counts = wrap(wrapped, num_towers), []
    for _ in range(5):
        for net in (plain, model):
            net(batch(6, requires_grad=True)).square().sum().backward()
        assert_same_gradients(model, plain)
        counts.append(nodes_behind(wrapped.aux))
    assert counts[1] == counts[-1]


class Trainer:
    """The user's own, which knows the wrapper and is known to the module."""

    def __init__(self) -> None:
        self.model: Any = None
        self.steps = 0


@pytest.mark.parametrize("of", ["wrapper", "module"])
def test_an_object_of_the_users_that_a_forward_takes_up_stays_the_users(of: str) -> None:
    class Net(OneLayer):
        def __init__(self, trainer: Trainer) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.given, self.trainer, self.taken = (trainer,), None, []

        def forward(self, x: Tensor) -> Any:
            self.trainer = self.given[0]
            self.taken = [*self.taken, self.trainer]
            return self.norm(self.fc(x))

    trainer = Trainer()
    net: Any = Net(trainer).double()
    wrapped = wrap(net, 2)
    trainer.model = wrapped if of == "wrapper" else net
    for _ in range(3):
        wrapped(batch(6)).sum().backward()
    assert net.trainer is trainer and all(taken is trainer for taken in net.taken)
    assert trainer.model is (wrapped if of == "wrapper" else net)
    assert trainer.model(batch(6)).shape == (6, 2)


def test_a_made_module_under_two_names_is_one_and_its_hooks_have_handles() -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.one: Any = None

        def forward(self, x: Tensor) -> Any:
            if self.one is None:
                self.one = self.other = nn.Sequential(self.fc, nn.Tanh())
                self.handle = self.one.register_forward_hook(lambda module, args, out: out * 2)
            return self.other(x)

    plain, wrapped = twins(Net(), 3)
    inner: Any = wrapped.module
    assert_close(wrapped(batch(6)), plain(batch(6)))
    assert inner.one is inner.other
    assert_close(wrapped(batch(6)), plain(batch(6)))
    for net in (plain, inner):
        net.handle.remove()
    assert_close(wrapped(batch(6)), plain(batch(6)))
    assert not inner.one._forward_hooks


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_gradient_to_what_was_replaced_is_an_error_where_it_would_be_lost(num_towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.scale: Any = None

        def forward(self, x: Tensor) -> Tensor:
            scale, self.scale = self.scale, None
            run = torch.utils.checkpoint.checkpoint
            out: Tensor = run(lambda x: self.fc(x) * scale, x, use_reentrant=True)
            return out

    _, wrapped = twins(Net(), num_towers)
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    wrapped.module.scale = weight.exp()
    out = wrapped(batch(6, requires_grad=True))
    with pytest.raises(RuntimeError, match="expected what an attribute held, and the forward has replaced"):
        out.sum().backward()


class Unreferred:
    """No weak reference can be made to it."""

    __slots__ = "net"  # one, by a string alone

    def __init__(self, net: Any) -> None:
        self.net = net


class Unfilled(Slotted):
    __slots__ = ("never_set",)


class Layers(deque[Any]):
    """A deque of a class of its own."""


@pytest.mark.parametrize(
    ("make", "get"),
    [
        (Unreferred, lambda kept: kept.net),
        (Unfilled, lambda kept: kept.net),
        (lambda layer: Layers([layer]), lambda kept: kept[0]),
    ],
    ids=["one slot, no weak references", "a slot without a value", "deque of its own"],
)
def test_an_object_that_a_forward_makes_leads_the_user_to_the_users_layer(
    make: Callable[[Any], Any], get: Callable[[Any], Any]
) -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Any:
            self.kept = make(self.fc)
            return get(self.kept)(x)

    plain, wrapped = twins(Net(), 2)
    for _ in range(2):
        for net in (plain, wrapped):
            net(batch(7)).square().sum().backward()
        assert get(wrapped.module.kept) is wrapped.module.fc
    assert_same_gradients(wrapped, plain)


def test_an_object_that_a_forward_makes_and_gives_two_names_is_one() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Any:
            self.first = Slotted(self.fc)
            self.second = self.first
            return self.fc(x)

    wrapped = wrap(Net().double(), 2)
    wrapped(batch(4))
    assert wrapped.module.first is wrapped.module.second and wrapped.module.first.net is wrapped.module.fc


def test_an_object_that_leads_to_a_layer_and_will_not_be_copied_is_kept_as_it_is() -> None:
    class Uncopied(Slotted):
        def __copy__(self) -> Any:
            raise TypeError("one of a kind")

    made = {}

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Any:
            self.kept = made[current_tower()] = Uncopied(self.fc)
            return self.fc(x)

    wrapped = wrap(Net().double(), 2)
    wrapped(batch(4))
    assert wrapped.module.kept is made[0]

"""Places that modules and hooks share (a dict, a dataclass, a closure): one for each tower, whatever is put there."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.containers import Box
from tests.helpers import EVERY_COUNT, SEVERAL, assert_close, assert_same_gradients, batch, mlp, twins, wrap
from tests.modules import OneLayer
from torchtower import current_tower


def test_hooks_may_share_a_place_and_its_name_may_come_and_go() -> None:
    plain, wrapped = twins(mlp(), 2)
    x = batch(1).expand(4, 3)
    for net in (plain, wrapped):
        inner = getattr(net, "module", net)
        found: Any = None

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            nonlocal found
            found = output

        def keep_too(module: nn.Module, args: Any, output: Tensor) -> None:
            nonlocal found
            found = output if found is None else found

        for hook in (keep, keep_too, _keep_in_a_fresh_name):
            inner[0].register_forward_hook(hook)
        for _ in range(2):
            net(x)
            (found.mean(0).sum() + _fresh.mean(0).sum()).backward()
            del globals()["_fresh"]
    assert_same_gradients(wrapped, plain)


def _keep_in_a_fresh_name(module: nn.Module, args: Any, output: Tensor) -> None:
    global _fresh
    _fresh = output


def test_modules_that_share_a_dataclass_share_it_in_every_tower() -> None:
    class Child(nn.Module):
        def __init__(self, box: Box) -> None:
            super().__init__()
            self.box = box

        def forward(self, x: Tensor) -> Tensor:
            return x * self.box.loss

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.box = Box()
            self.fc, self.child = nn.Linear(3, 2), Child(self.box)

        def forward(self, x: Tensor) -> Tensor:
            assert self.box is self.child.box
            self.box.loss = self.fc.weight.square().sum()
            return self.child(self.fc(x))

    plain, wrapped = twins(Parent(), 3)
    x = batch(7)
    for _ in range(3):
        for net in (plain, wrapped):
            net(x).sum().backward()
    assert_same_gradients(wrapped, plain)


def test_objects_of_a_kind_of_their_own_are_shared_and_never_written_to() -> None:
    @dataclasses.dataclass
    class Only:
        net: Any = None

        def __copy__(self) -> Any:
            return self

    @dataclasses.dataclass
    class Locked:
        net: Any = None
        lock: Any = dataclasses.field(default_factory=threading.Lock)

        def __getstate__(self) -> Any:
            return {"net": self.net}

    @dataclasses.dataclass
    class Output(collections.OrderedDict[str, Any]):
        net: Any = None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.held = [kind(self.fc) for kind in (Only, Locked, Output)]

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    net = Net()
    held = list(net.held)
    wrap(net, 2)(torch.ones(4, 3)).sum().backward()
    assert all(old is new and new.net is net.fc for old, new in zip(held, net.held, strict=True))


def test_a_large_list_is_one_for_all_towers() -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.table = [0] * 2000

        def forward(self, x: Tensor) -> Tensor:
            self.table[current_tower()] += len(x)
            return self.fc(x)

    net = Net().double()
    wrap(net, 2)(batch(7))
    assert net.table[:3] == [4, 3, 0]


def test_a_dataclass_that_can_hold_nothing_is_shared() -> None:
    @dataclasses.dataclass(slots=True)
    class Marker:
        pass

    seen, marker = [], Marker()

    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.marker = marker

        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.marker)
            return self.fc(x)

    wrap(Net().double(), 2)(batch(4))
    assert len(seen) == 2 and all(each is marker for each in seen)


@pytest.mark.parametrize(
    "make", [dict, lambda: {"layer": nn.Linear(2, 2).double()}], ids=["of tensors", "that leads to a layer"]
)
@pytest.mark.parametrize("num_towers", [2, 3])
def test_modules_that_share_a_dict_hand_tensors_on_in_it(num_towers: int, make: Callable[[], dict[str, Any]]) -> None:
    class Writer(nn.Module):
        def __init__(self, shared: dict[str, Any]) -> None:
            super().__init__()
            self.fc, self.shared, self.lists = nn.Linear(3, 2), shared, [shared]

        def forward(self, x: Tensor) -> Tensor:
            self.shared["h"] = self.fc(x)
            assert self.lists[0] is self.shared
            return x

    class Reader(nn.Module):
        def __init__(self, shared: dict[str, Any]) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x: Tensor) -> Tensor:
            h = self.shared["h"]
            return h.tanh() if "layer" not in self.shared else self.shared["layer"](h)

    shared = make()
    plain, wrapped = twins(nn.Sequential(Writer(shared), Reader(shared)), num_towers)
    for step in range(3):
        for net in (plain, wrapped):
            net(batch(7, seed=step)).square().sum().backward()
        assert_same_gradients(wrapped, plain)
    kept = wrapped.module[0].shared
    assert kept is wrapped.module[1].shared
    assert kept.keys() == plain[0].shared.keys()


@pytest.mark.parametrize("num_towers", [2, 3])
def test_what_a_closure_holds_beside_a_layer_is_followed(num_towers: int) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    settings: list[dict[str, Any]] = []
    for inner in (plain, wrapped.module):
        settings.append({"layers": [inner[2]], "scale": 2.0})
        inner[0].register_forward_hook(_apply_settings(settings[-1]))
    for step in range(4):
        for net, inner, setting in zip((plain, wrapped), (plain, wrapped.module), settings, strict=True):
            if step == 1:
                setting["scale"] = 0.5
            if step == 2:
                setting["layers"].append(inner[2])
            net(batch(7, seed=step)).square().sum().backward()
        assert_same_gradients(wrapped, plain)


def _apply_settings(settings: dict[str, Any]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        norms = sum(layer.weight.square().sum() for layer in settings["layers"])
        return output * settings["scale"] * norms

    return hook


@pytest.mark.parametrize("num_towers", [2, 3])
@pytest.mark.parametrize("make", [dict, types.SimpleNamespace], ids=["dict", "namespace"])
def test_what_hooks_put_beside_a_layer_is_found_by_others_and_kept(make: Callable[..., Any], num_towers: int) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    stores = []
    for inner in (plain, wrapped.module):
        store = make(layer=inner[0], first=None, calls=0)
        stores.append(vars(store) if make is types.SimpleNamespace else store)
        inner[0].register_forward_hook(_put_into(store))
        inner[2].register_forward_hook(_add_from(store))
    for step in range(3):
        for net, store in zip((plain, wrapped), stores, strict=True):
            x = batch(7, seed=step)
            (net(x).square().sum() + store["first"].square().sum() * 0).backward()
        assert_same_gradients(wrapped, plain)
        rows = stores[1]["first"].shape[0]
        assert rows < 7  # the main tower's
        assert_close(stores[1]["first"], stores[0]["first"][:rows])
        assert stores[1]["calls"] == step + 1
        assert stores[1]["layer"] is wrapped.module[0]


@pytest.mark.parametrize("make", [dict, types.SimpleNamespace])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_what_a_forward_gives_a_second_name_stays_one_object(num_towers: int, make: Callable[..., Any]) -> None:
    class Block(nn.Module):
        store: Any = None

        def forward(self, x: Tensor) -> Tensor:
            return x * _entries(self.store)["scale"]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            self.store = make(scale=torch.tensor(1.0, dtype=torch.float64), layer=self.block)

        def forward(self, x: Tensor) -> Tensor:
            self.block.store = self.store
            entries = _entries(self.store)
            entries["scale"] = entries["scale"] + 1
            return self.block(x)

    plain, wrapped = twins(Net(), num_towers)
    for _ in range(3):
        assert_close(wrapped(batch(5)), plain(batch(5)))
    assert wrapped.module.block.store is wrapped.module.store


def _entries(store: Any) -> dict[str, Any]:
    return store if isinstance(store, dict) else vars(store)


def _put_into(store: Any) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        entries = _entries(store)
        entries["first"], entries["calls"] = output, entries["calls"] + 1

    return hook


def _add_from(store: Any) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        entries = _entries(store)
        return output + entries["first"].sum(1, keepdim=True) * entries["layer"].weight.sum()

    return hook


@pytest.mark.parametrize("make", [list, collections.deque, set])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_a_forward_adds_to_a_list_of_two_modules_is_added_once(num_towers: int, make: Any) -> None:
    class Adding(OneLayer):
        def __init__(self, log: Any) -> None:
            super().__init__()
            self.log = log

        def forward(self, x: Tensor) -> Tensor:
            (self.log.add if make is set else self.log.append)(len(self.log))
            out: Tensor = self.fc(x)
            return out

    log = make()
    net = nn.Sequential(Adding(log), nn.Linear(2, 3), Adding(log))
    wrapped = wrap(net, num_towers)
    for calls in (1, 2, 3):
        wrapped(torch.ones(8, 3))
        assert list(log) == list(range(2 * calls))
        assert net[0].log is log and net[2].log is log


def _made_twice(make: Callable[[], nn.Module], towers: int) -> tuple[nn.Module, Any]:
    """Twins whose functions refer to what is their own: a copy's would refer to the first one's."""
    plain, other = make().double(), make().double()
    other.load_state_dict(plain.state_dict())
    return plain, wrap(other, towers)


def _closing_over(features: dict[str, Any]) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        features["h"] = output

    return keep


def _by_default(features: dict[str, Any]) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Tensor, into: dict[str, Any] = features) -> None:
        into["h"] = output

    return keep


def _put(features: dict[str, Any], module: nn.Module, args: Any, output: Tensor) -> None:
    features["h"] = output


def _by_partial(features: dict[str, Any]) -> Callable[..., None]:
    return functools.partial(_put, features)


def _by_bound_method(features: dict[str, Any]) -> Callable[..., None]:
    put = features.__setitem__
    return lambda module, args, output: put("h", output)


@pytest.mark.parametrize("towers", SEVERAL)
@pytest.mark.parametrize("hook_of", [_closing_over, _by_default, _by_partial, _by_bound_method])
def test_a_forward_finds_in_its_attribute_what_a_hook_has_put_there(
    hook_of: Callable[[dict[str, Any]], Any], towers: int
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
            features: dict[str, Any] = {}
            self.layer.register_forward_hook(hook_of(features))
            self.features = features

        def forward(self, x: Tensor) -> Tensor:
            self.features.clear()
            y: Tensor = self.head(self.layer(x))
            return y * self.features["h"].sum(1, keepdim=True)

    plain, wrapped = _made_twice(Net, towers)
    features = wrapped.module.features
    for rows in (9, 5, 9):
        x = batch(rows)
        outputs = [net(x) for net in (plain, wrapped)]
        assert_close(outputs[1], outputs[0])
        for out in outputs:
            out.square().sum().backward()
        assert_same_gradients(wrapped, plain)
    assert wrapped.module.features is features and list(features) == ["h"]


def test_a_name_that_a_hook_closes_over_may_be_bound_anew_beside_an_attribute() -> None:
    calls = 0

    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []
            self.fc.register_forward_hook(self.counting(self.seen))

        @staticmethod
        def counting(seen: list[int]) -> Callable[..., None]:
            def count(*_: object) -> None:
                nonlocal calls
                with lock:
                    calls += 1
                seen.append(calls)

            return count

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y

    lock = threading.Lock()
    wrapped = wrap(Net().double(), 2)
    for _ in range(3):
        wrapped(batch(6))
    assert calls == 6 and len(wrapped.module.seen) == 3


@pytest.mark.parametrize("towers", SEVERAL)
def test_a_function_under_two_names_that_reads_an_attribute_is_one_in_every_tower(towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.scale = scale = {"v": 2.0}

            def scaled(y: Tensor) -> Tensor:
                return y * scale["v"]

            self.by_name = {"scaled": scaled}
            self.chosen = scaled
            self.weights = {scaled: 3.0}

        def forward(self, x: Tensor) -> Tensor:
            assert self.chosen is self.by_name["scaled"]
            y: Tensor = self.chosen(self.fc(x)) * self.weights[self.chosen]
            return y

    plain, wrapped = twins(Net(), towers)
    assert_close(wrapped(batch(6)), plain(batch(6)))


def test_a_dict_that_hooks_of_many_layers_share_is_the_main_towers() -> None:
    features: dict[int, Tensor] = {}
    net: Any = nn.Sequential(*[nn.Linear(3, 3) for _ in range(30)]).double()
    net.features = features

    def keep(index: int) -> Callable[..., None]:
        return lambda module, args, output: features.__setitem__(index, output.detach())

    for index, layer in enumerate(net):
        layer.register_forward_hook(keep(index))
    wrapped = wrap(net, 2)
    for _ in range(2):
        wrapped(batch(6))
    assert wrapped.module.features is features and sorted(features) == list(range(30))
    assert all(len(feature) == 3 for feature in features.values())


def test_a_list_in_an_attribute_that_a_hook_of_the_module_itself_fills_has_the_main_towers_entries_at_once() -> None:
    plain, wrapped = twins(OneLayer(), 2)
    for net in (plain, wrapped):
        inner = getattr(net, "module", net)
        inner.found = found = []
        inner.register_forward_hook(lambda module, args, output, found=found: found.append(output.detach()))
        net(batch(4))
        assert len(inner.found) == 1

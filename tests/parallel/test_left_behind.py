"""What a forward leaves in its module is the main tower's: attributes, buffers, submodules, gradients."""

from __future__ import annotations

import time
from collections import UserDict, deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    EVERY_COUNT,
    STYLES,
    assert_close,
    assert_same_gradients,
    batch,
    loss_in,
    mean_of_squares_by,
    twins,
    wrap,
)
from tests.modules import OneLayer, TrainedWithin
from torchtower import current_tower


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(()))
        self.register_buffer("none", None)
        self.calls, self.log, self.table = 0, [], {}
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.in_place.add_(1)
        self.assigned = self.assigned + 1
        self.calls += 1
        self.log.append(len(x))
        self.table[self.calls] = "seen"
        self.last_input = x
        return self.fc(x)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_the_main_towers_forward_leaves_behind_is_kept(num_towers: int) -> None:
    net = Counting().double()
    wrapped = wrap(net, num_towers)
    x = batch(4 * num_towers)
    for _ in range(3):
        wrapped(x).sum().backward()
    assert net.in_place == 3 and net.assigned == 3 and net.calls == 3
    assert net.log == [4, 4, 4] and net.table == {1: "seen", 2: "seen", 3: "seen"}
    assert torch.equal(net.last_input, x[:4])
    assert "assigned" in net._buffers and isinstance(net.assigned, Tensor)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_a_forward_writes_into_containers_in_a_tuple_is_kept(num_towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.pair: tuple[list[int], dict[str, int]] = ([], {})

        def forward(self, x: Tensor) -> Tensor:
            log, counts = self.pair
            log.append(len(log))
            counts["calls"] = counts.get("calls", 0) + 1
            return self.fc(x)

    plain, wrapped = twins(Net(), num_towers)
    for _ in range(3):
        assert_close(wrapped(batch(7)), plain(batch(7)))
    assert wrapped.module.pair == plain.pair == ([0, 1, 2], {"calls": 3})


def test_other_towers_start_each_forward_from_the_main_towers_state() -> None:
    seen: dict[int, list[Any]] = {0: [], 1: []}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("step", torch.zeros(()))
            self.count = 0

        def forward(self, x: Tensor) -> Tensor:
            seen[current_tower()].append((self.step.item(), self.count))
            if current_tower() == 0:
                self.step += 1
                self.count += 1
            return x

    wrapped = wrap(Net(), 2)
    for _ in range(3):
        wrapped(batch(4))
    wrapped.module.step.fill_(7)
    wrapped.module.count = 9
    wrapped(batch(4))
    assert seen[0] == seen[1] == [(0, 0), (1, 1), (2, 2), (7, 9)]


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("place", ["attribute", "tuple", "list", "dict"])
@pytest.mark.parametrize("every", [3, 100])
def test_state_that_a_forward_makes_and_later_writes_to_is_each_towers_own(
    num_towers: int, place: str, every: int
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.kept, self.pair, self.listed, self.named = 0, None, (0, None), [None], {}

        def forward(self, x: Tensor) -> Tensor:
            if self.calls % every == 0:
                new = torch.zeros(1)
                if place == "attribute":
                    self.kept = new
                elif place == "tuple":
                    self.pair = (0, (new,))
                elif place == "list":
                    self.listed[0] = new
                else:
                    self.named[0] = new
            self.calls += 1
            state = {
                "attribute": lambda: self.kept,
                "tuple": lambda: self.pair[1][0],
                "list": lambda: self.listed[0],
                "dict": lambda: self.named[0],
            }[place]()
            state += 1
            return x + state

    plain, wrapped = twins(Net(), num_towers)
    for _ in range(5):
        x = torch.zeros(num_towers, 1)
        assert torch.equal(wrapped(x), plain(x))
    for name in ("kept", "pair", "listed", "named"):
        assert getattr(wrapped.module, name) == getattr(plain, name)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_state_that_a_write_has_given_a_graph_may_be_beside_one_made_anew(num_towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.state, self.other, self.calls = torch.zeros(2), None, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 2:
                self.state.add_(self.fc.bias)
            elif self.calls > 2:
                self.other = torch.ones(3) * self.calls
            return self.fc(x)

    plain, wrapped = twins(Net(), num_towers)
    for _ in range(5):
        x = batch(2 * num_towers)
        wrapped(x).sum().backward()
        plain(x).sum().backward()
        assert_same_gradients(wrapped, plain)


def test_what_other_towers_leave_behind_is_forgotten() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if current_tower() == 1:
                self.mine = True
            assert current_tower() == 1 or not hasattr(self, "mine")
            return x

    wrapped = wrap(Net(), 2)
    for _ in range(2):
        wrapped(batch(4))
    assert not hasattr(wrapped.module, "mine")


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_buffer_that_is_assigned_and_then_written_to_follows_the_plain_module(num_towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.state.mul_(3)
            self.state = self.state + 1
            self.state.mul_(2)
            return x * self.state

    plain, wrapped = twins(Net(), num_towers)
    for step in range(4):
        assert_close(wrapped(batch(9, seed=step)), plain(batch(9, seed=step)))
    assert wrapped.module.state == plain.state


def test_an_attribute_that_forward_deletes_is_gone_and_a_new_buffer_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once = 1

        def forward(self, x: Tensor) -> Tensor:
            if hasattr(self, "once"):
                del self.once
                self.register_buffer("late", torch.zeros(()))
            self.late += 1
            return x

    wrapped = wrap(Net(), 2)
    for _ in range(3):
        wrapped(batch(4))
    assert not hasattr(wrapped.module, "once") and wrapped.module.late == 3


def test_a_submodule_made_in_the_first_forward_is_trained() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = None

        def forward(self, x: Tensor) -> Tensor:
            if self.head is None:
                self.head = nn.Linear(x.shape[1], 2).double()
            return self.head(x)

    wrapped = wrap(Net(), 2)
    with torch.no_grad():
        wrapped(batch(4))
    assert isinstance(wrapped.module.head, nn.Linear)
    wrapped(batch(4)).sum().backward()
    assert_close(wrapped.module.head.weight.grad, batch(4).sum(0).expand(2, 3).contiguous())


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("is_appended", [True, False])
def test_a_layer_that_the_first_forward_puts_into_a_plain_list_is_trained(
    is_appended: bool, style: str, num_towers: int
) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.extra: list[nn.Module] = []

        def forward(self, x: Tensor) -> Tensor:
            if not self.extra:
                layer = nn.Linear(3, 2).double()
                for parameter in layer.parameters():
                    nn.init.constant_(parameter, 0.5)
                if is_appended:
                    self.extra.append(layer)
                else:
                    self.extra = [layer]
            return self.fc(x) + self.extra[0](x).square()

    plain, wrapped = twins(Net(), num_towers)
    for net in (plain, wrapped):
        with torch.no_grad():
            net(batch(7))
    for step in range(3):
        for net in (plain, wrapped):
            loss_in(style, net, mean_of_squares_by, batch(7, seed=step)).backward()
    assert_same_gradients(wrapped, plain)
    assert_same_gradients(wrapped.module.extra[0], plain.extra[0])


def test_attributes_changed_on_the_wrapped_module_reach_every_tower() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.options = 1.0, {"shift": 0.0}

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale + self.options["shift"]

    net = Net()
    wrapped = wrap(net, 3)
    x = batch(6)
    assert torch.equal(wrapped(x), x)
    net.scale = 2.0
    assert torch.equal(wrapped(x), 2 * x)
    net.options["shift"] = 1.0
    assert torch.equal(wrapped(x), 2 * x + 1)
    net.forward = lambda x: -x
    assert torch.equal(wrapped(x), -x)
    del net.forward
    assert torch.equal(wrapped(x), 2 * x + 1)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_backward_within_the_forward_reaches_the_parameters_with_the_forward(num_towers: int) -> None:
    plain, wrapped = twins(TrainedWithin(), num_towers)
    for step in range(2):
        for net in (plain, wrapped):
            with torch.no_grad():
                net(batch(7, seed=step))
        assert_same_gradients(wrapped, plain)
        for net in (plain, wrapped):
            net(batch(7, seed=step)).sum().backward()
        assert_same_gradients(wrapped, plain)
    plain.zero_grad()
    wrapped.zero_grad()
    for net in (plain, wrapped):
        net(batch(7)).sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_sparse_gradient_of_a_backward_within_the_forward_is_added_to_a_dense_one(num_towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 2, sparse=True)

        def forward(self, indices: Tensor) -> Tensor:
            self.table(indices).square().sum().backward()
            return indices.double()

    plain, wrapped = twins(Net(), num_towers)
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        inner.table.weight.grad = batch(4, 2)
        net(torch.tensor([0, 1, 1, 3, 0, 3, 1]))
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("towers", EVERY_COUNT)
def test_a_forward_may_fill_an_empty_container_of_its_arguments(towers: int) -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor, out: dict[str, Tensor], seen: list[int]) -> dict[str, Tensor]:
            out["y"] = self.fc(x)
            time.sleep(0.01)  # the others take their shards now
            seen.append(len(x))
            return out

    plain, wrapped = twins(Net(), towers)
    given: dict[str, Tensor] = {}
    seen: list[int] = []
    out = wrapped(batch(9), given, seen)
    assert_close(out["y"], plain(batch(9), {}, [])["y"])
    assert "y" in given and sum(seen) == 9 and seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("kind", [list, deque, set])
def test_what_a_hook_adds_to_a_list_that_the_forward_adds_to_stays(kind: Any) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.log = log = kind()
            self.fc.register_forward_hook(lambda *_: add(log, "hook"))

        def forward(self, x: Tensor) -> Tensor:
            add(self.log, f"forward {len(self.log)}")
            out: Tensor = self.fc(x)
            return out

    def add(log: Any, entry: str) -> None:
        (log.add if kind is set else log.append)(entry)

    net = Net()
    log, wrapped = net.log, wrap(net, 2)
    for calls in range(1, 4):
        wrapped(torch.ones(4, 3))
        assert wrapped.module.log is log
        assert sum("forward" in entry for entry in log) == calls
        assert sum(entry == "hook" for entry in log) == (1 if kind is set else calls)  # as in the plain module


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_data_that_a_forward_assigns_before_it_raises_are_kept_then(num_towers: int) -> None:
    class Net(OneLayer):
        fails = True

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                self.fc.weight.data = self.fc.weight.data * 0.5
                raise ValueError("no")
            out: Tensor = self.fc(x)
            return out

    plain, wrapped = twins(Net(), num_towers)
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        with pytest.raises(ValueError, match="no"):
            net(batch(8))
        inner.fc.weight.data.add_(10)
        inner.fails = False
    assert_close(wrapped(batch(8)), plain(batch(8)))
    assert_close(wrapped.module.fc.weight, plain.fc.weight)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_forward_counts_its_second_run_as_the_plain_module_does(use_reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Counting()

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=use_reentrant)

    plain, wrapped = twins(Net(), 2)
    for _ in range(2):
        plain(batch(4, requires_grad=True)).sum().backward()
        wrapped(batch(4, requires_grad=True)).sum().backward()
        for name in ("calls", "in_place", "assigned", "table"):
            assert getattr(wrapped.module.inner, name) == getattr(plain.inner, name)
        assert len(wrapped.module.inner.log) == len(plain.inner.log)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_a_forward_that_raises_has_left_is_kept_as_in_the_plain_module(num_towers: int) -> None:
    def stop(module: nn.Module, args: Any, out: Tensor) -> None:
        module.feature = out.detach()
        raise StopIteration("far enough")

    plain, wrapped = twins(nn.Sequential(Counting(), nn.Linear(2, 2)), num_towers)
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        for calls in (1, 2):
            handle = inner[1].register_forward_hook(stop)
            with pytest.raises(StopIteration):
                net(batch(8))
            handle.remove()
            assert (inner[0].calls, inner[0].in_place, inner[0].assigned, len(inner[0].log)) == (calls,) * 4
    rows = len(wrapped.module[1].feature)
    assert_close(wrapped.module[1].feature, plain[1].feature[:rows])
    assert_close(wrapped(batch(8)), plain(batch(8)))


def test_the_error_of_a_forward_that_has_put_a_dict_in_another_order_is_the_users() -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[str, Any] = {"first": 1, "second": 2}

        def forward(self, x: Tensor) -> Tensor:
            first = self.kept.pop("first")
            self.kept["loss"] = self.fc(x).sum()
            self.kept["first"] = first
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        wrap(Net().double(), 2)(batch(4))


def test_a_forward_may_fill_an_empty_mapping_of_a_class_of_its_own() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor, seen: UserDict[Any, int]) -> Any:
            assert not seen
            seen[current_tower()] = len(x)
            return self.fc(x)

    seen: UserDict[Any, int] = UserDict()
    wrap(Net().double(), 3, max_concurrency=1)(batch(7), seen)
    assert dict(seen) == {0: 3, 1: 2, 2: 2}

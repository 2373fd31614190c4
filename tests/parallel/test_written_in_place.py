"""What a forward writes in place, with autograd on, into what its module held before: ``self.aux += loss``."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import EVERY_COUNT, SEVERAL, assert_close, assert_same_gradients, batch, twins, wrap
from tests.modules import OneLayer
from torchtower import current_tower


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


class Auxiliary(nn.Module):
    """Adds to a loss that is kept beside the output, as a mixture of experts does."""

    def __init__(self, place: str = "attribute") -> None:
        super().__init__()
        self.place, self.fails = place, False
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)
        if place == "buffer":
            self.register_buffer("aux", zero())
        self.losses: list[Any] = [None]
        self.named: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        if self.place in ("attribute", "buffer"):
            self.aux = zero()
        elif self.place == "list":
            self.losses[0] = zero()
        elif self.place == "dict":
            self.named["aux"] = zero()
        elif self.place == "modules":
            self.aux = self.first.aux = zero()
        else:
            self.all = torch.zeros(3, dtype=torch.float64)
            self.aux, self.unused = self.all[0], self.all[1]

    def kept(self) -> Tensor:
        if self.place in ("list", "dict"):
            return self.losses[0] if self.place == "list" else self.named["aux"]
        return self.aux

    def forward(self, x: Tensor) -> Tensor:
        aux = self.kept()
        aux += self.first.weight.square().sum()
        other = self.first.aux if self.place == "modules" else aux
        other += self.second.weight.pow(3).sum()
        if self.fails:
            raise ValueError("no")
        hidden = self.first(x).tanh()
        out: Tensor = self.second(hidden)
        return out + aux.detach()


def both(module: nn.Module, num_towers: int) -> list[tuple[Any, Any]]:
    """The module, and the wrapper of a copy of it: what is called, and where the state is."""
    plain, wrapped = twins(module, num_towers)
    return [(plain, plain), (wrapped, wrapped.module)]


def assert_alike(pairs: list[tuple[Any, Any]]) -> None:
    (_, plain), (_, inner) = pairs
    assert_same_gradients(inner, plain)
    assert_close(inner.kept(), plain.kept())
    assert inner.kept().requires_grad == plain.kept().requires_grad


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("place", ["attribute", "buffer", "list", "dict", "modules", "view"])
def test_a_loss_that_is_added_to_trains_wherever_it_is_kept(place: str, num_towers: int) -> None:
    pairs = both(Auxiliary(place), num_towers)
    for step in range(3):
        for net, inner in pairs:
            net.zero_grad()
            inner.reset()
            kept = inner.kept()
            out = net(batch(7, seed=step))
            assert inner.kept() is kept and kept.requires_grad
            (out.square().sum() + kept).backward()
        assert_alike(pairs)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("place", ["attribute", "buffer", "list", "modules", "view"])
def test_a_loss_may_be_added_up_over_several_forwards(place: str, num_towers: int) -> None:
    pairs = both(Auxiliary(place), num_towers)
    for net, inner in pairs:
        outs = [net(batch(7, seed=step)) for step in range(3)]
        (sum(out.square().sum() for out in outs) + inner.kept()).backward(retain_graph=True)
    assert_alike(pairs)
    for net, inner in pairs:
        net.zero_grad()
        inner.kept().square().backward()
    assert_alike(pairs)
    for net, inner in pairs:
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            (net(batch(7)).sum() + inner.kept()).backward()


def detach(net: Any) -> None:
    net.aux.detach_()


def detach_and_zero(net: Any) -> None:
    net.aux.detach_().zero_()


def assign_detached(net: Any) -> None:
    net.aux = net.aux.detach()


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("place", ["attribute", "buffer"])
@pytest.mark.parametrize("end", [detach, detach_and_zero, assign_detached])
def test_a_loss_that_is_detached_after_the_step_is_added_to_in_the_next(
    end: Callable[[Any], None], place: str, num_towers: int
) -> None:
    pairs = both(Auxiliary(place), num_towers)
    for step in range(4):
        for net, inner in pairs:
            net.zero_grad()
            (net(batch(7, seed=step)).square().sum() + inner.aux).backward()
            end(inner)
        assert_alike(pairs)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_forward_may_detach_the_state_of_the_last_one_in_place(num_towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.state: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x)
            if self.state is not None:
                self.state.detach_()
                out = out * self.state
            self.state = self.fc.weight.sum(1)
            return out

    plain, wrapped = twins(Net(), num_towers)
    for step in range(3):
        for net in (plain, wrapped):
            net(batch(7, seed=step)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("place", ["attribute", "view"])
def test_a_write_is_counted_once(place: str, num_towers: int) -> None:
    pairs = both(Auxiliary(place), num_towers)
    for step in range(3):
        counts = []
        for net, inner in pairs:
            before = inner.aux._version
            net(batch(7, seed=step))
            counts.append(inner.aux._version - before)
        assert counts == [2, 2]


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_views_of_what_is_written_to_share_its_graph(num_towers: int) -> None:
    pairs = both(Auxiliary("view"), num_towers)
    for step in range(2):
        found = []
        for net, inner in pairs:
            inner.reset()
            net(batch(7, seed=step))
            found.append([inner.aux.requires_grad, inner.unused.requires_grad, inner.all.requires_grad])
            for loss in (inner.aux, inner.all.sum(), inner.all[0] * 2, inner.unused):
                loss.backward(retain_graph=True)
        assert found[0] == found[1]
        assert_alike(pairs)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_other_names_of_what_is_added_to_stay_its_names(num_towers: int) -> None:
    class Net(Auxiliary):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.seen, self.twice = [self.aux], self.aux * 2
            return out

    pairs = both(Net(), num_towers)
    for step in range(3):
        for net, inner in pairs:
            if step < 2:
                inner.reset()
            net(batch(7, seed=step))
            assert inner.seen[0] is inner.aux
            (inner.seen[0] + inner.twice).backward(retain_graph=True)
        assert_alike(pairs)


class State(OneLayer):
    def __init__(self, write: Callable[[Any], Any]) -> None:
        super().__init__()
        self.write, self.state = write, torch.ones(2, dtype=torch.float64)

    def kept(self) -> Tensor:
        return self.state

    def forward(self, x: Tensor) -> Tensor:
        self.write(self)
        out: Tensor = self.fc(x)
        return out


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize(
    "write",
    [
        lambda net: net.state.mul_(0.5).add_(net.fc.bias.tanh()),
        lambda net: net.state.copy_(net.state * 0.5 + net.fc.bias),
        lambda net: net.state[0].add_(net.fc.bias.prod()),
        lambda net: net.state.detach_().mul_(0.5).add_(net.fc.bias.tanh()),
        lambda net: net.state.detach_().mul_(0.5),
    ],
    ids=["add_", "copy_", "view", "detach_", "detach_ alone"],
)
def test_a_state_that_is_written_to_leads_to_all_forwards_that_wrote(
    write: Callable[[Any], Any], num_towers: int
) -> None:
    pairs = both(State(write), num_towers)
    for step in range(3):
        for net, inner in pairs:
            net.zero_grad()
            state = inner.state
            out = net(batch(7, seed=step)) + net(batch(7, seed=step + 1))
            assert inner.state is state
            (out.square().sum() + inner.state.square().sum()).backward()
        assert_alike(pairs)
        for _, inner in pairs:
            inner.state = inner.state.detach()


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("is_view", [False, True])
def test_a_users_tensor_with_a_graph_that_is_written_to_leads_to_both(is_view: bool, num_towers: int) -> None:
    pairs = both(State(lambda net: net.state.mul_(2).add_(net.fc.bias)), num_towers)
    grads = []
    for net, inner in pairs:
        source = torch.ones(4, dtype=torch.float64, requires_grad=True)
        whole = source * 3
        inner.state = whole[1:3] if is_view else whole[1:3].clone()
        out = net(batch(7))
        (out.square().sum() + inner.state.square().sum() + whole.sum()).backward()
        grads.append(source.grad)
    assert_close(grads[1], grads[0])
    assert_alike(pairs)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_write_to_what_the_forward_has_saved_is_refused(num_towers: int) -> None:
    class Net(State):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x) * self.state
            self.state.add_(self.fc.bias)
            return out

    for net, _ in both(Net(lambda net: None), num_towers):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            net(batch(7)).sum().backward()


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_loss_added_to_by_a_forward_that_raises_keeps_its_value_and_no_tower_graph(num_towers: int) -> None:
    pairs = both(Auxiliary(), num_towers)
    for net, inner in pairs:
        inner.fails = True
        with pytest.raises(ValueError, match="no"):
            net(batch(7))
        inner.fails = False
    (plain, _), (_, module) = pairs
    assert_close(module.aux, plain.aux)
    assert not module.aux.requires_grad
    plain.aux.detach_()
    for net, inner in pairs:
        (net(batch(7)).square().sum() + inner.aux).backward()
    assert_alike(pairs)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_forward_that_has_added_to_a_buffer_that_is_a_view_raises_its_own_error(num_towers: int) -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            self.aux += self.fc.weight.square().sum()
            raise ValueError("the user's own")

    pairs = both(Net(), num_towers)
    for net, inner in pairs:
        inner.register_buffer("aux", torch.zeros(2, 2, dtype=torch.float64)[0])
        with pytest.raises(ValueError, match="the user's own"):
            net(batch(7))
    (_, plain), (_, module) = pairs
    assert_close(module.aux, plain.aux)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_forward_that_enables_gradients_adds_to_a_loss_under_no_grad(num_towers: int) -> None:
    class Net(Auxiliary):
        @torch.enable_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    pairs = both(Net(), num_towers)
    for net, inner in pairs:
        with torch.no_grad():
            net(batch(7))
            net(batch(7))
        inner.aux.backward()
    assert_alike(pairs)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_without_gradients_only_the_value_is_added_to(num_towers: int) -> None:
    pairs = both(Auxiliary("buffer"), num_towers)
    for step in range(2):
        for net, inner in pairs:
            with torch.no_grad():
                net(batch(7, seed=step))
            assert not inner.aux.requires_grad
        assert_alike(pairs)


def test_a_loss_that_is_added_to_carries_its_full_weight_in_tower_loss() -> None:
    pairs = both(Auxiliary(), 2)
    (plain, _), (wrapped, inner) = pairs
    for step in range(2):
        for net, module in pairs:
            net.zero_grad()
            module.reset()
        (plain(batch(7, seed=step)).mean() + plain.aux).backward()
        (wrapped.tower_loss(lambda net, x: net(x).mean(), batch(7, seed=step)) + inner.aux).backward()
        assert_alike(pairs)


def test_a_loss_that_is_added_to_carries_double_backward() -> None:
    pairs = both(Auxiliary(), 2)
    for net, inner in pairs:
        parameters = list(inner.parameters())
        total = net(batch(7)).square().sum() + net(batch(7)).square().sum() * inner.aux + inner.aux.square()
        grads = torch.autograd.grad(total, parameters, create_graph=True)
        torch.stack([grad.square().sum() for grad in grads]).sum().backward()
    assert_alike(pairs)


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_what_other_towers_add_to_has_no_graph_in_the_next_forward(num_towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            assert self.state.grad_fn is None and not self.state.any()
            if current_tower() != 0:
                self.state += self.fc.bias
            out: Tensor = self.fc(x)
            return out

    wrapped = wrap(Net(), num_towers)
    for _ in range(3):
        wrapped(torch.ones(8, 3)).sum().backward()
    assert not wrapped.module.state.requires_grad


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_loss_that_has_been_replaced_is_freed_by_the_next_forward(num_towers: int) -> None:
    wrapped = wrap(Auxiliary().double(), num_towers)
    net = wrapped.module
    references = []
    for _ in range(3):
        net.reset()
        references.append(weakref.ref(net.aux))
        (wrapped(batch(7)).sum() + net.aux).backward()
    gc.collect()
    assert [reference() is None for reference in references] == [True, True, False]


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_users_tensor_that_is_written_to_carries_double_backward(num_towers: int) -> None:
    pairs = both(State(lambda net: net.state.copy_(net.state.clone().sin() * net.fc.bias)), num_towers)
    grads = []
    for net, inner in pairs:
        source = torch.ones(2, dtype=torch.float64, requires_grad=True)
        inner.state = source.square()
        total = net(batch(7)).square().sum() + inner.state.pow(3).sum()
        (grad,) = torch.autograd.grad(total, source, create_graph=True)
        grad.square().sum().backward()
        grads.append(source.grad)
    assert_close(grads[1], grads[0])
    assert_same_gradients(pairs[1][1], pairs[0][1])


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_tensor_that_a_forward_lets_be_trained_is_trained_in_the_next(num_towers: int) -> None:
    class Net(State):
        def forward(self, x: Tensor) -> Tensor:
            self.state.requires_grad_()
            out: Tensor = self.fc(x) * self.state
            return out

    pairs = both(Net(lambda net: None), num_towers)
    for step in range(3):
        for net, inner in pairs:
            net(batch(7, seed=step)).square().sum().backward()
            assert inner.state.is_leaf
            if not step:
                inner.state.grad = None
        assert_close(pairs[1][1].state.grad, pairs[0][1].state.grad)


class Rectifying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


def weighted(net: nn.Module, h: Tensor) -> tuple[Tensor, int]:
    return net(h).mean(), 0 if current_tower() == 1 else len(h)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_tower_losses_forward_writes_into_its_input_is_in_the_graph(num_towers: int, rows: int) -> None:
    plain, wrapped = twins(Rectifying(), num_towers)
    encoders = [nn.Linear(3, 3).double() for _ in range(2)]
    encoders[1].load_state_dict(encoders[0].state_dict())
    for net, encoder in zip((plain, wrapped), encoders, strict=True):
        h = encoder(batch(rows))
        loss = net(h).mean() if net is plain else wrapped.tower_loss(lambda net, h: net(h).mean(), h)
        (loss + h.sum()).backward()
    assert_same_gradients(wrapped, plain)
    assert_same_gradients(encoders[1], encoders[0])


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_so_it_is_of_a_tower_without_weight(num_towers: int) -> None:
    plain, wrapped = twins(Rectifying(), num_towers)
    encoders = [nn.Linear(3, 3).double() for _ in range(2)]
    encoders[1].load_state_dict(encoders[0].state_dict())
    counts = [part.numel() for part in torch.arange(12).tensor_split(num_towers)]
    weights = torch.cat([torch.full((count,), float(tower != 1)) for tower, count in enumerate(counts)])
    for net, encoder in zip((plain, wrapped), encoders, strict=True):
        h = encoder(batch(12))
        loss = (net(h)[:, 0] * weights).sum() / weights.sum() if net is plain else wrapped.tower_loss(weighted, h)
        (loss + h.sum()).backward()
    assert_same_gradients(wrapped, plain)
    assert_same_gradients(encoders[1], encoders[0])

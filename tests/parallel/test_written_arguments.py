"""What a forward leaves, with a graph, in what it is given: in tensors that it writes into, in lists and dicts."""

from __future__ import annotations

import gc
import weakref
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import EVERY_COUNT, SEVERAL, assert_close, assert_same_gradients, batch, twins
from tests.modules import OneLayer

Write = Callable[[Tensor, Tensor], Any]


class Writing(OneLayer):
    """Writes what it computes into a tensor that it is given, however deep it stands in there."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor, target: Any) -> Tensor:
        out: Tensor = self.fc(x)
        self.write(target["scores"][0] if isinstance(target, dict) else target, out)
        return out.tanh()


def _fill_a_column(target: Tensor, out: Tensor) -> None:
    target[:, 0] = out[:, 1]


TURNS = [lambda target: target.t_(), lambda target: target.unsqueeze_(1)]
WRITES: dict[str, Write] = {
    "copy_": lambda target, out: target.copy_(out),
    "add_": lambda target, out: target.add_(out),
    "twice": lambda target, out: target.add_(out).mul_(out),
    "a column": _fill_a_column,
    "a view": lambda target, out: target.t()[1:].copy_(out.t()[1:]),
}


@pytest.mark.parametrize("deep", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_is_written_into_a_tensor_without_grad_leads_to_the_parameters(
    num_towers: int, name: str, deep: bool
) -> None:
    plain, wrapped = twins(Writing(WRITES[name]), num_towers)
    for rows in (7, 1):
        targets = []
        for net in (plain, wrapped):
            target = batch(rows, 2, seed=3)
            out = net(batch(rows), {"scores": [target]} if deep else target)
            assert target.requires_grad and target._version
            (out.sum() + target.square().sum()).backward()
            targets.append(target)
        assert_close(targets[1], targets[0])
        assert_same_gradients(wrapped, plain)


def test_a_tensor_that_is_written_into_again_and_again_goes_on_from_what_it_was() -> None:
    plain, wrapped = twins(Writing(lambda target, out: target.add_(out)), 3)
    losses = []
    for net in (plain, wrapped):
        target = torch.zeros(7, 2, dtype=torch.float64)
        for seed in range(3):
            net(batch(7, seed=seed), target)
        losses.append(target.pow(3).sum())
        losses[-1].backward()
    assert_close(losses[1], losses[0])
    assert_same_gradients(wrapped, plain)


def test_a_write_without_autograd_leaves_the_tensor_without_a_graph() -> None:
    _, wrapped = twins(Writing(lambda target, out: target.copy_(out.detach())), 2)
    target = batch(5, 2)
    out = wrapped(batch(5), target)
    assert not target.requires_grad
    assert_close(target.tanh(), out.detach())


class Collecting(OneLayer):
    """Puts what it computes into a list or dict that it is given."""

    def forward(self, x: Tensor, kept: Any) -> Tensor:
        out: Tensor = self.fc(x)
        if isinstance(kept, list):
            kept.append((out.square().sum(), out))
            kept.append([out.exp()])
        else:
            kept["main"] = out.square().sum() if x.shape[0] else out
        return out


def loss_of(kept: list[Any]) -> Tensor:
    sums = [part[0] if isinstance(part, tuple) else part[0].sum() for part in kept]
    return torch.stack(sums).sum() + sum(part[1].sin().sum() for part in kept if isinstance(part, tuple))


@pytest.mark.parametrize("order", ["kept alone", "both at once", "kept first", "kept last"])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_is_put_into_a_list_leads_to_the_parameters(num_towers: int, order: str) -> None:
    plain, wrapped = twins(Collecting(), num_towers)
    inputs = []
    for net in (plain, wrapped):
        kept: list[Any] = []
        x = batch(7).requires_grad_()
        out = net(x, kept)
        losses = {"kept": loss_of(kept), "out": out.pow(3).sum()}
        if order == "kept alone":
            losses["kept"].backward()
        elif order == "both at once":
            (losses["kept"] + losses["out"]).backward()
        else:
            first, second = ("kept", "out") if order == "kept first" else ("out", "kept")
            losses[first].backward(retain_graph=True)
            losses[second].backward()
        inputs.append(x)
    assert_same_gradients(wrapped, plain)
    assert_close(inputs[1].grad, inputs[0].grad)
    wrapped(batch(7), [])  # no gradient was lost


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_what_is_put_into_a_dict_is_the_last_towers_and_leads_to_the_parameters(num_towers: int, kind: Any) -> None:
    plain, wrapped = twins(Collecting(), num_towers)
    mine, theirs = kind(), kind()
    wrapped(batch(7), mine)
    plain(batch(7).tensor_split(num_towers)[-1], theirs)
    assert_close(mine["main"], theirs["main"])
    for kept in (mine, theirs):
        kept["main"].backward()
    assert_same_gradients(wrapped, plain)
    wrapped(batch(7), {})


def test_a_tensor_of_the_users_that_is_put_into_a_list_stays_what_it_is() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:
            kept.append(extra)
            return self.fc(x)

    _, wrapped = twins(Net(), 2)
    leaf = torch.ones((), dtype=torch.float64, requires_grad=True)
    extra = leaf * 2
    kept: list[Tensor] = []
    wrapped(batch(4), kept)
    assert all(tensor is extra for tensor in kept)
    extra.backward()
    assert leaf.grad is not None


def test_every_entry_of_a_long_list_leads_to_the_parameters() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:
            out: Tensor = self.fc(x)
            kept.extend(out.sum() * i for i in range(700))
            return out

    plain, wrapped = twins(Net(), 2)
    for net in (plain, wrapped):
        kept: list[Tensor] = []
        net(batch(6), kept)
        torch.stack(kept).sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("turn_over", TURNS)
@pytest.mark.parametrize("rows", [2, 3, 4, 6])
def test_an_input_with_a_graph_that_a_forward_turns_over_in_place_leads_back_as_before(
    turn_over: Any, rows: int
) -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            turned = turn_over(x)
            return self.fc(turned.t() if turned.dim() == 2 else turned.squeeze(1)).square()

    plain, wrapped = twins(Net(), 2)
    grads = []
    for net in (plain, wrapped):
        x = batch(rows).requires_grad_()
        hidden = x * 2
        (net(hidden).sum() + hidden.exp().sum()).backward()
        grads.append(x.grad)
    assert_close(grads[1], grads[0])
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("turn_over", TURNS)
def test_an_input_with_a_graph_that_a_forward_turns_over_and_writes_into_is_refused(turn_over: Any) -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            turned = turn_over(x).mul_(2)
            return self.fc(turned.t() if turned.dim() == 2 else turned.squeeze(1))

    _, wrapped = twins(Net(), 2)
    with pytest.raises(ValueError, match=r"to change its shape in place .*not both.* of shape \(6, 3\)"):
        wrapped(batch(6, requires_grad=True) * 2)


@pytest.mark.parametrize("turn_over", TURNS)
def test_a_tensor_that_a_forward_turns_over_in_place_has_its_memory_written_to_and_no_graph(turn_over: Any) -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            turn_over(target).add_(self.fc.bias.sum())
            return self.fc(x)

    _, wrapped = twins(Net(), 2)
    target = torch.zeros(4, 2, dtype=torch.float64)
    wrapped(batch(4), target)
    assert_close(target, wrapped.module.fc.bias.sum().expand(4, 2).detach())
    assert not target.requires_grad


def test_a_tower_of_weight_zero_is_left_out_and_what_it_writes_and_keeps_is_not() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor, target: Tensor, kept: list[Tensor]) -> Tensor:
            out: Tensor = self.fc(x)
            target.copy_(out)
            kept.append(out.pow(3).sum())
            self.aux = out.exp().sum()
            return out

    def loss_fn(net: Any, x: Tensor, mask: Tensor, target: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        out = net(x, target, kept)
        return (out.square().sum(1) * mask).sum() / mask.sum(), mask.sum()

    plain, wrapped = twins(Net(), 2)
    for mask in (torch.tensor([1.0, 1, 0, 0]).double(), torch.tensor([0.0, 0, 1, 1]).double()):
        plain.zero_grad()
        wrapped.zero_grad()
        targets, lists = [torch.zeros(4, 2, dtype=torch.float64) for _ in range(2)], [[], []]
        loss = loss_fn(plain, batch(4), mask, targets[0], lists[0])[0]
        mine = wrapped.tower_loss(loss_fn, batch(4), mask, targets[1], lists[1])
        assert_close(mine, loss)
        plain.aux = plain.fc(batch(4)[:2]).exp().sum()  # the main tower's
        nets: list[Any] = [plain, wrapped.module]
        for net, one, target, kept in zip(nets, (loss, mine), targets, lists, strict=True):
            (one + target.sin().sum() + torch.stack(kept).sum() + net.aux).backward()
        assert_same_gradients(wrapped, plain)


def in_place_first() -> nn.Module:
    return nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(3, 3))


@pytest.mark.parametrize("num_rows", [1, 6])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_an_input_that_a_forward_writes_into_is_in_the_graph_as_in_the_plain_module(
    num_towers: int, num_rows: int
) -> None:
    plain, wrapped = twins(in_place_first(), num_towers)
    found = []
    for net in (plain, wrapped):
        x = batch(num_rows, requires_grad=True)
        hidden = x * 3
        loss = (net(hidden) * hidden).square().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        grad.square().sum().backward()
        found.append((hidden.detach(), grad.detach(), x.grad))
    for got, expected in zip(found[1], found[0], strict=True):
        assert_close(got, expected)
    assert_same_gradients(wrapped, plain)


def test_a_leaf_that_a_forward_writes_into_is_refused_as_by_the_plain_module() -> None:
    for net in twins(in_place_first(), 2):
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place"):
            net(batch(4, requires_grad=True))


def test_an_input_that_a_forward_writes_into_dies_with_its_graph() -> None:
    _, wrapped = twins(in_place_first(), 2)
    hidden = batch(4, requires_grad=True) * 3
    out = wrapped(hidden)
    reference = weakref.ref(hidden)
    del hidden, out
    gc.collect()
    assert reference() is None


def test_what_several_towers_add_to_a_tensor_that_all_have_whole_counts_once() -> None:
    class Totals(OneLayer):
        def forward(self, x: Tensor, total: Tensor) -> Tensor:
            y = self.fc(x)
            total.add_(y.sum())
            return y

    torch.manual_seed(0)
    for net in twins(Totals(), 2):
        total = torch.zeros((), dtype=torch.float64)
        out = net(batch(4), total)
        assert_close(total.detach(), out.sum().detach())


def test_a_tuple_of_a_class_that_makes_its_own_of_something_else_keeps_its_attributes() -> None:
    class Marked(tuple[Any, ...]):
        def __new__(cls, *parts: Any) -> Marked:
            return super().__new__(cls, parts)

    class Reads(OneLayer):
        def forward(self, pair: Any) -> Tensor:
            return self.fc(pair[0]) * pair.mark

    pair = Marked(batch(4))
    pair.mark = 2  # type: ignore[attr-defined]
    plain, wrapped = twins(Reads(), 2)
    assert_close(wrapped(pair), plain(pair))

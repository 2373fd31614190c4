"""The user's graph goes on behind an input: a backward walks into it where the loss depends on that, and only then."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import EVERY_COUNT, assert_close, assert_same_gradients, batch, mlp, twins
from torchtower import TowerParallel

every_count = pytest.mark.parametrize("num_towers", EVERY_COUNT)
Train = Callable[[nn.Module, nn.Sequential], None]


class Critic(nn.Module):
    """Uses its input, is told not to train what lies before it, or does not look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def forward(self, x: Tensor, use: str = "x") -> Tensor:
        if use == "nothing":
            return self.net(torch.ones_like(x))
        return self.net(x.detach() if use == "detached" else x)


class TwoHeads(nn.Module):
    """A head for each of two inputs, over a trunk that they have in common or not."""

    def __init__(self, has_trunk: bool) -> None:
        super().__init__()
        self.trunk = nn.Linear(2, 2)
        self.has_trunk = has_trunk
        self.left, self.right = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.has_trunk:
            both = self.trunk(x + y).tanh()
            return self.left(both), self.right(both), self.left(x)
        return self.left(x).tanh(), self.right(y).tanh(), self.trunk(y)


class TwoSums(nn.Module):
    """The gradient of whose input is the output's, added to another."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.sin()


def assert_trains_alike(module: nn.Module, num_towers: int, train: Train) -> None:
    """Training gives the wrapper, the plain module and the encoder before each the same gradients."""
    plain, wrapped = twins(module, num_towers)
    encoders = [mlp().requires_grad_(), mlp()]
    encoders[1].load_state_dict(encoders[0].state_dict())
    for net, encoder in zip((plain, wrapped), encoders, strict=True):
        train(net, encoder)
    assert_same_gradients(wrapped, plain)
    assert_same_gradients(encoders[1], encoders[0])


@every_count
@pytest.mark.parametrize("use", ["detached", "nothing"])
def test_what_an_unused_input_comes_from_is_left_for_a_later_backward(use: str, num_towers: int) -> None:
    def train(net: nn.Module, encoder: nn.Sequential) -> None:
        made = encoder(batch(7)).tanh()
        net(made, use).square().mean().backward()
        assert all(p.grad is None for p in encoder.parameters())
        net(made).mean().backward()

    assert_trains_alike(Critic(), num_towers, train)


@every_count
@pytest.mark.parametrize("use", ["detached", "nothing"])
def test_what_an_unused_input_comes_from_may_be_gone(use: str, num_towers: int) -> None:
    def train(net: nn.Module, encoder: nn.Sequential) -> None:
        made = encoder(batch(7)).tanh()
        made.sum().backward()
        net(made, use).square().mean().backward()

    assert_trains_alike(Critic(), num_towers, train)


@every_count
def test_an_input_that_was_written_over_since_does_not_matter_where_it_is_not_used(num_towers: int) -> None:
    def train(net: nn.Module, encoder: nn.Sequential) -> None:
        before = encoder(batch(7)).exp()
        made = before * 1
        before.mul_(2)  # its exp() can no longer go backward
        net(made, "detached").square().mean().backward()

    assert_trains_alike(Critic(), num_towers, train)


@pytest.mark.parametrize("num_towers", [2, 3])
def test_tower_loss_leaves_it_alone_as_well(num_towers: int) -> None:
    def train(net: nn.Module, encoder: nn.Sequential) -> None:
        made = encoder(batch(6)).tanh()
        for use in ("detached", "x"):
            if isinstance(net, TowerParallel):
                loss = net.tower_loss(lambda critic, x, use=use: critic(x, use).square().mean(), made)
            else:
                loss = net(made, use).square().mean()
            loss.backward()

    assert_trains_alike(Critic(), num_towers, train)


@every_count
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_outputs_of_inputs_of_their_own_go_backward_one_by_one(order: tuple[int, int], num_towers: int) -> None:
    def train(net: nn.Module, encoder: nn.Sequential) -> None:
        outputs = net(encoder(batch(7)).tanh(), encoder(batch(7, seed=1)).tanh())
        for index in order:
            outputs[index].square().sum().backward()

    assert_trains_alike(TwoHeads(has_trunk=False), num_towers, train)


@every_count
@pytest.mark.parametrize("is_shared", [True, False])
def test_an_output_of_a_plain_input_goes_backward_before_that_of_one_with_a_graph(
    is_shared: bool, num_towers: int
) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Linear(2, 3)
            self.right = self.left if is_shared else nn.Linear(2, 3)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(y).tanh()

    def train(net: nn.Module, encoder: nn.Sequential) -> None:
        left, right = net(encoder(batch(7)).tanh(), batch(7, 2, seed=1))
        right.square().sum().backward()
        left.square().sum().backward()

    assert_trains_alike(Heads(), num_towers, train)


@every_count
@pytest.mark.parametrize("has_trunk", [False, True])
def test_all_of_them_go_backward_in_one(has_trunk: bool, num_towers: int) -> None:
    def train(net: nn.Module, encoder: nn.Sequential) -> None:
        outputs = net(encoder(batch(7)).tanh(), encoder(batch(7, seed=1)).tanh())
        sum(out.square().sum() for out in outputs).backward()

    assert_trains_alike(TwoHeads(has_trunk), num_towers, train)


@every_count
def test_outputs_of_one_trunk_need_their_graph_kept_as_ever(num_towers: int) -> None:
    plain, wrapped = twins(TwoHeads(has_trunk=True), num_towers)
    for net in (plain, wrapped):
        left, right, _ = net(batch(7, 2, requires_grad=True) * 1, batch(7, 2, seed=1))
        left.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            right.sum().backward()


@every_count
def test_hooks_on_parameters_are_called_once_where_branches_meet(num_towers: int) -> None:
    plain, wrapped = twins(TwoHeads(has_trunk=True), num_towers)
    calls = []
    for net, module in ((plain, plain), (wrapped, wrapped.module)):
        seen: list[Tensor] = []
        module.left.weight.register_hook(seen.append)
        module.left.weight.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.clone()))
        x, y = (batch(7, 2, seed=seed, requires_grad=True) * 1 for seed in (0, 1))
        sum(out.square().sum() for out in net(x, y)).backward()
        calls.append(seen)
    assert len(calls[0]) == len(calls[1]) == 2
    for mine, expected in zip(calls[1], calls[0], strict=True):
        assert_close(mine, expected)


@every_count
def test_a_penalty_that_does_not_depend_on_the_input_leaves_its_graph_alone(num_towers: int) -> None:
    def train(net: nn.Module, encoder: nn.Sequential) -> None:
        made = encoder(batch(7)).tanh()
        (gradient,) = torch.autograd.grad(net(made).sum(), made, create_graph=True)
        gradient.square().sum().backward()
        assert all(p.grad is None for p in encoder.parameters())
        net(made).sum().backward()

    assert_trains_alike(Critic(), num_towers, train)


@every_count
@pytest.mark.parametrize("kind", [nn.Identity, TwoSums, nn.Tanh])
def test_gradients_that_are_the_outputs_gradients_themselves_go_backward_again(
    kind: Callable[[], nn.Module], num_towers: int
) -> None:
    def train(net: nn.Module, encoder: nn.Sequential) -> None:
        made = encoder(batch(7))
        (gradient,) = torch.autograd.grad((net(made) ** 3).sum(), made, create_graph=True)
        gradient.square().sum().backward()

    assert_trains_alike(kind(), num_towers, train)


@every_count
def test_a_write_to_the_batch_is_noticed_by_the_branch_that_is_left(num_towers: int) -> None:
    class Scaled(nn.Module):
        def forward(self, a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return a * x, b * x

    for net in twins(Scaled(), num_towers):
        x = batch(7)
        left, right = net(*[batch(7, requires_grad=True) * 1 for _ in range(2)], x)
        left.sum().backward()
        x.fill_(100)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            right.sum().backward()


@every_count
@pytest.mark.parametrize("by", ["closure", "attribute"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_input_that_a_checkpoint_finds_by_itself_is_trained(use_reentrant: bool, by: str, num_towers: int) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            self.memory = memory

            def body(x: Tensor) -> Tensor:
                return self.fc(x).tanh() * (memory if by == "closure" else self.memory)

            return checkpoint(body, self.fc(x), use_reentrant=use_reentrant)

    def train(net: nn.Module, encoder: nn.Sequential) -> None:
        net(batch(7, 2), encoder(batch(7))).square().sum().backward()

    assert_trains_alike(Decoder(), num_towers, train)


@every_count
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_input_that_a_checkpoint_alone_reads_is_trained(use_reentrant: bool, num_towers: int) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return checkpoint(lambda x: self.fc(x).tanh() * memory, self.fc(x), use_reentrant=use_reentrant)

    def train(net: nn.Module, encoder: nn.Sequential) -> None:
        net(batch(7, 2), encoder(batch(7))).square().sum().backward()

    assert_trains_alike(Decoder(), num_towers, train)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Opaque(nn.Module):
    """Holds something, which it reads or not, and has a part that may go backward by itself."""

    def __init__(self, part: str, reads: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.part, self.reads = part, reads
        self.held: Any = None

    def body(self, x: Tensor) -> Tensor:
        return self.fc(x) * (self.held if self.reads else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.part == "function":
            return Doubled.apply(self.body(x))
        out: Tensor = checkpoint(self.body, x, use_reentrant=True)
        return out


@every_count
@pytest.mark.parametrize("part", ["checkpoint", "function"])
def test_what_attributes_hold_is_gone_back_to_beside_opaque_parts_if_it_is_read_and_else_not(
    part: str, num_towers: int
) -> None:
    for reads in (False, True):
        plain, wrapped = twins(Opaque(part, reads), num_towers)
        scales = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(2)]
        for net, inner, scale in ((plain, plain, scales[0]), (wrapped, wrapped.module, scales[1])):
            inner.held = loss = scale.exp()
            for step in range(4):
                net.zero_grad()
                loss = net(batch(7, seed=step, requires_grad=True)).square().sum() * loss.detach()
                loss.backward()
                inner.held = scale.exp() if reads else loss  # a graph that has been freed
            assert (scale.grad is not None) == reads
        assert_same_gradients(wrapped, plain)
        if reads:
            assert_close(scales[1].grad, scales[0].grad)


def test_graphs_that_each_step_leaves_for_the_next_do_not_pile_up() -> None:
    _, wrapped = twins(Opaque("checkpoint", reads=False), 2)
    first = None
    for step in range(4):
        out = wrapped(batch(6, seed=step, requires_grad=True))
        first = first or weakref.ref(out.grad_fn)
        wrapped.module.held = out.sum()
    assert first() is None


@every_count
@pytest.mark.parametrize("hooked", ["input", "parameter"])
def test_a_hook_that_the_forward_registers_sees_the_sum_over_branches(hooked: str, num_towers: int) -> None:
    calls: list[int] = []

    class Clipped(TwoHeads):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            one = self.left.weight if hooked == "parameter" else x
            one.register_hook(lambda grad: calls.append(len(x)))
            return self.left(x).tanh(), self.left(y).tanh() * x.sum(), self.right(y)

    counts = []
    for net in twins(Clipped(has_trunk=False), num_towers):
        calls.clear()
        inputs = [batch(8, 2, seed=seed, requires_grad=True) * 1 for seed in (0, 1)]
        sum(out.sum() for out in net(*inputs)).backward()
        counts.append(len(calls))
    assert counts == [1, num_towers]


@every_count
def test_no_sync_keeps_the_gradients_of_every_branch(num_towers: int) -> None:
    def train(net: nn.Module, encoder: nn.Sequential) -> None:
        inputs = encoder(batch(7)).tanh(), encoder(batch(7, seed=1)).tanh()
        if isinstance(net, TowerParallel):
            with net.no_sync():
                sum(out.square().sum() for out in net(*[x.detach() * 1 for x in inputs])).backward()
        else:
            sum(out.square().sum() for out in net(*[x.detach() for x in inputs])).backward()
        left, right, _ = net(*inputs)
        (left.square().sum() + right.square().sum()).backward()

    assert_trains_alike(TwoHeads(has_trunk=False), num_towers, train)

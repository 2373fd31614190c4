"""Contract 4: modules may be hooked, checkpointed and wrapped, in the wrapper, around it and beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.helpers import (
    EVERY_COUNT,
    assert_close,
    assert_go_backward_alike,
    assert_same_gradients,
    assert_trains_alike,
    batch,
    mlp,
    steps_follow,
    sum_of_squares,
    take_steps,
    twins,
    wrap,
)
from tests.modules import Checkpointed, OneLayer
from torchtower import current_tower

# ---- hooks


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_of_submodules_run_in_every_tower_with_that_towers_modules() -> None:
    seen: list[tuple[str, int | None, bool]] = []
    net = mlp()
    layer = net[0]

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *rest: Any) -> None:
            seen.append((name, current_tower(), type(module) is nn.Linear))

        return hook

    layer.register_forward_pre_hook(note("pre"))
    layer.register_forward_hook(note("forward"))
    layer.register_full_backward_pre_hook(note("backward pre"))
    layer.register_full_backward_hook(note("backward"))
    wrapped = wrap(net, 2)
    wrapped(batch(4)).sum().backward()
    names = ("pre", "forward", "backward pre", "backward")
    assert sorted(seen) == sorted((name, tower, True) for name in names for tower in (0, 1))


def test_hooks_that_change_values_change_the_gradients_as_in_the_plain_module() -> None:
    plain, wrapped = twins(mlp(), 3)
    for net in (plain, wrapped.module):
        net[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        net[0].register_forward_hook(lambda module, args, out: out + 1)
        net[2].register_forward_hook(lambda module, args, kwargs, out: out * 3, with_kwargs=True)
        net[2].register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 0.5,))
    assert_go_backward_alike(plain, wrapped, batch(7))


def test_hooks_added_and_removed_after_the_first_forward_count() -> None:
    wrapped = wrap(nn.Identity(), 2)
    x = batch(4)
    wrapped(x)
    handle = wrapped.module.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(wrapped(x), x + 1)
    handle.remove()
    assert torch.equal(wrapped(x), x)


def test_hooks_of_the_wrapper_itself_see_the_whole_batch_once() -> None:
    wrapped = wrap(mlp(), 2)
    seen = []
    wrapped.register_forward_pre_hook(lambda module, args: seen.append(("pre", len(args[0]), module)))
    wrapped.register_forward_hook(lambda module, args, out: seen.append(("post", len(out), module)))
    wrapped.register_full_backward_hook(lambda module, gi, go: seen.append(("back", len(go[0]), module)))
    wrapped(batch(5, requires_grad=True)).sum().backward()
    assert seen == [("pre", 5, wrapped), ("post", 5, wrapped), ("back", 5, wrapped)]


def test_a_hook_bound_to_a_parent_acts_on_the_towers_own_parent() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.scale = nn.Linear(3, 2), nn.Parameter(torch.tensor(2.0))
            self.fc.register_forward_hook(self.rescale)

        def rescale(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
            assert module is self.fc
            return out * self.scale

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    assert_trains_alike(Net(), 3, batch(7))


def test_tensor_hooks_inside_forward_run_in_every_tower() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            out = self.fc(x)
            if out.requires_grad:
                out.register_hook(lambda grad: grad * 3)
            return out

    assert_trains_alike(Net(), 3, batch(7))


def test_hooks_of_the_users_parameters_see_the_whole_gradient_once() -> None:
    plain, wrapped = twins(mlp(), 3)
    seen: list[list[Tensor]] = [[], []]
    accumulated: list[list[Tensor]] = [[], []]
    for i, net in enumerate((plain, wrapped)):
        for p in net.parameters():
            p.register_hook(lambda grad, i=i: seen[i].append(grad.clone()) or grad * 2)
            p.register_post_accumulate_grad_hook(lambda p, i=i: accumulated[i].append(p.grad.clone()))
        net(batch(7)).square().sum().backward()
    assert len(seen[1]) == len(seen[0]) == len(accumulated[1]) == 4
    assert_same_gradients(wrapped, plain)
    for grads in (seen, accumulated):
        for got, expected in zip(*[sorted(g, key=lambda t: t.numel()) for g in (grads[1], grads[0])], strict=True):
            assert_close(got, expected)


# ---- checkpointing


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool, times: int, num_towers: int) -> None:
    plain, wrapped = twins(Checkpointed(reentrant, times), num_towers)
    steps_follow(plain, wrapped, lambda step: batch(7, seed=step))


@pytest.mark.parametrize("with_more", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_the_wrapper_works(reentrant: bool, with_more: bool) -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        x = batch(5, requires_grad=True)
        part = nn.Sequential(nn.Tanh(), net, nn.Tanh()) if with_more else net
        checkpoint(part, x, use_reentrant=reentrant).square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_checkpoint_sequential_works_inside() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.body, 2, x, use_reentrant=False)

    assert_trains_alike(Net(), 3, batch(7))


def test_checkpointing_with_attributes_changed_between_forward_and_backward_recomputes_this_towers_part() -> None:
    towers = []

    class Net(OneLayer):
        def part(self, x: Tensor) -> Tensor:
            towers.append(current_tower())
            return self.fc(x).tanh()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.part, x, use_reentrant=False)

    plain, wrapped = twins(Net(), 2)
    out = wrapped(batch(4))
    assert sorted(towers) == [0, 1]
    out.square().sum().backward()
    assert sorted(towers) == [0, 0, 1, 1]
    plain(batch(4)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


# ---- wrappers in and beside other modules


def test_two_wrappers_in_one_program_work() -> None:
    plain = nn.Sequential(mlp(3, 3), mlp(3, 2))
    wrapped = nn.Sequential(wrap(copy.deepcopy(plain[0]), 2), wrap(copy.deepcopy(plain[1]), 3))
    for net in (plain, wrapped):
        net(batch(7)).square().sum().backward()
    for ours, theirs in zip(wrapped, plain, strict=True):
        assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("outer", (1, 2))
@pytest.mark.parametrize("inner", (1, 2))
def test_a_wrapper_inside_a_wrapper_works(outer: int, inner: int) -> None:
    plain = nn.Sequential(mlp(3, 3), mlp(3, 2))
    nested = wrap(nn.Sequential(wrap(copy.deepcopy(plain[0]), inner), copy.deepcopy(plain[1])), outer)
    for net in (plain, nested):
        net(batch(7)).square().sum().backward()
    for got, expected in zip(nested.parameters(), plain.parameters(), strict=True):
        assert_close(got.grad, expected.grad)


def test_one_module_in_two_wrappers_accumulates_from_both() -> None:
    plain = mlp()
    net = copy.deepcopy(plain)
    a, b = wrap(net, 2), wrap(net, 3)
    (a(batch(5)).square().sum() + b(batch(7)).sum()).backward()
    (plain(batch(5)).square().sum() + plain(batch(7)).sum()).backward()
    assert_same_gradients(net, plain)


def test_a_wrapper_as_part_of_a_larger_model_trains_with_it() -> None:
    class Whole(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(3, 3).double(), body, nn.Linear(2, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.stem(x)))

    plain = Whole(mlp())
    whole = copy.deepcopy(plain)
    whole.body = wrap(whole.body, 3)
    for net in (plain, whole):
        optimizer = torch.optim.Adam(net.parameters())
        take_steps(net, optimizer, lambda step: batch(7, seed=step), loss=sum_of_squares)
    for got, expected in zip(whole.parameters(), plain.parameters(), strict=True):
        assert_close(got, expected)


def test_distributed_data_parallel_wraps_towers() -> None:
    plain, wrapped = twins(mlp(), 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        both = nn.parallel.DistributedDataParallel(wrapped)
        for step in range(2):
            plain(batch(6, seed=step)).square().sum().backward()
            both(batch(6, seed=step)).square().sum().backward()
        assert_same_gradients(wrapped, plain)
        del both
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("towers", EVERY_COUNT)
def test_a_wrapper_that_has_run_by_itself_may_stand_in_a_wrapped_module(towers: int) -> None:
    plain = nn.Sequential(mlp(), nn.Linear(2, 1).double())
    inner = wrap(copy.deepcopy(plain[0]), 2)
    inner(batch(5))
    wrapped = wrap(nn.Sequential(inner, copy.deepcopy(plain[1])), towers)
    wrapped.tower_loss(lambda net, x: net(x).square().mean(), batch(5)).backward()
    plain(batch(5)).square().mean().backward()
    for mine, expected in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert_close(mine.grad, expected.grad)


def test_shapes_may_be_tried_with_fake_tensors_before_the_first_call() -> None:
    plain, wrapped = twins(mlp(), 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert wrapped(batch(5)).shape == (5, 2)
    for net in (plain, wrapped):
        net(batch(5)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


# ---- transforms of torch.func, within which the module is called as it is


class Keeping(OneLayer):
    """Keeps what a forward computes, in an attribute or a buffer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.zeros(2) if kind == "buffer" else None)

    def forward(self, x: Tensor) -> Tensor:
        self.weight = self.fc.weight.tanh() if self.kind == "weight" else self.fc.weight  # as pruning does
        out = F.linear(x, self.weight, self.fc.bias)
        if self.kind == "attribute":
            self.kept = out.sum()
        elif self.kind == "buffer":
            assert self.mean is not None
            self.mean = self.mean * 0.9 + out.mean(0)
        return out


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda net: torch.func.grad(lambda x: net(x).sum())(batch(5)),
    "vjp": lambda net: torch.func.vjp(net, batch(5)),
    "jvp": lambda net: torch.func.jvp(net, (batch(5),), (batch(5),)),
    "jacrev": lambda net: torch.func.jacrev(net)(batch(5)),
    "functionalize": lambda net: torch.func.functionalize(net)(batch(5)),
    "vmap": lambda net: torch.vmap(net)(batch(5)[None]),
    "vmap of grad": lambda net: torch.vmap(torch.func.grad(lambda row: net(row[None]).sum()))(batch(5)),
}


@pytest.mark.parametrize("first", [True, False], ids=["as the first call", "later"])
@pytest.mark.parametrize("kind", ["attribute", "buffer", "weight"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_a_call_within_a_transform_has_left_is_in_nobodys_way(name: str, kind: str, first: bool) -> None:
    if kind == "buffer" and name.startswith("vmap"):
        pytest.skip("the plain module cannot go on from what torch.vmap has left")
    plain, wrapped = twins(Keeping(kind), 2)
    if not first:
        assert_go_backward_alike(plain, wrapped, batch(4))
    for net in (plain, wrapped):
        TRANSFORMS[name](net)
        net.zero_grad()
    for _ in range(2):
        assert_go_backward_alike(plain, wrapped, batch(7))
    assert_same_gradients(wrapped, plain)

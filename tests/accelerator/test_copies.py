"""What travels between devices, and when: parameters only when they may have changed, in few large copies."""

from __future__ import annotations

import copy
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.accelerator.towers import assert_same_values, device, mlp, rows, twins
from torchtower import TowerParallel

OUT = ("simulated:0", "simulated:1")
BACK = ("simulated:1", "simulated:0")


def deep(layers: int = 20, width: int = 8) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])


def bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def feed(wrapped: TowerParallel, columns: int = 3) -> Tensor:
    """A forward whose only copy is its input's, of 4 rows to device 1 (and its output's, back)."""
    out = wrapped(rows(8, columns).to(device(0)))
    assert isinstance(out, Tensor)
    return out


def parameters_sent(simulated: types.ModuleType, wrapped: TowerParallel, columns: int = 3) -> tuple[int, int]:
    """Copies and bytes to device 1 in one forward, beyond the input's shard."""
    simulated.reset_copies()
    feed(wrapped, columns)
    sent = simulated.copies()[OUT]
    return sent.number - 1, sent.num_bytes - 4 * columns * 8


def test_parameters_travel_in_one_copy_a_dtype_however_many_there_are(simulated: types.ModuleType) -> None:
    plain, wrapped = twins(deep(), [0, 1])
    assert parameters_sent(simulated, wrapped, 8) == (1, bytes_of(plain))


def test_gradients_travel_in_few_copies(simulated: types.ModuleType) -> None:
    plain, wrapped = twins(deep(), [0, 1])
    loss = feed(wrapped, 8).square().sum()
    simulated.reset_copies()
    loss.backward()
    back = simulated.copies()[BACK]
    assert back.num_bytes == bytes_of(plain)
    assert back.number == 1
    assert simulated.copies()[OUT].number == 1  # the output's gradient


def test_two_towers_on_one_device_share_nothing_but_cost_no_third_devices_copies(simulated: types.ModuleType) -> None:
    plain, wrapped = twins(deep(), [0, 1, 0, 1])
    simulated.reset_copies()
    wrapped(rows(8, 8).to(device(0)))
    assert simulated.copies()[OUT] == (2 + 2, 2 * bytes_of(plain) + 4 * 8 * 8)


def test_towers_on_the_main_device_alias_its_parameters(simulated: types.ModuleType) -> None:
    net = mlp().to(device(0))
    wrapped = TowerParallel(net, device_ids=[0, 0, 0])
    wrapped.tower_loss(lambda replica, x: replica(x).square().mean(), rows(6).float().to(device(0))).backward()
    addresses = []

    def loss(replica: nn.Module, x: Tensor) -> Tensor:
        addresses.append([parameter.data_ptr() for parameter in replica.parameters()])
        return replica(x).square().mean()

    wrapped.tower_loss(loss, rows(6).float().to(device(0)))
    assert addresses == [[parameter.data_ptr() for parameter in net.parameters()]] * 3


def test_nothing_is_copied_when_neither_backward_nor_step_happened(simulated: types.ModuleType) -> None:
    _, wrapped = twins(deep(), [0, 1])
    feed(wrapped, 8)
    with torch.no_grad():
        for _ in range(3):
            assert parameters_sent(simulated, wrapped, 8) == (0, 0)
    assert parameters_sent(simulated, wrapped, 8) == (0, 0)


def test_a_frozen_parameter_is_copied_once(simulated: types.ModuleType) -> None:
    net = deep(layers=4)
    for layer in list(net.children())[:3]:
        layer.requires_grad_(False)
    plain, wrapped = twins(net, [0, 1])
    assert parameters_sent(simulated, wrapped, 8)[1] == bytes_of(plain)
    trainable = bytes_of(list(plain.children())[3])
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    for _ in range(3):
        feed(wrapped, 8).sum().backward()
        optimizer.step()
        assert parameters_sent(simulated, wrapped, 8) == (1, trainable)


def test_a_frozen_parameter_is_copied_once_though_every_forward_leaves_tensors_in_a_list(
    simulated: types.ModuleType,
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.cache = nn.Linear(3, 64).requires_grad_(False), [torch.zeros(1)]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            self.cache = [out.mean().detach()]
            return out

    plain, wrapped = twins(Net(), [0, 1])
    assert parameters_sent(simulated, wrapped)[1] >= bytes_of(plain)
    for _ in range(2):
        assert parameters_sent(simulated, wrapped)[1] <= 16  # what is in the list, like buffers


def test_a_frozen_parameter_that_is_another_name_of_a_trained_one_follows_it() -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.live = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.live(x) + x @ self.teacher.t()
            return out

    plain, wrapped = twins(Teacher(), [0, 1])
    for net, call in ((plain, plain), (wrapped.module, wrapped)):
        net.teacher = nn.Parameter(net.live.weight.data, requires_grad=False)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(2):
            call(rows(8).to(net.teacher.device)).sum().backward()
            optimizer.step()
    assert_same_values(feed(wrapped), plain(rows(8)))


def test_a_frozen_parameter_that_was_written_to_is_copied_again(simulated: types.ModuleType) -> None:
    net = mlp()
    net.requires_grad_(False)
    plain, wrapped = twins(net, [0, 1])
    feed(wrapped)
    with torch.no_grad():
        for model in (plain, wrapped.module):
            model[0].weight.mul_(2)
    assert parameters_sent(simulated, wrapped)[0] == 1
    assert_same_values(feed(wrapped), plain(rows(8)))


# ---- whatever changes parameters is seen


def by_optimizer(kind: Callable[..., torch.optim.Optimizer], **options: bool) -> Callable[[nn.Module], None]:
    def step(module: nn.Module) -> None:
        kind(module.parameters(), lr=0.1, **options).step()

    return step


def through_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.data.add_(parameter.grad, alpha=-0.1)


def by_hand(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.1 * parameter.grad  # type: ignore[operator]


def by_new_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 0.5


def by_state_dict(module: nn.Module) -> None:
    module.load_state_dict({name: value * 0.5 for name, value in module.state_dict().items()})


STEPS = {
    "sgd": by_optimizer(torch.optim.SGD),
    "foreach adam": by_optimizer(torch.optim.Adam, foreach=True),
    "fused adam": by_optimizer(torch.optim.Adam, fused=True),
    "fused adamw": by_optimizer(torch.optim.AdamW, fused=True),
    "through data": through_data,
    "by hand": by_hand,
    "new data": by_new_data,
    "state dict": by_state_dict,
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("devices", [[0, 1], [1, 0], [0, 1, 0, 1]], ids=["two", "turned", "twice"])
def test_parameters_are_refreshed_after(devices: list[int], step: Callable[[nn.Module], None]) -> None:
    plain, wrapped = twins(mlp(), devices)
    for round_ in range(3):
        for model in (plain, wrapped):
            model.zero_grad()
            model(rows(8, seed=round_)).square().sum().backward()
            step(model)
        assert_same_values(wrapped(rows(8)), plain(rows(8)), 1e-9)


def test_a_step_without_a_backward_of_ours_is_seen() -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    wrapped(rows(8))
    for model in (plain, wrapped.module):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.Adam(model.parameters(), 0.1, fused=True).step()
    assert_same_values(wrapped(rows(8)), plain(rows(8)))


def test_a_parameter_frozen_after_a_step_was_brought_up_to_date(simulated: types.ModuleType) -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    for model in (plain, wrapped.module):
        model(rows(8).to(next(model.parameters()).device)).square().sum().backward()
        by_optimizer(torch.optim.Adam, fused=True)(model)
        model[0].requires_grad_(False)
    wrapped(rows(8))
    assert_same_values(wrapped(rows(8)), plain(rows(8)))


def test_a_frozen_parameter_that_an_optimizer_goes_on_stepping_is_seen() -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, fused=True) for net in (plain, wrapped)]
    for step in range(4):
        for net, inner, optimizer in zip((plain, wrapped), (plain, wrapped.module), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=False)
            inner[0].requires_grad_(step < 2)  # its gradient is zero from then on, and its momentum moves it
            net(rows(8)).square().sum().backward()
            optimizer.step()
        assert_same_values(wrapped(rows(8)), plain(rows(8)))


def swap(module: nn.Module, values: list[Tensor]) -> list[Tensor]:
    """Write through ``data``, which moves no counter; returns what was there."""
    before = [parameter.detach().clone() for parameter in module.parameters()]
    for parameter, value in zip(module.parameters(), values, strict=True):
        parameter.data.copy_(value)
    return before


@pytest.mark.parametrize("frozen", [0, 2], ids=["averaged weights", "weights merged into frozen ones"])
def test_weights_swapped_in_for_an_evaluation_and_out_again_are_seen(frozen: int) -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    for parameter in list(wrapped.parameters())[:frozen]:
        parameter.requires_grad_(False)
    wrapped(rows(8)).sum().backward()
    by_optimizer(torch.optim.SGD)(wrapped)
    trained = [parameter.detach().clone() for parameter in wrapped.parameters()]
    for mode, values in ((False, [value * 0.5 for value in trained]), (True, trained)):
        swap(wrapped, values)
        swap(plain, values)
        wrapped.train(mode)
        assert_same_values(wrapped(rows(8)), plain(rows(8)))


@pytest.mark.parametrize("trainable", [True, False])
def test_refresh_makes_any_write_seen(trainable: bool, simulated: types.ModuleType) -> None:
    net = mlp()
    net.requires_grad_(trainable)
    plain, wrapped = twins(net, [0, 1])
    wrapped.refresh()  # before the first call there is nothing to do
    wrapped(rows(8))
    for model in (plain, wrapped.module):
        swap(model, [parameter.detach() * 0.5 for parameter in model.parameters()])
    wrapped.refresh()
    assert_same_values(wrapped(rows(8)), plain(rows(8)))
    assert parameters_sent(simulated, wrapped)[0] == 0


def test_a_buffer_that_requires_grad_is_fresh_at_every_forward_like_any_other() -> None:
    class Net(nn.Module):
        def __init__(self, where: torch.device) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(3, dtype=torch.float64, device=where, requires_grad=True))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    wrapped = TowerParallel(Net(device(0)), [0, 1])
    wrapped(rows(4).to(device(0)))
    wrapped.module.scale.data.mul_(2)
    out = wrapped(rows(4).to(device(0)))
    assert_same_values(out, rows(4) * 2)
    out.sum().backward()
    assert_same_values(wrapped.module.scale.grad, rows(4).sum(0))


def test_changed_weights_between_forward_and_backward_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(device(0))
    wrapped = TowerParallel(net, device_ids=[0, 1])
    out = wrapped(torch.ones(4, 3))
    with torch.no_grad():
        net[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_forward_between_forward_and_backward_does_not_spoil_the_first() -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    first = wrapped(rows(6))
    wrapped(rows(6, seed=1)).square().sum().backward()  # parameters may have changed now: they travel again
    second = wrapped(rows(6, seed=2))
    (first.square().sum() + second.square().sum()).backward()
    for seed in range(3):
        plain(rows(6, seed=seed)).square().sum().backward()
    for ours, theirs in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert_same_values(ours.grad, theirs.grad)


# ---- inputs, outputs, memory


def test_rows_of_the_batch_travel_once_and_only_to_their_tower(simulated: types.ModuleType) -> None:
    wrapped = TowerParallel(nn.Identity(), device_ids=[0, 1])
    simulated.reset_copies()
    wrapped(rows(10))
    assert simulated.copies() == {
        ("cpu", "simulated:0"): (1, 5 * 3 * 8),
        ("cpu", "simulated:1"): (1, 5 * 3 * 8),
        BACK: (1, 5 * 3 * 8),
    }


def test_tower_loss_brings_back_losses_alone(simulated: types.ModuleType) -> None:
    plain, wrapped = twins(deep(), [0, 1])
    loss = wrapped.tower_loss(lambda net, x: net(x).square().mean(), rows(8, 8))
    assert simulated.copies()[BACK].num_bytes == 8
    simulated.reset_copies()
    loss.backward()
    assert simulated.copies()[BACK] == (1, bytes_of(plain))


def test_buffers_travel_in_few_copies(simulated: types.ModuleType) -> None:
    net = nn.Sequential(*[nn.BatchNorm1d(8) for _ in range(10)])
    _, wrapped = twins(net, [0, 1])
    wrapped(rows(8, 8))
    simulated.reset_copies()
    with torch.no_grad():
        wrapped(rows(8, 8))
    assert simulated.copies()[OUT].number <= 2  # one for each dtype


def test_a_full_bucket_travels_while_the_backwards_still_run(simulated: types.ModuleType) -> None:
    meeting, seen = threading.Barrier(2, timeout=30), []

    def note(grad: Tensor) -> None:
        meeting.wait()  # both towers have the last layer's gradient, neither has the first one's
        seen.append(simulated.copies()[BACK])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 1024), nn.Linear(1024, 7000, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            if hidden.requires_grad:
                hidden.register_hook(note)
            return self.last(hidden.tanh())

    net = Net().to(device(0))
    loss = TowerParallel(net, device_ids=[0, 1], max_concurrency=2)(torch.ones(4, 4)).sum()
    simulated.reset_copies()
    loss.backward()
    assert seen == [(1, bytes_of(net.last))] * 2


HOW_TO_GO_BACKWARD: dict[str, Callable[[Tensor, nn.Module], Any]] = {
    "backward": lambda loss, net: loss.backward(),
    "some inputs": lambda loss, net: loss.backward(inputs=list(net.parameters())),
    "grad": lambda loss, net: torch.autograd.grad(loss, list(net.parameters())),
}


@pytest.mark.parametrize("keeps_back", [False, True])
@pytest.mark.parametrize("how", HOW_TO_GO_BACKWARD)
def test_gradients_on_the_main_device_are_never_held_once_a_tower(
    simulated: types.ModuleType, how: str, keeps_back: bool
) -> None:
    net = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(32)]).to(device(0))  # 128 MiB
    model_bytes = bytes_of(net)
    wrapped = TowerParallel(net, device_ids=[0, 1, 1, 1, 1, 1])
    if keeps_back:
        with wrapped.no_sync():
            wrapped(torch.ones(6, 1024)).sum().backward()
    loss = wrapped(torch.ones(6, 1024)).sum()
    before = simulated.memory_allocated(0)
    simulated.reset_peak_memory_stats(0)
    HOW_TO_GO_BACKWARD[how](loss, net)
    own = 2 * model_bytes  # the main tower's gradients and the reduced ones
    buckets = 5 * 2 * 29 * 2**20  # a bucket and its flat copy for each of the others
    assert simulated.max_memory_allocated(0) - before < own + buckets


@pytest.mark.parametrize("num_before", range(8))
def test_a_call_that_fails_while_replicas_are_brought_up_to_date_leaves_none_behind(num_before: int) -> None:
    """Out of memory, then a smaller batch."""

    class FullDevice(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.num_left = num_before

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.cat, torch.ops.aten.copy_):
                self.num_left -= 1
                if self.num_left == -1:
                    raise torch.OutOfMemoryError("told to fail")
            return func(*args, **(kwargs or {}))

    plain, wrapped = twins(mlp(), [0, 1])
    for net in (plain, wrapped):
        net(rows(6)).sum().backward()
        torch.optim.SGD(net.parameters(), lr=0.5).step()
    head = nn.Linear(5, 2).double()
    plain[2] = head
    wrapped.module[2] = copy.deepcopy(head).to(device(0))
    try:
        with FullDevice():
            wrapped(rows(6))
    except torch.OutOfMemoryError:
        pass
    assert_same_values(wrapped(rows(4)), plain(rows(4)))


@pytest.mark.parametrize("layout", [[0, 1], [0, 0], [0, 1, 0]])
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_tensor_that_is_made_of_others_follows_like_any_other(kind: str, layout: list[int]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 2)
            scale = TwoTensor(torch.ones(3), torch.ones(3))
            if kind == "parameter":
                self.scale = nn.Parameter(scale, requires_grad=False)
            else:
                self.register_buffer("scale", scale)
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return self.body(x * (self.scale * 1).a)

    plain, wrapped = twins(Scaled(), layout)
    for _ in range(3):
        for net, inner in ((plain, plain), (wrapped, wrapped.module)):
            net.zero_grad()
            net(rows(6)).square().sum().backward()
            with torch.no_grad():
                inner.scale.mul_(1.5)
        assert_same_values(wrapped.module.body.weight.grad, plain.body.weight.grad)
        assert_same_values(wrapped.module.count, plain.count)

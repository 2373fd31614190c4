"""On an accelerator too, every gradient is the plain module's on the whole batch, in float64 to 1e-12."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.accelerator.towers import (
    assert_go_backward_alike,
    assert_same_gradients,
    assert_same_state,
    assert_same_values,
    device,
    every_layout,
    mlp,
    rows,
    twins,
)
from tests.helpers import STYLES, in_threads, loss_in, mean_of_squares_by
from tests.modules import Checkpointed, OneLayer, Recurrent, TrainedWithin
from torchtower import TowerParallel, current_tower

where_inputs_lie = pytest.mark.parametrize("place", ["cpu", "main", "other"])


def placed(tensor: Tensor, place: str, wrapped: TowerParallel) -> Tensor:
    main = wrapped.devices[0]
    return tensor.to({"cpu": "cpu", "main": main, "other": device(1 - main.index)}[place])


@every_layout
@where_inputs_lie
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_drop_in_gradients_equal_the_plain_modules(devices: list[int], place: str, count: int) -> None:
    plain, wrapped = twins(mlp(), devices)
    x, y = rows(count), rows(count, 2, seed=1)
    out = wrapped(placed(x, place, wrapped))
    assert out.device == device(devices[0])
    F.mse_loss(out, y.to(out.device)).backward()
    F.mse_loss(plain(x), y).backward()
    assert_same_gradients(wrapped, plain)


@every_layout
@where_inputs_lie
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_tower_loss_gradients_equal_the_plain_modules(devices: list[int], place: str, count: int) -> None:
    plain, wrapped = twins(mlp(), devices)
    x, y = rows(count), rows(count, 2, seed=1)
    batch = [placed(tensor, place, wrapped) for tensor in (x, y)]
    loss = wrapped.tower_loss(lambda net, x, y: F.mse_loss(net(x), y), *batch)
    loss.backward()
    expected = F.mse_loss(plain(x), y)
    expected.backward()
    assert loss.device == device(devices[0])
    assert_same_values(loss, expected)
    assert_same_gradients(wrapped, plain)


@every_layout
def test_gradients_of_inputs_arrive_where_the_inputs_lie(devices: list[int]) -> None:
    plain, wrapped = twins(mlp(), devices)
    expected = rows(5).requires_grad_()
    plain(expected).square().sum().backward()
    for place in ("cpu", "main", "other"):
        x = placed(rows(5), place, wrapped).requires_grad_()
        wrapped(x).square().sum().backward()
        assert x.grad is not None and x.grad.device == x.device
        assert_same_values(x.grad, expected.grad)


@every_layout
@pytest.mark.parametrize("output_device", [0, 1, "cpu"])
def test_outputs_lie_on_output_device(devices: list[int], output_device: int | str) -> None:
    plain, wrapped = twins(mlp(), devices, output_device=output_device)
    out = wrapped(rows(5))
    assert out.device == torch.device("cpu" if output_device == "cpu" else device(int(output_device)))
    out.square().sum().backward()
    plain(rows(5)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@every_layout
@pytest.mark.parametrize("output_device", [0, 1, "cpu"])
def test_outputs_of_a_call_within_a_transform_lie_on_output_device(
    devices: list[int], output_device: int | str
) -> None:
    plain, wrapped = twins(mlp(), devices, output_device=output_device)
    out, tangent = torch.func.jvp(wrapped, (rows(5),), (rows(5),))
    assert_same_values(out, plain(rows(5)))
    assert out.device == tangent.device == torch.device("cpu" if output_device == "cpu" else device(int(output_device)))


def test_no_device_ids_means_every_device() -> None:
    wrapped = TowerParallel(mlp().to("simulated:0"))
    assert [str(d) for d in wrapped.devices] == ["simulated:0", "simulated:1"]
    assert wrapped(torch.ones(4, 3)).shape == (4, 2)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@every_layout
def test_twenty_steps_follow_the_plain_modules_path(
    devices: list[int], optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    plain, wrapped = twins(mlp(), devices)
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    steppers = [optimizer(model.parameters(), lr=0.01, **options) for model in (plain, wrapped)]
    for step in range(20):
        x, y = rows(7, seed=step), rows(7, 2, seed=100 + step)
        for model, stepper in zip((plain, wrapped), steppers, strict=True):
            stepper.zero_grad()
            out = model(x)
            F.mse_loss(out, y.to(out.device)).backward()
            stepper.step()
    for ours, theirs in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert_same_values(ours, theirs, 1e-9)


# ---- no deadlock, whatever goes backward


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    return out.square().mean() + grad.square().sum().to(out.device)


@every_layout
@where_inputs_lie
def test_a_gradient_penalty_equals_the_plain_modules(devices: list[int], place: str) -> None:
    plain, wrapped = twins(mlp(), devices)
    x = placed(rows(5), place, wrapped).requires_grad_()
    expected = rows(5).requires_grad_()
    penalty(wrapped, x).backward()
    penalty(plain, expected).backward()
    assert_same_gradients(wrapped, plain)
    assert_same_values(x.grad, expected.grad)


@every_layout
def test_double_backward_to_the_parameters_equals_the_plain_modules(devices: list[int]) -> None:
    plain, wrapped = twins(mlp(), devices)
    for model in (plain, wrapped):
        grads = torch.autograd.grad(model(rows(5)).square().sum(), list(model.parameters()), create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
    assert_same_gradients(wrapped, plain)


@every_layout
@pytest.mark.parametrize("num_threads", [2, 4])
def test_backward_from_several_threads_at_once_ends(devices: list[int], num_threads: int) -> None:
    plain, wrapped = twins(mlp(), devices)
    losses = [wrapped(rows(6, seed=seed)).square().sum() for seed in range(num_threads)]
    in_threads(*[loss.backward for loss in losses])
    for seed in range(num_threads):
        plain(rows(6, seed=seed)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@every_layout
def test_forward_and_backward_from_several_threads_at_once_end(devices: list[int]) -> None:
    plain, wrapped = twins(mlp(), devices)
    in_threads(*[lambda seed=seed: wrapped(rows(6, seed=seed)).square().sum().backward() for seed in range(3)])
    for seed in range(3):
        plain(rows(6, seed=seed)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@every_layout
def test_a_backward_within_a_forward_ends_though_another_threads_backward_waits(devices: list[int]) -> None:
    inside = threading.Event()

    class Slow(TrainedWithin):
        def forward(self, x: Tensor) -> Tensor:
            if inside.is_set():
                time.sleep(0.2)  # the other backward has begun by then
            inside.set()
            return super().forward(x)

    wrapped = TowerParallel(Slow().double().to(device(devices[0])), device_ids=devices)
    loss = wrapped(rows(6)).sum()
    in_threads(lambda: wrapped(rows(6)), loss.backward)


@every_layout
def test_a_backward_from_a_forward_through_an_earlier_call_is_refused(devices: list[int]) -> None:
    earlier: list[Tensor] = []

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            if earlier and current_tower() == 0:
                earlier.pop().backward()
            return self.fc(x)

    wrapped = TowerParallel(Net().double().to(device(devices[0])), device_ids=devices)
    earlier.append(wrapped(rows(6)).sum())
    with pytest.raises(RuntimeError, match="started in the forward of one"):
        wrapped(rows(6))


def test_two_wrappers_on_opposite_main_devices_go_backward_at_once() -> None:
    pairs = [twins(mlp(), layout) for layout in ([0, 1], [1, 0])]
    for _ in range(10):
        losses = [wrapped(rows(6)).square().sum() for _, wrapped in pairs]
        in_threads(*[loss.backward for loss in losses])
        for plain, _ in pairs:
            plain(rows(6)).square().sum().backward()
    for plain, wrapped in pairs:
        assert_same_gradients(wrapped, plain)


def test_one_loss_over_two_wrappers_on_opposite_main_devices() -> None:
    (plain_a, a), (plain_b, b) = twins(mlp(), [0, 1]), twins(nn.Linear(2, 2), [1, 0])
    b(a(rows(6))).square().sum().backward()
    plain_b(plain_a(rows(6))).square().sum().backward()
    assert_same_gradients(a, plain_a)
    assert_same_gradients(b, plain_b)


@every_layout
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_ends_and_is_right(devices: list[int], use_reentrant: bool) -> None:
    plain, wrapped = twins(Checkpointed(use_reentrant), devices)
    assert_go_backward_alike(plain, wrapped, rows(6))


# ---- modules that devices bear upon


@every_layout
def test_batch_norm_keeps_the_main_towers_statistics_on_the_main_device(devices: list[int]) -> None:
    alone, wrapped = twins(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), devices)
    x = rows(8)
    for _ in range(3):
        wrapped(x)
        alone(x[: 8 // len(devices)])
    assert_same_state(wrapped, alone)
    assert {buffer.device for buffer in wrapped.buffers()} == {device(devices[0])}


@every_layout
def test_pooled_buffers_are_the_mean_over_towers(devices: list[int]) -> None:
    _, wrapped = twins(nn.BatchNorm1d(3, momentum=1.0), devices, buffers="mean")
    x = rows(8)
    wrapped(x)
    assert_same_values(wrapped.module.running_mean, x.mean(0))
    assert wrapped.module.running_mean.device == device(devices[0])


@every_layout
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_networks_train_alike(devices: list[int], kind: type[nn.RNNBase]) -> None:
    plain, wrapped = twins(Recurrent(kind, num_layers=2), devices)
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    assert_go_backward_alike(plain, wrapped, x)


@every_layout
def test_sparse_gradients_of_embeddings_stay_sparse(devices: list[int]) -> None:
    plain, wrapped = twins(nn.Embedding(6, 3, sparse=True), devices)
    words = torch.tensor([[1, 2], [2, 5], [1, 1], [0, 3], [5, 5]])
    for model in (plain, wrapped):
        for _ in range(2):
            model(words).square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    grad = wrapped.module.weight.grad
    assert grad.is_sparse and grad.device == device(devices[0])
    assert_same_values(grad.to_dense(), plain.weight.grad.to_dense())
    assert_same_values(wrapped(words), plain(words))


@every_layout
def test_channels_last_convolutions_train_alike(devices: list[int]) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False))
    plain, wrapped = twins(net.to(memory_format=torch.channels_last), devices)
    x = torch.randn(5, 2, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert_go_backward_alike(plain, wrapped, x)
    assert wrapped.module[0].weight.grad.is_contiguous(memory_format=torch.channels_last)


@every_layout
def test_tied_frozen_and_unused_parameters_keep_their_rules(devices: list[int]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(2, 2)
            self.b.weight = self.a.weight
            self.a.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    plain, wrapped = twins(Net(), devices)
    wrapped(rows(5)).square().sum().backward()
    plain(rows(5)).square().sum().backward()
    assert wrapped.module.unused.weight.grad is None
    assert_same_gradients(wrapped, plain)


@every_layout
def test_gradients_accumulate_over_batches_and_within_no_sync(devices: list[int]) -> None:
    plain, wrapped = twins(mlp(), devices)
    with wrapped.no_sync():
        wrapped(rows(5)).square().sum().backward()
        wrapped(rows(4, seed=1)).square().sum().backward()
    wrapped(rows(3, seed=2)).square().sum().backward()
    for count, seed in ((5, 0), (4, 1), (3, 2)):
        plain(rows(count, seed=seed)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_the_same_towers_give_the_same_bits_however_they_lie() -> None:
    grads = []
    for devices in ([0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]):
        torch.manual_seed(0)
        wrapped = TowerParallel(mlp().to("simulated:0"), device_ids=devices)
        wrapped(rows(9).float()).square().sum().backward()
        grads.append([parameter.grad.cpu() for parameter in wrapped.parameters()])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_a_wrapper_of_two_devices_can_move_to_the_other_main_device_by_being_made_anew() -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    wrapped(rows(4)).sum().backward()
    wrapped.module.zero_grad()
    again = TowerParallel(wrapped.module.to("simulated:1"), device_ids=[1, 0])
    assert_go_backward_alike(plain, again, rows(4))


class ScaledFromOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale, self.last = nn.Linear(3, 2), None, None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.fc(x)
        return self.last if self.scale is None else self.last * self.scale


@every_layout
def test_a_tensor_with_a_graph_in_an_attribute_gets_gradients_from_every_device(devices: list[int]) -> None:
    plain, wrapped = twins(ScaledFromOutside(), devices)
    sources = []
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        source = torch.ones(2, dtype=torch.float64, device=next(inner.parameters()).device, requires_grad=True)
        sources.append(source)
        for factor in (2, 3):
            inner.scale = source * factor
            net(rows(7)).square().mean().backward()
    assert_same_gradients(wrapped, plain)
    assert_same_values(sources[1].grad, sources[0].grad)


def test_what_a_forward_leaves_behind_is_not_sent_to_other_devices(simulated: Any) -> None:
    _, wrapped = twins(ScaledFromOutside(), [0, 1])
    for _ in range(2):
        wrapped(rows(2)).sum().backward()
    sizes = []
    for count in (2, 2000):  # of which each tower leaves a half
        wrapped(rows(count)).sum().backward()
        simulated.reset_copies()
        wrapped(rows(2))
        sizes.append(simulated.copies()[("simulated:0", "simulated:1")].num_bytes)
    assert sizes[0] == sizes[1]


@every_layout
def test_activations_that_a_hook_keeps_lead_to_the_parameters(devices: list[int]) -> None:
    plain, wrapped = twins(mlp(), devices)
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        features: list[Tensor] = []
        inner[0].register_forward_hook(lambda m, i, o, features=features: features.append(o))
        out = net(rows(8))
        loss = out.square().sum()
        for feature in features:
            loss = loss + feature.to(loss.device).square().sum()
        loss.backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("style", [*STYLES, "no_sync"])
@every_layout
def test_what_is_trained_on_the_cpu_in_an_attribute_has_the_plain_gradient(devices: list[int], style: str) -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
            self.elsewhere = [nn.Linear(3, 2).double()]

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) / self.temperature + self.elsewhere[0](x.cpu()).to(x)

    plain, wrapped = twins(Tempered(), devices)
    sgds = [
        torch.optim.SGD([*inner.parameters(), inner.temperature, *inner.elsewhere[0].parameters()], 0.1)
        for inner in (plain, wrapped.module)
    ]
    for step in range(3):
        x = rows(7, seed=step)
        for net in (plain, wrapped):
            loss_in(style, net, mean_of_squares_by, x).backward()
        if style == "no_sync":
            plain(x).square().sum().backward()
            with wrapped.no_sync():
                wrapped(x).square().sum().backward()
            for net in (plain, wrapped):
                net(x).sum().backward()
        assert_same_gradients(wrapped, plain)
        assert_same_values(wrapped.module.temperature.grad, plain.temperature.grad)
        assert (
            wrapped.module.temperature.grad.device
            == wrapped.module.elsewhere[0].weight.grad.device
            == plain.fc.weight.device
        )
        assert_same_values(wrapped.module.elsewhere[0].weight.grad, plain.elsewhere[0].weight.grad)
        for sgd in sgds:
            sgd.step()
            sgd.zero_grad()


@every_layout
def test_gradients_are_mapped_over_by_vmap(devices: list[int]) -> None:
    plain, wrapped = twins(mlp(), devices)
    found = []
    for net, module in ((plain, plain), (wrapped, wrapped.module)):
        out = net(rows(5)).mean(0)
        ways = torch.eye(2, dtype=out.dtype, device=out.device)
        wanted = list(module.parameters())
        each = lambda way, out=out, wanted=wanted: torch.autograd.grad(out, wanted, way, retain_graph=True)  # noqa: E731
        found.append(torch.vmap(each)(ways))
    for mine, expected in zip(found[1], found[0], strict=True):
        assert_same_values(mine, expected)

"""Towers on a CUDA device: streams, random numbers, autocast, cuDNN and the compiler as they are there.

All towers lie on one device, or on two where there are two. TORCHTOWER_REQUIRE_CUDA=1 makes a missing device a failure.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.programs import passes
from torchtower import TowerParallel, convert_sync_batchnorm

pytestmark = pytest.mark.needs_cuda

LAYOUTS = [[0, 0], [0, 0, 0], [0, 1]]
every_layout = pytest.mark.parametrize("devices", LAYOUTS, ids=str)
Loss = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _exact() -> Any:
    """Convolutions in float64 are exact enough whichever algorithm is chosen; the choice itself must not vary."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


def twins(module: nn.Module, devices: list[int], **options: Any) -> tuple[nn.Module, TowerParallel]:
    if max(devices) >= torch.cuda.device_count():
        pytest.skip(f"needs {max(devices) + 1} CUDA devices")
    plain = module.double().cuda()
    return plain, TowerParallel(copy.deepcopy(plain), device_ids=devices, **options)


def rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).cuda()


def assert_same(wrapped: TowerParallel, plain: nn.Module, rtol: float = 1e-10) -> None:
    for ours, theirs in zip(wrapped.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=rtol, atol=rtol)


def assert_follow(plain: nn.Module, wrapped: TowerParallel, x: Tensor, steps: int = 5, **options: Any) -> None:
    """Both take the same steps of SGD with momentum."""
    for net in (plain, wrapped):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert_same(wrapped, plain, **options)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


@every_layout
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_follow_the_plain_module(devices: list[int], memory_format: torch.memory_format) -> None:
    net = convolutional().double()
    net(torch.zeros(1, 3, 8, 8).double())
    plain, wrapped = twins(net.to(memory_format=memory_format), devices)
    assert_follow(plain, wrapped, rows(7, 3, 8, 8).to(memory_format=memory_format))


@every_layout
def test_synchronised_batch_norm_follows_the_plain_module(devices: list[int]) -> None:
    net = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 3))
    plain, wrapped = twins(net, devices)
    wrapped.module = convert_sync_batchnorm(wrapped.module)
    assert_follow(plain, wrapped, rows(11, 6))
    torch.testing.assert_close(wrapped.module[1].running_var, plain[1].running_var)


@every_layout
def test_recurrent_networks_follow_the_plain_module(devices: list[int]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 6, num_layers=2, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.lstm.flatten_parameters()
            return self.head(self.lstm(x)[0][:, -1])

    assert_follow(*twins(Net(), devices), rows(7, 5, 4))


@every_layout
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_dropout_repeats_its_masks(devices: list[int], use_reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.checkpointed = nn.Linear(6, 64), nn.Linear(64, 3), True

        def body(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5).tanh()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(
                checkpoint(self.body, x, use_reentrant=use_reentrant) if self.checkpointed else self.body(x)
            )

    whole, wrapped = twins(Net(), devices)
    unchecked = TowerParallel(whole, device_ids=devices)
    whole.checkpointed = False
    for net in (unchecked, wrapped):
        torch.manual_seed(0)
        for _ in range(2):
            net(rows(8, 6)).square().sum().backward()
    assert_same(wrapped, whole)


@every_layout
def test_each_tower_drops_out_by_itself_and_a_seed_repeats_it(devices: list[int]) -> None:
    _, wrapped = twins(nn.Dropout(0.5), devices)
    x = torch.ones(6, 1000, device="cuda")
    torch.manual_seed(3)
    first = wrapped(x)
    second = wrapped(x)
    torch.manual_seed(3)
    assert torch.equal(wrapped(x), first) and not torch.equal(first, second)
    shards = first.chunk(len(devices))
    assert all(not torch.equal(shards[0], other) for other in shards[1:])
    torch.manual_seed(3)
    assert torch.equal(F.dropout(x[: len(shards[0])], 0.5), shards[0])


@every_layout
def test_fused_attention_drops_out_by_itself_and_a_seed_repeats_it(devices: list[int]) -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    _, wrapped = twins(Attention(), devices)
    x = rows(1, 4, 64, 32).half().expand(len(devices), -1, -1, -1)
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(wrapped(x))
    assert torch.equal(*outputs)
    assert all(not torch.equal(outputs[0][0], other) for other in outputs[0][1:])


@every_layout
def test_the_first_attention_of_a_process_takes_the_kernel_that_later_ones_take(devices: list[int]) -> None:
    if max(devices) >= torch.cuda.device_count():
        pytest.skip(f"needs {max(devices) + 1} CUDA devices")
    passes(f"""
import torch.nn.functional as F

class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

model = TowerParallel(Attention(), {devices})
x = torch.randn(1, 4, 64, 32, device="cuda", dtype=torch.float16).expand({len(devices)}, -1, -1, -1)
outputs = []
for _ in range(3):
    torch.manual_seed(3)
    outputs.append(model(x))
assert all(torch.equal(outputs[0], other) for other in outputs[1:])
""")


@every_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_a_scaler_train_as_with_the_plain_module(devices: list[int], dtype: torch.dtype) -> None:
    plain, wrapped = twins(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), devices)
    x, seen = rows(8, 16).float(), []
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        net.float()
        inner[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype):
                loss = net(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    assert set(seen) == {dtype}
    for ours, theirs in zip(wrapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@every_layout
def test_work_goes_to_the_callers_stream_and_nothing_waits_for_it(devices: list[int]) -> None:
    plain, wrapped = twins(nn.Linear(32, 4), devices)
    wrapped(rows(8, 32)).sum().backward()  # once before: the first call of anything loads kernels
    wrapped.zero_grad()
    given, x = rows(8, 32), torch.zeros(8, 32, dtype=torch.float64, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        x.copy_(given)
        wrapped(x).square().sum().backward()
        if len(set(devices)) == 1:  # copies to and from other devices may wait
            assert not stream.query()
    stream.synchronize()
    plain(given).square().sum().backward()
    assert_same(wrapped, plain)


@every_layout
def test_tower_loss_averages_and_statistics_of_memory_return(devices: list[int]) -> None:
    plain, wrapped = twins(nn.Sequential(nn.Linear(6, 512), nn.Tanh(), nn.Linear(512, 3)), devices)
    x, y = rows(7, 6), rows(7, 3, seed=1)
    allocated = []
    for _ in range(8):
        wrapped.zero_grad()
        wrapped.tower_loss(lambda net, x, y: F.mse_loss(net(x), y), x, y).backward()
        allocated.append(torch.cuda.memory_allocated())
    # A thread may be about to let go of its shard, a few KB; a step's tensors are larger than that.
    assert max(allocated[1:]) - min(allocated[1:]) < 512 * 6 * 8
    F.mse_loss(plain(x), y).backward()
    assert_same(wrapped, plain)


def test_towers_on_one_device_hold_the_parameters_once() -> None:
    plain, wrapped = twins(nn.Linear(4000, 4000), [0, 0, 0, 0])
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        wrapped(rows(8, 4000))
    # The rest is cuBLAS's: a workspace for each thread.
    assert torch.cuda.memory_allocated() - before < plain.weight.nbytes == 128_000_000


@every_layout
def test_an_output_on_its_way_to_the_cpu_is_waited_for(devices: list[int]) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.cuda._sleep(50_000_000)
            return (x * 2).to("cpu", non_blocking=True)

    _, wrapped = twins(Net(), devices, output_device="cpu")
    x = rows(64, 1000)
    assert torch.equal(wrapped(x), (x * 2).cpu())


@every_layout
def test_a_double_backward_reaches_parameters_and_inputs(devices: list[int]) -> None:
    plain, wrapped = twins(nn.Sequential(nn.Linear(6, 9), nn.Softplus(), nn.Linear(9, 1)), devices)
    inputs = [rows(7, 6).requires_grad_() for _ in range(2)]
    for net, x in zip((plain, wrapped), inputs, strict=True):
        (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        ((gradient.norm(dim=1) - 1).square().mean() + net(x).mean()).backward()
    assert_same(wrapped, plain)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


def test_an_out_of_memory_error_names_the_tower_and_the_next_call_works() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.greedy = nn.Linear(6, 3), True

        def forward(self, x: Tensor) -> Tensor:
            if self.greedy:
                torch.empty(2**50, device=x.device)
            return self.fc(x)

    plain, wrapped = twins(Net(), [0, 0])
    with pytest.raises(torch.OutOfMemoryError, match="in tower 0 on device cuda:0"):
        wrapped(rows(8, 6))
    plain.greedy = wrapped.module.greedy = False
    assert_follow(plain, wrapped, rows(8, 6))


def test_a_compiled_module_runs_in_all_towers() -> None:
    plain, wrapped = twins(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), [0, 0])
    wrapped.module.compile()
    assert_follow(plain, wrapped, rows(8, 6))

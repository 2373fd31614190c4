"""Contract 5: the state of the caller's thread goes with its work to the towers, forward and backward."""

from __future__ import annotations

import contextvars
import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import (
    EVERY_COUNT,
    assert_close,
    assert_go_backward_alike,
    assert_same_gradients,
    batch,
    mlp,
    twins,
    wrap,
)
from tests.modules import OneLayer
from torchtower import current_tower, tower_sum


class Watching(nn.Module):
    """Notes something in every tower's forward and backward."""

    def __init__(self, look: Any) -> None:
        super().__init__()
        self.fc, self.look = nn.Linear(3, 2), look
        self.register_full_backward_hook(lambda module, grad_in, grad_out: module.note("backward"))

    def note(self, phase: str) -> None:
        self.look(phase)

    def forward(self, x: Tensor) -> Tensor:
        self.note("forward")
        return self.fc(x)


def watch(look: Any) -> tuple[Any, list[tuple[str, Any]]]:
    seen: list[tuple[str, Any]] = []
    return wrap(Watching(lambda phase: seen.append((phase, look()))).double(), 2), seen


# ---- modes of autograd


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_goes_with_the_work(enabled: bool) -> None:
    wrapped, seen = watch(torch.is_grad_enabled)
    with torch.set_grad_enabled(enabled):
        out = wrapped(batch(4))
    assert seen == [("forward", enabled)] * 2
    assert out.requires_grad is enabled


def test_inference_mode_goes_with_the_work() -> None:
    wrapped, seen = watch(torch.is_inference_mode_enabled)
    wrapped(batch(4))
    with torch.inference_mode():
        out = wrapped(batch(4))
    assert seen == [("forward", False)] * 2 + [("forward", True)] * 2
    assert out.is_inference()
    wrapped(batch(4, requires_grad=True)).sum().backward()
    assert wrapped.module.fc.weight.grad is not None


def test_a_first_call_in_inference_mode_does_not_spoil_training() -> None:
    plain, wrapped = twins(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval(), nn.Linear(3, 2)), 2)
    with torch.inference_mode():
        wrapped(batch(4))
    assert_go_backward_alike(plain, wrapped, batch(5))


def test_a_first_call_without_grad_does_not_spoil_training() -> None:
    plain, wrapped = twins(mlp(), 2)
    with torch.no_grad():
        wrapped(batch(4))
    assert_go_backward_alike(plain, wrapped, batch(5))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_detection_goes_with_the_work() -> None:
    wrapped, seen = watch(torch.is_anomaly_enabled)
    with torch.autograd.detect_anomaly(check_nan=False):
        wrapped(batch(4))
    assert seen == [("forward", True)] * 2


def test_anomaly_detection_finds_the_nan_of_a_tower() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            return (self.fc(x) * 0).sqrt() * 0

    wrapped = wrap(Net().double(), 2)
    with pytest.warns(UserWarning), torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="nan"):
        wrapped(batch(4)).sum().backward()


def test_saved_tensor_hooks_go_with_the_work() -> None:
    plain, wrapped = twins(mlp(), 2)
    packed: list[int | None] = []
    unpacked: list[int | None] = []

    def pack(tensor: Tensor) -> Any:
        packed.append(current_tower())
        return tensor.clone()

    def unpack(value: Any) -> Tensor:
        unpacked.append(current_tower())
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = wrapped(batch(5))
    assert packed.count(0) == packed.count(1) > 0
    out.square().sum().backward()
    assert unpacked.count(0) == packed.count(0) and unpacked.count(1) == packed.count(1)
    plain(batch(5)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_save_on_cpu_works() -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        with torch.autograd.graph.save_on_cpu():
            loss = net(batch(5)).square().sum()
        loss.backward()
    assert_same_gradients(wrapped, plain)


def test_disabled_saved_tensor_hooks_stay_disabled() -> None:
    wrapped, seen = watch(torch._C._autograd._saved_tensors_hooks_is_enabled)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        wrapped(batch(4))
    assert seen == [("forward", False)] * 2


# ---- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache", [True, False])
def test_autocast_goes_with_the_work_dtype_and_cache_flag_too(dtype: torch.dtype, cache: bool) -> None:
    seen = []

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            state = (
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
                torch.is_autocast_cache_enabled(),
            )
            seen.append(state)
            return self.fc(x)

    wrapped = wrap(Net(), 2)
    with torch.autocast("cpu", dtype=dtype, cache_enabled=cache):
        out = wrapped(torch.randn(4, 3))
    assert out.dtype == dtype
    assert seen == [(True, dtype, cache)] * 2
    out.float().sum().backward()
    assert wrapped.module.fc.weight.grad.dtype == torch.float32
    seen.clear()
    wrapped(torch.randn(4, 3))
    assert seen == [(False, torch.get_autocast_dtype("cpu"), True)] * 2
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_that_a_forward_leaves_off_is_the_callers_again_at_the_next() -> None:
    class LeavesItOff(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x)
            torch.set_autocast_enabled("cpu", False)
            return out

    for net in (LeavesItOff(), wrap(LeavesItOff(), 2)):
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):  # whose end undoes what the plain module has left
                assert net(torch.ones(4, 3)).dtype == torch.bfloat16


def test_autocast_gives_the_plain_modules_gradients_step_after_step() -> None:
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    wrapped = wrap(copy.deepcopy(plain), 2)
    for net in (plain, wrapped):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
    for got, expected in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(got, expected, rtol=2e-2, atol=2e-2)


def test_two_forwards_under_one_autocast_see_changed_weights() -> None:
    wrapped = wrap(nn.Linear(3, 2, bias=False), 2)
    x = torch.ones(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = wrapped(x)
        with torch.no_grad():
            wrapped.module.weight.fill_(1.0)
        assert torch.equal(wrapped(x), torch.full((4, 2), 3.0, dtype=torch.bfloat16))
    assert not torch.equal(first, torch.full((4, 2), 3.0, dtype=torch.bfloat16))


class CastsItself(nn.Linear):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_an_autocast_within_the_forward_casts_the_weights_as_they_are() -> None:
    wrapped = wrap(CastsItself(3, 2), 2)
    first = wrapped(torch.ones(4, 3))
    assert first.dtype == torch.bfloat16
    with torch.no_grad():
        wrapped.module.weight.fill_(1.0)
        wrapped.module.bias.zero_()
    assert torch.equal(wrapped(torch.ones(4, 3)), torch.full((4, 2), 3.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("within", ["forward", "loss_fn"])
def test_training_with_autocast_in_the_towers_follows_the_plain_module(within: str) -> None:
    def loss_fn(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16) if within == "loss_fn" else nullcontext():
            return net(x).float().square().mean()

    plain = (CastsItself if within == "forward" else nn.Linear)(8, 4)
    wrapped = wrap(copy.deepcopy(plain), 2)
    losses: dict[nn.Module, list[float]] = {plain: [], wrapped: []}
    for net, seen in losses.items():
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for step in range(5):
            x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
            loss = loss_fn(net, x) if net is plain else wrapped.tower_loss(loss_fn, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
    assert losses[wrapped] == pytest.approx(losses[plain], rel=2e-2)


def test_a_pass_without_gradients_leaves_those_of_a_second_alone() -> None:
    class Twice(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                x = x + self.fc(x).sum()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.fc(x)

    wrapped = wrap(Twice(), 2)
    wrapped(torch.ones(4, 3)).float().sum().backward()
    assert wrapped.module.fc.weight.grad.count_nonzero() == wrapped.module.fc.weight.numel()


# ---- defaults, modes and variables


def test_the_default_device_goes_with_the_work() -> None:
    seen = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.empty(1).device.type)
            return x

    wrapped = wrap(Net(), 2)
    x = batch(4, requires_grad=True)
    with torch.device("meta"):
        wrapped(x).sum().backward()
    assert seen == ["meta", "meta"]
    assert_close(x.grad, torch.ones_like(x))


class CountFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[tuple[int | None, str]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append((current_tower(), getattr(function, "__name__", str(function))))
        return function(*args, **(kwargs or {}))


class CountDispatches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[tuple[int | None, str]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append((current_tower(), function._schema.name))
        return function(*args, **(kwargs or {}))


def test_function_modes_go_with_the_work() -> None:
    wrapped = wrap(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).double(), 2)
    with CountFunctions() as mode:
        wrapped(batch(4))
    for tower in (0, 1):
        assert {"linear", "relu"} <= {name for t, name in mode.names if t == tower}


def test_dispatch_modes_go_with_the_work_forward_and_backward() -> None:
    wrapped = wrap(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).double(), 2)
    with CountDispatches() as outer, CountDispatches() as inner:
        out = wrapped(batch(4))
    for mode in (outer, inner):
        for tower in (0, 1):
            assert "aten::relu" in {name for t, name in mode.names if t == tower}
    with CountDispatches() as mode:
        out.sum().backward()
    for tower in (0, 1):
        assert "aten::threshold_backward" in {name for t, name in mode.names if t == tower}


@pytest.mark.parametrize("kind", [CountFunctions, CountDispatches])
def test_a_mode_ends_in_towers_where_it_ends_for_the_caller(kind: Any) -> None:
    wrapped = wrap(mlp(), 2)
    with kind() as mode:
        wrapped(batch(4))
    assert {0, 1} <= {tower for tower, _ in mode.names}
    mode.names.clear()
    wrapped(batch(4))
    assert not mode.names


_variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def test_context_variables_go_with_the_work_each_tower_with_a_copy() -> None:
    seen: list[tuple[str, str]] = []

    def look(phase: str) -> None:
        seen.append((phase, _variable.get()))
        _variable.set(f"of tower {current_tower()}")

    wrapped = wrap(Watching(look).double(), 2)
    token = _variable.set("forward's")
    out = wrapped(batch(4, requires_grad=True))
    _variable.set("backward's")
    out.sum().backward()
    assert _variable.get() == "backward's"
    _variable.reset(token)
    assert seen == [("forward", "forward's")] * 2 + [("backward", "backward's")] * 2


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_the_default_dtype_holds_in_towers(num_towers: int) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(3)

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert wrap(Net(), num_towers)(torch.ones(8, 3, dtype=torch.float32)).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_the_profiler_sees_the_towers_operators() -> None:
    wrapped = wrap(mlp(), 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        wrapped(batch(4)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::cat" in names  # of the caller's thread; towers' threads are not of the profiler's making


def test_deterministic_algorithms_and_matmul_precision_hold_in_towers() -> None:
    seen = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()))
            return x

    before = torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    try:
        wrap(Net(), 2)(batch(4))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(before)
    assert seen == [(True, "medium")] * 2


def test_a_level_of_forward_mode_left_twice_in_a_tower_is_torchs_own_error() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with forward_ad.dual_level():
                pass
            with pytest.raises(RuntimeError, match="Dual level must be a positive number"):
                forward_ad.exit_dual_level()
            return x

    x = batch(4)
    assert torch.equal(wrap(Net(), 2)(x), x)


@pytest.mark.parametrize("times", [1, 2])
def test_a_tower_that_has_left_forward_mode_meets_the_others_again(times: int) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(times):
                for _ in range(2):
                    x = torch.func.jvp(lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1], (x,), (x,))[1]
                x = x + tower_sum(x.sum())
            return x

    assert wrap(Net(), 3, max_concurrency=3)(batch(6)).shape == (6, 3)

"""Contract 5 and "parallel for real": towers overlap in time, and the caller's thread-local state goes with them."""

from __future__ import annotations

import contextvars
import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import (
    EVERY_COUNT,
    SEVERAL,
    assert_close,
    assert_same_gradients,
    assert_trains_alike,
    batch,
    mlp,
    twins,
    wrap,
)
from torchtower import current_tower
from torchtower.workers import TowerPool

_PATIENCE_S = 20


class Meeting(nn.Module):
    """Its forward and its backward end only when every tower has come that far."""

    def __init__(self, num_towers: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.forwards, self.backwards = threading.Barrier(num_towers), threading.Barrier(num_towers)

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.wait(_PATIENCE_S)
        return _MeetInBackward.apply(self.fc(x), self.backwards)


class _MeetInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, barrier: threading.Barrier) -> Tensor:
        ctx.barrier = barrier
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.barrier.wait(_PATIENCE_S)
        return grad, None


@pytest.mark.parametrize("num_towers", SEVERAL)
@pytest.mark.parametrize("style", ["drop-in", "tower loss"])
def test_forwards_and_backwards_of_towers_overlap_in_time(num_towers: int, style: str) -> None:
    wrapped = wrap(Meeting(num_towers).double(), num_towers, max_concurrency=num_towers)
    x = batch(2 * num_towers)
    for _ in range(2):
        if style == "drop-in":
            wrapped(x).sum().backward()
        else:
            wrapped.tower_loss(lambda net, x: net(x).sum(), x).backward()


def test_double_backward_overlaps_in_time() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, barrier: threading.Barrier) -> Tensor:
            ctx.barrier = barrier
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            ctx.barrier.wait(_PATIENCE_S)
            return Twice.apply(grad, ctx.barrier), None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.barrier = nn.Linear(3, 2).double(), threading.Barrier(2)

        def forward(self, x: Tensor) -> Tensor:
            return Twice.apply(self.fc(x).tanh(), self.barrier)

    x = batch(4, requires_grad=True)
    (grad,) = torch.autograd.grad(wrap(Net(), 2, max_concurrency=2)(x).sum(), x, create_graph=True)
    grad.square().sum().backward()


class Crowd(nn.Module):
    """Counts how many towers are inside at once."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.state = _Count()

    def forward(self, x: Tensor) -> Tensor:
        with self.state.entered():
            return self.fc(x)


class _Count:
    def __init__(self) -> None:
        self.lock, self.inside, self.most, self.order = threading.Lock(), 0, 0, []

    @contextmanager
    def entered(self) -> Iterator[None]:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.order.append(current_tower())
        threading.Event().wait(0.005)
        yield
        with self.lock:
            self.inside -= 1


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_max_concurrency_bounds_how_many_towers_work_at_once(at_once: int) -> None:
    net = Crowd().double()
    wrap(net, 6, max_concurrency=at_once)(batch(12))
    assert net.state.most <= at_once
    assert sorted(net.state.order) == list(range(6))


def test_one_at_a_time_goes_in_tower_order() -> None:
    net = Crowd().double()
    wrap(net, 5, max_concurrency=1)(batch(12))
    assert net.state.order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("style", ["drop-in", "tower loss"])
def test_max_concurrency_changes_no_bit(style: str) -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 8))
    x = torch.randn(37, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for at_once in (1, 2, 4):
        wrapped = wrap(copy.deepcopy(net), 4, max_concurrency=at_once)
        torch.manual_seed(0)
        for _ in range(3):
            if style == "drop-in":
                wrapped(x).square().sum().backward()
            else:
                wrapped.tower_loss(lambda net, x: net(x).square().mean(), x).backward()
        found.append([p.grad for p in wrapped.parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_same_towers_give_the_same_bits_in_every_run() -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(37, 32, generator=torch.Generator().manual_seed(0))
    wrapped = wrap(net, 4, max_concurrency=4)
    found = []
    for _ in range(5):
        wrapped.zero_grad()
        wrapped(x).square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for run in found[1:] for a, b in zip(run, found[0], strict=True))


@pytest.mark.parametrize("bad", [0, -1])
def test_a_max_concurrency_below_one_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=f"max_concurrency of at least 1, but got {bad}"):
        wrap(mlp(), 2, max_concurrency=bad)(batch(4))


def test_intra_op_threads_are_shared_out_and_the_callers_stay() -> None:
    seen = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return x

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        wrapped = wrap(Net(), 2)
        wrapped(batch(4))
        assert seen == [2, 2] and torch.get_num_threads() == 4
        seen.clear()
        torch.set_num_threads(1)
        wrapped(batch(4))
        assert seen == [1, 1] and torch.get_num_threads() == 1
        fresh: list[int] = []
        thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert fresh == [1]
    finally:
        torch.set_num_threads(before)


def test_each_tower_keeps_its_own_thread_over_steps_forward_and_backward() -> None:
    seen: dict[str, set[tuple[int | None, int]]] = {"forward": set(), "backward": set()}

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen["forward"].add((current_tower(), threading.get_ident()))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen["backward"].add((current_tower(), threading.get_ident()))
            return grad

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return Note.apply(self.fc(x))

    wrapped = wrap(Net(), 3)
    for _ in range(3):
        wrapped(batch(6)).sum().backward()
    assert seen["forward"] == seen["backward"] and len(seen["forward"]) == 3
    assert threading.get_ident() not in {ident for _, ident in seen["forward"]}


def test_outside_of_towers_there_is_no_current_tower() -> None:
    assert current_tower() is None
    seen = []
    net = nn.Identity()
    net.register_forward_hook(lambda *_: seen.append(current_tower()))
    wrap(net, 3)(batch(6))
    assert sorted(seen) == [0, 1, 2] and current_tower() is None


# ---- thread-local state, forward and backward


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
    for net in (plain, wrapped):
        net(batch(5)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_a_first_call_without_grad_does_not_spoil_training() -> None:
    plain, wrapped = twins(mlp(), 2)
    with torch.no_grad():
        wrapped(batch(4))
    for net in (plain, wrapped):
        net(batch(5)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache", [True, False])
def test_autocast_goes_with_the_work_dtype_and_cache_flag_too(dtype: torch.dtype, cache: bool) -> None:
    seen = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

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


def test_a_forward_decorated_with_autocast_works() -> None:
    class Net(nn.Linear):
        @torch.autocast("cpu", dtype=torch.bfloat16)
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    assert wrap(Net(3, 2), 2)(torch.ones(4, 3)).dtype == torch.bfloat16


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


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_detection_goes_with_the_work() -> None:
    wrapped, seen = watch(torch.is_anomaly_enabled)
    with torch.autograd.detect_anomaly(check_nan=False):
        wrapped(batch(4))
    assert seen == [("forward", True)] * 2


def test_anomaly_detection_finds_the_nan_of_a_tower() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return (self.fc(x) * 0).sqrt() * 0

    wrapped = wrap(Net(), 2)
    with pytest.warns(UserWarning), torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="nan"):
        wrapped(batch(4)).sum().backward()


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


# ---- several threads, several wrappers


def test_the_wrapper_may_be_used_from_two_threads() -> None:
    plain, wrapped = twins(mlp(), 2)
    errors: list[BaseException] = []
    results: dict[int, list[Tensor]] = {}

    def use(which: int) -> None:
        try:
            for step in range(10):
                x = batch(5, seed=100 * which + step)
                grads = torch.autograd.grad(wrapped(x).square().sum(), list(wrapped.parameters()))
                results[100 * which + step] = list(grads)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and len(results) == 20
    for seed, grads in results.items():
        expected = torch.autograd.grad(plain(batch(5, seed=seed)).square().sum(), list(plain.parameters()))
        for got, want in zip(grads, expected, strict=True):
            assert_close(got, want)


def test_two_wrappers_may_be_used_from_two_threads() -> None:
    pairs = [twins(mlp(), 2), twins(mlp(), 3)]

    def use(wrapped: nn.Module) -> None:
        for step in range(5):
            wrapped(batch(7, seed=step)).square().sum().backward()

    threads = [threading.Thread(target=use, args=(wrapped,)) for _, wrapped in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for plain, wrapped in pairs:
        use(plain)
        assert_same_gradients(wrapped, plain)


def test_forward_in_one_thread_and_backward_in_another_work() -> None:
    plain, wrapped = twins(mlp(), 2)
    losses: list[Tensor] = []
    thread = threading.Thread(target=lambda: losses.append(wrapped(batch(5)).square().sum()))
    thread.start()
    thread.join()
    losses[0].backward()
    plain(batch(5)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_a_call_from_a_towers_own_forward_runs_in_that_tower() -> None:
    inner = wrap(nn.Linear(3, 2).double(), 2)
    assert_trains_alike(nn.Sequential(inner), 2, batch(5))


def test_a_forward_never_takes_the_gradients_of_another_threads_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            time.sleep(0.4)  # half of the gradients are there, half are not
            return grad

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Slow.apply(self.first(x)))

    plain, wrapped = twins(Net(), 2)
    plain(batch(4)).sum().backward()
    out = wrapped(batch(4)).sum()
    towers_done = threading.Event()
    run = TowerPool.run

    def run_and_wait(self: TowerPool, *args: Any, **options: Any) -> Any:
        results = run(self, *args, **options)
        if threading.current_thread() is forward:
            towers_done.set()
            time.sleep(0.2)  # a switch of threads right here, made certain
        return results

    monkeypatch.setattr(TowerPool, "run", run_and_wait)
    forward = threading.Thread(target=lambda: wrapped(batch(4)))
    forward.start()
    assert towers_done.wait(10)
    out.backward()
    forward.join()
    assert_same_gradients(wrapped, plain)

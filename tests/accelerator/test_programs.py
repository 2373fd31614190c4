"""What programs do with a wrapper beside training it, on devices."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
from tests.helpers import run_python
from torchtower import TowerParallel, average_gradients, convert_sync_batchnorm, stack_gradients


def test_the_means_of_one_tower_lie_on_its_first_gradients_device() -> None:
    grads = [torch.ones(3, device=device(0)), torch.ones(3, device=device(1)), torch.ones(2)]
    assert {mean.device for mean in average_gradients([grads])} == {device(0)}


def test_average_gradients_takes_towers_on_their_devices() -> None:
    grads = [torch.ones(3, device=device(0)), torch.full((3,), 4.0, device=device(1))]
    mean, nothing = average_gradients([[grads[0], None], [grads[1], None]], weights=[2, 1])
    assert mean.device == device(0)
    assert mean.tolist() == [2, 2, 2]
    assert nothing is None
    assert [grad.tolist() for grad in grads] == [[1, 1, 1], [4, 4, 4]]
    (stack,) = stack_gradients([[grads[0]], [grads[1]]])
    assert stack.device == device(0)
    assert stack.tolist() == [[1, 1, 1], [4, 4, 4]]


@every_layout
def test_batch_norm_over_all_towers_is_that_of_the_whole_batch(devices: list[int]) -> None:
    plain, wrapped = twins(nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2)), devices)
    wrapped = TowerParallel(convert_sync_batchnorm(wrapped.module), device_ids=devices)
    assert_go_backward_alike(plain, wrapped, rows(9))
    assert_same_state(wrapped, plain)


@every_layout
def test_a_layer_used_in_two_reentrant_checkpoints_gets_both_gradients(devices: list[int]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = checkpoint(self.inner, x, use_reentrant=True)  # type: ignore[assignment]
            return self.inner(x)

    plain, wrapped = twins(Net(), devices)
    assert_go_backward_alike(plain, wrapped, rows(7).requires_grad_())


def test_many_towers_share_two_devices() -> None:
    plain, wrapped = twins(mlp(), [0, 1] * 8)
    assert_go_backward_alike(plain, wrapped, rows(40))


@pytest.mark.parametrize("max_concurrency", [1, 2, 4])
def test_max_concurrency_changes_no_bit(max_concurrency: int) -> None:
    grads = []
    for concurrency in (max_concurrency, 4):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).to(device(0))
        wrapped = TowerParallel(net, device_ids=[0, 1, 0, 1], max_concurrency=concurrency)
        wrapped(rows(9).float()).square().sum().backward()
        grads.append([parameter.grad.cpu() for parameter in wrapped.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_wrapper_trains_on(copied: str) -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    wrapped(rows(4))
    if copied == "deepcopy":
        again = copy.deepcopy(wrapped)
    elif copied == "pickle":
        again = pickle.loads(pickle.dumps(wrapped))
    else:
        file = io.BytesIO()
        torch.save(wrapped, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert again.devices == wrapped.devices
    assert_go_backward_alike(plain, again, rows(6))
    assert all(parameter.grad is None for parameter in wrapped.parameters())


def test_a_state_dict_from_a_cpu_loads_and_is_used() -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    wrapped(rows(4))
    other = mlp().double()
    wrapped.load_state_dict({f"module.{name}": value for name, value in other.state_dict().items()})
    assert_same_values(wrapped(rows(8)), other(rows(8)))
    assert plain is not other


def test_parameters_replaced_and_modules_added_after_wrapping_take_part() -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    wrapped(rows(4)).sum().backward()
    wrapped.zero_grad()
    plain[0].weight = nn.Parameter(torch.ones(5, 3, dtype=torch.float64))
    plain.add_module("last", nn.Linear(2, 4).double())
    wrapped.module[0].weight = nn.Parameter(plain[0].weight.detach().to(device(0)))
    wrapped.module.add_module("last", copy.deepcopy(plain.last).to(device(0)))
    assert_go_backward_alike(plain, wrapped, rows(7))


def test_a_change_of_dtype_after_wrapping_reaches_every_device() -> None:
    _, wrapped = twins(mlp(), [0, 1])
    wrapped(rows(4))
    out = wrapped.to(torch.bfloat16)(rows(4).bfloat16())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert {parameter.grad.dtype for parameter in wrapped.parameters()} == {torch.bfloat16}


def test_no_grad_and_inference_mode_reach_the_towers() -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    with torch.no_grad():
        assert not wrapped(rows(5)).requires_grad
    with torch.inference_mode():
        assert wrapped(rows(5)).is_inference()
    assert_go_backward_alike(plain, wrapped, rows(5))


def test_a_grad_scaler_of_the_device_type_steps_and_skips() -> None:
    net = nn.Linear(3, 2).to(device(0))
    wrapped = TowerParallel(net, device_ids=[0, 1])
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    scaler = torch.amp.GradScaler("simulated", init_scale=8.0)
    before = net.weight.detach().clone()
    scaler.scale(wrapped(torch.full((4, 3), float("inf"))).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(net.weight, before)
    assert scaler.get_scale() == 4
    optimizer.zero_grad()
    scaler.scale(wrapped(torch.ones(4, 3)).sum()).backward()
    scaler.step(optimizer)
    assert torch.allclose(net.weight, before - 0.1 * 4)


def test_clipping_the_norm_of_gradients_is_the_plain_modules() -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    norms = []
    for model in (plain, wrapped):
        F.mse_loss(out := model(rows(6)), torch.ones_like(out)).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    assert_same_values(norms[1], norms[0])
    assert_same_gradients(wrapped, plain)


def test_a_closed_wrapper_starts_anew() -> None:
    plain, wrapped = twins(mlp(), [0, 1])
    wrapped(rows(4)).sum().backward()
    wrapped.close()
    wrapped.zero_grad()
    assert_go_backward_alike(plain, wrapped, rows(4))


@pytest.mark.parametrize("ending", ["", "del model, out", "sys.exit()", "1 / 0"])
def test_a_program_that_never_closes_its_wrapper_ends(ending: str) -> None:
    program = f"""
import sys, torch
from tests.accelerator import load
load()
from torchtower import TowerParallel
model = TowerParallel(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout()).to("simulated:0"))
out = model(torch.ones(8, 3))
out.sum().backward()
print("trained", file=sys.stderr, flush=True)
{ending}
"""
    done = run_python(program)
    assert done.returncode == (1 if "/" in ending else 0), done.stderr
    _, words = done.stderr.split("trained\n")  # loading may have warned of a compiler without its device
    assert "ZeroDivisionError" in words if "/" in ending else words == ""


_NOTING = """
import sys, threading, time, torch
from tests.accelerator import load
load()
from torchtower import TowerParallel
from torchtower.threads import workers
wait = workers.wait_for_engine
def note(device):
    wait(device)
    print("waited for", device, flush=True)
workers.wait_for_engine = note
"""


def test_a_program_ends_when_the_engine_is_through_with_its_backwards() -> None:
    """Else it may abort: the engine's threads let go of Python objects after a backward has returned."""
    program = """
TowerParallel(torch.nn.Linear(3, 2).to("simulated:0"))(torch.ones(8, 3)).sum().backward()
torch.set_grad_enabled(False)
"""
    done = run_python(_NOTING + program)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["waited for simulated:0", "waited for simulated:1"]


def test_a_program_ends_while_a_daemon_goes_backward_for_ever() -> None:
    program = """
class Stuck(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        stuck.set()
        while True:
            time.sleep(1)
stuck = threading.Event()
class Net(torch.nn.Linear):
    def forward(self, x):
        return Stuck.apply(super().forward(x))
model = TowerParallel(Net(3, 2).to("simulated:0"))
threading.Thread(target=lambda: model(torch.ones(8, 3)).sum().backward(), daemon=True).start()
stuck.wait()
print("stuck", flush=True)
"""
    assert run_python(_NOTING + program).stdout == "stuck\n"  # whatever becomes of the daemon


def test_as_many_devices_as_a_machine_has_work() -> None:
    program = """
import copy, os, torch
os.environ["TORCHTOWER_SIMULATED_DEVICES"] = "4"
from tests.accelerator import load
from torchtower import TowerParallel
load()
plain = torch.nn.Linear(3, 2).double()
model = TowerParallel(copy.deepcopy(plain).to("simulated:0"))
x = torch.randn(9, 3, dtype=torch.float64)
model(x).square().sum().backward()
plain(x).square().sum().backward()
print(len(model.devices), torch.allclose(model.module.weight.grad.cpu(), plain.weight.grad, rtol=1e-12))
"""
    done = run_python(program)
    assert done.stdout == "4 True\n", done.stderr


def test_a_compiled_module_may_have_as_many_graphs_on_each_device_as_on_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    plain, wrapped = twins(Net(), [0, 1])
    wrapped.module = torch.compile(wrapped.module, backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2):
        for count in (8, 8, 6, 10):
            assert_same_values(wrapped(rows(count)), plain(rows(count)))
    assert len(graphs) == 4

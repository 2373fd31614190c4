"""The simulated accelerator itself: that it is strict where CUDA is, and counts what it says it counts."""

from __future__ import annotations

import copy
import threading
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import in_threads
from tests.modules import Recurrent


def on(index: int, *shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device=f"simulated:{index}").reshape(shape)


def test_it_is_this_processes_accelerator() -> None:
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() == torch.device("simulated")
    assert torch.accelerator.device_count() == 2
    assert torch.get_device_module("simulated") is torch.simulated


@pytest.mark.parametrize(
    "operate",
    [lambda a, b: a + b, lambda a, b: a.mm(b), lambda a, b: a.mul_(b), lambda a, b: torch.cat([a, b])],
    ids=["add", "mm", "mul_", "cat"],
)
@pytest.mark.parametrize("other", ["simulated:1", "cpu"])
def test_tensors_of_two_devices_do_not_mix(operate: Callable[[Tensor, Tensor], Tensor], other: str) -> None:
    with pytest.raises(RuntimeError, match="two devices"):
        operate(on(0, 2, 2), on(0, 2, 2).to(other))


def test_numbers_and_indices_may_lie_on_the_cpu() -> None:
    x = on(1, 3, 2)
    assert (x + torch.tensor(2.0)).device == x.device
    assert x[torch.tensor([2, 0])].tolist() == [[4, 5], [0, 1]]


def test_a_view_shares_memory_and_an_in_place_operator_returns_its_argument() -> None:
    x = on(0, 2, 3)
    view = x.t()[1:]
    assert view.add_(10) is view
    assert x.tolist() == [[0, 11, 12], [3, 14, 15]]


def test_out_is_resized_and_filled() -> None:
    x, out = on(1, 2, 3), torch.empty(0, dtype=torch.float64, device="simulated:1")
    assert torch.mm(x, x.t(), out=out) is out
    assert torch.equal(out.cpu(), x.cpu() @ x.cpu().t())


def test_every_copy_is_counted_by_its_way(simulated: types.ModuleType) -> None:
    x = torch.ones(3, 4)
    a = x.to("simulated:0")
    b = a.to("simulated:1")
    b.cpu()
    b.copy_(a)
    assert simulated.copies() == {
        ("cpu", "simulated:0"): (1, 48),
        ("simulated:0", "simulated:1"): (2, 96),
        ("simulated:1", "cpu"): (1, 48),
    }
    simulated.reset_copies()
    assert simulated.copies() == {}


def test_a_copy_to_the_cpu_that_does_not_block_is_there_only_after_a_synchronisation() -> None:
    x = on(1, 3)
    early = x.to("cpu", non_blocking=True)
    assert early.isnan().all()
    torch.accelerator.synchronize()
    assert early.tolist() == [0, 1, 2]
    assert x.to("cpu").tolist() == [0, 1, 2]


def test_a_module_that_moves_here_keeps_its_parameters_and_their_ties() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    weight = b.weight = a.weight
    nn.Sequential(a, b).to("simulated:1")
    assert a.weight is weight and b.weight is weight
    assert weight.device == torch.device("simulated:1")


def test_memory_is_accounted_to_its_device(simulated: types.ModuleType) -> None:
    before = [simulated.memory_allocated(index) for index in range(2)]
    x = torch.empty(1000, dtype=torch.uint8, device="simulated:1")
    y = x + 1
    assert [simulated.memory_allocated(i) - before[i] for i in range(2)] == [0, 2000]
    del x, y
    assert [simulated.memory_allocated(i) for i in range(2)] == before


def test_the_current_device_is_a_threads_own() -> None:
    seen = []
    torch.accelerator.set_device_index(1)
    in_threads(lambda: seen.append(torch.empty(1, device="simulated").device.index))
    assert seen == [0]
    assert torch.empty(1, device="simulated").device.index == 1


def test_a_stream_is_current_where_it_was_entered_and_others_wait_for_its_events(simulated: types.ModuleType) -> None:
    stream, event = torch.Stream("simulated:1"), torch.Event("simulated:1")
    with stream:
        assert torch.accelerator.current_stream(1) == stream
        event.record()
    assert torch.accelerator.current_stream(1) != stream
    simulated.take_waits()
    torch.accelerator.current_stream(0).wait_event(event)
    assert simulated.take_waits() == [((0, 0), (1, stream.stream_id))]


def test_autograd_goes_backward_in_a_thread_of_the_device() -> None:
    threads = []
    x = on(1, 3).requires_grad_()
    y = x * 2
    y.register_hook(lambda grad: threads.append(threading.get_ident()))
    y.sum().backward()
    assert x.grad is not None and x.grad.device == x.device
    assert threads != [threading.get_ident()]


def test_each_device_has_a_generator_that_manual_seed_seeds(simulated: types.ModuleType) -> None:
    def draw(index: int) -> list[float]:
        return torch.rand(3, device=f"simulated:{index}").tolist()

    torch.manual_seed(3)
    first = [draw(0), draw(1)]
    state = simulated.default_generators[1].get_state()
    more = draw(1)
    torch.manual_seed(3)
    assert [draw(0), draw(1)] == first
    simulated.default_generators[1].set_state(state)
    assert draw(1) == more
    own = torch.Generator("simulated:1").manual_seed(3)
    assert torch.rand(3, generator=own, device="simulated:1").tolist() == first[1]


def test_fused_dropout_draws_from_its_devices_generator(simulated: types.ModuleType) -> None:
    x = torch.ones(64, device="simulated:1")
    cpu, other = torch.get_rng_state(), simulated.get_rng_state(0)
    first = F.dropout(x)
    assert torch.equal(cpu, torch.get_rng_state())
    assert torch.equal(other, simulated.get_rng_state(0))
    assert not torch.equal(first, F.dropout(x))
    torch.manual_seed(0)
    assert torch.equal(first, F.dropout(x))


def test_autocast_lowers_precision_where_other_devices_do() -> None:
    linear = nn.Linear(3, 2).to("simulated:0")
    x = torch.ones(4, 3, device="simulated:0")
    with torch.autocast("simulated", dtype=torch.bfloat16):
        out = linear(x)
        assert out.dtype == torch.bfloat16
        assert F.mse_loss(out, out).dtype == torch.float32
    assert linear(x).dtype == torch.float32


def test_sparse_tensors_keep_their_device() -> None:
    indices, values = torch.tensor([[1, 0, 1]], device="simulated:1"), on(1, 3, 2)
    sparse = torch.sparse_coo_tensor(indices, values, (3, 2), check_invariants=True)
    assert sparse.device == values.device
    assert sparse.coalesce().values().tolist() == [[2, 3], [4, 6]]
    assert sparse.to("simulated:0").to_dense().tolist() == [[2, 3], [4, 6], [0, 0]]
    assert sparse.cpu().to_dense().tolist() == [[2, 3], [4, 6], [0, 0]]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.MaxPool2d(2)), (4, 2, 8, 8)),
        (nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2), nn.GroupNorm(1, 3)), (4, 2, 5, 5)),
        (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (2, 5, 4)),
        (Recurrent(nn.LSTM, num_layers=2), (2, 5, 3)),
        (Recurrent(nn.GRU, num_layers=2), (2, 5, 3)),
    ],
    ids=["conv", "transposed", "transformer", "lstm", "gru"],
)
def test_modules_compute_what_they_compute_on_a_cpu(module: nn.Module, shape: tuple[int, ...]) -> None:
    ours = module.double()
    theirs = copy.deepcopy(ours).to("simulated:1")
    x = torch.randn(shape, dtype=torch.float64)
    expected, got = ours(x).square().sum(), theirs(x.to("simulated:1")).square().sum()
    expected.backward()
    got.backward()
    assert torch.allclose(got.cpu(), expected, rtol=1e-12)
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad.cpu(), b.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=["loop", "fused", "foreach"])
def test_optimizers_step_in_place(options: dict[str, bool]) -> None:
    x = nn.Parameter(on(1, 5))
    y = nn.Parameter(x.detach().cpu())
    for parameter in (x, y):
        parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW([parameter], 0.1, **options).step()
    assert torch.allclose(x.cpu(), y, rtol=1e-12)

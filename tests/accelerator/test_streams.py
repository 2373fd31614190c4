"""Work goes to the streams that the caller has made current, and who reads its results waits for it."""

from __future__ import annotations

import types
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.accelerator.towers import (
    assert_same_gradients,
    assert_same_values,
    device,
    every_layout,
    mlp,
    rows,
    seen_by_towers,
    twins,
)
from torchtower import TowerParallel
from torchtower.threads.streams import Streams


def test_towers_work_on_the_callers_streams_so_that_order_holds() -> None:
    mine = [torch.Stream(device(index)) for index in (0, 1)]
    with mine[1], mine[0]:
        seen = seen_by_towers(lambda: [torch.accelerator.current_stream(index) for index in (0, 1)])
    assert seen == [mine, mine]
    default = [torch.accelerator.current_stream(index) for index in (0, 1)]
    assert mine[0] not in default
    assert seen_by_towers(lambda: [torch.accelerator.current_stream(index) for index in (0, 1)]) == [default, default]


def test_towers_go_backward_on_the_streams_of_their_forward() -> None:
    seen: list[list[torch.Stream]] = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = x * 2
            out.register_hook(lambda grad: seen.append([torch.accelerator.current_stream(index) for index in (0, 1)]))
            return out

    mine = [torch.Stream(device(index)) for index in (0, 1)]
    with mine[1], mine[0]:
        out = TowerParallel(Look(), device_ids=[0, 1])(rows(4).requires_grad_())
    out.sum().backward()
    assert seen == [mine, mine]


@pytest.mark.parametrize("device_ids", [[0, 0], ["cpu", "cpu"]])
def test_a_batch_from_a_device_without_a_tower_is_fetched_on_the_callers_stream_there(device_ids: list[Any]) -> None:
    seen: list[torch.Stream] = []

    def look(*_: object) -> None:
        seen.append(torch.accelerator.current_stream(1))

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            look()
            out = x * 2
            out.register_hook(look)
            return out

    with torch.Stream(device(1)) as mine:
        out = TowerParallel(Look(), device_ids)(rows(4).to(device(1)).requires_grad_())
    out.sum().backward()
    assert seen == [mine] * 4


def streams_waited_for(simulated: types.ModuleType, devices: list[int], output_device: Any) -> set[tuple[Any, Any]]:
    """Who waits for whom in a backward in other streams than the forward's; these are called "mine" and "others"."""
    mine, others = [[torch.Stream(device(index)) for index in (0, 1)] for _ in range(2)]
    names = {(stream.device_index, stream.stream_id): ("mine", stream.device_index) for stream in mine}
    names |= {(stream.device_index, stream.stream_id): ("others", stream.device_index) for stream in others}
    _, wrapped = twins(mlp(), devices, output_device=output_device)
    with mine[1], mine[0]:
        loss = wrapped(rows(4)).sum()
    simulated.take_waits()
    with others[1], others[0]:
        loss.backward()
    return {(names.get(who), names.get(whom)) for who, whom in simulated.take_waits()}


@every_layout
def test_a_backward_whose_outputs_are_on_the_cpu_comes_between_what_its_callers_streams_hold(
    simulated: types.ModuleType, devices: list[int]
) -> None:
    """There the engine knows no stream of the node's, and takes the caller's."""
    waits = streams_waited_for(simulated, devices, "cpu")
    assert {(("mine", index), ("others", index)) for index in (0, 1)} <= waits
    main = ("others", devices[0])
    assert {(main, ("mine", index)) for index in (0, 1)} <= waits
    assert (("others", 1 - devices[0]), ("mine", 1 - devices[0])) in waits


@pytest.mark.parametrize("devices", [[0, 1], [1, 0], [0, 0]])
def test_the_stream_of_an_output_elsewhere_waits_for_those_that_gradients_come_from(
    simulated: types.ModuleType, devices: list[int]
) -> None:
    """The engine takes all that the towers' node returns for the work of the first output's stream."""
    output_device = 1 - devices[0]
    waits = streams_waited_for(simulated, devices, output_device)
    assert (("mine", output_device), ("mine", devices[0])) in waits


@pytest.mark.parametrize("devices", [[0, 0], [0, 1], [1, 0]])
def test_on_default_streams_a_backward_waits_for_nothing(simulated: types.ModuleType, devices: list[int]) -> None:
    _, wrapped = twins(mlp(), devices)
    loss = wrapped(rows(4)).sum()
    simulated.take_waits()
    loss.backward()
    assert simulated.take_waits() == []


def test_a_backward_leaves_the_streams_of_its_caller_as_they_are() -> None:
    wrapped = TowerParallel(mlp().double().to(device(0)), device_ids=[0, 1], output_device="cpu")
    forward, backward = ([torch.Stream(device(index)) for index in (0, 1)] for _ in range(2))
    with forward[1], forward[0]:
        out = wrapped(rows(4))
    with backward[1], backward[0]:
        out.sum().backward()
        assert [torch.accelerator.current_stream(index) for index in (0, 1)] == backward


def test_an_output_on_its_way_to_the_cpu_is_waited_for() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.T).to("cpu", non_blocking=True)

    x = torch.randn(512, 512)
    wrapped = TowerParallel(Net(), device_ids=[0, 1])
    expected = torch.cat([part @ part.T for part in x.chunk(2)])
    assert_same_values(wrapped(x), expected, rtol=1e-5)
    loss = wrapped.tower_loss(lambda net, x: (x @ x.T).sum().to("cpu", non_blocking=True), x)
    assert_same_values(loss, expected.sum() / 2, rtol=1e-4)


class Unwaitable:
    """A stream of a backend that leaves the waiting to PyTorch's interface, or whose device has failed."""

    def __init__(self, words: str) -> None:
        self.words, self.device = words, device(0)

    def synchronize(self) -> None:
        raise RuntimeError(self.words)


def test_streams_that_cannot_be_waited_for_are_not_and_errors_of_a_device_are_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams, waited_for = Streams([device(0)]), []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited_for.append)
    streams._streams = [Unwaitable("Backend doesn't support synchronizing streams.")]  # type: ignore[list-item]
    streams.synchronize()
    assert waited_for == [device(0)]
    other = Unwaitable("Backend doesn't support synchronizing all streams on device.")
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: other.synchronize())
    streams.synchronize()
    streams._streams = [Unwaitable("an illegal memory access was encountered")]  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        streams.synchronize()


def test_memory_of_gradients_that_no_sync_keeps_waits_for_the_stream_that_reduces_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted: list[tuple[torch.device, torch.Stream]] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: noted.append((self.device, stream)))
    plain, wrapped = twins(mlp(), [0, 1])
    streams = [[torch.Stream(device(index)) for index in (0, 1)] for _ in range(3)]
    for step, (first, second) in enumerate(streams):
        plain(rows(4)).sum().backward()
        with second, first, nullcontext() if step == 2 else wrapped.no_sync():
            assert not noted
            wrapped(rows(4)).sum().backward()
    last = {(device(index), stream) for index, stream in enumerate(streams[-1])}
    assert set(noted) == last and len(noted) == 2 * len(list(plain.parameters()))
    assert_same_gradients(wrapped, plain)

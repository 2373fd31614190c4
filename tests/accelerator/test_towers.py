"""What a tower finds on its device, and of the caller's state; and how its errors come out."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.accelerator.towers import (
    assert_go_backward_alike,
    assert_same_gradients,
    device,
    every_layout,
    mlp,
    rows,
    seen_by_towers,
    twins,
)
from tests.containers import Elsewhere
from tests.modules import OneLayer
from torchtower import TowerParallel, current_tower

# ---- devices


@every_layout
def test_a_towers_device_is_current_in_its_thread_forward_and_backward(devices: list[int]) -> None:
    seen: list[tuple[int | None, int]] = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            note = lambda *_: seen.append((current_tower(), torch.empty(0, device="simulated").device.index))  # noqa: E731
            note()
            out = x * 2
            out.register_hook(note)
            return out

    TowerParallel(Look(), device_ids=devices)(rows(4).requires_grad_()).sum().backward()
    assert sorted(seen) == sorted(2 * list(enumerate(devices)))  # type: ignore[arg-type]


def test_the_callers_current_device_stays() -> None:
    torch.accelerator.set_device_index(1)
    _, wrapped = twins(mlp(), [0, 1])
    wrapped(rows(4)).sum().backward()
    assert torch.accelerator.current_device_index() == 1


def test_replicas_and_shards_lie_on_their_towers_devices() -> None:
    def loss(net: nn.Module, x: Tensor, extra: dict[str, Any]) -> Tensor:
        places = {
            x.device,
            extra["mask"].device,
            *[p.device for p in net.parameters()],
            *[b.device for b in net.buffers()],
        }
        assert places == {device(current_tower() or 0)}
        return net(x).sum()

    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double().to(device(0))
    wrapped = TowerParallel(net, device_ids=[0, 1])
    wrapped.tower_loss(loss, rows(4), extra={"mask": rows(4)})


@pytest.mark.parametrize("place", ["cpu", "simulated:1"])
def test_a_module_on_the_wrong_device_is_refused_with_the_way_out(place: str) -> None:
    wrapped = TowerParallel(nn.Linear(3, 2).to(place), device_ids=[0, 1])
    with pytest.raises(ValueError, match=rf"simulated:0.*one of them on device: {place}.*module.to\('simulated:0'\)"):
        wrapped(torch.ones(4, 3))
    wrapped.module.to("simulated:0")
    assert wrapped(torch.ones(4, 3)).shape == (4, 2)


def test_a_module_that_moves_away_after_wrapping_is_refused_too() -> None:
    wrapped = TowerParallel(nn.Linear(3, 2).to("simulated:0"), device_ids=[0, 1])
    wrapped(torch.ones(4, 3))
    wrapped.to("cpu")
    with pytest.raises(ValueError, match="found one of them on device: cpu"):
        wrapped(torch.ones(4, 3))


@pytest.mark.parametrize("device_ids", [[2], [0, 2], ["simulated:5"], [-1], ["cuda:0"], [0, "cpu"]])
def test_device_ids_that_do_not_exist_or_mix_types_are_refused(device_ids: list[int | str]) -> None:
    with pytest.raises(ValueError, match="TowerParallel: expected"):
        TowerParallel(nn.Linear(3, 2).to("simulated:0"), device_ids=device_ids)


def test_numpys_integers_name_devices() -> None:
    wrapped = TowerParallel(nn.Linear(3, 2).to("simulated:0"), device_ids=np.arange(2))
    assert wrapped.device_ids == [0, 1] and wrapped.devices == (device(0), device(1))


def test_cpu_towers_work_beside_an_accelerator() -> None:
    wrapped = TowerParallel(nn.Linear(3, 2), device_ids=["cpu", "cpu"])
    out = wrapped(torch.ones(4, 3))
    out.sum().backward()
    assert out.device.type == "cpu"


def test_one_device_alone_takes_its_inputs_from_anywhere() -> None:
    wrapped = TowerParallel(nn.Linear(3, 2).to("simulated:1"), device_ids=[1])
    assert wrapped(torch.ones(4, 3)).device == device(1)


def test_one_device_alone_takes_a_losss_inputs_from_anywhere() -> None:
    wrapped = TowerParallel(nn.Linear(3, 2).to("simulated:1"), device_ids=[1])
    loss = wrapped.tower_loss(lambda net, x, *, y: (net(x) - y).square().mean(), torch.ones(4, 3), y=torch.ones(4, 2))
    loss.backward()
    assert loss.device == device(1) and wrapped.module.weight.grad is not None


@pytest.mark.parametrize("device_ids", [[0, 1], ["cpu", "cpu"]])
@pytest.mark.parametrize("named", ["simulated", "simulated:5", "cuda:0"])
def test_a_tensor_that_names_a_device_that_is_not_there_goes_along(named: str, device_ids: list[Any]) -> None:
    class Leave(nn.Module):
        def forward(self, x: Tensor, strange: Tensor) -> Tensor:
            return x

    wrapped = TowerParallel(Leave(), device_ids, output_device="cpu")
    assert torch.equal(wrapped(rows(4), Elsewhere(torch.ones(4, 3), named)), rows(4))


# ---- the caller's state


def test_autocast_of_the_device_type_reaches_every_tower_forward() -> None:
    wrapped = TowerParallel(nn.Linear(3, 2).to("simulated:0"), device_ids=[0, 1])
    with torch.autocast("simulated", dtype=torch.bfloat16):
        assert wrapped(torch.ones(4, 3)).dtype == torch.bfloat16
        seen = seen_by_towers(lambda: (torch.is_autocast_enabled("simulated"), torch.get_autocast_dtype("simulated")))
    assert seen == [(True, torch.bfloat16)] * 2
    assert wrapped(torch.ones(4, 3)).dtype == torch.float32


def test_autocast_gradients_equal_the_plain_modules() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).to("simulated:0")
    twin = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).to("simulated:0")
    twin.load_state_dict(net.state_dict())
    wrapped = TowerParallel(twin, device_ids=[0, 1])
    x = torch.randn(8, 4, device="simulated:0")
    for model in (net, wrapped):
        with torch.autocast("simulated", dtype=torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
    assert_same_gradients(wrapped, net, rtol=2**-6)  # each tower rounds to bfloat16


def test_a_default_device_that_names_the_main_device_names_the_towers_own() -> None:
    def look() -> tuple[str, str]:
        return str(torch.empty(0).device), str(torch.arange(2).device)

    for name in ("simulated:0", "simulated"):
        with torch.device(name):
            assert seen_by_towers(look) == [("simulated:0",) * 2, ("simulated:1",) * 2]
    with torch.device("cpu"):
        assert seen_by_towers(look) == [("cpu",) * 2] * 2


def test_a_default_device_that_is_not_the_main_one_is_the_same_in_every_tower() -> None:
    with torch.device("simulated:1"):
        assert seen_by_towers(lambda: str(torch.empty(0).device)) == ["simulated:1"] * 2


def test_a_module_that_makes_tensors_on_its_inputs_device_trains_alike() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + torch.arange(2.0, device=x.device) + torch.ones_like(x)[:, :2]

    plain, wrapped = twins(Net(), [0, 1])
    assert_go_backward_alike(plain, wrapped, rows(5))


# ---- errors


class Fails(nn.Module):
    def __init__(self, tower: int, where: str) -> None:
        super().__init__()
        self.inner, self.tower, self.where = nn.Linear(3, 2), tower, where
        self.armed = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        self._maybe_fail("forward")
        out.register_hook(lambda grad: self._maybe_fail("backward"))
        return out

    def _maybe_fail(self, where: str) -> None:
        if self.armed and where == self.where and current_tower() == self.tower:
            raise ArithmeticError("odd weather")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("devices", "tower"), [([0, 1], 1), ([1, 0], 1), ([0, 1, 0, 1], 3), ([0, 1], 0)])
def test_an_error_names_its_tower_and_device_and_the_next_call_works(
    devices: list[int], tower: int, where: str
) -> None:
    _, wrapped = twins(Fails(tower, where), devices)
    words = f"odd weather.*in tower {tower} on device simulated:{devices[tower]}"
    with pytest.raises(ArithmeticError, match=words):
        wrapped(rows(8)).sum().backward()
    wrapped.zero_grad()
    plain, again = twins(Fails(tower, where), devices)
    for model in (plain, again, wrapped):
        (model.module if isinstance(model, TowerParallel) else model).armed = False
    wrapped.module.load_state_dict(plain.state_dict())
    assert_go_backward_alike(plain, wrapped, rows(8))


def test_every_tower_has_finished_when_an_error_comes_out() -> None:
    slow_may_end, finished = threading.Event(), []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if current_tower() == 0:
                threading.Timer(0.2, slow_may_end.set).start()
                raise ArithmeticError("odd weather")
            slow_may_end.wait()
            finished.append(current_tower())
            return x

    with pytest.raises(ArithmeticError):
        TowerParallel(Net(), device_ids=[0, 1])(rows(4))
    assert finished == [1]


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Refuses whatever is written to it, also on its way through contexts."""

    message: str


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_frozen_error_comes_out_as_it_is(where: str) -> None:
    error = FrozenError("told to fail")

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x)
            out.register_hook(lambda grad: self.fail("backward"))
            self.fail("forward")
            return out

        def fail(self, here: str) -> None:
            if here == where:
                raise error

    wrapped = TowerParallel(Net().double().to(device(0)), device_ids=[0, 1])
    with pytest.raises(FrozenError) as caught:
        wrapped(rows(4)).sum().backward()
    assert caught.value is error


def test_mixing_devices_in_a_forward_is_the_towers_error() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + torch.ones(2, device=device(0), dtype=torch.float64)

    net = Net().double().to(device(0))
    with pytest.raises(RuntimeError, match=r"two devices.*in tower 1 on device simulated:1"):
        TowerParallel(net, device_ids=[0, 1])(rows(4))


@every_layout
def test_a_part_of_the_module_as_an_argument_is_the_towers_own(devices: list[int]) -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
            y: Tensor = self.fc(x) * layer(x)
            return y

    plain, wrapped = twins(Net(), devices)
    for net, inner in ((plain, plain), (wrapped, wrapped.module)):
        net(rows(9), inner.fc).square().sum().backward()
    assert_same_gradients(wrapped, plain)

"""Random numbers on devices: each tower's own, the main tower's as the plain module's, all from one seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.accelerator.towers import assert_same_values, device, every_layout, mlp, rows, twins
from torchtower import TowerParallel, current_tower

dropouts = pytest.mark.parametrize(
    "drop",
    [
        F.dropout,
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
        lambda x: x * (torch.rand_like(x) > 0.5),
        lambda x: x * (torch.rand(x.shape, device=x.device) > 0.5),
        lambda x: x * (torch.rand(x.shape) > 0.5).to(x.device),
        lambda x: F.alpha_dropout(x, training=True),
    ],
    ids=["dropout", "bernoulli", "rand_like", "rand", "rand on the cpu", "alpha"],
)


@pytest.fixture(params=["named", "unnamed", "late"], autouse=True)
def generators(request: pytest.FixtureRequest, simulated: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the device module gives its default generators.

    As torch.cuda does; not at all (torch.mps, torch_openreg); or as torch.cuda does to a program that has used CPU
    towers before: the device's initialisation gives the name its meaning.
    """
    if request.param == "unnamed":
        monkeypatch.delattr(simulated, "default_generators")
    elif request.param == "late":
        real = [torch.ops.simulated.default_generator(index) for index in range(simulated.device_count())]
        monkeypatch.setattr(simulated, "default_generators", ())
        TowerParallel(Drop(F.dropout), device_ids=["cpu", "cpu"])(torch.ones(2, 3))
        simulated.default_generators = tuple(real)
    return str(request.param)


class Drop(nn.Module):
    def __init__(self, drop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


@dropouts
@pytest.mark.parametrize("devices", [[0, 1], [1, 0], [0, 1, 0, 1], [0, 0]])
def test_towers_draw_different_masks_that_a_seed_reproduces(
    devices: list[int], drop: Callable[[Tensor], Tensor]
) -> None:
    wrapped = TowerParallel(Drop(drop), device_ids=devices)
    x = torch.ones(len(devices), 64)
    torch.manual_seed(7)
    first, second = wrapped(x), wrapped(x)
    torch.manual_seed(7)
    assert torch.equal(wrapped(x), first)
    assert torch.equal(wrapped(x), second)
    masks = {tuple(row) for row in [*first.tolist(), *second.tolist()]}
    assert len(masks) == 2 * len(devices)


def test_a_devices_default_generator_handed_to_an_operator_in_a_tower_is_that_towers(generators: str) -> None:
    if generators == "unnamed":
        pytest.skip("nothing tells which generator is the default one")

    def drop(x: Tensor) -> Tensor:
        generator = torch.ops.simulated.default_generator(x.device.index)
        return x * torch.bernoulli(torch.full_like(x, 0.5), generator=generator)

    wrapped = TowerParallel(Drop(drop), device_ids=[0, 1, 0, 1])
    torch.manual_seed(7)
    named = wrapped(torch.ones(4, 64))
    wrapped = TowerParallel(Drop(lambda x: x * torch.bernoulli(torch.full_like(x, 0.5))), device_ids=[0, 1, 0, 1])
    torch.manual_seed(7)
    assert torch.equal(wrapped(torch.ones(4, 64)), named)


@dropouts
def test_the_main_tower_draws_as_the_plain_module_would(drop: Callable[[Tensor], Tensor]) -> None:
    wrapped = TowerParallel(Drop(drop), device_ids=[0, 1])
    torch.manual_seed(7)
    whole = wrapped(torch.ones(2, 64))
    torch.manual_seed(7)
    assert torch.equal(whole[:1], drop(torch.ones(1, 64, device=device(0))))


def test_masks_depend_on_the_tower_and_not_on_how_towers_lie() -> None:
    outs = []
    for devices in ([0, 1, 0], [0, 0, 0], [0, 1, 1]):
        torch.manual_seed(7)
        outs.append(TowerParallel(Drop(F.dropout), device_ids=devices)(torch.ones(3, 64)).cpu())
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_forwards_draw_anew_even_where_only_other_towers_draw() -> None:
    wrapped = TowerParallel(Drop(lambda x: F.dropout(x) if current_tower() else x), device_ids=[0, 1])
    x = torch.ones(2, 64)
    assert not torch.equal(wrapped(x), wrapped(x))


def test_a_forward_that_draws_nothing_consumes_nothing() -> None:
    _, wrapped = twins(mlp(), [0, 1])
    before = [torch.simulated.get_rng_state(index) for index in (0, 1)]
    wrapped(rows(4)).sum().backward()
    assert all(torch.equal(before[index], torch.simulated.get_rng_state(index)) for index in (0, 1))


def test_other_towers_leave_their_devices_default_generator_alone() -> None:
    wrapped = TowerParallel(Drop(F.dropout), device_ids=[0, 1])
    before = torch.simulated.get_rng_state(1)
    wrapped(torch.ones(2, 8))
    assert torch.equal(before, torch.simulated.get_rng_state(1))


@every_layout
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_with_each_towers_own_mask(devices: list[int], use_reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            out = checkpoint(lambda x: F.dropout(x * self.scale), x, use_reentrant=use_reentrant)
            assert isinstance(out, Tensor)
            return out

    wrapped = TowerParallel(Net().to(device(devices[0])), device_ids=devices)
    out = wrapped(torch.ones(len(devices), 64, dtype=torch.float64).requires_grad_())
    out.sum().backward()
    assert_same_values(wrapped.module.scale.grad, out.sum(0))  # the same masks, or these differ

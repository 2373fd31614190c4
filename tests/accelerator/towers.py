"""What the tests of towers on simulated devices share: devices to lay towers on, and a plain twin on the CPU."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import assert_close
from torchtower import TowerParallel, current_tower

LAYOUTS = {"two": [0, 1], "twice": [0, 1, 0, 1], "turned": [1, 0]}
every_layout = pytest.mark.parametrize("devices", LAYOUTS.values(), ids=LAYOUTS.keys())
OUT = ("simulated:0", "simulated:1")


def device(index: int) -> torch.device:
    return torch.device("simulated", index)


def twins(module: nn.Module, devices: list[int], **options: Any) -> tuple[nn.Module, TowerParallel]:
    """The module in float64 on the CPU, and a copy of it on the devices."""
    plain = module.double()
    inner = copy.deepcopy(plain).to(device(devices[0]))
    return plain, TowerParallel(inner, device_ids=devices, **options)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def rows(count: int, columns: int = 3, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, dtype=torch.float64, generator=generator)


def assert_same_values(got: Any, expected: Any, rtol: float = 1e-12) -> None:
    """Of tensors on any devices, or None."""
    assert_close(None if got is None else got.cpu(), None if expected is None else expected.cpu(), rtol)


def assert_same_gradients(wrapped: TowerParallel, plain: nn.Module, rtol: float = 1e-12) -> None:
    main = wrapped.devices[0]
    ours, theirs = dict(wrapped.module.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.grad is None or parameter.grad.device == main, name
        assert_same_values(parameter.grad, theirs[name].grad, rtol)


def assert_go_backward_alike(plain: nn.Module, wrapped: TowerParallel, x: Tensor, rtol: float = 1e-12) -> None:
    """One forward and backward of both: same output and gradients, which add to those that are there."""
    expected, got = plain(x), wrapped(x)
    assert_same_values(got, expected, rtol)
    for out in (expected, got):
        out.square().sum().backward()
    assert_same_gradients(wrapped, plain, rtol)


def assert_same_state(wrapped: TowerParallel, plain: nn.Module) -> None:
    for name, value in plain.state_dict().items():
        assert_same_values(wrapped.module.state_dict()[name], value)


def seen_by_towers(look: Callable[[], Any], devices: list[int] | None = None) -> list[Any]:
    """What each of the towers sees in a forward, in tower order."""
    found: dict[int, Any] = {}

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tower = current_tower()
            assert tower is not None
            found[tower] = look()
            return x

    wrapped = TowerParallel(Look(), device_ids=devices or [0, 1])
    wrapped(rows(4))
    return [found[tower] for tower in sorted(found)]


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

"""What several test files share: towers on CPUs, twins of a module, comparisons in float64."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchtower import TowerParallel

ROOT = Path(__file__).parent.parent
EVERY_COUNT = (1, 2, 3, 4)
SEVERAL = (2, 3, 4)
STYLES = ("drop-in", "tower loss")


def wrap(module: nn.Module, num_towers: int, **options: Any) -> TowerParallel:
    return TowerParallel(module, device_ids=["cpu"] * num_towers, **options)


def twins(module: nn.Module, num_towers: int, **options: Any) -> tuple[nn.Module, TowerParallel]:
    """The module in float64, and a wrapped copy of it."""
    module = module.double()
    return module, wrap(copy.deepcopy(module), num_towers, **options)


def mlp(inputs: int = 3, outputs: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


class Stepwise(TowerParallel):
    """Makes its forward of nn.DataParallel's steps, as programs do that subclass it."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        shards, keywords = self.scatter(inputs, kwargs, self.device_ids)
        replicas = self.replicate(self.module, self.device_ids[: len(shards)])
        return self.gather(self.parallel_apply(replicas, shards, keywords), self.output_device)


def batch(rows: int, columns: int = 3, *, seed: int = 0, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    return values.requires_grad_(requires_grad)


def assert_close(got: Any, expected: Any, rtol: float = 1e-12) -> None:
    """Relative to the largest element: what rounding in another order may cost."""
    if expected is None or got is None:
        assert got is expected
        return
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    got, expected = (t.detach().to_dense() if t.layout != torch.strided else t.detach() for t in (got, expected))
    if not expected.numel():
        return
    scale = expected.abs().max().clamp_min(1e-300)
    error = ((got - expected).abs().max() / scale).item()
    assert error < rtol, f"relative error {error:.2e}"


def assert_same_gradients(wrapped: nn.Module, plain: nn.Module, rtol: float = 1e-12) -> None:
    inner = wrapped.module if isinstance(wrapped, nn.DataParallel) else wrapped
    expected = dict(plain.named_parameters())
    got = dict(inner.named_parameters())
    assert got.keys() == expected.keys()
    for name, parameter in expected.items():
        grad = got[name].grad
        assert (grad is None) == (parameter.grad is None), f"{name}: {grad} against {parameter.grad}"
        assert_close(grad, parameter.grad, rtol)


def assert_same_parameters(wrapped: nn.Module, plain: nn.Module, rtol: float = 1e-12) -> None:
    inner = wrapped.module if isinstance(wrapped, nn.DataParallel) else wrapped
    for ours, theirs in zip(inner.parameters(), plain.parameters(), strict=True):
        assert_close(ours, theirs, rtol)


def sum_of_squares(out: Tensor) -> Tensor:
    return out.square().sum()


def mean_of_squares(out: Tensor) -> Tensor:
    return out.square().mean()


def loss_in(style: str, net: Any, loss_fn: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``loss_fn(net, *inputs)``, a mean over rows, in one of `STYLES`: where towers are to take it, each its own."""
    takes_each = style == "tower loss" and isinstance(net, TowerParallel)
    return net.tower_loss(loss_fn, *inputs) if takes_each else loss_fn(net, *inputs)


def mean_of_squares_by(net: nn.Module, x: Tensor) -> Tensor:
    return mean_of_squares(net(x))


def assert_go_backward_alike(
    plain: nn.Module,
    wrapped: nn.Module,
    *inputs: Any,
    loss: Callable[[Any], Tensor] = sum_of_squares,
    rtol: float = 1e-12,
) -> None:
    """One forward and backward of both: same output, loss and gradients, which add to those that are there."""
    found = []
    for net in (plain, wrapped):
        own = [_leaf(value) for value in inputs]
        out = net(*own)
        value = loss(out)
        value.backward()
        found.append([*([out] if isinstance(out, Tensor) else []), value, *map(_grad_of, own)])
    for got, expected in zip(found[1], found[0], strict=True):
        assert_close(got, expected, rtol)
    assert_same_gradients(wrapped, plain, rtol)


def both_go_backward(plain: nn.Module, wrapped: nn.Module, rows: int = 7) -> None:
    """Afterwards the two have the same outputs and the same gradients."""
    for net in (plain, wrapped):
        net.zero_grad()
    assert_go_backward_alike(plain, wrapped, batch(rows, seed=rows))


def _leaf(value: Any) -> Any:
    """A copy of its own for each module, of a tensor that is to have a gradient."""
    wants_grad = isinstance(value, Tensor) and value.requires_grad
    return value.detach().clone().requires_grad_() if wants_grad else value


def _grad_of(value: Any) -> Tensor | None:
    return value.grad if isinstance(value, Tensor) else None


def assert_trains_alike(
    module: nn.Module, num_towers: int, *inputs: Any, **options: Any
) -> tuple[nn.Module, TowerParallel]:
    """The module and its wrapped twin go forward and backward alike; see `assert_go_backward_alike`."""
    plain, wrapped = twins(module, num_towers)
    assert_go_backward_alike(plain, wrapped, *inputs, **options)
    return plain, wrapped


def in_threads(*calls: Callable[[], Any], timeout_s: float = 60) -> None:
    """Each call in a thread of its own; a hang is a failure."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    assert not any(thread.is_alive() for thread in threads)


def run_python(program: str, timeout_s: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in an interpreter of its own; a hang is a failure."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def take_steps(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    make: Callable[[int], Tensor],
    steps: int = 3,
    loss: Callable[[Tensor], Tensor] = mean_of_squares,
) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss(net(make(step))).backward()
        optimizer.step()


def steps_follow(plain: nn.Module, wrapped: nn.Module, make: Callable[[int], Tensor], steps: int = 3) -> None:
    """Both take the same few optimizer steps, and stay together."""
    for net in (plain, wrapped):
        take_steps(net, torch.optim.SGD(net.parameters(), lr=0.1), make, steps)
    assert_same_gradients(wrapped, plain)
    assert_same_parameters(wrapped, plain)

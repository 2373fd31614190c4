"""Time what the wrapper itself costs: a step of TowerParallel beside the same half-batches in two bare threads.

    python benchmarks/own_cost.py                   # 5, 16 and 50 linear layers of width 8
    python benchmarks/own_cost.py --layers 5

The layers do next to nothing, so that what a step takes beyond the bare threads' is the wrapper's own. These have a
module each, meet once after the forward and once after the backward, and reduce nothing. All take turns in one process;
of some thousand steps each the 10th percentile and the median are printed, in microseconds: machines are noisy, and the
10th percentile is what a quiet moment gives. The goal is 200 µs, 3 more for each submodule and 6 for each parameter.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtower import TowerParallel

TOWERS, ROWS, WIDTH = 2, 8, 8
Step = Callable[[], None]


class BareThreads:
    """Each thread trains a module of its own on its rows: forward, a meeting, backward, a meeting."""

    def __init__(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self._inboxes: list[SimpleQueue[str]] = [SimpleQueue() for _ in range(TOWERS)]
        self._done: SimpleQueue[None] = SimpleQueue()
        shards = zip(inputs.chunk(TOWERS), targets.chunk(TOWERS), strict=True)
        for inbox, shard in zip(self._inboxes, shards, strict=True):
            threading.Thread(target=self._work, args=(inbox, copy.deepcopy(net), *shard), daemon=True).start()

    def _work(self, inbox: SimpleQueue[str], net: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        torch.autograd.set_multithreading_enabled(False)
        while True:
            if inbox.get() == "forward":
                net.zero_grad()
                loss = F.mse_loss(net(inputs), targets)
            else:
                loss.backward()
            self._done.put(None)

    def step(self) -> None:
        """One step of all threads."""
        for what in ("forward", "backward"):
            for inbox in self._inboxes:
                inbox.put(what)
            for _ in self._inboxes:
                self._done.get()


def loss_fn(replica: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(replica(inputs), targets)


def steps_of(num_layers: int) -> dict[str, Step]:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(num_layers)])
    inputs, targets = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    model = TowerParallel(net, ["cpu"] * TOWERS)

    def drop_in() -> None:
        net.zero_grad()
        F.mse_loss(model(inputs), targets).backward()

    def tower_loss() -> None:
        net.zero_grad()
        model.tower_loss(loss_fn, inputs, targets).backward()

    return {"bare threads": BareThreads(net, inputs, targets).step, "drop-in": drop_in, "tower_loss": tower_loss}


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Microseconds of every step, after some to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 3):
        for name, step in steps.items():
            for _ in range(100):
                begin = time.perf_counter()
                step()
                if round_ >= 3:
                    times[name].append((time.perf_counter() - begin) * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[5, 16, 50])
    parser.add_argument("--rounds", type=int, default=20, help="of 100 steps each")
    options = parser.parse_args()
    print(f"{'layers':>6}  {'':12} {'10th %':>8} {'median':>8}   {'own: 10th %':>11} {'median':>8} {'goal':>6}")
    for num_layers in options.layers:
        goal = 200 + 3 * (num_layers + 1) + 6 * 2 * num_layers
        figures = {
            name: (statistics.quantiles(times, n=10)[0], statistics.median(times))
            for name, times in measure(steps_of(num_layers), options.rounds).items()
        }
        bare_fast, bare_median = figures["bare threads"]
        for name, (fast, median) in figures.items():
            own = "" if name == "bare threads" else f"{fast - bare_fast:11.0f} {median - bare_median:8.0f} {goal:6}"
            print(f"{num_layers:6}  {name:12} {fast:8.0f} {median:8.0f}   {own}", flush=True)


if __name__ == "__main__":
    main()

"""Time one training step: the plain module on all cores, TowerParallel's two call styles, and DistributedDataParallel.

    python benchmarks/step.py                     # all models, a table and step.json
    python benchmarks/step.py --models mlp deep   # some of them

Every figure comes from a fresh process, so that peak memory is the rival's own; the rivals take turns in rounds, and
medians over rounds are printed, since machines are noisy. DistributedDataParallel runs as two processes with gloo under
torchrun, each with its share of the cores and of the batch. A step is zero_grad, forward, loss, backward and the
optimizer's step. "drop-in, 1 thread" takes the loss and the optimizer's step on one thread, so that no idle OpenMP
thread spins on a core that a tower wants.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOWERS = 2
RIVALS = ("plain", "plain, 1 thread", "towers, drop-in", "drop-in, 1 thread", "towers, tower_loss", "ddp")
Step = Callable[[], Tensor]


def cifar10() -> tuple[nn.Module, Tensor, Tensor]:
    from torchtower.training.models import build_model

    net = build_model("cifar10", channels=3, size=24, num_classes=10, dropout=0.0).to(memory_format=torch.channels_last)
    images = torch.randn(128, 3, 24, 24).contiguous(memory_format=torch.channels_last)
    return net, images, torch.randint(0, 10, (128,))


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    layers = [layer for _ in range(4) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(64, 1024), torch.randint(0, 1024, (64,))


def deep() -> tuple[nn.Module, Tensor, Tensor]:
    layers = [layer for _ in range(16) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(32, 64), torch.randint(0, 64, (32,))


class SmallTransformer(nn.Module):
    """Four encoder layers of width 128 over 64 tokens, and a classifier over their mean."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        """Class scores of a batch of token embeddings."""
        scores: Tensor = self.head(self.encoder(tokens).mean(1))
        return scores


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    return SmallTransformer(), torch.randn(32, 64, 128), torch.randint(0, 100, (32,))


MODELS = {"cifar10": cifar10, "mlp": mlp, "deep": deep, "transformer": transformer}


def tower_step(replica: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(replica(inputs), labels)


def step_of(rival: str, model: str) -> Step:
    torch.manual_seed(0)
    net, inputs, labels = MODELS[model]()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    run: nn.Module = net
    if rival == "ddp":
        rank = torch.distributed.get_rank()
        inputs, labels = inputs.chunk(TOWERS)[rank], labels.chunk(TOWERS)[rank]
        run = nn.parallel.DistributedDataParallel(net)
    elif rival.startswith(("towers", "drop-in")):
        from torchtower import TowerParallel

        run = TowerParallel(net, ["cpu"] * TOWERS)

    def step() -> Tensor:
        optimizer.zero_grad()
        if rival == "towers, tower_loss":
            loss: Tensor = run.tower_loss(tower_step, inputs, labels)
        else:
            loss = F.cross_entropy(run(inputs), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def measure(rival: str, model: str, seconds: float) -> dict[str, float]:
    """In a fresh process: the median step, and this process's peak memory."""
    if rival.endswith("1 thread"):  # of the process's own; towers have one each all the same
        torch.set_num_threads(1)
    if rival == "ddp":
        torch.distributed.init_process_group("gloo")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // TOWERS))
    step = step_of(rival, model)
    for _ in range(5):
        step()
    # The same number of steps in every process: ranks must agree.
    begin = time.perf_counter()
    for _ in range(5):
        step()
    steps = max(10, int(seconds / max(1e-4, (time.perf_counter() - begin) / 5)))
    if rival == "ddp":
        agreed = torch.tensor(steps)
        torch.distributed.broadcast(agreed, 0)
        steps = int(agreed)
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if rival == "ddp":
        total = torch.tensor(peak)
        torch.distributed.all_reduce(total)
        peak = float(total)
        torch.distributed.destroy_process_group()
    return {"step_ms": statistics.median(times) * 1e3, "peak_mib": peak}


def run_process(rival: str, model: str, seconds: float) -> dict[str, float]:
    """Start `measure` in a process of its own (two under torchrun) and read what it prints."""
    launcher = [sys.executable]
    if rival == "ddp":
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={TOWERS}"]
    command = [*launcher, __file__, "--measure", rival, "--models", model, "--seconds", str(seconds)]
    for attempt in range(1, 4):  # a rank that aborts while it ends takes the other one with it, now and then
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if lines:
            figures: dict[str, float] = json.loads(lines[0])
            return figures
        print(f"{rival} on {model}: attempt {attempt} ended with {done.returncode} and no figures", file=sys.stderr)
    sys.exit(f"step.py: {rival} on {model} failed:\n{done.stderr[-3000:]}")


def report(model: str, rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    medians = {
        rival: {name: statistics.median(one[name] for one in results) for name in ("step_ms", "peak_mib")}
        for rival, results in rounds.items()
    }
    plain, ddp = medians["plain"]["step_ms"], medians["ddp"]["step_ms"]
    print(f"\n{model}\n  {'':20} {'step ms':>9} {'of plain':>9} {'ddp / it':>9} {'peak MiB':>9}")
    for rival, figures in medians.items():
        step_ms = figures["step_ms"]
        print(
            f"  {rival:20} {step_ms:9.2f} {step_ms / plain:9.2f} {ddp / step_ms:9.2f} {figures['peak_mib']:9.0f}",
            flush=True,
        )
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of steps in each process")
    parser.add_argument("--json", type=Path, default=Path("step.json"))
    parser.add_argument("--measure", choices=RIVALS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        figures = measure(options.measure, options.models[0], options.seconds)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(figures))
        return
    results = {}
    for model in options.models:
        rounds: dict[str, list[dict[str, float]]] = {rival: [] for rival in RIVALS}
        for _ in range(options.rounds):
            for rival in RIVALS:
                rounds[rival].append(run_process(rival, model, options.seconds))
        results[model] = report(model, rounds)
    options.json.write_text(json.dumps(results, indent=2))
    print(f"\nwritten to {options.json}")


if __name__ == "__main__":
    main()

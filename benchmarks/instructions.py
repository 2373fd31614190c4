"""Count the instructions of a step, which no neighbour on the machine disturbs: what own_cost.py times, counted.

    python benchmarks/instructions.py               # 5 and 16 linear layers of width 8
    python benchmarks/instructions.py --layers 50

Needs valgrind with its headers, and a C compiler. Each figure is the mean of 50 steps after 15 to warm up, in a process
of its own under callgrind, and comes out the same to one in a thousand. What a step of the wrapper takes beyond the
plain module's of both halves is the wrapper's own. Thousands of instructions, not microseconds: code that runs once a
step waits for memory, and takes several times as long for each as a loop.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtower import TowerParallel

STEPS, WARM_UP = 50, 15
TOWERS, ROWS, WIDTH = 2, 8, 8
STYLES = ("plain half", "drop-in", "tower_loss")

COUNTING = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(void) { CALLGRIND_DUMP_STATS; CALLGRIND_STOP_INSTRUMENTATION; }
"""


def loss_fn(replica: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(replica(inputs), targets)


def take_steps(style: str, num_layers: int, library: str) -> None:
    """Under callgrind: some steps, of which the last ones are counted."""
    net = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(num_layers)])
    inputs, targets = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    if style == "plain half":
        torch.set_num_threads(1)
        inputs, targets = inputs[: ROWS // TOWERS], targets[: ROWS // TOWERS]
    model: Any = net if style == "plain half" else TowerParallel(net, ["cpu"] * TOWERS)

    def step() -> None:
        net.zero_grad()
        loss = model.tower_loss(loss_fn, inputs, targets) if style == "tower_loss" else loss_fn(model, inputs, targets)
        loss.backward()

    for _ in range(WARM_UP):
        step()
    counting = ctypes.PyDLL(library)
    gc.collect()
    gc.disable()
    counting.begin()
    for _ in range(STEPS):
        step()
    counting.end()


def count(style: str, num_layers: int, folder: Path) -> float:
    """Thousands of instructions a step."""
    out = folder / f"{style}-{num_layers}"
    callgrind = ["valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
    child = [sys.executable, __file__, "--layers", str(num_layers), "--take", style, str(folder / "counting.so")]
    subprocess.run([*callgrind, *child], env={**os.environ, "PYTHONHASHSEED": "0"}, check=True)
    totals = re.search(r"^totals: (\d+)", Path(f"{out}.1").read_text(), re.MULTILINE)
    assert totals is not None
    return int(totals[1]) / STEPS / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[5, 16])
    parser.add_argument("--take", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.take:
        style, library = options.take
        return take_steps(style, options.layers[0], library)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "counting.c").write_text(COUNTING)
        compiler = ["cc", "-O1", "-shared", "-fPIC", "-o", str(folder / "counting.so"), str(folder / "counting.c")]
        subprocess.run(compiler, check=True)
        print("thousands of instructions a step")
        print(f"{'layers':>6}  {'':10} {'step':>8} {'own':>8}")
        for num_layers in options.layers:
            counts = {style: count(style, num_layers, folder) for style in STYLES}
            for style, instructions in counts.items():
                own = "" if style == "plain half" else f"{instructions - TOWERS * counts['plain half']:8.0f}"
                print(f"{num_layers:6}  {style:10} {instructions:8.0f} {own}", flush=True)


if __name__ == "__main__":
    main()

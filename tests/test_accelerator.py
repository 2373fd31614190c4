"""Contract 8: what holds on CPUs and CUDA holds on any device PyTorch knows.

A backend, once registered, is its process's accelerator for good. So the tests of tests/accelerator run in processes of
their own, one for each file; ``pytest tests/accelerator/test_copies.py`` runs one of them by hand.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.accelerator import build
from tests.helpers import ROOT, run_python

FILES = sorted((ROOT / "tests" / "accelerator").glob("test_*.py"))
# A deadlock is the failure to expect here: first one test's patience, then the whole file's.
_TEST_TIMEOUT_S = 60
_FILE_TIMEOUT_S = 300


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_the_simulated_accelerator(file: Path) -> None:
    options = [f"faulthandler_timeout={_TEST_TIMEOUT_S}", "faulthandler_exit_on_timeout=true"]
    command = [sys.executable, "-m", "pytest", "-q", str(file), *[word for o in options for word in ("-o", o)]]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_FILE_TIMEOUT_S
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}", pytrace=False)


TRAINING = """
import copy
import torch
from torch import nn
from tests.python_device import moved, register
from torchtower import TowerParallel

library = register()
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).double()
x, y = torch.randn(7, 3).double(), torch.randn(7, 2).double()
loss_fn = lambda net, x, y: nn.functional.mse_loss(net(x), y)
for devices in ([0, 0], [0, 1], [0, 1, 1]):
    for style in ("drop-in", "tower_loss"):
        plain, inner = copy.deepcopy(net), moved(copy.deepcopy(net))
        towers = TowerParallel(inner, devices)
        for model, a, b in ((plain, x, y), (towers, x.to("wrapping:0"), y.to("wrapping:0"))):
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            for _ in range(5):
                optimizer.zero_grad()
                in_towers = model is towers and style == "tower_loss"
                (model.tower_loss(loss_fn, a, b) if in_towers else loss_fn(model, a, b)).backward()
                optimizer.step()
        for ours, theirs in zip(inner.parameters(), plain.parameters()):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-12, atol=1e-12)
"""


def test_a_device_made_in_python_whose_tensors_have_no_memory_trains() -> None:
    done = run_python(TRAINING, _TEST_TIMEOUT_S)
    assert done.returncode == 0, done.stderr

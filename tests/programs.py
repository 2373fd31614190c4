"""Programs in a process of their own, for what ends one: signals, exits, forks."""

from __future__ import annotations

from tests.helpers import run_python

HEAD = """
import os, signal, sys, threading, time, torch
from torch import nn
from torchtower import TowerParallel, current_tower

class Slow(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.fc, self.seconds = nn.Linear(3, 2), seconds
    def forward(self, x):
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(0.01)
        return self.fc(x)

def towers(net, n=2, **options):
    return TowerParallel(net, ["cpu"] * n, **options)

def interrupt_after(*delays_s):
    def send():
        for delay_s in delays_s:
            time.sleep(delay_s)
            os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=send, daemon=True).start()

def expect_interrupt(call):
    try:
        call()
    except KeyboardInterrupt:
        return
    sys.exit("no interrupt")
"""


def passes(program: str, timeout_s: float = 60) -> None:
    done = run_python(HEAD + program, timeout_s)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "Fatal" not in done.stderr and "Traceback" not in done.stderr, done.stderr

"""What torch's autograd engine keeps for a thread or a device beyond a backward, and how to have it let go."""

from __future__ import annotations

import threading
from typing import Any

import torch

_local = threading.local()
_engine: Any = torch.autograd.Variable._execution_engine


def make_last_node() -> None:
    """In a thread that has made no graph yet, make the node that `empty_queue` goes to."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros((), requires_grad=True)
        _local.last = leaf.clone(), leaf


def empty_queue() -> None:
    """Drop what a failed backward has left in the queue that the engine keeps for this thread.

    It would hold a graph's memory until the next backward, and a thread that ends lets go of it when Python is through
    with the thread: a process that is just ending would abort.
    """
    # The engine goes from the newest nodes to the oldest, and throws away whatever it meets of backwards that failed.
    last, leaf = _local.last
    torch.autograd.grad(last, leaf, retain_graph=True)


def wait_for_engine(device: torch.device) -> None:
    """Wait until the engine's thread for a device is through with every backward that has returned.

    It lets go of each after the caller has gone on, and with it of a Python object that `torch.autograd` keeps there: a
    thread that needs the interpreter for that while it is taken down makes the process abort.
    """
    with torch.inference_mode(False), torch.enable_grad():
        end = torch.zeros((), device=device, requires_grad=True).clone()
    # The engine's own call, for which no such object is kept.
    _engine.run_backward(
        (end,), (torch.ones_like(end),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )

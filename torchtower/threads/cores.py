"""The machine's cores: how many there are, and OpenMP teams that spin on them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable


def available_cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def send_team_home(last_round_s: float) -> None:
    """End this thread's OpenMP team, which would spin on a core that a tower wants; the next region makes it anew.

    Args:
        last_round_s: how long the towers have worked, and may be expected to: for a short while it does not pay.
    """
    if _pause is not None and last_round_s > _LONG_ROUND_S:
        _pause(_PAUSE_SOFT)


def _openmp_pause() -> Callable[[int], int] | None:
    # torch loads its OpenMP library into the global scope; where it has none, or an old one, there is nothing to do.
    try:
        pause: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    except (OSError, TypeError):  # Windows knows no global scope
        pause = None
    return pause


_pause = _openmp_pause()
_PAUSE_SOFT = 1  # omp_pause_soft, OpenMP 5.0
# An idle team of GNU OpenMP spins for some 5 ms; making one anew may take as long. Measured with benchmarks/step.py: it
# pays where towers work for longer than that (4 x 1024 MLP, CIFAR-10 network), and hurts tiny networks.
_LONG_ROUND_S = 0.003


def _never_pause() -> None:
    # In a forked child it would wait for the team that the forking thread had, whose other threads do not exist here.
    global _pause
    _pause = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_never_pause)

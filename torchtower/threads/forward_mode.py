"""Forward-mode derivatives within towers: one tower at a time.

torch counts the levels of forward-mode differentiation (`torch.autograd.forward_ad.dual_level`, and `torch.func.jvp`,
`jacfwd` and `hessian` upon it) for the whole process, not for each thread: towers that entered at once would take each
other's level for their own. So a tower that enters waits until no other is within one.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from torchtower.threads.locks import is_held_here
from torchtower.threads.rounds import current_tower

_turn = threading.RLock()  # held once for each level that a tower is in


def has_turn() -> bool:
    """Whether this thread is a tower's in forward mode, for which others may be waiting."""
    return is_held_here(_turn)


def give_back_turn() -> None:
    """At the end of a tower's job, whatever broke into it: nobody else can release what its thread holds."""
    while has_turn():
        _turn.release()


def leave_levels() -> None:
    """Once all towers are done, leave the levels that one which was broken into is still in, for the whole process."""
    while forward_ad._current_level >= 0:
        forward_ad.exit_dual_level()


@functools.cache
def take_turns_in_forward_mode() -> None:
    """Have it so in this process, from now on; threads that are no towers enter as ever."""
    modules: tuple[Any, Any] = (forward_ad, eager_transforms)
    for module, name in zip(modules, ("dual_level", "jvp_nesting"), strict=True):
        for step, wrapped in (("enter", _entering), ("exit", _exiting)):
            setattr(module, f"{step}_{name}", wrapped(getattr(module, f"{step}_{name}")))


def _entering(enter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(enter)
    def enter_in_turn(*args: Any, **kwargs: Any) -> Any:
        if not _is_in_tower():
            return enter(*args, **kwargs)
        _turn.acquire()
        try:
            return enter(*args, **kwargs)
        except BaseException:
            _turn.release()
            raise

    return enter_in_turn


def _exiting(exit_: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(exit_)
    def exit_in_turn(*args: Any, **kwargs: Any) -> Any:
        try:
            return exit_(*args, **kwargs)
        finally:
            if _is_in_tower() and has_turn():
                _turn.release()

    return exit_in_turn


def _is_in_tower() -> bool:
    # A compiler that traces this has a thread of its own making, and knows these functions for torch's.
    return not torch.compiler.is_compiling() and current_tower() is not None


def _renew_turn() -> None:
    # In a forked child: the tower that had it does not exist here.
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_turn)

"""Whether replicas on other devices may have fallen behind the user's parameters.

No counter of a tensor tells: fused optimizers and writes through ``p.data`` move neither version nor pointer. What does
tell is that something happened after which parameters may have changed: the trainable ones at a backward of ours or any
optimizer's step, all of them where such a step took frozen ones along, and at a change between training and evaluation,
around which programs swap averaged weights in and out and merge adapters into frozen ones.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = itertools.count(1)
_last_step = 0
_last_frozen_step = 0  # that an optimizer took with a frozen parameter, which had a gradient still


@functools.cache
def _watch_optimizers() -> None:
    """Count every optimizer's steps, from now on and for the whole process."""

    def count(optimizer: torch.optim.Optimizer, *_: object) -> None:
        global _last_step, _last_frozen_step
        _last_step = next(_steps)
        stepped = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
        if any(not parameter.requires_grad and parameter.grad is not None for parameter in stepped):
            _last_frozen_step = _last_step

    register_optimizer_step_post_hook(count)


class Freshness:
    """One wrapper's knowledge of whether its replicas are up to date.

    Args:
        matters: whether any replica has storage of its own; otherwise nothing is watched.
    """

    def __init__(self, matters: bool) -> None:
        self._backwards = 0
        self._seen: tuple[int, int] | None = None
        self._state: tuple[bool, int] | None = None
        if matters:
            _watch_optimizers()

    def on_backward(self) -> None:
        """Gradients have been made; whoever reads them may change the parameters."""
        self._backwards += 1

    def stale(self) -> bool:
        """Whether trainable parameters may have changed since this was last asked."""
        now = (self._backwards, _last_step)
        before, self._seen = self._seen, now
        return now != before

    def all_stale(self, training: bool) -> bool:
        """Whether frozen parameters may have changed, too, since this was last asked.

        Args:
            training: whether the module is in training mode.
        """
        now = (training, _last_frozen_step)
        before, self._state = self._state, now
        return now != before

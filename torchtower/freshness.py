"""Whether replicas on other devices may have fallen behind the user's parameters.

No counter of a tensor tells: fused optimizers and writes through ``p.data`` move neither version nor pointer. What does
tell is that something happened after which trainable parameters may have changed: a backward of ours, any optimizer's
step, or a change between training and evaluation, around which programs swap averaged weights in and out.
"""

from __future__ import annotations

import functools
import itertools

from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = itertools.count(1)
_last_step = 0


@functools.cache
def _watch_optimizers() -> None:
    """Count every optimizer's steps, from now on and for the whole process."""

    def count(*_: object) -> None:
        global _last_step
        _last_step = next(_steps)

    register_optimizer_step_post_hook(count)


class Freshness:
    """One wrapper's knowledge of whether its replicas are up to date.

    Args:
        matters: whether any replica has storage of its own; otherwise nothing is watched.
    """

    def __init__(self, matters: bool) -> None:
        self._backwards = 0
        self._seen: tuple[int, int, bool] | None = None
        if matters:
            _watch_optimizers()

    def on_backward(self) -> None:
        """Gradients have been made; whoever reads them may change the parameters."""
        self._backwards += 1

    def stale(self, training: bool) -> bool:
        """Whether trainable parameters may have changed since this was last asked.

        Args:
            training: whether the module is in training mode.
        """
        now = (self._backwards, _last_step, training)
        before, self._seen = self._seen, now
        return now != before

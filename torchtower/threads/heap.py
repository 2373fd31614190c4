"""Memory that a step frees is kept for the next one.

Note [Freed memory]
A step frees its gradients and activations, and the next asks for as much again. glibc gives the free end of a heap back
to the system where that is longer than a threshold, 128 KB at first: the next step then has the system hand it out
anew, page by page, and towers in one address space wait for each other there. A program that has once freed a large
block is spared this, since glibc raises its thresholds by that (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD), to
32 MB for blocks of their own and to twice that for a heap's free end. So one such block is freed here, untouched. Who
has set the thresholds himself (MALLOC_TRIM_THRESHOLD_ in the environment, say) keeps what he has set: glibc adapts
nothing then. Other allocators take no notice.
"""

from __future__ import annotations

import functools
from contextlib import suppress

import torch

_LARGEST_BYTES = 31 << 20  # that glibc learns from: 32 MB, the block's header included


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what a step frees, from now on, in the whole process; see Note [Freed memory]."""
    with suppress(RuntimeError):  # no memory left for it
        torch.UntypedStorage(_LARGEST_BYTES, device="cpu")

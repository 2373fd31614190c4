"""What a lock of Python's knows and does not tell by a public name."""

from __future__ import annotations

from typing import Any


def is_held_here(lock: Any) -> bool:
    """Whether this very thread holds a reentrant lock."""
    held: bool = lock._is_owned()
    return held

"""Objects among a call's arguments that are no containers: all towers have the same one, and may write into it."""

from __future__ import annotations

import threading
import warnings
from typing import Any

from torch import Tensor

from torchtower.parts import tensors_within

_FEW = 256  # parts of an object that are looked at


class Objects:
    """The objects that towers have been given, and the tensors that these came with."""

    def __init__(self) -> None:
        self._given: dict[int, tuple[Any, list[Tensor], set[int]]] = {}
        self._lock = threading.Lock()  # no forward may write into an object while another tower looks at it

    def note(self, value: Any, tower: int) -> None:
        """A tower gets an object, before its forward: the first one's look is at what the caller has put there."""
        with self._lock:
            if id(value) not in self._given:
                self._given[id(value)] = value, tensors_within(value, _FEW), set()
            self._given[id(value)][-1].add(tower)

    def warn(self) -> None:
        """Say so where forwards have put tensors into what several have: a cache, say, where rows then mix."""
        for value, before, towers in self._given.values():
            if len(towers) > 1 and not set(map(id, tensors_within(value, _FEW))).issubset(map(id, before)):
                warnings.warn(
                    f"TowerParallel: a forward has put tensors into a {type(value).__name__} among its arguments, "
                    "which all towers share: there they mix, or are one tower's alone; make it within the forward, and "
                    "return what it holds",
                    stacklevel=2,
                )

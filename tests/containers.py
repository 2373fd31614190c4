"""What batches, outputs and what a module keeps are nested in, beside Python's own containers."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor


@dataclasses.dataclass
class Data:
    left: Tensor
    right: Tensor
    note: str = "kept"


@dataclasses.dataclass(frozen=True)
class FrozenData:
    left: Tensor
    right: Tensor


@dataclasses.dataclass
class Box:
    loss: Any = None


class AttributeDict(dict):
    def __getattr__(self, name: str) -> Any:
        return self[name]

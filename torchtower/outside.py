"""Activations that a module's hooks keep outside of it: in what they close over, in objects, in global names.

A feature extractor's hook appends every output to a list of the user's, which all towers share. What it holds after a
forward belongs to the towers' local graphs; it is exchanged for tensors in the user's graph, so that a loss over
activations reaches the parameters as it does in the plain module.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchtower.parts import cell_content, container_of, is_small_container

_LAST = 1024


class Slot(NamedTuple):
    """A place where a hook may keep something: a key of a list or dict, or a cell of a function."""

    container: Any
    key: Any

    def get(self) -> Any:
        """What is kept there."""
        return cell_content(self.container) if isinstance(self.container, types.CellType) else self.container[self.key]

    def set(self, value: Any) -> None:
        """Keep something else there."""
        if isinstance(self.container, types.CellType):
            self.container.cell_contents = value
        else:
            self.container[self.key] = value


class Outside:
    """Where the forward hooks of a module tree may keep activations.

    Args:
        modules: of the tree; what their hooks keep in their attributes is no business of this.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._roots: list[Any] = []  # containers and cells
        self._globals: list[Slot] = []
        hooks = [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        self._find(hooks, {id(module) for module in modules})
        self._before: dict[int, weakref.ref[Tensor]] = {}

    def _find(self, hooks: list[Any], seen: set[int]) -> None:
        pending = hooks
        while pending:
            value = pending.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, types.FunctionType):
                cells = value.__closure__ or ()
                self._roots.extend(cells)
                pending.extend(map(cell_content, cells))
                pending.extend((*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()))
                names = value.__code__.co_names  # some of attributes
                self._globals.extend(Slot(value.__globals__, name) for name in names)
                pending.extend(v for name in names if _is_function(v := value.__globals__.get(name)))
            elif isinstance(value, types.MethodType):
                pending.extend((value.__func__, value.__self__))
            elif isinstance(value, functools.partial):
                pending.extend((value.func, *value.args, *value.keywords.values()))
            elif is_small_container(value):
                self._roots.append(value)
            elif type(getattr(value, "__dict__", None)) is dict and not isinstance(value, (types.ModuleType, Tensor)):
                self._roots.append(vars(value))

    def _kept(self) -> Iterator[tuple[Slot, list[Tensor]]]:
        pending = list(self._globals)
        for root in self._roots:
            pending.extend(_slots(root))
        seen = set(map(id, self._roots))
        while pending:
            slot = pending.pop()
            try:
                value = slot.get()
            except LookupError:  # a name that has been deleted, a list that another thread shortens
                continue
            if isinstance(value, Tensor):
                if value.grad_fn is not None:
                    yield slot, [value]
            elif type(value) is tuple:
                if tensors := [v for v in value if isinstance(v, Tensor) and v.grad_fn is not None]:
                    yield slot, tensors
            elif (container := container_of(value)) is not None and id(container) not in seen:
                seen.add(id(container))
                pending.extend(_slots(container))

    def remember(self) -> None:
        """Take what is there now for the user's own."""
        self._before = {id(tensor): weakref.ref(tensor) for _, tensors in self._kept() for tensor in tensors}

    def new(self) -> list[tuple[Slot, list[Tensor]]]:
        """Where tensors with a graph are that were not when this was to `remember`, and which."""
        found = []
        for slot, tensors in self._kept():
            new = [tensor for tensor in tensors if self._before.get(id(tensor), _nothing)() is not tensor]
            if new:
                found.append((slot, new))
        return found


def put_connected(slots: Sequence[Slot], connected: dict[int, Tensor]) -> None:
    """Put the connected tensors, by the local ones' ids, where the local ones are."""
    for slot in slots:
        value = slot.get()
        if isinstance(value, tuple):
            slot.set(tuple(connected.get(id(item), item) for item in value))
        else:
            slot.set(connected.get(id(value), value))  # hooks may share a place, which is then exchanged once


def _nothing() -> None:
    """A reference that is dead."""


def _slots(container: Any) -> list[Slot]:
    if isinstance(container, types.CellType):
        return [Slot(container, None)]
    if isinstance(container, set):  # unordered: nothing can be put in something's place
        return []
    # The last ones: a hook adds at the end, and what it has added in a thousand steps is no business of this one.
    if isinstance(container, dict):
        return [Slot(container, key) for key in islice(reversed(container), _LAST)]
    return [Slot(container, index) for index in range(len(container))[-_LAST:]]


def _is_function(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, functools.partial))

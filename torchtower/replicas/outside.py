"""Activations that are kept outside of a module: by its hooks, in what they close over, in objects, in global names.

And by its forward, in a list or dict that it is given. A feature extractor's hook appends every output to a list of the
user's, which all towers share. What it holds after a forward belongs to the towers' local graphs; it is exchanged for
tensors in the user's graph, so that a loss over activations reaches the parameters as it does in the plain module.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchtower.bridge.graphs import graph_of
from torchtower.parts import BOUND, cell_content, container_of

_LAST = 1024
_FEW = 256


class Slot(NamedTuple):
    """A place where something is kept: a key of a list or dict, or a cell of a function."""

    container: Any
    key: Any

    def get(self) -> Any:
        """What is kept there."""
        if isinstance(self.container, types.CellType):
            return cell_content(self.container)
        return _own_method(self.container, "__getitem__")(self.container, self.key)

    def set(self, value: Any) -> None:
        """Keep something else there."""
        if isinstance(self.container, types.CellType):
            self.container.cell_contents = value
        else:
            _own_method(self.container, "__setitem__")(self.container, self.key, value)


class Outside:
    """Where the forward hooks of a module tree may keep activations.

    Args:
        modules: of the tree; what their hooks keep in their attributes is no business of this.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._roots: list[Any] = []  # containers and cells
        self._apart: list[dict[str, Any]] = []  # attributes of modules apart from the tree
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
            elif isinstance(value, BOUND):
                pending.append(value.__self__)
            elif isinstance(value, nn.Module):
                self._apart.append(vars(value))
            elif (holder := _holder_in(value)) is not None:
                self._roots.append(holder)

    def _kept(self) -> Iterator[tuple[Slot, list[Tensor]]]:
        if not (self._roots or self._apart or self._globals):  # nearly always: there are no hooks
            return
        slots = [slot for root in self._roots for slot in _slots(root)]
        seen = set(map(id, self._roots))
        for attributes in self._apart:  # which may hold anything
            yield from _kept_in(_slots(attributes), seen, _FEW)
        for slot in self._globals:
            value = slot.container.get(slot.key)
            if container_of(value) is None and (holder := _holder_in(value)) is not None:
                yield from _kept_in(_slots(holder), seen, _FEW)  # a trainer, say: it may hold anything
            else:
                slots.append(slot)
        yield from _kept_in(slots, seen, sys.maxsize)

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


def kept_in(containers: Sequence[Any]) -> list[tuple[Slot, list[Tensor]]]:
    """Where in these are tensors with a graph, and which; they were empty before."""
    holders = [holder for container in containers if (holder := _holder_in(container)) is not None]
    slots = [slot for holder in holders for slot in _slots(holder, sys.maxsize)]
    return list(_kept_in(slots, set(map(id, holders)), sys.maxsize))


def put_connected(slots: Sequence[Slot], connected: dict[int, Tensor]) -> None:
    """Put the connected tensors, by the local ones' ids, where the local ones are."""
    for slot in slots:
        slot.set(_exchanged(slot.get(), connected))


def _exchanged(value: Any, connected: dict[int, Tensor]) -> Any:
    if type(value) is tuple:
        return tuple([_exchanged(part, connected) for part in value])
    return connected.get(id(value), value)  # hooks may share a place, which is then exchanged once


def _with_graph(value: Any) -> list[Tensor]:
    """The tensors with a graph that a value is, or that a tuple of it holds."""
    if type(value) is tuple:
        return [tensor for part in value for tensor in _with_graph(part)]
    return [value] if isinstance(value, Tensor) and graph_of(value) is not None else []


def _holder_in(value: Any) -> Any:
    """Where a list, a dict or an object of any class holds things: itself, or its attributes; None of what is none."""
    if isinstance(value, (list, deque, dict)):
        return value
    if isinstance(value, (nn.Module, Tensor, types.ModuleType, type)):
        return None
    attributes = getattr(value, "__dict__", None)
    return attributes if type(attributes) is dict else None


def _kept_in(slots: list[Slot], seen: set[int], most: int) -> Iterator[tuple[Slot, list[Tensor]]]:
    """What these hold, and containers there, as far as so many slots go."""
    pending = deque(slots)
    while pending and most > 0:
        slot = pending.popleft()
        most -= 1
        try:
            value = slot.get()
        except LookupError:  # a list that another thread shortens
            continue
        if tensors := _with_graph(value):
            yield slot, tensors
        elif (container := container_of(value)) is not None and id(container) not in seen:
            seen.add(id(container))
            pending.extend(_slots(container))


def _nothing() -> None:
    """A reference that is dead."""


def _slots(container: Any, most: int = _LAST) -> list[Slot]:
    if isinstance(container, types.CellType):
        return [Slot(container, None)]
    if isinstance(container, set):  # unordered: nothing can be put in something's place
        return []
    # The last ones: a hook adds at the end, and what it has added in a thousand steps is no business of this one.
    if isinstance(container, dict):
        return [Slot(container, key) for key in islice(dict.__reversed__(container), most)]
    length = _own_method(container, "__len__")(container)
    return [Slot(container, index) for index in range(length)[-most:]]


def _own_method(container: Any, name: str) -> Any:
    """A method of dict, list or deque itself: a subclass's might do anything."""
    kind = next(kind for kind in (dict, list, deque) if isinstance(container, kind))
    return getattr(kind, name)


def _is_function(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, functools.partial))

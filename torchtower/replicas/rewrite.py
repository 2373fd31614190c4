"""Translate what one module tree refers to into what another tree refers to.

A replica shares almost everything with its module by reference. What must be translated is whatever leads back to a
module, parameter or buffer of the tree: containers, partials, bound methods, closures (a compiled module's ``forward``
closes over the original module: a replica that kept it would silently run the original) and weak references.
"""

from __future__ import annotations

import copy as copying
import functools
import sys
import types
import weakref
from collections import defaultdict
from collections.abc import Container
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from torchtower.batches.nested import rebuild_tuple
from torchtower.parts import (
    ATOMS,
    BOUND,
    CALLABLES,
    CONTAINERS,
    MANY,
    cell_content,
    container_of,
    entries_of,
    is_foreign,
    is_plain_tuple,
    is_record,
    is_table,
    leads_nowhere,
    note_alike,
    note_made,
    parts_of,
)


class _Pair:
    """A container or record and its copy, which all share that share the source."""

    def __init__(self, source: Any, twin: Any) -> None:
        self.source = source  # alive, so that its id stays its own
        self.twin = twin


class Translation:
    """A one-to-one table of objects, applied to values of any depth.

    Args:
        deep: look into objects of any class. Else small containers are copied even where nothing in them is translated,
            so that what one side adds to them does not reach the other. Those that functions alone refer to stay
            shared, where they lead to nothing that is translated: a hook may collect there.
        left_behind: deep, and into modules; a forward has made what leads from there to its own modules, parameters
            and buffers, and objects among it are noted, see `torchtower.parts`. What has been copied once is in the
            table from then on.
    """

    def __init__(self, *, deep: bool = False, left_behind: bool = False) -> None:
        self.deep = deep or left_behind
        self.left_behind = left_behind
        self.table: dict[int, tuple[Any, Any]] = {}  # keeps the keys' objects alive, so that ids stay theirs
        self.pairs: weakref.WeakValueDictionary[int, _Pair] = weakref.WeakValueDictionary()
        # Those met since this was replaced: as long as somebody holds on to one, its copy stays the same.
        self.met: list[_Pair] = []

    def add(self, source: Any, target: Any) -> None:
        """Let ``source`` be translated to ``target``."""
        self.table[id(source)] = (source, target)

    def remove(self, source: Any) -> None:
        """Let ``source`` be translated to itself again, if it is not."""
        self.table.pop(id(source), None)

    def get(self, source: Any) -> Any:
        """What ``source`` itself is translated to; None if it is not in the table."""
        entry = self.table.get(id(source))
        return None if entry is None else entry[1]

    def __call__(self, value: Any, in_attributes: Container[int] = ()) -> Any:
        """``value`` itself where nothing in it is in the table, else a translated copy of it.

        Args:
            value: anything.
            in_attributes: ids of containers that attributes hold, whose copies take their places in functions, too.
        """
        if type(value) in ATOMS:
            return value
        if (entry := self.table.get(id(value))) is not None:
            return entry[1]
        if isinstance(value, Tensor) or (isinstance(value, nn.Module) and not self.left_behind):
            return value
        return _Copy(self, value, in_attributes).of(value, not self.deep)

    def with_parts(self, value: Any) -> Any:
        """A callable with those of its own parts translated that are in the table; itself where none is."""
        if not isinstance(value, CALLABLES) or self.table.keys().isdisjoint(map(id, parts_of(value) or ())):
            return value
        self.met = []
        try:
            return _Copy(self, value, (), is_shallow=True).of(value, False)
        finally:
            self.met = []  # nobody holds on to what there is for one call


class _Copy:
    """One translated copy of a value that may lead back to itself.

    Args:
        translation: whose table is applied.
        root: the value.
        in_attributes: see `Translation.__call__`.
        is_shallow: whether only the root is copied, whatever its parts lead to.
    """

    def __init__(
        self, translation: Translation, root: Any, in_attributes: Container[int], *, is_shallow: bool = False
    ) -> None:
        self._translation = translation
        self._in_attributes = in_attributes
        self._table = translation.table
        self._most = MANY if translation.left_behind else sys.maxsize
        self._done: dict[int, Any] = {}
        self._leading = {id(root)} if is_shallow else self._find_leading(root)

    def _find_leading(self, root: Any) -> set[int]:
        """The ids of what leads from ``root`` to something in the table, which must be copied."""
        holders_of: dict[int, list[int]] = {id(root): []}
        leading: set[int] = set()
        pending = [root]
        inner: set[int] = set()  # what functions lead to, where a table is a memory of theirs
        while pending and len(holders_of) < self._most:
            holder = pending.pop()
            is_inner = id(holder) in inner or isinstance(holder, CALLABLES)
            if leads_nowhere(holder) or (is_inner and is_table(holder)):
                continue
            parts = self._parts(holder) or ()
            if is_inner:
                inner.update(map(id, parts))
            for part in parts:
                if id(part) in self._table:
                    leading.add(id(holder))
                    continue
                if is_inner and self._is_in_attribute(part):
                    leading.add(id(holder))
                    if id(part) in self._translation.pairs:
                        continue
                if id(part) in holders_of:
                    holders_of[id(part)].append(id(holder))
                elif type(part) not in ATOMS:
                    holders_of[id(part)] = [id(holder)]
                    pending.append(part)
        spreading = list(leading)
        while spreading:
            new = [holder for holder in holders_of[spreading.pop()] if holder not in leading]
            leading.update(new)
            spreading.extend(new)
        return leading

    def _parts(self, value: Any) -> list[Any] | None:
        if self._translation.left_behind and isinstance(value, nn.Module):
            # A wrapper leads to its replicas by its attributes.
            return [value._modules] if isinstance(value, nn.DataParallel) else list(vars(value).values())
        return parts_of(value, deep=self._translation.deep)

    def _is_in_attribute(self, value: Any) -> bool:
        return bool(self._in_attributes) and id(container_of(value)) in self._in_attributes

    def of(self, value: Any, copy: bool) -> Any:
        """The copy of a part; with ``copy`` also of small containers that lead to nothing in the table."""
        if type(value) in ATOMS:
            return value
        if (entry := self._table.get(id(value))) is not None:
            return entry[1]
        if id(value) in self._done:
            return self._done[id(value)]
        is_tuple = is_plain_tuple(type(value)) and not leads_nowhere(value)
        copy = copy and (is_tuple or container_of(value) is not None)
        if self._is_in_attribute(value):
            if id(value) in self._translation.pairs:  # the module that holds it fills it
                return self._twin_of(value)
            copy = True
        if id(value) not in self._leading and not copy:
            return value
        if isinstance(value, nn.Module):
            return self._module(value)
        if self._translation.left_behind and is_foreign(value):
            note_made(value)  # a record then, if it can be one
        if type(value) in CONTAINERS or is_record(value):
            twin = self._done[id(value)] = self._twin_of(value)
            parts = self._parts(value) or []
            if not leads_nowhere(value):
                parts = [self.of(part, copy) for part in parts]
            if is_record(value):
                vars(twin).clear()
                vars(twin).update(zip(vars(value), parts, strict=True))
            else:
                _refill(twin, parts)
        elif isinstance(value, types.FunctionType):
            self._done[id(value)] = self._function(value)
        elif is_foreign(value):
            self._done[id(value)] = self._foreign(value)
        else:
            before = parts_of(value) or []
            parts = [self.of(part, copy) for part in before]
            if id(value) not in self._done:  # it may lead back to itself, by way of a container
                changed = any(map(is_not, before, parts))
                self._done[id(value)] = self._immutable(value, parts) if changed else value
        return self._done[id(value)]

    def _module(self, value: nn.Module) -> nn.Module:
        """A module that a forward has made, of parts of its own module (``nn.Sequential(self.a, self.b)``)."""
        if isinstance(value, torch.jit.ScriptModule):
            return value
        twin: nn.Module = object.__new__(type(value))
        self._translation.add(value, twin)  # under whatever other names it has
        for name, part in vars(value).items():
            vars(twin)[name] = self.of(part, True)
            if isinstance(part, dict):  # of hooks, to which their handles refer
                self._translation.add(part, vars(twin)[name])
        return twin

    def _foreign(self, value: Any) -> Any:
        """A copy as its class makes it, with some of what it holds exchanged."""
        try:
            twin = copying.copy(value)
        except Exception:  # not to be copied: the user's own object then, as it is
            return value
        if twin is value:
            return value
        self._done[id(value)] = twin
        if self._translation.left_behind:
            self._translation.add(value, twin)
        note_alike(value, twin)
        for into, key, part in entries_of(value):
            translated = self.of(part, False)
            if translated is part:
                continue
            if into == "slots":
                object.__setattr__(twin, key, translated)
            else:
                (twin if into == "items" else vars(twin))[key] = translated
        return twin

    def _twin_of(self, value: Any) -> Any:
        """The one copy of a container or record, whose contents are yet to be translated."""
        pair = self._translation.pairs.get(id(value))
        if pair is None:
            pair = self._translation.pairs[id(value)] = _Pair(value, _like(value))
            note_alike(value, pair.twin)
            if self._translation.left_behind:
                self._translation.add(value, pair.twin)
        self._translation.met.append(pair)
        return pair.twin

    def _immutable(self, value: Any, parts: list[Any]) -> Any:
        if isinstance(value, functools.partial):
            split = 1 + len(value.args)
            return functools.partial(parts[0], *parts[1:split], **dict(zip(value.keywords, parts[split:], strict=True)))
        if isinstance(value, types.MethodType):
            return types.MethodType(parts[1], parts[0])
        if isinstance(value, BOUND):
            return getattr(parts[0], value.__name__)
        if isinstance(value, weakref.WeakMethod):
            method: Any = value()
            return weakref.WeakMethod(types.MethodType(method.__func__, parts[0]))
        if isinstance(value, weakref.ref):
            return weakref.ref(parts[0])
        twin = self._done[id(value)] = rebuild_tuple(value, parts) if isinstance(value, tuple) else type(value)(parts)
        for name, part in getattr(value, "__dict__", {}).items():
            vars(twin)[name] = self.of(part, False)
        return twin

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        def leads(part: Any) -> bool:
            return id(part) in self._table or id(part) in self._leading or self._is_in_attribute(part)

        # A cell is shared unless what it holds must be another, so that a hook's ``nonlocal`` reaches its user.
        cells = value.__closure__ or ()
        closure = tuple(self._twin_of(cell) if leads(cell_content(cell)) else cell for cell in cells)
        copied = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, closure)
        self._done[id(value)] = copied
        for cell, new in zip(cells, closure, strict=True):
            if new is not cell:
                new.cell_contents = self.of(cell_content(cell), False)
        copied.__defaults__ = tuple(self.of(part, False) for part in value.__defaults__ or ()) or None
        keywords = value.__kwdefaults__ or {}
        copied.__kwdefaults__ = {name: self.of(part, False) for name, part in keywords.items()} or None
        for name in functools.WRAPPER_ASSIGNMENTS:
            setattr(copied, name, getattr(value, name))
        copied.__dict__.update((name, self.of(part, False)) for name, part in value.__dict__.items())
        return copied


def _like(value: Any) -> Any:
    if isinstance(value, types.SimpleNamespace):
        return types.SimpleNamespace()
    if isinstance(value, types.CellType):  # of all functions that share it
        return types.CellType()
    # Of a record none of the class's own code is run, which might hand out the user's object; a container keeps its
    # default_factory or maxlen.
    return object.__new__(type(value)) if is_record(value) else copying.copy(value)


def _refill(container: Any, parts: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        half = len(parts) // 2
        container.update(dict(zip(parts[:half], parts[half : 2 * half], strict=True)))
        if isinstance(container, defaultdict):
            container.default_factory = parts[-1]
    elif isinstance(container, set):
        container.update(parts)
    else:
        container.extend(parts)

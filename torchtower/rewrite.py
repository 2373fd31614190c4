"""Translate what one module tree refers to into what another tree refers to.

A replica shares almost everything with its module by reference. What must be translated is whatever leads back to a
module, parameter or buffer of the tree: containers, partials, bound methods, closures (a compiled module's ``forward``
closes over the original module: a replica that kept it would silently run the original) and weak references.
"""

from __future__ import annotations

import copy as copying
import dataclasses
import functools
import sys
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, MutableMapping
from itertools import islice
from typing import Any

from torch import Tensor, nn

_DICTS = (dict, OrderedDict, defaultdict, Counter)
_CONTAINERS = (*_DICTS, list, set, deque)
# A larger container is a table (a vocabulary, say): shared by all towers, neither copied nor compared.
_SMALL = 1024
_MANY = 4096  # objects, after which a search is given up
_ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None), type})


def is_small_container(value: Any) -> bool:
    """Whether ``value`` is a list, dict or the like that towers get copies of."""
    return type(value) in _CONTAINERS and len(value) <= _SMALL


def _is_record(value: Any) -> bool:
    """Whether ``value`` is a dataclass's or a SimpleNamespace, whose attributes towers get copies of.

    Only of classes that make their objects as Python does: a singleton, an Enum or a dict is something else besides.
    """
    kind = type(value)
    return kind is types.SimpleNamespace or (
        dataclasses.is_dataclass(kind)
        and kind.__new__ is object.__new__
        and not isinstance(value, nn.Module)
        and type(getattr(value, "__dict__", None)) is dict
        and not any(getattr(base, "__slots__", ()) for base in kind.__mro__)
    )


def container_of(value: Any) -> Any:
    """What is watched of an attribute's value: a small list, dict or the like itself, the attributes of a record."""
    if is_small_container(value):
        return value
    return vars(value) if _is_record(value) else None


class _Record:
    """A record and its copy, which all share that share the record."""

    def __init__(self, source: Any, twin: Any) -> None:
        self.source = source  # alive, so that its id stays its own
        self.twin = twin


_Records = weakref.WeakValueDictionary[int, _Record]


class Translation:
    """A one-to-one table of objects, applied to values of any depth.

    Args:
        copy_containers: copy small containers even where nothing in them is translated, so that what one side adds
            to them does not reach the other. Those that functions refer to stay shared: a hook may collect there.
        deep: look into objects of any class, which a forward may have made for what it leaves behind.
    """

    def __init__(self, *, copy_containers: bool = False, deep: bool = False) -> None:
        self._copy_containers = copy_containers
        self._deep = deep
        self._table: dict[int, tuple[Any, Any]] = {}  # keeps the keys' objects alive, so that ids stay theirs
        self._records: _Records = weakref.WeakValueDictionary()
        # The records met since this was replaced: as long as somebody holds on to one, its copy stays the same.
        self.met: list[_Record] = []

    def add(self, source: Any, target: Any) -> None:
        """Let ``source`` be translated to ``target``."""
        self._table[id(source)] = (source, target)

    def remove(self, source: Any) -> None:
        """Let ``source`` be translated to itself again."""
        del self._table[id(source)]

    def get(self, source: Any) -> Any:
        """What ``source`` itself is translated to; None if it is not in the table."""
        entry = self._table.get(id(source))
        return None if entry is None else entry[1]

    def __call__(self, value: Any) -> Any:
        """``value`` itself where nothing in it is in the table, else a translated copy of it."""
        if type(value) in _ATOMS:
            return value
        if (entry := self._table.get(id(value))) is not None:
            return entry[1]
        if isinstance(value, (Tensor, nn.Module)):
            return value
        return _Copy(self._table, self._records, self.met, self._deep, value).of(value, self._copy_containers)


class _Copy:
    """One translated copy of a value that may lead back to itself.

    Args:
        table: as of `Translation`.
        records: by their ids.
        met: gets those that are in the value.
        deep: as of `Translation`.
        root: the value.
    """

    def __init__(
        self,
        table: dict[int, tuple[Any, Any]],
        records: _Records,
        met: list[_Record],
        deep: bool,
        root: Any,
    ) -> None:
        self._table = table
        self._records = records
        self._met = met
        self._parts_of = _all_parts_of if deep else _parts_of
        self._most = _MANY if deep else sys.maxsize
        self._done: dict[int, Any] = {}
        self._leading = self._find_leading(root)

    def _find_leading(self, root: Any) -> set[int]:
        """The ids of what leads from ``root`` to something in the table: these must be copied."""
        holders_of: dict[int, list[int]] = {id(root): []}
        leading: set[int] = set()
        pending = [root]
        while pending and len(holders_of) < self._most:
            holder = pending.pop()
            for part in () if id(holder) in self._table else self._parts_of(holder) or ():
                if id(part) in self._table:
                    leading.add(id(holder))
                elif id(part) in holders_of:
                    holders_of[id(part)].append(id(holder))
                elif type(part) not in _ATOMS:
                    holders_of[id(part)] = [id(holder)]
                    pending.append(part)
        spreading = list(leading)
        while spreading:
            new = [holder for holder in holders_of[spreading.pop()] if holder not in leading]
            leading.update(new)
            spreading.extend(new)
        return leading

    def of(self, value: Any, copy: bool) -> Any:
        """The copy of a part; with ``copy`` also of small containers that lead to nothing in the table."""
        if type(value) in _ATOMS:
            return value
        if (entry := self._table.get(id(value))) is not None:
            return entry[1]
        if id(value) in self._done:
            return self._done[id(value)]
        copy = copy and (_is_plain_tuple(type(value)) or container_of(value) is not None)
        if id(value) not in self._leading and not copy:
            return value
        self._done[id(value)] = value  # until it is made: a cycle of what cannot be made empty meets the original
        if _is_record(value):
            self._done[id(value)] = self._record(value, copy)
        elif type(value) in _CONTAINERS:
            self._done[id(value)] = copying.copy(value)  # keeps a default_factory, a maxlen
            _refill(self._done[id(value)], [self.of(part, copy) for part in self._parts_of(value) or ()])
        elif isinstance(value, types.FunctionType):
            self._done[id(value)] = self._function(value)
        elif _parts_of(value) is None:
            self._done[id(value)] = self._foreign(value)
        else:
            self._done[id(value)] = self._immutable(value, [self.of(part, copy) for part in _parts_of(value) or ()])
        return self._done[id(value)]

    def _foreign(self, value: Any) -> Any:
        """A copy as its class makes it, with some entries and attributes exchanged."""
        try:
            twin = copying.copy(value)
        except Exception:  # not to be copied: the user's own object then, as it is
            return value
        self._done[id(value)] = twin
        for into, key, part in _entries(value):
            translated = self.of(part, False)
            if translated is not part:
                (twin if into == "items" else vars(twin))[key] = translated
        return twin

    def _record(self, value: Any, copy: bool) -> Any:
        record = self._records.get(id(value))
        if record is None:
            # None of the class's own code is run, which might hand out the user's object.
            twin = types.SimpleNamespace() if type(value) is types.SimpleNamespace else object.__new__(type(value))
            record = self._records[id(value)] = _Record(value, twin)
        self._met.append(record)
        twin = self._done[id(value)] = record.twin
        parts = {name: self.of(part, copy) for name, part in vars(value).items()}
        vars(twin).clear()
        vars(twin).update(parts)
        return twin

    def _immutable(self, value: Any, parts: list[Any]) -> Any:
        if not _changed(_parts_of(value) or [], parts):
            return value
        if isinstance(value, functools.partial):
            split = 1 + len(value.args)
            return functools.partial(parts[0], *parts[1:split], **dict(zip(value.keywords, parts[split:], strict=True)))
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, parts[0])
        if isinstance(value, types.BuiltinMethodType):
            return getattr(parts[0], value.__name__)
        if isinstance(value, weakref.WeakMethod):
            method: Any = value()
            return weakref.WeakMethod(types.MethodType(method.__func__, parts[0]))
        if isinstance(value, weakref.ref):
            return weakref.ref(parts[0])
        make = getattr(type(value), "_make", type(value))  # a named tuple's
        return make(parts)

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        def leads(part: Any) -> bool:
            return id(part) in self._table or id(part) in self._leading

        # A cell is shared unless what it holds must be another, so that a hook's ``nonlocal`` reaches its user.
        cells = value.__closure__ or ()
        closure = tuple(types.CellType() if leads(cell_content(cell)) else cell for cell in cells)
        copied = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, closure)
        self._done[id(value)] = copied
        for cell, new in zip(cells, closure, strict=True):
            if new is not cell:
                new.cell_contents = self.of(cell_content(cell), False)
        copied.__defaults__ = tuple(self.of(part, False) for part in value.__defaults__ or ()) or None
        keywords = value.__kwdefaults__ or {}
        copied.__kwdefaults__ = {name: self.of(part, False) for name, part in keywords.items()} or None
        copied.__qualname__ = value.__qualname__
        copied.__dict__.update((name, self.of(part, False)) for name, part in value.__dict__.items())
        return copied


def _is_plain_tuple(kind: type) -> bool:
    return kind is tuple or (issubclass(kind, tuple) and hasattr(kind, "_fields"))


def _parts_of(value: Any) -> list[Any] | None:
    """What a value holds, where copies of such values can be made; None where they cannot."""
    kind = type(value)
    if isinstance(value, (Tensor, nn.Module)) or kind is type:
        return None
    if kind in _DICTS:
        return [*value.keys(), *value.values()]
    if kind in _CONTAINERS or isinstance(value, (tuple, frozenset)):
        return list(iter(value))  # a subclass may have no length
    if kind is types.FunctionType:
        keywords = value.__kwdefaults__ or {}
        contents = map(cell_content, value.__closure__ or ())
        return [*contents, *(value.__defaults__ or ()), *keywords.values(), *value.__dict__.values()]
    if kind is functools.partial:
        return [value.func, *value.args, *value.keywords.values()]
    if kind is types.MethodType or (kind is types.BuiltinMethodType and type(value.__self__) in _CONTAINERS):
        return [value.__self__]
    if kind is weakref.ref:
        return [value()]
    if kind is weakref.WeakMethod:  # makes a new method at each call
        return [getattr(value(), "__self__", None)]
    return list(vars(value).values()) if _is_record(value) else None


def _all_parts_of(value: Any) -> list[Any] | None:
    """As `_parts_of`, and of whatever else has entries or attributes."""
    parts = _parts_of(value)
    if parts is not None or isinstance(value, (Tensor, nn.Module, type, types.ModuleType)):
        return parts
    return [part for _, _, part in _entries(value)]


def _entries(value: Any) -> Iterator[tuple[str, Any, Any]]:
    """What a foreign object holds: among its items or its attributes, under which key, and what."""
    if isinstance(value, MutableMapping):
        yield from (("items", key, part) for key, part in list(islice(value.items(), _SMALL)))
    elif isinstance(value, (list, deque)):
        yield from (("items", index, part) for index, part in enumerate(islice(value, _SMALL)))
    if type(attributes := getattr(value, "__dict__", None)) is dict:
        yield from (("attributes", name, part) for name, part in list(attributes.items()))


def tensors_within(value: Any) -> list[Tensor]:
    """The tensors in what a forward has left behind, however deep; of a large program of objects the first ones."""
    found: list[Tensor] = []
    seen: set[int] = set()
    pending = [value]
    while pending and len(seen) < _MANY:
        part = pending.pop()
        if isinstance(part, Tensor):
            found.append(part)
        elif type(part) not in _ATOMS and id(part) not in seen:
            seen.add(id(part))
            pending.extend(_all_parts_of(part) or ())
    return found


def _refill(container: Any, parts: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        half = len(parts) // 2
        container.update(dict(zip(parts[:half], parts[half:], strict=True)))
    elif isinstance(container, set):
        container.update(parts)
    else:
        container.extend(parts)


def _changed(before: list[Any], after: list[Any]) -> bool:
    return any(old is not new for old, new in zip(before, after, strict=True))


def cell_content(cell: types.CellType) -> Any:
    """What a function closes over; None of a cell that is not filled yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None

"""Translate what one module tree refers to into what another tree refers to.

A replica shares almost everything with its module by reference. What must be translated is whatever leads back to a
module, parameter or buffer of the tree: containers, partials, bound methods, closures (a compiled module's ``forward``
closes over the original module: a replica that kept it would silently run the original) and weak references.
"""

from __future__ import annotations

import copy as copying
import dataclasses
import functools
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from itertools import islice
from typing import Any

from torch import Tensor, nn

_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, Counter, deque)
# A larger container is a table (a vocabulary, say): shared by all towers, neither copied nor compared.
_SMALL = 1024
_ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None), type})


def is_small_container(value: Any) -> bool:
    """Whether ``value`` is a list, dict or the like that towers get copies of."""
    return type(value) in _CONTAINERS and len(value) <= _SMALL


def _is_record(value: Any) -> bool:
    """Whether ``value`` is a dataclass's or a SimpleNamespace, whose attributes towers get copies of."""
    kind = type(value)
    return kind is types.SimpleNamespace or (
        dataclasses.is_dataclass(kind) and hasattr(value, "__dict__") and not isinstance(value, nn.Module)
    )


def container_of(value: Any) -> Any:
    """What is watched of an attribute's value: a small list, dict or the like itself, the attributes of a record."""
    if is_small_container(value):
        return value
    return vars(value) if _is_record(value) else None


class Translation:
    """A one-to-one table of objects, applied to values of any depth.

    Args:
        copy_containers: copy small containers even where nothing in them is translated, so that what one side adds
            to them does not reach the other. Those that functions refer to stay shared: a hook may collect there.
    """

    def __init__(self, *, copy_containers: bool = False) -> None:
        self._copy_containers = copy_containers
        self._table: dict[int, tuple[Any, Any]] = {}  # keeps the keys' objects alive, so that ids stay theirs

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
        return self._translate(value, {}, self._copy_containers)

    def _translate(self, value: Any, done: dict[int, Any], copy: bool) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        entry = self._table.get(id(value))
        if entry is not None:
            return entry[1]
        if isinstance(value, (Tensor, nn.Module)):
            return value
        translate = _TRANSLATORS.get(kind)
        if translate is None and isinstance(value, tuple):
            translate = _translate_tuple
        elif translate is None and _is_record(value):
            translate = _translate_record
        if translate is None:
            return value
        if id(value) not in done:
            done[id(value)] = value  # a cycle meets the original; rewriting it twice would never end
            copy = copy and (kind in _CONTAINERS or translate in (_translate_tuple, _translate_record))
            always = copy and (is_small_container(value) or translate is _translate_record)
            done[id(value)] = translate(value, lambda part: self._translate(part, done, copy), always)
        return done[id(value)]


_Translate = Callable[[Any], Any]


def _changed(before: list[Any], after: list[Any]) -> bool:
    return any(old is not new for old, new in zip(before, after, strict=True))


def _translate_sequence(value: Any, translate: _Translate, always: bool) -> Any:
    before = list(value)
    after = [translate(item) for item in before]
    if not (always or _changed(before, after)):
        return value
    return deque(after, value.maxlen) if isinstance(value, deque) else type(value)(after)


def _translate_dict(value: Any, translate: _Translate, always: bool) -> Any:
    before = [*value.keys(), *value.values()]
    after = [translate(item) for item in before]
    if not (always or _changed(before, after)):
        return value
    half = len(value)
    rebuilt = copying.copy(value)  # keeps a default_factory
    rebuilt.clear()
    rebuilt.update(dict(zip(after[:half], after[half:], strict=True)))
    return rebuilt


def _translate_record(value: Any, translate: _Translate, always: bool) -> Any:
    before = list(vars(value).values())
    after = [translate(item) for item in before]
    if not (always or _changed(before, after)):
        return value
    rebuilt = copying.copy(value)
    vars(rebuilt).update(zip(vars(value), after, strict=True))
    return rebuilt


def _translate_tuple(value: Any, translate: _Translate, always: bool) -> Any:
    before = list(value)
    after = [translate(item) for item in before]
    if not _changed(before, after):
        return value
    return type(value)(*after) if hasattr(value, "_fields") else type(value)(after)


def _translate_partial(value: Any, translate: _Translate, always: bool) -> Any:
    before = [value.func, *value.args, *value.keywords.values()]
    after = [translate(item) for item in before]
    if not _changed(before, after):
        return value
    split = 1 + len(value.args)
    keywords = dict(zip(value.keywords, after[split:], strict=True))
    return functools.partial(after[0], *after[1:split], **keywords)


def _translate_method(value: Any, translate: _Translate, always: bool) -> Any:
    owner = translate(value.__self__)
    return value if owner is value.__self__ else types.MethodType(value.__func__, owner)


def _translate_reference(value: Any, translate: _Translate, always: bool) -> Any:
    target = value()
    translated = translate(target)
    return value if translated is target else weakref.ref(translated)


def _translate_function(value: Any, translate: _Translate, always: bool) -> Any:
    cells = value.__closure__ or ()
    before = [cell_content(cell) for cell in cells] + list(value.__defaults__ or ())
    keywords = value.__kwdefaults__ or {}
    before += [*keywords.values(), *value.__dict__.values()]
    after = [translate(item) for item in before]
    if not _changed(before, after):
        return value
    closure = tuple(
        cell if old is new else types.CellType(new) for cell, old, new in zip(cells, before, after, strict=False)
    )
    rest = iter(after[len(cells) :])
    defaults = tuple(islice(rest, len(value.__defaults__ or ()))) or None
    copied = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, closure)
    copied.__kwdefaults__ = dict(zip(keywords, rest, strict=False)) or None
    copied.__qualname__ = value.__qualname__
    copied.__dict__.update(zip(value.__dict__, rest, strict=True))
    return copied


def cell_content(cell: types.CellType) -> Any:
    """What a function closes over; None of a cell that is not filled yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


_TRANSLATORS: dict[type, Callable[[Any, _Translate, bool], Any]] = {
    list: _translate_sequence,
    set: _translate_sequence,
    frozenset: _translate_tuple,
    deque: _translate_sequence,
    dict: _translate_dict,
    OrderedDict: _translate_dict,
    defaultdict: _translate_dict,
    Counter: _translate_dict,
    functools.partial: _translate_partial,
    types.MethodType: _translate_method,
    types.FunctionType: _translate_function,
    weakref.ref: _translate_reference,
}

"""What values of any kind hold: the parts by which one thing leads to another."""

from __future__ import annotations

import dataclasses
import functools
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Container, Iterator, MutableMapping
from contextlib import suppress
from itertools import chain, islice
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchtower._extension import holds_only

_DICTS = (dict, OrderedDict, defaultdict, Counter)
CONTAINERS = (*_DICTS, list, set, deque)
_LISTED = frozenset({dict, OrderedDict, Counter, list, set, deque, tuple, frozenset})  # hold what they list, no more
BOUND = (types.BuiltinMethodType, types.MethodWrapperType)  # methods of what is not made in Python: ``features.append``
CALLABLES = (types.FunctionType, types.MethodType, functools.partial, *BOUND)
LEADING = (nn.Module, *CALLABLES)  # what a value is that may lead to a module of the user's, and is no container
# A larger container, or tensor apart from the module's device, is a table (a vocabulary, say): shared by all towers,
# neither copied nor compared.
SMALL = 1024
MANY = 4096  # objects, after which a search is given up
ATOMS: frozenset[type] = frozenset({int, float, complex, bool, str, bytes, type(None), type})


def is_table(value: Any) -> bool:
    """Whether ``value`` is a list, dict or the like that is too large for towers to get copies of."""
    return type(value) in CONTAINERS and len(value) > SMALL


def is_record(value: Any) -> bool:
    """Whether ``value`` is one whose attributes towers get copies of.

    A dataclass's or a SimpleNamespace; the handle of a hook; an object of any class that a forward has made for its
    module. Only of classes that make their objects as Python does: a singleton, an Enum or a dict is something else
    besides.
    """
    kind = type(value)
    return kind is types.SimpleNamespace or (
        (dataclasses.is_dataclass(kind) or kind is RemovableHandle or id(value) in _made) and _is_plain(value)
    )


_made: dict[int, weakref.ref[Any]] = {}


def note_made(value: Any) -> None:
    """Let towers get copies of an object from now on: it leads to its module, and a forward has made it."""
    key = id(value)
    with suppress(TypeError):  # there are no weak references to some
        _made[key] = weakref.ref(value, lambda reference: _made.pop(key, None))


def note_alike(value: Any, twin: Any) -> None:
    """The same of the copy of an object, if it is one of these."""
    if id(value) in _made:
        note_made(twin)


def _is_plain(value: Any) -> bool:
    kind: Any = type(value)
    return (
        kind.__new__ is object.__new__
        and not isinstance(value, (nn.Module, MutableMapping))
        and type(getattr(value, "__dict__", None)) is dict
        and not any(getattr(base, "__slots__", ()) for base in kind.__mro__)
    )


def container_of(value: Any) -> Any:
    """What is watched of an attribute's value: a small list, dict or the like itself, the attributes of a record."""
    if type(value) in CONTAINERS:
        return None if is_table(value) else value
    return vars(value) if is_record(value) else None


def is_plain_tuple(kind: type) -> bool:
    """Whether copies of such tuples can be made: of tuples and named tuples."""
    return kind is tuple or (issubclass(kind, tuple) and hasattr(kind, "_fields"))


def parts_of(value: Any, *, deep: bool = False) -> list[Any] | None:
    """What a value holds, where copies of such values can be made; None where they cannot.

    Args:
        value: anything.
        deep: also what an object holds of which its class alone can make a copy, as it is of those that a forward has
            made.
    """
    kind = type(value)
    if isinstance(value, (Tensor, nn.Module, type, types.ModuleType)):
        return None
    if kind is defaultdict:
        return [*value.keys(), *value.values(), value.default_factory]
    if kind in _DICTS:
        return [*value.keys(), *value.values()]
    if kind in CONTAINERS or isinstance(value, (tuple, frozenset)):
        return list(iter(value))  # a subclass may have no length
    if kind is types.FunctionType:
        keywords = value.__kwdefaults__ or {}
        contents = map(cell_content, value.__closure__ or ())
        return [*contents, *(value.__defaults__ or ()), *keywords.values(), *value.__dict__.values()]
    if kind is functools.partial:
        return [value.func, *value.args, *value.keywords.values()]
    if kind is types.MethodType:
        return [value.__self__, value.__func__]
    if kind in BOUND and (type(value.__self__) in CONTAINERS or isinstance(value.__self__, Tensor)):
        return [value.__self__]
    if kind is weakref.ref:
        return [value()]
    if kind is weakref.WeakMethod:  # makes a new method at each call
        return [getattr(value(), "__self__", None)]
    if is_record(value):
        return list(vars(value).values())
    return [part for _, _, part in entries_of(value)] if deep or id(value) in _made else None


def is_foreign(value: Any) -> bool:
    """Whether copies of such a value can be made by its class alone."""
    return parts_of(value) is None or id(value) in _made


def entries_of(value: Any) -> Iterator[tuple[str, Any, Any]]:
    """What a foreign object holds: among its items, attributes or slots, under which key, and what."""
    if isinstance(value, MutableMapping):
        yield from (("items", key, part) for key, part in list(islice(value.items(), SMALL)))
    elif isinstance(value, (list, deque)):
        yield from (("items", index, part) for index, part in enumerate(islice(value, SMALL)))
    if type(attributes := getattr(value, "__dict__", None)) is dict:
        yield from (("attributes", name, part) for name, part in list(attributes.items()))
    for name in slots_of(value):
        yield "slots", name, getattr(value, name)


def slots_of(value: Any) -> list[str]:
    """Those of an object's slots that are filled."""
    slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    names = chain.from_iterable([each] if isinstance(each, str) else each for each in slots)
    return [name for name in dict.fromkeys(names) if name not in ("__dict__", "__weakref__") and hasattr(value, name)]


def tensors_within(value: Any, most: int = MANY, stops: Container[int] = ()) -> list[Tensor]:
    """The tensors in a value, each once, however deep.

    Args:
        value: anything.
        most: where it leads to more than so many objects, some of the tensors are found.
        stops: ids of what is not looked into.
    """
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    pending = [value]
    while pending and len(seen) < most:
        part = pending.pop()
        if isinstance(part, Tensor):
            found[id(part)] = part
        elif type(part) not in ATOMS and id(part) not in seen and id(part) not in stops:
            seen.add(id(part))
            if not leads_nowhere(part):
                pending.extend(parts_of(part, deep=True) or ())
    return list(found.values())


def leads_nowhere(value: Any) -> bool:
    """Whether a container holds nothing but numbers, strings and the like, and tuples of these."""
    return type(value) in _LISTED and holds_only(value, ATOMS)


def cell_content(cell: types.CellType) -> Any:
    """What a function closes over; None of a cell that is not filled yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None

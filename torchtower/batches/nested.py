"""Containers in containers, walked and made anew: what a batch, and what an output, is nested in.

Tuples, named tuples, lists, dicts and their subclasses, dataclasses, SimpleNamespaces; all else stays the very same
object.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from operator import is_
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torchtower.parts import ATOMS, is_record


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor of a nested structure, in the order in which `map_tensors` meets them."""
    found: list[Tensor] = []
    _add_tensors_in(value, found)
    return found


def _add_tensors_in(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    else:
        for child in children_of(value) or ():
            _add_tensors_in(child, found)


def map_tensors(
    function: Callable[[Tensor], Any], value: Any, of_other: Callable[[Any], Any] = lambda other: other
) -> Any:
    """Rebuild a nested structure with ``function`` of each tensor; all else stays the very same object.

    Args:
        function: of each tensor.
        value: the structure.
        of_other: what takes the place of an empty container, and of whatever is neither container nor tensor.
    """
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is tuple:  # most batches are made of these and tensors alone
        return tuple([function(v) if isinstance(v, Tensor) else map_tensors(function, v, of_other) for v in value])
    children = children_of(value)
    if not children:
        return of_other(value)
    return rebuild(value, children, [map_tensors(function, child, of_other) for child in children])


def children_of(value: Any) -> list[Any] | None:
    """The values in a container; None for whatever is no container."""
    kind = type(value)
    if kind is tuple or kind is list:  # of most batches nothing else is asked
        return list(value)
    if kind is dict:
        return list(value.values())
    if kind in ATOMS:
        return None
    if isinstance(value, PackedSequence):
        raise ValueError(
            "TowerParallel: expected tensors that can be split by rows, but got a PackedSequence; "
            "pass the padded tensor and its lengths, and pack inside the module (what is padded again there needs "
            "total_length=x.size(1), since towers' longest rows differ)"
        )
    if isinstance(value, (tuple, list, Mapping)):
        entries = _entries(value)
        return entries + [vars(value)[name] for name in _attributes(value, entries)]
    if isinstance(value, SimpleNamespace) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return [getattr(value, name) for name in _fields(value)]
    return None


def names_of(value: Any) -> list[Any]:
    """By which keys, positions or names a container's values are reached, in the order of `children_of`."""
    if isinstance(value, (tuple, list, Mapping)):
        entries = _entries(value)
        keys = value.keys() if isinstance(value, Mapping) else getattr(value, "_fields", range(len(entries)))
        return [*keys, *_attributes(value, entries)]
    return _fields(value)


def _entries(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, Mapping) else value)


def _attributes(value: Any, entries: list[Any]) -> list[str]:
    """Which attributes of a container hold tensors that are no entries, under names that are no keys."""
    attributes = getattr(value, "__dict__", None)
    if not attributes or attributes is value:
        return []
    known = set(map(id, entries))
    names = [name for name, part in attributes.items() if isinstance(part, Tensor) and id(part) not in known]
    return [name for name in names if name not in value.keys()] if isinstance(value, Mapping) else names  # noqa: SIM118


def _fields(value: Any) -> list[str]:
    if isinstance(value, SimpleNamespace):
        return list(vars(value))
    # A field may have no value yet (``field(init=False)``); what ``__post_init__`` makes of the rows may be none.
    fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    others = getattr(value, "__dict__", {}).items()
    return fields + [name for name, part in others if isinstance(part, Tensor) and name not in fields]


def rebuild(value: Any, before: list[Any], children: list[Any]) -> Any:
    """A container like ``value`` of other values.

    Args:
        value: the container.
        before: its `children_of`.
        children: what takes their places.

    Raises:
        TypeError: a container of a class of the user's that cannot be made anew.
    """
    kind = type(value)
    if kind is tuple:
        return tuple(children)
    if kind is list:
        return children
    if kind is dict:
        return dict(zip(value, children, strict=True))
    if (
        isinstance(value, (tuple, Mapping))
        and not isinstance(value, MutableMapping)
        and all(map(is_, before, children))
    ):
        return value
    if not isinstance(value, (tuple, list, Mapping)):
        return _rebuild_record(value, children)
    count = len(_entries(value))
    rebuilt = _rebuild_entries(value, before[:count], children[:count])
    attributes = getattr(value, "__dict__", None)
    if attributes and attributes is not value:
        new = {id(old): child for old, child in zip(before, children, strict=True)}
        for name, old in attributes.items():
            if id(old) in new and vars(rebuilt).get(name, old) is old:  # else its class has made it of the new entries
                vars(rebuilt)[name] = new[id(old)]
    return rebuilt


def _rebuild_entries(value: Any, before: list[Any], children: list[Any]) -> Any:
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, before, children)
    if isinstance(value, tuple):
        return rebuild_tuple(value, children)
    rebuilt = copy.copy(value)
    rebuilt[:] = children
    return rebuilt


def _rebuild_record(value: Any, children: list[Any]) -> Any:
    if is_record(value) and type(value) is not SimpleNamespace:  # none of the class's own code is run
        rebuilt = object.__new__(type(value))
        vars(rebuilt).update(vars(value))
    else:
        rebuilt = copy.copy(value)
    for name, child in zip(_fields(value), children, strict=True):
        object.__setattr__(rebuilt, name, child)  # frozen dataclasses refuse setattr
    return rebuilt


def rebuild_tuple(value: tuple[Any, ...], children: list[Any]) -> Any:
    """A tuple of the same class of other values, whatever that class makes its own of."""
    make = getattr(type(value), "_make", type(value))  # a named tuple's
    attributes = getattr(value, "__dict__", {})
    with suppress(Exception):
        rebuilt = make(children)
        if list(map(id, iter(rebuilt))) == list(map(id, children)):
            if attributes:
                vars(rebuilt).update((n, part) for n, part in attributes.items() if not isinstance(part, Tensor))
            return rebuilt
    rebuilt = tuple.__new__(type(value), children)  # its class makes it of something else
    if attributes:
        vars(rebuilt).update(attributes)
    return rebuilt


def _rebuild_mapping(value: Mapping[Any, Any], before: list[Any], children: list[Any]) -> Any:
    keys = list(value.keys())
    changes = [(k, old, new) for k, old, new in zip(keys, before, children, strict=True) if new is not old]
    owned = [(key, old) for key, old, _ in changes if value[key] is old]  # a mapping may make its values at each access
    refusal = TypeError(
        f"TowerParallel: expected a {type(value).__name__} to be one that can be made anew of other values, but what "
        "came of it does not hold them, or is not apart from the first; use a dict"
    )
    try:
        rebuilt = _written_copy(value, changes) if isinstance(value, MutableMapping) else None
        if rebuilt is None:
            rebuilt = type(value)(dict(zip(keys, children, strict=True)))  # type: ignore[call-arg]
    except Exception as error:
        raise refusal from error
    is_apart = all(value[key] is old for key, old in owned)
    if is_apart and all(key in rebuilt.keys() for key, _, _ in changes):  # noqa: SIM118  (a TensorDict has no `in`)
        return rebuilt
    if not is_apart and isinstance(value, MutableMapping):
        value.update(owned)
    raise refusal


def _written_copy(value: MutableMapping[Any, Any], changes: list[tuple[Any, Any, Any]]) -> Any:
    """A copy with some values exchanged; None of what refuses to be written to."""
    attributes = getattr(value, "__dict__", {})
    with suppress(TypeError):
        rebuilt: Any = copy.copy(value)  # keeps a default_factory and whatever else a subclass carries
        if attributes is value:  # its items are its attributes
            rebuilt.__dict__ = rebuilt
        elif not isinstance(value, dict):  # it may have its items in an attribute, which copying has shared
            for name, part in attributes.items():
                if isinstance(part, MutableMapping) and getattr(rebuilt, name, None) is part:
                    rebuilt.__dict__[name] = copy.copy(part)
        for key, _, new in changes:
            rebuilt[key] = new
        if isinstance(rebuilt, OrderedDict):  # a class may copy itself in another order
            for key in value:
                OrderedDict.move_to_end(rebuilt, key)
        return rebuilt
    return None

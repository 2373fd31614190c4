"""Containers in containers, walked and made anew: what a batch, and what an output, is nested in.

Tuples, named tuples, lists, dicts and their subclasses, dataclasses, SimpleNamespaces; all else stays the very same
object.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from operator import is_
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torchtower.parts import is_record


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor of a nested structure, in the order in which `map_tensors` meets them."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for child in children_of(value) or () for tensor in tensors_in(child)]


def map_tensors(
    function: Callable[[Tensor], Any], value: Any, of_empty: Callable[[Any], Any] = lambda empty: empty
) -> Any:
    """Rebuild a nested structure with ``function`` of each tensor; all else stays the very same object.

    Args:
        function: of each tensor.
        value: the structure.
        of_empty: what takes the place of an empty container.
    """
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is tuple and value:  # most batches are made of these and tensors alone
        return tuple([map_tensors(function, child, of_empty) for child in value])
    children = children_of(value)
    if not children:
        return value if children is None else of_empty(value)
    return rebuild(value, [map_tensors(function, child, of_empty) for child in children])


def children_of(value: Any) -> list[Any] | None:
    """The values in a container; None for whatever is no container."""
    if type(value) in (tuple, list):  # of most batches nothing else is asked
        return list(value)
    if type(value) is dict:
        return list(value.values())
    if isinstance(value, PackedSequence):
        raise ValueError(
            "TowerParallel: expected tensors that can be split by rows, but got a PackedSequence; "
            "pass the padded tensor and its lengths, and pack inside the module"
        )
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, SimpleNamespace) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return [getattr(value, name) for name in _fields(value)]
    return None


def names_of(value: Any) -> list[Any]:
    """By which keys, positions or names a container's values are reached, in the order of `children_of`."""
    if isinstance(value, Mapping):
        return list(value)
    if isinstance(value, (tuple, list)):
        return list(getattr(value, "_fields", range(len(value))))
    return _fields(value)


def _fields(value: Any) -> list[str]:
    if isinstance(value, SimpleNamespace):
        return list(vars(value))
    # A field may have no value yet (``field(init=False)``); what ``__post_init__`` makes of the rows may be none.
    fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    others = getattr(value, "__dict__", {}).items()
    return fields + [name for name, part in others if isinstance(part, Tensor) and name not in fields]


def rebuild(value: Any, children: list[Any]) -> Any:
    """A container like ``value`` of other values, in the order of `children_of`.

    Raises:
        TypeError: a container of a class of the user's that cannot be made anew.
    """
    if type(value) is tuple:
        return tuple(children)
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, children)
    if isinstance(value, tuple):
        return _rebuild_tuple(value, children)
    if isinstance(value, list):
        if type(value) is list:
            return children
        rebuilt = copy.copy(value)
        rebuilt[:] = children
        return rebuilt
    if is_record(value) and type(value) is not SimpleNamespace:  # none of the class's own code is run
        rebuilt = object.__new__(type(value))
        vars(rebuilt).update(vars(value))
    else:
        rebuilt = copy.copy(value)
    for name, child in zip(_fields(value), children, strict=True):
        object.__setattr__(rebuilt, name, child)  # frozen dataclasses refuse setattr
    return rebuilt


def _rebuild_tuple(value: tuple[Any, ...], children: list[Any]) -> Any:
    if all(map(is_, value, children)):
        return value
    make = getattr(type(value), "_make", type(value))  # a named tuple's
    with suppress(TypeError):
        if all(map(is_, rebuilt := make(children), children)):
            return rebuilt
    rebuilt = tuple.__new__(type(value), children)  # its class makes it of something else
    vars(rebuilt).update(vars(value))
    return rebuilt


def _rebuild_mapping(value: Mapping[Any, Any], children: list[Any]) -> Any:
    before = dict(value.items())
    items = dict(zip(before, children, strict=True))
    if type(value) is dict:
        return items
    if not isinstance(value, MutableMapping) and all(map(is_, before.values(), children)):
        return value
    rebuilt = None
    if isinstance(value, MutableMapping):
        with suppress(TypeError):  # of a dict that refuses to be written to
            rebuilt = _refilled(value, items)
    if rebuilt is None:
        rebuilt = type(value)(items)  # type: ignore[call-arg]
    if not (_holds(value, before) and _holds(rebuilt, items)):
        if isinstance(value, MutableMapping):
            value.update(before)
        raise TypeError(
            f"TowerParallel: expected a {type(value).__name__} to be one that can be made anew of other values, but "
            "what came of it does not hold them, or is not apart from the first; use a dict"
        )
    return rebuilt


def _holds(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> bool:
    return all(mapping.get(key) is value for key, value in items.items())


def _refilled(value: MutableMapping[Any, Any], items: dict[Any, Any]) -> Any:
    rebuilt: Any = copy.copy(value)  # keeps a default_factory and whatever else a subclass carries
    attributes = getattr(value, "__dict__", {})
    if attributes is value:  # its items are its attributes
        rebuilt.__dict__ = rebuilt
    elif not isinstance(value, dict):  # it may have its items in an attribute, which copying has shared
        for name, part in attributes.items():
            if isinstance(part, MutableMapping) and getattr(rebuilt, name, None) is part:
                rebuilt.__dict__[name] = copy.copy(part)
    for key, child in items.items():
        if rebuilt[key] is not child:
            rebuilt[key] = child
        if isinstance(child, Tensor) and attributes.get(key) is value[key]:  # an attribute, too
            rebuilt.__dict__[key] = child
    return rebuilt

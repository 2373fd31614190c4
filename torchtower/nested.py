"""Containers in containers, walked and made anew: what a batch, and what an output, is nested in.

Tuples, named tuples, lists, dicts and their subclasses, dataclasses, SimpleNamespaces; all else stays the very same
object.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor of a nested structure, in the order in which `map_tensors` meets them."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(collect, value)
    return found


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
    """A container like ``value`` of other values, in the order of `children_of`."""
    if type(value) is tuple:
        return tuple(children)
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, children)
    if isinstance(value, tuple):
        make = getattr(type(value), "_make", type(value))  # a named tuple's
        return make(children)
    if isinstance(value, list):
        if type(value) is list:
            return children
        rebuilt = copy.copy(value)
        rebuilt[:] = children
        return rebuilt
    rebuilt = copy.copy(value)
    for name, child in zip(_fields(value), children, strict=True):
        object.__setattr__(rebuilt, name, child)  # frozen dataclasses refuse setattr
    return rebuilt


def _rebuild_mapping(value: Mapping[Any, Any], children: list[Any]) -> Any:
    items = dict(zip(value, children, strict=True))
    if type(value) is dict:
        return items
    if not isinstance(value, MutableMapping):
        return type(value)(items)  # type: ignore[call-arg]
    rebuilt: Any = copy.copy(value)  # keeps a default_factory and whatever else a subclass carries
    attributes = getattr(value, "__dict__", {})
    if attributes is value:  # its items are its attributes
        rebuilt.__dict__ = rebuilt
    for key, child in items.items():
        if rebuilt[key] is not child:
            rebuilt[key] = child
        if isinstance(child, Tensor) and attributes.get(key) is value[key]:  # an attribute, too
            rebuilt.__dict__[key] = child
    return rebuilt

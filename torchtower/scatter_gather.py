"""Nested batches in, outputs back: split every tensor by rows over the towers, join what the towers return.

Both walk containers of any depth (tuples, named tuples, lists, dicts and their subclasses, dataclasses,
SimpleNamespaces) and hand each tensor to a function; what the tensors mean to autograd is the bridge's business.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Set, ValuesView
from io import IOBase
from itertools import islice
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torchtower.parts import cell_content


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
    children = _children(value)
    if not children:
        return value if children is None else of_empty(value)
    return _rebuild(value, [map_tensors(function, child, of_empty) for child in children])


def _children(value: Any) -> list[Any] | None:
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


def _fields(value: Any) -> list[str]:
    if isinstance(value, SimpleNamespace):
        return list(vars(value))
    # A field may have no value yet (``field(init=False)``); what ``__post_init__`` makes of the rows may be none.
    fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    others = getattr(value, "__dict__", {}).items()
    return fields + [name for name, part in others if isinstance(part, Tensor) and name not in fields]


def _rebuild(value: Any, children: list[Any]) -> Any:
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


@dataclasses.dataclass
class Splits:
    """How one batch is cut: which rows of its tensors each tower gets.

    ``rows[t]`` is tower ``t``'s number of rows, that of the longest tensor where they differ; towers that got none are
    left out.
    """

    dim: int
    rows: list[int]

    def parts(self, tensor: Tensor) -> list[Tensor] | None:
        """``tensor`` cut along ``dim`` for each tower; None where every tower gets it whole.

        Cut as evenly as rows allow, the first towers getting one more. A tensor without the dimension, or with one row
        where others have more, is for everybody, as in PyTorch's broadcasting.
        """
        num_towers = len(self.rows)
        if num_towers == 1 or (size := _size(tensor, self.dim)) < 2:
            return None
        return list(tensor.split_with_sizes(even_sizes(size, num_towers), self.dim))


@functools.lru_cache
def even_sizes(rows: int, num_towers: int) -> tuple[int, ...]:
    """Rows a tower: 9 over 4 are 3, 2, 2, 2 (``chunk`` gives 3, 3, 3 and nothing)."""
    share, rest = divmod(rows, num_towers)
    return tuple(share + (tower < rest) for tower in range(num_towers))


def plan_splits(tensors: Sequence[Tensor], num_towers: int, dim: int) -> Splits:
    """Decide how many towers work on a batch of these tensors, and on how many rows each.

    A batch without rows to split (none, one, no tensor at all) goes to the main tower as it is.

    Raises:
        ValueError: a sparse or nested tensor.
    """
    for tensor in tensors:
        if tensor.is_nested or tensor.layout is not torch.strided:
            raise ValueError(
                "TowerParallel: expected tensors that can be split by rows, but got a "
                f"{'nested' if tensor.is_nested else tensor.layout} one; pass a dense one, or make it a buffer"
            )
    sizes = [_size(tensor, dim) for tensor in tensors]
    split = [size for size in sizes if size > 1]
    if not split:
        return Splits(dim, [max(sizes, default=1)])
    return Splits(dim, list(even_sizes(max(split), min(num_towers, *split))))


def _size(tensor: Tensor, dim: int) -> int:
    shape = tensor.shape
    return shape[dim] if -len(shape) <= dim < len(shape) else -1


class Column(NamedTuple):
    """One field's tensors."""

    path: str  # where in the output, for error messages
    parts: list[Tensor]  # in tower order


def gather_structure(outputs: Sequence[Any], join: Callable[[list[Column]], Iterable[Any]]) -> Any:
    """Join the towers' outputs field by field, types kept.

    Args:
        outputs: one nested structure a tower that worked.
        join: makes one value of each field's tensors, of all fields at once.

    Raises:
        ValueError: the towers' outputs differ in structure, or in something that is no tensor.
        TypeError: a nested tensor, or an object that holds tensors and cannot be made from what it yields.
    """
    columns: list[Column] = []
    make = _take_apart(outputs, columns, "the output")
    return make(iter(join(columns)))


def _take_apart(outputs: Sequence[Any], columns: list[Column], path: str) -> Callable[[Iterator[Any]], Any]:
    """Add the columns of what stands at ``path``; returns what makes the whole of one value for each of them."""
    first = outputs[0]
    if isinstance(first, Tensor):
        if first.is_nested:
            raise TypeError(f"TowerParallel: expected {path} to be a tensor with rows, but got a nested one")
        for tower, other in enumerate(outputs):
            if not isinstance(other, Tensor):
                raise ValueError(_differ(path, "a tensor", tower, f"{type(other).__name__}"))
        columns.append(Column(path, list(outputs)))
        return next
    children = [None if isinstance(output, PackedSequence) else _children(output) for output in outputs]
    if children[0] is None:
        if _holds_tensors(first):
            return _take_apart_elements(outputs, columns, path)
        _check_same_everywhere(outputs, path)
        return lambda values: first
    names = _names(first)
    for tower, (output, child) in enumerate(zip(outputs, children, strict=True)):
        if type(output) is not type(first) or child is None or not _same_names(_names(output), first, names):
            raise ValueError(_differ(path, _tell(first), tower, _tell(output)))
    if isinstance(first, Mapping):  # in whatever order a tower has filled its own
        children = [[output[name] for name in names] for output in outputs]
    fields = zip(*[child for child in children if child is not None], strict=True)
    makes = [_take_apart(field, columns, f"{path}[{name!r}]") for name, field in zip(names, fields, strict=True)]
    return lambda values: _rebuild(first, [make(values) for make in makes])


def check_rows_fit(column: Column, dim: int) -> None:
    """See that the towers' tensors can be joined along ``dim``: alike in every other dimension, or all 0-d.

    Raises:
        ValueError: they cannot; the message names field and tower.
    """
    path, parts = column
    first = parts[0]
    if first.dim() and _size(first, dim) < 0:
        raise ValueError(
            f"TowerParallel: expected {path} to have dimension {dim}, along which towers' outputs are joined, "
            f"but its shape is {tuple(first.shape)}"
        )
    for tower, part in enumerate(parts):
        if part.dim() != first.dim() or (part.dim() and _without(part, dim) != _without(first, dim)):
            raise ValueError(_differ(path, f"of shape {tuple(first.shape)}", tower, f"of shape {tuple(part.shape)}"))


def _without(tensor: Tensor, dim: int) -> list[int]:
    sizes = list(tensor.shape)
    del sizes[dim]
    return sizes


def _names(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value)
    if isinstance(value, (tuple, list)):
        return list(getattr(value, "_fields", range(len(value))))
    return _fields(value)


def _same_names(names: list[Any], first: Any, expected: list[Any]) -> bool:
    return names == expected or (isinstance(first, Mapping) and set(names) == set(expected))


def _take_apart_elements(outputs: Sequence[Any], columns: list[Column], path: str) -> Callable[[Iterator[Any]], Any]:
    """Join objects that hold tensors by what they yield, and make one of that: nn.DataParallel's rule.

    That is how a transformer's cache of keys and values travels.
    """
    first = outputs[0]
    kind = type(first)
    refusal = TypeError(
        f"TowerParallel: expected {path} to be of tensors in tuples, lists, dicts or dataclasses, which can be "
        f"joined, but got a {kind.__name__} that holds tensors; return these"
    )
    if not hasattr(kind, "__iter__") or isinstance(first, (Iterator, Set, PackedSequence)):
        raise refusal
    if not any(map(_holds_tensors, first)):  # it yields something else, its keys say
        raise refusal
    for tower, other in enumerate(outputs):
        if type(other) is not kind:
            raise ValueError(_differ(path, f"a {kind.__name__}", tower, f"a {type(other).__name__}"))
    make_elements = _take_apart([list(iter(output)) for output in outputs], columns, path)

    def make(values: Iterator[Any]) -> Any:
        elements = make_elements(values)
        try:
            return kind(elements)
        except Exception as error:
            raise refusal from error

    return make


def _check_same_everywhere(outputs: Sequence[Any], path: str) -> None:
    first = outputs[0]
    for tower, other in enumerate(outputs):
        if other is not first and (type(other) is not type(first) or not _equal(first, other)):
            raise ValueError(_differ(path, repr(first), tower, repr(other)))


def _holds_tensors(value: Any) -> bool:
    """Whether an object leads to a tensor: by attributes, containers or what a function closes over."""
    if isinstance(value, Iterator) and not isinstance(value, IOBase):  # what it will yield, nobody knows
        return True
    seen: set[int] = set()
    pending = [value]
    while pending and len(seen) < _MANY:
        value = pending.pop()
        if isinstance(value, Tensor):
            return True
        if id(value) in seen or isinstance(value, (*_PLAIN, nn.Module, type, ModuleType)):
            continue
        seen.add(id(value))
        pending.extend(_held_by(value))
    return False


# Neither these nor the parts of a larger container than this are looked into for tensors.
_PLAIN = (int, float, complex, str, bytes, type(None), torch.device, torch.dtype)
_LARGE = 64
_MANY = 1024  # objects, after which the search is given up


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, (Mapping, ValuesView)):
        return list(islice(value.values() if isinstance(value, Mapping) else value, _LARGE))
    if isinstance(value, (tuple, list, set, frozenset, deque)):
        return list(islice(value, _LARGE))
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    parts = [getattr(value, name) for name in slots if isinstance(name, str) and hasattr(value, name)]
    parts.extend(getattr(value, "__dict__", {}).values())
    parts.extend(cell_content(cell) for cell in getattr(value, "__closure__", None) or ())
    return parts


def _equal(first: Any, other: Any) -> bool:
    # Objects without an __eq__ of their own are as alike as one can tell.
    if "__eq__" not in _defined_by(type(first)):
        return True
    if getattr(first, "shape", None) != getattr(other, "shape", None):
        return False
    equal = first == other
    if hasattr(equal, "all"):  # an array
        return bool(equal.all())
    return bool(equal) or bool(first != first and other != other)  # not a number is like not a number


def _defined_by(kind: type) -> set[str]:
    return {name for base in kind.__mro__ if base is not object for name in vars(base)}


def _tell(value: Any) -> str:
    children = _children(value)
    if children is None or isinstance(value, Tensor):
        return type(value).__name__
    return f"{type(value).__name__} of {_names(value)}"


def _differ(path: str, expected: str, tower: int, got: str) -> str:
    return (
        f"TowerParallel: expected {path} of every tower to be alike, {expected} as tower 0's, "
        f"but tower {tower}'s is {got}"
    )


def cat_rows(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Join the towers' rows; 0-d tensors become a vector with one element a tower, as nn.DataParallel's do."""
    if all(part.dim() == 0 for part in parts):
        return torch.stack(list(parts))
    return torch.cat(list(parts), dim)

"""The towers' outputs joined field by field."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from io import IOBase
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torchtower.batches.nested import children_of, names_of, rebuild
from torchtower.batches.scatter import size_along
from torchtower.parts import tensors_within

_VIEWS = (ItemsView, ValuesView)  # of a dict
_JOINED = (torch.strided, torch.sparse_coo)  # layouts that torch.cat takes
_PAD = (
    "; what a tower pads to its own longest row wants one length (pad_packed_sequence: total_length=x.size(1)), and "
    "what has its rows elsewhere (an RNN's last state) is to be returned transposed"
)
_MOST_SHOWN = 200  # characters of a value, in an error


class Column(NamedTuple):
    """One field's tensors."""

    path: str  # where in the output, for error messages
    parts: list[Tensor]  # in tower order


def gather_structure(
    outputs: Sequence[Any],
    join: Callable[[list[Column]], Iterable[Any]],
    to_user: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """Join the towers' outputs field by field, types kept.

    Args:
        outputs: one nested structure a tower that worked.
        join: makes one value of each field's tensors, of all fields at once.
        to_user: what the user gets of what is alike in every tower and no tensor.

    Raises:
        ValueError: the towers' outputs differ in structure, or in something that is no tensor.
        TypeError: a nested, compressed or mkldnn tensor; an object that holds tensors and cannot be made from what it
            yields.
    """
    columns: list[Column] = []
    make = _take_apart(outputs, columns, "the output", to_user)
    return make(iter(join(columns)))


def _take_apart(
    outputs: Sequence[Any], columns: list[Column], path: str, to_user: Callable[[Any], Any]
) -> Callable[[Iterator[Any]], Any]:
    """Add the columns of what stands at ``path``; returns what makes the whole of one value for each of them."""
    first = outputs[0]
    if isinstance(first, Tensor):
        if first.is_nested or (len(outputs) > 1 and first.layout not in _JOINED):
            got = "a nested" if first.is_nested else f"a {first.layout}"
            raise TypeError(f"TowerParallel: expected {path} to be a tensor with rows, but got {got} one")
        for tower, other in enumerate(outputs):
            if not isinstance(other, Tensor):
                raise ValueError(_differ(path, "a tensor", tower, f"{type(other).__name__}"))
        columns.append(Column(path, list(outputs)))
        return next
    children = [None if isinstance(output, PackedSequence) else children_of(output) for output in outputs]
    if children[0] is None:
        if _holds_tensors(first):
            return _take_apart_elements(outputs, columns, path, to_user)
        _check_same_everywhere(outputs, path)
        return lambda values: to_user(first)
    names = names_of(first)
    for tower, (output, child) in enumerate(zip(outputs, children, strict=True)):
        if not _is_of_kind(output, first) or child is None or not _same_names(names_of(output), first, names):
            hint = "; stack what is one a row" if type(output) is type(first) is list else ""
            raise ValueError(_differ(path, _tell(first), tower, _tell(output)) + hint)
    if isinstance(first, Mapping):  # in whatever order a tower has filled its own
        by_name = [
            dict(zip(names_of(out), child or (), strict=True)) for out, child in zip(outputs, children, strict=True)
        ]
        children = [[found[name] for name in names] for found in by_name]
    fields = zip(*[child for child in children if child is not None], strict=True)
    makes = [
        _take_apart(field, columns, f"{path}[{name!r}]", to_user) for name, field in zip(names, fields, strict=True)
    ]
    before = children[0] or []
    return lambda values: rebuild(first, before, [make(values) for make in makes])


def check_rows_fit(column: Column, dim: int) -> None:
    """See that the towers' tensors can be joined along ``dim``: alike in every other dimension, or all 0-d.

    Raises:
        ValueError: they cannot; the message names field and tower.
    """
    path, parts = column
    first = parts[0]
    if first.dim() and size_along(first, dim) < 0:
        raise ValueError(
            f"TowerParallel: expected {path} to have dimension {dim}, along which towers' outputs are joined, "
            f"but its shape is {tuple(first.shape)}"
        )
    expected = _without(first, dim)
    for tower, part in enumerate(parts):
        if part is not first and (part.dim() != first.dim() or _without(part, dim) != expected):
            words = _differ(path, f"of shape {tuple(first.shape)}", tower, f"of shape {tuple(part.shape)}")
            raise ValueError(words + (_PAD if part.dim() == first.dim() else ""))


def _without(tensor: Tensor, dim: int) -> list[int]:
    sizes = list(tensor.shape)
    if sizes:
        del sizes[dim]
    return sizes


def _is_of_kind(value: Any, first: Any) -> bool:
    """Whether two are of one class, or of two made alike (a named tuple's, in every forward)."""
    kind, other = type(value), type(first)
    return kind is other or (kind.__module__, kind.__qualname__, kind.__bases__) == (
        other.__module__,
        other.__qualname__,
        other.__bases__,
    )


def _same_names(names: list[Any], first: Any, expected: list[Any]) -> bool:
    return names == expected or (isinstance(first, Mapping) and set(names) == set(expected))


def _take_apart_elements(
    outputs: Sequence[Any], columns: list[Column], path: str, to_user: Callable[[Any], Any]
) -> Callable[[Iterator[Any]], Any]:
    """Join objects that hold tensors by what they yield, and make one of that: nn.DataParallel's rule.

    That is how a transformer's cache of keys and values travels.
    """
    first = outputs[0]
    kind = type(first)
    refusal = TypeError(
        f"TowerParallel: expected {path} to be of tensors in tuples, lists, dicts or dataclasses, which can be joined, "
        f"but got a {kind.__name__} that holds tensors; return these"
        + (", or leave it out (transformers: use_cache=False)" if kind.__name__.endswith("Cache") else "")
    )
    if not hasattr(kind, "__iter__") or isinstance(first, (Iterator, Set, PackedSequence)):
        raise refusal
    for tower, other in enumerate(outputs):
        if type(other) is not kind:
            raise ValueError(_differ(path, f"a {kind.__name__}", tower, f"a {type(other).__name__}"))
    try:
        yielded = [list(iter(output)) for output in outputs]
    except Exception as error:
        raise refusal from error
    if not any(map(_holds_tensors, yielded[0])):  # something else, its keys say
        raise refusal
    make_elements = _take_apart(yielded, columns, path, to_user)

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
            words = _differ(path, _shown(first), tower, _shown(other))
            raise ValueError(words + "; tensors may differ, and are joined")


def _holds_tensors(value: Any) -> bool:
    """Whether an object leads to a tensor."""
    if isinstance(value, Iterator) and not isinstance(value, IOBase):  # what it will yield, nobody knows
        return True
    return bool(tensors_within([*value] if isinstance(value, _VIEWS) else value))


def _equal(first: Any, other: Any) -> bool:
    if isinstance(first, MethodType):  # each of the tower's own module
        return first.__func__ is other.__func__
    # Objects without an __eq__ of their own are as alike as one can tell.
    if "__eq__" not in _defined_by(type(first)):
        return True
    if getattr(first, "shape", None) != getattr(other, "shape", None):
        return False
    equal = first == other
    # Not a number is like not a number.
    if hasattr(equal, "all"):  # an array
        return bool((equal | ((first != first) & (other != other))).all())
    return bool(equal) or bool(first != first and other != other)


def _defined_by(kind: type) -> set[str]:
    return {name for base in kind.__mro__ if base is not object for name in vars(base)}


def _tell(value: Any) -> str:
    children = children_of(value)
    if children is None:
        return type(value).__name__
    kind = type(value).__name__
    names = names_of(value)
    return f"{kind} of length {len(names)}" if names == list(range(len(names))) else f"{kind} of {names}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _differ(path: str, expected: str, tower: int, got: str) -> str:
    return (
        f"TowerParallel: expected {path} of every tower to be alike, {expected} as tower 0's, "
        f"but tower {tower}'s is {got}"
    )


def cat_rows(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Join the towers' rows; 0-d tensors become a vector with one element a tower, as nn.DataParallel's do."""
    if not any(map(Tensor.dim, parts)):
        return torch.stack(list(parts))
    return torch.cat(list(parts), dim)

"""`holds_only`: whether a container holds nothing but objects of some types, told without asking these."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from typing import Any

import pytest

from torchtower._extension import holds_only

TYPES = frozenset({int, str, type(None)})


class Number(int):
    """Of a type of its own."""


class Pair(tuple[int, int]):
    """Likewise."""


PLAIN: list[Any] = [
    [],
    [1, "a", None],
    (1, 2),
    {1, 2},
    frozenset({"a"}),
    deque([1]),
    {"a": 1, 2: "b"},
    OrderedDict(a=1),
    Counter("aab"),
    [(1, "a"), ((2,), ())],
    {(1, 2): ("a", None)},
    {},
]
OTHERS: list[Any] = [
    [1, 2.0],
    [1, Number(1)],
    [1, 2, [3]],
    ([],),
    [(1, 2.0)],
    [(1, [2])],
    [(1, (2, (object(),)))],
    [Pair((1, 2))],
    {1, 2.5},
    deque([object()]),
    {"a": 1.0},
    {1.5: 1},
    {"a": 1, "b": {}},
    OrderedDict(a=[]),
]


@pytest.mark.parametrize("container", PLAIN, ids=repr)
def test_what_holds_only_these_is_told(container: Any) -> None:
    assert holds_only(container, TYPES)


@pytest.mark.parametrize("container", OTHERS, ids=repr)
def test_one_of_another_type_is_found(container: Any) -> None:
    assert not holds_only(container, TYPES)


def test_the_last_of_many_is_looked_at() -> None:
    many: list[Any] = list(range(100_000))
    assert holds_only(many, TYPES)
    many[-1] = 1.0
    assert not holds_only(many, TYPES)
    assert not holds_only(dict(enumerate(many)), TYPES)


def test_what_is_no_container_is_refused() -> None:
    with pytest.raises(TypeError, match="holds_only: expected a container"):
        holds_only(1, TYPES)


def test_tuples_nested_deeper_than_the_stack_are_given_up() -> None:
    nested: Any = 1
    for _ in range(100_000):
        nested = (nested,)
    assert not holds_only([nested], TYPES)

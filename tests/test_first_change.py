"""`first_change`: which containers hold other objects than they held before, told without asking these."""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest

from torchtower._extension import first_change


class Silent:
    """Fails whoever compares it."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")


def contents(container: Any) -> tuple[Any, ...]:
    return tuple(chain.from_iterable(container.items()) if isinstance(container, dict) else container)


def same_contents(containers: list[Any], before: list[Any]) -> bool:
    return first_change(containers, before, 0) == len(containers)


A, B = Silent(), Silent()
MAKES: dict[str, Callable[[list[Any]], Any]] = {
    "dict": lambda held: dict(enumerate(held)),
    "ordered dict": lambda held: OrderedDict(enumerate(held)),
    "list": list,
    "tuple": tuple,
    "deque": deque,
}


@pytest.mark.parametrize("kind", MAKES)
def test_what_is_kept_added_removed_replaced_and_swapped_is_told(kind: str) -> None:
    make = MAKES[kind]
    before = [contents(make([])), contents(make([A, B]))]
    assert same_contents([make([]), make([A, B])], before)
    for held in ([A, Silent()], [A], [A, B, A], [B, A], []):
        assert not same_contents([make([]), make(held)], before)
    assert not same_contents([make([A]), make([A, B])], before)


def test_sets_are_told_by_their_members() -> None:
    held = {A, B}
    before = [contents(held)]
    assert same_contents([held], before)
    held.add(Silent())
    assert not same_contents([held], before)


def test_dicts_are_told_by_their_keys_too() -> None:
    before = [contents({"a": A, "b": B})]
    assert same_contents([{"a": A, "b": B}], before)
    for held in ({"a": A, "c": B}, {"b": A, "a": B}, {"b": B, "a": A}):
        assert not same_contents([held], before)


def test_equal_is_not_the_same() -> None:
    assert not same_contents([{"a": [1]}], [("a", [1])])
    assert not same_contents([[1000001]], [(int("1000001"),)])


def test_each_change_is_found_from_where_one_begins() -> None:
    before = [contents([A]) for _ in range(5)]
    held = [[A], [B], [A], [A, A], [A]]
    assert [first_change(held, before, begin) for begin in range(6)] == [1, 1, 3, 3, 5, 5]


def test_what_is_no_tuple_a_container_is_refused() -> None:
    with pytest.raises(TypeError, match="as many tuples as containers"):
        first_change([[A]], [], 0)
    with pytest.raises(TypeError, match="expected tuples"):
        first_change([[A]], [[A]], 0)  # type: ignore[list-item]


def test_no_reference_is_kept_or_lost() -> None:
    held = [dict.fromkeys(range(3), A), [A, A], deque([A]), {A}]
    before = [contents(container) for container in held]
    count = sys.getrefcount(A)
    for _ in range(100):
        assert same_contents(held, before)
        assert not same_contents(held, [*before[:3], (B,)])
    assert sys.getrefcount(A) == count

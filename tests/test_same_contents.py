"""`same_contents`: whether containers hold the very objects that they held before, told without asking these."""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest

from torchtower._extension import same_contents


class Silent:
    """Fails whoever compares it."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")


def contents(container: Any) -> tuple[Any, ...]:
    return tuple(chain.from_iterable(container.items()) if isinstance(container, dict) else container)


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


def test_lists_of_containers_of_different_lengths_are_not_the_same() -> None:
    assert not same_contents([[A]], [])
    with pytest.raises(TypeError, match="expected tuples"):
        same_contents([[A]], [[A]])  # type: ignore[list-item]


def test_no_reference_is_kept_or_lost() -> None:
    held = [dict.fromkeys(range(3), A), [A, A], deque([A]), {A}]
    before = [contents(container) for container in held]
    count = sys.getrefcount(A)
    for _ in range(100):
        assert same_contents(held, before)
        assert not same_contents(held, [*before[:3], (B,)])
    assert sys.getrefcount(A) == count

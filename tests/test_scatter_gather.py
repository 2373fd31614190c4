"""Nested batches are cut by rows, outputs joined field by field; these are the rules, without any tower."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchtower.batches.gather import gather_structure
from torchtower.batches.nested import map_tensors, tensors_in
from torchtower.batches.scatter import even_sizes, plan_splits


def cut(batch: Any, num_towers: int, dim: int = 0) -> list[Any]:
    splits = plan_splits(tensors_in(batch), num_towers, dim)

    def part_for(tower: int) -> Any:
        def part_of(tensor: Tensor) -> Tensor:
            parts = splits.parts(tensor)
            return tensor if parts is None else parts[tower]

        return map_tensors(part_of, batch)

    return [part_for(tower) for tower in range(len(splits.rows))]


def gather(outputs: list[Any], join: Callable[[list[Tensor], str], Any]) -> Any:
    return gather_structure(outputs, lambda columns: [join(parts, path) for path, parts in columns])


def rows(count: int, columns: int = 2) -> Tensor:
    return torch.arange(count * columns).view(count, columns)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 200), num_towers=st.integers(1, 16))
def test_rows_are_shared_out_evenly_and_in_order(count: int, num_towers: int) -> None:
    sizes = even_sizes(count, num_towers)
    assert sum(sizes) == count and len(sizes) == num_towers
    assert max(sizes) - min(sizes) <= 1 and list(sizes) == sorted(sizes, reverse=True)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), num_towers=st.integers(1, 8), dim=st.integers(-2, 1))
def test_the_parts_of_a_tensor_joined_are_the_tensor_and_none_is_empty(count: int, num_towers: int, dim: int) -> None:
    tensor = rows(count) if dim % 2 == 0 else rows(count).t()
    parts = cut(tensor, num_towers, dim)
    assert torch.equal(torch.cat(parts, dim) if len(parts) > 1 else parts[0], tensor)
    assert len(parts) == min(count, num_towers) and all(part.shape[dim] for part in parts)


def test_nine_rows_over_four_towers_are_three_two_two_two() -> None:
    assert [len(part) for part in cut(rows(9), 4)] == [3, 2, 2, 2]


@pytest.mark.parametrize("batch", [rows(0), rows(1), None, (), {"text": "x"}, torch.tensor(3.0), [1, 2, 3]])
def test_a_batch_without_rows_to_split_goes_to_the_main_tower_alone(batch: Any) -> None:
    (only,) = cut(batch, 4)
    if isinstance(batch, Tensor):
        assert only is batch
    else:
        assert only == batch


def test_tensors_of_different_lengths_are_each_split_evenly_over_as_many_towers_as_the_shortest_serves() -> None:
    parts = cut((rows(9), rows(3)), 4)
    assert [(len(a), len(b)) for a, b in parts] == [(3, 1), (3, 1), (3, 1)]
    assert plan_splits([rows(9), rows(3)], 4, 0).rows == [3, 3, 3]


def test_a_tensor_of_one_row_or_none_is_for_everybody() -> None:
    shared, scalar = rows(1), torch.tensor(1.0)
    for part in cut((rows(4), shared, scalar), 2):
        assert part[1] is shared and part[2] is scalar


def test_every_tower_gets_an_empty_tensor_whole() -> None:
    empty = torch.empty(0, 3)
    for part in cut((rows(4), empty), 2):
        assert part[1] is empty


def test_parts_are_views_not_copies() -> None:
    tensor = rows(6)
    assert [part.data_ptr() for part in cut(tensor, 2)] == [tensor.data_ptr(), tensor[3:].data_ptr()]


class Colour(enum.Enum):
    RED = 1


Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Record:
    x: Tensor
    more: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor


@dataclasses.dataclass
class Derived:
    x: Tensor
    derived: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.derived = self.x * 2


class Counted(list):
    pass


STRUCTURES = {
    "tuple": lambda t: (t, (t, 1)),
    "list": lambda t: [t, [t]],
    "list subclass": lambda t: Counted([t, t]),
    "dict": lambda t: {"a": t, 3: {"b": t}},
    "ordered": lambda t: OrderedDict([("z", t), ("a", t)]),
    "namedtuple": lambda t: Point(t, "y"),
    "dataclass": lambda t: Record(t, [t]),
    "frozen slots": lambda t: Slotted(t),
    "field not in init": lambda t: Derived(t),
    "size": lambda t: (t, torch.Size([2, 3])),
    "enum": lambda t: (t, Colour.RED, Colour),
    "class of dataclass": lambda t: (t, Record),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_containers_keep_their_type_and_what_is_no_tensor_its_identity(kind: str) -> None:
    whole = STRUCTURES[kind](rows(5))
    parts = cut(whole, 2)
    assert [type(part) for part in parts] == [type(whole)] * 2
    for tower, count in ((0, 3), (1, 2)):
        assert all(len(t) == count for t in tensors_in(parts[tower]))
        assert len(tensors_in(parts[tower])) == len(tensors_in(whole))
    assert all(len(t) == 5 for t in tensors_in(whole)), "the caller's structure is left alone"
    joined = gather(parts, lambda tensors, path: torch.cat(tensors))
    assert type(joined) is type(whole)
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(joined), tensors_in(whole), strict=True))


def test_gathering_names_the_path_of_every_field() -> None:
    paths = []
    outputs = [{"a": (rows(1), [rows(1)])}, {"a": (rows(1), [rows(1)])}]
    gather(outputs, lambda parts, path: paths.append(path))
    assert paths == ["the output['a'][0]", "the output['a'][1][0]"]


@pytest.mark.parametrize("value", [None, 3, 2.5, "text", True, torch.float32, torch.device("cpu"), Colour.RED, b"x"])
def test_what_is_no_tensor_must_be_alike_in_every_tower_and_stays(value: Any) -> None:
    assert gather([value, value], lambda parts, path: None) is value


def test_arrays_and_what_is_not_a_number_are_compared_by_value() -> None:
    array = np.arange(3)
    assert gather([array, np.arange(3)], lambda parts, path: None) is array
    with pytest.raises(ValueError, match="tower 1's is"):
        gather([array, np.ones(3)], lambda parts, path: None)
    for unknown in (float("nan"), np.float64("nan"), np.array([1.0, np.nan])):
        gather([unknown, unknown + 0], lambda parts, path: None)
    with pytest.raises(ValueError, match="tower 1's is"):
        gather([np.array([1.0, np.nan]), np.array([2.0, np.nan])], lambda parts, path: None)


def test_objects_without_equality_are_as_alike_as_one_can_tell() -> None:
    class Thing:
        pass

    first = Thing()
    assert gather([first, Thing()], lambda parts, path: None) is first


def test_objects_of_different_types_differ() -> None:
    with pytest.raises(ValueError, match=r"tower 1's is 1\.0"):
        gather([1, 1.0], lambda parts, path: None)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.ones(4, 3).to_sparse(), "torch.sparse_coo"),
        (torch.ones(4, 3).to_sparse_csr(), "torch.sparse_csr"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "nested"),
    ],
    ids=["coo", "csr", "nested"],
)
def test_what_has_no_rows_to_split_is_refused_by_its_kind(tensor: Tensor, kind: str) -> None:
    with pytest.raises(ValueError, match=f"that can be split by rows, but got a {kind} one"):
        plan_splits([tensor], 2, 0)


def test_towers_may_fill_their_dicts_in_any_order() -> None:
    outputs = [{"a": rows(1), "b": rows(1, 5)}, {"b": rows(2, 5), "a": rows(2)}]
    joined = gather(outputs, lambda parts, path: torch.cat(parts))
    assert list(joined) == ["a", "b"]
    assert joined["a"].shape == (3, *rows(1).shape[1:]) and joined["b"].shape == (3, 5)


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held


class Named:
    """Yields names, and can be made from nothing but a list."""

    def __init__(self, held: Any) -> None:
        self.held = {"a": held}

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)


class OfSlots:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Holder, "Holder"),
        (lambda t: Holder([t]), "Holder"),
        (lambda t: Holder(Holder({"a": t})), "Holder"),
        (OfSlots, "OfSlots"),
        (torch.distributions.Categorical, "Categorical"),
        (lambda t: torch.distributions.Independent(torch.distributions.Normal(t, 1.0), 1), "Independent"),
        (lambda t: (part for part in (t, t)), "generator"),
        (lambda t: map(torch.relu, [t]), "map"),
        (lambda t: {"a": t}.values(), "dict_values"),
        (lambda t: {"a": t}.items(), "dict_items"),
        (lambda t: functools.partial(max, t), "partial"),
        (lambda t: Named(t).__iter__, "method"),
        (lambda t: lambda: t, "function"),
        (lambda t: {t}, "set"),
        (lambda t: Named(t), "Named"),
        (lambda t: torch.nn.utils.rnn.pack_sequence([t]), "PackedSequence"),
    ],
)
def test_an_object_that_holds_tensors_and_is_no_container_is_refused(make: Callable[[Tensor], Any], kind: str) -> None:
    outputs = [{"a": make(rows(n).float().softmax(1))} for n in (1, 2)]
    with pytest.raises(
        TypeError, match=rf"the output\['a'\] to be of tensors in .* but got a {kind} that holds tensors"
    ):
        gather(outputs, lambda parts, path: parts[0])


def test_an_object_that_holds_no_tensor_comes_through() -> None:
    found = Holder([1, "a", {"b": None}])
    found.held.append(found)  # a cycle
    assert gather([found, found], lambda parts, path: parts[0]) is found


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "nested"),
        (lambda: torch.eye(2).to_sparse_csr(), "torch.sparse_csr"),
        (lambda: torch.eye(2).to_mkldnn(), "torch._mkldnn"),
    ],
)
def test_a_tensor_that_cannot_be_joined_is_refused_as_output(make: Any, words: str) -> None:
    with pytest.raises(TypeError, match=f"the output to be a tensor with rows, but got a {words} one"):
        gather([make(), make()], lambda parts, path: parts[0])


def test_namespaces_and_dataclasses_with_unset_fields_are_containers() -> None:
    @dataclasses.dataclass
    class Out:
        a: Tensor
        b: Tensor = dataclasses.field(init=False)

    outputs = [types.SimpleNamespace(x=Out(rows(n))) for n in (1, 2)]
    joined = gather(outputs, lambda parts, path: torch.cat(parts))
    assert len(joined.x.a) == 3 and not hasattr(joined.x, "b") and len(outputs[0].x.a) == 1


def test_an_output_is_made_once_of_what_was_joined() -> None:
    made = []

    class Pair(list):
        def __init__(self, items: Any) -> None:
            super().__init__(items)
            self.kind = "pair"

        def __setitem__(self, index: Any, value: Any) -> None:
            made.append(len(value[0]))
            super().__setitem__(index, value)

    gather([Pair([rows(2), rows(2)]), Pair([rows(1), rows(1)])], lambda parts, path: torch.cat(parts))
    assert made == [3]

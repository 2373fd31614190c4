"""`memory_of`: where tensors lie and how, told without asking Python for each of their attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchtower import _extension
from torchtower.memory import memory_of

OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "address": torch.clone,
    "offset": lambda t: t.view(-1)[3:].view(1, 3),
    "shape": lambda t: t.view(3, 2),
    "strides": lambda t: t.as_strided((2, 3), (1, 2)),
    "dtype": lambda t: t.view(torch.int64),
    "number of dimensions": lambda t: t.view(1, 2, 3),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_one_is_told_apart(what: str) -> None:
    tensor = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    assert memory_of([tensor]) != memory_of([OTHERS[what](tensor)])


@pytest.mark.parametrize("make", [torch.detach, nn.Parameter, lambda t: t.view(3, 2).view(2, 3)])
def test_what_lies_there_alike_is_the_same(make: Any) -> None:
    tensor = torch.arange(6.0).view(2, 3)
    before = memory_of([tensor])
    assert memory_of([make(tensor)]) == before
    tensor.add_(1)
    assert memory_of([tensor]) == before


def test_one_object_with_other_data_is_told() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    before = memory_of([parameter])
    parameter.data = parameter.data.t()
    assert memory_of([parameter]) != before


def test_each_of_several_is_told_by_itself() -> None:
    tensors = [torch.ones(2), torch.ones(()), torch.ones(0, 4), torch.ones(3, dtype=torch.complex64).conj()]
    places = memory_of(tensors)
    assert len(set(places)) == len(tensors)
    tensors[1] = torch.ones(())
    assert [now == then for now, then in zip(memory_of(tensors), places, strict=True)] == [True, False, True, True]


def test_one_that_has_no_memory_is_told_by_its_attributes() -> None:
    known, other = torch.ones(2), torch.empty(2, device="meta")
    assert _extension.memory_of([known, other])[1] is None
    places = memory_of([known, other])
    assert places[0] == memory_of([known])[0]
    assert places[1] == memory_of([torch.empty(2, device="meta")])[0]
    assert places[1] != memory_of([torch.empty(3, device="meta")])[0]


def test_what_is_no_tensor_leaves_no_error_behind() -> None:
    assert _extension.memory_of([1, None]) == [None, None]

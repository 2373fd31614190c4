"""Contract 9: bad gradients and weights are named, by tower and parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchtower import average_gradients, stack_gradients

a, b = torch.ones(2), torch.ones(3)
BAD: list[tuple[Any, Any, type[Exception], str]] = [
    ([], None, ValueError, "at least one tower"),
    ([[a], [a, a]], None, ValueError, "the 1 gradients that tower 0 lists, but tower 1 lists 2"),
    ([[a], [b]], None, ValueError, r"parameter 0 .*\(2,\) of torch.float32.*tower 1's is \(3,\)"),
    ([[a, a], [a, a.double()]], None, ValueError, "parameter 1 .*tower 1's is .*float64"),
    ([[None, a], [b, a], [a, a]], None, ValueError, r"parameter 0 .*\(3,\) .*tower 1's, but tower 2's is \(2,\)"),
    ([[a], ["text"]], None, TypeError, "tower 1's of parameter 0 is of type str"),
    ([[a], [1.0]], None, TypeError, "tower 1's of parameter 0 is of type float"),
    ([[(a, "v")], [a]], None, TypeError, "pairs everywhere or bare gradients everywhere"),
    ([[(a, "v", 3)]], None, TypeError, "tower 0's entry 0 has 3 items"),
    (
        [[(a, a)], [(a, b)]],
        None,
        ValueError,
        r"pairs of one shape.*tower 1's pair 0 .*\(2,\).* shape \(3,\)",
    ),
    ([[(a,)]], None, TypeError, "tower 0's entry 0 has 1 items"),
    (None, None, TypeError, r"tower_grads\[tower\]\[parameter\], but got NoneType"),
    (3, None, TypeError, "but got int"),
    ("ab", None, TypeError, "but got str"),
    (torch.nn.Linear(1, 1), None, TypeError, "but got Linear"),
    ({"a": [a]}, None, TypeError, "but got dict"),
    (torch.ones(2, 3), None, TypeError, r"tower_grads\[tower\]\[parameter\], but got a tensor"),
    ([a, a], None, TypeError, "tower 0's is a tensor: put it into a list"),
    ([[a], torch.tensor(1.0)], None, TypeError, "tower 1's is a tensor: put it into a list"),
    ([[a], None], None, TypeError, "tower 1's gradients to be a list, but got NoneType"),
    ([[a], 3], None, TypeError, "tower 1's gradients to be a list, but got int"),
    ([{a}, {a}], None, TypeError, "tower 0's gradients to be a list, but got set"),
    ([{"w": a}], None, TypeError, "tower 0's gradients to be a list, but got dict"),
    ([[a], [a.to("meta")]], None, ValueError, "not to be on meta, .* tower 1's of parameter 0 is on meta"),
    ([[a.to("meta")], [a]], None, ValueError, "to be on meta, .* tower 1's of parameter 0 is on cpu"),
    ([[a, a.to("meta")]] * 2, None, ValueError, "not to be on meta, .* tower 0's of parameter 1 is on meta"),
    ([[a, a.int()]] * 2, None, ValueError, "float32.* tower 0's of parameter 1 is of torch.int32"),
    ([[a.bool().to_sparse()]] * 2, None, ValueError, "tower 0's of parameter 0 is of torch.bool"),
    ([[a], [a.long().to_sparse()]], None, ValueError, "tower 1's of parameter 0 is of torch.int64"),
    ([[torch.eye(2)], [torch.eye(2).to_mkldnn()]], None, ValueError, "tower 1's .*is of layout torch._mkldnn"),
    (
        [[torch.eye(2).to_sparse(1)], [torch.eye(2).to_sparse(2)]],
        None,
        ValueError,
        "parameter 0 .* 1 sparse dimensions like tower 0's, but tower 1's .* 2 sparse dimensions",
    ),
    (
        [[torch.nested.nested_tensor([a], layout=torch.jagged)]],
        None,
        ValueError,
        "tower 0's of parameter 0 is a nested tensor",
    ),
    ([[a], [torch.nn.UninitializedParameter()]], None, ValueError, "tower 1's .* is an uninitialized parameter"),
]


@pytest.mark.parametrize(("towers", "weights", "error", "words"), BAD)
@pytest.mark.parametrize("function", [average_gradients, stack_gradients])
def test_bad_gradients_are_named(function: Any, towers: Any, weights: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=rf"^{function.__name__}: expected .*{words}"):
        function(towers)


BAD_WEIGHTS: list[tuple[Any, str]] = [
    ([1.0], "one weight for each of 2 towers, but got 1"),
    ([1.0, 1.0, 1.0], "one weight for each of 2 towers, but got 3"),
    ([1.0, -0.5], "not negative, but tower 1's is -0.5"),
    ([float("nan"), 1.0], "finite .*tower 0's is nan"),
    ([1.0, float("inf")], "finite .*tower 1's is inf"),
    ([0.0, 0.0], "above 0"),
    ([1, 10**400], "finite .*tower 1's is inf"),
]


@pytest.mark.parametrize(("weights", "words"), BAD_WEIGHTS)
def test_bad_weights_are_named(weights: Any, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^average_gradients: expected .*{words}"):
        average_gradients([[a], [a]], weights)


NO_WEIGHTS: list[tuple[Any, str]] = [
    ("13", "a sequence of weights, one for each tower, but got str"),
    (b"12", "but got bytes"),
    ({0: 1, 1: 3}, "but got dict"),
    ({1, 3}, "but got set"),
    (3, "but got int"),
    (torch.nn.Linear(1, 1), "but got Linear"),
    (torch.tensor(1.0), "but got Tensor"),
    (["1", "3"], "real numbers, but tower 0's is of type str"),
    ([1, None], "tower 1's is of type NoneType"),
    ([1, 1j], "tower 1's is of type complex"),
    ([[1], [3]], "tower 0's is of type list"),
    (torch.ones(2, 2).numpy(), "tower 0's is of type ndarray"),
    (torch.ones(2, 2), r"tower 0's is \(2,\) of torch.float32"),
    (torch.ones(2, dtype=torch.complex64), "tower 0's is .* of torch.complex64"),
    (torch.ones(2, device="meta"), r"tower 0's is \(\) of torch.float32 on meta"),
]


@pytest.mark.parametrize(("weights", "words"), NO_WEIGHTS)
def test_what_is_no_list_of_numbers_is_named(weights: Any, words: str) -> None:
    with pytest.raises(TypeError, match=rf"^average_gradients: expected .*{words}"):
        average_gradients([[a], [a]], weights)


def test_meta_gradients_have_means_on_meta() -> None:
    (mean,) = average_gradients([[a.to("meta")], [a.to("meta")]])
    assert mean.is_meta and mean.shape == a.shape

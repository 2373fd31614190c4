"""`average_gradients` and `stack_gradients`: the tower dimension, made and reduced."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchtower import average_gradients, stack_gradients

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (4, 0), (33, 129)]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def towers_of(num_towers: int, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[list[Tensor]]:
    return [[random(s, dtype, 100 * t + p) for p, s in enumerate(shapes)] for t in range(num_towers)]


def oracle(column: list[Tensor | None], weights: list[float] | None = None) -> Tensor:
    """The weighted mean in float64, missing gradients counting zero."""
    weights = weights or [1.0] * len(column)
    wide = torch.complex128 if any(g is not None and g.is_complex() for g in column) else torch.float64
    total: Any = 0
    for grad, weight in zip(column, weights, strict=True):
        if grad is not None and weight:
            total = total + grad.to_dense().to(wide) * weight
    return total / math.fsum(weights)


def assert_near(got: Tensor, expected: Tensor, num_towers: int) -> None:
    assert got.shape == expected.shape
    eps = torch.finfo(got.dtype).eps
    error = (got.to(expected.dtype) - expected).abs().max() if got.numel() else torch.tensor(0.0)
    assert error <= 4 * num_towers * eps * max(1.0, expected.abs().max().item() if expected.numel() else 1.0)


# ---- the mean


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_towers", [1, 2, 3, 4, 8])
def test_the_mean_is_the_stacks_mean_and_near_float64(num_towers: int, dtype: torch.dtype) -> None:
    towers = towers_of(num_towers, dtype)
    means = average_gradients(towers)
    for p, mean in enumerate(means):
        column = [tower[p] for tower in towers]
        assert mean.dtype == dtype
        assert_near(mean, oracle(column), num_towers)
        if num_towers <= 4 and not dtype.is_complex:
            assert torch.equal(mean, torch.stack(column).mean(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weighted_mean_is_near_float64(dtype: torch.dtype) -> None:
    weights = [3.0, 0.5, 2.0]
    towers = towers_of(3, dtype)
    for p, mean in enumerate(average_gradients(towers, weights)):
        assert_near(mean, oracle([tower[p] for tower in towers], weights), 3)


def test_pairs_come_back_with_the_main_towers_variables() -> None:
    variables = [[object() for _ in range(2)] for _ in range(3)]
    grads = towers_of(3, shapes=[(2,), (3,)])
    towers = [list(zip(g, v, strict=True)) for g, v in zip(grads, variables, strict=True)]
    result = average_gradients(towers)
    assert all(type(pair) is tuple and pair[1] is v for pair, v in zip(result, variables[0], strict=True))
    for (mean, _), bare in zip(result, average_gradients(grads), strict=True):
        assert torch.equal(mean, bare)


def test_iterators_of_pairs_serve_as_lists_do() -> None:
    grads = towers_of(2, shapes=[(2,), (3,)])
    result = average_gradients(iter([zip(tower, "ab", strict=True) for tower in grads]))
    assert [name for _, name in result] == ["a", "b"]


def test_no_gradient_given_is_changed_or_returned() -> None:
    towers = towers_of(3)
    before = [[grad.clone() for grad in tower] for tower in towers]
    for weights in (None, [1.0, 2.0, 3.0], [0.0, 0.0, 1.0]):
        for mean in average_gradients(towers, weights):
            mean.add_(1)
    for tower, kept in zip(towers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tower, kept, strict=True))


def test_a_single_tower_gives_a_copy_of_its_gradients() -> None:
    (tower,) = towers_of(1)
    for mean, grad in zip(average_gradients([tower]), tower, strict=True):
        assert torch.equal(mean, grad)
        assert mean.data_ptr() != grad.data_ptr() or not grad.numel()


def test_an_empty_list_of_variables_gives_an_empty_list() -> None:
    assert average_gradients([[], []]) == [] and stack_gradients([[], []]) == []


def test_means_carry_no_graph_where_gradients_carry_none() -> None:
    assert not any(mean.requires_grad for mean in average_gradients(towers_of(2)))


def test_the_mean_of_gradients_with_graphs_can_be_differentiated() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (mean,) = average_gradients([[x * 3], [x**2]], weights=[1, 3])
    (grad,) = torch.autograd.grad(mean.sum(), x)
    assert torch.allclose(grad, 0.25 * 3 + 0.75 * 2 * x.detach())
    with torch.no_grad():
        assert not average_gradients([[x * 3], [x**2]])[0].requires_grad


LAYOUTS = {
    "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda g: torch.cat([g, g], 1)[:, ::2].contiguous()[:, : g.shape[1]],
    "gapped": lambda g: torch.stack([g, g], -1)[..., 0],
    "offset": lambda g: torch.cat([torch.zeros(1), g.flatten()])[1:].view(g.shape),
    "expanded": lambda g: g[:1].expand_as(g),
    "scalar expanded": lambda g: torch.tensor(2.5).expand_as(g),
    "negated": lambda g: torch._neg_view(g),
}


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_gradients_of_any_strides_are_averaged(first: str, second: str) -> None:
    towers = [[LAYOUTS[first](random((2, 3, 4, 5), torch.float32, 0))]]
    towers.append([LAYOUTS[second](random((2, 3, 4, 5), torch.float32, 1))])
    (mean,) = average_gradients(towers)
    assert torch.equal(mean, (towers[0][0] + towers[1][0]) / 2)


def test_conjugated_gradients_are_averaged() -> None:
    a, b = random((3,), torch.complex64, 0) + 1j, random((3,), torch.complex64, 1) + 2j
    (mean,) = average_gradients([[a.conj()], [b]])
    assert torch.allclose(mean, (a.conj() + b) / 2)


def test_channels_last_is_kept() -> None:
    towers = [[LAYOUTS["channels_last"](random((2, 3, 4, 5), torch.float32, t))] for t in range(2)]
    assert average_gradients(towers)[0].is_contiguous(memory_format=torch.channels_last)


def test_one_call_may_mix_dtypes_and_shapes() -> None:
    towers = [[random((3,), dtype, t) for dtype in DTYPES] for t in range(2)]
    for p, mean in enumerate(average_gradients(towers)):
        assert mean.dtype == DTYPES[p]
        assert_near(mean, oracle([tower[p] for tower in towers]), 2)


def test_not_a_number_and_infinity_come_through_unless_their_tower_is_rejected() -> None:
    good, bad = torch.ones(3), torch.tensor([float("nan"), float("inf"), 1.0])
    (mean,) = average_gradients([[good], [bad]])
    assert mean[0].isnan() and mean[1].isinf() and mean[2] == 1
    (mean,) = average_gradients([[good], [bad]], weights=[1, 0])
    assert torch.equal(mean, good)


# ---- the None rule


@pytest.mark.parametrize("present", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_none_in_some_towers_counts_as_zero_there(present: tuple[int, ...], weights: list[float] | None) -> None:
    column: list[Tensor | None] = [random((4,), torch.float64, t) if t in present else None for t in range(3)]
    (mean,) = average_gradients([[grad] for grad in column], weights)
    assert torch.allclose(mean, oracle(column, weights), rtol=1e-14)


def test_none_in_every_tower_stays_none() -> None:
    grad = torch.ones(2)
    assert average_gradients([[None, grad], [None, grad]])[0] is None
    assert average_gradients([[(None, "v")], [(None, "w")]]) == [(None, "v")]
    assert stack_gradients([[None], [None]]) == [None]


def test_a_gradient_only_in_rejected_towers_is_zero_not_none() -> None:
    (mean,) = average_gradients([[None], [torch.full((2,), float("nan"))]], weights=[1, 0])
    assert torch.equal(mean, torch.zeros(2))


# ---- sparse


def sparse(rows: list[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    values = random((len(rows), 3), dtype, seed)
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (10, 3), check_invariants=True)


@pytest.mark.parametrize("weights", [None, [1.0, 4.0, 0.5]])
def test_sparse_gradients_stay_sparse_and_sum_repeated_rows(weights: list[float] | None) -> None:
    column = [sparse([1, 1, 5], 0), sparse([5, 9], 1), sparse([], 2)]
    (mean,) = average_gradients([[grad] for grad in column], weights)
    assert mean.is_sparse and mean.is_coalesced()
    assert torch.allclose(mean.to_dense(), oracle(column, weights), rtol=1e-14)


def test_sparse_in_some_towers_and_dense_in_others_gives_dense() -> None:
    column = [sparse([1, 1, 5], 0), random((10, 3), torch.float64, 1)]
    for pair in (column, column[::-1]):
        (mean,) = average_gradients([[grad] for grad in pair])
        assert not mean.is_sparse
        assert torch.allclose(mean, oracle(pair), rtol=1e-14)


def test_sparse_and_none_give_sparse() -> None:
    (mean,) = average_gradients([[None], [sparse([2, 2], 0)]])
    assert mean.is_sparse
    assert torch.allclose(mean.to_dense(), sparse([2, 2], 0).to_dense() / 2)


# ---- weights


def test_equal_weights_are_the_plain_mean_to_the_bit() -> None:
    towers = towers_of(3)
    for weights in ([1, 1, 1], [0.1] * 3, [7e300] * 3, [1e-300] * 3):
        for a, b in zip(average_gradients(towers), average_gradients(towers, weights), strict=True):
            assert torch.equal(a, b)


def test_a_tower_of_weight_zero_is_left_out_as_if_it_were_not_there() -> None:
    towers = towers_of(3)
    for a, b in zip(average_gradients(towers, [1, 0, 1]), average_gradients([towers[0], towers[2]]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_weights_need_not_be_normalised(scale: float) -> None:
    towers = towers_of(3, torch.float64)
    raw = [2.0, 1.0, 5.0]
    for p, mean in enumerate(average_gradients(towers, [w * scale for w in raw])):
        assert torch.allclose(mean, oracle([tower[p] for tower in towers], raw), rtol=1e-13)


def test_weights_may_be_tensors_and_numbers() -> None:
    towers = towers_of(2, shapes=[(3,)])
    (expected,) = average_gradients(towers, [1.0, 3.0])
    for weights in (torch.tensor([1.0, 3.0]), (1, 3), [torch.tensor(1), torch.tensor(3)]):
        assert torch.equal(average_gradients(towers, weights)[0], expected)


@settings(max_examples=40, deadline=None)
@given(
    num_towers=st.integers(1, 6),
    numel=st.integers(0, 40),
    weights=st.lists(st.floats(0, 1e3), min_size=6, max_size=6),
    missing=st.sets(st.integers(0, 5)),
)
def test_any_towers_weights_and_gaps_agree_with_float64(
    num_towers: int, numel: int, weights: list[float], missing: set[int]
) -> None:
    weights = [w if w > 1e-6 else 0.0 for w in weights[:num_towers]]
    if not any(weights):
        weights[0] = 1.0
    column: list[Tensor | None] = [
        None if t in missing else random((numel,), torch.float64, t) for t in range(num_towers)
    ]
    (mean,) = average_gradients([[grad] for grad in column], weights)
    if all(grad is None for grad in column):
        assert mean is None
    elif any(grad is not None and w for grad, w in zip(column, weights, strict=True)):
        assert torch.allclose(mean, oracle(column, weights), rtol=1e-12, atol=1e-14)
    else:
        assert torch.equal(mean, torch.zeros(numel, dtype=torch.float64))


# ---- the stack


def test_the_stack_has_a_leading_tower_dimension_with_zeros_for_none() -> None:
    towers: list[list[Tensor | None]] = [[torch.ones(2, 3), None], [torch.full((2, 3), 2.0), torch.ones(4)]]
    first, second = stack_gradients(towers)
    assert first.shape == (2, 2, 3) and torch.equal(first, torch.stack([towers[0][0], towers[1][0]]))
    assert torch.equal(second, torch.stack([torch.zeros(4), torch.ones(4)]))


def test_the_stacks_mean_is_the_average() -> None:
    towers = towers_of(4, torch.float64)
    for stack, mean in zip(stack_gradients(towers), average_gradients(towers), strict=True):
        assert torch.equal(stack.mean(0), mean)


def test_stacks_of_pairs_come_back_with_variables_and_no_shared_memory() -> None:
    grad = torch.ones(3)
    ((stack, variable),) = stack_gradients([[(grad, "v")], [(grad, "w")]])
    stack.zero_()
    assert variable == "v" and torch.equal(grad, torch.ones(3))


def test_sparse_gradients_can_be_stacked() -> None:
    pair = [sparse([1, 1], 0), sparse([5], 1)]
    (stack,) = stack_gradients([[grad] for grad in pair])
    assert torch.equal(stack.to_dense(), torch.stack([grad.to_dense() for grad in pair]))
    (mixed,) = stack_gradients([[pair[0]], [torch.ones(10, 3, dtype=torch.float64)]])
    assert mixed.layout is torch.strided


# ---- bad input

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
    ([[(a,)]], None, TypeError, "tower 0's entry 0 has 1 items"),
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
]


@pytest.mark.parametrize(("weights", "words"), BAD_WEIGHTS)
def test_bad_weights_are_named(weights: Any, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^average_gradients: expected .*{words}"):
        average_gradients([[a], [a]], weights)


def test_integer_gradients_are_refused_by_name() -> None:
    with pytest.raises((ValueError, TypeError), match=r"expected .*float.*int64"):
        average_gradients([[torch.ones(2, dtype=torch.int64)]] * 2)

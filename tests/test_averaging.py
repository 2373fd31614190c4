"""`average_gradients` and `stack_gradients`: the tower dimension, made and reduced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.gradients import DTYPES, assert_near, bits, oracle, random, towers_of
from torchtower import TowerParallel, average_gradients, stack_gradients, tower_sum

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


def test_a_single_towers_sparse_gradient_is_copied_as_it_is_summed() -> None:
    grad = torch.sparse_coo_tensor([[1, 1]], [2.0, 3.0], (4,))
    (mean,) = average_gradients([[grad]])
    assert mean.is_coalesced() and mean.to_dense().tolist() == [0, 5, 0, 0]


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


# ---- the same bits with a graph, and where ops are followed


@pytest.mark.parametrize("weights", [None, [3.0, 0.5, 2.0], [1.0, 0.0, 1.0]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_with_graphs_have_the_same_mean_to_the_bit(dtype: torch.dtype, weights: list[float] | None) -> None:
    towers = towers_of(3, dtype, shapes=[(1001,), (), (3, 5)])
    tracked = [[grad.clone().requires_grad_() for grad in tower] for tower in towers]
    for a, b in zip(average_gradients(towers, weights), average_gradients(tracked, weights), strict=True):
        assert b.requires_grad and b.dtype == dtype
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("make", [torch.clone, lambda g: g.clone().requires_grad_(), lambda g: g.to_sparse(1)])
def test_halves_are_added_in_float32_and_rounded_once(make: Any) -> None:
    largest, smallest = torch.full((2, 2), 65504.0).half(), torch.full((2, 2), 2.0**-24).half()
    for grad in (largest, smallest):
        (mean,) = average_gradients([[make(grad)]] * 3)
        assert torch.equal(mean.detach().to_dense(), grad)
    ones = [torch.full((2, 2), 1.0 if t == 0 else 2.0**-9).bfloat16() for t in range(5)]
    (mean,) = average_gradients([[make(grad)] for grad in ones], weights=[1.0] * 5)
    assert torch.equal(mean.detach().to_dense(), torch.full((2, 2), (1 + 2.0**-7) / 5).bfloat16())


def test_the_mean_of_negative_zeros_is_a_negative_zero_on_every_road() -> None:
    zeros = torch.full((3,), -0.0)
    in_rows = torch.sparse_coo_tensor(torch.arange(3)[None], zeros, (3,), check_invariants=True)
    for grad in (zeros, zeros.clone().requires_grad_(), in_rows):
        (mean,) = average_gradients([[grad]] * 3)
        values = mean.values() if mean.is_sparse else mean.detach()
        assert bool(values.signbit().all())


def test_a_single_towers_gradient_with_a_graph_is_not_the_mean_itself() -> None:
    for grad in (torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.complex64, requires_grad=True)):
        (mean,) = average_gradients([[grad]])
        assert mean.requires_grad and mean.data_ptr() != grad.data_ptr()


def pair(x: Tensor, y: Tensor) -> Tensor:
    mean: Tensor = average_gradients([[x], [y]], weights=[1, 3])[0]
    return mean


def test_forward_derivatives_go_through() -> None:
    x, tangent = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0])
    mean, derivative = torch.func.jvp(lambda x: pair(x, x * 3), (x,), (tangent,))
    assert torch.equal(mean, 2.5 * x) and torch.equal(derivative, 2.5 * tangent)
    with torch.no_grad():  # which has no say in forward derivatives
        assert torch.equal(torch.func.jvp(lambda x: pair(x, x * 3), (x,), (tangent,))[1], 2.5 * tangent)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(pair(dual, x)).tangent, 0.25 * tangent)
    expected = 2.5 * torch.eye(2)
    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        assert torch.equal(jacobian(lambda x: pair(x, x * 3))(x), expected)
    hessian = torch.func.hessian(lambda x: pair(x**3, x).sum())(x)
    assert torch.allclose(hessian, torch.diag(1.5 * x))


def test_vmap_goes_through() -> None:
    x, y = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    assert torch.equal(torch.vmap(pair)(x, y), pair(x, y))
    assert torch.equal(torch.vmap(pair, in_dims=(1, None))(x, y[:, 0]), pair(x.t(), y[:, 0].expand(3, 2)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_mean() -> None:
    traced = torch.jit.trace(pair, (torch.ones(3), torch.ones(3)))
    x, y = torch.arange(3.0), torch.full((3,), 8.0)
    assert torch.equal(traced(x, y), pair(x, y))


def test_a_compiled_function_holds_the_native_op() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x, y = torch.arange(3.0), torch.full((3,), 8.0)
    assert torch.equal(torch.compile(pair, backend=backend, fullgraph=True)(x, y), pair(x, y))
    assert "tower_mean_" in graphs[0].code


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
    numbers = torch.tensor([1.0, 3.0])
    for weights in (numbers, (1, 3), [torch.tensor(1), torch.tensor([3])], numbers.numpy(), [*numbers.numpy()]):
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


# ---- the sum between towers, which has no tower dimension


def test_tower_sum_of_what_is_no_tensor_is_refused_in_towers_and_outside() -> None:
    class Summed(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tower_sum(None)  # type: ignore[arg-type]
            return x

    with pytest.raises(TypeError, match=r"^tower_sum: expected a tensor, but got NoneType"):
        tower_sum(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tower_sum: expected a tensor, but got NoneType"):
        TowerParallel(Summed(), device_ids=["cpu"] * 2)(torch.ones(2, 1))


def test_zero_tensors_are_zeros() -> None:
    zeros = torch._efficientzerotensor(2, dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    means = average_gradients([[zeros, zeros, ones], [ones, zeros, ones]])
    assert [mean.tolist() for mean in means] == [[0.5, 0.5], [0.0, 0.0], [1.0, 1.0]]
    means[1].add_(1)

"""The op's values: against float64, against torch.mean, in every layout, and the same bits on every road."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from tests import reference
from torchtower import _composed, ops

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64)
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7,), (3, 5), (2, 0, 3), (130,), (1001,))
RULES: dict[str, Callable[[int], list[float]]] = {
    "sum": lambda count: [1.0] * count,
    "mean": lambda count: [1.0 / count] * count,
    "weighted": lambda count: [0.25 + 0.5 * t for t in range(count)],
}


def random(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def tower_grads(shapes: Sequence[Sequence[int]], dtype: torch.dtype, num_towers: int) -> list[list[Tensor]]:
    """Tower-major; complex gradients have imaginary parts of their own."""
    towers = []
    for t in range(num_towers):
        grads = [random(shape, dtype, seed=100 * t + p) for p, shape in enumerate(shapes)]
        if dtype.is_complex:
            grads = [g + 1j * random(g.shape, dtype, seed=100 * t + p + 50) for p, g in enumerate(grads)]
        towers.append(grads)
    return towers


def flat(towers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [grad for grads in towers for grad in grads]


def assert_close(out: Tensor, towers: Sequence[Tensor], weights: Sequence[float]) -> None:
    error = (reference.real64(out) - reference.tower_mean(towers, weights)).abs()
    assert bool((error <= reference.mean_error_bound(towers, weights, out)).all())


def assert_means_into(out: list[Tensor], towers: list[list[Tensor]], weights: list[float]) -> None:
    """Near float64, and bit-equal to the composed form."""
    composed = [torch.empty_like(tensor) for tensor in out]
    ops.tower_mean_(out, flat(towers), weights)
    _composed.tower_mean_(composed, flat(towers), weights)
    for p in range(len(SHAPES)):
        assert_close(out[p], [grads[p] for grads in towers], weights)
        assert torch.equal(out[p], composed[p])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_towers", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_mean_is_near_float64_and_bit_equal_to_the_composed_form(
    dtype: torch.dtype, num_towers: int, rule: str
) -> None:
    towers, weights = tower_grads(SHAPES, dtype, num_towers), RULES[rule](num_towers)
    assert_means_into([torch.full(shape, 7, dtype=dtype) for shape in SHAPES], towers, weights)


@pytest.mark.parametrize("num_towers", (1, 2, 3, 4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_the_mean_of_up_to_four_towers_is_torch_mean_to_the_bit(dtype: torch.dtype, num_towers: int) -> None:
    towers = tower_grads(SHAPES, dtype, num_towers)
    out = [torch.empty(shape, dtype=dtype) for shape in SHAPES]
    ops.tower_mean_(out, flat(towers), RULES["mean"](num_towers))
    for p in range(len(SHAPES)):
        assert torch.equal(out[p], torch.stack([grads[p] for grads in towers]).mean(0))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_gradients_can_be_averaged_into_float32(dtype: torch.dtype, rule: str) -> None:
    towers, weights = tower_grads(SHAPES, dtype, 3), RULES[rule](3)
    assert_means_into([torch.empty(shape) for shape in SHAPES], towers, weights)


@pytest.mark.parametrize("position", (0, 1, 2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_be_the_gradient_of_any_tower(dtype: torch.dtype, position: int) -> None:
    towers, weights = tower_grads(SHAPES, dtype, 3), [0.2, 0.5, 0.3]
    expected = [torch.empty(shape, dtype=dtype) for shape in SHAPES]
    ops.tower_mean_(expected, flat(towers), weights)
    ops.tower_mean_(towers[position], flat(towers), weights)
    assert all(torch.equal(a, b) for a, b in zip(towers[position], expected, strict=True))


def test_a_tower_of_weight_zero_is_not_read_and_leaves_the_others_a_plain_mean() -> None:
    towers = tower_grads([(1000,)], torch.float32, 3)
    bad = [torch.full((1000,), float("nan"))]
    out, expected = [torch.empty(1000)], [torch.empty(1000)]
    ops.tower_mean_(out, flat([towers[0], bad, *towers[1:]]), [1 / 3, 0, 1 / 3, 1 / 3])
    ops.tower_mean_(expected, flat(towers), [1 / 3] * 3)
    assert torch.equal(out[0], expected[0])


def test_dtypes_may_differ_between_the_parameters_of_one_call() -> None:
    towers = [[random((33,), dtype, seed=t) for dtype in DTYPES] for t in range(2)]
    out = [torch.empty(33, dtype=dtype) for dtype in DTYPES]
    ops.tower_mean_(out, flat(towers), [0.5, 0.5])
    for p, mean in enumerate(out):
        assert_close(mean, [grads[p] for grads in towers], [0.5, 0.5])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda dense: dense,
    "channels_last": lambda dense: dense.contiguous(memory_format=torch.channels_last),
    "transposed": lambda dense: dense.transpose(0, 2).contiguous().transpose(0, 2),
    "gapped": lambda dense: torch.stack([dense, dense], dim=-1)[..., 0],
    "unaligned": lambda dense: torch.cat([dense.new_zeros(1), dense.flatten()])[1:].view(dense.shape),
    "expanded": lambda dense: dense[:, :1].expand_as(dense),
    "negative": lambda dense: torch._neg_view(dense),
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("out_layout", [name for name in LAYOUTS if name != "expanded"])
def test_any_layout_of_gradients_and_outputs(out_layout: str, grad_layout: str) -> None:
    towers = [LAYOUTS[grad_layout](random((2, 3, 4, 5), torch.float32, seed=t)) for t in range(3)]
    buffer = torch.zeros(2, 3, 4, 5)
    out = LAYOUTS[out_layout](buffer)
    strides = out.stride()
    ops.tower_mean_([out], towers, [0.5, 0.25, 0.25])
    assert_close(out, towers, [0.5, 0.25, 0.25])
    assert out.stride() == strides


def test_a_gap_between_an_outputs_elements_is_left_alone() -> None:
    whole = torch.full((6, 4), 9.0)
    ops.tower_mean_([whole[:, :2], whole[:, 3:]], [torch.ones(6, 2), torch.ones(6, 1)], [1.0])
    assert torch.equal(whole, torch.tensor([1.0, 1.0, 9.0, 1.0]).expand(6, 4))


def test_parameters_of_several_chunks_are_averaged_whole() -> None:
    shapes = [(40000,), (3,), (200, 400), (70000,)]
    towers = tower_grads(shapes, torch.float32, 3)
    out = [torch.empty(shape) for shape in shapes]
    ops.tower_mean_(out, flat(towers), [1 / 3] * 3)
    for p, mean in enumerate(out):
        assert_close(mean, [grads[p] for grads in towers], [1 / 3] * 3)


def test_outputs_of_more_than_the_cache_are_written_past_it() -> None:
    shapes = [(2**22 - 5,), (100,)]
    towers = tower_grads(shapes, torch.float32, 2)
    buffer = torch.zeros(2**22)
    out = [buffer[1 : 2**22 - 4], torch.empty(100)]  # one not aligned for a vector
    aligned = [torch.empty(shape) for shape in shapes]
    ops.tower_mean_(out, flat(towers), [0.5, 0.5])
    ops.tower_mean_(aligned, flat(towers), [0.5, 0.5])
    for p, shape in enumerate(shapes):
        expected = (towers[0][p] + towers[1][p]) / 2
        assert torch.equal(out[p], expected) and torch.equal(aligned[p], expected), shape


def test_conjugate_bits_of_gradients_and_outputs_are_resolved() -> None:
    towers = [grads[0] for grads in tower_grads([(3, 5)], torch.complex64, 2)]
    out = torch.zeros(3, 5, dtype=torch.complex64).conj()
    ops.tower_mean_([out], [towers[0].conj(), towers[1]], [0.5, 0.5])
    assert_close(out, [towers[0].conj(), towers[1]], [0.5, 0.5])


@pytest.mark.parametrize("function", (ops.tower_mean_, ops.tower_mean_with_statistics_))
def test_an_output_with_conjugate_and_negative_bits_may_be_its_own_gradient(function: Callable[..., Any]) -> None:
    for lazily in (torch.conj, torch._neg_view, lambda z: torch._neg_view(z.conj())):
        towers = [grads[0] for grads in tower_grads([(3, 5)], torch.complex64, 2)]
        out, plain = lazily(towers[0].clone()), torch.zeros(3, 5, dtype=torch.complex64)
        kept = out.clone()
        function([out, plain], [out, out, towers[1], towers[1]], [0.5, 0.5])
        assert_close(out, [kept, towers[1]], [0.5, 0.5])
        assert torch.equal(out, plain)


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """One call with parameters of mixed shapes, dtypes, strides and alignments."""
    num_towers = draw(st.integers(1, 10))
    weights = draw(st.sampled_from([*RULES.values()]))(num_towers)
    out: list[Tensor] = []
    grads: list[list[Tensor]] = [[] for _ in range(num_towers)]
    for p in range(draw(st.integers(0, 5))):
        dtype = draw(st.sampled_from(DTYPES))
        rows, columns = draw(st.tuples(st.integers(0, 9), st.integers(0, 300)))

        def tensor(seed: int, dtype: torch.dtype = dtype, rows: int = rows, columns: int = columns) -> Tensor:
            offset, gap = draw(st.sampled_from([(0, 0), (1, 0), (3, 0), (0, 2)]))
            buffer = random((rows * (columns + gap) + offset,), dtype, seed)[offset:]
            view = buffer.view(rows, columns + gap)[:, :columns]
            return view.view(columns, rows).t() if gap == 0 and draw(st.booleans()) else view

        for t in range(num_towers):
            grads[t].append(tensor(seed=31 * t + p))
        out.append(tensor(seed=1) if draw(st.booleans()) else grads[draw(st.integers(0, num_towers - 1))][p])
    return out, flat(grads), weights


@settings(max_examples=150, deadline=None)
@given(calls())
def test_whole_calls_of_mixed_parameters(call: tuple[list[Tensor], list[Tensor], list[float]]) -> None:
    out, grads, weights = call
    before = [grad.clone() for grad in grads]
    ops.tower_mean_(out, grads, weights)
    for p, mean in enumerate(out):
        assert_close(mean, before[p :: len(out)], weights)
    for i, grad in enumerate(grads):
        assert grad is out[i % len(out)] or torch.equal(grad, before[i])


@pytest.mark.parametrize("name", ("tower_mean_", "tower_mean_with_statistics_"))
def test_opcheck_passes(name: str) -> None:
    towers = tower_grads([(3, 4), (5,)], torch.float32, 2)
    out = [torch.zeros(3, 4), torch.zeros(5)]
    opcheck(getattr(torch.ops.torchtower, name).default, (out, flat(towers), [0.5, 0.5]))


@pytest.mark.parametrize("function", (ops.tower_mean_, ops.tower_mean_with_statistics_))
def test_autograd_sees_that_an_output_has_changed(function: Callable[..., Any]) -> None:
    out, base = [torch.zeros(3)], torch.ones(3, requires_grad=True)
    product = (base * out[0]).sum()
    function(out, [torch.ones(3)], [1.0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_an_output_that_requires_grad_is_written_in_any_layout() -> None:
    out = [
        torch.zeros(2, 3, requires_grad=True),
        torch.zeros(4, 4, requires_grad=True)[:, :2].detach().requires_grad_(),
    ]
    ops.tower_mean_(out, [torch.ones(2, 3), torch.ones(4, 2)], [1.0])
    assert all(bool((mean == 1).all()) and mean.grad_fn is None for mean in out)


def test_the_call_works_in_inference_mode_and_under_compile() -> None:
    with torch.inference_mode():
        out = [torch.zeros(3)]
        ops.tower_mean_(out, [torch.ones(3)], [1.0])
    assert torch.equal(out[0], torch.ones(3))

    def step(grads: list[Tensor]) -> Tensor:
        mean = [torch.zeros(4)]
        ops.tower_mean_(mean, grads, [0.5, 0.5])
        return mean[0] * 2

    compiled = torch.compile(step, backend="aot_eager")
    assert torch.equal(compiled([torch.ones(4), torch.full((4,), 3.0)]), torch.full((4,), 4.0))

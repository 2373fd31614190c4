"""Bad input to the ops is a ValueError that says what was expected and what came, and changes no byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchtower import _composed, ops

OPS = (ops.tower_mean_, ops.tower_mean_with_statistics_)
COMPOSED = (_composed.tower_mean_, _composed.tower_mean_with_statistics_)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def refuse(function: Callable[..., object], out: list[Tensor], grads: list[Tensor], weights: Sequence[float]) -> str:
    before = [tensor.clone() for tensor in [*out, *grads]]
    versions = [tensor._version for tensor in out]
    with pytest.raises(ValueError) as error:
        function(out, grads, weights)
    assert all(torch.equal(a, b) for a, b in zip([*out, *grads], before, strict=True))
    assert [tensor._version for tensor in out] == versions
    return told_by(function, error.value)


def refuse_on_meta(
    function: Callable[..., object], out: list[Tensor], grads: list[Tensor], weights: Sequence[float]
) -> str:
    with pytest.raises(ValueError) as error:
        function([*map(meta_like, out)], [*map(meta_like, grads)], weights)
    return told_by(function, error.value)


def told_by(function: Callable[..., object], error: Exception) -> str:
    name, _, message = str(error).partition(": ")
    assert name == function.__name__
    return message


def meta_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@pytest.mark.parametrize("function", [*OPS, *COMPOSED])
@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([], "expected a weight for each tower, but got none"),
        ([1.0, -0.5], "expected every weight to be at least 0 and finite in float32, but tower 1's is -0.5"),
        ([float("nan"), 1.0], "expected every weight to be at least 0 and finite in float32, but tower 0's is nan"),
        ([1.0, float("inf")], "expected every weight to be at least 0 and finite in float32, but tower 1's is inf"),
        ([1e39, 1.0], "expected every weight to be at least 0 and finite in float32, but tower 0's is 1e+39"),
        ([0.0, 0.0], "expected a tower with a weight above 0, but all 2 weights are 0"),
        (
            [1.0, 1.0, 1.0],
            "expected 6 gradients, tower-major (as many towers as weights, 3, times as many parameters as outputs, "
            "2), but got 4",
        ),
    ],
)
def test_bad_weights(function: Callable[..., object], weights: list[float], expected: str) -> None:
    out, grads = [ones(2), ones(3)], [ones(2), ones(3), ones(2), ones(3)]
    assert refuse(function, out, grads, weights) == expected
    if function in OPS:
        assert refuse_on_meta(function, out, grads, weights) == expected


@pytest.mark.parametrize(
    ("out", "grads", "expected"),
    [
        (
            [ones(1), ones(4, 8)],
            [ones(1), ones(4, 8), ones(1), ones(8, 4)],
            "expected every tower's gradient of parameter 1 to have shape (4, 8), but tower 1's has (8, 4)",
        ),
        (
            [ones(3)],
            [ones(3), ones(3, 1)],
            "expected every tower's gradient of parameter 0 to have shape (3,), but tower 1's has (3, 1)",
        ),
        (
            [ones(3)],
            [ones(3), ones(3, dtype=torch.float64)],
            "expected every tower's gradient of parameter 0 to have dtype float32, as tower 0's, but tower 1's has "
            "float64",
        ),
        (
            [ones(3)],
            [ones(3, dtype=torch.float64), ones(3, dtype=torch.float64)],
            "expected every tower's gradient of parameter 0 to have the output's dtype, float32, but tower 0's has "
            "float64",
        ),
        (
            [ones(3)],
            [ones(3, dtype=torch.bfloat16), ones(3, dtype=torch.float16)],
            "expected every tower's gradient of parameter 0 to have dtype bfloat16, as tower 0's, but tower 1's has "
            "float16",
        ),
        (
            [ones(3, dtype=torch.int64)],
            [ones(3, dtype=torch.int64), ones(3, dtype=torch.int64)],
            "expected parameter 0's output to have dtype float32, float64, float16, bfloat16, complex64 or "
            "complex128, but got int64",
        ),
        (
            [ones(3)],
            [ones(3), ones(3, dtype=torch.int32)],
            "expected tower 1's gradient of parameter 0 to have dtype float32, float64, float16, bfloat16, complex64 "
            "or complex128, but got int32",
        ),
        (
            [ones(1).expand(3)],
            [ones(3), ones(3)],
            "expected the elements of parameter 0's output to lie apart in memory, but its strides let them overlap "
            "(is it expanded?)",
        ),
    ],
)
@pytest.mark.parametrize("function", [*OPS, *COMPOSED])
def test_bad_tensors(function: Callable[..., object], out: list[Tensor], grads: list[Tensor], expected: str) -> None:
    assert refuse(function, out, grads, [0.5, 0.5]) == expected
    if function in OPS:
        assert refuse_on_meta(function, out, grads, [0.5, 0.5]) == expected


@pytest.mark.parametrize("function", OPS)
def test_a_call_partly_on_meta_is_refused_and_writes_nothing(function: Callable[..., object]) -> None:
    # Without a second device there is one that holds no numbers, whose fakes outrank every kernel.
    for place in range(1, 6):
        tensors = [ones(3) for _ in range(6)]
        tensors[place] = tensors[place].to("meta")
        which = f"tower {place // 2 - 1}'s gradient of parameter {place % 2}" if place > 1 else "parameter 1's output"
        with pytest.raises(ValueError) as error:
            function(tensors[:2], tensors[2:], [0.5, 0.5])
        assert str(error.value) == (
            f"{function.__name__}: expected every tensor on cpu, where parameter 0's output is, but {which} is on meta"
        )
        assert torch.equal(tensors[0], ones(3))


@pytest.mark.parametrize("function", OPS)
def test_good_calls_on_meta_are_taken(function: Callable[..., object]) -> None:
    function([meta_like(ones(3))], [meta_like(ones(3)), meta_like(ones(3))], [0.5, 0.5])


@pytest.mark.parametrize(
    ("out", "grads", "weights", "error", "expected"),
    [
        (None, [ones(3)], [1.0], TypeError, "expected out to be a list or tuple of tensors, but got NoneType"),
        (ones(3), [ones(3)], [1.0], TypeError, "expected out to be a list or tuple of tensors, but got Tensor"),
        ([ones(3)], ones(3), [1.0], TypeError, "expected grads to be a list or tuple of tensors, but got Tensor"),
        ([None], [ones(3)], [1.0], TypeError, "expected parameter 0's output to be a tensor, but got NoneType"),
        (
            [ones(3), ones(2)],
            [ones(3), ones(2), ones(3), None],
            [0.5, 0.5],
            TypeError,
            "expected tower 1's gradient of parameter 1 to be a tensor, but got NoneType",
        ),
        ([ones(3)], [ones(3)], ones(1), TypeError, "expected a list of weights, but got Tensor"),
        ([ones(3)], [ones(3)], 1.0, TypeError, "expected a list of weights, but got float"),
        ([ones(3)], [ones(3)], "1", TypeError, "expected a list of weights, but got str"),
        ([ones(3)], [ones(3)], ["1"], TypeError, "expected tower 0's weight to be a real number, but got str"),
        ([ones(3)], [ones(3)], [1j], TypeError, "expected tower 0's weight to be a real number, but got complex"),
        (
            [ones(3)],
            [ones(3)],
            [10**400],
            ValueError,
            "expected tower 0's weight to be finite in float32, but got a larger one",
        ),
        (
            [ones(3)],
            [nn.UninitializedParameter()],
            [1.0],
            ValueError,
            "expected tower 0's gradient of parameter 0 to have a shape, but got an uninitialized parameter",
        ),
        (
            [ones(3)],
            [torch.nested.nested_tensor([ones(3)], layout=torch.jagged)],
            [1.0],
            ValueError,
            "expected tower 0's gradient of parameter 0 to be strided, but got a nested tensor",
        ),
    ],
)
@pytest.mark.parametrize("function", OPS)
def test_what_the_schema_does_not_take_is_named(
    function: Callable[..., object], out: Any, grads: Any, weights: Any, error: type[Exception], expected: str
) -> None:
    with pytest.raises(error) as caught:
        function(out, grads, weights)
    assert str(caught.value) == f"{function.__name__}: {expected}"


@pytest.mark.parametrize("function", OPS)
def test_an_iterator_of_outputs_is_refused_before_it_is_written(function: Callable[..., object]) -> None:
    out = ones(3)
    with pytest.raises(TypeError, match=r"expected out to be a list or tuple of tensors, but got generator"):
        function((tensor for tensor in [out]), [torch.zeros(3)], [1.0])
    assert torch.equal(out, ones(3))


BUFFER = torch.arange(60.0)


@pytest.mark.parametrize(
    ("out", "grads", "which"),
    [
        ([BUFFER[:10], BUFFER[9:19]], [ones(10), ones(10)], "the outputs of parameters 0 and 1"),
        ([BUFFER[:10], BUFFER[:10]], [ones(10), ones(10)], "the outputs of parameters 0 and 1"),
        ([BUFFER[:10]], [BUFFER[1:11]], "parameter 0's output and tower 0's gradient of parameter 0"),
        ([BUFFER[:10], ones(9)], [ones(10), BUFFER[:9]], "parameter 0's output and tower 0's gradient of parameter 1"),
        (
            [BUFFER[20:24], BUFFER[10:20]],
            [BUFFER[20:24], BUFFER[9:19]],
            "parameter 1's output and tower 0's gradient of parameter 1",
        ),
        (
            [BUFFER[:16].view(4, 4)],
            [BUFFER[:16].view(4, 4).t()],
            "parameter 0's output and tower 0's gradient of parameter 0",
        ),
        (
            [BUFFER.view(6, 10)[:, :4], BUFFER.view(6, 10)[:, 3:]],
            [ones(6, 4), ones(6, 7)],
            "the outputs of parameters 0 and 1",
        ),
        ([BUFFER[::2]], [BUFFER[30:]], "parameter 0's output and tower 0's gradient of parameter 0"),
    ],
)
@pytest.mark.parametrize("function", OPS)
def test_overlap_in_part(function: Callable[..., object], out: list[Tensor], grads: list[Tensor], which: str) -> None:
    expected = (
        "expected each output to share memory with nothing but, whole, its own parameter's gradients, but "
        f"{which} overlap in part"
    )
    assert refuse(function, out, grads, [1.0]) == expected


Z = torch.arange(10).to(torch.complex64)


@pytest.mark.parametrize(
    ("out", "grads", "expected"),
    [
        ([Z[:6].conj(), Z[4:].conj()], [Z + 1, Z + 2], "the outputs of parameters 0 and 1 overlap in part"),
        ([Z[:6].conj(), Z[4:]], [Z + 1, Z + 2], "the outputs of parameters 0 and 1 overlap in part"),
        ([Z[:6].conj()], [Z[2:8]], "parameter 0's output and tower 0's gradient of parameter 0 overlap in part"),
        ([BUFFER[:6].clone(), torch._neg_view(Z.real[:1]).expand(6)], [BUFFER, BUFFER], "its strides let them overlap"),
        ([BUFFER[:6].clone(), Z[:1].conj().expand(6)], [BUFFER, Z + 1], "its strides let them overlap"),
    ],
)
@pytest.mark.parametrize("function", OPS)
def test_overlap_of_outputs_with_a_conjugate_or_negative_bit(
    function: Callable[..., object], out: list[Tensor], grads: list[Tensor], expected: str
) -> None:
    assert expected in refuse(function, out, [grad[:6] for grad in grads], [1.0])


def test_strides_that_interleave_are_told_from_strides_that_let_elements_overlap() -> None:
    apart = torch.zeros(20).as_strided((2, 3), (3, 2))
    grad = torch.arange(6.0).view(2, 3)
    ops.tower_mean_([apart], [grad], [1.0])
    assert torch.equal(apart, grad)
    for size, strides in (((4, 3), (2, 3)), ((3, 3), (1, 2)), ((2, 3), (0, 1)), ((2, 2, 2), (4, 2, 2))):
        meeting = torch.zeros(20).as_strided(size, strides)
        assert "its strides let them overlap" in refuse(ops.tower_mean_, [meeting], [ones(*size)], [1.0])


def test_an_output_may_not_overlap_the_gradient_of_a_tower_that_is_not_read() -> None:
    assert "overlap in part" in refuse(ops.tower_mean_, [BUFFER[:10]], [ones(10), BUFFER[5:15]], [1.0, 0.0])


def test_tensors_side_by_side_are_not_taken_for_overlapping() -> None:
    matrix = torch.zeros(6, 10)
    even, odd = torch.zeros(2, 7).unbind(0)
    interleaved = torch.zeros(20)
    out = [matrix[:, :4], matrix[:, 4:], even, interleaved[::2]]
    ops.tower_mean_(out, [ones(6, 4), 2 * ones(6, 6), odd, interleaved[1::2]], [1.0])
    assert matrix[0].tolist() == [1.0] * 4 + [2.0] * 6


def test_one_gradient_may_serve_several_towers() -> None:
    grad = torch.arange(5.0)
    ops.tower_mean_([grad], [grad, grad, grad], [1.0, 1.0, 1.0])
    assert torch.equal(grad, 3 * torch.arange(5.0))


def test_the_composed_form_refuses_every_layout_but_strided() -> None:
    with pytest.raises(ValueError, match=r"expected tower 0's gradient of parameter 0 to be strided"):
        ops.tower_mean_([ones(3)], [ones(3).to_sparse()], [1.0])

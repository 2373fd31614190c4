"""Bad input to the ops is a ValueError that says what was expected and what came, and changes no byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from torchtower import _composed, ops

OPS = (ops.tower_mean_, ops.tower_mean_with_statistics_)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def refuse(function: Callable[..., object], out: list[Tensor], grads: list[Tensor], weights: Sequence[float]) -> str:
    before = [tensor.clone() for tensor in [*out, *grads]]
    versions = [tensor._version for tensor in out]
    with pytest.raises(ValueError) as error:
        function(out, grads, weights)
    assert all(torch.equal(a, b) for a, b in zip([*out, *grads], before, strict=True))
    assert [tensor._version for tensor in out] == versions
    text = str(error.value)
    name, _, message = text.partition(": ")
    assert name == function.__name__
    return message


@pytest.mark.parametrize("function", OPS)
@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([], "expected a weight for each tower, but got none"),
        ([1.0, -0.5], "expected every weight to be finite and at least 0, but tower 1's is -0.5"),
        ([float("nan"), 1.0], "expected every weight to be finite and at least 0, but tower 0's is nan"),
        ([1.0, float("inf")], "expected every weight to be finite and at least 0, but tower 1's is inf"),
        ([0.0, 0.0], "expected a tower with a weight above 0, but all 2 weights are 0"),
        (
            [1.0, 1.0, 1.0],
            "expected 6 gradients, tower-major (as many towers as weights, 3, times as many parameters as outputs, "
            "2), but got 4",
        ),
    ],
)
def test_bad_weights(function: Callable[..., object], weights: list[float], expected: str) -> None:
    assert refuse(function, [ones(2), ones(3)], [ones(2), ones(3), ones(2), ones(3)], weights) == expected


@pytest.mark.parametrize("weights", [[], [1.0, -0.5], [float("nan"), 1.0], [0.0, 0.0], [1.0, 1.0, 1.0]])
def test_the_composed_form_refuses_bad_weights_too(weights: list[float]) -> None:
    refuse(_composed.tower_mean_, [ones(2), ones(3)], [ones(2), ones(3), ones(2), ones(3)], weights)


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
@pytest.mark.parametrize("function", OPS)
def test_bad_tensors(function: Callable[..., object], out: list[Tensor], grads: list[Tensor], expected: str) -> None:
    assert refuse(function, out, grads, [0.5, 0.5]) == expected


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


def test_several_devices_in_one_call_are_refused() -> None:
    # Without a second device there is one that holds no numbers; the composed form meets it first.
    with pytest.raises(ValueError, match=r"expected every tensor on cpu, but tower 0's gradient of .* is on meta"):
        _composed.tower_mean_([ones(3)], [torch.ones(3, device="meta")], [1.0])


def test_the_composed_form_refuses_every_layout_but_strided() -> None:
    with pytest.raises(ValueError, match=r"expected tower 0's gradient of parameter 0 to be strided"):
        ops.tower_mean_([ones(3)], [ones(3).to_sparse()], [1.0])


@pytest.mark.parametrize(
    ("grads", "expected"),
    [
        ([ones(3), ones(4)], "expected tower 1's gradient of parameter 0 to have shape (3,), but got (4,)"),
        ([ones(3), ones(3, dtype=torch.int64)], "expected tower 1's gradient of parameter 0 to have a floating dtype"),
        ([ones(3), ones(3).double()], "expected tower 1's gradient of parameter 0 to have a floating dtype"),
        ([ones(3).half(), ones(3).bfloat16()], "expected tower 1's gradient of parameter 0 to have a floating dtype"),
    ],
)
def test_the_composed_form_refuses_bad_tensors(grads: list[Tensor], expected: str) -> None:
    assert refuse(_composed.tower_mean_, [ones(3)], grads, [0.5, 0.5]).startswith(expected)


def test_what_is_no_tensor_is_torchs_own_error() -> None:
    with pytest.raises((RuntimeError, TypeError), match="Tensor"):
        ops.tower_mean_([None], [ones(3)], [1.0])  # type: ignore[list-item]

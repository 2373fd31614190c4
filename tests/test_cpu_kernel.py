"""The CPU kernels give the same bits on every instruction set and for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.test_ops import COUNTS, DTYPES, RULES, flat, tower_grads
from torchtower import _C, _composed, build_info, ops

KERNELS = _C.available_cpu_kernels()
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.use_cpu_kernels(KERNELS[0])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """All bits, but of a NaN only that it is one."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    same = (a.view(BITS[a.dtype]) == b.view(BITS[b.dtype])) | (a.isnan() & b.isnan())
    return bool(same.all())


def all_results(towers: list[list[Tensor]], weights: list[float]) -> list[Tensor]:
    out = [torch.empty_like(grad) for grad in towers[0]]
    again = [torch.empty_like(grad) for grad in towers[0]]
    ops.tower_mean_(out, flat(towers), weights)
    squares, _, out_squares = ops.tower_mean_with_statistics_(again, flat(towers), weights)
    return [*out, *again, squares, out_squares]


@pytest.mark.skipif(len(KERNELS) == 1, reason=f"this machine runs the {KERNELS[0]} kernels alone")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_towers", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(dtype: torch.dtype, num_towers: int, rule: str) -> None:
    towers = tower_grads([(1,), (7,), (65,), (1027,)], dtype, num_towers)
    results = []
    for kernels in KERNELS:
        _C.use_cpu_kernels(kernels)
        results.append(all_results(towers, RULES[rule](num_towers)))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype, kernels: str) -> None:
    _C.use_cpu_kernels(kernels)
    towers = tower_grads([(5,), (600001,), (1000, 600), (33,)], dtype, 3)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(all_results(towers, [0.2, 0.3, 0.5]))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_every_half_is_widened_and_rounded_as_torch_does(dtype: torch.dtype, kernels: str) -> None:
    _C.use_cpu_kernels(kernels)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = [torch.empty(2**16)]
    ops.tower_mean_(wide, [every], [1.0])
    assert same_bits(wide[0], every.float())
    other = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    for weights in ([1.0, 1.0], [0.5, 0.5], [1e-3, 2e-3], [300.0, 0.7]):
        out, expected = [torch.empty_like(every)], [torch.empty_like(every)]
        ops.tower_mean_(out, [every, other], weights)
        _composed.tower_mean_(expected, [every, other], weights)
        assert same_bits(out[0], expected[0])


def test_an_unknown_instruction_set_is_refused_and_build_info_tells_the_one_in_use() -> None:
    with pytest.raises(ValueError, match=r"expected one of available_cpu_kernels\(\), but got mmx"):
        _C.use_cpu_kernels("mmx")
    for kernels in KERNELS:
        _C.use_cpu_kernels(kernels)
        assert build_info()["cpu_kernels"] == kernels

"""The ops on a CUDA device: their bits are the CPU's, in any stream, inside a captured graph, on every device.

TORCHTOWER_REQUIRE_CUDA=1 makes a missing device a failure.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from tests import reference
from tests.helpers import run_python
from tests.test_ops import DTYPES, RULES, assert_close, flat, tower_grads
from torchtower import TowerParallel, build_info, ops

pytestmark = pytest.mark.needs_cuda

# Tails, an empty tensor, several chunks.
SHAPES = [(), (0,), (1,), (7,), (16,), (33, 5), (4096,), (3, 4097)]
# Of a sum of squares, which is float32 within the 16 elements of a thread.
SQUARES_TOLERANCE = 4e-7


def on_cuda(towers: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [[grad.cuda() for grad in grads] for grads in towers]


def equal(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, expected, strict=True))


def test_the_extension_was_built_with_cuda_kernels() -> None:
    assert build_info()["cuda"] is True


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_towers", (1, 2, 3, 4, 8, 17, 64))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_the_cpus_and_near_float64(dtype: torch.dtype, num_towers: int, rule: str) -> None:
    towers, weights = tower_grads(SHAPES, dtype, num_towers), RULES[rule](num_towers)
    expected = [torch.empty_like(grad) for grad in towers[0]]
    out = [tensor.cuda() for tensor in expected]
    ops.tower_mean_(expected, flat(towers), weights)
    ops.tower_mean_(out, flat(on_cuda(towers)), weights)
    assert equal(out, expected)
    for p, mean in enumerate(out):
        assert_close(mean.cpu(), [grads[p] for grads in towers], weights)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_gradients_are_averaged_into_float32(dtype: torch.dtype) -> None:
    towers, weights = tower_grads(SHAPES, dtype, 3), [0.2, 0.5, 0.3]
    expected = [torch.empty(shape) for shape in SHAPES]
    out = [tensor.cuda() for tensor in expected]
    ops.tower_mean_(expected, flat(towers), weights)
    ops.tower_mean_(out, flat(on_cuda(towers)), weights)
    assert equal(out, expected)


@pytest.mark.parametrize("position", (0, 2))
@pytest.mark.parametrize("offset", (1, 2, 3))
def test_one_unaligned_tower_changes_no_bit_and_out_may_be_a_gradient(offset: int, position: int) -> None:
    towers, weights = tower_grads([(5000,)], torch.float32, 3), [0.2, 0.5, 0.3]
    expected = [torch.empty(5000)]
    ops.tower_mean_(expected, flat(towers), weights)
    grads = flat(on_cuda(towers))
    grads[1] = torch.cat([grads[1].new_zeros(offset), grads[1]])[offset:]
    ops.tower_mean_([grads[position]], grads, weights)
    assert equal([grads[position]], expected)


def test_thousands_of_parameters_are_averaged_each() -> None:
    towers = tower_grads([(1 + p % 9,) for p in range(3000)], torch.float32, 2)
    expected = [torch.empty_like(grad) for grad in towers[0]]
    out = [tensor.cuda() for tensor in expected]
    ops.tower_mean_(expected, flat(towers), [0.5, 0.5])
    ops.tower_mean_(out, flat(on_cuda(towers)), [0.5, 0.5])
    assert equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_near_float64_and_the_same_in_every_run(dtype: torch.dtype) -> None:
    towers = tower_grads(SHAPES, dtype, 3)
    towers[1][7].view(-1)[5] = float("inf")
    towers[2][7].view(-1)[6] = float("nan")
    grads = flat(on_cuda(towers))
    runs = []
    for _ in range(2):
        out = [torch.empty_like(grad) for grad in grads[: len(SHAPES)]]
        runs.append([result.cpu() for result in ops.tower_mean_with_statistics_(out, grads, [1.0] * 3)])
    squares, non_finite, out_squares = runs[0]
    for t, p in ((t, p) for t in range(3) for p in range(len(SHAPES))):
        expected = reference.sum_of_squares(towers[t][p])
        assert int(non_finite[t, p]) == reference.count_non_finite(towers[t][p])
        assert float(squares[t, p]) == pytest.approx(expected, rel=SQUARES_TOLERANCE, nan_ok=True)
    for p in range(len(SHAPES) - 1):
        expected = float(reference.tower_mean([grads[p] for grads in towers], [1.0] * 3).square().sum())
        assert float(out_squares[p]) == pytest.approx(expected, rel=1e-5)
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first.view(torch.int64), second.view(torch.int64))


def test_the_op_runs_in_the_current_stream_and_does_not_wait_for_it() -> None:
    grads = [torch.zeros(100_000, device="cuda") for _ in range(2)]
    out = [torch.zeros(100_000, device="cuda")]
    ops.tower_mean_(out, grads, [1.0, 1.0])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for grad in grads:
            grad.fill_(2.0)
        ops.tower_mean_(out, grads, [1.0, 1.0])
        assert not stream.query()
    stream.synchronize()
    assert bool((out[0] == 4.0).all())


def test_the_plain_op_allocates_nothing() -> None:
    grads = flat(on_cuda(tower_grads(SHAPES, torch.float32, 2)))
    out = [torch.empty_like(grad) for grad in grads[: len(SHAPES)]]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    ops.tower_mean_(out, grads, [0.5, 0.5])
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_captured_graph_averages_what_the_gradients_hold_when_it_is_replayed() -> None:
    grads = [torch.ones(10_000, device="cuda") for _ in range(3)]
    out = [torch.zeros(10_000, device="cuda")]
    with_statistics = [torch.zeros(10_000, device="cuda")]
    # Once before the capture, as torch asks for: the first call loads the kernels.
    ops.tower_mean_(out, grads, [1.0] * 3)
    ops.tower_mean_with_statistics_(with_statistics, grads, [1.0] * 3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.tower_mean_(out, grads, [1.0] * 3)
        squares, _, _ = ops.tower_mean_with_statistics_(with_statistics, grads, [1.0] * 3)
    for value in (2.0, 5.0):
        for grad in grads:
            grad.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert bool((out[0] == 3 * value).all()) and torch.equal(out[0], with_statistics[0])
        assert squares[:, 0].tolist() == [10_000 * value**2] * 3


def test_tensors_choose_the_device_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    grads = [torch.full((5000,), 2.0, device="cuda:1") for _ in range(2)]
    out = [torch.zeros(5000, device="cuda:1")]
    with torch.cuda.device(0):
        ops.tower_mean_(out, grads, [0.5, 0.5])
        ops.tower_mean_with_statistics_(out, grads, [0.5, 0.5])
        assert torch.cuda.current_device() == 0
    assert bool((out[0] == 2.0).all())


def test_more_towers_than_a_launch_can_name_are_refused_by_a_value_error() -> None:
    grads = [torch.ones(4, device="cuda") for _ in range(300)]
    out = [torch.zeros(4, device="cuda")]
    with pytest.raises(ValueError, match="expected at most 250 towers with a weight above 0 on a CUDA device"):
        ops.tower_mean_(out, grads, [1.0] * 300)
    assert bool((out[0] == 0).all())


def test_elements_beyond_two_to_the_31_are_averaged() -> None:
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 6 * numel:
        pytest.skip("needs 13 GB of device memory")
    grads = [torch.zeros(numel, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    for grad in grads:
        grad[2**31 - 3 :] = 1.5
    ops.tower_mean_([grads[0]], grads, [1.0, 1.0])
    assert bool((grads[0][2**31 - 3 :] == 3.0).all())
    assert int(grads[0].count_nonzero()) == 4102


@pytest.mark.parametrize("name", ("tower_mean_", "tower_mean_with_statistics_"))
def test_the_ops_pass_opcheck(name: str) -> None:
    grads = flat(on_cuda(tower_grads([(3, 5), (7,)], torch.float32, 2)))
    out = [torch.empty_like(grad) for grad in grads[:2]]
    opcheck(getattr(torch.ops.torchtower, name).default, (out, grads, [0.5, 0.5]))


def test_two_towers_on_one_gpu_give_the_plain_modules_gradients() -> None:
    plain = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double().cuda()
    wrapped = TowerParallel(copy.deepcopy(plain), device_ids=["cuda:0", "cuda:0"])
    rows = torch.randn(7, 6, dtype=torch.float64, device="cuda")
    plain(rows).square().mean().backward()
    wrapped(rows).square().mean().backward()
    for ours, theirs in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_the_first_to_multiply_matrices_may_be_a_tower() -> None:
    done = run_python("""
import warnings, torch
from torchtower import TowerParallel
warnings.simplefilter("error")
model = TowerParallel(torch.nn.Linear(3, 2).cuda(), device_ids=["cuda:0", "cuda:0"])
model(torch.ones(4, 3, device="cuda")).sum().backward()
""")
    assert (done.returncode, done.stderr) == (0, "")

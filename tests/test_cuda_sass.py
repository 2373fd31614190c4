"""What the machine code shows: wide loads, no local memory, no contraction, few registers."""

import functools
import re

import pytest

from .cuda import sass
from .cuda.toolchain import gate_cubins, require_nvdisasm

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# 16-byte vectors of each tower that a thread loads.
VECTORS = {"float32": 4, "float64": 4, "float16": 2, "bfloat16": 2}


@functools.cache
def kernels_of(architecture):
    require_nvdisasm()
    return sass.kernels(gate_cubins()[architecture])


@pytest.fixture(params=ARCHITECTURES)
def kernels(request):
    return kernels_of(request.param)


def count(kernel, pattern):
    return sum(1 for opcode in kernel.opcodes if re.fullmatch(pattern, opcode))


def averaging(kernels):
    return [kernel for kernel in kernels if kernel.kind.startswith("tower_mean")]


def test_every_kernel_is_there_for_both_sizes_of_argument(kernels):
    plain = [kernel for kernel in kernels if kernel.kind == "tower_mean_kernel"]
    assert len({(k.dtype, k.towers, k.argument_bytes) for k in plain}) == len(plain) == 4 * 4 * 2
    assert len(kernels) == 4 * 4 * 2 + 4 * 2 + 2
    assert all(len(kernel.opcodes) > 50 for kernel in kernels)


def test_gradients_are_read_and_written_by_128_bits(kernels):
    for kernel in averaging(kernels):
        wide = VECTORS[kernel.dtype] * (kernel.towers or 1)
        assert count(kernel, r"LDG\.E\.128(\..*)?") >= wide, kernel
        assert count(kernel, r"STG\.E\.128(\..*)?") >= VECTORS[kernel.dtype], kernel


def test_no_kernel_touches_local_memory(kernels):
    for kernel in kernels:
        assert count(kernel, r"(LDL|STL)(\..*)?") == 0, kernel


def test_no_gradient_is_read_through_the_non_coherent_cache(kernels):
    for kernel in kernels:
        assert count(kernel, r"LDG.*\.CONSTANT(\..*)?") == 0, kernel


def test_every_access_knows_its_address_space(kernels):
    for kernel in kernels:
        assert count(kernel, r"(LD|ST)(\..*)?") == 0, kernel


def test_product_and_sum_are_never_contracted(kernels):
    # A kernel for any count divides, and its division is made of fused operations.
    undivided = [kernel for kernel in kernels if kernel.kind == "tower_mean_kernel" and kernel.towers]
    assert len(undivided) == 4 * 3 * 2
    for kernel in undivided:
        assert count(kernel, r"[FD]FMA(\..*)?") == 0, kernel
        assert count(kernel, r"[FD]MUL(\..*)?") > 0, kernel
        assert count(kernel, r"[FD]ADD(\..*)?") > 0, kernel


def test_four_blocks_fit_a_multiprocessor(kernels):
    # 65536 registers on every architecture, for 4 blocks of 256 threads.
    for kernel in kernels:
        assert 0 < kernel.registers <= 65536 // (4 * 256), kernel

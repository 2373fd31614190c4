"""The CPU kernels without torch: under sanitizers, on emulated machines, and what their object files hold.

Each program works through every dtype, count and layout and prints a digest of all results' bits, which must be
that of the plain build; `tests/test_cpu_kernel.py` and `tests/test_ops.py` hold the plain build to the right values.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence

import pytest

from tests.native.build import AARCH64, ADDRESS, NATIVE, THREAD, Variant
from torchtower import _C

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="these programs are built for x86-64")
KERNELS = _C.available_cpu_kernels()


def digest(variant: Variant, kernels: str, threads: int, emulator: Sequence[str] = ()) -> str:
    if emulator and shutil.which(emulator[0]) is None:
        pytest.skip(f"{emulator[0]} is not installed")
    command = [*emulator, str(variant.build()), kernels, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def expected() -> str:
    return digest(NATIVE, KERNELS[0], threads=1)


@pytest.mark.parametrize("kernels", KERNELS)
def test_bits_do_not_depend_on_the_instruction_set_or_the_threads(expected: str, kernels: str) -> None:
    assert digest(NATIVE, kernels, threads=3) == expected


@pytest.mark.parametrize("kernels", KERNELS)
def test_no_access_out_of_bounds_and_no_undefined_behaviour(expected: str, kernels: str) -> None:
    assert digest(ADDRESS, kernels, threads=2) == expected


@pytest.mark.parametrize("kernels", KERNELS)
def test_no_data_race(expected: str, kernels: str) -> None:
    assert digest(THREAD, kernels, threads=4) == expected


def test_the_baseline_runs_on_x86_64_without_avx(expected: str) -> None:
    assert digest(NATIVE, "baseline", threads=2, emulator=("qemu-x86_64", "-cpu", "Nehalem")) == expected


def test_a_machine_without_avx_is_not_offered_the_avx2_kernels(expected: str) -> None:
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64 is not installed")
    command = ["qemu-x86_64", "-cpu", "Nehalem", str(NATIVE.build()), "avx2", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.split("has:")[1].split()) == (2, ["baseline"])


@pytest.mark.parametrize("kernels", ("baseline", "neon"))
def test_aarch64_gives_the_same_bits(expected: str, kernels: str) -> None:
    assert digest(AARCH64, kernels, threads=2, emulator=("qemu-aarch64",)) == expected


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.parametrize(("name", "table"), [("avx2", "kAvx2Kernels"), ("baseline", "kBaselineKernels")])
def test_a_kernel_file_gives_the_linker_its_table_and_nothing_else(name: str, table: str) -> None:
    # A weak function compiled for AVX2 could be the copy that the linker keeps for everybody.
    listing = subprocess.run(
        ["nm", "--demangle", "--defined-only", "--extern-only", NATIVE.build().with_name(f"kernel_{name}.o")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split()[-1] for line in listing.stdout.splitlines()] == [f"torchtower::cpu::{table}"]

"""nvcc's own PTX, run by ptxcheck through the real launcher: every bit, every access, every line."""

import functools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from .cuda.emulated_cases import CASES
from .cuda.toolchain import (
    CSRC,
    REPOSITORY,
    build_entry_library,
    emulator_runtime,
    require_ptxcheck,
    scratch_folder,
)


def run_case(library, case):
    command = [sys.executable, "-m", "tests.cuda.emulated_cases", emulator_runtime(), library, case]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


@functools.cache
def outcomes():
    """Each case in a process of its own: ptxcheck runs one library a process."""
    library = build_entry_library(CSRC, scratch_folder() / "libentry.so")
    emulator_runtime()
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda case: run_case(library, case), CASES)
        return dict(zip(CASES, done, strict=True))


@pytest.fixture
def finished():
    require_ptxcheck()
    return outcomes()


@pytest.mark.parametrize("case", CASES)
def test_the_ptx_computes_the_contract_bit_for_bit_without_a_finding(finished, case):
    done = finished[case]
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["findings"] == []
    assert report["instructions"] > 1_000_000


def test_every_line_of_every_kernel_is_reached(finished):
    reports = [json.loads(done.stdout)["never_run"] for done in finished.values()]
    names = set(reports[0])
    assert len(names) == 4 * 4 * 2 + 4 * 2 + 2
    never = {name: set.intersection(*(set(report[name]) for report in reports)) for name in names}
    assert {name: lines for name, lines in never.items() if lines} == {}

"""Contract 8: what holds on CPUs and CUDA holds on any device PyTorch knows.

A backend, once registered, is its process's accelerator for good. So the tests of tests/accelerator run in processes of
their own, one for each file; ``pytest tests/accelerator/test_copies.py`` runs one of them by hand.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.accelerator import build
from tests.helpers import ROOT

FILES = sorted((ROOT / "tests" / "accelerator").glob("test_*.py"))
# A deadlock is the failure to expect here: first one test's patience, then the whole file's.
_TEST_TIMEOUT_S = 60
_FILE_TIMEOUT_S = 300


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_the_simulated_accelerator(file: Path) -> None:
    options = [f"faulthandler_timeout={_TEST_TIMEOUT_S}", "faulthandler_exit_on_timeout=true"]
    command = [sys.executable, "-m", "pytest", "-q", str(file), *[word for o in options for word in ("-o", o)]]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_FILE_TIMEOUT_S
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}", pytrace=False)

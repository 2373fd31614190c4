"""Tests of this folder run where they are named, never beside the CPU's: the accelerator stays for good."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.accelerator import load

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    named = (Path(config.invocation_params.dir, argument.split("::")[0]) for argument in config.args)
    return None if any(path.resolve().is_relative_to(HERE) for path in named) else True


@pytest.fixture(scope="session")
def device_module() -> types.ModuleType:
    return load()


@pytest.fixture(autouse=True)
def simulated(device_module: types.ModuleType) -> Iterator[types.ModuleType]:
    """``torch.simulated``, with nothing copied yet and device 0 current."""
    torch.manual_seed(0)
    torch.accelerator.set_device_index(0)
    device_module.reset_copies()
    yield device_module

"""What all tests share: the marker for CUDA, and a seed."""

import os

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_cuda") is None or torch.cuda.is_available():
        return
    if os.environ.get("TORCHTOWER_REQUIRE_CUDA") == "1":
        pytest.fail("TORCHTOWER_REQUIRE_CUDA=1, but torch finds no CUDA device")
    pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

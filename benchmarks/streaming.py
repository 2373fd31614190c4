"""What the machine itself can do: the floor that every way of averaging is held against."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("streaming_limit.cpp")


def cpu_streaming_limit(bytes_each: int, num_towers: int) -> Callable[[], object]:
    """Read ``num_towers`` arrays and write one past the cache, in a plain C++ loop on torch's number of threads."""
    library = ctypes.CDLL(str(_compiled()))
    buffers = [torch.ones(bytes_each // 4) for _ in range(num_towers + 1)]
    pointers = (ctypes.c_void_p * num_towers)(*(buffer.data_ptr() for buffer in buffers[1:]))

    def run() -> object:
        return library.streaming_limit(
            ctypes.c_void_p(buffers[0].data_ptr()),
            pointers,
            ctypes.c_int64(num_towers),
            ctypes.c_int64(bytes_each),
            torch.get_num_threads(),
        )

    return run


def device_copy_limit(bytes_each: int, num_towers: int, device: torch.device) -> Callable[[], object]:
    """Copy as many bytes from the device to itself as the mean moves: half of them read, half written."""
    half = (num_towers + 1) * bytes_each // 2
    source, target = (torch.ones(half, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def _compiled() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="torchtower-benchmark-"))
    library = folder / "streaming_limit.so"
    options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run(["g++", *options, str(SOURCE), "-o", str(library)], check=True)
    return library

"""A simulated accelerator with several devices, neither the CPU nor CUDA, for tests of what any device must do.

`load` registers it with PyTorch as device type ``simulated``, for good: from then on it is the process's accelerator.
Tests that need it stand in this folder and run in a process of their own; see test_accelerator.py beside it.
The environment variable TORCHTOWER_SIMULATED_DEVICES sets the number of devices (2) before the first `load`.

Source:
    torch_openreg in PyTorch's test/cpp_extensions/open_registration_extension, for what such a backend must register.
"""

from __future__ import annotations

import functools
import types

import torch

from tests.accelerator._build import build
from tests.accelerator._module import NAME, make_module

__all__ = ["build", "load"]


@functools.cache
def load() -> types.ModuleType:
    """Make this process have the simulated accelerator.

    Returns:
        Its device module, ``torch.simulated``.

    Raises:
        RuntimeError: it does not compile.
    """
    torch.ops.load_library(str(build()))
    torch.utils.rename_privateuse1_backend(NAME)
    module = make_module()
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return module

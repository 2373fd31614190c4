"""Two devices made in Python, whose tensors are a subclass that wraps CPU tensors and has no memory of its own.

After the idea of PyTorch's own test/test_privateuseone_python_backend.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "wrapping"
aten = torch.ops.aten


class _Module(_DummyBackendModule):
    def device_count(self) -> int:
        return 2


class OnDevice(Tensor):
    """A tensor of the device, around one of the CPU."""

    inner: Tensor
    index: int

    @staticmethod
    def __new__(cls, inner: Tensor, index: int) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, index),
        )
        made.inner, made.index = inner, index
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        wrappers = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, OnDevice)]
        if op is aten.copy_.default:
            _unwrapped(args[0]).copy_(_unwrapped(args[1]))
            return args[0]
        if op is aten.record_stream.default:
            return None
        assert len({wrapper.index for wrapper in wrappers}) == 1, f"{op}: tensors of several devices"
        index, to_cpu = wrappers[0].index, False
        if (device := kwargs.get("device")) is not None:
            to_cpu = torch.device(device).type == "cpu"
            index, kwargs["device"] = torch.device(device).index or 0, "cpu"
        out = op(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
        known = {id(wrapper.inner): wrapper for wrapper in wrappers}

        def wrapped(value: Any) -> Any:
            if to_cpu or not isinstance(value, Tensor):
                return value
            return known[id(value)] if id(value) in known else OnDevice(value, index)

        return tree_map(wrapped, out)


def _unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    _unwrapped(target).copy_(_unwrapped(source))
    return target


def _making(op: Any) -> Any:
    def make(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return OnDevice(op(*args, **kwargs, device="cpu"), torch.device(device or NAME).index or 0)

    return make


def register() -> torch.library.Library:
    """Make these the process's accelerator, for as long as what is returned is held."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _making(aten.empty.memory_format), "PrivateUse1")
    library.impl("empty_strided", _making(aten.empty_strided.default), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    return library


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """The module with parameters on the first device; ``.to`` would set their data, which have none."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().to(f"{NAME}:0"))
    return module

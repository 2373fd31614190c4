"""Carry the caller's thread-local state to a tower's thread.

A new Python thread knows nothing of the caller's grad mode, autocast, mode stacks, saved-tensor hooks or context
variables, and torch exposes no one call that would tell them: they are carried by list. Every private name of torch
that this takes stands in this file.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.utils import parametrize
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _pop_mode, _push_mode

from torchtower.threads.streams import Streams

Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., Any])
_C: Any = torch._C
_autograd: Any = torch._C._autograd
_parametrize: Any = parametrize


def untraced(function: Function) -> Function:
    """Decorates what a surrounding torch.compile must leave alone: the graph breaks there, nothing within is traced."""
    # What torch.compiler.disable does, without importing the compiler.
    decorated: Function = vars(torch)["_disable_dynamo"](function)
    return decorated


def transforming() -> bool:
    """Whether a program is being traced, exported or run with fake tensors, or a transform or forward AD is under way.

    No other thread can take part then.
    """
    return (
        has_levels()
        or forward_ad._current_level >= 0
        or _C._is_tracing()
        or torch.compiler.is_exporting()
        or is_fx_symbolic_tracing()
        or _C._get_dispatch_mode(_C._TorchDispatchModeKey.FAKE) is not None
    )


def has_levels() -> bool:
    """Whether this thread is within a transform of `torch.func`, which no other thread can be brought into."""
    return _C._functorch.maybe_current_level() is not None


def without_parametrization_cache(work: Callable[[], Result]) -> Result:
    """Within ``parametrize.cached()`` let towers compute their own: the cache knows modules by their original alone."""
    if not _parametrize._cache_enabled:  # written to by no one then: another thread may be entering
        return work()
    before, _parametrize._cache_enabled = _parametrize._cache_enabled, 0
    try:
        return work()
    finally:
        _parametrize._cache_enabled = before


class ThreadState:
    """The caller's thread-local state, taken at construction; `run` does work under it in another thread.

    Args:
        devices: the towers', in tower order. Autocast state of their types and the CPU's is carried; a default device
            that names the main tower's names the tower's own in a tower.
        streams: that the caller's work goes to.
    """

    def __init__(self, devices: Sequence[torch.device], streams: Streams) -> None:
        self._main_device = devices[0]
        self._streams = streams
        self._grad_enabled = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        kinds = _device_types(tuple(devices))
        self._autocasts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self._autocast_cache = torch.is_autocast_cache_enabled()
        self._function_modes = list(map(_C._get_function_stack_at, range(_C._len_torch_function_stack())))
        self._dispatch_modes = list(map(_C._get_dispatch_stack_at, range(_C._len_torch_dispatch_stack())))
        self._saved_tensor_hooks = _autograd._top_saved_tensors_default_hooks(True)
        self._hooks_disabled = _autograd._saved_tensors_hooks_get_disabled_error_message()
        self._context = contextvars.copy_context()
        # Most callers have none of these.
        self._has_contexts = bool(
            self._inference
            or self._streams
            or self._function_modes
            or self._dispatch_modes
            or self._saved_tensor_hooks
            or self._hooks_disabled is not None
        )

    def run(self, device: torch.device, work: Callable[[], Result]) -> Result:
        """Do ``work`` in this thread, for a tower on ``device``, under the caller's state."""
        return self._context.copy().run(self._run, device, work)

    def _run(self, device: torch.device, work: Callable[[], Result]) -> Result:
        # Not restored afterwards: a tower's thread does nothing but jobs, and each sets them all.
        _C._set_grad_enabled(self._grad_enabled)
        torch.set_autocast_cache_enabled(self._autocast_cache)
        for kind, enabled, dtype in self._autocasts:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        # The cache of cast weights is one for the process, and any thread that leaves its outermost autocast clears it
        # for all: one level more of nesting while a tower works keeps it whole. The caller clears it (see workers).
        torch.autocast_increment_nesting()
        try:
            return self._run_within_contexts(device, work) if self._has_contexts else work()
        finally:
            torch.autocast_decrement_nesting()

    def _run_within_contexts(self, device: torch.device, work: Callable[[], Result]) -> Result:
        with ExitStack() as stack:
            if self._inference:
                stack.enter_context(torch.inference_mode())
                torch.set_grad_enabled(self._grad_enabled)
            stack.enter_context(self._streams.current())
            if self._saved_tensor_hooks is not None and not _of_checkpoint(self._saved_tensor_hooks):
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*self._saved_tensor_hooks))
            if self._hooks_disabled is not None:
                stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(self._hooks_disabled))
            for mode in self._dispatch_modes:
                _push_mode(mode)
                stack.callback(_pop_mode, getattr(mode, "_mode_key", None))
            for mode in self._function_modes:
                _C._push_on_torch_function_stack(self._of_tower(mode, device))
                stack.callback(_C._pop_torch_function_stack)
            return work()

    def _of_tower(self, mode: Any, device: torch.device) -> Any:
        if isinstance(mode, DeviceContext) and _names(mode.device, self._main_device):
            return DeviceContext(device)
        return mode


@functools.cache
def _device_types(devices: tuple[torch.device, ...]) -> list[str]:
    return sorted({"cpu", *(device.type for device in devices)})


def _of_checkpoint(hooks: Any) -> bool:
    # A checkpoint around the wrapper tells what it saved by its order, which towers at once would shuffle.
    return getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def _names(device: torch.device, main_device: torch.device) -> bool:
    return device.type == main_device.type and device.index in (None, main_device.index)

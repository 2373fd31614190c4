"""Hooks of the user's tensors that a backward of ours has no gradient for.

A plain module's backward does not come near what the loss does not depend on. Ours is one node for all inputs and
outputs, and the engine goes through each: where there is no gradient it calls their hooks all the same, with None.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchtower.memory import version_of


class _Guard:
    """Stands for a hook: an input's until the backward ends, an output's for good."""

    def __init__(self, hook: Any) -> None:
        self.hook: Any = hook.hook if isinstance(hook, _Guard) else hook  # of a backward that has failed


class _IfDefined(_Guard):
    """Of a hook on the gradient."""

    def __call__(self, grad: Any) -> Any:
        return None if grad is None else self.hook(grad)


class _IfAccumulated(_Guard):
    """Of a hook that is called when the gradient has been accumulated."""

    def __init__(self, hook: Any, tensor: Tensor) -> None:
        super().__init__(hook)
        self._before = tensor.grad
        self._version = None if self._before is None else version_of(self._before)

    def __call__(self, tensor: Tensor) -> None:
        grad = tensor.grad
        if grad is not self._before or (grad is not None and version_of(grad) != self._version):
            self.hook(tensor)


class _HooksOfOutput(OrderedDict[int, Any]):
    """Takes the place of the dict that ``Tensor.register_hook`` would make."""

    def __setitem__(self, key: int, hook: Any) -> None:
        # One of `register_multi_grad_hook` counts the calls of all of its tensors' nodes, and takes None.
        counts = getattr(hook, "__module__", None) == "torch.autograd.graph"
        super().__setitem__(key, hook if counts or isinstance(hook, _Guard) else _IfDefined(hook))


def spare_hooks_of_outputs(outputs: Iterable[Tensor]) -> None:
    """Have hooks that the user will register on a node's outputs called only if a gradient comes."""
    for output in outputs:
        hooked: Any = output
        hooked._backward_hooks = _HooksOfOutput()
        hooked.grad_fn._register_hook_dict(output)


def spare_hooks(tensors: Iterable[Tensor]) -> None:
    """For the rest of the running backward, have hooks called only if a gradient does come, by another way."""
    guards: list[tuple[Any, int, _Guard]] = []
    for tensor in tensors:
        hooked: Any = tensor
        for key, hook in list((hooked._backward_hooks or {}).items()):
            guards.append((hooked._backward_hooks, key, _IfDefined(hook)))
        for key, hook in list((hooked._post_accumulate_grad_hooks or {}).items()):
            guards.append((hooked._post_accumulate_grad_hooks, key, _IfAccumulated(hook, tensor)))
    for hooks, key, guard in guards:
        hooks[key] = guard
    if guards:
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(partial(_put_back, guards))


def _put_back(guards: list[tuple[Any, int, _Guard]]) -> None:
    for hooks, key, guard in guards:
        if hooks.get(key) is guard:  # not removed, nor another bridge's
            hooks[key] = guard.hook

"""Modules that `torch.compile` has compiled: what is compiled once serves all towers.

Note [Towers and the compiler]
Towers run the same code, and find what one of them has had compiled. But torch looks for that before it waits for
whoever compiles: T towers that meet something new at once compile it T times, and take T of the few places that torch
has for each function (`torch._dynamo.config.recompile_limit`), after which it compiles no more. Nor does it expect that
others look while it moves the graph that has been found to the front: who looks then may miss it, and compiles it anew.
So towers take turns where the inputs, or the state under which they run, are not those of the call before, as another
graph may be what fits; and in that call's backward, which is compiled when it first runs. Once new sizes bring no new
graph, one serves all sizes, and calls of other sizes run at once. There are as many places for each tower as torch has
for all: a graph is of one device, and where two wrappers call the same code in turns, a graph may be missed after all,
but in each tower once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from torchtower.replicas.scripted import is_optimized, is_training

Function = Callable[..., Any]


class Compilation:
    """What one wrapper's towers have had compiled, as far as one can tell from outside.

    Args:
        devices: the towers'.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._num_towers = len(devices)
        self._kinds = sorted({"cpu", *[device.type for device in devices]})
        self.is_there = False  # whether the module, or a part of it, is compiled
        self._known: set[Any] = set()  # inputs for which something was compiled, and under which state
        self._last: Any = (None, None)  # state and inputs
        self._is_by_size = True  # whether other sizes may have other graphs

    def look_at(self, modules: Iterable[nn.Module], *, is_all: bool) -> None:
        """See whether some are compiled.

        Args:
            modules: which have changed.
            is_all: they are all that there are, and what was compiled for them may be of no use any more.
        """
        if is_all or not self.is_there:
            self.is_there = any(map(_is_compiled, modules))
            self._known.clear()
            self._last = (None, None)

    def watch(
        self, module: nn.Module, function: Function | None, inputs: Iterable[Tensor]
    ) -> AbstractContextManager[bool]:
        """What one call of the towers runs within, which tells whether they take turns.

        Args:
            module: which is called.
            function: of the user's, if such a one calls the module.
            inputs: on which.
        """
        is_function = is_compiled_function(function)
        if not (self.is_there or is_function):  # nearly always
            return _all_at_once
        autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in self._kinds]
        grad_modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        state = (id(function) if is_function else None, is_training(module), *grad_modes, *autocast)
        call = tuple([(tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad) for tensor in inputs])
        last_state, last_call = self._last
        in_turn = state != last_state or (self._is_by_size and call != last_call)
        return _Watching(in_turn, self._num_towers, functools.partial(self._learn, state, call))

    def _learn(self, state: Any, call: Any, has_compiled: bool) -> None:
        self._last = (state, call)
        if (state, call) not in self._known:
            self._is_by_size = has_compiled
            if has_compiled:
                self._known.add(self._last)


_all_at_once = nullcontext(False)


class _Watching:
    """Within this a call runs that may compile."""

    # No generator's context manager, which would write to an error that passes.
    def __init__(self, in_turn: bool, num_towers: int, learn: Callable[[bool], None]) -> None:
        self._in_turn = in_turn
        self._room = _room_for(num_towers)
        self._learn = learn

    def __enter__(self) -> bool:
        self._num_graphs = _num_graphs()
        self._room.__enter__()
        return self._in_turn

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._room.__exit__(kind, *rest)
        if kind is None:
            self._learn(_num_graphs() != self._num_graphs)


def is_compiled_function(function: Function | None) -> bool:
    """Whether this is what ``torch.compile`` returns of a function."""
    return hasattr(function, "_torchdynamo_orig_callable")


def _is_compiled(module: nn.Module) -> bool:
    is_called_compiled = module._compiled_call_impl is not None  # module.compile()
    return is_called_compiled or is_optimized(module) or is_compiled_function(module.forward)


def _num_graphs() -> int:
    dynamo: Any = torch._dynamo
    count: int = dynamo.utils.counters["stats"]["unique_graphs"]
    return count


def _room_for(num_towers: int) -> Any:
    """Let a function have as many graphs for each tower as torch lets it have for all."""
    config: Any = torch._dynamo.config
    return config.patch(recompile_limit=config.recompile_limit * num_towers)

"""The device module of the simulated accelerator: what ``torch.cuda`` is for CUDA devices."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.accelerator import current_device_index, device_index, set_device_index, synchronize

NAME = "simulated"


class Copies(NamedTuple):
    """How often, and how much in all, was copied one way."""

    number: int
    num_bytes: int


class device(device_index):  # torch.utils.checkpoint asks for this name
    """Set the current device within a ``with`` statement."""

    def __init__(self, which: Any) -> None:
        super().__init__(_index(which))


def _index(which: Any) -> int:
    if isinstance(which, int):
        return which
    index = torch.device(NAME if which is None else which).index
    return current_device_index() if index is None else index


def device_count() -> int:
    """How many devices there are."""
    return int(torch.ops.simulated.device_count())


def copies() -> dict[tuple[str, str], Copies]:
    """All copies since `reset_copies`, by source and destination: ``("cpu", "simulated:0")``."""
    flat = torch.ops.simulated.copies()
    rows = [flat[i : i + 4] for i in range(0, len(flat), 4)]
    return {(_name(source), _name(to)): Copies(number, size) for source, to, number, size in rows}


def reset_copies() -> None:
    """Begin to count copies anew."""
    torch.ops.simulated.reset_copies()


def take_waits() -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Device and stream of each stream that was told to wait since this was last asked, and of whom it waits for."""
    flat = torch.ops.simulated.take_waits()
    return [((flat[i], flat[i + 1]), (flat[i + 2], flat[i + 3])) for i in range(0, len(flat), 4)]


def _name(index: int) -> str:
    return "cpu" if index < 0 else f"{NAME}:{index}"


def memory_allocated(which: Any = None) -> int:
    """Bytes that are allocated on a device now."""
    return int(torch.ops.simulated.memory(_index(which))[0])


def max_memory_allocated(which: Any = None) -> int:
    """The most bytes that were allocated on a device since `reset_peak_memory_stats`."""
    return int(torch.ops.simulated.memory(_index(which))[1])


def reset_peak_memory_stats(which: Any = None) -> None:
    """Take what is allocated now for the most."""
    torch.ops.simulated.reset_peak_memory(_index(which))


def manual_seed_all(seed: int) -> None:
    """Seed every device's default generator; `torch.manual_seed` calls this."""
    for generator in _generators():
        generator.manual_seed(seed)


def get_rng_state(which: Any = None) -> torch.Tensor:
    """The state of a device's default generator."""
    return _generators()[_index(which)].get_state()


def set_rng_state(state: torch.Tensor, which: Any = None) -> None:
    """Set the state of a device's default generator."""
    _generators()[_index(which)].set_state(state)


def _generators() -> Sequence[torch.Generator]:
    # Looked up at each call, as torch.cuda does; by operators where the module has no such name, as torch_openreg's.
    named: Sequence[torch.Generator] = getattr(torch.get_device_module(NAME), "default_generators", ())
    return named or [torch.ops.simulated.default_generator(index) for index in range(device_count())]


def make_module() -> types.ModuleType:
    """The module that becomes ``torch.simulated``; once its operators are loaded."""
    module = types.ModuleType(f"torch.{NAME}", __doc__)
    vars(module).update({thing.__name__: thing for thing in _EXPORTS})
    vars(module).update(
        default_generators=tuple(map(torch.ops.simulated.default_generator, range(device_count()))),
        current_device=current_device_index,
        set_device=set_device_index,
        synchronize=synchronize,
        is_available=lambda: device_count() > 0,
        is_initialized=lambda: True,
        _initialized=True,  # without it torch.utils.checkpoint saves no state of generators
        _is_in_bad_fork=lambda: False,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    )
    return module


_EXPORTS = (
    device,
    device_count,
    copies,
    reset_copies,
    take_waits,
    memory_allocated,
    max_memory_allocated,
    reset_peak_memory_stats,
    manual_seed_all,
    get_rng_state,
    set_rng_state,
)

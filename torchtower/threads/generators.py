"""Whose random numbers a tower draws: the default generator's for the main tower, for each other one its own.

See Note [Random numbers of towers] in `torchtower.threads.tower_random`, which has them drawn from there.
"""

from __future__ import annotations

import functools
import inspect
import threading
import zlib
from contextlib import suppress
from typing import Any

import torch

Generator = Any  # torch.Generator, or what stands for a device's
_taken: dict[str, str] = {}  # by device type, whose generators its operators take: its "own", the "cpu"'s, "nobody"'s
real_states: dict[str, tuple[Any, Any]] = {}  # by device type, its module's own get_rng_state and set_rng_state


class Seeds:
    """What the towers of one job derive their generators from: the default generators' state at the first draw.

    Args:
        main_device: whose default generator the main tower draws from, hence the only one of its type that moves.
    """

    def __init__(self, main_device: torch.device) -> None:
        self._main_device = main_device
        self._states: dict[str, int] = {}
        self._drawn: set[str] = set()
        self._lock = threading.Lock()

    def seed(self, device: torch.device, tower_index: int) -> int:
        """The seed of ``tower_index`` for draws on ``device``; on which device of its type makes no difference."""
        with self._lock:
            if device.type not in self._states:
                self._states[device.type] = hash_of(self._source(device.type))
        return zlib.crc32(f"{self._states[device.type]} {tower_index}".encode()) | tower_index << 32

    def note_draw(self, device_type: str) -> None:
        """A tower other than the main one has drawn."""
        with self._lock:
            self._drawn.add(device_type)

    def move_on(self) -> None:
        """Once all towers are done: where others drew and the main one did not, let the next job's seeds differ."""
        for device_type in self._drawn:
            source = self._source(device_type)
            if hash_of(source) == self._states[device_type]:
                generator = source if isinstance(source, torch.Generator) else None
                torch.empty((), device=source.device).random_(generator=generator)

    def _source(self, device_type: str) -> Generator:
        main = device_type == self._main_device.type
        source = default_generator(self._main_device if main else torch.device(device_type))
        return torch.default_generator if source is None else source


class TowerGenerators:
    """One tower's generators, one a device, for the length of one job."""

    def __init__(self, tower_index: int, seeds: Seeds) -> None:
        self._tower_index = tower_index
        self._seeds = seeds
        self._generators: dict[torch.device, Generator] = {}
        self._fresh: dict[torch.device, int] = {}

    def on(self, device: torch.device) -> Generator:
        """The generator that this tower's draws on ``device`` come from; None where only the device knows it."""
        device = drawn_on(device)
        if device not in self._generators:
            seed = self._seeds.seed(device, self._tower_index)
            if self._tower_index == 0 or _taken.get(device.type) == "nobody":
                self._generators[device] = default_generator(device)
            else:
                generator = self._generators[device] = torch.Generator(device).manual_seed(seed)
                self._fresh[device] = hash_of(generator)
        return self._generators[device]

    def note_draws(self) -> None:
        """Tell what was drawn; recomputing what a checkpoint dropped is none, as it leaves generators as they were."""
        for device, fresh in self._fresh.items():
            if hash_of(self._generators[device]) != fresh:
                self._seeds.note_draw(device.type)


def look_at_operators(device: torch.device) -> None:
    """Find out, once for its type, whose generators a device's random operators take; see `drawn_on`."""
    if device.type in _taken:
        return
    numbers = torch.empty(1, device=device)
    taken = "nobody"
    for whose, where in (("cpu", "cpu"), ("own", device)):
        with suppress(Exception):  # what a backend raises, or it has no generators at all
            numbers.uniform_(generator=torch.Generator(where))
            taken = whose
    _taken[device.type] = taken


def drawn_on(device: torch.device) -> torch.device:
    """Whose generators a device's operators take: the CPU's, where a backend leaves its random numbers to the CPU."""
    return torch.device("cpu") if _taken.get(device.type) == "cpu" else device


def hash_of(generator: Generator) -> int:
    """Tells whether a generator's state has moved."""
    return zlib.crc32(generator.get_state().numpy().tobytes())


def default_generator(device: torch.device) -> Generator:
    """The device's own default generator, whichever thread asks; None where neither it nor its state can be had."""
    if device.type == "cpu":
        return torch.default_generator
    generators = getattr(torch.get_device_module(device), "default_generators", ())
    generators = getattr(generators, "real", generators)  # those that a stand-in has taken the name of
    if device.index < len(generators):
        return generators[device.index]
    return _generator_by_state(device) if device.type in real_states else None


@functools.cache
def _generator_by_state(device: torch.device) -> _GeneratorByState:
    return _GeneratorByState(device)


class _GeneratorByState:
    """A device's default generator where its module does not give it, but its state."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def get_state(self) -> torch.Tensor:
        get, _ = real_states[self.device.type]
        state: torch.Tensor = get(*self._where(get, 0))
        return state

    def set_state(self, state: torch.Tensor) -> None:
        _, set_ = real_states[self.device.type]
        set_(state, *self._where(set_, 1))

    def _where(self, function: Any, num_before: int) -> tuple[torch.device, ...]:
        # torch.mps has one device, and asks for none.
        return (self.device,) if len(inspect.signature(function).parameters) > num_before else ()

"""Random numbers of a tower's own, repeatable from ``torch.manual_seed``.

Note [Random numbers of towers]
All threads of a process share one CPU generator, and ``torch.manual_seed`` seeds every accelerator alike: towers that
drew from the default generators would race for their numbers on a CPU, and draw identical dropout masks elsewhere. So
tower 0 draws from the default generator, as the plain module would, and tower t from one that is seeded from a hash of
the default generator's state and of t, taken at the first draw of a job: a forward that draws nothing costs and changes
nothing. ``F.dropout`` takes no generator, hence the detour: ATen's random operators are intercepted in tower threads
alone, by a dispatch key that PyTorch keeps for its own tests, whose fallback is a fall-through (other operators pay
nothing). Activation checkpointing saves and restores ``torch.random.default_generator``, so a stand-in with a face for
each thread takes that name. Operators that draw on an accelerator and take no generator (fused dropout, attention) see
the device's own generator set to the tower's state while they run.
"""

from __future__ import annotations

import functools
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_KEY_NAME = "TESTING_ONLY_GenericMode"
_lock = threading.Lock()
_install_lock = threading.Lock()
_local = threading.local()
_libraries: list[Any] = []


class Seeds:
    """What the towers of one job derive their generators from: the default generators' state at the first draw."""

    def __init__(self) -> None:
        self._states: dict[torch.device, int] = {}
        self._lock = threading.Lock()

    def seed(self, device: torch.device, tower_index: int) -> int:
        """The seed of ``tower_index`` for draws on ``device``."""
        with self._lock:
            if device not in self._states:
                state = _default_generator(device).get_state()
                self._states[device] = zlib.crc32(state.numpy().tobytes())
        return zlib.crc32(f"{self._states[device]} {tower_index}".encode()) | tower_index << 32


class TowerGenerators:
    """One tower's generators, one a device, for the length of one job."""

    def __init__(self, tower_index: int, seeds: Seeds) -> None:
        self._tower_index = tower_index
        self._seeds = seeds
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator that this tower's draws on ``device`` come from."""
        seed = self._seeds.seed(device, self._tower_index)
        if self._tower_index == 0:
            return _default_generator(device)
        generator = self._generators.get(device)
        if generator is None:
            generator = torch.Generator(device).manual_seed(seed)
            self._generators[device] = generator
        return generator


@contextmanager
def drawing_from(generators: TowerGenerators) -> Iterator[None]:
    """Let this thread's random operators draw from ``generators``."""
    key = _install()
    _local.generators = generators
    torch._C._dispatch_tls_set_dispatch_key_included(key, True)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_included(key, False)
        _local.generators = None


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    return torch.get_device_module(device).default_generators[device.index]  # type: ignore[no-any-return]


class _DefaultGeneratorOfThread:
    """Stands for ``torch.random.default_generator``: in a tower's thread, that tower's CPU generator."""

    def __getattr__(self, name: str) -> Any:
        generators = getattr(_local, "generators", None)
        generator = torch.default_generator if generators is None else generators.on(torch.device("cpu"))
        return getattr(generator, name)


def _install() -> Any:
    """Intercept ATen's random operators under the spare key, once in a process."""
    with _install_lock:
        return _install_once()


@functools.cache
def _install_once() -> Any:
    key = torch._C._parse_dispatch_key(_KEY_NAME)
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, _KEY_NAME)
    operators = torch.library.Library("aten", "IMPL")
    on_accelerators = torch.accelerator.is_available()
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace != "aten" or name in ("manual_seed", "initial_seed", "seed"):
            continue
        positions = [i for i, a in enumerate(schema.arguments) if "Generator" in str(a.type)]
        if not positions and not on_accelerators:
            continue
        overload = _overload(name, schema.overload_name)
        if overload is None:
            continue
        if positions:
            kernel = functools.partial(_draw_with_generator, overload, key, positions[0])
        elif torch.Tag.nondeterministic_seeded in overload.tags:
            kernel = functools.partial(_draw_without_generator, overload, key)
        else:
            continue
        operators.impl(overload, kernel, _KEY_NAME, with_keyset=True)
    _libraries.extend([fallback, operators])
    vars(torch.random)["default_generator"] = _DefaultGeneratorOfThread()
    return key


def _overload(name: str, overload_name: str) -> Any:
    packet = getattr(torch.ops.aten, name, None)
    return None if packet is None else getattr(packet, overload_name or "default", None)


def _draw_with_generator(overload: Any, key: Any, position: int, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) > position:
        if args[position] is None:
            generator = _local.generators.on(_device_of(args, kwargs))
            args = (*args[:position], generator, *args[position + 1 :])
    elif kwargs.get("generator") is None:
        kwargs["generator"] = _local.generators.on(_device_of(args, kwargs))
    return overload.redispatch(keyset.remove(key), *args, **kwargs)


def _draw_without_generator(overload: Any, key: Any, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    device = _device_of(args, kwargs)
    # On a CPU these are composed of operators that take a generator, which are intercepted in their turn.
    if device.type == "cpu" or _local.generators.on(device) is _default_generator(device):
        return overload.redispatch(keyset.remove(key), *args, **kwargs)
    own, default = _local.generators.on(device), _default_generator(device)
    with _lock:
        before = default.get_state()
        default.set_state(own.get_state())
        try:
            return overload.redispatch(keyset.remove(key), *args, **kwargs)
        finally:
            own.set_state(default.get_state())
            default.set_state(before)


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device
    device = torch.device(kwargs.get("device") or "cpu")
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    return device

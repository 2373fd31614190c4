"""Random numbers of a tower's own, repeatable from ``torch.manual_seed``.

Note [Random numbers of towers]
All threads of a process share one CPU generator, and ``torch.manual_seed`` seeds every accelerator alike: towers that
drew from the default generators would race for their numbers on a CPU, and draw identical dropout masks elsewhere. So
tower 0 draws from the default generator, as the plain module would, and tower t from one that is seeded from a hash of
the default generator's state and of t, taken at the first draw of a job: a forward that draws nothing costs and changes
nothing. ``F.dropout`` takes no generator, hence the detour: ATen's random operators are intercepted in tower threads
alone, by a dispatch key that PyTorch keeps for its own tests, whose fallback is a fall-through (other operators pay
nothing). Activation checkpointing saves and restores ``torch.random.default_generator``, so a stand-in with a face for
each thread takes that name for torch's own functions (who asks the module for it gets a real generator, this thread's),
and another takes the name of the device module's ``default_generators``. Operators that draw on an accelerator and take
no generator (fused dropout, attention) see the device's own generator set to the tower's state while they run, and it
is theirs alone meanwhile. A device whose operators take no generator of its own has its random numbers from the CPU's.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import torch

from torchtower.threads.generators import (
    Generator,
    TowerGenerators,
    default_generator,
    drawn_on,
    look_at_operators,
    real_states,
)

Result = TypeVar("Result")
_KEY_NAME = "TESTING_ONLY_GenericMode"
_install_lock = threading.RLock()
_locks: dict[torch.device, threading.Lock] = {}  # of the default generators


class _Here(threading.local):
    """What draws in this thread come from."""

    generators: Any = None  # a tower's, of the job that it does or has done last: a collector may draw between two
    borrowed: torch.device | None = None  # whose default generator stands for this tower's
    is_intercepted = False  # whether this thread's draws come here at all


_local = _Here()
_libraries: list[Any] = []


def draw_from(generators: TowerGenerators, work: Callable[[], Result]) -> Result:
    """Do ``work`` with this thread's random operators drawing from ``generators``, from now on until the next call."""
    # Once they are intercepted in this thread, they stay so; the interpreter's exit alone ends it, for torch ends the
    # libraries then: towers draw from the default generator.
    is_possible = bool(_libraries)
    if _local.is_intercepted != is_possible:
        torch._C._dispatch_tls_set_dispatch_key_included(_intercept_draws_once(), is_possible)
        _local.is_intercepted = is_possible
    _local.generators, _local.borrowed = generators, None
    try:
        return work()
    finally:
        generators.note_draws()


def _cpu_generator_here() -> torch.Generator:
    """In a tower's thread, that tower's CPU generator, elsewhere the default one."""
    generators = _local.generators
    return torch.default_generator if generators is None else generators.on(torch.device("cpu"))


class _DefaultGeneratorOfThread:
    """Stands for the name ``default_generator`` in the functions of ``torch.random``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_cpu_generator_here(), name)


class _RandomModule(ModuleType):
    """``torch.random`` for those outside of it, who may hand its generator to an operator."""

    # No property: from Python 3.14 on, code that runs often finds what the module's dict has, whatever its class has.
    def __getattribute__(self, name: str) -> Any:
        return _cpu_generator_here() if name == "default_generator" else super().__getattribute__(name)


class _DefaultGeneratorsOfThread(Sequence[torch.Generator]):
    """Stands for a device module's ``default_generators``: in a tower's thread, that tower's own."""

    def __init__(self, device_type: str, real: Sequence[torch.Generator]) -> None:
        self._device_type = device_type
        self.real = real

    def __len__(self) -> int:
        return len(self.real)

    def __getitem__(self, index: Any) -> Any:
        generators = _local.generators
        if generators is None or not isinstance(index, int):
            return self.real[index]
        return generators.on(torch.device(self._device_type, range(len(self.real))[index]))


def intercept_draws(devices: Iterable[torch.device]) -> Any:
    """Intercept ATen's random operators under the spare key, once in a process, for towers on these devices."""
    with _install_lock:
        _stand_in_for_device_module()
        for device in devices:
            look_at_operators(device)
        return _intercept_draws_once()


@functools.cache
def _intercept_draws_once() -> Any:
    key = torch._C._parse_dispatch_key(_KEY_NAME)
    fallback, operators = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    try:
        _register(fallback, operators, key)
        _let_higher_order_operators_pass(key)
        vars(torch.random)["default_generator"] = _DefaultGeneratorOfThread()
        torch.random.__class__ = _RandomModule
        _libraries.extend([fallback, operators])
        weakref.finalize(torch.random, _libraries.clear)  # at the exit: just before torch ends them
    except BaseException:  # broken off by Ctrl-C: half of it would be in the way of the next try
        fallback._destroy()
        operators._destroy()
        raise
    return key


def _register(fallback: Any, operators: Any, key: Any) -> None:
    """Let operators that draw numbers find ours under the key, and all others what they would without it."""
    fallback.fallback(torch.library.fallthrough_kernel, _KEY_NAME)
    on_accelerators = torch.accelerator.current_accelerator(check_available=True) is not None
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
        elif torch.Tag.nondeterministic_seeded in overload.tags and not _is_composed(schema.name, overload):
            kernel = functools.partial(_draw_without_generator, overload, key)
        else:
            continue
        operators.impl(overload, kernel, _KEY_NAME, with_keyset=True)


def _stand_in_for_device_module() -> None:
    """Again for every pool: a device's initialisation may have put the real names back."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return
    module = torch.get_device_module(accelerator)
    generators = getattr(module, "default_generators", None)
    if generators and not isinstance(generators, _DefaultGeneratorsOfThread):
        module.default_generators = _DefaultGeneratorsOfThread(accelerator.type, generators)
    if accelerator.type not in real_states and hasattr(module, "get_rng_state"):
        _stand_in_for_states(module, accelerator.type)


def _stand_in_for_states(module: Any, device_type: str) -> None:
    real_get, real_set = module.get_rng_state, module.set_rng_state

    def get_rng_state(device: Any = None) -> torch.Tensor:
        with _own_generator(device_type, device) as own:
            state: torch.Tensor = real_get(*_given(device)) if own is None else own.get_state()
        return state

    def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
        with _own_generator(device_type, device) as own:
            if own is None:
                real_set(new_state, *_given(device))
            else:
                own.set_state(new_state)

    real_states[device_type] = (real_get, real_set)
    module.get_rng_state = functools.update_wrapper(get_rng_state, real_get)
    module.set_rng_state = functools.update_wrapper(set_rng_state, real_set)


def _given(device: Any) -> tuple[Any, ...]:
    return () if device is None else (device,)


@contextmanager
def _own_generator(device_type: str, which: Any) -> Iterator[Generator]:
    """In a tower's thread, its generator on a device, which nobody else borrows meanwhile; elsewhere None."""
    generators = _local.generators
    if generators is None:
        yield None
        return
    index = None if which is None else torch.device(which).index
    device = torch.device(device_type, torch.accelerator.current_device_index() if index is None else index)
    with nullcontext() if _local.borrowed == device else _lock_of(device):
        yield generators.on(device)


def _lock_of(device: torch.device) -> threading.Lock:
    return _locks.setdefault(device, threading.Lock())


def _let_higher_order_operators_pass(key: Any) -> None:
    # torch.cond, autograd functions under torch.func and their kind dispatch in Python, which knows no fallbacks.
    torch._ops._HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS.append(key)  # of those to be made
    for operator in torch._ops._higher_order_ops.values():
        operator.fallthrough(key)


def _is_composed(name: str, overload: Any) -> bool:
    # Of operators that are intercepted in their turn, if they draw at all.
    full_name = f"{name}.{overload._overloadname}".removesuffix(".default")
    return torch._C._dispatch_has_kernel_for_dispatch_key(full_name, "CompositeImplicitAutograd")


def _overload(name: str, overload_name: str) -> Any:
    packet = getattr(torch.ops.aten, name, None)
    return None if packet is None else getattr(packet, overload_name or "default", None)


def _draw_with_generator(overload: Any, key: Any, position: int, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    given = args[position] if len(args) > position else kwargs.get("generator")
    device = _device_of(args, kwargs)
    if (given is None or _is_default(given, device)) and device != _local.borrowed:
        generator = _local.generators.on(device)
        if device.type != "cpu" and generator is default_generator(device):
            return _draw_without_generator(overload, key, keyset, *args, **kwargs)  # another tower may borrow it
        if len(args) > position:
            args = (*args[:position], generator, *args[position + 1 :])
        else:
            kwargs["generator"] = generator
    return overload.redispatch(keyset.remove(key), *args, **kwargs)


def _is_default(generator: torch.Generator, device: torch.device) -> bool:
    # An operator may be handed another Python object of the same generator.
    address = getattr(default_generator(device), "_cdata", None)
    return bool(generator._cdata == address)  # type: ignore[attr-defined]


def _draw_without_generator(overload: Any, key: Any, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    device = _device_of(args, kwargs)
    # On a CPU these are composed of operators that take a generator, which are intercepted in their turn. So most are
    # elsewhere; a fused one draws as it likes where the default generator cannot be had.
    is_left_alone = device.type == "cpu" or device == _local.borrowed or default_generator(device) is None
    with nullcontext() if is_left_alone else _borrowing(device):
        return overload.redispatch(keyset.remove(key), *args, **kwargs)


@contextmanager
def _borrowing(device: torch.device) -> Iterator[None]:
    """Let the device's default generator be this tower's and nobody else's."""
    own, default = _local.generators.on(device), default_generator(device)
    with _lock_of(device):
        _local.borrowed = device
        before = default.get_state()
        if own is not default:
            default.set_state(own.get_state())
        try:
            yield
        finally:
            _local.borrowed = None
            if own is not default:
                own.set_state(default.get_state())
                default.set_state(before)


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    device = kwargs.get("device")
    if device is None:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        device = next((tensor.device for tensor in tensors), "cpu")
    device = torch.device(device)
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    return drawn_on(device)


def _release_all() -> None:
    # In a forked child: the threads that held a device's generator do not exist here.
    _install_lock.release()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    # A child that is forked in the middle of the installation would have half of it.
    os.register_at_fork(
        before=_install_lock.acquire, after_in_parent=_install_lock.release, after_in_child=_release_all
    )

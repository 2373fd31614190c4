"""The wrapped module as its replicas see it: what it is made of, and whether that has changed since last time.

Reads the user's module and never writes to it.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchtower._extension import first_change
from torchtower.bridge.graphs import graph_of, is_cut_off, is_wrapped, requires_grad
from torchtower.memory import memory_of
from torchtower.parts import SMALL, container_of, leads_nowhere
from torchtower.replicas.outside import Outside
from torchtower.replicas.scripted import facts_of, is_scripted, tensors_of

# The dicts that every module has: parameters, buffers, submodules and hooks by kind.
MODULE_DICTS = frozenset(name for name, value in nn.Module().__dict__.items() if isinstance(value, dict))

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Change only together with one of these.
HOOK_OPTIONS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


class Watch:
    """Remembers what groups of dicts and lists hold, by identity.

    Args:
        groups: the containers of each group; a group is what `changed` tells apart.
    """

    def __init__(self, groups: Iterable[Iterable[Any]]) -> None:
        self._containers: list[Any] = []  # of all groups, one after the other
        self._ends: list[int] = []  # of each group, where it ends among these
        for group in groups:
            self._containers += group
            self._ends.append(len(self._containers))
        self._before = list(map(_contents_of, self._containers))

    def remember(self, index: int, group: Iterable[Any] | None = None) -> None:
        """Take a group's contents of today for the unchanged ones.

        Args:
            index: which group.
            group: its containers from now on; None: the same as before.
        """
        begin, end = self._ends[index - 1] if index else 0, self._ends[index]
        containers = self._containers[begin:end] if group is None else list(group)
        self._containers[begin:end] = containers
        self._before[begin:end] = map(_contents_of, containers)
        if growth := len(containers) - (end - begin):
            self._ends[index:] = [each + growth for each in self._ends[index:]]

    def changed(self) -> list[int]:
        """Which groups hold other objects than were remembered; costs little when none does."""
        found = []
        at = first_change(self._containers, self._before, 0)
        while at < len(self._containers):
            index = bisect_right(self._ends, at)
            found.append(index)
            at = first_change(self._containers, self._before, self._ends[index])
        return found


def _contents_of(container: Any) -> tuple[Any, ...]:
    # In the order in which `first_change` comes by them, which is not always that of an OrderedDict.
    return tuple(chain.from_iterable(dict.items(container)) if isinstance(container, dict) else container)


class Original:
    """The modules, parameters and buffers that replicas are made from.

    Beyond ``module.modules()`` and ``module.parameters()``: modules and leaf tensors that require grad and stand in
    plain attributes, lists and dicts count too, as the plain module would train them; other tensors there are buffers.
    Of those that lie elsewhere than on the main device only the small ones are (a counter on the CPU): a table is left
    alone. Tensors with a graph are no parameters: every replica has leaves of its own for them, see
    `torchtower.replicas.replicate`.

    Args:
        module: the user's module.
        device: the main tower's.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.modules: list[nn.Module] = []
        self._held: dict[int, _Held] = {}  # by each module, by its id
        self.discover()

    def discover(self, changed: Iterable[nn.Module] | None = None) -> None:
        """Walk the module anew.

        Args:
            changed: where attributes have changed; None: anywhere.

        Raises:
            ValueError: a lazy or a sparse parameter.
        """
        changed_ids = set(map(id, changed or ()))
        known = {} if changed is None else {key: held for key, held in self._held.items() if key not in changed_ids}
        modules: list[nn.Module] = []
        held_by: dict[int, _Held] = {}
        # As the module tells itself: what it hides may lie anywhere.
        parameters: dict[int, Tensor] = {id(p): p for p in self.module.parameters()}
        buffers: dict[int, Tensor] = {id(b): b for b in self.module.buffers() if graph_of(b) is None and _is_copied(b)}
        registered = [*parameters.values(), *buffers.values()]
        descendants = set(map(id, self.module.modules()))
        pending = [self.module]
        while pending:
            module = pending.pop()
            if id(module) in held_by:
                continue
            modules.append(module)
            held = held_by[id(module)] = known.get(id(module)) or _held_by(module)
            for value in held.values:
                if isinstance(value, nn.Module):
                    if id(value) in descendants or not self._is_ancestor(value):
                        pending.append(value)
                elif isinstance(value, nn.Parameter) or (value.requires_grad and not is_cut_off(value)):
                    parameters.setdefault(id(value), value)
                elif _is_copied(value) and (value.device == self.device or _is_small(value)):
                    buffers.setdefault(id(value), value)
        _check_dense(parameters.values())
        before, self.modules, self._held = self.modules, modules, held_by
        self.parameters = list(parameters.values())
        self.requires_grad = requires_grad(self.parameters)
        self._registered = registered
        self.buffers = [b for b in buffers.values() if id(b) not in parameters]
        self._scripted = list(filter(is_scripted, self.modules))
        self.outside = Outside(self.modules)
        self._graphs = list(chain.from_iterable([self._held[id(module)].graphs for module in self.modules]))
        self.containers = {id(container) for held in held_by.values() for container in held.containers}  # in attributes
        self._watch_again(None if changed is None or not _are_same(before, self.modules) else changed)
        self._known_facts: Any = self._facts()

    def _watch_again(self, changed: Iterable[nn.Module] | None) -> None:
        """Take what modules hold for unchanged: these, or all of them."""
        if changed is None:
            self.index_of = {id(module): index for index, module in enumerate(self.modules)}
            self._watch = Watch(map(self._watched, self.modules))
        for module in changed or ():
            self._watch.remember(self.index_of[id(module)], self._watched(module))

    def _is_ancestor(self, module: nn.Module) -> bool:
        # A child that keeps [parent] in an attribute must not make us replicate whatever contains us.
        return any(each is self.module for each in module.modules())

    def _watched(self, module: nn.Module) -> Iterator[Any]:
        yield module.__dict__
        yield from dicts_of(module).values()
        yield from self._held[id(module)].containers

    def changes(self) -> list[nn.Module] | None:
        """What has changed since this was last asked.

        Returns:
            The modules whose attributes, buffers or hooks have; None where modules or parameters themselves have come,
            gone, moved or changed their ``requires_grad``, and all was discovered anew.
        """
        if self._facts() != self._known_facts:
            self.discover()
            return None
        changed = [self.modules[index] for index in self._watch.changed()]
        if not changed:
            return []
        before = [*self.modules, None, *self.parameters]
        self.discover(changed)
        return changed if _are_same(before, [*self.modules, None, *self.parameters]) else None

    def graphs_of(self, module: nn.Module) -> list[Tensor]:
        """The tensors with a graph that a module's attributes hold."""
        return [tensor for tensor in _alive(self._held[id(module)].graphs) if graph_of(tensor) is not None]

    def check_device(self) -> None:
        """See that parameters and buffers lie on the main tower's device.

        Raises:
            ValueError: one of them lies elsewhere.
        """
        for tensor in self._registered:
            if tensor.device != self.device:
                move_it = "to_empty(device=" if tensor.is_meta else "to("
                raise _RefusedModuleError(
                    f"TowerParallel: module must have its parameters and buffers on device {self.device} "
                    f"(device_ids[0]) but found one of them on device: {tensor.device}; move it there with "
                    f"module.{move_it}'{self.device}')"
                )

    def remember(self, changed: Iterable[nn.Module], graphs: Iterable[Tensor]) -> None:
        """Take changes of our own making in these modules for seen, that brought these tensors with graphs."""
        for module in changed:
            self._watch.remember(self.index_of[id(module)])
            held = self._held[id(module)] = _held_by(module)
            self.containers.update(map(id, held.containers))
        self._graphs = [reference for reference in self._graphs if reference() is not None]
        self._graphs.extend(map(weakref.ref, graphs))

    def turn(self, buffers: Iterable[Tensor]) -> list[nn.Module]:
        """Take it for seen that these buffers have been given graphs, and are buffers no more.

        Returns:
            The modules that hold them.
        """
        turned = {id(buffer): buffer for buffer in buffers}
        self.buffers = [buffer for buffer in self.buffers if id(buffer) not in turned]
        holders = [m for m in self.modules if not turned.keys().isdisjoint(map(id, self._held[id(m)].values))]
        for module in holders:
            self._held[id(module)] = _held_by(module)
        self._graphs.extend(map(weakref.ref, turned.values()))
        return holders

    def forget(self) -> None:
        """Let the next `changes` find that everything may have changed."""
        self._known_facts = None

    def _facts(self) -> tuple[Any, ...]:
        classes = list(map(type, self.modules))
        scripted = list(map(facts_of, self._scripted))
        # In place a tensor is made one to be trained or given a graph, and detached.
        turned = sum(requires_grad(self.buffers)), all(requires_grad(_alive(self._graphs)))
        return turned, classes, scripted, requires_grad(self.parameters), memory_of(self.parameters)


def _check_dense(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        if parameter.layout is not torch.strided:
            raise ValueError(
                f"TowerParallel: expected dense parameters, but got one of layout {parameter.layout}; train a dense "
                "one, or make it a buffer"
            )


class _RefusedModuleError(ValueError, RuntimeError):
    """Bad input as everywhere here, and with the type and the words that programs know from nn.DataParallel."""


def dicts_of(module: nn.Module) -> dict[str, Any]:
    """Those of `MODULE_DICTS` that a module keeps in Python: all, or the hooks of a TorchScript module."""
    held = module.__dict__
    return {name: value for name in MODULE_DICTS if isinstance(value := held.get(name), dict)}


class _Held(NamedTuple):
    """What a module's attributes hold: modules and tensors, the small containers they stand in, tensors with graphs."""

    values: list[Any]
    containers: list[Any]
    graphs: list[weakref.ref[Tensor]]  # no longer than the module does


def _held_by(module: nn.Module) -> _Held:
    found, containers = _contents(module)
    graphs = {id(value): value for value in found if isinstance(value, Tensor) and graph_of(value) is not None}
    values = [value for value in found if id(value) not in graphs]
    return _Held(values, containers, list(map(weakref.ref, graphs.values())))


def _are_same(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(map(is_, before, after))


def _contents(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """The modules and tensors that a module's attributes hold, and the small containers they stand in."""
    if is_scripted(module):
        return list(tensors_of(module)), []
    if is_lazy_module(module):
        raise _RefusedModuleError(
            "TowerParallel: Modules with uninitialized parameters can't be used, and "
            f"{type(module).__name__} is lazy; run one batch through the plain module first"
        )
    found: list[Any] = []
    containers: list[Any] = []
    seen: set[int] = set()
    pending = [value for name, value in module.__dict__.items() if name not in MODULE_DICTS]
    found.extend(module._parameters.values())
    found.extend(module._buffers.values())
    found.extend(module._modules.values())
    while pending:
        value = pending.pop()
        if isinstance(value, (nn.Module, Tensor)):
            found.append(value)
        elif isinstance(value, tuple):
            if not leads_nowhere(value):
                pending.extend(iter(value))  # a subclass may have no length
        elif (container := container_of(value)) is not None and id(container) not in seen:
            seen.add(id(container))
            containers.append(container)
            if not leads_nowhere(container):
                pending.extend(container.values() if isinstance(container, dict) else container)
    # What a call within a transform of torch.func has left is nothing that towers can use.
    return [v for v in found if v is not None and not (isinstance(v, Tensor) and is_wrapped(v))], containers


def _is_copied(tensor: Tensor) -> bool:
    # Nothing can be copied into one of these, which hence stays as it is: one for all towers.
    return not (tensor.is_nested or tensor.is_mkldnn or is_wrapped(tensor))


def _is_small(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.numel() <= SMALL


def _alive(references: Iterable[weakref.ref[Tensor]]) -> list[Tensor]:
    return [tensor for reference in references if (tensor := reference()) is not None]


def is_lazy_module(module: nn.Module) -> bool:
    """Whether some parameter or buffer has no shape yet."""
    tensors = chain(module._parameters.values(), module._buffers.values())
    return any(tensor is not None and is_lazy(tensor) for tensor in tensors)

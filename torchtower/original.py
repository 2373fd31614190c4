"""The wrapped module as its replicas see it: what it is made of, and whether that has changed since last time.

Reads the user's module and never writes to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchtower._extension import same_contents
from torchtower.outside import Outside
from torchtower.parts import SMALL, container_of
from torchtower.remote import memory_of
from torchtower.scripted import facts_of, is_scripted, tensors_of

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
        self._groups = [list(group) for group in groups]
        self._containers = list(chain.from_iterable(self._groups))
        self.remember()

    def remember(self) -> None:
        """Take today's contents for the unchanged ones."""
        self._before = [tuple(_contents_of(container)) for container in self._containers]

    def changed(self) -> list[int]:
        """Which groups hold other objects than were remembered; costs little when none does."""
        if same_contents(self._containers, self._before):
            return []
        return [index for index, same in enumerate(self._compared()) if not same]

    def _compared(self) -> Iterator[bool]:
        before = iter(self._before)
        for group in self._groups:
            pairs = [(tuple(_contents_of(container)), next(before)) for container in group]
            yield all(len(now) == len(then) and all(map(is_, now, then)) for now, then in pairs)


def _contents_of(container: Any) -> Iterable[Any]:
    return chain.from_iterable(container.items()) if isinstance(container, dict) else container


class Original:
    """The modules, parameters and buffers that replicas are made from.

    Beyond ``module.modules()`` and ``module.parameters()``: modules and leaf tensors that require grad and stand in
    plain attributes, lists and dicts count too, as the plain module would train them; other tensors there are buffers.
    Of those that lie elsewhere than on the main device only the small ones are (a counter on the CPU): a table is left
    alone. Tensors with a graph are no parameters: every replica has leaves of its own for them, see
    `torchtower.replicate`.

    Args:
        module: the user's module.
        device: the main tower's.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.discover()

    def discover(self) -> None:
        """Walk the module anew.

        Raises:
            ValueError: a lazy or a sparse parameter.
        """
        self.modules: list[nn.Module] = []
        self.containers: dict[int, list[Any]] = {}  # of each module, by its id
        parameters: dict[int, Tensor] = {id(p): p for p in self.module.parameters()}
        buffers: dict[int, Tensor] = {id(b): b for b in self.module.buffers() if b.grad_fn is None and _is_copied(b)}
        self._registered = [*parameters.values(), *buffers.values()]
        self._graphs: list[weakref.ref[Tensor]] = []
        seen: set[int] = set()
        pending = [self.module]
        while pending:
            module = pending.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            self.modules.append(module)
            found, self.containers[id(module)] = _contents(module)
            for value in found:
                if isinstance(value, nn.Module):
                    if not self._is_ancestor(value):
                        pending.append(value)
                elif value.grad_fn is not None:
                    self._graphs.append(weakref.ref(value))
                elif value.is_leaf and (value.requires_grad or isinstance(value, nn.Parameter)):
                    parameters.setdefault(id(value), value)
                elif _is_copied(value) and (value.device == self.device or _is_small(value)):
                    buffers.setdefault(id(value), value)
        for parameter in parameters.values():
            if parameter.layout is not torch.strided:
                raise ValueError(
                    f"TowerParallel: expected dense parameters, but got one of layout {parameter.layout}; train "
                    "a dense one, or make it a buffer"
                )
        self.parameters = list(parameters.values())
        self.buffers = [b for b in buffers.values() if id(b) not in parameters]
        self._scripted = list(filter(is_scripted, self.modules))
        self.outside = Outside(self.modules)
        self._watch = Watch(map(self._watched, self.modules))
        self._known_facts = self._facts()

    def _is_ancestor(self, module: nn.Module) -> bool:
        # A child that keeps [parent] in an attribute must not make us replicate whatever contains us.
        return module is not self.module and any(m is self.module for m in module.modules())

    def _watched(self, module: nn.Module) -> Iterator[Any]:
        yield module.__dict__
        yield from dicts_of(module).values()
        yield from self.containers[id(module)]

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
        self.discover()
        after = [*self.modules, None, *self.parameters]
        same = len(before) == len(after) and all(map(is_, before, after))
        return changed if same else None

    def check_device(self) -> None:
        """See that parameters and buffers lie on the main tower's device.

        Raises:
            ValueError: one of them lies elsewhere.
        """
        for tensor in self._registered:
            if tensor.device != self.device:
                move_it = "to_empty(device=" if tensor.is_meta else "to("
                raise _MisplacedModuleError(
                    f"TowerParallel: module must have its parameters and buffers on device {self.device} "
                    f"(device_ids[0]) but found one of them on device: {tensor.device}; move it there with "
                    f"module.{move_it}'{self.device}')"
                )

    def remember(self, graphs: Iterable[Tensor]) -> None:
        """Take changes of our own making for seen, that brought these tensors with graphs."""
        self._watch.remember()
        self._graphs = [reference for reference in self._graphs if reference() is not None]
        self._graphs.extend(map(weakref.ref, graphs))

    def forget(self) -> None:
        """Let the next `changes` find that everything may have changed."""
        self._known_facts = []

    def _facts(self) -> list[Any]:
        classes: list[Any] = list(map(type, self.modules))
        scripted = chain.from_iterable(map(facts_of, self._scripted))
        # In place a tensor is made one to be trained or given a graph, and detached.
        graphs = [graph for reference in self._graphs if (graph := reference()) is not None]
        turned = any(b.requires_grad for b in self.buffers) or not all(g.requires_grad for g in graphs)
        flags = map(attrgetter("requires_grad"), self.parameters)
        return [turned, *classes, *scripted, *flags, *memory_of(self.parameters)]


class _MisplacedModuleError(ValueError, RuntimeError):
    """Bad input as everywhere here, and with the type and the words that programs know from nn.DataParallel."""


def dicts_of(module: nn.Module) -> dict[str, Any]:
    """Those of `MODULE_DICTS` that a module keeps in Python: all, or the hooks of a TorchScript module."""
    found = {name: module.__dict__.get(name) for name in MODULE_DICTS}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


def _contents(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """The modules and tensors that a module's attributes hold, and the small containers they stand in."""
    if is_scripted(module):
        return list(tensors_of(module)), []
    if is_lazy_module(module):
        raise ValueError(
            f"TowerParallel: expected every parameter to have a shape, but {type(module).__name__} is lazy; "
            "run one batch through the plain module first"
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
            pending.extend(iter(value))  # a subclass may have no length
        elif (container := container_of(value)) is not None and id(container) not in seen:
            seen.add(id(container))
            containers.append(container)
            pending.extend(container.values() if isinstance(container, dict) else container)
    return [value for value in found if value is not None], containers


def _is_copied(tensor: Tensor) -> bool:
    # Nothing can be copied into one of these, which hence stays as it is: one for all towers.
    return not (tensor.is_nested or tensor.is_mkldnn)


def _is_small(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.numel() <= SMALL


def graph_tensors(module: nn.Module) -> list[Tensor]:
    """The tensors with a graph that a module's attributes hold."""
    found, _ = _contents(module)
    return list({id(v): v for v in found if isinstance(v, Tensor) and v.grad_fn is not None}.values())


def is_lazy_module(module: nn.Module) -> bool:
    """Whether some parameter or buffer has no shape yet."""
    tensors = chain(module._parameters.values(), module._buffers.values())
    return any(tensor is not None and is_lazy(tensor) for tensor in tensors)

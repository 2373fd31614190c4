"""Where a tower's forward may leave something in its replica, and what it has left there.

A place is a container of the replica, beside the one of the user's module that it stands for: attributes, the dicts of
parameters, buffers, submodules and hooks, small containers within attributes, and those that functions lead to.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from copy import copy
from itertools import chain, filterfalse, islice
from operator import is_, is_not
from typing import Any, NamedTuple

from torch import nn

from torchtower.parts import ATOMS, CALLABLES, container_of, leads_nowhere, parts_of
from torchtower.replicas.original import HOOK_OPTIONS, HOOKS, MODULE_DICTS, dicts_of
from torchtower.replicas.rewrite import Translation
from torchtower.replicas.scripted import is_scripted

# Where a forward may put something new, beside attributes and the containers that they hold.
_WRITTEN_DICTS = ("_parameters", "_buffers", "_modules")
_DELETED = object()
_ALL, _ADDED = "all", "added"  # stand for the name of what a list or set holds
_ORDER = object()  # stands for the name of a dict's keys in their order


class Place(NamedTuple):
    """A container that a forward may write to."""

    kind: str  # "attributes", "structure", "hooks", "options" (of hooks), "container", or "outside" (functions lead to)
    target: Any  # the original's
    twin: Any  # the replica's
    known: Any  # what the replica's held when it was last looked at, or when it was installed

    def watched(self) -> list[Any]:
        """The containers in which a change must be seen; what functions lead to is watched by nobody else."""
        return {"outside": [self.twin, self.target], "options": []}.get(self.kind, [self.twin])

    def take_changes(self) -> list[tuple[Any, Any]]:
        """Names and values, as of `Written`, that the replica's has held anew since this was last asked."""
        if not (self.known or self.twin):  # nearly always
            return []
        changes = _differences(self.known, self.twin)
        # Of attributes nobody minds in which order they come.
        if self.kind != "attributes" and isinstance(self.twin, dict) and _is_in_another_order(self.known, self.twin):
            changes.append((_ORDER, tuple(self.twin)))
        if changes:
            _set_contents(self.known, self.twin)
        return changes


class Written(NamedTuple):
    """Something that the main tower's forward or backward left behind in its replica."""

    module: nn.Module  # the original's
    place: Place
    name: Any  # the attribute or key; of a list or set, whether the value is all that it holds, or what was added
    value: Any

    def values(self) -> list[Any]:
        """What was left, one by one."""
        return [self.value] if isinstance(self.place.twin, dict) else list(self.value)


def write_back(written: Written, translate: Translation) -> list[Place]:
    """Do to the original what the main tower did to its replica.

    Returns:
        The small containers that have come with it, at any depth: the tower may write there, too, from now on.
    """
    _, place, name, value = written
    target, num_met = place.target, len(translate.met)
    if not isinstance(target, dict):
        (_set_contents if name is _ALL else _add_contents)(target, translate(value))
    elif name is _ORDER:
        _put_in_order(target, map(translate, value))  # a key may be a module
    elif value is _DELETED:
        target.pop(translate(name), None)
    else:
        target[translate(name)] = translate(value)
    pairs = [(container_of(pair.twin), container_of(pair.source)) for pair in translate.met[num_met:]]
    return [_place("container", target, twin) for target, twin in pairs if twin is not None]


def _put_in_order(target: Any, keys: Iterable[Any]) -> None:
    """Let these keys come last, in this order."""
    for key in keys:
        if key in target:
            target[key] = target.pop(key)


def places_of(module: nn.Module, twin: nn.Module, in_attributes: Container[int]) -> Iterator[Place]:
    """Where the forward of ``twin``, the replica of ``module``, may leave something.

    Args:
        module: the user's.
        twin: its replica.
        in_attributes: ids of containers that attributes of some module hold, which are that module's places.
    """
    if is_scripted(twin):
        return
    for name in _WRITTEN_DICTS:
        yield _place("structure", module.__dict__[name], twin.__dict__[name])
    # After modules, whose hooks an attribute may have the handles of.
    yield _place("attributes", module.__dict__, twin.__dict__)
    for kind, names in (("hooks", HOOKS), ("options", HOOK_OPTIONS)):
        for name in names:
            yield _place(kind, module.__dict__[name], twin.__dict__[name])
    seen: set[int] = set()
    pending = [
        ("container", value, twin.__dict__[name])
        for name, value in module.__dict__.items()
        if type(value) not in ATOMS and name not in MODULE_DICTS
    ]
    for name, hooks in dicts_of(module).items():
        if hooks:
            pending += [("outside", *pair) for pair in zip(hooks.values(), twin.__dict__[name].values(), strict=True)]
    while pending:
        kind, value, copied = pending.pop()
        if kind == "outside" and value is copied:  # one for all towers
            continue
        if (target := container_of(value)) is not None:
            if id(target) not in seen and not (kind == "outside" and id(target) in in_attributes):
                seen.add(id(target))
                place = _place(kind, target, container_of(copied))
                yield place
                if not leads_nowhere(target):
                    pending += [(kind, *pair) for pair in zip(_values(target), _values(place.twin), strict=True)]
        elif isinstance(value, tuple):
            if value is not copied:
                pending += [(kind, *pair) for pair in zip(value, copied, strict=True)]
        elif value is not copied and isinstance(value, CALLABLES) and id(value) not in seen:
            seen.add(id(value))
            parts = zip(parts_of(value) or (), parts_of(copied) or (), strict=True)
            pending += [("outside", *pair) for pair in parts]


def _place(kind: str, target: Any, twin: Any) -> Place:
    return Place(kind, target, twin, dict(twin) if isinstance(twin, dict) else copy(twin))


def _values(container: Any) -> list[Any]:
    if isinstance(container, set):  # in no order; holds no containers
        return []
    return list(container.values() if isinstance(container, dict) else container)


def _set_contents(container: Any, contents: Any) -> None:
    container.clear()
    _add_contents(container, contents)


def _add_contents(container: Any, contents: Any) -> None:
    (container.update if isinstance(container, (dict, set)) else container.extend)(contents)


def _differences(before: Any, now: Any) -> list[tuple[Any, Any]]:
    if not isinstance(now, dict):
        # What is only added is added to the original's: others, a hook that closes over it say, may add there, too.
        if isinstance(now, set):
            added, is_more = list(now - before), before <= now
        else:
            added, is_more = list(islice(now, len(before), None)), all(map(is_, before, now))
        if is_more and len(before) + len(added) == len(now):
            return [(_ADDED, tuple(added))] if added else []
        return [(_ALL, tuple(now))]
    changed = [(name, value) for name, value in now.items() if before.get(name, _DELETED) is not value]
    return changed + [(name, _DELETED) for name in before.keys() - now.keys()]


def _is_in_another_order(before: dict[Any, Any], now: dict[Any, Any]) -> bool:
    """Whether something else is new than keys at the end: a layer moved there, or a hook put before others."""
    expected = chain(filter(now.__contains__, before), filterfalse(before.__contains__, now))
    return any(map(is_not, now, expected))

"""Tower replicas: module trees that follow the user's module, with leaf parameters of their own.

Note [What a replica shares]
A replica's modules are new objects of the same classes; their attributes are the original's, translated where they lead
back into the tree (see rewrite). Its parameters are leaves of their own, so that each tower's backward has somewhere to
put its gradient; on the main tower's device they alias the original's storage and share its version counter: one set of
weights for any number of towers, and changing it between forward and backward raises as in the plain module. So they do
where the user has left one in an attribute on a device of its own. The main tower's replica holds the original's
buffers themselves, so that what it writes persists; the others hold copies, made afresh before every forward. Replicas
live as long as the original keeps its shape: a compiled module must not compile again, RNN weights are flattened once.

A tensor with a graph that an attribute holds (what an earlier forward left there, or the user) is represented by a leaf
in each replica, the main tower's in the user's memory, the others' in memory of their own, as buffers are: a forward
may write into it once it has detached it. The user's graph behind it is joined on only where a forward has used it: a
backward must not walk into what it does not need, an earlier backward may have freed it.

Note [What a tower has made]
The user is given copies of the lists, dicts and records that the main tower has made and that lead back into its
replica. The tower may hold on to its own, and a hook in its backward may fill them (the record of a call, say, that a
forward hook has put into a list). So until the replica follows its original again, which makes both anew, the small
ones among them are places like those that were there before, and stay translated to the same copies.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchtower.bridge.graphs import writable
from torchtower.bridge.node import is_connected
from torchtower.devices import move
from torchtower.memory import is_freed, version_of
from torchtower.parts import ATOMS
from torchtower.replicas.leaves import Leaves, share_attributes
from torchtower.replicas.original import HOOK_OPTIONS, HOOKS, MODULE_DICTS, Original, Watch, dicts_of
from torchtower.replicas.places import Place, Written, places_of, write_back
from torchtower.replicas.remote import copy_together
from torchtower.replicas.rewrite import Translation
from torchtower.replicas.scripted import fill_piece, is_scripted, new_piece


class Link(NamedTuple):
    """A tensor with a graph in an attribute, this replica's leaf for it, and what the replica has in its place."""

    source: weakref.ref[Tensor]
    leaf: Tensor
    twin: Tensor


class Replica:
    """One tower's module.

    Args:
        original: what to follow.
        device: the tower's device.
        is_main: whether this is tower 0, whose buffers are the original's.
        aliases: whether parameters share the original's storage.
    """

    def __init__(self, original: Original, device: torch.device, *, is_main: bool, aliases: bool) -> None:
        self.device = device
        self._original = original
        self._is_main = is_main
        self.parameters = Leaves(original, device, aliases=aliases)
        self._to_replica = Translation()
        self._back: dict[int, tuple[Any, Any]] = {}  # as a translation's table, of what changes only with structure
        self._to_original: Translation | None = None
        self._places: dict[int, list[Place]] = {}  # of each of the original's modules, by its id
        self._links: dict[int, list[Link]] = {}  # of those that have any, by their ids
        self._link_of: dict[int, Link] = {}  # by the ids of their sources, since the module was last followed
        self._dicts: dict[int, dict[str, Any]] = {}  # parameters, hooks and so on in the replica of each, by its id
        self._kinds: dict[int, type] = {}  # the class of the replica of each, by its id
        self._met: dict[int, list[Any]] = {}  # records in each, by its id: copied once while it holds them
        self._hook_dicts: dict[tuple[int, str], tuple[Any, Any]] = {}  # of each, by its id: replica's and original's
        self._sources: list[Tensor] = []
        self._buffer_versions: dict[int, int | None] = {}
        self.rebuild()

    @property
    def module(self) -> Any:
        """The replica of the wrapped module itself."""
        return self.twin_of(self._original.module)

    @property
    def leaves(self) -> list[Tensor]:
        """Its parameters, in the order of the original's."""
        return self.parameters.all

    def twin_of(self, module: nn.Module) -> Any:
        """The replica of one of the original's modules."""
        return self._to_replica.get(module)

    def translate(self, value: Any) -> Any:
        """What this replica has for a module or a parameter, and for a callable that has such a part.

        What lies deeper stays the user's: nobody would write back what a forward changes in a copy.
        """
        own = self._to_replica.get(value)
        return self._to_replica.with_parts(value) if own is None else own

    def rebuild(self) -> None:
        """Make what is new, keep what is not, drop what is gone."""
        self._to_original = None
        before, self._to_replica = self._to_replica, Translation()
        self._back.clear()
        self._places.clear()
        self._links.clear()
        self._link_of.clear()
        self._dicts.clear()
        self._met.clear()
        self._hook_dicts.clear()
        for module in self._original.modules:
            twin = before.get(module)
            if twin is None:
                twin = new_piece(module) if is_scripted(module) else object.__new__(type(module))
            self._pair(module, twin)
            self._pair_hook_dicts(module, twin)
        with torch.inference_mode(False), torch.no_grad():
            self.parameters.make()
        for parameter, leaf in zip(self._original.parameters, self.leaves, strict=True):
            self._pair(parameter, leaf)
        known, self._sources = self._sources, []
        self._make_buffers(before, known)
        for module in self._original.modules:
            self._install(module)
        self._watch_own()

    def _pair_hook_dicts(self, module: nn.Module, twin: nn.Module) -> None:
        """Let handles of hooks, which refer to the dict that these are in, be translated."""
        if not is_scripted(module):
            for name in (*HOOKS, *HOOK_OPTIONS):
                source, target = module.__dict__[name], twin.__dict__.setdefault(name, OrderedDict())
                target_before, source_before = self._hook_dicts.get((id(module), name), (None, None))
                if source is source_before and self._to_replica.get(source) is target:
                    continue
                self._to_replica.remove(source_before)
                self._back.pop(id(target_before), None)
                self._pair(source, target)
                self._hook_dicts[id(module), name] = target, source

    def _pair(self, source: Any, twin: Any) -> None:
        """Let each be translated to the other."""
        self._to_replica.add(source, twin)
        self._back[id(twin)] = twin, source

    def _make_buffers(self, before: Translation, known: Iterable[Tensor]) -> None:
        """Have a twin of each of the original's buffers, that of ``before`` where it was one of the ``known`` ones."""
        buffers_before = set(map(id, known))  # what was a parameter has a leaf
        with torch.inference_mode(False), torch.no_grad():
            twins = [before.get(b) if id(b) in buffers_before else None for b in self._original.buffers]
            self.buffers = [
                buffer if self._is_main else self._copy_of(buffer) if twin is None else twin
                for buffer, twin in zip(self._original.buffers, twins, strict=True)
            ]
        for source in self._sources:
            self._to_replica.remove(source)
        self._sources = self._original.buffers
        for buffer, twin in zip(self._sources, self.buffers, strict=True):
            self._to_replica.add(buffer, twin)
            if twin is not buffer:
                share_attributes(twin, buffer)

    def buffer_dicts(self) -> list[dict[str, Any]]:
        """Each module's registered buffers by name, with what its forward has assigned."""
        twins = [self._to_replica.get(module) for module in self._original.modules if not is_scripted(module)]
        return [twin._buffers for twin in twins]

    def _copy_of(self, buffer: Tensor) -> Tensor:
        elsewhere = buffer.device != self._original.device
        device = buffer.device if elsewhere else self.device
        if not is_freed(buffer):
            return buffer.detach().to(device, copy=True)
        twin = torch.empty_like(buffer, device=device, requires_grad=False)
        twin.untyped_storage().resize_(0)  # a forward may give it memory
        return twin

    def _install(self, module: nn.Module) -> None:
        """Give the replica of ``module`` its attributes and hooks, translated."""
        twin = self._to_replica.get(module)
        self._to_replica.met = []
        sources = self._original.graphs_of(module)
        self._links.pop(id(module), None)
        if sources:
            self._links[id(module)] = [self._link(source) for source in sources]
        dicts = {}
        for name, value in dicts_of(module).items():
            # The same dict object each time, since a watch holds on to it; never the original's.
            translated = dicts[name] = twin.__dict__.get(name, type(value)())
            translated.clear()
            # Hooks find in a container that an attribute holds what the forward finds there.
            shared = self._original.containers
            if value:
                translated.update((key, self._to_replica(item, shared)) for key, item in value.items())
        if is_scripted(module):
            fill_piece(module, twin, self._to_replica)
        else:
            attributes = {
                name: value if type(value) in ATOMS else self._to_replica(value)
                for name, value in module.__dict__.items()
                if name not in MODULE_DICTS
            }
            twin.__dict__.clear()
            twin.__dict__.update(attributes, **dicts)
            if type(twin) is not type(module):  # a parametrization changes a module's class
                object.__setattr__(twin, "__class__", type(module))
        for source in sources:  # which must not live longer than the module holds it
            self._to_replica.remove(source)
        self._dicts[id(module)], self._kinds[id(module)] = dicts, type(twin)
        self._places[id(module)] = list(places_of(module, twin, self._original.containers))
        self._met[id(module)] = self._to_replica.met

    def _link(self, source: Tensor) -> Link:
        """Have one leaf for a tensor with a graph, and let the tensor be translated to what has that leaf alone."""
        link = self._link_of.get(id(source))
        if link is None:
            with torch.inference_mode(False), torch.enable_grad():
                leaf = source.detach()
                # What a forward of ours has left is mostly overwritten by the next: not worth a way to another device.
                if leaf.device == self._original.device and not is_connected(source):
                    leaf = move(leaf, self.device)
                if leaf.device == source.device and not self._is_main:  # the user's memory is the main tower's
                    leaf = leaf.clone()
                twin = writable(leaf.requires_grad_())
            link = self._link_of[id(source)] = Link(weakref.ref(source), leaf, twin)
        self._to_replica.add(source, link.twin)
        return link

    def links(self) -> list[Link]:
        """All of them, once each, in the same order in every replica."""
        if not self._links:
            return []
        links = chain.from_iterable([self._links.get(id(module), ()) for module in self._original.modules])
        return list({id(link.leaf): link for link in links}.values())

    def _watch_own(self) -> None:
        self._touched: set[int] = set()  # indices of modules that have been changed since, though it be back
        self._own = Watch(map(self._watched, self._original.modules))

    def _watched(self, module: nn.Module) -> Iterator[Any]:
        return chain.from_iterable(map(Place.watched, self._places[id(module)]))

    def follow(self, changed: Iterable[nn.Module]) -> None:
        """Take over what changed in these modules of the original, and undo what a forward of this replica left."""
        self._to_original = None
        modules = self._original.modules
        if self._sources is not self._original.buffers:  # discovered anew
            self._make_buffers(self._to_replica, self._sources)
        stale = {id(module): module for module in changed}
        if self._links:
            stale.update((id(module), module) for module in modules if id(module) in self._links)
        self._link_of.clear()  # all are made anew
        touched = self._touched.union(self._own.changed())
        if not stale and not touched:  # nearly always
            return
        stale.update((id(modules[index]), modules[index]) for index in touched)
        for module in stale.values():
            self._pair_hook_dicts(module, self.twin_of(module))
        for module in stale.values():
            self._install(module)
            self._own.remember(self._original.index_of[id(module)], self._watched(module))
        self._touched.clear()

    def follow_modes(self) -> None:
        """Be in training or evaluation where the original is, and take over nothing else."""
        for module in self._original.modules:
            twin = self.twin_of(module)
            if twin is not None and twin.training is not module.training:
                twin.training = module.training

    def refresh_buffers(self) -> None:
        """Copy the original's buffers into this replica's.

        A copy's version counter moves where the original's has, no more: what an earlier forward saved of it for its
        backward stays good as long as it does in the plain module (batch normalisation moves no counter).
        """
        if not self._is_main and self.buffers:
            before, self._buffer_versions = self._buffer_versions, {}
            sources, targets = [], []
            with torch.no_grad():
                for buffer, twin in zip(self._original.buffers, self.buffers, strict=True):
                    if is_freed(buffer):
                        twin.untyped_storage().resize_(0)
                        continue
                    if twin.requires_grad:  # an earlier forward has written into it with autograd on
                        twin.detach_()
                    # Observers resize theirs; one that was freed may have memory again.
                    if buffer.shape != twin.shape or buffer.dtype != twin.dtype or is_freed(twin):
                        twin.data = torch.empty_like(buffer, device=twin.device)
                    version = self._buffer_versions[id(buffer)] = version_of(buffer)
                    sources.append(buffer)
                    targets.append(twin.data if before.get(id(buffer)) == version else twin)
                if targets:
                    copy_together(sources, targets)

    def take_written(self) -> list[Written]:
        """What this replica wrote into attributes and dicts since the last call, as values of the replica's world."""
        found = []
        taken: set[int] = set()  # a container may be in several modules
        self._touched.update(self._own.changed())
        if not self._touched:  # nearly always
            return []
        for index in sorted(self._touched):
            module = self._original.modules[index]
            self._put_back_dicts(module)
            for place in self._places[id(module)]:
                changes = place.take_changes()
                if id(place.twin) not in taken:
                    found += [Written(module, place, *change) for change in changes]
            taken.update(id(place.twin) for place in self._places[id(module)])
        return [item for item in found if item.place.kind != "attributes" or item.name not in MODULE_DICTS]

    def write_back(self, written: Iterable[Written], connected: Iterable[tuple[Tensor, Any]]) -> None:
        """Do to the original what this replica did, see Note [What a tower has made].

        Args:
            written: what `take_written` has returned.
            connected: tensors with a graph, and what the user has for each.
        """
        translate = self.to_original()
        for local, main in connected:
            translate.add(local, main)
        for item in written:
            self._places[id(item.module)] += write_back(item, translate)
        for local, _ in connected:  # which must not live longer than the user holds it
            translate.remove(local)

    def take_class(self, module: nn.Module) -> type | None:
        """The class that this replica has given its twin of a module since the last call; None if it has not."""
        before, now = self._kinds[id(module)], type(self.twin_of(module))
        self._kinds[id(module)] = now
        return None if now is before else now

    def _put_back_dicts(self, module: nn.Module) -> None:
        """Fill a module's own dict where a forward has put another in its place, as ``del layers[0]`` does."""
        held = self.twin_of(module).__dict__
        for name, own in self._dicts[id(module)].items():
            if (other := held.get(name)) is not own and isinstance(other, dict):
                own.clear()
                own.update(other)
                held[name] = own

    def to_original(self) -> Translation:
        """The way back: replica's modules, parameters and buffers to the original's; the same until it follows."""
        if self._to_original is not None:
            return self._to_original
        back = self._to_original = Translation(left_behind=True)
        back.table.update(self._back)
        for buffer, twin in zip(self._sources, self.buffers, strict=True):
            if twin is not buffer:  # the main tower has the user's own
                back.add(twin, buffer)
        for pair in self._to_replica.pairs.values():
            back.add(pair.twin, pair.source)
        return back

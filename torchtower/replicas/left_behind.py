"""What towers leave behind beside their outputs: in attributes of the module, where hooks keep it, in arguments.

Of attributes the main tower's are kept, of what hooks keep and of what is put into an argument every tower's. What has
a graph crosses the bridge like an output of its tower, and it is what came out there that the user finds in its place.

Note [Writes with a graph]
A forward may write in place, with autograd on, into what an attribute held before (``self.aux += loss``). The memory is
the user's, and so is the very tensor where that is a buffer, which has then been given the main tower's graph; the twin
of a tensor with a graph has been given it in the other case. Either way the user's tensor stays the same object, and is
given the graph of what came out of the bridge in the place of the one that it had, as in the plain module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from torchtower.bridge.graphs import graph_of, is_untouched, towers_behind
from torchtower.bridge.ports import Port
from torchtower.parts import container_of, tensors_within
from torchtower.reduction import Grad
from torchtower.replicas.original import Original
from torchtower.replicas.outside import Slot, kept_in, put_connected
from torchtower.replicas.places import Written
from torchtower.replicas.replicate import Replica


class LeftBehind:
    """What one forward has left.

    Args:
        original: what the replicas follow.
        replicas: one a tower.
        leaves: the shards' leaves, tower-major.
        filled: lists and dicts of the caller's that a forward was given and has put something into.
    """

    def __init__(
        self, original: Original, replicas: Sequence[Replica], leaves: list[list[Tensor]], filled: Sequence[Any]
    ) -> None:
        self._original = original
        self._main = replicas[0]
        self._written = self._main.take_written()
        self._kept = _kept_outside(original, replicas, leaves, filled)
        self._turned = with_new_graph(self._main)
        self._links = _links(self._main)
        overwritten_links = [(twin, source) for twin, source in self._links if not is_untouched(twin)]
        self._overwritten: list[tuple[Tensor, Tensor]] = []
        self._tensors: list[tuple[int, Tensor]] = []  # that have a graph, and whose
        self._crossing: list[tuple[int, Tensor]] = []
        if not (self._written or self._kept or self._turned or overwritten_links):  # nearly always
            return
        self._overwritten = [*[(base, base) for base in _bases(self._turned)], *overwritten_links]
        known = [*self._links, *[(buffer, buffer) for buffer in self._turned]]
        left = [(0, tensor) for tensor in _new_with_graph(self._main, self._written, known)]
        kept = [(tower, tensor) for _, tower, tensors in self._kept for tensor in tensors]
        overwritten = [(0, local) for local, _ in self._overwritten if local.requires_grad]
        self._tensors = left + kept
        self._crossing = self._tensors + overwritten

    def columns(self, num_towers: int) -> list[tuple[Port, list[Grad]]]:
        """Of each tensor that has a graph how it crosses the bridge, and what each tower has there."""
        return [
            (Port("solo", tensor.device, tower=owner), [tensor if t == owner else None for t in range(num_towers)])
            for owner, tensor in self._crossing
        ]

    def put(self, values: Sequence[Grad]) -> list[nn.Module]:
        """Put everything where the user finds it.

        Args:
            values: what the tensors of `columns` are in the user's graph.

        Returns:
            The modules that were written to.
        """
        if not self._written and not self._kept and not self._overwritten:  # nearly always
            return []
        connected: list[tuple[Tensor, Any]] = [
            (local, main) for (_, local), main in zip(self._tensors, values, strict=False)
        ]
        if self._overwritten:
            _give_graphs(self._overwritten, values[len(connected) :], self._turned)
        put_connected([slot for slot, _, _ in self._kept], {id(local): main for local, main in connected})
        modules = _write_to_original(self._main, self._written, [*self._links, *connected])
        if not any(map(_is_structural, self._written)):
            if modules:
                self._original.remember(modules, [main for _, main in connected if main is not None])
            if self._turned:
                modules += self._original.turn(self._turned)
        return modules


def keep_what_was_assigned(main: Replica) -> list[nn.Module]:
    """Take over what the main tower has assigned in a backward's hooks, or in a forward that raised.

    But for what has a graph of the tower's.

    Nothing is taken for seen here: the user may have changed something, too, since the forward.

    Returns:
        The modules that were written to.
    """
    written = main.take_written()
    if not written:  # nearly always
        return []
    known = [(twin, source) for twin, source in _links(main) if is_untouched(twin)]
    written = [item for item in written if not _new_with_graph(main, [item], known)]
    return _write_to_original(main, written, known)


def drop_new_graphs(main: Replica) -> None:
    """Let buffers have no graph of a forward that raised, as that leads to nothing of the user's."""
    for base in _bases(with_new_graph(main)):
        base.detach_()


def with_new_graph(main: Replica) -> list[Tensor]:
    """The buffers that the main tower's forward has given a graph: before, none had any."""
    return [buffer for buffer in main.buffers if buffer.requires_grad and graph_of(buffer) is not None]


def _bases(buffers: Sequence[Tensor]) -> list[Tensor]:
    """What has these buffers' graphs: of a view, it is what it is a view of."""
    bases: list[Any] = [buffer._base if buffer._is_view() else buffer for buffer in buffers]
    return [base for base in {id(base): base for base in bases}.values() if graph_of(base) is not None]


def _links(main: Replica) -> list[tuple[Tensor, Any]]:
    """What the replica has for the user's tensors with a graph that attributes held, and these."""
    return [(link.twin, source) for link in main.links() if (source := link.source()) is not None]


def _give_graphs(
    overwritten: Sequence[tuple[Tensor, Tensor]], values: Iterable[Grad], buffers: Sequence[Tensor]
) -> None:
    """Let the user's tensors have the graphs of what came out of the bridge; see the Note.

    Args:
        overwritten: as the replica has them, and the user's.
        values: of those that have a graph; the others have been detached.
        buffers: those among the user's, and what are views of these.
    """
    left = iter(values)
    autograd: Any = torch.autograd
    counters = autograd._unsafe_preserve_version_counter(tuple(source for _, source in overwritten))
    with torch.enable_grad(), counters:  # the writes have been counted already
        for local, source in overwritten:
            has_graph = local.requires_grad
            if not source._is_view():  # that of a view is its base's, which may have other parts
                source.detach_()
            if has_graph and (value := next(left)) is not None:
                source.copy_(value)
        for buffer in buffers:
            _ = buffer.grad_fn  # a view that is asked for its graph now will look for another when the counter is back


def _write_to_original(main: Replica, written: list[Written], connected: list[tuple[Tensor, Any]]) -> list[nn.Module]:
    if written:
        main.write_back(written, connected)
    modules = list({id(item.module): item.module for item in written}.values())
    for module in modules:
        if (kind := main.take_class(module)) is not None:  # a forward has registered a parametrization
            object.__setattr__(module, "__class__", kind)
    return modules


def _kept_outside(
    original: Original, replicas: Sequence[Replica], leaves: list[list[Tensor]], filled: Sequence[Any]
) -> list[tuple[Slot, int, list[Tensor]]]:
    """What was kept outside of the module, by hooks or in arguments: where, of which tower, which tensors."""
    found = original.outside.new() + (kept_in(filled) if filled else [])
    if not found:
        return []
    tower_of = {
        id(leaf): tower
        for tower, (replica, own) in enumerate(zip(replicas, leaves, strict=False))
        for leaf in (*replica.leaves, *[link.leaf for link in replica.links()], *own)
    }
    kept = []
    known: dict[Any, set[int]] = {}
    for slot, tensors in found:
        towers = towers_behind(tensors, tower_of, known)
        if len(towers) == 1:
            kept.append((slot, min(towers), tensors))
    return kept


def _new_with_graph(main: Replica, written: Sequence[Written], known: list[tuple[Tensor, Any]]) -> list[Tensor]:
    """The tensors with a graph in what was written, but for the known ones, and those of what the user has already."""
    if not written:  # nearly always
        return []
    values = list(chain.from_iterable(item.values() for item in written))
    stops = main.to_original().table.keys()
    modules = [module for value in values if isinstance(value, nn.Module) for module in value.modules()]
    made = [vars(module) for module in modules if id(module) not in stops]
    tensors = {id(tensor): tensor for value in chain(values, made) for tensor in tensors_within(value, stops=stops)}
    for tensor, _ in known:
        tensors.pop(id(tensor), None)
    return [tensor for tensor in tensors.values() if graph_of(tensor) is not None]


def _is_structural(written: Written) -> bool:
    """Whether the module must be looked at anew: replicas would share what they do not know."""
    return written.place.kind in ("structure", "hooks") or any(map(_is_followed, written.values()))


def _is_followed(value: Any) -> bool:
    if isinstance(value, Tensor):
        return graph_of(value) is None
    if isinstance(value, tuple):
        return any(map(_is_followed, iter(value)))
    return isinstance(value, nn.Module) or container_of(value) is not None

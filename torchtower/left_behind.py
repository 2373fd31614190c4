"""What towers leave behind beside their outputs: in attributes of the module, and where hooks keep it.

Of attributes the main tower's are kept, of what hooks keep every tower's. What has a graph crosses the bridge like an
output of its tower, and it is what came out there that the user finds in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from torchtower.graphs import is_untouched, towers_behind
from torchtower.original import Original
from torchtower.outside import Slot, put_connected
from torchtower.parts import container_of, tensors_within
from torchtower.places import Written
from torchtower.ports import Port
from torchtower.reduction import Grad
from torchtower.replicate import Replica


class LeftBehind:
    """What one forward has left.

    Args:
        original: what the replicas follow.
        replicas: one a tower.
        leaves: the shards' leaves, tower-major.
    """

    def __init__(self, original: Original, replicas: Sequence[Replica], leaves: list[list[Tensor]]) -> None:
        self._original = original
        self._main = replicas[0]
        self._written = self._main.take_written()
        self._kept = _kept_outside(original, replicas, leaves)
        self._known = _sources(self._main) if self._written else []
        left = [(0, tensor) for tensor in _new_with_graph(self._main, self._written, self._known)]
        kept = [(tower, tensor) for _, tower, tensors in self._kept for tensor in tensors]
        self._tensors = left + kept  # that have a graph, and whose

    def columns(self, num_towers: int) -> list[tuple[Port, list[Grad]]]:
        """Of each tensor that has a graph how it crosses the bridge, and what each tower has there."""
        return [
            (Port("solo", tensor.device, tower=owner), [tensor if t == owner else None for t in range(num_towers)])
            for owner, tensor in self._tensors
        ]

    def put(self, values: Sequence[Grad]) -> list[nn.Module]:
        """Put everything where the user finds it.

        Args:
            values: what the tensors of `columns` are in the user's graph.

        Returns:
            The modules that were written to.
        """
        if not self._written and not self._kept:  # nearly always
            return []
        connected: list[tuple[Tensor, Any]] = [
            (local, main) for (_, local), main in zip(self._tensors, values, strict=True)
        ]
        put_connected([slot for slot, _, _ in self._kept], {id(local): main for local, main in connected})
        modules = _write_to_original(self._main, self._written, [*self._known, *connected])
        if modules and not any(map(_is_structural, self._written)):
            self._original.remember(modules, [value for value in values if value is not None])
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
    known = _sources(main)
    written = [item for item in written if not _new_with_graph(main, [item], known)]
    return _write_to_original(main, written, known)


def _sources(main: Replica) -> list[tuple[Tensor, Any]]:
    """What the replica has for the user's tensors with a graph that attributes hold as before, and these."""
    links = [link for link in main.links() if is_untouched(link.twin)]
    return [(link.twin, source) for link in links if (source := link.source()) is not None]


def _write_to_original(main: Replica, written: list[Written], connected: list[tuple[Tensor, Any]]) -> list[nn.Module]:
    if written:
        main.write_back(written, connected)
    modules = list({id(item.module): item.module for item in written}.values())
    for module in modules:
        if (kind := main.take_class(module)) is not None:  # a forward has registered a parametrization
            object.__setattr__(module, "__class__", kind)
    return modules


def _kept_outside(
    original: Original, replicas: Sequence[Replica], leaves: list[list[Tensor]]
) -> list[tuple[Slot, int, list[Tensor]]]:
    """What hooks have kept outside of the module: where, of which tower, which tensors."""
    found = original.outside.new()
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
    return [tensor for tensor in tensors.values() if tensor.grad_fn is not None]


def _is_structural(written: Written) -> bool:
    """Whether the module must be looked at anew: replicas would share what they do not know."""
    return written.place.kind in ("structure", "hooks") or any(map(_is_followed, written.values()))


def _is_followed(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.grad_fn is None
    if isinstance(value, tuple):
        return any(map(_is_followed, iter(value)))
    return isinstance(value, nn.Module) or container_of(value) is not None

"""One call's inputs, one shard a tower: cut here, or given by a user's own ``scatter``.

Note [Version counters]
Autograd refuses a backward whose saved tensors have been written to since, which it tells by a counter that a tensor
shares with its views. The parts of one tensor must not share it: what one tower writes into its own would spoil what
the others have saved. So each has a counter of its own, and what should have moved the other side's is passed on: a
tower's writes to the batch after the forward, the user's writes to the parts before a backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from torchtower.batches.nested import map_tensors, tensors_in
from torchtower.batches.scatter import plan_splits, size_along
from torchtower.bridge.aliases import Aliases
from torchtower.bridge.graphs import graph_of, is_one_step_away, is_untouched, writable
from torchtower.bridge.local_backward import NO_LEAF
from torchtower.bridge.ports import Port
from torchtower.devices import move
from torchtower.parts import ATOMS, LEADING

_MOST_TOLD = 8  # tensors, in an error's note


def cut(batch: Any, num_towers: int, dim: int) -> Shards:
    """Shards of a batch by rows.

    Args:
        batch: nested structure; the same tensor in two places stays one tensor in every shard.
        num_towers: how many towers there are.
        dim: along which tensors are split.
    """
    tensors = tensors_in(batch)
    splits = plan_splits(tensors, num_towers, dim)
    return Shards([batch] * len(splits.rows), tensors, splits.rows, splits.parts, dim)


def from_scatter(batches: Sequence[Any], dim: int) -> Shards:
    """Shards that are there already, one a tower.

    Args:
        batches: nested structures.
        dim: along which a shard's longest tensor has as many rows as count for it; one where there is none.
    """

    def rows(tensors: list[Tensor]) -> int:
        sizes = [tensor.size(0) if tensor.is_nested else size_along(tensor, dim) for tensor in tensors]
        return max([size for size in sizes if size >= 0], default=1)

    tensors = list(map(tensors_in, batches))
    counts = list(map(rows, tensors))
    if not any(counts):
        counts = [1] * len(counts)
    return Shards(batches, list(chain.from_iterable(tensors)), counts, lambda tensor: [tensor] * len(counts), None)


class Shards:
    """The shards of one batch, and how its tensors that need gradients cross the bridge.

    Args:
        batches: what each tower's shard is made from, one or the same for each.
        tensors: in these; one may come several times.
        rows: how many each has; towers that have nothing to do are left out.
        parts_of: each tower's part of a tensor; None where all have it whole.
        dim: along which parts are rows; None where they are whole tensors, one tower's or several towers'.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        tensors: list[Tensor],
        rows: list[int],
        parts_of: Callable[[Tensor], list[Tensor] | None],
        dim: int | None,
    ) -> None:
        self.rows = rows
        self._batches = batches
        self._dim = dim
        self.tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self.devices = {tensor.device for tensor in self.tensors}  # on which they lie
        self.main_inputs: list[Tensor] = []
        self.filled: dict[int, Any] = {}  # by id, containers of the batch that a forward has put something into
        self.ports: list[Port] = []
        self.leaves: list[list[Tensor]] = [[] for _ in rows]  # of each tower that has taken its shard, one a port
        self._parts: dict[int, list[Tensor] | None] = {}
        self._port_of: dict[int, int] = {}
        self._aliased: set[int] = set()  # tensors whose memory some tower reads where it lies
        self._moved: list[tuple[int, Tensor, Tensor]] = []  # of which tensor, a tower's rows, their copy on its device
        self._handed: list[dict[int, Tensor]] = [{} for _ in rows]  # what each tower got for a tensor, by its id
        self._empty: list[list[tuple[Any, Any]]] = [[] for _ in rows]  # of each tower: the batch's, and its own
        for tensor in self.tensors:
            parts = parts_of(tensor)
            self._parts[id(tensor)] = parts = parts and [part.data for part in parts]  # see the Note
            if tensor.requires_grad and torch.is_grad_enabled():
                self._port_of[id(tensor)] = len(self.ports)
                self.main_inputs.append(tensor)
                self.ports.append(self._port(tensor, parts))

    def _port(self, tensor: Tensor, parts: list[Tensor] | None) -> Port:
        if parts is None or self._dim is None:
            return Port("shared", tensor.device)
        return Port("rows", tensor.device, tuple(part.shape[self._dim] for part in parts), self._dim)

    def take(self, tower: int, device: torch.device, translate: Callable[[Any], Any]) -> Any:
        """Tower ``tower``'s shard on its device; its leaves are noted in `leaves`.

        Args:
            tower: which.
            device: where to.
            translate: what leads to the user's module to what leads to the tower's.
        """
        leaves = self.leaves[tower] = [NO_LEAF] * len(self.ports)
        taken = self._handed[tower]

        def take_tensor(tensor: Tensor) -> Tensor:
            key = id(tensor)
            if key not in taken:
                parts = self._parts[key]
                part = tensor.detach() if parts is None else parts[tower]
                if part.device == device:
                    self._aliased.add(key)
                else:
                    with torch.inference_mode(False):  # has a version counter then, in which writes show
                        part = move(part, device)
                    if parts is not None:
                        self._moved.append((key, parts[tower], part))
                        part = part.detach()  # which a forward may turn over in place
                if (port := self._port_of.get(key)) is not None:
                    leaves[port] = part.requires_grad_()
                    part = writable(part)
                taken[key] = part
            return taken[key]

        def take_other(value: Any) -> Any:
            if type(value) in ATOMS:
                return value
            if isinstance(value, (list, dict, MutableMapping)):  # an empty one, which the forward may fill
                own = copy.copy(value)
                self._empty[tower].append((value, own))
                return own
            return translate(value) if isinstance(value, LEADING) else value

        return map_tensors(take_tensor, self._batches[tower], take_other)

    def told(self) -> str:
        """How the batch was split, in words: what should have stayed whole is then plain to see; "" if it was not."""
        dim = self._dim
        if dim is None:
            return ""
        told = [
            f"{tuple(tensor.shape)} into {[part.shape[dim] for part in parts]}"
            for tensor in self.tensors
            if (parts := self._parts[id(tensor)]) is not None
        ]
        gaps = "; such parts have gaps, as slices have (reshape takes what view may refuse)" if dim else ""
        return f"along dimension {dim}: {', '.join(told[:_MOST_TOLD])}{gaps}" if told else ""

    def overwritten(self) -> list[tuple[Tensor, Port, list[Tensor | None]]]:
        """Which of the batch's tensors a forward has written into, with autograd on; what each tower has there now.

        Of tensors that every one of several towers has whole none is told: no tower's graph knows of all writes.
        """
        found: list[tuple[Tensor, Port, list[Tensor | None]]] = []
        for tensor in self.tensors:
            if (key := id(tensor)) not in self._aliased:
                continue
            handed = [taken.get(key) for taken in self._handed]
            is_input = key in self._port_of
            is_as_it_was = is_untouched if is_input else _has_no_graph
            if all([part is None or is_as_it_was(part) for part in handed]):
                continue
            if any(part is not None and _has_moved(part, tensor) for part in handed):
                if is_input and not all([part is None or is_one_step_away(part) for part in handed]):
                    raise ValueError(
                        "TowerParallel: expected a forward to write into an input with a graph, or to change its shape "
                        f"in place (unsqueeze_, t_), not both, but it has done both to one of shape "
                        f"{tuple(tensor.shape)}; let it work on a view of that (unsqueeze, t)"
                    )
                continue
            port = self._port(tensor, self._parts[key])
            if port.kind == "rows" or len(handed) == 1:
                found.append((tensor, port.written(), handed))
        return found

    def pass_on_contents(self) -> None:
        """Put what a forward has put into empty lists and dicts of the batch into the caller's, in tower order."""
        for container, own in filter(itemgetter(1), chain.from_iterable(self._empty)):
            (container.update if isinstance(container, MutableMapping) else container.extend)(own)
            self.filled[id(container)] = container

    def pass_on_writes(self) -> None:
        """Let the tensors that a forward wrote into be as the plain module's forward would have left them.

        What some tower has where it lies is written to there: the other towers' rows must not stay behind.
        """
        for key, rows, moved in self._moved:
            if key in self._aliased and moved._version:
                rows.copy_(moved, non_blocking=True)
        for tensor in self.tensors:
            parts = self._parts[id(tensor)] or ()
            if any([not part.is_inference() and part._version for part in parts]) and not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)

    def aliases(self) -> Aliases:
        """What the towers' graphs may have saved of the batch itself, as it is now."""
        split = [tensor for tensor in self.tensors if id(tensor) in self._aliased and not tensor.is_inference()]
        return Aliases([(tensor.detach(), parts) for tensor in split if (parts := self._parts[id(tensor)]) is not None])


def _has_no_graph(part: Tensor) -> bool:
    return not part.requires_grad or graph_of(part) is None


def _has_moved(part: Tensor, whole: Tensor) -> bool:
    """Whether a forward has turned its part over in place (``t_``, ``unsqueeze_``), so that it fits no more."""
    return part.dim() != whole.dim() or (part.device == whole.device and part.stride() != whole.stride())

"""What came out of the towers in one call, and its way into the user's graph.

Knows what a bridge is made of: outputs, what towers have left behind and what they wrote into the batch go through it,
from parameters, tensors with a graph that attributes held, and the batch. It runs no tower.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchtower.bridge.bridge import connect_outputs
from torchtower.bridge.family import Family, Inputs, Plan
from torchtower.bridge.graphs import held_as_is, is_untouched, requires_grad, writable
from torchtower.bridge.ports import Port, Ports
from torchtower.parts import LEADING, tensors_within
from torchtower.reduction import Grad
from torchtower.replicas.left_behind import LeftBehind
from torchtower.replicas.original import Original
from torchtower.replicas.replicate import Replica
from torchtower.replicas.rewrite import Translation
from torchtower.shards import Shards
from torchtower.threads.streams import Streams


class ForwardResult:
    """What came out of the towers, not yet in the user's graph.

    Args:
        plan: of the wrapper.
        original: what the replicas follow.
        replicas: one a tower; some of the last ones may have had nothing to do.
        shards: on what they ran.
        outputs: one a tower that worked.
        streams: on which they ran.
        in_turn: whether they took turns.
        note_written: told of the modules that the main tower wrote to.
        call: the number of this call among those of the wrapper.
    """

    def __init__(
        self,
        plan: Plan,
        original: Original,
        replicas: Sequence[Replica],
        shards: Shards,
        outputs: list[Any],
        streams: Streams,
        in_turn: bool,
        note_written: Callable[[Iterable[nn.Module]], None],
        call: int,
    ) -> None:
        self._plan = plan
        self._original = original
        self._replicas = replicas
        self._shards = shards
        self.outputs = outputs
        self.towers_met = plan.pool.has_met
        self._in_turn = in_turn
        self._streams = streams
        self._note_written = note_written
        self._call = call

    @property
    def rows(self) -> list[int]:
        """Rows of each tower's shard."""
        return self._shards.rows

    def connect(self, weights: list[float], ports: Sequence[Port], columns: Sequence[Sequence[Grad]]) -> list[Grad]:
        """Give outputs, of which a column is the towers' parts, their place in the user's graph.

        Takes over what the main tower wrote.
        """
        plan, shards, num_towers = self._plan, self._shards, len(self.rows)
        left_behind = LeftBehind(self._original, self._replicas, shards.leaves, list(shards.filled.values()))
        overwritten = shards.overwritten()
        more = left_behind.columns(num_towers) + [(port, parts) for _, port, parts in overwritten]
        all_ports = [*ports, *[port for port, _ in more]]
        all_columns = [*columns, *[parts for _, parts in more]]
        local_outputs = [[parts[tower] for parts in all_columns] for tower in range(num_towers)]
        # The bridge keeps hold of what they were: the user, too, may write into them before a double backward.
        main_inputs = [held_as_is(tensor) for tensor in shards.main_inputs]
        inputs = self._inputs(main_inputs, num_towers)
        streams = self._streams.including([port.device for port in ports])
        family = Family(plan, weights, shards.aliases(), streams, plan.held.synchronize, self._in_turn, self._call)
        values = connect_outputs(family, inputs, all_ports, local_outputs)
        begin, end = len(ports), len(all_ports) - len(overwritten)
        for (tensor, _, _), value in zip(overwritten, values[end:], strict=True):
            _overwrite(tensor, value)
        self._note_written(left_behind.put(values[begin:end]))
        return values[:begin]

    def to_user(self, value: Any) -> Any:
        """A module that the main tower has returned, or a function that leads to one, as the user knows it."""
        return self._replicas[0].to_original()(value) if isinstance(value, LEADING) else value

    def connect_each(self) -> list[Any]:
        """Every tower's output, its tensors in the user's graph where they are, whatever holds them."""
        tensors = [[each for each in tensors_within(out, sys.maxsize) if each.requires_grad] for out in self.outputs]
        ports = [Port("solo", each.device, tower=tower) for tower, own in enumerate(tensors) for each in own]
        columns = [[each if other is own else None for other in tensors] for own in tensors for each in own]
        values = iter(self.connect([1.0] * len(tensors), ports, columns))
        connected = []
        for output, own in zip(self.outputs, tensors, strict=True):
            translate = Translation(deep=True)
            for tensor in own:
                translate.add(tensor, next(values))
            connected.append(translate(output))
        return connected

    def _inputs(self, main_inputs: list[Tensor], num_towers: int) -> Inputs:
        """What goes into the bridge: parameters, tensors with a graph that attributes held, and the batch."""
        linked, link_leaves = self._links(num_towers)
        leaves = [
            [*replica.leaves, *links, *own]
            for replica, links, own in zip(self._replicas, link_leaves, self._shards.leaves, strict=False)
        ]
        parameters = self._original.parameters
        ports = self._plan.ports
        if linked or main_inputs:
            linked_ports = [Port("shared", tensor.device) for tensor in linked]
            ports = Ports([*ports.all, *linked_ports, *self._shards.ports])
        return Inputs(
            ports,
            [*parameters, *linked, *main_inputs],
            leaves,
            list(map(requires_grad, leaves)),
            frozenset(range(len(parameters), len(parameters) + len(linked))),
        )

    def _links(self, num_towers: int) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The tensors with a graph that attributes held, and their leaves, tower-major."""
        rows = [replica.links() for replica in self._replicas[:num_towers]]
        if not rows[0]:  # nearly always
            return [], [[]] * num_towers
        sources = [link.source() for link in rows[0]]
        alive = [index for index, source in enumerate(sources) if source is not None]
        linked = [source for source in sources if source is not None]
        with torch.enable_grad():  # the bridge keeps hold of what they were
            linked = [
                source if is_untouched(rows[0][old].twin) else writable(source)
                for source, old in zip(linked, alive, strict=True)
            ]
        return linked, [[links[index].leaf for index in alive] for links in rows]


def _overwrite(tensor: Tensor, value: Grad) -> None:
    """Let the caller's tensor be in the graph where the towers wrote into it, as in the plain module."""
    assert value is not None
    autograd: Any = torch.autograd
    counter = autograd._unsafe_preserve_version_counter(tensor)  # the write has been counted already
    with counter, torch.set_grad_enabled(value.requires_grad):
        tensor.copy_(value)

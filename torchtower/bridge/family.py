"""What the bridges of one forward have in common, and what goes into each; see Note [The bridge]."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchtower.bridge.aliases import Aliases
from torchtower.bridge.collect import Collection
from torchtower.bridge.held import HeldGradients
from torchtower.bridge.node import if_needed
from torchtower.bridge.ports import Ports
from torchtower.threads.streams import Streams
from torchtower.threads.workers import TowerPool


class Plan(NamedTuple):
    """What all forwards of one wrapper have in common, as long as its parameters stay what they are.

    Args:
        pool: the towers' threads.
        ports: of the user's parameters, the first inputs of every bridge.
        buckets: how the parameters' gradients travel, see `torchtower.bridge.collect`; none where they need not.
        held: gradients that ``no_sync`` has kept back.
        before_backward: called before every backward with the number of its forward, as long as there is a wrapper.
        on_backward: called after every backward, even a failed one; likewise.
    """

    pool: TowerPool
    ports: Ports
    buckets: list[list[int]]
    held: HeldGradients
    before_backward: weakref.WeakMethod[Callable[[int], None]]
    on_backward: weakref.WeakMethod[Callable[[], None]]

    def collection(self, weights: list[float]) -> Collection:
        """What takes gradients of the parameters, by bucket, to be summed with these weights."""
        return Collection(self.buckets, weights, self.pool.devices[0])


@dataclass
class Family:
    """What the bridges of one forward have in common.

    Args:
        plan: of the wrapper.
        weights: one for each tower that took part, as `torchtower.ops.tower_mean_` takes them.
        aliases: what the local graphs may have saved of the batch.
        streams: of the forward, on which its backwards work too.
        synchronize: whether a backward reduces gradients, or has them kept back.
        in_turn: whether the towers took turns, and do so in backwards.
        call: the number of the forward among those of the wrapper.
    """

    plan: Plan
    weights: list[float]
    aliases: Aliases
    streams: Streams
    synchronize: bool
    in_turn: bool
    call: int
    keeps_graphs: bool = False
    # Weak: a bridge refers to its family, and local graphs must die with the user's last reference to them.
    bridges: list[weakref.ref[Any]] = field(default_factory=list)

    def keep_until_end_of_backward(self, keep_for_good: bool) -> None:
        """From now on local backwards keep their graphs; they are freed when the outer backward ends."""
        self.keeps_graphs = True
        if not keep_for_good:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._free)

    def _free(self) -> None:
        for reference in self.bridges:
            if (bridge := reference()) is not None:
                bridge.free()


class Inputs(NamedTuple):
    """What goes into a bridge.

    Args:
        ports: of the inputs, the plan's parameters first.
        main: the user's tensors, one a port.
        leaves: the towers', tower-major; `NO_LEAF` where a tower has none.
        requires_grad: which of these required gradients when the forward ran.
        linked: indices of the main tensors that attributes held.
    """

    ports: Ports
    main: list[Tensor]
    leaves: list[list[Tensor]]
    requires_grad: list[list[bool]]
    linked: frozenset[int]

    def without(self, others: set[int]) -> Inputs:
        """These, but for some."""
        if not others:
            return self

        kept = [index for index in range(len(self.main)) if index not in others]

        def of(several: Sequence[Any]) -> list[Any]:
            return [several[index] for index in kept]

        ports = Ports(of(self.ports.all))
        linked = frozenset(index for index, old in enumerate(kept) if old in self.linked)
        return Inputs(ports, of(self.main), list(map(of, self.leaves)), list(map(of, self.requires_grad)), linked)

    def doubting(self, others: set[int]) -> Inputs:
        """These, but behind some of them a backward goes on only if a gradient comes for them."""

        def stand_in(index: int) -> Tensor:
            return if_needed(self.main[index], is_held=index in self.linked)

        return self._replace(main=[stand_in(i) if i in others else tensor for i, tensor in enumerate(self.main)])

"""The autograd bridge: one node in the user's graph stands for all towers' local graphs.

Note [The bridge]
A tower's forward builds a graph of its own on leaves of its own (its replica's parameters, its rows of the inputs). One
``torch.autograd.Function`` joins these graphs to the user's: its inputs are the user's parameters and inputs, its
outputs the joined outputs. Its backward hands every tower its part of the output gradients, runs the local backwards in
the towers' threads (the engine would run them one after the other on a CPU), joins what they leave and returns it. So
hooks on the user's parameters, ``torch.autograd.grad``, accumulation and frozen parameters work by PyTorch's own rules.
The engine goes on to all inputs of a node, with a gradient or without. So where the user's graph goes on behind an
input, outputs that do not depend on it have a node without it: one for each branch of the towers' graphs.

What crosses the bridge does so through ports. A port knows how a value on the main side becomes one a tower and back:
- shared: the same value for every tower; back, the weighted sum over towers (parameters, and each tower's loss).
- rows: a part for each tower; back, the parts one after the other (inputs, gathered outputs).
- solo: one tower's alone (a tensor with a graph that the main tower's forward left in an attribute, or that any tower's
  left with a hook, or in a list or dict of the caller's).
- written: rows of the batch that towers have written into; back, unweighted.
The towers' weights are applied only on the way back to the main side, never on the way in: what a tower computes is the
gradient of its own loss, unscaled.

Double backward needs nothing new: the local gradients are outputs of local graphs again, so they become the outputs of
a second bridge, whose inputs are the first one's and the output gradients. All bridges of one forward are a family:
their local graphs overlap, so once one of them has run with ``create_graph`` none frees its graph before the end of the
outer backward.

The node saves no tensor: whether a graph may be walked a second time, the local engine says, as it does for the plain
module. Its context refers to the main inputs and the local graphs, and to nothing that refers back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, compress, repeat, zip_longest
from operator import is_
from typing import Any

import torch
from torch import Tensor

from torchtower.bridge.collect import Sender
from torchtower.bridge.family import Family, Inputs
from torchtower.bridge.graphs import branches, leads_to, leaves_of, requires_grad
from torchtower.bridge.hooks import spare_hooks
from torchtower.bridge.local_backward import NO_LEAF, Root, local_backward, local_grad, root_of
from torchtower.bridge.node import Asked, connect
from torchtower.bridge.ports import Port, Ports, join, without_graph
from torchtower.devices import move
from torchtower.reduction import Grad, is_batched
from torchtower.threads.locks import is_held_here
from torchtower.threads.rounds import current_tower

_autograd: Any = torch._C._autograd


def connect_outputs(family: Family, inputs: Inputs, ports: Sequence[Port], outputs: list[list[Grad]]) -> list[Grad]:
    """Join the towers' outputs and give them their place in the user's graph.

    Args:
        family: the forward that they belong to.
        inputs: of that forward.
        ports: of the outputs.
        outputs: tower-major; None where a tower has no such output.
    """
    if family.streams and any(_is_on_cpu(part) for tower in outputs for part in tower):
        family.streams.synchronize()  # it may be on its way there still
    detached = [[part if part is None else without_graph(part) for part in tower] for tower in outputs]
    values = join(Ports(ports), detached, family.weights)
    columns = list(zip(*outputs, strict=True))
    crossing = [
        i for i, parts in enumerate(columns) if any([part is not None and part.requires_grad for part in parts])
    ]
    # A module may build a graph although its caller asks for none (``@torch.enable_grad()`` on its forward).
    if not torch.is_grad_enabled() and not any(p is not None and p.grad_fn for i in crossing for p in columns[i]):
        return values
    for group, chosen in _groups(crossing, columns, inputs, len(family.plan.ports.all)):
        roots = [[root_of(tower[index]) for index in group] for tower in outputs]
        bridge = Bridge(family, chosen, [ports[index] for index in group], roots)
        connected = connect(bridge.backward, chosen.main, [values[index] for index in group])
        for index, value in zip(group, connected, strict=True):
            values[index] = value
    return values


def _groups(
    crossing: list[int], columns: Sequence[Sequence[Grad]], inputs: Inputs, num_parameters: int
) -> Iterable[tuple[list[int], Inputs]]:
    """Which outputs share a bridge, and which inputs it has.

    All do, and it has all, unless the user's graph goes on behind an input: a backward must not walk into what its
    outputs do not depend on, where it would free what another one needs, or miss what an earlier one has freed. Where
    that cannot be told (a reentrant checkpoint goes backward by itself), the gradient that comes, or not, will tell.
    """
    with_graph = [i for i in range(num_parameters, len(inputs.main)) if inputs.main[i].grad_fn is not None]
    if not crossing:
        return []
    if not with_graph:  # nearly always
        return [(crossing, inputs)]
    if len(crossing) == 1 and leads_to(columns[crossing[0]][0], [inputs.leaves[0][i] for i in with_graph]):
        return [(crossing, inputs)]
    groups: dict[tuple[bool, ...], list[int]] = {}
    for branch in branches([columns[index] for index in crossing]):
        leads = [not branch.leaves.isdisjoint(id(tower[i]) for tower in inputs.leaves) for i in with_graph]
        groups.setdefault((branch.is_opaque, *leads), []).extend(crossing[index] for index in branch.outputs)
    found = []
    for (is_opaque, *leads), group in groups.items():
        others = {i for i, is_led_to in zip(with_graph, leads, strict=True) if not is_led_to}
        found.append((group, inputs.doubting(others) if is_opaque else inputs.without(others)))
    return found


class Bridge:
    """Local graphs of all towers, between what goes in and what comes out.

    Args:
        family: the forward that it belongs to.
        inputs: what goes in.
        out_ports: of its outputs.
        roots: of the local graphs, where backwards begin, tower-major.
    """

    def __init__(
        self,
        family: Family,
        inputs: Inputs,
        out_ports: Sequence[Port],
        roots: list[list[Root | None]],
    ) -> None:
        self._family = family
        self._inputs = inputs
        self._out_ports = out_ports
        self._roots: list[list[Root | None]] | None = roots
        family.bridges.append(weakref.ref(self))

    def backward(self, asked: Asked, grads: Sequence[Grad]) -> list[Grad]:
        """From gradients of the outputs to those of the inputs that are asked for."""
        if current_tower() is not None:
            raise RuntimeError(
                "TowerParallel: expected the backward of a wrapped module's output outside of its towers, but it was "
                "started in the forward of one; detach what an earlier forward left behind"
            )
        plan = self._family.plan
        if is_held_here(plan.pool.lock):
            raise RuntimeError(
                "TowerParallel: expected no backward of a wrapped module's output while this thread is within another "
                "call or backward of it, as a signal's handler may be"
            )
        devices = {plan.pool.devices[0], *[port.device for port in self._out_ports]}
        with plan.pool.lock, self._family.streams.current_for_backward(devices):
            try:
                if (before_backward := plan.before_backward()) is not None:
                    before_backward(self._family.call)
                return self._backward(asked, grads)
            finally:
                if (on_backward := plan.on_backward()) is not None:
                    on_backward()

    def _backward(self, asked: Asked, grads: Sequence[Grad]) -> list[Grad]:
        family, main_inputs = self._family, self._inputs.main
        held, ports = family.plan.held, family.plan.ports
        family.aliases.pass_on_writes()
        parameters = main_inputs[: len(ports.all)]
        synchronize = held.are_reduced(family.synchronize)
        accumulated: list[bool] = []
        if held or not synchronize:
            accumulated = asked.accumulated(len(parameters))
        local_grads = self._local_grads(self._alive(), grads)
        keep = _autograd._get_current_graph_task_keep_graph()
        if not torch.is_grad_enabled():
            values = self._first_order_backward(parameters, local_grads, keep, synchronize, accumulated, asked)
        else:
            values = self._differentiable_backward(grads, local_grads, keep, asked)
            if held and synchronize:
                shares = [values[: len(parameters)], *held.kept(parameters, accumulated)]
                values[: len(parameters)] = join(ports, shares, [1.0] * len(shares))
        if held and synchronize:
            held.drop(compress(parameters, accumulated))
        if any(map(is_, values, repeat(None))):
            without = [tensor for tensor, value in zip(main_inputs, values, strict=True) if value is None]
            sources = [source for tensor in without if (source := _held_for(tensor)) is not None]
            spare_hooks(chain(sources, leaves_of(without)))
        is_whole = len(family.bridges) == 1 and asked.all and all(grad is not None for grad in grads)
        if is_whole and not (keep or family.keeps_graphs):
            family.aliases.forget()  # no graph has saved anything any more
        return values

    def _first_order_backward(
        self,
        parameters: Sequence[Tensor],
        local_grads: list[list[Grad]],
        keep: bool,
        synchronize: bool,
        accumulated: list[bool],
        asked: Asked,
    ) -> list[Grad]:
        family, plan = self._family, self._family.plan
        keep = keep or family.keeps_graphs
        towers = zip(self._alive(), local_grads, self._inputs.leaves, self._wanted(asked), strict=True)
        collection = None
        if plan.buckets and not any(accumulated) and not any(map(is_batched, chain.from_iterable(local_grads))):
            collection = plan.collection(family.weights)
        if not asked.all:
            jobs = [partial(local_grad, *parts, keep) for parts in towers]
        else:
            senders: list[Sender | None] = [None] * len(local_grads)
            if collection is not None:
                senders = [Sender(collection, tower, leaves) for tower, leaves in enumerate(self._inputs.leaves)]
            jobs = [
                partial(local_backward, *parts, keep, sender) for parts, sender in zip(towers, senders, strict=True)
            ]
        local = plan.pool.run(jobs, family.streams, in_turn=family.in_turn, weights=family.weights)
        if collection is not None:
            collected = collection.finish(local, parameters)
            rest = [grads[len(parameters) :] for grads in local]
            return collected + join(
                Ports(self._inputs.ports.all[len(parameters) :]), rest, family.weights, in_place=asked.all
            )
        totals: list[Grad] = []
        if any(accumulated):
            if synchronize:  # what is kept and what has come now travel together
                totals = self._sum_over_towers(plan.held.with_kept(parameters, local, family.weights, accumulated))
            else:
                plan.held.keep(parameters, local, family.weights, accumulated, in_place=asked.all)
            local = [[None if k else g for k, g in zip_longest(accumulated, grads)] for grads in local]
        # A gradient that went into no leaf may be somebody else's memory, the output's gradient itself for instance.
        values = join(self._inputs.ports, local, family.weights, in_place=asked.all)
        for index, total in enumerate(totals):
            if total is not None:
                values[index] = total
        return values

    def _sum_over_towers(self, shares: list[list[Grad]]) -> list[Grad]:
        """Of gradients of the parameters, one list a tower."""
        plan, weights = self._family.plan, [1.0] * len(shares)
        if not plan.buckets:
            return join(plan.ports, shares, weights)
        return plan.collection(weights).finish(shares, self._inputs.main[: len(plan.ports.all)])

    def _wanted(self, asked: Asked) -> list[list[bool]]:
        """Of which local inputs gradients are wanted, tower-major: those that required them when the forward ran."""
        if asked.all:
            return self._inputs.requires_grad
        flags, towers = asked.flags(), self._inputs.requires_grad
        return [[flag and wanted for flag, wanted in zip(tower, flags, strict=True)] for tower in towers]

    def _local_grads(self, roots: list[list[Root | None]], grads: Sequence[Grad]) -> list[list[Grad]]:
        towers: list[list[Grad]] = [[] for _ in roots]
        for index, (port, grad) in enumerate(zip(self._out_ports, grads, strict=True)):
            parts = [None] * len(roots) if grad is None else port.to_towers(grad, self._family.weights)
            for own, part, tower in zip(towers, parts, roots, strict=True):
                own.append(_at(part, tower[index]))
        return towers

    def _differentiable_backward(
        self, grads: Sequence[Grad], local_grads: list[list[Grad]], keep: bool, asked: Asked
    ) -> list[Grad]:
        self._family.keep_until_end_of_backward(keep)
        first = self._inputs
        given = [index for index, grad in enumerate(grads) if grad is not None]
        main_grads = [grad for grad in grads if grad is not None]
        cotangents = [
            [_leaf(tower[i], main) for i, main in zip(given, main_grads, strict=True)] for tower in local_grads
        ]
        jobs = [
            partial(local_grad, [roots[i] for i in given], local, leaves, wanted, keep_graph=True)
            for roots, local, leaves, wanted in zip(
                self._alive(), cotangents, first.leaves, self._wanted(asked), strict=True
            )
        ]
        new_leaves = [[NO_LEAF if part is None else part for part in tower] for tower in cotangents]
        second = Inputs(
            Ports([*first.ports.all, *[self._out_ports[i] for i in given]]),
            [*first.main, *main_grads],
            [[*a, *b] for a, b in zip(first.leaves, new_leaves, strict=True)],
            [[*a, *requires_grad(b)] for a, b in zip(first.requires_grad, new_leaves, strict=True)],
            first.linked,
        )
        family = self._family
        local = family.plan.pool.run(jobs, family.streams, in_turn=family.in_turn, weights=family.weights)
        return connect_outputs(family, second, first.ports.all, local)

    def _alive(self) -> list[list[Root | None]]:
        if self._roots is None:
            raise RuntimeError(
                "TowerParallel: Trying to backward through the graph a second time, but the towers' graphs have been "
                "freed. Specify retain_graph=True if you need to backward through the graph a second time."
            )
        return self._roots

    def free(self) -> None:
        """Let go of the local graphs."""
        self._roots = None


def _held_for(tensor: Tensor) -> Tensor | None:
    """The user's tensor that this one holds the graph of; itself where it is the user's."""
    reference = getattr(tensor, "held_for", None)
    return tensor if reference is None else reference()


def _is_on_cpu(part: Grad) -> bool:
    return part is not None and part.device.type == "cpu"


def _at(part: Grad, root: Root | None) -> Grad:
    if part is None or root is None:
        return None
    return move(without_graph(part), root.device)


def _leaf(part: Grad, main: Tensor) -> Any:
    return None if part is None else part.detach().requires_grad_(main.requires_grad)

"""One call of a wrapped module, from its inputs to its outputs: shards out, replicas run, outputs joined."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from torchtower.bridge import connect_outputs
from torchtower.collect import cut_buckets
from torchtower.devices import move
from torchtower.family import Family, Inputs, Plan
from torchtower.freshness import Freshness
from torchtower.graphs import writable
from torchtower.held import HeldGradients
from torchtower.left_behind import LeftBehind, keep_what_was_assigned
from torchtower.local_backward import requires_grad
from torchtower.original import Original
from torchtower.parts import tensors_within
from torchtower.pooling import pool_buffers
from torchtower.ports import Port, Ports
from torchtower.reduction import Grad, weighted_sum
from torchtower.replicate import Replica
from torchtower.rewrite import Translation
from torchtower.rounds import add_note
from torchtower.scripted import is_optimized, is_training
from torchtower.shards import Shards
from torchtower.streams import Streams
from torchtower.workers import TowerPool

Call = Callable[[Any, Any], Any]  # (replica's module, shard) -> output


class Towers:
    """The replicas of one module and the threads that run them.

    Args:
        module: the user's module.
        devices: one a tower.
        max_concurrency: see `TowerPool`.
        buffers: ``"main"`` or ``"mean"``, see `torchtower.TowerParallel`.
        held: whether gradients are kept back, and which are.
        lock: the wrapper's, which whoever calls `run` holds until the outputs are connected.
    """

    def __init__(
        self,
        module: nn.Module,
        devices: Sequence[torch.device],
        max_concurrency: int | None,
        buffers: str,
        held: HeldGradients,
        lock: threading.RLock,
    ) -> None:
        self.pool = TowerPool(devices, max_concurrency, lock)
        self._buffers = buffers
        self._freshness = Freshness(any(device != devices[0] for device in devices))
        self._original = Original(module, devices[0])
        self._original.check_device()
        self._replicas = [
            Replica(self._original, device, is_main=index == 0, aliases=device == devices[0])
            for index, device in enumerate(devices)
        ]
        self._held = held
        self._plan_parameters()
        self._is_following = False
        self._written_to: list[nn.Module] = []  # by the main tower, since the replicas last followed
        self.is_compiled = _is_compiled(self._original.modules)
        self._in_turn = self.is_compiled  # T towers that meet a compiled module at once would compile it T times
        self.went_backward = False  # whether a tower of the last call did, beside what the bridge runs

    @property
    def module(self) -> nn.Module:
        """The user's module that the replicas follow."""
        return self._original.module

    @property
    def main_leaves(self) -> list[Tensor]:
        """The parameters of the main tower's replica."""
        return self._replicas[0].leaves

    def replica_here(self) -> Any:
        """In the thread of a tower of ours that tower's replica, elsewhere None."""
        tower = self.pool.tower_here()
        return None if tower is None else self._replicas[tower].module

    def run(self, call: Call, shards: Shards) -> ForwardResult:
        """Run ``call`` on every shard, each in its tower's thread, and take over what the main tower wrote."""
        self.pool.share_out_cores()
        self._follow()
        taken: list[list[Tensor]] = [[] for _ in shards.rows]

        def job_of(tower: int) -> Callable[[], Any]:
            replica = self._replicas[tower]

            def job() -> Any:
                shard, leaves = shards.take(tower, replica.device)
                taken[tower] = leaves
                return call(replica.module, shard)

            return job

        self._original.outside.remember()
        try:
            outputs = self._run_jobs([job_of(t) for t in range(len(taken))])
        except BaseException as error:
            self._written_to += keep_what_was_assigned(self._replicas[0])  # a hook that stops the forward, say
            if isinstance(error, Exception) and (told := shards.told()):
                add_note(error, "TowerParallel split tensors ", told)
            raise
        shards.pass_on_writes()
        shards.pass_on_contents()
        if self._buffers == "mean":
            pool_buffers(self._replicas, shards.rows)
        return ForwardResult(self, shards, outputs, taken)

    def _run_jobs(self, jobs: list[Callable[[], Any]]) -> list[Any]:
        if self._take_gradients() and not self.pool.was_broken_into:
            raise RuntimeError(
                "TowerParallel: expected gradients to reach the parameters through outputs, attributes or what hooks "
                "keep, but a backward since the last call went through a tensor that a tower's forward has left "
                "elsewhere (in a class attribute, say), and its gradients are lost; return that tensor"
            )
        try:
            outputs = self.pool.run(jobs, in_turn=self._in_turn)
        finally:
            inner_gradients = self._take_gradients()
            self.went_backward = bool(inner_gradients)
            self._take_over_flags()
            self._take_over_data()
        self._in_turn = False
        if inner_gradients:
            self._accumulate_inner_gradients(inner_gradients)
        return outputs

    def _take_over_flags(self) -> None:
        """Freeze and thaw the parameters that the main tower's forward has frozen and thawed."""
        parameters = self._original.parameters
        leaves = self._replicas[0].leaves
        now = requires_grad(leaves)
        if now != requires_grad(parameters):
            for parameter, leaf, flag in zip(parameters, leaves, now, strict=True):
                if not leaf.is_inference():  # which can have no flag
                    parameter.requires_grad_(flag)
            self._plan_parameters()
            self._original.forget()

    def _take_over_data(self) -> None:
        """Keep what the main tower's forward assigned to a parameter's ``.data``, and that alone."""
        if any([replica.parameters.moved() for replica in self._replicas]):
            main = self._replicas[0]
            for index in main.parameters.moved():
                self._original.parameters[index].data = main.leaves[index].data
            for replica in self._replicas:
                replica.parameters.put_back()

    def _take_gradients(self) -> list[list[Grad]]:
        """What the replicas' leaves have been given beside a backward of ours, tower-major; [] if nothing."""
        leaves = [replica.leaves for replica in self._replicas]
        if {type(None)}.issuperset(map(type, map(attrgetter("grad"), chain.from_iterable(leaves)))):  # nearly always
            return []
        towers: list[list[Grad]] = [[leaf.grad for leaf in replica.leaves] for replica in self._replicas]
        for replica in self._replicas:
            for leaf in replica.leaves:
                leaf.grad = None
        return towers

    def _accumulate_inner_gradients(self, towers: list[list[Grad]]) -> None:
        """Give the parameters what a backward within the forward has left in the replicas, summed over towers."""
        totals = weighted_sum(towers, [1.0] * len(towers), in_place=False)
        for parameter, total in zip(self._original.parameters, totals, strict=True):
            if total is not None:
                total = move(total, parameter.device)
                parameter.grad = total if parameter.grad is None else parameter.grad + total

    def _follow(self) -> None:
        """Let the replicas be as the module is now; what an error or an interrupt has broken off is begun anew."""
        if self._is_following:
            self._original.forget()
            self.refresh()
        self._is_following = True
        grad_enabled = torch.is_grad_enabled()
        try:
            self._follow_changes()
        except BaseException:  # a signal may come just before ``no_grad`` ends
            torch.set_grad_enabled(grad_enabled)
            raise
        self._is_following = False

    def _follow_changes(self) -> None:
        changes = self._original.changes()
        if changes != []:
            self._original.check_device()
        if changes is None:
            self.is_compiled = self._in_turn = _is_compiled(self._original.modules)
            self._plan_parameters()
            for replica in self._replicas:
                replica.rebuild()
        else:
            if not self.is_compiled and _is_compiled(changes):
                self.is_compiled = self._in_turn = True
            changes.extend(self._written_to)
            for replica in self._replicas:
                replica.follow(changes)
        self._written_to = []
        if self._freshness.switched(is_training(self.module)):
            self.refresh()
        stale = self._freshness.stale()
        for replica in self._replicas:
            replica.parameters.refresh(stale)
            replica.refresh_buffers()

    def _plan_parameters(self) -> None:
        """How parameters cross the bridge, and how their gradients travel."""
        parameters = self._original.parameters
        on_one_device = all(device == self.pool.devices[0] for device in self.pool.devices)
        self._plan = Plan(
            pool=self.pool,
            ports=Ports([Port("shared", parameter.device) for parameter in parameters]),
            buckets=[] if on_one_device else cut_buckets(parameters),
            held=self._held,
            on_backward=functools.partial(_note_backward, weakref.ref(self)),
        )

    def refresh(self) -> None:
        """Let every replica on another device fetch all parameters at its next forward."""
        for replica in self._replicas:
            replica.parameters.forget()

    def bridge(
        self,
        shards: Shards,
        weights: list[float],
        leaves: list[list[Tensor]],
        out_ports: Sequence[Port],
        outputs: list[list[Grad]],
    ) -> list[Grad]:
        """Connect the towers' outputs to the user's graph; takes over what the main tower's forward wrote."""
        left_behind = LeftBehind(self._original, self._replicas, leaves)
        # Rows that are weighted on the way back would be the user's only in part.
        overwritten = shards.overwritten() if set(weights) == {1.0} else []
        more = left_behind.columns(len(outputs)) + [(shards.ports[index], parts) for index, parts in overwritten]
        ports = [*out_ports, *[port for port, _ in more]]
        local_outputs = [[*own, *[parts[tower] for _, parts in more]] for tower, own in enumerate(outputs)]
        main_inputs = list(shards.main_inputs)
        for index, _ in overwritten:  # the bridge keeps hold of what they were
            main_inputs[index] = writable(main_inputs[index])
        linked, link_leaves, replaced = self._links(len(outputs))
        local_inputs = [
            [*replica.leaves, *links, *own]
            for replica, links, own in zip(self._replicas, link_leaves, leaves, strict=False)
        ]
        in_ports = self._plan.ports
        if linked or main_inputs:
            in_ports = Ports([*in_ports.all, *[Port("shared", tensor.device) for tensor in linked], *shards.ports])
        parameters = self._original.parameters
        inputs = Inputs(
            in_ports,
            [*parameters, *linked, *main_inputs],
            local_inputs,
            list(map(requires_grad, local_inputs)),
            frozenset(len(parameters) + index for index in replaced),
        )
        family = Family(self._plan, weights, shards.aliases(), Streams(self.pool.devices), self._held.synchronize)
        values = connect_outputs(family, inputs, ports, local_outputs)
        begin, end = len(out_ports), len(ports) - len(overwritten)
        for (index, _), value in zip(overwritten, values[end:], strict=True):
            _overwrite(shards.main_inputs[index], value)
        self._written_to += left_behind.put(values[begin:end])
        return values[:begin]

    def _links(self, num_towers: int) -> tuple[list[Tensor], list[list[Tensor]], list[int]]:
        """The tensors with a graph that attributes held, their leaves, tower-major, and which have been replaced."""
        rows = [replica.links() for replica in self._replicas[:num_towers]]
        if not rows[0]:  # nearly always
            return [], [[]] * num_towers, []
        sources = [link.source() for link in rows[0]]
        alive = [index for index, source in enumerate(sources) if source is not None]
        linked = [source for source in sources if source is not None]
        there = self._replicas[0].tensors_where_links_are()
        replaced = [new for new, old in enumerate(alive) if id(rows[0][old].twin) not in there]
        return linked, [[links[index].leaf for index in alive] for links in rows], replaced

    def _on_backward(self) -> None:
        self._freshness.on_backward()
        self._written_to += keep_what_was_assigned(self._replicas[0])


class ForwardResult:
    """What came out of the towers, not yet in the user's graph.

    Args:
        towers: where it ran.
        shards: on what.
        outputs: one a tower that worked.
        leaves: the shards' leaves, tower-major.
    """

    def __init__(self, towers: Towers, shards: Shards, outputs: list[Any], leaves: list[list[Tensor]]) -> None:
        self._towers = towers
        self._shards = shards
        self.outputs = outputs
        self.towers_met = towers.pool.has_met
        self._leaves = leaves

    @property
    def rows(self) -> list[int]:
        """Rows of each tower's shard."""
        return self._shards.rows

    def connect(self, weights: list[float], ports: Sequence[Port], outputs: list[list[Grad]]) -> list[Grad]:
        """Give ``outputs`` (tower-major) their place in the user's graph."""
        return self._towers.bridge(self._shards, weights, self._leaves, ports, outputs)

    def connect_each(self) -> list[Any]:
        """Every tower's output, its tensors in the user's graph where they are, whatever holds them."""
        tensors = [[each for each in tensors_within(out, sys.maxsize) if each.requires_grad] for out in self.outputs]
        ports = [Port("solo", each.device, tower=tower) for tower, own in enumerate(tensors) for each in own]
        columns = [[each if other is own else None for own in tensors for each in own] for other in tensors]
        values = iter(self.connect([1.0] * len(tensors), ports, columns))
        connected = []
        for output, own in zip(self.outputs, tensors, strict=True):
            translate = Translation(deep=True)
            for tensor in own:
                translate.add(tensor, next(values))
            connected.append(translate(output))
        return connected


def _note_backward(reference: weakref.ref[Towers]) -> None:
    if (towers := reference()) is not None:
        towers._on_backward()


def _overwrite(tensor: Tensor, value: Grad) -> None:
    """Let the caller's tensor be in the graph where the towers wrote into it, as in the plain module."""
    assert value is not None
    autograd: Any = torch.autograd
    with torch.enable_grad(), autograd._unsafe_preserve_version_counter(tensor):  # the write has been counted already
        tensor.copy_(value)


def _is_compiled(modules: Sequence[nn.Module]) -> bool:
    return any(
        module._compiled_call_impl is not None  # module.compile()
        or is_optimized(module)  # torch.compile(module)
        or hasattr(module.forward, "_torchdynamo_orig_callable")  # torch.compile(module.forward)
        for module in modules
    )

"""The towers of one module: replicas that follow it, and one call of it, up to what comes out of them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchtower.bridge.collect import cut_buckets
from torchtower.bridge.family import Plan
from torchtower.bridge.held import HeldGradients
from torchtower.bridge.ports import Port, Ports
from torchtower.compiled import Compilation
from torchtower.forward_result import ForwardResult
from torchtower.replicas.freshness import Freshness
from torchtower.replicas.leaf_changes import accumulate, check_apart, take_gradients, take_over_data, take_over_flags
from torchtower.replicas.left_behind import drop_new_graphs, keep_what_was_assigned
from torchtower.replicas.original import Original
from torchtower.replicas.pooling import pool_buffers
from torchtower.replicas.replicate import Replica
from torchtower.replicas.scripted import is_training
from torchtower.shards import Shards
from torchtower.threads.rounds import add_note
from torchtower.threads.streams import Streams
from torchtower.threads.workers import TowerPool

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
        self._is_checked = False  # whether towers have been seen to use parameters of their own
        self._num_calls = 0
        self._written_to: list[nn.Module] = []  # by the main tower, since the replicas last followed
        self._compilation = Compilation(devices)
        self._compilation.look_at(self._original.modules, is_all=True)
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

    @property
    def is_compiled(self) -> bool:
        """Whether ``torch.compile`` has been told of the module, or of a part of it."""
        return self._compilation.is_there

    def run(self, call: Call, shards: Shards, function: Callable[..., Any] | None = None) -> ForwardResult:
        """Run ``call`` on every shard, each in its tower's thread, and take over what the main tower wrote.

        Args:
            call: of a replica on a shard.
            shards: of the batch.
            function: of the user's, which ``call`` calls with the replica.
        """
        self.pool.share_out_cores()
        self._follow()
        self._num_calls += 1
        streams = Streams(shards.devices.union(self.pool.devices))

        def job_of(tower: int) -> Callable[[], Any]:
            replica = self._replicas[tower]

            def job() -> Any:
                return call(replica.module, shards.take(tower, replica.device, replica.translate))

            return job

        self._original.outside.remember()
        try:
            with self._compilation.watch(self.module, function, shards.tensors) as in_turn:
                outputs = self._run_jobs([job_of(t) for t in range(len(shards.rows))], streams, in_turn)
            if not self._is_checked and torch.is_grad_enabled():
                check_apart(self._replicas, outputs)
                self._is_checked = True
        except BaseException as error:
            drop_new_graphs(self._replicas[0])
            self._written_to += keep_what_was_assigned(self._replicas[0])  # a hook that stops the forward, say
            if isinstance(error, Exception) and (told := shards.told()):
                add_note(error, "TowerParallel split tensors ", told)
            raise
        shards.pass_on_writes()
        shards.pass_on_contents()
        if self._buffers == "mean":
            pool_buffers(self._replicas, shards.rows)
        return ForwardResult(
            self._plan,
            self._original,
            self._replicas,
            shards,
            outputs,
            streams,
            in_turn,
            note_written=self._written_to.extend,
            call=self._num_calls,
        )

    def _run_jobs(self, jobs: list[Callable[[], Any]], streams: Streams, in_turn: bool) -> list[Any]:
        if take_gradients(self._replicas) and not self.pool.was_broken_into:
            raise RuntimeError(
                "TowerParallel: expected gradients to reach the parameters through outputs, attributes or what hooks "
                "keep, but a backward since the last call went through a tensor that a tower's forward has left "
                "elsewhere (in a class attribute, say), and its gradients are lost; return that tensor"
            )
        try:
            outputs = self.pool.run(jobs, streams, in_turn=in_turn)
        finally:
            parameters = self._original.parameters
            inner_gradients = take_gradients(self._replicas)
            self.went_backward = bool(inner_gradients)
            if take_over_flags(self._original, self._replicas[0].leaves):
                self._plan_parameters()
                self._original.forget()
            if take_over_data(parameters, self._replicas):
                self._original.forget()
        if inner_gradients:
            accumulate(parameters, inner_gradients)
        return outputs

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
            self._compilation.look_at(self._original.modules, is_all=True)
            self._plan_parameters()
            for replica in self._replicas:
                replica.rebuild()
        else:
            self._compilation.look_at(changes, is_all=False)
            changes.extend(self._written_to)
            for replica in self._replicas:
                replica.follow(changes)
        self._written_to.clear()
        if self._freshness.all_stale(is_training(self.module)):
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
            before_backward=weakref.WeakMethod(self._before_backward),
            on_backward=weakref.WeakMethod(self._on_backward),
        )

    def refresh(self) -> None:
        """Let every replica on another device fetch all parameters at its next forward."""
        for replica in self._replicas:
            replica.parameters.forget()

    def _before_backward(self, call: int) -> None:
        # The last call may have found the module in another mode than it is in now, which a checkpoint's backward runs
        # in: put in evaluation, say, for a look at other data. All else stays as the towers' forwards have left it.
        if call != self._num_calls:
            for replica in self._replicas:
                replica.follow_modes()

    def _on_backward(self) -> None:
        self._freshness.on_backward()
        self._written_to += keep_what_was_assigned(self._replicas[0])

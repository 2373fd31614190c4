"""The towers' threads: long-lived, one a tower, each doing that tower's forward and its backward.

A thread holds nothing of a job once it is done, so that the user's tensors die when the user lets go of them.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import attrgetter
from queue import SimpleQueue
from typing import Any

import torch

from torchtower.threads.cores import available_cores, send_team_home
from torchtower.threads.engine import empty_queue, make_last_node, wait_for_engine
from torchtower.threads.first_calls import settle_first_calls
from torchtower.threads.forward_mode import give_back_turn, leave_levels, take_turns_in_forward_mode
from torchtower.threads.generators import Seeds, TowerGenerators
from torchtower.threads.heap import keep_freed_memory
from torchtower.threads.rounds import Round, become_tower, name_tower
from torchtower.threads.streams import Streams
from torchtower.threads.thread_state import ThreadState, has_levels, without_parametrization_cache
from torchtower.threads.tower_random import draw_from, intercept_draws

Job = Callable[[], Any]
_STOP_TIMEOUT_S = 5.0
_pools: weakref.WeakSet[TowerPool] = weakref.WeakSet()
_accelerators: set[torch.device] = set()  # that towers have worked on


class TowerPool:
    """Runs one job for each tower, each in its tower's own thread, under the caller's thread-local state.

    Args:
        devices: one a tower, in tower order.
        max_concurrency: how many towers work at once; the others take their turns in tower order. None: as many as
            the machine has cores. It changes no bit of any result.
        lock: the wrapper's, held during every forward and every backward as a whole: none changes the replicas while
            another runs in them, and what towers leave behind is its caller's.
    """

    def __init__(self, devices: Sequence[torch.device], max_concurrency: int | None, lock: threading.RLock) -> None:
        take_turns_in_forward_mode()
        keep_freed_memory()
        intercept_draws(devices)  # now: what is made first is torn down last when the interpreter exits
        self.devices = tuple(devices)
        _accelerators.update(device for device in devices if device.type != "cpu")
        self.max_concurrency = min(len(self.devices), max_concurrency or available_cores())
        self._threads: list[_TowerThread] = []
        self._intra_op_threads = 0
        self._last_round_s = 0.0
        self.has_met = False  # whether the towers of the last round exchanged anything
        self._broken_into: set[int] = set()  # the towers that were, in the last round
        self._closed = False
        self.is_running = False
        self._guard = threading.RLock()  # of the threads, while nothing is waited for; the collector may close anywhere
        self.lock = lock
        _pools.add(self)

    def share_out_cores(self) -> None:
        """Give each tower its share of this thread's intra-op threads, whatever `max_concurrency` is.

        The share is fixed because the intra-op count changes the bits of some operators.
        """
        share = max(1, torch.get_num_threads() // len(self.devices))
        if share != self._intra_op_threads and not self.is_running:
            self._end_threads()
            self._intra_op_threads = share

    def run(
        self,
        jobs: Sequence[Job],
        streams: Streams,
        *,
        in_turn: bool,
        weights: Sequence[float] | None = None,
    ) -> list[Any]:
        """Do ``jobs[t]`` in tower ``t``'s thread, all at once as far as `max_concurrency` allows.

        The caller holds `lock`.

        Args:
            jobs: one a tower; a list that ends early leaves the last towers out.
            streams: that the work goes to.
            in_turn: one tower after the other.
            weights: of the towers, in a backward.

        Returns:
            Each job's result, in tower order.

        Raises:
            Exception: what the first tower to fail (in tower order) raised; its words name the tower and its device.
                Every tower has finished by then.
            BaseException: what a signal's handler raised while waiting, KeyboardInterrupt mostly. Every tower has
                finished by then; the second such exception ends those that work, see Note [Waiting for towers].
        """
        if sys.is_finalizing():  # threads do not run any more
            raise RuntimeError("TowerParallel: expected to be used before the interpreter shuts down")
        if has_levels():  # a backward within torch.vmap
            with torch.autograd.set_multithreading_enabled(False):  # as in a tower's thread
                return [job() for job in jobs]
        state = ThreadState(self.devices, streams)
        seeds = Seeds(self.devices[0])

        def do(tower: int) -> Any:
            work = functools.partial(state.run, self.devices[tower], jobs[tower])
            try:
                return draw_from(TowerGenerators(tower, seeds), work)
            except BaseException:
                empty_queue()
                raise
            finally:
                give_back_turn()

        try:
            with self._guard:
                self.is_running = True  # from here on `close` leaves the threads to this round, whoever calls it
            inboxes = list(map(attrgetter("inbox"), self._started()[: len(jobs)]))
            send_team_home(self._last_round_s)
            began_s = time.perf_counter()
            round_ = Round(inboxes, do, weights)
            self._broken_into = round_.broken_into
            run = functools.partial(round_.run, 1 if in_turn else self.max_concurrency)
            without_parametrization_cache(run)
        finally:
            self.is_running = False
        self.has_met = round_.has_met
        self._last_round_s = time.perf_counter() - began_s
        seeds.move_on()
        if self.was_broken_into:
            leave_levels()
        if self._closed or self.was_broken_into:  # closed: the backward of an output that has outlived the wrapper
            self._end_threads()
        torch.clear_autocast_cache()  # of what the towers left in it, see thread_state
        if (error := round_.take_error(self.devices)) is not None:
            try:
                raise error
            finally:  # its traceback holds this frame: a cycle would keep what the towers' frames hold
                del error
        return round_.results

    @property
    def was_broken_into(self) -> bool:
        """Whether the last round was, which may have left anything behind."""
        return bool(self._broken_into)

    def tower_here(self) -> int | None:
        """The index of the tower whose thread this is, if it is one of this pool's."""
        return next((tower for tower, thread in enumerate(self._threads) if thread.is_current()), None)

    def _started(self) -> list[_TowerThread]:
        if self.was_broken_into:  # where a signal came before they were ended
            self._end_threads()
        if not self._threads:
            settle_first_calls(self.devices)
            own = torch.get_num_threads()
            share = self._intra_op_threads or 1
            threads = [_TowerThread(index, device, share) for index, device in enumerate(self.devices)]
            try:
                for thread in threads:
                    thread.start()
                self._threads = threads
            except BaseException:  # a signal's, or a thread's
                for thread in threads:
                    thread.inbox.put(None)
                raise
            finally:
                torch.set_num_threads(own)  # a tower's setting also became the default of new threads
        return self._threads

    def close(self) -> None:
        """End the threads for good: a later `run` starts new ones, and ends them."""
        self._closed = True
        with self._guard:
            threads = [] if self.is_running else self._take_threads()  # else that round ends them
        _stop(threads)

    def _end_threads(self) -> None:
        _stop(self._take_threads())

    def _take_threads(self) -> list[_TowerThread]:
        threads, self._threads = self._threads, []
        return threads

    def forget(self) -> None:
        """Drop the threads without a word: in a forked child they do not exist."""
        self.lock, self._guard = threading.RLock(), threading.RLock()
        self._threads = []


class _TowerThread:
    """A tower's thread; a daemon, so that it never keeps an interpreter alive."""

    def __init__(self, tower_index: int, device: torch.device, intra_op_threads: int) -> None:
        self.inbox: SimpleQueue[Round | None] = SimpleQueue()
        # Unlike an Event whole again if a signal breaks off the waiting; holds what went wrong.
        self._ready: SimpleQueue[BaseException | None] = SimpleQueue()
        self._which = tower_index, device
        self._thread = threading.Thread(
            target=_work,
            args=(self.inbox, tower_index, device, intra_op_threads, self._ready),
            name=f"torchtower tower {tower_index}",
            daemon=True,
        )

    def start(self) -> None:
        """Start, and wait until the thread is ready for work."""
        self._thread.start()
        if (error := self._ready.get()) is not None:  # its device has no memory left, say
            name_tower(error, *self._which)
            try:
                raise error
            finally:  # its traceback holds this frame
                del error

    def is_current(self) -> bool:
        """Whether this very thread asks."""
        return self._thread is threading.current_thread()

    def join(self) -> None:
        """Wait until the thread, which has been told to, has ended."""
        if not self.is_current():  # the collector may run anywhere
            self._thread.join(timeout=_STOP_TIMEOUT_S)


def _stop(threads: Sequence[_TowerThread]) -> None:
    """End threads once their work is done: all are told first, as a signal may break off the waiting."""
    for thread in threads:
        for _ in range(2):  # an interrupt that is yet to strike may have it lose one
            thread.inbox.put(None)
    for thread in threads:
        thread.join()


def _work(
    inbox: SimpleQueue[Round | None],
    tower_index: int,
    device: torch.device,
    intra_op_threads: int,
    ready: SimpleQueue[BaseException | None],
) -> None:
    try:
        _prepare(tower_index, device, intra_op_threads)
    except BaseException as error:
        ready.put(error)
        return
    ready.put(None)
    round_: Round | None = None
    # What breaks into a round may come when the job is done, here: the round is finished then, and one goes on. Twice,
    # since it may come where the inner loop turns, too.
    while True:
        try:
            while True:
                try:
                    if round_ is None and (round_ := inbox.get()) is None:
                        empty_queue()
                        return
                    round_.work(tower_index)
                    round_ = None
                except BaseException:
                    continue
        except BaseException:
            continue


def _prepare(tower_index: int, device: torch.device, intra_op_threads: int) -> None:
    become_tower(tower_index)
    torch.get_num_threads()  # a thread's lazy initialisation would undo the next line later
    torch.set_num_threads(intra_op_threads)
    # A bridge's node runs in the engine's thread of the main device and waits there for the towers: what a tower sends
    # backward, in its own backward or within a forward, would wait for that very thread.
    torch.autograd.set_multithreading_enabled(False)
    make_last_node()
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
        # cuBLAS warns where it is the first in its thread to use a GPU that other threads have been using.
        torch.zeros(1, device=device)


def _let_engine_finish() -> None:
    # A round that never ends, in a daemon thread, may keep the engine's thread for good.
    if not any(pool.is_running for pool in _pools):
        for device in _accelerators:
            with suppress(Exception):  # of a device that is out of order
                wait_for_engine(device)


atexit.register(_let_engine_finish)


def _forget_all() -> None:
    _accelerators.clear()
    for pool in list(_pools):
        pool.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)

"""The towers' threads: long-lived, one a tower, each doing that tower's forward and its backward.

Note [Waiting for towers]
The caller waits until every tower has finished, whatever happened in one of them: an exception is raised only then, and
so is KeyboardInterrupt, which drops the towers whose turn has not come. A tower's thread holds nothing of a job once it
is done, so that the user's tensors die when the user lets go of them.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch

from torchtower.thread_state import ThreadState
from torchtower.tower_random import Seeds, TowerGenerators, drawing_from

Job = Callable[[], Any]
_local = threading.local()
_STOP_TIMEOUT_S = 5.0
_pools: weakref.WeakSet[TowerPool] = weakref.WeakSet()


def current_tower() -> int | None:
    """The index of the tower whose thread this is; None outside of the towers' threads."""
    return getattr(_local, "tower_index", None)


class TowerPool:
    """Runs one job for each tower, each in its tower's own thread, under the caller's thread-local state.

    Args:
        devices: one a tower, in tower order.
        max_concurrency: how many towers work at once; the others take their turns in tower order. None: as many as
            the machine has cores. It changes no bit of any result.
    """

    def __init__(self, devices: Sequence[torch.device], max_concurrency: int | None = None) -> None:
        if max_concurrency is not None and max_concurrency < 1:
            raise ValueError(f"TowerParallel: expected max_concurrency of at least 1, but got {max_concurrency}")
        self.devices = tuple(devices)
        self.max_concurrency = min(len(self.devices), max_concurrency or _available_cores())
        self._threads: list[_TowerThread] = []
        self._intra_op_threads = 0
        self._lock = threading.Lock()
        _pools.add(self)

    def share_out_cores(self) -> None:
        """Give each tower its share of this thread's intra-op threads, whatever `max_concurrency` is.

        The share is fixed because the intra-op count changes the bits of some operators.
        """
        share = max(1, torch.get_num_threads() // len(self.devices))
        if share != self._intra_op_threads:
            self.close()
            self._intra_op_threads = share

    def run(self, jobs: Sequence[Job | None], *, in_turn: bool = False) -> list[Any]:
        """Do ``jobs[t]`` in tower ``t``'s thread, all at once as far as `max_concurrency` allows.

        Args:
            jobs: one a tower; None, or a list that ends early, leaves towers out.
            in_turn: one tower after the other.

        Returns:
            Each job's result in tower order, None for towers left out.

        Raises:
            Exception: what the first tower to fail (in tower order) raised; its words name the tower and its device.
                Every tower has finished by then.
            KeyboardInterrupt: Ctrl-C while waiting. Every tower has finished by then.
        """
        state = ThreadState({device.type for device in self.devices}, self.devices[0])
        with self._lock:
            threads = self._started()
            waiting = [(threads[t], job) for t, job in enumerate(jobs) if job is not None]
            round_ = _Round(state, waiting)
            interrupt = round_.run(1 if in_turn else self.max_concurrency)
        if state.autocast:
            torch.clear_autocast_cache()  # what the towers left in it, see thread_state
        if interrupt is not None:
            raise interrupt
        for tower in sorted(round_.errors):
            raise round_.errors.pop(tower)
        return [round_.results.get(tower) for tower in range(len(jobs))]

    def _started(self) -> list[_TowerThread]:
        if not self._threads:
            own = torch.get_num_threads()
            self._threads = [
                _TowerThread(index, device, self._intra_op_threads or 1) for index, device in enumerate(self.devices)
            ]
            torch.set_num_threads(own)  # a tower's setting also became the default of new threads
        return self._threads

    def close(self) -> None:
        """End the threads; the next `run` starts new ones. Harmless when they have ended already."""
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.stop()

    def forget(self) -> None:
        """Drop the threads without a word: in a forked child they do not exist."""
        self._lock = threading.Lock()
        self._threads = []


class _Round:
    """One `TowerPool.run`: who waits for a turn, what came out."""

    def __init__(self, state: ThreadState, waiting: list[tuple[_TowerThread, Job]]) -> None:
        self.results: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self._state = state
        self._seeds = Seeds()
        self._waiting = waiting
        self._finished: SimpleQueue[None] = SimpleQueue()

    def run(self, max_concurrency: int) -> KeyboardInterrupt | None:
        """Start towers as others finish, until all have; see Note [Waiting for towers]."""
        interrupt = None
        working = 0
        while working or self._waiting:
            while self._waiting and working < max_concurrency:
                thread, job = self._waiting.pop(0)
                thread.inbox.put((self, job))
                working += 1
            try:
                self._finished.get()
            except KeyboardInterrupt as error:
                interrupt = error
                self._waiting.clear()
            else:
                working -= 1
        return interrupt

    def do(self, tower_index: int, device: torch.device, job: Job) -> None:
        """In the tower's thread."""
        try:
            with drawing_from(TowerGenerators(tower_index, self._seeds)):
                self.results[tower_index] = self._state.run(device, job)
        except BaseException as error:
            _name_tower(error, f"in tower {tower_index} on device {device}")
            self.errors[tower_index] = error
        finally:
            self._finished.put(None)


class _TowerThread:
    """A tower's thread; a daemon, so that it never keeps an interpreter alive."""

    def __init__(self, tower_index: int, device: torch.device, intra_op_threads: int) -> None:
        self.inbox: SimpleQueue[tuple[_Round, Job] | None] = SimpleQueue()
        ready = threading.Event()
        self._thread = threading.Thread(
            target=_work,
            args=(self.inbox, tower_index, device, intra_op_threads, ready),
            name=f"torchtower tower {tower_index}",
            daemon=True,
        )
        self._thread.start()
        ready.wait()

    def stop(self) -> None:
        self.inbox.put(None)
        if self._thread is not threading.current_thread():  # the collector may run anywhere
            self._thread.join(timeout=_STOP_TIMEOUT_S)


def _work(
    inbox: SimpleQueue[tuple[_Round, Job] | None],
    tower_index: int,
    device: torch.device,
    intra_op_threads: int,
    ready: threading.Event,
) -> None:
    _local.tower_index = tower_index
    torch.get_num_threads()  # a thread's lazy initialisation would undo the next line later
    torch.set_num_threads(intra_op_threads)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    ready.set()
    while (item := inbox.get()) is not None:
        round_, job = item
        round_.do(tower_index, device, job)
        del item, round_, job


def _name_tower(error: BaseException, words: str) -> None:
    if len(error.args) == 1 and isinstance(error.args[0], str) and str(error) == error.args[0]:
        if words not in error.args[0]:
            error.args = (f"{error.args[0]} ({words})",)
    elif hasattr(error, "add_note"):  # Python 3.11
        error.add_note(words)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _forget_all() -> None:
    for pool in list(_pools):
        pool.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)

"""One round of work over the towers: whose turn it is, what came out, and how towers exchange values midway."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any


class _Here(threading.local):
    """What this thread is doing; for one that is no tower's, these are not set."""

    tower_index: int | None = None
    round: Round | None = None


_local = _Here()
_IN_BACKWARD = "; what a forward leaves in an attribute goes backward in the main tower alone: return it as an output"


def current_tower() -> int | None:
    """Tell which tower's forward, loss or backward this is, for code that does something in one tower alone.

    Returns:
        The index of the tower whose thread this is; None outside of the towers' threads, and where there is one tower.

    Example:
        >>> current_tower() is None
        True
    """
    return _local.tower_index


def become_tower(tower_index: int) -> None:
    """Make this thread a tower's for good."""
    _local.tower_index = tower_index


def exchange(value: Any) -> list[Any]:
    """Meet all other towers of this round: hand over ``value``, get every tower's in tower order.

    Blocks until every tower has come; one that waits here leaves its turn to others.

    Raises:
        RuntimeError: this is no tower's thread, or some tower finished without coming.
    """
    round_, tower_index = _local.round, _local.tower_index
    if round_ is None or tower_index is None:
        raise RuntimeError("tower_sum: expected to be called in a tower, but this is no tower's thread")
    return round_.exchange(tower_index, value)


def weight_of_tower() -> float | None:
    """This tower's weight in the current backward, relative to the largest; None outside of a backward."""
    round_, tower_index = _local.round, _local.tower_index
    if round_ is None or tower_index is None or round_.weights is None:
        return None
    return round_.weights[tower_index] / max(round_.weights)


class DesertedError(RuntimeError):
    """A tower waited for one that never came; whatever made the other stop is the news, not this."""


class _Arrival:
    """One tower at an exchange, waiting at its gate."""

    def __init__(self, tower_index: int, value: Any) -> None:
        self.tower_index = tower_index
        self.value = value
        self.gate: SimpleQueue[Any] = SimpleQueue()
        self.answer: Any = None
        self.went_on = False


class Round:
    """Starts towers as far as ``max_concurrency`` allows, and waits until all have finished.

    Note [Waiting for towers]
    The caller waits until every tower has finished, whatever happened in one of them: an exception is raised only
    then. So is what a signal's handler raises in the caller meanwhile (KeyboardInterrupt, mostly), after which towers
    whose turn has not come do nothing, and those that wait for others at an exchange are turned away (for ever, where a
    user's lock keeps those). At the second such exception the towers that still work are broken into: KeyboardInterrupt
    is raised in them where they are, as it would be in a plain module. All other decisions are taken in the caller's
    thread; towers only report. Those that have come to an exchange wait at their gate, and need a turn again to go on.

    A signal may strike between any two steps of the caller, and what breaks into a tower between any two of its own. So
    nothing is counted twice or lost if a step is repeated: towers report by adding to what only grows, and each look at
    it decides anew what is left to do.

    Args:
        inboxes: of the towers that take part, in tower order; a tower's thread calls `work` of what it finds there.
        job: done in each tower's thread, with that tower's index.
        weights: of a backward's towers; None in a forward.
    """

    def __init__(
        self, inboxes: Sequence[SimpleQueue[Any]], job: Callable[[int], Any], weights: Sequence[float] | None
    ) -> None:
        self.weights = weights
        self.results: list[Any] = [None] * len(inboxes)
        self.errors: dict[int, BaseException] = {}
        self.has_met = False  # whether the towers have exchanged anything
        self._inboxes = inboxes
        self._job = job
        self._num_started = 0
        self._begun: dict[int, int] = {}  # of each tower that has, its thread
        self._finished: set[int] = set()
        self._arrivals: deque[_Arrival] = deque()
        self._reports: SimpleQueue[None] = SimpleQueue()  # wakes the caller; the news is in the above
        self._interrupt: BaseException | None = None
        self._num_interrupts = 0
        self._num_answered = 0
        self.broken_into: set[int] = set()  # the towers that had begun when a second interrupt came

    def run(self, max_concurrency: int) -> None:
        """Do it all; see Note [Waiting for towers]."""
        # Twice the same: a signal may strike where the inner loop turns, too. Nothing is called where one is caught: it
        # might strike there.
        while True:
            try:
                while True:
                    try:
                        return self._run(max_concurrency)
                    except BaseException as error:
                        self._num_interrupts += 1
                        self._interrupt = self._interrupt or error
            except BaseException as error:
                self._num_interrupts += 1
                self._interrupt = self._interrupt or error

    def _run(self, max_concurrency: int) -> None:
        while len(self._finished) < len(self._inboxes):
            if self._arrivals or self._num_started < len(self._inboxes):
                self._advance(max_concurrency)  # turns away who waits at a gate, before all others are broken into
            if self._num_answered < self._num_interrupts:
                self._answer_interrupts()
            self._reports.get()

    def _answer_interrupts(self) -> None:
        """From the second one on, break into the towers that work, each time anew: they may have held out."""
        num_interrupts = self._num_interrupts
        if num_interrupts > 1:
            raise_in, error = ctypes.pythonapi.PyThreadState_SetAsyncExc, ctypes.py_object(KeyboardInterrupt)
            threads = [(tower, ctypes.c_ulong(thread)) for tower, thread in list(self._begun.items())]
            # Nothing may be called between the look and the blow: a tower that has finished meanwhile would wait for
            # work with the blow before it. Python 3.11 then looks for it at every step of every thread, whether it is
            # called off or not, and never leaves off where a profiler or a tracer runs.
            for tower, thread in threads:
                self.broken_into.add(tower)
                if tower not in self._finished:
                    raise_in(thread, error)
        self._num_answered = num_interrupts

    def _advance(self, max_concurrency: int) -> None:
        """Let towers start and go on, as many as may."""
        waiting = self._waiting() if self._arrivals else []
        working = self._num_started - len(self._finished) - len(waiting)
        for arrival in waiting:
            if arrival.answer is None:
                continue
            # Who is turned away needs no turn: those that have one may be waiting for what it holds.
            if working < max_concurrency or isinstance(arrival.answer, DesertedError):
                arrival.gate.put(arrival.answer)
                arrival.went_on = True
                working += 1
        begin = self._num_started
        for inbox in self._inboxes[begin : begin + max(0, max_concurrency - working)]:
            inbox.put(self)
            self._num_started += 1

    def _waiting(self) -> list[_Arrival]:
        """Those at their gates in tower order, with an answer where there is one by now."""
        num_finished = len(self._finished)  # before the look at who waits: a tower may be finishing
        while self._arrivals and self._arrivals[0].went_on:
            self._arrivals.popleft()
        waiting = [arrival for arrival in list(self._arrivals) if not arrival.went_on]
        waiting.sort(key=lambda arrival: arrival.tower_index)
        unanswered = [arrival for arrival in waiting if arrival.answer is None]
        answer: Any = None
        if self._interrupt is not None:
            answer = DesertedError("tower_sum: interrupted")
        elif len(unanswered) == len(self._inboxes) - num_finished:
            answer = [arrival.value for arrival in unanswered]
            if num_finished:
                missing = sorted(self._begun.keys() - {arrival.tower_index for arrival in waiting})
                hint = "" if self.weights is None else _IN_BACKWARD
                answer = DesertedError(
                    f"tower_sum: expected every tower to come, as in a synchronised BatchNorm, but towers {missing} "
                    f"finished without{hint}"
                )
            self.has_met = True
        if answer is not None:
            for arrival in unanswered:
                arrival.answer = answer
        return waiting

    def exchange(self, tower_index: int, value: Any) -> list[Any]:
        """In a tower's thread: see `exchange`."""
        arrival = _Arrival(tower_index, value)
        self._arrivals.append(arrival)
        self._reports.put(None)
        answer = arrival.gate.get()
        if isinstance(answer, DesertedError):
            raise DesertedError(*answer.args)
        return list(answer)

    def work(self, tower_index: int) -> None:
        """In a tower's thread: do its job, if that has not been begun, and report."""
        try:
            if tower_index not in self._begun:
                self._begun[tower_index] = threading.get_ident()
                _local.round = self
                if self._interrupt is None:
                    self.results[tower_index] = self._job(tower_index)
        except BaseException as error:
            self.errors[tower_index] = error
        finally:
            _local.round = None
            self._finished.add(tower_index)
            # Waking the caller for nothing would take the interpreter from the towers that still work.
            if len(self._finished) == len(self._inboxes) or self._num_started < len(self._inboxes) or self._arrivals:
                self._reports.put(None)

    def take_error(self, devices: Sequence[object]) -> BaseException | None:
        """What a signal's handler raised, else the first tower to fail, in tower order; the round keeps none.

        A tower's gets added to its words which tower that was, on which of ``devices``.
        """
        interrupt, self._interrupt = self._interrupt, None
        errors, self.errors = self.errors, {}
        if interrupt is not None or not errors:
            return interrupt
        tower = min(errors, key=lambda t: (isinstance(errors[t], DesertedError), t))
        error = errors[tower]
        name_tower(error, tower, devices[tower])
        return error


def name_tower(error: BaseException, tower: int, device: object) -> None:
    """Add to an error's words which tower it comes from, once."""
    which = f"{tower} on device {device}"
    words = f"in tower {which}"
    with suppress(Exception):  # of one that cannot be added to, or has no words (a __str__ that fails): raised as it is
        text = str(error)
        if words in text:
            return
        if len(error.args) == 1 and error.args[0] == text:
            before, _, rest = text.rpartition(" (in tower ")  # an object that is raised again may have another's
            error.args = (f"{before if before and rest.endswith(')') else text} ({words})",)
            if isinstance(error, ImportError):
                error.msg = error.args[0]
        else:
            add_note(error, "in tower ", which)


def add_note(error: BaseException, begin: str, rest: str) -> None:
    """Have a line printed below an error's own words, where the error allows it.

    It takes the place of one that begins alike, as an object that is raised again may have.
    """
    with suppress(Exception):
        error.add_note(begin + rest)
        notes = error.__notes__
        notes[:-1] = [note for note in notes[:-1] if not note.startswith(begin)]

"""One round of work over the towers: whose turn it is, what came out, and how towers exchange values midway."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

_local = threading.local()


def current_tower() -> int | None:
    """Tell which tower's forward, loss or backward this is, for code that does something in one tower alone.

    Returns:
        The index of the tower whose thread this is; None outside of the towers' threads, and where there is one tower.

    Example:
        >>> current_tower() is None
        True
    """
    return getattr(_local, "tower_index", None)


def become_tower(tower_index: int) -> None:
    """Make this thread a tower's for good."""
    _local.tower_index = tower_index


def exchange(value: Any) -> list[Any]:
    """Meet all other towers of this round: hand over ``value``, get every tower's in tower order.

    Blocks until every tower has come; one that waits here leaves its turn to others.

    Raises:
        RuntimeError: this is no tower's thread, or some tower finished without coming.
    """
    round_: Round | None = getattr(_local, "round", None)
    if round_ is None:
        raise RuntimeError("exchange: expected to be called in a tower, but this is no tower's thread")
    return round_.exchange(value)


def weight_of_tower() -> float | None:
    """This tower's weight in the current backward, relative to the largest; None outside of a backward."""
    round_: Round | None = getattr(_local, "round", None)
    if round_ is None or round_.weights is None:
        return None
    weight: float = round_.weights[_local.tower_index]
    return weight / max(round_.weights)


class DesertedError(RuntimeError):
    """A tower waited for one that never came; whatever made the other stop is the news, not this."""


class _Arrival(NamedTuple):
    tower_index: int
    value: Any
    gate: SimpleQueue[Any]


class Round:
    """Starts towers as far as ``max_concurrency`` allows, and waits until all have finished.

    Note [Waiting for towers]
    The caller waits until every tower has finished, whatever happened in one of them: an exception is raised only
    then, and so is KeyboardInterrupt, which drops the towers whose turn has not come. All decisions are taken in the
    caller's thread; towers only report. Those that have come to an exchange wait at their gate, and need a turn again
    to go on.

    Args:
        starts: for each tower that takes part, its index and what makes its thread call `work`.
        weights: of a backward's towers.
    """

    def __init__(
        self, starts: Sequence[tuple[int, Callable[[Round], None]]], weights: Sequence[float] | None = None
    ) -> None:
        self.weights = weights
        self.results: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self.has_met = False  # whether the towers have exchanged anything
        self._unfinished = {tower for tower, _ in starts}
        self._starts = deque(starts)
        self._resumes: deque[Callable[[], None]] = deque()
        self._arrived: dict[int, _Arrival] = {}
        self._reports: SimpleQueue[int | _Arrival] = SimpleQueue()

    def run(self, max_concurrency: int) -> KeyboardInterrupt | None:
        """Do it all; see Note [Waiting for towers]."""
        interrupt = None
        working = 0
        while working or self._resumes or self._starts:
            while working < max_concurrency and self._take_turn():
                working += 1
            try:
                report = self._reports.get()
            except KeyboardInterrupt as error:
                interrupt = error
                self._unfinished -= {tower for tower, _ in self._starts}
                self._starts.clear()
                continue
            working -= 1
            self._note(report, interrupt is not None)
        return interrupt

    def _take_turn(self) -> bool:
        if self._resumes:
            self._resumes.popleft()()
        elif self._starts:
            _, start = self._starts.popleft()
            start(self)
        else:
            return False
        return True

    def _note(self, report: int | _Arrival, interrupted: bool) -> None:
        if isinstance(report, _Arrival):
            self._arrived[report.tower_index] = report
        else:
            self._unfinished.discard(report)
        if self._arrived and len(self._arrived) == len(self._unfinished):
            arrived = [self._arrived[tower] for tower in sorted(self._arrived)]
            self._arrived = {}
            answer: Any = [arrival.value for arrival in arrived]
            if interrupted or self.results or self.errors:
                answer = DesertedError("exchange: expected every tower to come, but some had finished without")
            self.has_met = True
            self._resumes.extend(_opening(arrival.gate, answer) for arrival in arrived)

    def exchange(self, value: Any) -> list[Any]:
        """In a tower's thread: see `exchange`."""
        gate: SimpleQueue[Any] = SimpleQueue()
        self._reports.put(_Arrival(_local.tower_index, value, gate))
        answer = gate.get()
        if isinstance(answer, DesertedError):
            raise DesertedError(*answer.args)
        return list(answer)

    def work(self, job: Callable[[], Any], words: str) -> None:
        """In a tower's thread: do its job and report. An exception's words get ``words`` added."""
        tower_index = _local.tower_index
        _local.round = self
        try:
            self.results[tower_index] = job()
        except BaseException as error:
            _add_words(error, words)
            self.errors[tower_index] = error
        finally:
            _local.round = None
            self._reports.put(tower_index)

    def first_error(self) -> BaseException | None:
        """What the first tower to fail raised, in tower order; taken out, so that the round does not keep it."""
        errors = [self.errors[tower] for tower in sorted(self.errors)]
        self.errors.clear()
        return next((e for e in errors if not isinstance(e, DesertedError)), next(iter(errors), None))


def _opening(gate: SimpleQueue[Any], answer: Any) -> Callable[[], None]:
    return lambda: gate.put(answer)


def _add_words(error: BaseException, words: str) -> None:
    if len(error.args) == 1 and isinstance(error.args[0], str) and str(error) == error.args[0]:
        if words not in error.args[0]:
            error.args = (f"{error.args[0]} ({words})",)
    elif hasattr(error, "add_note"):  # Python 3.11
        error.add_note(words)

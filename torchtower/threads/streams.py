"""Which stream of each device work goes to: the caller's, in every thread that works for it.

Note [Order]
Towers enqueue to the very streams that were current in the caller's thread at the forward, forward and backward, and
whoever joins their results or fetches their gradients does so too: on their devices, and on those that the batch comes
from. So what one thread has enqueued comes before what another enqueues later, memory that one frees is used anew only
after all reads of it, and no events are needed; copies between devices order both devices' current streams themselves.
Where a backward ends, the streams of the thread that it was called in, or that the engine has it run in, must wait for
them: the engine takes all that a node returns for the work of one stream, on the device of its first output. Where all
are default streams, whoever reads a gradient does so on the stream that it came from.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch


class Streams:
    """The streams that are current in the thread that makes this, one for each device.

    Args:
        devices: which work goes to or comes from, in any order; a CPU has no streams.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = frozenset(devices)
        self._streams = list(map(torch.accelerator.current_stream, _indices(self._devices)))

    def including(self, devices: Iterable[torch.device]) -> Streams:
        """These and, in the thread that made these, the ones of more devices."""
        return self if self._devices.issuperset(devices) else Streams(self._devices.union(devices))

    def __len__(self) -> int:
        return len(self._streams)

    def current(self) -> AbstractContextManager[None]:
        """Make them current in this thread; its current device stays."""
        return _Current(self._streams) if self._streams else _as_it_is

    def current_for_backward(self, devices: Container[torch.device]) -> AbstractContextManager[None]:
        """Make them current in this thread, after what its own streams hold, which in the end wait for them.

        Args:
            devices: whose streams wait for those of all devices.
        """
        return _InOrder(self._streams, devices) if self._streams else _as_it_is

    def synchronize(self) -> None:
        """Wait for all that was enqueued: no stream orders those who read what lies on the CPU."""
        for stream in self._streams:
            # A backend that leaves both to PyTorch's interface does its work at once: nobody could wait for it.
            for wait in (stream.synchronize, functools.partial(torch.accelerator.synchronize, stream.device)):
                try:
                    wait()
                    break
                except RuntimeError as error:
                    if "doesn't support" not in str(error):
                        raise


class _Current(AbstractContextManager[None]):
    """Some streams, current within."""

    # No generator of `contextmanager`'s, which writes to an error's traceback on its way out: a frozen one refuses.

    def __init__(self, streams: list[torch.Stream]) -> None:
        self._streams = streams

    def __enter__(self) -> None:
        self._index = torch.accelerator.current_device_index()
        self._before = _current_instead_of(self._streams)
        _make_current(self._streams, self._index)

    def __exit__(self, *error: object) -> None:
        _make_current(self._before, self._index)


class _InOrder(_Current):
    """Some streams, current within, between what this thread's own hold before and what comes to these afterwards."""

    def __init__(self, streams: list[torch.Stream], devices: Container[torch.device]) -> None:
        super().__init__(streams)
        self._devices = devices

    def __enter__(self) -> None:
        for stream, before in zip(self._streams, _current_instead_of(self._streams), strict=True):
            _wait(stream, before)
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if any([stream.stream_id for stream in (*self._before, *self._streams)]):  # not all are default streams
            for before in self._before:
                for stream in self._streams:
                    if before.device == stream.device or before.device in self._devices:
                        _wait(before, stream)


def _wait(stream: torch.Stream, other: torch.Stream) -> None:
    if stream != other:
        stream.wait_stream(other)


_as_it_is = nullcontext()


@functools.cache
def _indices(devices: frozenset[torch.device]) -> list[int]:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return []
    there = range(torch.accelerator.device_count())  # a tensor may name any device, and lie on none
    return sorted({device.index for device in devices if device.type == accelerator.type and device.index in there})


def _current_instead_of(streams: list[torch.Stream]) -> list[torch.Stream]:
    return [torch.accelerator.current_stream(stream.device_index) for stream in streams]


def _make_current(streams: list[torch.Stream], device_index: int) -> None:
    for stream in streams:
        torch.accelerator.set_stream(stream)  # which changes the current device
    torch.accelerator.set_device_index(device_index)

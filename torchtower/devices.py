"""Which devices the towers run on: read what users write, refuse what does not exist."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, SupportsIndex

import torch
from torch import Tensor

DeviceId = int | str | torch.device


def parse_device_ids(
    device_ids: Sequence[DeviceId] | None, function: str = "TowerParallel", argument: str = "device_ids"
) -> tuple[torch.device, ...]:
    """Turn ``device_ids`` into one device a tower.

    Args:
        device_ids: what ``nn.DataParallel`` takes (indices of the accelerator's devices, ``torch.device``, names),
            and ``"cpu"``, repeatedly: each entry is one tower. None: every device of the accelerator, or one CPU
            tower where there is none.
        function: the name that errors begin with.
        argument: what they call ``device_ids``.

    Returns:
        The towers' devices in tower order; the first is the main tower's. An accelerator's device always carries
        its index.

    Raises:
        ValueError: no entry, a device that does not exist, or devices of more than one type.
        TypeError: an int in place of a list; an entry is neither int, str nor ``torch.device``.

    Example:
        >>> parse_device_ids(["cpu", "cpu"])
        (device(type='cpu'), device(type='cpu'))
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device_ids is None:
        if accelerator is None:
            return (torch.device("cpu"),)
        count = torch.accelerator.device_count()
        return tuple(torch.device(accelerator.type, index) for index in range(count))
    if isinstance(device_ids, SupportsIndex) and not getattr(device_ids, "ndim", 0):
        raise TypeError(
            f"{function}: expected {argument} to list a device for each tower, but got {device_ids!r}, which may be a "
            f"number of towers or one device: [{device_ids!r}] is one tower there, ['cpu'] * {device_ids!r} are as "
            "many on the CPU"
        )
    if isinstance(device_ids, (str, torch.device)):
        device_ids = [device_ids]
    devices = tuple(_parse(entry, accelerator, function, argument) for entry in device_ids)
    if not devices:
        raise ValueError(f"{function}: expected {argument} to name at least one device, but got []")
    if len({device.type for device in devices}) > 1:
        raise ValueError(
            f"{function}: expected all towers on devices of one type, but got {argument} "
            f"{[str(device) for device in devices]}"
        )
    return devices


def parse_output_device(output_device: DeviceId) -> torch.device:
    """The one device that ``output_device`` names; -1 is nn.DataParallel's word for the CPU."""
    (device,) = parse_device_ids(["cpu" if output_device == -1 else output_device], argument="output_device")
    return device


def _parse(entry: DeviceId, accelerator: torch.device | None, function: str, argument: str) -> torch.device:
    if not isinstance(entry, (str, torch.device)):
        entry = _index(entry, function, argument)
        if accelerator is None:
            cpu = "name CPU towers as device_ids=['cpu', 'cpu']" if argument == "device_ids" else "the CPU is 'cpu'"
            raise ValueError(
                f"{function}: expected {argument} among the devices of this machine, but got {entry}, an "
                f"accelerator's, and there is no accelerator; {cpu}"
            )
        device = torch.device(accelerator.type, entry) if entry >= 0 else None
    else:
        try:
            device = torch.device(entry)
        except RuntimeError:
            raise ValueError(
                f"{function}: expected {argument} to name devices, such as 'cpu' or 'cuda:0', but got {entry!r}"
            ) from None
    return _existing(device, entry, accelerator, function, argument)


def _index(entry: Any, function: str, argument: str) -> int:
    with suppress(TypeError):
        if not isinstance(entry, bool):
            return operator.index(entry)  # numpy's integers, too
    raise TypeError(
        f"{function}: expected {argument} of int, str or torch.device, but got {entry!r} of type {type(entry).__name__}"
    )


def _existing(
    device: torch.device | None,
    entry: DeviceId,
    accelerator: torch.device | None,
    function: str,
    argument: str,
) -> torch.device:
    if device is not None and device.type == "cpu":
        return torch.device("cpu")
    count = 0 if accelerator is None else torch.accelerator.device_count()
    if device is not None and accelerator is not None and device.type == accelerator.type:
        index = torch.accelerator.current_device_index() if device.index is None else device.index
        if index < count:
            return torch.device(device.type, index)
    known = ["cpu"] + [f"{accelerator}:{index}" for index in range(count)]
    here = "" if accelerator is not None else "; torch finds no accelerator on this machine"
    raise ValueError(
        f"{function}: expected {argument} among {known}, but got {entry!r}, which does not exist here{here}"
    )


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor to a device, without waiting where its own stream orders whoever reads it there.

    Towards the CPU nothing would: the copy is waited for.
    """
    return tensor if tensor.device == device else tensor.to(device, non_blocking=device.type != "cpu")

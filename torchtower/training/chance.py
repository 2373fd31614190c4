"""All chance of a run: what follows from its seed, and what torch's generators hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def generator_for(purpose: str, seed: int, index: int) -> torch.Generator:
    """Make a generator that depends on nothing but its arguments.

    An epoch's order and a step's distortions come from such generators, so that a run goes on at
    any step without knowing how it came there.

    Args:
        purpose: What it draws, such as `"order"`; different purposes draw independently.
        seed: The run's.
        index: The epoch or the step.

    Returns:
        A generator on the CPU.

    Example:
        >>> first, second = (generator_for("order", 0, 3) for _ in range(2))
        >>> torch.equal(torch.randperm(9, generator=first), torch.randperm(9, generator=second))
        True
    """
    digest = hashlib.blake2b(f"{purpose}/{seed}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def capture_chance(devices: Iterable[torch.device]) -> dict[str, Tensor]:
    """Copy the state of torch's own generators, which dropout and its like draw from.

    Args:
        devices: Those whose generators the run uses; the CPU's is always among them.
    """
    states = {"cpu": torch.get_rng_state()}
    for device in devices:
        if device.type != "cpu":
            states[str(device)] = torch.get_device_module(device).get_rng_state(device)
    return states


def restore_chance(states: Mapping[str, Any]) -> None:
    """Put torch's generators back into a captured state, as far as this machine has them."""
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        device = torch.device(name)
        if device.type != "cpu" and device.index < torch.accelerator.device_count():
            torch.get_device_module(device).set_rng_state(state, device)

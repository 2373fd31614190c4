"""What a user may say about a run, checked, and completed by what the user left out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtower.checkpoint import CheckpointError
from torchtower.devices import parse_device_ids
from torchtower.training.data import RECIPES
from torchtower.training.errors import BadInput
from torchtower.training.models import MODELS


@dataclass(frozen=True)
class Options:
    """All that determines a run.

    Attributes:
        dataset: One of `RECIPES`.
        data: Folder of the data set's files; None is its usual place.
        model: One of `MODELS`.
        devices: The device of each tower.
        batch_size: Rows of one step, over all towers.
        epochs: Length of the run in epochs, if `steps` is None.
        steps: Length of the run in steps.
        lr: Learning rate of the first step.
        seed: What all chance of the run comes from.
        dropout: Probability of the network's dropout layers.
        augment: Whether training images are distorted.
        run_dir: Folder of everything that the run writes.
    """

    dataset: str
    data: Path | None
    model: str
    devices: tuple[str, ...]
    batch_size: int
    epochs: int | None
    steps: int | None
    lr: float
    seed: int
    dropout: float
    augment: bool
    run_dir: Path

    def to_plain(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: all but the folder that the checkpoint is in."""
        plain = dataclasses.asdict(self)
        del plain["run_dir"]
        data = None if self.data is None else str(self.data.absolute())
        return {**plain, "data": data, "devices": list(self.devices)}


def new_options(said: Mapping[str, Any]) -> Options:
    """Complete what the user said from the data set's recipe and this machine.

    Args:
        said: Names and values of `Options`, and `towers`, their number; any may be left out.

    Raises:
        BadInput: A value that no run could have, or values that do not go together.

    Example:
        >>> new_options({"dataset": "digits", "towers": 2, "devices": ("cpu",)}).devices
        ('cpu', 'cpu')
    """
    _check(said)
    dataset = said.get("dataset", "digits")
    recipe = RECIPES[dataset]
    values: dict[str, Any] = {
        "dataset": dataset,
        "data": None,
        "model": recipe.model,
        "batch_size": recipe.batch_size,
        "epochs": None if "steps" in said else recipe.epochs,
        "steps": None,
        "lr": recipe.lr,
        "seed": 0,
        "dropout": 0.0,
        "augment": True,
        "run_dir": Path("runs") / f"{dataset}-{time.strftime('%Y%m%d-%H%M%S')}",
        **said,
        "devices": _choose_devices(said.get("towers"), said.get("devices")),
    }
    values.pop("towers", None)
    if len(values["devices"]) > values["batch_size"]:
        raise BadInput(
            f"--batch-size: expected at least one row for each of {len(values['devices'])} towers, "
            f"but got {values['batch_size']}"
        )
    return Options(**values)


def continued_options(said: Mapping[str, Any], saved: object, path: Path) -> Options:
    """Complete what the user said from the run that is to go on.

    Args:
        said: As for `new_options`. The data may have moved, and the towers lie on other devices;
            all else that is said must be as it was.
        saved: `to_plain()` of that run.
        path: Its checkpoint, for messages.

    Raises:
        BadInput: A value that no run could have, or values that do not go together.
        CheckpointError: The user asks for another run than the saved one.
    """
    names = {field.name for field in dataclasses.fields(Options)} - {"run_dir"}
    if not (isinstance(saved, dict) and set(saved) == names and isinstance(saved["devices"], list)):
        raise CheckpointError(f"checkpoint: expected a training run in {path}, but got none")
    _check(said)
    for name, value in {**saved, "towers": len(saved["devices"])}.items():
        if name not in ("data", "devices") and said.get(name, value) != value:
            expected = "nothing" if value is None else value
            raise CheckpointError(
                f"{_option(name)}: expected {expected}, as the run of {path} began, but got {said[name]}"
            )
    data = None if saved["data"] is None else Path(saved["data"])
    towers = len(saved["devices"])
    devices = tuple(said.get("devices", saved["devices"]))
    given = {name: value for name, value in saved.items() if value is not None}
    return new_options({**given, "data": data, **said, "towers": towers, "devices": devices})


def _choose_devices(towers: int | None, devices: tuple[str, ...] | None) -> tuple[str, ...]:
    """Name each tower's device; by default all accelerators take turns, or the CPU has all."""
    try:
        found = tuple(str(device) for device in parse_device_ids(devices, "--devices", "devices"))
    except ValueError as error:
        raise BadInput(str(error)) from error
    if devices is None or len(devices) == 1:
        return tuple(found[tower % len(found)] for tower in range(towers or len(found)))
    if towers is not None and len(devices) != towers:
        raise BadInput(
            f"--devices: expected one device, or one for each of {towers} towers, "
            f"but got {len(devices)}: {','.join(devices)}"
        )
    return found


_AT_LEAST_1 = (lambda value: value >= 1, "a whole number of at least 1")

_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dataset": (lambda name: name in RECIPES, f"one of {', '.join(RECIPES)}"),
    "model": (lambda name: name in MODELS, f"one of {', '.join(MODELS)}"),
    "towers": _AT_LEAST_1,
    "batch_size": _AT_LEAST_1,
    "epochs": _AT_LEAST_1,
    "steps": _AT_LEAST_1,
    "lr": (lambda lr: 0 < lr < math.inf, "a finite number above 0"),
    "seed": (lambda seed: 0 <= seed < 2**63, "a whole number from 0 to 2^63 - 1"),
    "dropout": (lambda p: 0 <= p < 1, "a probability below 1"),
}


def _check(said: Mapping[str, Any]) -> None:
    for name, (fine, expected) in _EXPECTED.items():
        if name in said and not _fits(fine, said[name]):
            raise BadInput(f"{_option(name)}: expected {expected}, but got {said[name]}")
    if "epochs" in said and "steps" in said:
        raise BadInput("expected --epochs or --steps, but got both")


def _fits(fine: Callable[[Any], bool], value: object) -> bool:
    try:
        return fine(value)
    except TypeError:
        return False


def _option(name: str) -> str:
    return "--no-augment" if name == "augment" else f"--{name.replace('_', '-')}"

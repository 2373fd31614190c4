"""The machine-readable log of a run, and the curves drawn from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torchtower.checkpoint import replace_atomically
from torchtower.training.errors import import_extra


class MetricsLog:
    """A file of JSON lines, one for each step and one for each evaluation, each with its `step`.

    Args:
        path: The file. It is made, or, where it exists, cut back to the lines that belong to the
            first `step` steps: what a killed run wrote after its last checkpoint is done again.
        step: Number of steps already done.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        with replace_atomically(path) as file:
            file.writelines(f"{json.dumps(record)}\n".encode() for record in kept)
        self._file = path.open("a", encoding="utf-8")

    def append(self, **values: float) -> None:
        """Add a line; it is on disk after the next `flush`."""
        self._file.write(f"{json.dumps(values)}\n")

    def flush(self) -> None:
        """Put all lines on disk, which must happen before a checkpoint that counts on them."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Put all lines on disk and let go of the file."""
        self.flush()
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a log.

    Args:
        path: The file; a missing one is an empty log.

    Returns:
        The lines, except those that were being written when their run was killed.
    """
    if not path.is_file():
        return []
    records = (_parse(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [record for record in records if isinstance(record, dict) and "step" in record]


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def draw_curves(metrics_path: Path, image_path: Path) -> None:
    """Draw loss and test accuracy over steps.

    Args:
        metrics_path: A log.
        image_path: The PNG file to write, in place of an older one.

    Raises:
        BadInput: matplotlib is not installed.
    """
    records = read_metrics(metrics_path)
    trained = [record for record in records if "loss" in record]
    tested = [record for record in records if "test_accuracy" in record]
    figure = import_extra("matplotlib.figure").Figure(figsize=(9, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    _plot(losses, trained, "loss", "training", alpha=0.6, linewidth=0.8)
    _plot(losses, tested, "test_loss", "test, averaged weights")
    losses.set(xlabel="step", ylabel="cross-entropy", ylim=(0, None), title="Loss")
    _plot(accuracies, tested, "test_accuracy", "test, averaged weights")
    accuracies.set(xlabel="step", ylabel="share told right", ylim=(0, 1), title="Accuracy")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        axes.legend()
    with replace_atomically(image_path) as file:
        figure.savefig(file, format="png", dpi=120)


def _plot(axes: Any, records: list[dict[str, Any]], name: str, label: str, **style: float) -> None:
    steps = [record["step"] for record in records]
    axes.plot(steps, [record[name] for record in records], label=label, **style)

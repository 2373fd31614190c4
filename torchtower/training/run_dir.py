"""The folder of a run: what lies in it, and when it may be written to."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torchtower.training.errors import BadInput


class RunDir(NamedTuple):
    """The files of a run.

    Attributes:
        path: The folder that holds them.
    """

    path: Path

    @property
    def checkpoint(self) -> Path:
        """The latest checkpoint, there from before the first step."""
        return self.path / "checkpoint.pt"

    @property
    def metrics(self) -> Path:
        """The machine-readable log."""
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """The log, drawn."""
        return self.path / "curves.png"

    @property
    def tensorboard(self) -> Path:
        """The folder of event files."""
        return self.path / "tensorboard"

    def expect_unused(self) -> None:
        """Check that a new run would write nothing over.

        Raises:
            BadInput: The folder holds files of a run.
        """
        for path in (self.checkpoint, self.metrics, self.curves, self.tensorboard):
            if path.exists():
                raise BadInput(
                    f"--run-dir: expected a folder without a run, but got {path}: "
                    "name another, or go on with that run by --resume"
                )

    def create(self) -> None:
        """Make the folder, unless it is there.

        Raises:
            BadInput: It cannot be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise BadInput(f"--run-dir: expected a folder that can be written to, but got {error}") from error

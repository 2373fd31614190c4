"""A run with all its parts, and all that must be right before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchtower.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from torchtower.training.batches import Batches
from torchtower.training.data import RECIPES
from torchtower.training.errors import BadInput, import_extra
from torchtower.training.options import Options, continued_options, new_options
from torchtower.training.run_dir import RunDir
from torchtower.training.trainer import Trainer


@dataclass
class Run:
    """A run, ready to go on.

    Attributes:
        options: What determines it.
        files: Where it is written.
        trainer: What is trained.
        batches: What it is trained on.
        checksum: Of the training data.
        elapsed_s: Time that its steps and evaluations took so far, over all resumptions.
        test_accuracy: Of the latest evaluation, None before the first.
    """

    options: Options
    files: RunDir
    trainer: Trainer
    batches: Batches
    checksum: int
    elapsed_s: float = 0.0
    test_accuracy: float | None = None

    @property
    def total(self) -> int:
        """Number of steps of the whole run."""
        return self.options.steps or (self.options.epochs or 0) * self.batches.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.trainer.step >= self.total

    @property
    def lr(self) -> float:
        """Learning rate of the next step; each is the same factor below the one before."""
        decay = RECIPES[self.options.dataset].lr_decay
        return self.options.lr * float(decay ** (self.trainer.step / self.total))

    def save(self) -> None:
        """Write the checkpoint."""
        content = {
            "options": self.options.to_plain(),
            "data_checksum": self.checksum,
            "elapsed_s": self.elapsed_s,
            "test_accuracy": self.test_accuracy,
            **self.trainer.state_dict(),
        }
        save_checkpoint(self.files.checkpoint, content)


def new_run(said: Mapping[str, Any]) -> Run:
    """Check everything that can be wrong with a new run, and only then make its folder.

    Args:
        said: What the user said, as for `new_options`.

    Raises:
        BadInput: Something that the user can mend; nothing has been written.
    """
    _check_extras()
    options = new_options(said)
    files = RunDir(options.run_dir)
    files.expect_unused()
    run = _assemble(options, Trainer(options))
    files.create()
    # There from the start, so that a run killed at any moment can be resumed.
    run.save()
    return run


def resumed_run(said: Mapping[str, Any]) -> Run:
    """Load the run in `said["run_dir"]` as it was at its checkpoint.

    Args:
        said: What the user said, as for `continued_options`.

    Raises:
        BadInput: Something that the user can mend; nothing has been written.
        CheckpointError: The checkpoint is missing, damaged, or of another run.
    """
    _check_extras()
    if "run_dir" not in said:
        raise BadInput("--resume: expected --run-dir to name the run to go on with, but got none")
    path = RunDir(said["run_dir"]).checkpoint
    saved = load_checkpoint(path)
    options = continued_options(said, saved.get("options"), path)
    trainer = Trainer(options)
    trainer.load_state_dict(saved, path)
    run = _assemble(options, trainer)
    if saved.get("data_checksum") != run.checksum:
        raise CheckpointError(
            f"--data: expected the images that the run of {path} began with (checksum "
            f"{saved.get('data_checksum')}), but got others ({run.checksum})"
        )
    if not 0 <= trainer.step <= run.total:
        raise CheckpointError(f"checkpoint: expected a step from 0 to {run.total} in {path}, but got {trainer.step}")
    run.elapsed_s = float(saved.get("elapsed_s", 0.0))
    run.test_accuracy = saved.get("test_accuracy")
    return run


def _assemble(options: Options, trainer: Trainer) -> Run:
    recipe = RECIPES[options.dataset]
    data = recipe.load(options.data)
    batches = Batches(
        data.to(trainer.device),
        recipe.distortions,
        options.batch_size,
        options.seed,
        options.augment,
    )
    return Run(options, RunDir(options.run_dir), trainer, batches, data.checksum())


def _check_extras() -> None:
    # Only one of them is needed before the first step, but none should be missed after the last.
    for module in ("rich", "tensorboard", "matplotlib"):
        import_extra(module)

"""Everything that a run says about itself while it goes on, said in one place."""

from __future__ import annotations

from torch import Tensor, nn

from torchtower.training.metrics import MetricsLog
from torchtower.training.run_dir import RunDir
from torchtower.training.screen import Screen
from torchtower.training.summaries import Summaries
from torchtower.training.trainer import StepLosses


class Reports:
    """The screen, the machine-readable log and the TensorBoard files of a run.

    Args:
        files: Where the log and the event files go.
        step: Steps already done.
        total: Steps of the whole run.
        batch_size: Rows of a step.
    """

    def __init__(self, files: RunDir, step: int, total: int, batch_size: int) -> None:
        self._log = MetricsLog(files.metrics, step)
        self._summaries = Summaries(files.tensorboard, step)
        self._screen = Screen(total, step, batch_size)

    def step(self, step: int, epoch: int, losses: StepLosses, lr: float, images_per_s: float) -> None:
        """Report a step: which it was, in which epoch, its losses, learning rate and speed."""
        self._log.append(step=step, loss=losses.mean, lr=lr, images_per_s=round(images_per_s, 1))
        self._summaries.add_step(step, losses, lr, images_per_s)
        self._screen.step(step, epoch, losses.mean)

    def snapshot(self, step: int, net: nn.Sequential, images: Tensor) -> None:
        """Report what the network and its batch look like, as `Summaries.add_snapshot` says."""
        self._summaries.add_snapshot(step, net, images)

    def test(self, step: int, epoch: int, loss: float, accuracy: float, images_per_s: float) -> None:
        """Report an evaluation: after which step, its loss and accuracy, the epoch's speed."""
        self._log.append(step=step, epoch=epoch, test_loss=loss, test_accuracy=accuracy)
        self._summaries.add_test(step, loss, accuracy)
        self._screen.epoch(step, epoch, loss, accuracy, images_per_s)

    def flush(self) -> None:
        """Put all on disk that a checkpoint counts on."""
        self._log.flush()
        self._summaries.flush()

    def close(self) -> None:
        """Put all on disk and give the screen back."""
        self._screen.close()
        self._summaries.close()
        self._log.close()

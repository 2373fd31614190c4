"""What a person sees while a run goes on, and at its end."""

from __future__ import annotations

from collections.abc import Mapping

from torchtower.training.errors import import_extra


class Screen:
    """A progress bar with a line for each epoch above it; off a terminal, the lines alone.

    Args:
        total: Steps of the whole run.
        done: Steps already done.
        batch_size: Rows of a step.
    """

    def __init__(self, total: int, done: int, batch_size: int) -> None:
        progress = import_extra("rich.progress")
        self._console = import_extra("rich.console").Console()
        self._total, self._batch_size = total, batch_size
        columns = (
            progress.TextColumn("epoch {task.fields[epoch]}"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("loss {task.fields[loss]:.3f}"),
            progress.TextColumn("{task.fields[images_per_s]:,.0f} images/s"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("left"),
        )
        self._bar = progress.Progress(
            *columns,
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
            expand=True,
        )
        fields = {"epoch": 1, "loss": float("nan"), "images_per_s": 0.0}
        self._task = self._bar.add_task("", total=total, completed=done, **fields)
        self._bar.start()

    def step(self, step: int, epoch: int, loss: float) -> None:
        """Move the bar on: steps done, the epoch they are in, the latest loss."""
        images_per_s = (self._bar.tasks[0].speed or 0.0) * self._batch_size
        self._bar.update(self._task, completed=step, epoch=epoch, loss=loss, images_per_s=images_per_s)

    def epoch(self, step: int, epoch: int, loss: float, accuracy: float, images_per_s: float) -> None:
        """Print a line, above the bar if there is one.

        Args:
            step: Steps done.
            epoch: The epoch that has ended, counted from 1.
            loss: On the test set.
            accuracy: On the test set, between 0 and 1.
            images_per_s: Of this epoch's steps.
        """
        left_s = (self._total - step) * self._batch_size / images_per_s
        line = (
            f"epoch {epoch:3d}  step {step:5d}/{self._total}  test loss {loss:.3f}  "
            f"test accuracy {accuracy:6.1%}  {images_per_s:7,.0f} images/s  {left_s:4.0f} s left"
        )
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def show_table(title: str, rows: Mapping[str, str]) -> None:
    """Print names and values as a table."""
    table = import_extra("rich.table").Table(title=title, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    import_extra("rich.console").Console().print(table)

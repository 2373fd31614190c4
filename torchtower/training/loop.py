"""The training loop.

torchtower train --dataset digits --towers 2
torchtower train --dataset cifar10 --towers 2 --run-dir runs/cifar10
torchtower train --resume --run-dir runs/cifar10
"""

from __future__ import annotations

import time
from contextlib import closing

from torchtower.training.interrupt import Interrupt
from torchtower.training.metrics import draw_curves
from torchtower.training.reports import Reports
from torchtower.training.run import Run
from torchtower.training.screen import show_table


def train(run: Run) -> None:
    """Train until the run is finished or Ctrl-C is pressed, and show how it goes.

    The checkpoint is written after every epoch and upon Ctrl-C. A finished run gets its curves
    drawn and its results shown.

    Args:
        run: What to train, from where it stands.

    Raises:
        BadInput: The loss is not finite any more; the checkpoint is the last epoch's.
        KeyboardInterrupt: Ctrl-C was pressed twice; the checkpoint is the last epoch's.
    """
    reports = Reports(run.files, run.trainer.step, run.total, run.options.batch_size)
    with closing(reports), Interrupt() as interrupt:
        while not run.finished and not interrupt.wanted:
            _train_epoch(run, reports, interrupt)
            reports.flush()
            run.save()
    if run.finished:
        draw_curves(run.files.metrics, run.files.curves)
        show_table("Results", _results(run))


def _train_epoch(run: Run, reports: Reports, interrupt: Interrupt) -> None:
    """Train to the end of the epoch and evaluate, or train until Ctrl-C."""
    trainer, steps_per_epoch = run.trainer, run.batches.steps_per_epoch
    epoch, began_s, rows, trained_s = (
        trainer.step // steps_per_epoch + 1,
        time.perf_counter(),
        0,
        0.0,
    )
    at_end = False
    while not (at_end or interrupt.wanted):
        step_began_s = time.perf_counter()
        images, labels = run.batches.training(trainer.step)
        lr = run.lr
        losses = trainer.train_step(images, labels, lr)
        step_s = time.perf_counter() - step_began_s
        rows, trained_s = rows + len(labels), trained_s + step_s
        reports.step(trainer.step, epoch, losses, lr, len(labels) / step_s)
        reports.snapshot(trainer.step, trainer.net, images)
        at_end = trainer.step % steps_per_epoch == 0 or run.finished
    if at_end:
        loss, run.test_accuracy = trainer.evaluate(run.batches.test())
        reports.test(trainer.step, epoch, loss, run.test_accuracy, rows / trained_s)
    run.elapsed_s += time.perf_counter() - began_s


def _results(run: Run) -> dict[str, str]:
    options = run.options
    images = run.trainer.step * options.batch_size
    accuracy = "none" if run.test_accuracy is None else f"{run.test_accuracy:.2%}"
    return {
        "data set": options.dataset,
        "model": options.model,
        "towers": f"{len(options.devices)} on {', '.join(dict.fromkeys(options.devices))}",
        "steps": f"{run.trainer.step:,} of {options.batch_size} images",
        "test accuracy": accuracy,
        "time": f"{run.elapsed_s:,.1f} s",
        "images/s": f"{images / run.elapsed_s:,.0f}" if run.elapsed_s else "none",
        "run": str(run.files.path),
    }

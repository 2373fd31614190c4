"""TensorBoard event files with what the TensorFlow tutorial's program summarised.

Source: `_activation_summary` and `_add_loss_summaries` of tensorflow/models,
tutorials/image/cifar10/cifar10.py, and `train` of cifar10_multi_gpu_train.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from torchtower.training.errors import import_extra
from torchtower.training.trainer import StepLosses

SCALAR_STEPS = 10
HISTOGRAM_STEPS = 100

_NUM_SAMPLES = 16


class Summaries:
    """The event files of a run: scalars every 10 steps, histograms and images every 100.

    Args:
        folder: Where they go.
        step: Number of steps already done; what older files say of later ones is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        module = import_extra("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(folder, purge_step=step + 1 if step else None)

    def add_step(self, step: int, losses: StepLosses, lr: float, images_per_s: float) -> None:
        """Record a step's losses, its rate and its speed, if it is its turn."""
        if step % SCALAR_STEPS:
            return
        self._writer.add_scalar("loss/mean", losses.mean, step)
        for tower, loss in enumerate(losses.towers):
            self._writer.add_scalar(f"loss/tower_{tower}", loss, step)
        self._writer.add_scalar("learning_rate", lr, step)
        self._writer.add_scalar("images_per_s", images_per_s, step)

    def add_snapshot(self, step: int, net: nn.Sequential, images: Tensor) -> None:
        """Record weights, gradients, activations and sample images, if it is the step's turn.

        Args:
            step: The step just done.
            net: The network, with that step's gradients.
            images: That step's batch.
        """
        if step % HISTOGRAM_STEPS:
            return
        for name, param in net.named_parameters():
            self._writer.add_histogram(f"weights/{name}", param.detach().cpu(), step)
            if param.grad is not None:
                self._writer.add_histogram(f"gradients/{name}", param.grad.cpu(), step)
        self._add_activations(step, net, images[:_NUM_SAMPLES])
        samples = images[:_NUM_SAMPLES].cpu()
        lowest, highest = samples.amin((1, 2, 3), True), samples.amax((1, 2, 3), True)
        span = (highest - lowest).clamp(min=1e-6)
        self._writer.add_images("images", (samples - lowest) / span, step)

    @torch.no_grad()
    def _add_activations(self, step: int, net: nn.Sequential, values: Tensor) -> None:
        # Layer by layer and without dropout: looking must change neither a mode nor a generator.
        for name, layer in net.named_children():
            if isinstance(layer, nn.Dropout):
                continue
            values = layer(values)
            if isinstance(layer, nn.ReLU) or name == "logits":
                self._writer.add_histogram(f"activations/{name}", values.cpu(), step)
                sparsity = (values == 0).float().mean()
                self._writer.add_scalar(f"sparsity/{name}", float(sparsity), step)

    def add_test(self, step: int, loss: float, accuracy: float) -> None:
        """Record an evaluation."""
        self._writer.add_scalar("test/loss", loss, step)
        self._writer.add_scalar("test/accuracy", accuracy, step)

    def flush(self) -> None:
        """Put all events on disk."""
        self._writer.flush()

    def close(self) -> None:
        """Put all events on disk and let go of the files."""
        self._writer.close()

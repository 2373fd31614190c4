"""The batch of any step, from the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchtower.training.augment import Distortions, centre, distort
from torchtower.training.chance import generator_for
from torchtower.training.data import Dataset
from torchtower.training.errors import BadInput


class Batches:
    """A data set cut into training batches, in another order every epoch, and into test batches.

    Each epoch leaves out the few rows that would not fill a batch, other ones every time.

    Args:
        data: The images, on the device that the batches are wanted on.
        distortions: Crop size, and what augmentation may do.
        batch_size: Rows of a training batch.
        seed: Source of order and distortions.
        augment: Whether training images are distorted, or taken as test images are.

    Raises:
        BadInput: The data set has fewer training rows than one batch.
    """

    def __init__(self, data: Dataset, distortions: Distortions, batch_size: int, seed: int, augment: bool) -> None:
        rows = len(data.train_labels)
        if batch_size > rows:
            raise BadInput(f"--batch-size: expected at most the {rows} training rows, but got {batch_size}")
        self.steps_per_epoch = rows // batch_size
        self._data, self._distortions, self._augment = data, distortions, augment
        self._batch_size, self._seed = batch_size, seed
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def training(self, step: int) -> tuple[Tensor, Tensor]:
        """Make the batch of a step.

        Args:
            step: Counted from 0 over all epochs.

        Returns:
            Images `[batch_size, channels, size, size]` and labels `[batch_size]`.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self._batch_size
        rows = self._epoch_order(epoch)[start : start + self._batch_size]
        images, labels = self._data.train_images[rows], self._data.train_labels[rows]
        if not self._augment:
            return centre(images, self._distortions), labels
        generator = generator_for("distortions", self._seed, step)
        return distort(images, self._distortions, generator), labels

    def test(self, batch_size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the test set, in its own order and without distortions."""
        data = self._data
        for start in range(0, len(data.test_labels), batch_size):
            rows = slice(start, start + batch_size)
            yield centre(data.test_images[rows], self._distortions), data.test_labels[rows]

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            generator = generator_for("order", self._seed, epoch)
            order = torch.randperm(len(self._data.train_labels), generator=generator)
            self._order = (epoch, order.to(self._data.train_labels.device))
        return self._order[1]

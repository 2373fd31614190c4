"""The data sets that the program knows, in memory as uint8 images, and how each is best trained."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchtower.training.augment import Distortions
from torchtower.training.cifar10 import find_cifar10, read_cifar10
from torchtower.training.download import fetch_cifar10
from torchtower.training.errors import BadInput, import_extra


@dataclass(frozen=True)
class Dataset:
    """Labelled images for training and for testing.

    Attributes:
        train_images: uint8, `[rows, height, width, channels]`.
        train_labels: int64, `[rows]`.
        test_images: As `train_images`.
        test_labels: As `train_labels`.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> Dataset:
        """Copy the images and labels to a device."""
        return Dataset(*(tensor.to(device) for tensor in vars(self).values()))

    def checksum(self) -> int:
        """Compute a number that changes with any pixel or label that is trained on."""
        labels = zlib.crc32(self.train_labels.numpy().data)
        return zlib.crc32(self.train_images.numpy().data, labels)


@dataclass(frozen=True)
class Recipe:
    """How a data set is trained where the user does not say otherwise.

    Attributes:
        load: Reads the data set from a folder, or from its usual place when there is None.
        distortions: What augmentation may do to its images.
        channels: Colours of a pixel.
        num_classes: Number of different labels.
        model: Name of the network.
        epochs: Length of a run.
        batch_size: Rows of one step, over all towers.
        lr: Learning rate of the first step.
        lr_decay: Factor that the learning rate has been multiplied by after the last step.
        ema_decay: Share of the averaged weights that a step keeps.
        weight_decay: Of the dense layers' weights.
    """

    load: Callable[[Path | None], Dataset]
    distortions: Distortions
    channels: int
    num_classes: int
    model: str
    epochs: int
    batch_size: int
    lr: float
    lr_decay: float
    ema_decay: float
    weight_decay: float


def _load_cifar10(folder: Path | None) -> Dataset:
    if folder is None:
        folder = fetch_cifar10()
    elif not folder.is_dir():
        raise BadInput(f"--data: expected a folder with CIFAR-10's files, but got {folder}")
    found = find_cifar10(folder)
    if found is None:
        raise BadInput(
            f"--data: expected data_batch_* and test_batch of CIFAR-10's binary or Python layout "
            f"in {folder}, but it holds none"
        )
    return Dataset(*read_cifar10(found))


def _load_digits(folder: Path | None) -> Dataset:
    """Read the handwritten digits in scikit-learn's package (Alpaydin and Kaynak, UCI, 1998)."""
    if folder is not None:
        raise BadInput(f"--data: the digits come with scikit-learn; expected none, but got {folder}")
    digits = import_extra("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8)[..., None]
    labels = torch.from_numpy(digits.target).long()
    test = torch.arange(len(labels)) % 5 == 0
    return Dataset(images[~test], labels[~test], images[test], labels[test])


RECIPES: dict[str, Recipe] = {
    "cifar10": Recipe(
        load=_load_cifar10,
        distortions=Distortions(24, flip=True, max_brightness_delta=63, contrast=(0.2, 1.8)),
        channels=3,
        num_classes=10,
        model="cifar10",
        epochs=100,
        batch_size=128,
        lr=0.2,
        lr_decay=0.02,
        ema_decay=0.995,
        weight_decay=0.004,
    ),
    "digits": Recipe(
        load=_load_digits,
        distortions=Distortions(8, padding=1),
        channels=1,
        num_classes=10,
        model="digits",
        epochs=60,
        batch_size=64,
        lr=0.4,
        lr_decay=0.05,
        ema_decay=0.99,
        weight_decay=0.0005,
    ),
}

"""Images as the network sees them: cropped, flipped, distorted, standardised, a batch at a time.

Source: `distorted_inputs` and `inputs` of the TensorFlow tutorial, tensorflow/models,
tutorials/image/cifar10/cifar10_input.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distortions:
    """What may be done to a training image of one data set without changing its label.

    Attributes:
        size: Height and width of the crop, in pixels: what the network takes in.
        padding: Black border added before cropping, in pixels.
        flip: Whether half of the images are mirrored left to right.
        max_brightness_delta: The largest value added to all pixels of an image, in grey levels.
        contrast: Lowest and highest factor of a pixel's distance from its channel's mean.
    """

    size: int
    padding: int = 0
    flip: bool = False
    max_brightness_delta: float = 0.0
    contrast: tuple[float, float] = (1.0, 1.0)


def distort(images: Tensor, distortions: Distortions, generator: torch.Generator) -> Tensor:
    """Make a training batch.

    Args:
        images: uint8 images, on any device.
        distortions: What is allowed.
        generator: A CPU generator; the same state gives the same distortions on every device.

    Shape:
        images: `[batch, height, width, channels]`.
        result: `[batch, channels, size, size]`, float32, channels_last in memory.

    Returns:
        The distorted, standardised images.
    """
    draws = torch.rand(5, len(images), generator=generator).to(images.device)
    crops = _crop(images, distortions, draws[:3])
    low, high = distortions.contrast
    brightness = (draws[3] * 2 - 1) * distortions.max_brightness_delta
    factor = draws[4] * (high - low) + low
    # Standardisation undoes a brightness that nothing clips; the tutorial draws it, and so do we.
    crops += brightness[:, None, None, None]
    means = crops.mean((1, 2), keepdim=True)
    return _standardize((crops - means) * factor[:, None, None, None] + means)


def _crop(images: Tensor, distortions: Distortions, draws: Tensor) -> Tensor:
    images = torch.nn.functional.pad(images, (0, 0, *[distortions.padding] * 4))
    batch, height, width, _ = images.shape
    span = torch.arange(distortions.size, device=images.device)
    rows = (draws[0] * (height - distortions.size + 1)).long()[:, None] + span
    columns = (draws[1] * (width - distortions.size + 1)).long()[:, None] + span
    if distortions.flip:
        columns = torch.where(draws[2, :, None] < 0.5, columns.flip(1), columns)
    which = torch.arange(batch, device=images.device)
    return images[which[:, None, None], rows[:, :, None], columns[:, None, :]].float()


def centre(images: Tensor, distortions: Distortions) -> Tensor:
    """Make a batch without chance.

    Args:
        images: uint8 images, on any device.
        distortions: Where the size of the crop is taken from.

    Shape:
        As for `distort`.

    Returns:
        The middle of each image, standardised.
    """
    size = distortions.size
    top, left = ((images.shape[axis] - size) // 2 for axis in (1, 2))
    return _standardize(images[:, top : top + size, left : left + size].float())


def _standardize(crops: Tensor) -> Tensor:
    """Give each image mean 0 and deviation 1; a flat one is divided by 1/sqrt(its values)."""
    deviations, means = torch.std_mean(crops, (1, 2, 3), correction=0, keepdim=True)
    least = 1.0 / math.sqrt(crops.shape[1:].numel())
    return ((crops - means) / deviations.clamp(min=least)).permute(0, 3, 1, 2)

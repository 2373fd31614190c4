"""Local response normalisation at the speed of a matrix product."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LocalResponseNorm(nn.Module):
    """Divide each value by a power of the squares in its neighbouring channels.

    The same as `nn.LocalResponseNorm` with `beta=0.75`, but the sum over neighbouring channels is a
    1x1 convolution of the squares with a banded matrix: torch's own form pads, unfolds and pools,
    and takes most of the CIFAR-10 network's time on a CPU. The power 3/4 is two square roots,
    which cost a fraction of a general power.

    Args:
        channels: Number of channels of the input.
        size: How many neighbouring channels are summed: odd, the value's own in the middle.
        alpha: Factor of the mean square. (TensorFlow's is a factor of the sum: `alpha / size`.)
        bias: Added before the power is taken.

    Shape:
        input and result: `[batch, channels, height, width]`.

    Example:
        >>> norm = LocalResponseNorm(64, size=9, alpha=0.001)
        >>> norm(torch.ones(1, 64, 2, 2)).shape
        torch.Size([1, 64, 2, 2])

    Source: section 3.3 of Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural
    Networks, 2012.
    """

    band: Tensor
    bias: Tensor

    def __init__(self, channels: int, size: int = 9, alpha: float = 0.001, bias: float = 1.0) -> None:
        super().__init__()
        index = torch.arange(channels)
        near = (index[:, None] - index[None, :]).abs() <= size // 2
        self.register_buffer("band", near[:, :, None, None] * (alpha / size), persistent=False)
        self.register_buffer("bias", torch.full((channels,), bias), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise a batch."""
        root = nn.functional.conv2d(images * images, self.band, self.bias).rsqrt()
        return images * root * root.sqrt()

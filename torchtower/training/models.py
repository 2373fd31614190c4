"""The networks that the program trains, each an ordinary `nn.Sequential` with named layers.

Source of `cifar10`: `inference` of the TensorFlow tutorial, tensorflow/models,
tutorials/image/cifar10/cifar10.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from torchtower.training.normalization import LocalResponseNorm


class Classifier(nn.Sequential):
    """A chain of named layers, some of which have their weight, not their bias, decayed.

    Args:
        layers: The layers by name.
        decayed: Names of the decayed ones.
    """

    def __init__(self, layers: dict[str, nn.Module], decayed: tuple[str, ...] = ()) -> None:
        super().__init__(OrderedDict(layers))
        self.decayed = decayed

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Split the parameters for an optimizer.

        Args:
            weight_decay: The optimizer's `weight_decay` for the decayed weights. TensorFlow's
                `l2_loss` is half the sum of squares, so its factor is this very number.

        Returns:
            Two groups: the decayed weights, then all other parameters.
        """
        names = {f"{layer}.weight" for layer in self.decayed}
        decayed = [param for name, param in self.named_parameters() if name in names]
        others = [param for name, param in self.named_parameters() if name not in names]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": others}]


def _cifar10(channels: int, size: int, num_classes: int, dropout: float) -> Classifier:
    # Two poolings, each to half the size: at even sizes ceil_mode is TensorFlow's SAME padding.
    pooled = size // 4
    layers = {
        "conv1": _conv(channels, 64, bias=0.0),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(3, 2, ceil_mode=True),
        "norm1": LocalResponseNorm(64, size=9, alpha=0.001),
        "conv2": _conv(64, 64, bias=0.1),
        "relu2": nn.ReLU(),
        "norm2": LocalResponseNorm(64, size=9, alpha=0.001),
        "pool2": nn.MaxPool2d(3, 2, ceil_mode=True),
        "flatten": nn.Flatten(),
        "dense3": _dense(64 * pooled * pooled, 384, stddev=0.04, bias=0.1),
        "relu3": nn.ReLU(),
        "dropout3": nn.Dropout(dropout),
        "dense4": _dense(384, 192, stddev=0.04, bias=0.1),
        "relu4": nn.ReLU(),
        "dropout4": nn.Dropout(dropout),
        "logits": _dense(192, num_classes, stddev=1 / 192, bias=0.0),
    }
    return Classifier(layers, decayed=("dense3", "dense4"))


def _digits(channels: int, size: int, num_classes: int, dropout: float) -> Classifier:
    pooled = size // 2
    layers = {
        "conv1": nn.Conv2d(channels, 16, 3, padding=1),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(16, 32, 3, padding=1),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "dense3": nn.Linear(32 * pooled * pooled, 64),
        "relu3": nn.ReLU(),
        "dropout3": nn.Dropout(dropout),
        "logits": nn.Linear(64, num_classes),
    }
    return Classifier(layers, decayed=("dense3",))


MODELS: dict[str, Callable[[int, int, int, float], Classifier]] = {
    "cifar10": _cifar10,
    "digits": _digits,
}


def build_model(name: str, channels: int, size: int, num_classes: int, dropout: float = 0.0) -> Classifier:
    """Make a network with fresh weights from torch's default generator.

    Args:
        name: One of `MODELS`.
        channels: Channels of its input.
        size: Height and width of its input in pixels, a multiple of 4.
        num_classes: Number of its outputs.
        dropout: Probability with which a dense layer's output is dropped in training.

    Returns:
        The network, `[batch, channels, size, size]` to `[batch, num_classes]`.

    Example:
        >>> build_model("cifar10", 3, 24, 10).logits
        Linear(in_features=192, out_features=10, bias=True)
    """
    return MODELS[name](channels, size, num_classes, dropout)


def _conv(inputs: int, outputs: int, bias: float) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 5, padding=2)
    _initialize(layer, stddev=5e-2, bias=bias)
    return layer


def _dense(inputs: int, outputs: int, stddev: float, bias: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    _initialize(layer, stddev, bias)
    return layer


def _initialize(layer: nn.Conv2d | nn.Linear, stddev: float, bias: float) -> None:
    # TensorFlow cuts its truncated normal at two deviations, torch at an absolute 2.
    nn.init.trunc_normal_(layer.weight, std=stddev, a=-2 * stddev, b=2 * stddev)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)

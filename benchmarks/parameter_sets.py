"""The shapes of parameters that the benchmarks average."""

from __future__ import annotations

Shape = tuple[int, ...]


def cifar10_cnn() -> list[Shape]:
    """TensorFlow's CIFAR-10 tutorial model: 1.07 M parameters in 10 tensors."""
    convolutions: list[Shape] = [(64, 3, 5, 5), (64,), (64, 64, 5, 5), (64,)]
    return [*convolutions, (384, 2304), (384,), (192, 384), (192,), (10, 192), (10,)]


def resnet50() -> list[Shape]:
    """25.6 M parameters in 161 tensors."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for kernel in ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [kernel, (kernel[0],), (kernel[0],)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2_small() -> list[Shape]:
    """124 M parameters in 148 tensors."""
    shapes: list[Shape] = [(50257, 768), (1024, 768)]
    for _ in range(12):
        shapes += [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
        shapes += [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    return [*shapes, (768,), (768,)]


def many_small() -> list[Shape]:
    """2000 tensors of 1000 elements: what a call costs rather than what it moves."""
    return [(1000,)] * 2000


PARAMETER_SETS = {
    "cifar10_cnn": cifar10_cnn,
    "resnet50": resnet50,
    "gpt2_small": gpt2_small,
    "2000x1000": many_small,
}

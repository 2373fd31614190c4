"""CIFAR-10's two official file layouts.

Source: the layouts as https://www.cs.toronto.edu/~kriz/cifar.html describes them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchtower.training.errors import BadInput
from torchtower.training.unpickle import load_plain

IMAGE_BYTES = 3 * 32 * 32
RECORD_BYTES = 1 + IMAGE_BYTES
NUM_CLASSES = 10

_FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")


def find_cifar10(folder: Path) -> Path | None:
    """Find the folder that holds the batches.

    Args:
        folder: That folder, or its parent.

    Returns:
        The first of `folder` and its two official children that holds a training batch.
    """
    candidates = (folder / name for name in _FOLDERS)
    return next((path for path in candidates if any(path.glob("data_batch_*"))), None)


def read_cifar10(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read all training batches that a folder holds, however many, and its test batch.

    Args:
        folder: A folder with `data_batch_*.bin` and `test_batch.bin` (the binary layout), or with
            `data_batch_*` and `test_batch` (the Python layout).

    Returns:
        Training images and labels, test images and labels; images are uint8 `[rows, 32, 32, 3]`,
        labels int64 `[rows]`.

    Raises:
        BadInput: A file is missing, cut short or damaged; the message names it.
    """
    binary = sorted(folder.glob("data_batch_*.bin"))
    python = [path for path in sorted(folder.glob("data_batch_*")) if not path.suffix]
    read, suffix = (_read_binary, ".bin") if binary else (_read_python, "")
    train = [read(path) for path in binary or python]
    test_path = folder / f"test_batch{suffix}"
    if not test_path.is_file():
        raise BadInput(f"--data: expected a file at {test_path}, but there is none")
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    return images, labels, *read(test_path)


def _read_binary(path: Path) -> tuple[Tensor, Tensor]:
    """Read records of one label byte and 3072 pixel bytes."""
    content = np.fromfile(path, np.uint8)
    if content.size == 0 or content.size % RECORD_BYTES:
        raise BadInput(
            f"--data: expected a whole number of {RECORD_BYTES}-byte records in {path}, "
            f"but got {content.size} bytes: cut short or damaged"
        )
    records = content.reshape(-1, RECORD_BYTES)
    return _as_tensors(path, records[:, 1:], records[:, 0])


def _read_python(path: Path) -> tuple[Tensor, Tensor]:
    """Read a pickled dict with `data`, one row an image, and `labels`."""
    content = load_plain(path)
    data = content.get(b"data") if isinstance(content, dict) else None
    labels = content.get(b"labels") if isinstance(content, dict) else None
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.uint8
        or data.shape[1:] != (IMAGE_BYTES,)
        or not isinstance(labels, list)
        or len(labels) != len(data)
        or not all(isinstance(label, int) for label in labels)
    ):
        raise BadInput(
            f"--data: expected a dict with uint8 'data' of shape (rows, {IMAGE_BYTES}) and as many "
            f"'labels' in {path}, but got something else"
        )
    return _as_tensors(path, data, np.array(labels))


def _as_tensors(path: Path, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer]) -> tuple[Tensor, Tensor]:
    wrong = np.flatnonzero((labels < 0) | (labels >= NUM_CLASSES))
    if wrong.size:
        raise BadInput(
            f"--data: expected labels 0 to {NUM_CLASSES - 1} in {path}, "
            f"but record {wrong[0]} has {labels[wrong[0]]}: damaged"
        )
    # Each record holds three colour planes; cropping wants a pixel's colours side by side.
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy())
    return images, torch.from_numpy(labels.astype(np.int64))

"""A checkpoint is one dict, and the file that holds it is always a whole one.

Nothing here knows about training: a checkpoint holds plain values and tensors, as nanoGPT's does.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

FORMAT = "torchtower checkpoint"
VERSION = 1


class CheckpointError(ValueError):
    """A file is no checkpoint, is damaged, or belongs to something else."""


@contextmanager
def replace_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Write a file so that `path` holds the old bytes or all the new ones, whatever happens.

    Args:
        path: The file to write, in a folder that exists. What an earlier, killed writer left
            unfinished is overwritten.

    Yields:
        A temporary file beside `path`, renamed to it when the block ends without an exception.

    Raises:
        OSError: The folder cannot be written to, or the disk is full; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # The rename survives a power cut only once the folder is on disk. Windows opens no folder.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: Where it goes; an older checkpoint there is replaced only by a whole new one.
        content: Tensors, numbers, strings, and dicts and lists of them.

    Raises:
        OSError: The folder cannot be written to, or the disk is full.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
        >>> save_checkpoint(path, {"step": 3})
        >>> load_checkpoint(path)["step"]
        3
    """
    with replace_atomically(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **content}, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running any code that the file may carry.

    Args:
        path: A file that `save_checkpoint` wrote.

    Returns:
        The dict that was saved, its tensors on the CPU, with `format` and `version` added.

    Raises:
        CheckpointError: The file is missing, cut short, damaged, of another format or version,
            or holds anything but plain values and tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint: expected a file at {path}, but there is none")
    try:
        with warnings.catch_warnings():
            # A damaged file may look like an older container, of which torch warns at length.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for damaged files
        raise CheckpointError(
            f"checkpoint: expected a whole {FORMAT} at {path}, but it is cut short, damaged or "
            f"unsafe ({_first_line(error)})"
        ) from error
    header = (content.get("format"), content.get("version")) if isinstance(content, dict) else None
    if header != (FORMAT, VERSION):
        raise CheckpointError(f"checkpoint: expected {(FORMAT, VERSION)} in {path}, but got {header}")
    return dict(content)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:160]


def check_same_tensors(path: Path, part: str, expected: Mapping[str, Any], found: object) -> None:
    """Compare a state dict's names, shapes and dtypes with those that a checkpoint holds.

    Args:
        path: The checkpoint, for the message.
        part: The checkpoint's entry, for the message.
        expected: The state dict of the object that is to be loaded.
        found: What the checkpoint holds.

    Raises:
        CheckpointError: They differ; the message names the first tensor that does.
    """
    found = found if isinstance(found, Mapping) else {}
    for name in [*expected, *(name for name in found if name not in expected)]:
        want, got = _describe(expected, name), _describe(found, name)
        if want != got:
            raise CheckpointError(
                f"checkpoint: expected {part} tensor '{name}' in {path} to be {want}, but it is {got}"
            )


def _describe(state: Mapping[str, Any], name: str) -> str:
    value = state.get(name)
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else "absent"

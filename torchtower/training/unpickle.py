"""Reading a pickle that somebody else made, without letting it run anything."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from torchtower.training.errors import BadInput


def load_plain(path: Path) -> Any:
    """Read a pickle of containers, numbers, strings and numpy arrays, such as CIFAR-10's batches.

    Args:
        path: The file. Python 2's strings are read as bytes.

    Returns:
        What was pickled.

    Raises:
        BadInput: The file is cut short, damaged, or asks for anything else; what it asks for is
            neither imported nor called.
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise BadInput(
            f"--data: expected a whole pickle of numpy arrays in {path}, but it is cut short, "
            f"damaged or unsafe ({str(error)[:120]})"
        ) from error


def _encode(text: str, encoding: str) -> bytes:
    """Stand in for `_codecs.encode`, by which Python 3 writes bytes into old pickles."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"expected the encoding latin1, but got {encoding}")
    return text.encode("latin1")


_reconstruct: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]

_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None

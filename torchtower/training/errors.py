"""What a person gets wrong is told in one line; everything else keeps its traceback."""

from __future__ import annotations

import importlib
from typing import Any


class BadInput(ValueError):
    """An option, a path, a file or the machine is not what a run needs; the message is one line."""


def import_extra(module: str) -> Any:
    """Import a module of the `train` extra.

    Args:
        module: Its full name, such as `"matplotlib.figure"`.

    Returns:
        The module.

    Raises:
        BadInput: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(
            f"expected the package '{module.split('.')[0]}', but it cannot be imported ({error}): "
            "pip install 'torchtower[train]'"
        ) from error

"""What the engine asks of one backward through a bridge: gradients of all its inputs, or of some."""

from __future__ import annotations

from typing import Any

import torch


class Asked:
    """Of which of a node's inputs the running backward wants gradients.

    A plain ``backward()`` wants them all. ``torch.autograd.grad`` and ``backward(inputs=...)`` want some, and as in the
    plain module no other branch of the graph is worth a computation, nor may fail.

    Args:
        edges: the node's ``next_functions``. The first one leads to a leaf that nobody can ask for by name.
    """

    def __init__(self, edges: tuple[tuple[Any, int], ...]) -> None:
        (nameless, _), *rest = edges
        self._nodes = [node for node, _ in rest]
        self.all = _is_executed(nameless) is True

    def flags(self) -> list[bool]:
        """Which inputs' gradients are wanted, whatever for."""
        return [_is_executed(node) is not False for node in self._nodes]

    def accumulated(self, count: int) -> list[bool]:
        """Which of the first ``count`` inputs, all leaves, are about to be accumulated into."""
        return [_is_executed(node) is True for node in self._nodes[:count]]


def _is_executed(node: Any) -> bool | None:
    """Whether the engine goes to this node; None where it stops there, as ``torch.autograd.grad`` wants that leaf's."""
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return None

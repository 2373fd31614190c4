"""What the engine asks of one backward through a bridge: gradients of all its inputs, or of some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def _make_ticket() -> tuple[Tensor, Any]:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.empty(0, requires_grad=True, device="cpu")
        return leaf, get_gradient_edge(leaf).node


# A leaf without elements that is the first input of every bridge. It requires grad, since what towers return may need
# gradients where no input does; and nobody but us can ask for its gradient by name.
ticket, _ticket_node = _make_ticket()


class Asked:
    """Of which of a node's inputs the running backward wants gradients.

    A plain ``backward()`` wants them all. ``torch.autograd.grad`` and ``backward(inputs=...)`` want some, and as in the
    plain module no other branch of the graph is worth a computation, nor may fail.

    Args:
        node: a bridge's, whose first input is the `ticket`.
    """

    def __init__(self, node: Any) -> None:
        self._node = node
        self.all = _is_executed(_ticket_node) is True

    def flags(self) -> list[bool]:
        """Which inputs' gradients are wanted, whatever for."""
        return [_is_executed(node) is not False for node in self._inputs()]

    def accumulated(self, count: int) -> list[bool]:
        """Which of the first ``count`` inputs, all leaves, are about to be accumulated into."""
        return [_is_executed(node) is True for node in self._inputs()[:count]]

    def _inputs(self) -> list[Any]:
        return [node for node, _ in self._node.next_functions[1:]]


def _is_executed(node: Any) -> bool | None:
    """Whether the engine goes to this node; None where it stops there, as ``torch.autograd.grad`` wants that leaf's."""
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return None

"""The nodes that stand in the user's graph for a bridge, and what the engine asks of its backward.

That is gradients of all its inputs, or of some.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torchtower.bridge.graphs import is_leaf
from torchtower.bridge.hooks import spare_hooks_of_outputs
from torchtower.reduction import Grad

_autograd: Any = torch._C._autograd


def _make_ticket() -> tuple[Tensor, Any]:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.empty(0, requires_grad=True, device="cpu")
        return leaf, get_gradient_edge(leaf).node


# A leaf without elements that is the first input of every node. It requires grad, since what towers return may need
# gradients where no input does; and nobody but us can ask for its gradient by name.
_ticket, _ticket_node = _make_ticket()


def connect(
    backward: Callable[[Asked, Sequence[Grad]], list[Grad]],
    inputs: Sequence[Tensor],
    values: Sequence[Grad],
) -> tuple[Tensor, ...]:
    """Give values without graphs a place in the user's graph, behind ``inputs``, in whatever grad mode.

    Args:
        backward: makes of what is asked and the values' gradients the inputs' gradients.
        inputs: of the node.
        values: which become its outputs.
    """
    connected: tuple[Tensor, ...]
    if torch.is_grad_enabled():
        connected = _apply(backward, values, _ticket, *inputs)
    else:
        with torch.enable_grad():
            connected = _apply(backward, values, _ticket, *inputs)
    if len(connected) > 1:
        spare_hooks_of_outputs(connected)
    return connected


def if_needed(tensor: Tensor, *, is_held: bool) -> Tensor:
    """Stand for a tensor with a graph of the user's in which a backward goes on only if a gradient comes for it.

    As in the plain module where an autograd function goes backward by itself, ``torch.autograd.grad`` knows of none of
    that graph.

    Args:
        tensor: of the user's.
        is_held: by an attribute, and lives no longer than that lets it: what each step leaves for the next would have
            all steps' graphs behind it.
    """
    with torch.enable_grad():
        stand_in: Tensor = _IfNeeded.apply([tensor], is_held, _ticket)  # type: ignore[no-untyped-call]
    return stand_in


class _IfNeeded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, holder: list[Tensor], is_held: bool, ticket: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        (tensor,) = holder  # in a list the engine knows nothing of it
        ctx.tensor = weakref.ref(tensor) if is_held else lambda: tensor
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Grad) -> Any:
        (grad,) = grads
        if grad is not None:
            tensor = ctx.tensor()
            if tensor is None:
                raise RuntimeError(
                    "TowerParallel: expected what an attribute held, and the forward has replaced, to be given to "
                    "autograd functions as an argument, but one (a reentrant checkpoint, say) went backward to it by "
                    "itself, and that gradient would be lost"
                )
            keep = _autograd._get_current_graph_task_keep_graph()
            torch.autograd.backward(tensor, grad, retain_graph=keep, create_graph=torch.is_grad_enabled())
        return None, None, None


def is_connected(tensor: Tensor) -> bool:
    """Whether a tensor came out of such a node: an output of a wrapper, or what its forward has left behind."""
    return type(tensor.grad_fn).__name__ == "_BridgeNodeBackward"


class _BridgeNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backward: Any, values: Sequence[Grad], ticket: Tensor, *inputs: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.to_inputs = backward
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grads: Grad) -> Any:
        return (None, None, None, *ctx.to_inputs(Asked(ctx), grads))


# Without what `torch.autograd.Function.apply` does for functorch's transforms, within which no towers run.
_apply: Any = super(torch.autograd.Function, _BridgeNode).apply


class Asked:
    """Of which of a node's inputs the running backward wants gradients.

    A plain ``backward()`` wants them all. ``torch.autograd.grad`` and ``backward(inputs=...)`` want some, and as in the
    plain module no other branch of the graph is worth a computation, nor may fail.

    Args:
        node: whose first input is the ticket.
    """

    def __init__(self, node: Any) -> None:
        self._node = node
        self.all = _is_executed(_ticket_node) is True

    def flags(self) -> list[bool]:
        """Which inputs' gradients are wanted, whatever for."""
        return [_is_executed(node) is not False for node in self._inputs()]

    def accumulated(self, count: int) -> list[bool]:
        """Which of the first ``count`` inputs are about to be accumulated into: leaves that are not frozen by now."""
        nodes = self._inputs()[:count]
        return [is_leaf(node) and node.variable.requires_grad and _is_executed(node) is True for node in nodes]

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

"""One tower's local graph, and the backward through it that is run in that tower's thread."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torchtower.averaging import Grad
from torchtower.collect import Sender

_engine: Any = torch.autograd.Variable._execution_engine


class Root(NamedTuple):
    """An output of a tower's graph, where a backward begins: without its memory, which the joined output has too."""

    edge: GradientEdge
    device: torch.device


def root_of(output: Grad) -> Root | None:
    """None where nothing can go backward."""
    if output is None or not output.requires_grad:
        return None
    return Root(get_gradient_edge(output), output.device)


class _Local:
    """What a backward of either kind starts from.

    Args:
        roots: of the tower's graph.
        grads: of these roots; None where none is given.
        leaves: of the tower's graph.
        wanted: of which leaves gradients are wanted; of a whole backward's, which required them when the forward ran.
        keep_graph: whether the graph may be walked again.
    """

    def __init__(
        self,
        roots: list[Root | None],
        grads: list[Grad],
        leaves: list[Grad],
        wanted: list[bool],
        keep_graph: bool,
    ) -> None:
        self._pairs = [
            (root.edge, grad) for root, grad in zip(roots, grads, strict=True) if root is not None and grad is not None
        ]
        self._leaves = leaves
        self._wanted = wanted
        self._keep_graph = keep_graph

    @contextmanager
    def _requiring_grad(self, flags: list[bool]) -> Iterator[None]:
        """Within this context leaves have these flags; the user may have frozen or thawed parameters since."""
        now = requires_grad(self._leaves)
        try:
            _set_requires_grad(self._leaves, now, flags)
            yield
        finally:
            _set_requires_grad(self._leaves, flags, now)


class LocalBackward(_Local):
    """A first-order backward, into the tower's leaves.

    Args:
        roots: as of `_Local`, and so are the next four.
        grads: see ``roots``.
        leaves: see ``roots``.
        wanted: see ``roots``.
        keep_graph: see ``roots``.
        sender: what hears of the gradients as they appear, where they must travel.
    """

    def __init__(
        self,
        roots: list[Root | None],
        grads: list[Grad],
        leaves: list[Grad],
        wanted: list[bool],
        keep_graph: bool,
        sender: Sender | None,
    ) -> None:
        super().__init__(roots, grads, leaves, wanted, keep_graph)
        self._sender = sender

    def __call__(self) -> list[Grad]:
        """Go backward; return each leaf's gradient, and leave none in the leaves."""
        if not self._pairs:
            return [None] * len(self._leaves)
        roots, grads = zip(*self._pairs, strict=True)
        # The node runs in the engine's thread of the main device; with that engine's threads the main tower's graph
        # would wait for the very thread that waits for it.
        with torch.autograd.set_multithreading_enabled(False), self._requiring_grad(self._wanted):
            try:
                with nullcontext() if self._sender is None else self._sender.watching():
                    # What torch.autograd.backward looks at first (20 µs a tower) the engine has looked at already.
                    _engine.run_backward(
                        roots, grads, self._keep_graph, False, (), allow_unreachable=True, accumulate_grad=True
                    )
                return [None if leaf is None else leaf.grad for leaf in self._leaves]
            finally:
                for leaf in self._leaves:
                    if leaf is not None:
                        leaf.grad = None


class LocalGrad(_Local):
    """A backward that gives gradients instead of accumulating them: of some leaves, or with graphs of their own."""

    def __call__(self) -> list[Grad]:
        """Go backward; return each wanted leaf's gradient, with its graph where grad mode is on."""
        results: list[Grad] = [None] * len(self._leaves)
        leaves = zip(self._leaves, self._wanted, strict=True)
        wanted = {index: leaf for index, (leaf, flag) in enumerate(leaves) if flag and leaf is not None}
        if self._pairs and wanted:
            roots, grads = zip(*self._pairs, strict=True)
            flags = [flag or now for flag, now in zip(self._wanted, requires_grad(self._leaves), strict=True)]
            with torch.autograd.set_multithreading_enabled(False), self._requiring_grad(flags):
                found = torch.autograd.grad(
                    roots,
                    list(wanted.values()),
                    grads,
                    retain_graph=self._keep_graph,
                    create_graph=torch.is_grad_enabled(),
                    allow_unused=True,
                )
            for index, grad in zip(wanted, found, strict=True):
                results[index] = grad
        return results


def writable(leaf: Tensor) -> Tensor:
    """The same tensor, but no leaf: autograd refuses to let a forward write into a leaf that needs gradients."""
    result: Tensor = _Writable.apply(leaf)  # type: ignore[no-untyped-call]
    return result


def is_untouched(tensor: Tensor) -> bool:
    """Whether what `writable` returned has been written into by nothing that autograd knows of."""
    return type(tensor.grad_fn).__name__ == "_WritableBackward"


class _Writable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


def is_bridged(tensor: Tensor) -> bool:
    """Whether a tensor came out of a bridge itself: an output of a wrapper, or what its forward has left behind."""
    return type(tensor.grad_fn).__name__ == "_BridgeNodeBackward"


def leaves_of(outputs: Iterable[Grad]) -> Iterator[Tensor]:
    """The leaves that a backward from ``outputs`` accumulates into."""
    for node in _walk(outputs, stops=()):
        if _is_leaf(node):
            yield node.variable


def towers_behind(tensors: Iterable[Tensor], tower_of: dict[int, int], known: dict[Any, set[int]]) -> set[int]:
    """Whose leaves a backward from ``tensors`` would reach.

    Args:
        tensors: with graphs.
        tower_of: each leaf's tower, by its id.
        known: what was found behind nodes by earlier calls; added to where it is one tower's, so that many tensors of
            one graph cost one walk.
    """
    new: list[Any] = []
    towers: set[int] = set()
    for node in _walk(tensors, stops=known):
        if node in known:
            towers |= known[node]
            continue
        new.append(node)
        if _is_leaf(node) and id(node.variable) in tower_of:
            towers.add(tower_of[id(node.variable)])
    if len(towers) < 2:  # else one node's are not another's
        known.update((node, towers) for node in new)
    return towers


def _walk(tensors: Iterable[Grad], stops: Container[Any]) -> Iterator[Any]:
    """Each node of the graph behind ``tensors``, once; what lies behind ``stops`` is left out."""
    pending: list[Any] = [tensor.grad_fn for tensor in tensors if tensor is not None]
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if node not in stops:
            pending.extend(following for following, _ in node.next_functions)


def _is_leaf(node: Any) -> bool:
    return type(node).__name__ == "AccumulateGrad"  # an autograd function may have a variable, too


def requires_grad(leaves: list[Grad]) -> list[bool]:
    """Of each leaf whether it does now; False where there is none."""
    return [leaf is not None and leaf.requires_grad for leaf in leaves]


def _set_requires_grad(leaves: list[Grad], before: list[bool], after: list[bool]) -> None:
    if before == after:  # nearly always
        return
    for leaf, old, new in zip(leaves, before, after, strict=True):
        if leaf is not None and old is not new:
            leaf.requires_grad_(new)

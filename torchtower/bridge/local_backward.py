"""The backward through one tower's local graph, run in that tower's thread."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torchtower.bridge.collect import Sender
from torchtower.bridge.graphs import is_cut_off, requires_grad
from torchtower.reduction import Grad

_engine: Any = torch.autograd.Variable._execution_engine
# Stands where a tower has no leaf: nothing ever goes backward to it.
NO_LEAF = torch.empty(0)


class Root(NamedTuple):
    """An output of a tower's graph, where a backward begins: without its memory, which the joined output has too."""

    edge: GradientEdge
    device: torch.device


def root_of(output: Grad) -> Root | None:
    """None where nothing can go backward."""
    if output is None or not output.requires_grad:
        return None
    node = output.grad_fn
    if node is None and is_cut_off(output):
        return None
    if node is None or isinstance(node, torch._C._FunctionBase):  # a leaf; a node that its Python object does not keep
        return Root(get_gradient_edge(output), output.device)
    return Root(GradientEdge(node, output.output_nr), output.device)


def local_backward(
    roots: Sequence[Root | None],
    grads: Sequence[Grad],
    leaves: Sequence[Tensor],
    wanted: Sequence[bool],
    keep_graph: bool,
    sender: Sender | None,
) -> list[Grad]:
    """Go backward at first order, into the leaves.

    Args:
        roots: of the tower's graph.
        grads: of these roots; None where none is given.
        leaves: of the tower's graph.
        wanted: which of them required gradients when the forward ran.
        keep_graph: whether the graph may be walked again.
        sender: what hears of the gradients as they appear, where they must travel.

    Returns:
        Each leaf's gradient; none is left in the leaves.
    """
    edges, given = _given(roots, grads)
    if not edges:
        return [None] * len(leaves)
    now = requires_grad(leaves)
    try:
        _set_requires_grad(leaves, now, wanted)
        if sender is not None:
            sender.watch()
        # What torch.autograd.backward looks at first (20 µs a tower) the engine has looked at already.
        _engine.run_backward(edges, given, keep_graph, False, (), allow_unreachable=True, accumulate_grad=True)
        return list(map(attrgetter("grad"), leaves))
    finally:
        for leaf in leaves:
            leaf.grad = None
        if sender is not None:
            sender.stop()
        _set_requires_grad(leaves, wanted, now)


def local_grad(
    roots: Sequence[Root | None],
    grads: Sequence[Grad],
    leaves: Sequence[Tensor],
    wanted: Sequence[bool],
    keep_graph: bool,
) -> list[Grad]:
    """Go backward to some leaves and accumulate nothing; the gradients have graphs of their own where grad mode is on.

    Args:
        roots: as of `local_backward`.
        grads: likewise.
        leaves: likewise.
        wanted: of which of them gradients are wanted.
        keep_graph: whether the graph may be walked again.

    Returns:
        Each leaf's gradient, None where none is wanted.
    """
    results: list[Grad] = [None] * len(leaves)
    edges, given = _given(roots, grads)
    inputs = {i: leaf for i, (leaf, flag) in enumerate(zip(leaves, wanted, strict=True)) if flag}
    if edges and inputs:
        now = requires_grad(leaves)
        flags = [flag or before for flag, before in zip(wanted, now, strict=True)]
        try:
            _set_requires_grad(leaves, now, flags)
            found = torch.autograd.grad(
                edges,
                list(inputs.values()),
                given,
                retain_graph=keep_graph,
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        finally:
            _set_requires_grad(leaves, flags, now)
        for index, grad in zip(inputs, found, strict=True):
            results[index] = grad
    return results


def _given(roots: Sequence[Root | None], grads: Sequence[Grad]) -> tuple[tuple[GradientEdge, ...], tuple[Tensor, ...]]:
    """Where the backward begins, and with what."""
    pairs = [(r.edge, grad) for r, grad in zip(roots, grads, strict=True) if r is not None and grad is not None]
    edges, given = zip(*pairs, strict=True) if pairs else ((), ())
    return edges, given


def _set_requires_grad(leaves: Sequence[Tensor], before: Sequence[bool], after: Sequence[bool]) -> None:
    """Let leaves require gradients as told: the user may have frozen or thawed parameters since the forward."""
    if before == after:  # nearly always
        return
    for leaf, old, new in zip(leaves, before, after, strict=True):
        if old is not new:
            leaf.requires_grad_(new)

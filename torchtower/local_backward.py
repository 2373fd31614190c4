"""One tower's local graph, and the backward through it that is run in that tower's thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Container, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torchtower.collect import Sender
from torchtower.reduction import Grad

_local = threading.local()
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
    return Root(get_gradient_edge(output), output.device)


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


def make_last_node() -> None:
    """In a thread that has made no graph yet, make the node that `empty_queue` goes to."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros((), requires_grad=True)
        _local.last = leaf.clone(), leaf


def empty_queue() -> None:
    """Drop what a failed backward has left in the queue that the engine keeps for this thread.

    It would hold a graph's memory until the next backward, and a thread that ends lets go of it when Python is through
    with the thread: a process that is just ending would abort.
    """
    # The engine goes from the newest nodes to the oldest, and throws away whatever it meets of backwards that failed.
    last, leaf = _local.last
    torch.autograd.grad(last, leaf, retain_graph=True)


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


def writable(leaf: Tensor) -> Tensor:
    """The same tensor, but no leaf: autograd refuses to let a forward write into a leaf that needs gradients."""
    result: Tensor = _Writable.apply(leaf)  # type: ignore[no-untyped-call]
    node: Any = result.grad_fn
    if node is not None:
        node.output = weakref.ref(result)  # where its hooks are found
    return result


def is_untouched(tensor: Tensor) -> bool:
    """Whether what `writable` returned has been written into by nothing that autograd knows of."""
    return _is_writable(tensor.grad_fn)


class _Writable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # where no gradient comes, there is none
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Grad) -> Any:
        return grads[0]


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


def leads_to(output: Grad, leaves: Iterable[Tensor]) -> bool:
    """Whether a backward from ``output`` would come to all of these, or may."""
    missing = {id(leaf) for leaf in leaves if leaf is not output}
    for node in _walk([output], stops=()):
        if not missing or _is_opaque(node):
            break
        if _is_leaf(node):
            missing.discard(id(node.variable))
    else:
        return not missing
    return True


def branches(columns: Sequence[Sequence[Grad]]) -> list[tuple[list[int], set[int] | None]]:
    """Divide outputs into those whose graphs have no more than leaves in common, so that none frees what another needs.

    Args:
        columns: every tower's part of each output.

    Returns:
        Of each branch its outputs' indices, and the ids of the leaves behind them; None where that cannot be told.
    """
    owner: dict[Any, int] = {}  # of each node the first output that leads to it
    joined = list(range(len(columns)))  # each output to an earlier one of its branch

    def first(index: int) -> int:
        while joined[index] != index:
            index = joined[index]
        return index

    leaves = [{id(part) for part in column if part is not None and part.grad_fn is None} for column in columns]
    opaque = set()
    for index, column in enumerate(columns):
        new = []
        for node in _walk(column, stops=owner):
            if node in owner:
                joined[first(index)] = first(owner[node])
                continue
            if _is_opaque(node):
                opaque.add(index)
            if _is_leaf(node):
                leaves[index].add(id(node.variable))
            if not _is_end(node):
                new.append(node)
        owner.update(dict.fromkeys(new, index))
    found: dict[int, list[int]] = {}
    for index in range(len(columns)):
        found.setdefault(first(index), []).append(index)
    return [
        (indices, None if opaque.intersection(indices) else set().union(*[leaves[index] for index in indices]))
        for indices in found.values()
    ]


def _is_end(node: Any) -> bool:
    """Whether a node is a leaf's, and may be come to more than once: it saves nothing, and no hook looks at the sum."""
    leaf = node.variable if _is_leaf(node) else node.output() if _is_writable(node) else None
    return leaf is not None and not leaf._backward_hooks


def _is_opaque(node: Any) -> bool:
    """Whether a node may go backward itself, to leaves that no edge tells of: a reentrant checkpoint does."""
    return isinstance(node, torch._C._FunctionBase) and not _is_writable(node)


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


def _is_writable(node: Any) -> bool:
    return type(node).__name__ == "_WritableBackward"


def requires_grad(leaves: Iterable[Tensor]) -> list[bool]:
    """Of each leaf whether it does now."""
    return list(map(attrgetter("requires_grad"), leaves))


def _set_requires_grad(leaves: Sequence[Tensor], before: Sequence[bool], after: Sequence[bool]) -> None:
    """Let leaves require gradients as told: the user may have frozen or thawed parameters since the forward."""
    if before == after:  # nearly always
        return
    for leaf, old, new in zip(leaves, before, after, strict=True):
        if old is not new:
            leaf.requires_grad_(new)

"""Towers' graphs, apart from going backward: how their leaves become inputs, and what outputs depend on."""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchtower.reduction import Grad


def writable(leaf: Tensor) -> Tensor:
    """The same tensor, but no leaf: autograd refuses to let a forward write into a leaf that needs gradients."""
    result: Any = _Writable.apply(leaf)  # type: ignore[no-untyped-call]
    result.grad_fn.output = weakref.ref(result)  # where its hooks are found
    written: Tensor = result
    return written


def graph_of(tensor: Tensor) -> Any:
    """The node that a tensor came out of; None of one without a graph, and of one whose graph torch refuses to tell.

    That is a view that was made under ``no_grad``, or one of several at once, of what has been written to since, or a
    tensor of a transform of `torch.func`. It is of no use to anybody any more, but a module may hold it still.
    """
    try:
        return None if is_wrapped(tensor) else tensor.grad_fn
    except RuntimeError:
        return None


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor is one of a transform's of `torch.func`; without memory of its own."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped


def is_cut_off(tensor: Tensor) -> bool:
    """Whether a tensor without a graph requires grad as a view of what does (made under ``no_grad``), not by itself."""
    if not (tensor._is_view() and tensor._base.requires_grad):  # type: ignore[union-attr]
        return False
    try:
        with torch.enable_grad():
            node: Any = tensor.view_as(tensor).grad_fn
    except RuntimeError:  # see `graph_of`
        return True
    return node.next_functions[0][0] is None


def requires_grad(leaves: Iterable[Tensor]) -> list[bool]:
    """Of each leaf whether it does now."""
    return list(map(attrgetter("requires_grad"), leaves))


def held_as_is(tensor: Tensor) -> Tensor:
    """A tensor with the graph that this one has now, whatever is written into it later; a leaf itself."""
    if tensor.grad_fn is None:
        return tensor
    held: Any = writable(tensor)
    held.held_for = weakref.ref(tensor)
    source: Tensor = held
    return source


def is_untouched(tensor: Tensor) -> bool:
    """Whether what `writable` returned has been written into by nothing that autograd knows of."""
    return _is_writable(tensor.grad_fn)


def is_one_step_away(tensor: Tensor) -> bool:
    """Whether autograd knows of a single operation on what `writable` returned."""
    following = () if tensor.grad_fn is None else tensor.grad_fn.next_functions
    return len(following) == 1 and _is_writable(following[0][0])


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
        if is_leaf(node):
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
        if is_leaf(node):
            if id(node.variable) not in tower_of:  # trained outside of the module, by every tower
                continue
            towers.add(tower_of[id(node.variable)])
        new.append(node)
    if len(towers) < 2:  # else one node's are not another's
        known.update((node, towers) for node in new)
    return towers


def leads_to(output: Grad, leaves: Iterable[Tensor]) -> bool:
    """Whether a backward from ``output`` would come to all of these.

    Args:
        output: of a tower.
        leaves: of that tower.
    """
    missing = {id(leaf) for leaf in leaves if leaf is not output}
    for node in _walk([output], stops=()):
        if is_leaf(node):
            missing.discard(id(node.variable))
        if not missing:
            return True
    return not missing


class Branch(NamedTuple):
    """Some outputs of towers' graphs.

    Args:
        outputs: their indices.
        leaves: the ids of the leaves behind them, as far as can be told.
        is_opaque: whether there may be others.
    """

    outputs: list[int]
    leaves: set[int]
    is_opaque: bool


def branches(columns: Sequence[Sequence[Grad]]) -> list[Branch]:
    """Divide outputs into those whose graphs have no more than leaves in common, so that none frees what another needs.

    Args:
        columns: every tower's part of each output.
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
            if is_leaf(node):
                leaves[index].add(id(node.variable))
            elif _is_opaque(node):
                opaque.add(index)
            if not _is_end(node):
                new.append(node)
        owner.update(dict.fromkeys(new, index))
    found: dict[int, list[int]] = {}
    for index in range(len(columns)):
        found.setdefault(first(index), []).append(index)
    return [
        Branch(indices, set().union(*[leaves[index] for index in indices]), not opaque.isdisjoint(indices))
        for indices in found.values()
    ]


def _is_end(node: Any) -> bool:
    """Whether a node is a leaf's, and may be come to more than once: it saves nothing, and no hook looks at the sum."""
    if is_leaf(node):
        leaf = node.variable
    elif _is_writable(node):
        leaf = node.output()
    else:
        return False
    return leaf is not None and not leaf._backward_hooks


def _is_opaque(node: Any) -> bool:
    """Whether a node may go backward itself, to leaves that no edge tells of: a reentrant checkpoint does."""
    # A full backward hook's node only passes on what comes.
    is_hook = type(node).__name__ == "BackwardHookFunctionBackward"
    return isinstance(node, torch._C._FunctionBase) and not _is_writable(node) and not is_hook


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
            pending += [following for following, _ in node.next_functions]


def is_leaf(node: Any) -> bool:
    """Whether a node accumulates into a leaf, its ``variable``."""
    return type(node).__name__ == "AccumulateGrad"  # an autograd function may have a variable, too


def _is_writable(node: Any) -> bool:
    return type(node).__name__ == "_WritableBackward"

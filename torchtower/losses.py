"""What a loss function returns in each tower: refused if it is not what was meant, else averaged."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchtower.averaging import normalized_weights, real_number
from torchtower.batch_norm import silenced
from torchtower.bridge.graphs import leaves_of
from torchtower.bridge.ports import Port
from torchtower.forward_result import ForwardResult


def loss_and_weight(output: Any, tower: int) -> tuple[Tensor, float | None]:
    """The loss, 0-d, and its weight, None where none is given.

    Raises:
        ValueError: ``output`` is no floating tensor of one element, nor such a loss and a second value.
        TypeError: the second value is no number, nor a tensor or array of one.
    """
    loss, weight = output if isinstance(output, (tuple, list)) and len(output) == 2 else (output, None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not (loss.is_floating_point() or loss.is_complex()):
        got = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            "TowerParallel.tower_loss: expected loss_fn to return a floating tensor of one element, or such a loss and "
            f"its weight, but tower {tower}'s returned {got}"
        )
    number = None if weight is None else real_number(weight)
    if weight is not None and number is None:
        shape = f" of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
        raise TypeError(
            "TowerParallel.tower_loss: expected the second value that loss_fn returns to be a number, the tower's "
            f"weight in the mean over towers, but tower {tower}'s is a {type(weight).__name__}{shape}; return the loss "
            "alone, and put what else is wanted into a dict of yours by torchtower.current_tower()"
        )
    return loss.reshape(()) if loss.dim() else loss, number  # a view would cost the graph a node more


def check_alike(pairs: list[tuple[Tensor, float | None]]) -> None:
    """See that the towers' losses and weights can be averaged.

    Raises:
        ValueError: losses of several dtypes, or a weight in some towers only.
    """
    (first, weight), *others = pairs
    for tower, (loss, other) in enumerate(others, 1):
        if loss.dtype != first.dtype:
            raise ValueError(
                f"TowerParallel.tower_loss: expected losses of one dtype, {first.dtype} as tower 0's, but tower "
                f"{tower}'s is {loss.dtype}"
            )
        if (other is None) is not (weight is None):
            raise ValueError(
                "TowerParallel.tower_loss: expected loss_fn to return a weight in every tower or in none, but towers 0 "
                f"and {tower} differ"
            )


def mean_over_towers(result: ForwardResult, pairs: list[tuple[Tensor, float | None]], device: torch.device) -> Tensor:
    """The towers' losses averaged, in the user's graph: by their weights, or by rows where they have none.

    Args:
        result: of the forward.
        pairs: each tower's loss and weight.
        device: where the mean goes.
    """
    rows = [float(count) for count in result.rows] if len(pairs) > 1 else [1.0]
    raw = [row if weight is None else weight for row, (_, weight) in zip(rows, pairs, strict=True)]
    weights = normalized_weights(raw, len(pairs), "TowerParallel.tower_loss")
    losses = [loss for loss, _ in pairs]
    if 0 in weights:  # what such a tower has left beside its loss goes backward all the same, with a weight
        stand_in = silenced if result.towers_met else torch.zeros_like
        losses = [loss if weight else stand_in(loss) for loss, weight in zip(losses, weights, strict=True)]
        weights = [weight or max(weights) for weight in weights]
    (mean,) = result.connect(weights, [Port("shared", device)], [losses])
    assert mean is not None
    return mean


def warn_of_backward() -> None:
    """Warn of a loss function that goes backward itself, as a training step put into it as a whole does."""
    warnings.warn(
        "TowerParallel.tower_loss: loss_fn went backward in the towers: these gradients reach the parameters when the "
        "call ends, summed over towers, not averaged, and an optimizer's step within loss_fn finds none of them; "
        "return the loss, and call backward() of what tower_loss returns and the optimizer's step() outside",
        stacklevel=4,
    )


def check_leads_to_replicas(
    loss_fn: Callable[..., Any],
    loss: Tensor,
    module: nn.Module,
    replica_leaves: Sequence[Tensor],
    checked: weakref.WeakSet[Any],
) -> None:
    """See at a function's first loss with a graph that it leads to replicas, not to the module itself.

    Warns of trainable parameters beside the module's: a generator's loss leads to the discriminator's, whose gradients
    nobody wants, but a loss with parameters of its own would be trained wrongly.

    Args:
        loss_fn: the function.
        loss: what it has returned in the main tower.
        module: the user's.
        replica_leaves: of the main tower's replica.
        checked: remembers the functions that have passed, by their code, which lambdas made anew at each step share.

    Raises:
        ValueError: the loss depends on the module's own parameters.
    """
    function: Any = loss_fn
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", type(function))
    if code in checked or not loss.requires_grad:
        return
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    known = set(map(id, replica_leaves))
    strange = []
    for leaf in leaves_of([loss]):
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            strange.append(leaf)
        if id(leaf) in names:
            raise ValueError(
                "TowerParallel.tower_loss: expected loss_fn to use the replica that it is given, but its loss "
                f"depends on the module's own parameter '{names[id(leaf)]}', whose gradient would count in every "
                "tower anew; where loss_fn does use it, the module has a way back to itself that replicas cannot "
                "follow (docs/drop-in.md)"
            )
    if strange:
        warnings.warn(
            f"TowerParallel.tower_loss: loss_fn leads to {len(strange)} trainable parameters that are not the "
            f"module's, one of shape {tuple(strange[0].shape)}: every tower adds the gradient of its own loss to them, "
            "which makes the number of towers times the mean, or fails where they share a graph that was there before "
            "the call (RuntimeError: backward through the graph a second time); put into the module what is to be "
            "trained, and what was computed into one of its attributes",
            stacklevel=4,
        )
    checked.add(code)

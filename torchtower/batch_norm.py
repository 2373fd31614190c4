"""Batch normalisation over the whole batch, whatever part of it each tower has."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from torchtower.bridge.ports import without_graph
from torchtower.replicas.original import is_lazy_module
from torchtower.threads.forward_mode import has_turn
from torchtower.threads.rounds import current_tower, exchange, weight_of_tower


def tower_sum(value: Tensor) -> Tensor:
    """Sum a tensor over all towers of the current forward; every tower gets the sum. Differentiable at any order.

    Every tower must call it, equally often: it waits for the others. Outside of towers it returns ``value`` itself.

    Args:
        value: this tower's summand, of one shape and dtype in all towers.

    Shape:
        That of ``value``, which has no tower dimension.

    Returns:
        The sum in tower order, of the same bits in every tower, on this tower's device.

    Raises:
        RuntimeError: some tower finished its forward without calling; forward-mode differentiation is under way here.
        ValueError: tensors that differ in shape or dtype.
        TypeError: something that is no tensor.

    Example:
        >>> tower_sum(torch.tensor(3.0))
        tensor(3.)

    Source:
        The all-reduce of ``torch.nn.SyncBatchNorm``, between threads of one process.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"tower_sum: expected a tensor, but got {type(value).__name__}")
    if current_tower() is None:
        return value
    total: Tensor = _TowerSum.apply(value, False)  # type: ignore[no-untyped-call]
    return total


class _TowerSum(torch.autograd.Function):
    # A tower goes backward from its own loss, unweighted, and its gradients are weighted afterwards (see bridge). What
    # comes back to this tower is other towers' loss, too: weighted as theirs, and by this tower's weight undone. That
    # is linear again; its own backward, in the same unweighted terms, is the plain sum.
    @staticmethod
    def forward(value: Tensor, weighted: bool) -> Tensor:  # apart from its context, as torch.func asks
        if has_turn():
            raise RuntimeError(
                "tower_sum: expected to be called (as by a synchronised BatchNorm) outside of forward-mode "
                "differentiation, which one tower does at a time"
            )
        weight = weight_of_tower() if weighted else None
        summand = without_graph(value)
        # A copy: its tower may go on and write to it before the others have read it.
        first, *others = exchange(summand.clone() if weight in (None, 1) else summand * weight)
        total: Tensor = first.to(value.device, copy=True)
        for tower, other in enumerate(others, 1):
            if other.shape != first.shape or other.dtype != first.dtype:
                raise ValueError(
                    "tower_sum: expected tensors of one shape and dtype in all towers, but tower 0's is "
                    f"{tuple(first.shape)} of {first.dtype} and tower {tower}'s {tuple(other.shape)} of {other.dtype}"
                )
            total += other.to(value.device)
        return total / weight if weight else total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        ctx.weighted = inputs[1] and weight_of_tower() is not None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], value: Tensor, weighted: bool) -> Any:
        return _TowerSum.apply(value, weighted), in_dims[0]  # type: ignore[no-untyped-call]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _TowerSum.apply(grad, not ctx.weighted), None  # type: ignore[no-untyped-call]


def warn_of_process_norms(module: nn.Module) -> None:
    """Say that torch's own synchronised normalisation, which a program for DDP has put in, is between processes."""
    if any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        warnings.warn(
            "TowerParallel: nn.SyncBatchNorm synchronises processes, so every tower will normalise by its own rows; "
            "torchtower.convert_sync_batchnorm(module) makes layers of it that synchronise towers",
            stacklevel=3,
        )


class _Silenced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return torch.zeros_like(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return torch.zeros_like(grads[0])


def silenced(loss: Tensor) -> Tensor:
    """A loss of 0 with gradients of 0 that still goes backward.

    For a tower of weight 0 whose values other towers have used: its own loss counts for nothing, be it NaN, yet what
    comes back to it through `tower_sum` is the others' loss and does count.
    """
    zero: Tensor = _Silenced.apply(loss)  # type: ignore[no-untyped-call]
    return zero


class TowerBatchNorm(_BatchNorm):
    """Batch normalisation with the statistics of the whole batch: mean and variance over all towers' rows.

    Made by `convert_sync_batchnorm`. In training, and wherever batch statistics are used, towers wait for each other in
    its forward and in its backward. Outside of towers, and in evaluation, it is what ``nn.BatchNorm2d`` is.

    Shape:
        ``(N, C, ...)`` in and out, of any number of further dimensions.

    Source:
        ``torch.nn.SyncBatchNorm``, which needs one process a device and an accelerator.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"TowerBatchNorm: expected an input of at least 2 dimensions, but got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input``, this tower's rows, by the statistics of all towers' rows."""
        uses_batch = self.training or self.running_mean is None
        if current_tower() is None or not uses_batch:
            plain: Tensor = super().forward(input)
            return plain
        self._check_input_dim(input)
        dims = [dim for dim in range(input.dim()) if dim != 1]
        rows = input.new_tensor(float(input.numel() // max(1, input.shape[1])), dtype=torch.float64)
        # If some tower's input needs a gradient, all must come to the exchanges of the backward.
        needs = rows.new_tensor(float(torch.is_grad_enabled() and input.requires_grad))
        count, num_needing = tower_sum(torch.stack([rows, needs])).tolist()
        if count == 0:  # an empty batch, as nn.BatchNorm takes it
            nothing: Tensor = super().forward(input)
            return nothing
        if count == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got {count:.0f} over all towers")
        # Half types lose too much in sums over a whole batch.
        wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        if num_needing and not wide.requires_grad:
            wide = wide + wide.new_zeros(()).requires_grad_()
        mean = tower_sum(wide.sum(dims)) / count
        centred = wide - _along_channels(mean, input)
        variance = tower_sum(centred.square().sum(dims)) / count
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        normal = centred * _along_channels(torch.rsqrt(variance + self.eps), input)
        if self.weight is not None:
            normal = normal * _along_channels(self.weight, input)
        if self.bias is not None:
            normal = normal + _along_channels(self.bias, input)
        return normal.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        tracks = self.training and self.track_running_stats
        if not tracks or self.running_mean is None or self.running_var is None:
            return
        with torch.no_grad():
            momentum = self.momentum
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if momentum is None:  # the cumulative average
                    momentum = 1.0 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum or 0.0)
            self.running_var.lerp_(variance.to(self.running_var.dtype), momentum or 0.0)


def _along_channels(value: Tensor, input: Tensor) -> Tensor:
    return value.view(1, -1, *[1] * (input.dim() - 2))


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every batch normalisation in ``module`` by one over all towers, keeping parameters and statistics.

    Args:
        module: changed in place below its root; parameters and buffers stay the same tensors.

    Returns:
        ``module``, or its replacement where it is itself a batch normalisation. A warning tells of subclasses with a
        forward of their own, which is lost, as torch's conversion loses it.

    Raises:
        TypeError: something that is no module.
        ValueError: a lazy batch normalisation, which has no parameters yet.

    Example:
        >>> net = convert_sync_batchnorm(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)))
        >>> type(net[1]).__name__
        'TowerBatchNorm'

    Source:
        ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert_sync_batchnorm: expected an nn.Module, but got {type(module).__name__}")
    done: dict[nn.Module, nn.Module] = {}
    result = _convert(module, done)
    replaced = [before for before, after in done.items() if after is not before]
    lost = {type(norm).__name__ for norm in replaced if not norm.forward.__module__.startswith("torch.nn.modules.")}
    if lost:
        warnings.warn(
            f"convert_sync_batchnorm: the forward of {', '.join(sorted(lost))} is lost; what has taken its place "
            "normalises, and does nothing else",
            stacklevel=2,
        )
    return result


def _convert(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:  # it has several places
        return done[module]
    converted = done[module] = _converted(module) if isinstance(module, _BatchNorm) else module
    for name, child in module._modules.items():
        if child is not None:
            setattr(converted, name, _convert(child, done))
    return converted


def _converted(module: _BatchNorm) -> nn.Module:
    if isinstance(module, TowerBatchNorm):
        return module
    if is_lazy_module(module):
        raise ValueError(
            f"convert_sync_batchnorm: expected every parameter to have a shape, but {type(module).__name__} is lazy; "
            "run one batch through the module first"
        )
    converted = TowerBatchNorm(module.num_features, affine=False, track_running_stats=False)
    held = {name: value for name, value in module.__dict__.items() if name not in _LEFT_OUT}
    # Hooks stay in the dicts that their handles know; of parameters, buffers and children each has a list of its own.
    converted.__dict__.update({**held, **{name: held[name].copy() for name in _OWN}})
    if parametrize.is_parametrized(module):
        parametrized: Any = parametrize
        parametrized._inject_new_class(converted)
        for name in module.parametrizations:  # type: ignore[union-attr]
            parametrized._inject_property(converted, name)
    return converted


_OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_LEFT_OUT = ("forward", "_compiled_call_impl", "process_group")  # made for the module that is replaced

"""The steps of nn.DataParallel's forward, for programs that call them one by one or in a forward of their own.

TowerParallel's own forward takes none of them: a subclass that overrides a step alone would be ignored, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchtower.devices import move, parse_output_device
from torchtower.gather import Column, cat_rows, gather_structure
from torchtower.nested import map_tensors, tensors_in
from torchtower.scatter import Splits, plan_splits

Module = TypeVar("Module", bound=nn.Module)


class Steps(nn.DataParallel[Module]):
    """nn.DataParallel with steps that take CPU towers, too; all of them let gradients through."""

    devices: tuple[torch.device, ...]

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> tuple[tuple[Any, ...], tuple[dict[str, Any], ...]]:
        """Cut a batch as TowerParallel's forward does; see ``nn.DataParallel.scatter``.

        Returns:
            One tuple of inputs and one dict of keyword inputs for each tower that gets rows. Gradients flow back.
        """
        batch = (inputs, {} if kwargs is None else kwargs)
        splits = plan_splits(tensors_in(batch), len(device_ids), self.dim)

        def shard(tower: int) -> Any:
            return map_tensors(lambda tensor: _part(splits, tensor, tower, self.devices[tower]), batch)

        shards = [shard(tower) for tower in range(len(splits.rows))]
        return tuple(tuple(args) for args, _ in shards), tuple(kwargs for _, kwargs in shards)

    def replicate(self, module: Module, device_ids: Any) -> list[Module]:
        """Make replicas for `parallel_apply`; see ``nn.DataParallel.replicate``. On a CPU the module itself."""
        return [module] * len(device_ids) if self.devices[0].type == "cpu" else super().replicate(module, device_ids)

    def parallel_apply(self, replicas: Sequence[Any], inputs: Sequence[Any], kwargs: Any) -> list[Any]:
        """Call replicas on their inputs; see ``nn.DataParallel.parallel_apply``. On a CPU one after the other."""
        if self.devices[0].type != "cpu":
            return list(super().parallel_apply(replicas, inputs, kwargs))
        given = kwargs or [{}] * len(inputs)
        return [
            replica(*(args if isinstance(args, (tuple, list)) else (args,)), **options)
            for replica, args, options in zip(replicas, inputs, given, strict=True)
        ]

    def gather(self, outputs: Sequence[Any], output_device: Any) -> Any:
        """Join outputs as TowerParallel's forward does; see ``nn.DataParallel.gather``."""
        device = parse_output_device(output_device)

        def join(columns: list[Column]) -> list[Tensor]:
            return [cat_rows([move(part, device) for part in parts], self.dim) for _, parts in columns]

        return gather_structure(outputs, join)

    def _check_steps(self, forward: Any) -> None:
        """Refuse a subclass that overrides a step, but not ``forward``, which would never call it."""
        steps = ("scatter", "replicate", "parallel_apply", "gather")
        overridden = [name for name in steps if getattr(type(self), name) is not getattr(Steps, name)]
        if overridden and type(self).forward is forward:
            raise TypeError(
                f"{type(self).__name__}: expected a subclass that overrides {overridden[0]} to override forward, too, "
                "since TowerParallel's forward calls none of nn.DataParallel's steps"
            )


def _part(splits: Splits, tensor: Tensor, tower: int, device: torch.device) -> Tensor:
    parts = splits.parts(tensor)
    return move(tensor if parts is None else parts[tower], device)

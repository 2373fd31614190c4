"""The steps of nn.DataParallel's forward, for programs that call them one by one, or have some of their own.

Where a subclass has a ``scatter`` or ``gather`` of its own, TowerParallel's forward calls it. What ``replicate`` and
``parallel_apply`` do, towers do in their own way: a subclass that overrides these alone is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from torchtower.batches.gather import Column, cat_rows, gather_structure
from torchtower.batches.nested import map_tensors, tensors_in
from torchtower.batches.scatter import Splits, plan_splits
from torchtower.devices import move, parse_device_ids, parse_output_device
from torchtower.replicas.scripted import is_optimized, is_scripted

Module = TypeVar("Module", bound=nn.Module)


class Steps(nn.DataParallel[Module]):
    """nn.DataParallel with steps that take CPU towers, too; all of them let gradients through."""

    if TYPE_CHECKING:  # torch.jit.script, which refuses wrappers, would stop at this in words of no use
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
        """Make replicas for `parallel_apply`; see ``nn.DataParallel.replicate``.

        Those on the module's device have its own parameters, others copies that lead back to these. The first has its
        buffers, the others copies, and what a forward assigns to attributes is lost. On CUDA they are torch's own.
        """
        main = self.devices[0]
        if main.type == "cuda":
            return super().replicate(module, device_ids)
        devices = [main] * len(device_ids) if main.type == "cpu" else parse_device_ids(device_ids)
        return [_replica_of(module, main, device, is_main=index == 0) for index, device in enumerate(devices)]

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
        """Refuse a subclass that overrides a step that its forward would never call."""
        for name in ("replicate", "parallel_apply"):
            if self._overrides(name) and type(self).forward is forward:
                raise TypeError(
                    f"{type(self).__name__}: expected a subclass that overrides {name} to override forward, too, since "
                    "TowerParallel's forward keeps its replicas and runs them in threads of their own; it calls no "
                    "step of nn.DataParallel's but scatter and gather (convert_sync_batchnorm synchronises norms)"
                )

    def _overrides(self, step: str) -> bool:
        put_here = self.__dict__.get(step)  # on this very wrapper; a method of the class's is no other step
        found = getattr(type(self), step) if put_here is None else getattr(put_here, "__func__", None)
        return found is not getattr(Steps, step)

    def _scattered(self, inputs: Any, kwargs: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What an own ``scatter`` makes of a batch: each tower's inputs, and its keyword inputs.

        Raises:
            TypeError: that is no pair of lists.
            ValueError: there are more than there are towers, or inputs of some towers and keyword inputs of others.
        """
        scattered = self.scatter(inputs, kwargs, self.device_ids)
        name = f"{type(self).__name__}.scatter"
        try:
            parts, keywords = [[] if side is None else list(side) for side in scattered]
        except (TypeError, ValueError):
            raise TypeError(
                f"{name}: expected to return each tower's inputs and each tower's keyword inputs, two lists, but got "
                f"{type(scattered).__name__}"
            ) from None
        count = len(parts) or len(keywords)
        if count > len(self.devices) or (parts and keywords and len(keywords) != count):
            raise ValueError(
                f"{name}: expected inputs for at most {len(self.devices)} towers, and as many keyword inputs, but got "
                f"{len(parts)} and {len(keywords)}"
            )
        if not count:
            return [((), {})]
        tuples = [tuple(part) if isinstance(part, (tuple, list)) else (part,) for part in parts or [()] * count]
        return list(zip(tuples, keywords or [{}] * count, strict=True))


def _replica_of(module: Module, main: torch.device, device: torch.device, *, is_main: bool) -> Module:
    """A module tree on ``device``, as shallow as nn.DataParallel's; compiled modules stay what they are.

    So do tensors that do not lie on ``main``.
    """
    twins: dict[nn.Module, Any] = {
        each: each if is_scripted(each) or is_optimized(each) else each._replicate_for_data_parallel()
        for each in module.modules()
    }
    pieces: dict[int, Tensor] = {}  # by id: what has two names is one tensor

    def piece_of(tensor: Tensor, is_copied: bool) -> Tensor:
        if tensor.device == main != device:
            return tensor.to(device)
        return tensor.clone() if is_copied else tensor

    for each, twin in twins.items():
        if twin is each:
            continue
        del twin._is_replica  # theirs have no parameters, and libraries that see the mark look elsewhere for them
        twin._modules = {name: twins.get(child) for name, child in each._modules.items()}  # type: ignore[arg-type]
        twin._parameters = each._parameters.copy()
        for held, is_copied in ((twin._parameters, False), (twin._buffers, not is_main)):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = pieces.setdefault(id(tensor), piece_of(tensor, is_copied))
        if isinstance(twin, nn.RNNBase):  # which reads its weights there
            twin._flat_weights = [getattr(twin, name, None) for name in twin._flat_weights_names]
    replica: Module = twins[module]
    return replica


def _part(splits: Splits, tensor: Tensor, tower: int, device: torch.device) -> Tensor:
    parts = splits.parts(tensor)
    return move(tensor if parts is None else parts[tower], device)

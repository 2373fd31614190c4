"""How values cross the autograd bridge; see Note [The bridge]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchtower.batches.gather import cat_rows
from torchtower.devices import move
from torchtower.reduction import Grad, own, weighted_sum


class Port(NamedTuple):
    """How one value crosses the bridge.

    Args:
        kind: ``"shared"``, ``"rows"``, ``"written"`` (rows of the batch that towers have written to: the user's as they
            are, so that a gradient of theirs is to come back unweighted) or ``"solo"``.
        device: where its value on the main side lives.
        sizes: of rows: how many each tower has along ``dim``; None for 0-d tensors, one element a tower.
        dim: of rows.
        tower: of solo: whose it is.
    """

    kind: str
    device: torch.device
    sizes: tuple[int, ...] | None = None
    dim: int = 0
    tower: int = 0

    def written(self) -> Port:
        """The port by which a value that has come in by this one, and been written to, comes out.

        A shared value does so by the same port: only where one tower works alone is it told of such a write.
        """
        return self._replace(kind="written") if self.kind == "rows" else self

    def to_towers(self, value: Tensor, weights: list[float]) -> list[Grad]:
        """The part of ``value`` that each tower gets, still on the main side's device."""
        if self.kind == "shared":
            # A tower may change what it gets, as a hook of a plain module's loss may.
            return [value, *[value.clone() for _ in weights[1:]]]
        if self.kind == "solo":  # undoes the weight that the way back applies: nobody asked for one here
            weight = weights[self.tower]
            return [value / weight if weight and t == self.tower else None for t in range(len(weights))]
        if value.layout is not torch.strided:  # of a lookup in an output, say; no view of it can be a part
            value = value.to_dense()
        if self.sizes is None:
            return list(value.unbind())
        parts = value.split_with_sizes(self.sizes, self.dim)
        if self.kind == "written":  # undoes the weights that the way back applies
            return [part if weight == 1 else part / weight for part, weight in zip(parts, weights, strict=True)]
        return list(parts)


class Ports:
    """Ports side by side, sorted once by what `join` does with them.

    Args:
        ports: one a value.
    """

    def __init__(self, ports: Sequence[Port]) -> None:
        self.all = ports
        self.shared = [index for index, port in enumerate(ports) if port.kind == "shared"]
        self.devices = [ports[index].device for index in self.shared]
        self.is_on_one_device = len(set(self.devices)) == 1
        self.others = [(index, port) for index, port in enumerate(ports) if port.kind != "shared"]


def join(
    ports: Ports,
    local_values: list[list[Grad]],
    weights: list[float],
    *,
    in_place: bool = False,
) -> list[Grad]:
    """Bring the towers' values to the main side; None where no tower has one.

    Args:
        ports: of the values.
        local_values: tower-major, without graphs: these are the bridge's to lead back.
        weights: of the towers.
        in_place: the towers' values may be written to where their memory is nobody else's.
    """
    if ports.shared and not ports.others:
        return _join_shared(ports, local_values, weights, in_place)
    results: list[Grad] = [None] * len(ports.all)
    if ports.shared:  # a call for nothing costs as much as joining a small output
        shared = [[tower[index] for index in ports.shared] for tower in local_values]
        sums = _join_shared(ports, shared, weights, in_place)
        for index, total in zip(ports.shared, sums, strict=True):
            results[index] = total
    for index, port in ports.others:
        if port.kind in ("rows", "written"):
            scale = weights if port.kind == "rows" else [1.0] * len(weights)
            results[index] = _join_rows(port, [tower[index] for tower in local_values], scale, in_place)
        else:
            results[index] = local_values[port.tower][index]
    return results


def without_graph(tensor: Tensor) -> Tensor:
    """The tensor, detached where it needs to be; that it is not elsewhere lets batched gradients through."""
    return tensor.detach() if tensor.requires_grad else tensor


def _join_shared(ports: Ports, local_values: list[list[Grad]], weights: list[float], in_place: bool) -> list[Grad]:
    sums = weighted_sum(local_values, weights, in_place=in_place)
    # All sums lie on one device. If the ports do, too, and that is the same, nothing needs to be moved.
    first = sums[0]
    if ports.is_on_one_device and first is not None and first.device == ports.devices[0]:
        return sums
    return [
        total if total is None or total.device == device else move(total, device)
        for total, device in zip(sums, ports.devices, strict=True)
    ]


def _join_rows(port: Port, parts: Sequence[Grad], weights: list[float], in_place: bool) -> Grad:
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None
    whole = []
    for tower, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        if part is None:
            shape = list(like.shape)
            if port.sizes is not None:
                shape[port.dim] = port.sizes[tower]
            part = like.new_zeros(shape, device=port.device)
        part = move(part, port.device)
        whole.append(part if weight == 1 else part * weight)
    if len(whole) == 1 and port.sizes is not None:
        return own(whole)[0] if in_place else whole[0].clone()  # a copy, as several towers' rows are
    return cat_rows(whole, port.dim)

"""What a run trains: the network, its towers, the optimizer and the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import torchtower
from torchtower.checkpoint import CheckpointError, check_same_tensors
from torchtower.training.chance import capture_chance, restore_chance
from torchtower.training.data import RECIPES
from torchtower.training.errors import BadInput
from torchtower.training.models import build_model
from torchtower.training.options import Options


class StepLosses(NamedTuple):
    """The loss of one step, before its update.

    Attributes:
        mean: Over all rows of the batch.
        towers: Of each tower that had rows, over its own.
    """

    mean: float
    towers: list[float]


class Trainer:
    """A network in towers, trained step by step.

    Args:
        options: The run.

    Attributes:
        net: The network; its parameters are the ones that the optimizer updates.
        averaged: The network with the exponential moving average of those parameters.
        device: The main tower's.
        step: Number of updates so far.

    Raises:
        BadInput: The devices differ in type, or torchtower was built without kernels for them.
    """

    def __init__(self, options: Options) -> None:
        recipe = RECIPES[options.dataset]
        torch.manual_seed(options.seed)
        net = build_model(
            options.model,
            recipe.channels,
            recipe.distortions.size,
            recipe.num_classes,
            options.dropout,
        )
        self._devices = [torch.device(name) for name in options.devices]
        self.device = self._devices[0]
        # The images come in this layout too, in which convolutions on a CPU are fastest.
        net.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net, self.model = net, _in_towers(net, self._devices)
        groups = net.parameter_groups(recipe.weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=options.lr)
        self.averaged = AveragedModel(net, multi_avg_fn=_Average(recipe.ema_decay)).eval()
        self.step = 0

    def train_step(self, images: Tensor, labels: Tensor, lr: float) -> StepLosses:
        """Update the parameters once.

        Args:
            images: The batch, split over the towers.
            labels: Its labels.
            lr: Learning rate of this update.

        Raises:
            BadInput: The loss is not finite any more; the parameters are those before the step.
        """
        loss = self.model.tower_loss(_mean_cross_entropy, images, labels)
        losses = StepLosses(loss.item(), [float(tower) for tower in self.model.tower_losses])
        if not math.isfinite(losses.mean):
            raise BadInput(
                f"--lr: expected one at which the loss stays finite, but got {losses.mean} "
                f"at step {self.step + 1} with {lr:.4g}"
            )
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.averaged.update_parameters(self.net)
        self.step += 1
        return losses

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Measure the averaged network.

        Args:
            batches: Images and labels.

        Returns:
            The mean loss, and the share of images told right.
        """
        loss, right, rows = 0.0, 0, 0
        for images, labels in batches:
            logits = self.averaged(images)
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
            rows += len(labels)
        return loss / rows, right / rows

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next steps depend on, besides the data."""
        return {
            "step": self.step,
            "net": self.net.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "chance": capture_chance(self._devices),
        }

    def load_state_dict(self, state: Mapping[str, Any], path: Path) -> None:
        """Go back to where `state_dict` was taken.

        Args:
            state: What it returned.
            path: The checkpoint that holds it, for messages.

        Raises:
            CheckpointError: It belongs to another network.
        """
        check_same_tensors(path, "net", self.net.state_dict(), state.get("net"))
        check_same_tensors(path, "averaged", self.averaged.state_dict(), state.get("averaged"))
        try:
            self.net.load_state_dict(state["net"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
            restore_chance(state["chance"])
            self.step = int(state["step"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint: expected a run of this network in {path}, but got {error!r}") from error


def _in_towers(net: nn.Module, devices: list[torch.device]) -> torchtower.TowerParallel[nn.Module]:
    try:
        return torchtower.TowerParallel(net, device_ids=devices)
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"--devices: {error}") from error


def _mean_cross_entropy(replica: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(replica(images), labels)


_Tensors = tuple[Tensor, ...] | list[Tensor]


class _Average:
    """An exponential moving average that forgets its beginnings, as TensorFlow's does.

    Source: `num_updates` of tf.train.ExponentialMovingAverage, TensorFlow 1.15.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay

    def __call__(self, averaged: _Tensors, current: _Tensors, updates: Tensor | int) -> None:
        decay = min(self._decay, (1 + float(updates)) / (10 + float(updates)))
        torch._foreach_lerp_(averaged, current, 1 - decay)

"""Modules that several test files wrap, each with the one habit that its name tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import mlp


class OneLayer(nn.Module):
    """A linear layer, for others to begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x)


class WithOutput(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.fc, self.make = nn.Linear(3, 2), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.fc(x))


def calling(call: Callable[[str], Any]) -> nn.Module:
    """A layer that calls ``call("forward")`` in its forward and ``call("backward")`` in its backward."""

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            call("forward")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            call("backward")
            return grad

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            return Call.apply(self.fc(x))

    return Net().double()


class AuxiliaryLoss(OneLayer):
    """Leaves a loss in an attribute, beside its output."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc(x)
        self.auxiliary = out.square().mean()
        return out


class Clamped(OneLayer):
    """Assigns to a parameter's data whenever it runs, as some constraints do."""

    def forward(self, x: Tensor) -> Tensor:
        self.fc.weight.data = self.fc.weight.data.clamp(-0.3, 0.3)
        return self.fc(x)


class TrainedWithin(OneLayer):
    """Trains one of its layers while it goes forward."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            self.trained(x).square().sum().backward()
        return self.fc(x)


class Scaled(nn.Module):
    """Its backward needs a constant buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("scale", torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


class Recurrent(nn.Module):
    """A recurrent network of any kind, without its hidden state."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        return self.rnn(x)[0]


class Checkpointed(nn.Module):
    """Checkpoints a submodule, ``times`` times over, and a function that closes over the module."""

    def __init__(self, reentrant: bool, times: int = 1) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(3, 4), mlp(4, 4), nn.Linear(4, 2)
        self.reentrant, self.times = reentrant, times

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for _ in range(self.times):
            x = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return checkpoint(lambda x: self.last(x.tanh()), x, use_reentrant=self.reentrant)


class Switching(nn.Module):
    """Runs one layer in training, another in evaluation, in a checkpoint."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.trained, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.reentrant = reentrant

    def _run(self, x: Tensor) -> Tensor:
        layer = self.trained if self.training else self.other
        y: Tensor = layer(x).tanh()
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self._run, x, use_reentrant=self.reentrant)
        return y


def batch_norm_net(outputs: int = 2, **options: Any) -> nn.Sequential:
    """Batch normalisation between two layers."""
    norm = nn.BatchNorm1d(4, **options)
    return nn.Sequential(nn.Linear(3, 4, bias=False), norm, nn.Tanh(), nn.Linear(4, outputs)).double()

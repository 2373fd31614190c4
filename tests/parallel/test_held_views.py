"""What a module holds that nobody reads any more costs nothing: views of weights that have changed, freed memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import EVERY_COUNT, assert_close, assert_same_parameters, batch, twins, wrap
from tests.modules import OneLayer


def under_no_grad(weight: Tensor) -> Any:
    with torch.no_grad():
        return weight.t()


def under_inference_mode(weight: Tensor) -> Any:
    with torch.inference_mode():
        return weight.t()


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "a view without a graph": under_no_grad,
    "a view of inference mode": under_inference_mode,
    "in a list": lambda weight: [under_no_grad(weight)],
    "in a dict": lambda weight: {"weight": under_no_grad(weight)},
    "one of several": lambda weight: weight.chunk(2),
    "a view with a graph": lambda weight: weight.t(),
}


class Looking(OneLayer):
    """Keeps what it sees of its weight, and reads it in the same forward alone."""

    def __init__(self, look: Callable[[Tensor], Any], where: str) -> None:
        super().__init__()
        self.look, self.where, self.kept = look, where, []
        kept = self.kept
        if where == "hook":
            self.fc.register_forward_hook(lambda module, args, out: kept.append(look(module.weight)))

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "attribute":
            self.seen = self.look(self.fc.weight)
        return self.fc(x)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("program", ["train train", "train eval", "eval train", "eval eval"])
@pytest.mark.parametrize("where", ["attribute", "hook"])
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_a_view_of_a_weight_may_stay_when_the_weight_has_changed(
    look: Callable[[Tensor], Any], where: str, program: str, num_towers: int
) -> None:
    plain, wrapped = twins(Looking(look, where), num_towers)
    optimizers = {net: torch.optim.SGD(net.parameters(), 0.1) for net in (plain, wrapped)}
    for step, mode in enumerate([*program.split(), "train"]):
        outs = []
        for net, optimizer in optimizers.items():
            with torch.set_grad_enabled(mode == "train"):
                outs.append(net(batch(7, seed=step)))
            if mode == "train":
                optimizer.zero_grad()
                outs[-1].square().mean().backward()
            optimizer.step()  # changes the weight where there is a gradient
            with torch.no_grad():
                next(net.parameters()).mul_(0.9)
        assert_close(outs[1], outs[0])
    assert_same_parameters(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_view_of_a_weight_made_without_a_graph_is_a_constant(num_towers: int) -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return self.fc(x) + x @ self.seen
            self.seen = under_no_grad(self.fc.weight)
            return self.fc(x)

    plain, wrapped = twins(Net(), num_towers)
    for net in (plain, wrapped):
        net.eval()(batch(7))
        net.train()(batch(7)).square().mean().backward()
    assert_close(wrapped.module.fc.weight.grad, plain.fc.weight.grad)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_view_that_is_trained_by_itself_is_though_what_it_is_a_view_of_is_trained_too(num_towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            whole = batch(1, 5)
            self.part = whole[0, :3].requires_grad_()
            whole.requires_grad_()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x * self.part)

    torch.manual_seed(0)
    plain = Net().double()
    torch.manual_seed(0)
    wrapped = wrap(Net().double(), num_towers)
    for net in (plain, wrapped):
        net(batch(7)).square().mean().backward()
    assert_close(wrapped.module.part.grad, plain.part.grad)


@pytest.mark.parametrize("is_freed_again", [False, True])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_memory_that_a_forward_gives_a_freed_tensor_is_every_towers(num_towers: int, is_freed_again: bool) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            memory = self.scale.untyped_storage()
            if not memory.nbytes():
                memory.resize_(16)
                self.scale.data.fill_(2.0)
            return self.fc(x) * self.scale.clone()

    plain, wrapped = twins(Net(), num_towers)
    for _ in range(3):
        for net, inner in ((plain, plain), (wrapped, wrapped.module)):
            if is_freed_again:
                inner.scale.untyped_storage().resize_(0)
            net(batch(7)).square().mean().backward()
        assert_close(wrapped.module.fc.weight.grad, plain.fc.weight.grad)


@pytest.mark.parametrize("buffers", ["main", "mean"])
@pytest.mark.parametrize("is_registered", [True, False])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_tensor_whose_memory_is_freed_is_not_read(num_towers: int, is_registered: bool, buffers: str) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            cache = torch.ones(5000)
            if is_registered:
                self.register_buffer("cache", cache)
            else:
                self.cache = cache

    plain, wrapped = twins(Net(), num_towers, buffers=buffers)
    for bytes_ in (0, 5000 * 8, 0):
        wrapped.module.cache.untyped_storage().resize_(bytes_)
        for net in (plain, wrapped):
            net.zero_grad()
            net(batch(7)).square().mean().backward()
        assert_close(wrapped.module.fc.weight.grad, plain.fc.weight.grad)

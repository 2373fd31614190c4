"""Small habits of nn.DataParallel and of PyTorch's tools that programs rely on."""

from __future__ import annotations

import collections
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchtower
from tests.helpers import EVERY_COUNT, SEVERAL, assert_close, assert_go_backward_alike, batch, mlp, twins, wrap
from tests.modules import OneLayer
from torchtower import TowerParallel


def test_the_class_is_generic_as_nn_data_parallel_is() -> None:
    kind: Any = TowerParallel[nn.Sequential]
    assert isinstance(kind(mlp(), ["cpu", "cpu"]), TowerParallel)


def test_zero_grad_in_a_forward_warns_as_in_nn_data_parallel() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            self.zero_grad()
            out: Tensor = self.fc(x)
            return out

    with pytest.warns(UserWarning, match="no effect"):
        wrap(Net().double(), 2)(batch(4))


@pytest.mark.parametrize("towers", EVERY_COUNT)
def test_a_larger_model_is_traced_through_the_wrapper(towers: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3).double(), wrap(mlp(), towers))
    traced = torch.fx.symbolic_trace(model)
    assert_close(traced(batch(5)), model(batch(5)))


def test_norms_between_processes_are_told_of_and_converted() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4), nn.ReLU()).double()
    with pytest.warns(UserWarning, match="convert_sync_batchnorm"):
        wrap(net, 2)
    plain = nn.Sequential(net[0], nn.BatchNorm1d(4), net[2]).double()
    wrapped = wrap(torchtower.convert_sync_batchnorm(copy.deepcopy(net)), 2)
    assert_close(wrapped(batch(7)), plain(batch(7)))


def test_gather_knows_minus_one_for_the_cpu() -> None:
    wrapped = wrap(mlp(), 2)
    assert torch.equal(wrapped.gather([batch(2), batch(3)], -1), torch.cat([batch(2), batch(3)]))


class AttrDict(dict[str, Any]):
    """Of the kind that every configuration file is read into: a name that is no key is a KeyError."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("towers", SEVERAL)
def test_an_attribute_whose_own_lookup_raises_is_shared(towers: int) -> None:
    class Net(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.options = AttrDict(scale=2.0)
            self.all_options = [AttrDict(shift=1.0)]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x) * self.options.scale + self.all_options[0].shift
            return out

    plain, inner = Net().double(), Net().double()  # no such attribute can be copied
    inner.load_state_dict(plain.state_dict())
    wrapped = wrap(inner, towers)
    assert_go_backward_alike(plain, wrapped, batch(5))


class Pair(collections.namedtuple("Pair", ["left", "right"])):
    """A named tuple that makes itself otherwise than from its fields."""

    def __new__(cls, both: Tensor) -> Pair:
        return super().__new__(cls, both, both + 1)


@pytest.mark.parametrize("towers", EVERY_COUNT)
def test_named_tuples_with_a_way_of_their_own_to_be_made(towers: int) -> None:
    class Net(OneLayer):
        def forward(self, pair: Pair) -> Pair:
            return Pair(self.fc(pair.left + pair.right))

    plain, wrapped = twins(Net(), towers)
    out, expected = wrapped(Pair(batch(5))), plain(Pair(batch(5)))
    assert type(out) is Pair
    assert_close(out.right, expected.right)


def test_arrays_of_other_shapes_are_told_apart_by_name() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, x.numpy()

    with pytest.raises(ValueError, match=r"(?s)output\[1\] of every tower to be alike.* tower 1"):
        wrap(Net(), 2)(batch(9))

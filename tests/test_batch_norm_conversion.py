"""What `convert_sync_batchnorm` makes of a module, and what it keeps."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from tests.helpers import STYLES, assert_close, assert_same_gradients, batch, loss_in, wrap
from torchtower import convert_sync_batchnorm


def test_conversion_keeps_parameters_statistics_and_state_dict() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4)), nn.BatchNorm2d(4).eval()).double()
    before, parameters = copy.deepcopy(net.state_dict()), list(net.parameters())
    converted = convert_sync_batchnorm(net)
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    assert all(torch.equal(converted.state_dict()[k], v) for k, v in before.items())
    assert converted[2].training is False and converted[1].training is True
    assert not isinstance(converted[1][0], nn.BatchNorm1d)


def test_a_batch_norm_in_two_places_is_converted_once_and_in_both() -> None:
    norm = nn.BatchNorm1d(3)
    plain = nn.Sequential(norm, nn.Linear(3, 3), norm).double()
    converted = convert_sync_batchnorm(copy.deepcopy(plain))
    assert converted[0] is converted[2] and not isinstance(converted[2], nn.BatchNorm1d)
    assert_close(wrap(converted, 2)(batch(8)), plain(batch(8)))


def test_a_lazy_batch_norm_is_not_converted() -> None:
    with pytest.raises(ValueError, match="convert_sync_batchnorm: expected every parameter to have a shape"):
        convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()))


def test_norms_between_processes_are_told_of_and_converted() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4), nn.ReLU()).double()
    with pytest.warns(UserWarning, match="convert_sync_batchnorm"):
        wrap(net, 2)
    plain = nn.Sequential(net[0], nn.BatchNorm1d(4), net[2]).double()
    wrapped = wrap(convert_sync_batchnorm(copy.deepcopy(net)), 2)
    assert_close(wrapped(batch(7)), plain(batch(7)))


def test_a_subclass_whose_forward_the_conversion_loses_is_told_of(recwarn: pytest.WarningsRecorder) -> None:
    class Activated(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    class Renamed(nn.BatchNorm1d):
        pass

    convert_sync_batchnorm(nn.Sequential(Renamed(3), nn.BatchNorm1d(3), nn.SyncBatchNorm(3)))
    assert not recwarn
    with pytest.warns(UserWarning, match="the forward of Activated is lost"):
        convert_sync_batchnorm(nn.Sequential(Renamed(3), Activated(3)))


class Squared(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.square()


def pruned(norm: nn.Module) -> None:
    prune.l1_unstructured(norm, "weight", 1)


def parametrized(norm: nn.Module) -> None:
    parametrize.register_parametrization(norm, "weight", Squared())


def hooked(norm: nn.Module) -> None:
    norm.register_forward_hook(lambda module, args, out: out * module.factor)
    norm.factor = 3.0


def buffered(norm: nn.Module) -> None:
    norm.register_buffer("scratch", torch.ones(3), persistent=False)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("change", [pruned, parametrized, hooked, buffered])
def test_conversion_keeps_what_else_a_batch_norm_holds(change: Any, style: str) -> None:
    def loss_of(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).pow(3).mean()

    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)).double()
    nn.init.normal_(net[1].weight)
    inner = copy.deepcopy(net)
    for each in (net, inner):
        change(each[1])
    wrapped = wrap(convert_sync_batchnorm(inner), 2)
    assert wrapped.module.state_dict().keys() == net.state_dict().keys()
    for _ in range(2):
        net.zero_grad()
        wrapped.zero_grad()
        for each in (net, wrapped):
            loss_in(style, each, loss_of, batch(7)).backward()
        assert_same_gradients(wrapped, net)


def test_a_handle_from_before_the_conversion_removes_its_hook() -> None:
    norm = nn.BatchNorm1d(3)
    handle = norm.register_forward_hook(lambda module, args, out: out * 2)
    converted = convert_sync_batchnorm(norm)
    twice = converted(batch(4).float())
    handle.remove()
    assert_close(twice, converted(batch(4).float()) * 2)


@pytest.mark.skipif("bias" not in inspect.signature(nn.BatchNorm1d).parameters, reason="every batch norm has a bias")
def test_a_batch_norm_without_a_bias_is_synchronised() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, bias=False)).double()
    plain, wrapped = copy.deepcopy(net), wrap(convert_sync_batchnorm(net), 2)
    assert_close(wrapped(batch(7)), plain(batch(7)))

"""Subclasses with a ``scatter`` or ``gather`` of their own, on simulated devices."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from torch import nn

from tests.accelerator.towers import (
    assert_go_backward_alike,
    assert_same_gradients,
    assert_same_values,
    device,
    every_layout,
    mlp,
    rows,
)
from tests.helpers import Stepwise
from torchtower import TowerParallel


class Own(TowerParallel):
    """The main tower gets one row, and outputs stay where they are; as programs do that know their devices."""

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
        (x,) = inputs
        parts = [x[:1], *x[1:].chunk(len(device_ids) - 1)] if len(device_ids) > 1 else [x / 2]
        return [(part.to(device(i)),) for part, i in zip(parts, device_ids, strict=True)], [kwargs] * len(parts)

    def gather(self, outputs: Any, output_device: Any) -> Any:
        return outputs


@every_layout
def test_own_steps_see_the_towers_devices(devices: list[int]) -> None:
    plain = mlp().double()
    wrapped = Own(mlp().double().to(device(devices[0])), device_ids=devices)
    wrapped.module.load_state_dict(plain.state_dict())
    x, own_x = rows(7).requires_grad_(), rows(7).requires_grad_()
    outputs = wrapped(own_x)
    assert [out.device for out in outputs] == list(map(device, devices))
    expected = plain(x)
    assert_same_values(torch.cat([out.cpu() for out in outputs]), expected)
    expected.square().sum().backward()
    sum(out.square().sum().cpu() for out in outputs).backward()
    assert_same_gradients(wrapped, plain)
    assert_same_values(own_x.grad, x.grad)


@pytest.mark.parametrize("style", ["call", "tower_loss"])
def test_one_device_has_its_scatter_and_no_gather_as_in_data_parallel(style: str) -> None:
    wrapped = Own(mlp().double().to(device(0)), device_ids=[0])
    x = rows(4).to(device(0))
    if style == "call":
        assert_same_values(wrapped(rows(4)), wrapped.module(x / 2))
    else:
        loss = wrapped.tower_loss(lambda net, x: net(x).sum(), rows(4))
        assert_same_values(loss, wrapped.module(x / 2).sum())


def test_within_a_transform_a_wrapper_with_a_scatter_of_its_own_moves_the_batch_to_the_main_device() -> None:
    class Uncut(TowerParallel):
        def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
            raise AssertionError("no batch is cut within a transform")

    net = mlp().double().to(device(0))
    x = rows(4)
    got = torch.func.vmap(Uncut(net, device_ids=[0, 1]))(x)
    assert_same_values(got, net(x.to(device(0))))


@pytest.mark.parametrize("num_rows", [1, 7])
@every_layout
def test_the_steps_of_data_parallel_work_one_by_one(devices: list[int], num_rows: int) -> None:
    fc = nn.Linear(3, 3)
    plain = nn.Sequential(fc, nn.BatchNorm1d(3), nn.Tanh(), fc).double().eval()
    stepwise = Stepwise(copy.deepcopy(plain).to(device(devices[0])), device_ids=devices)
    assert_go_backward_alike(plain, stepwise, rows(num_rows))
    replicas = stepwise.replicate(stepwise.module, stepwise.device_ids)
    for index, (replica, its_device) in enumerate(zip(replicas, stepwise.devices, strict=True)):
        tensors = [*replica.parameters(), *replica.buffers()]
        assert {tensor.device for tensor in tensors} == {its_device}
        assert replica[0].weight is replica[3].weight, "one tensor under two names"
        assert (replica[1].running_mean is stepwise.module[1].running_mean) == (index == 0)


def test_one_device_puts_outputs_where_they_are_asked_for() -> None:
    out = TowerParallel(mlp().to(device(0)), device_ids=[0], output_device="cpu")(rows(4).float())
    assert out.device == torch.device("cpu")


def test_replicas_are_made_where_they_are_asked_for() -> None:
    stepwise = Stepwise(nn.LSTM(3, 2).to(device(0)), device_ids=[0, 1])
    for ids in ([1], [0, 0], [1, 0]):
        replicas = stepwise.replicate(stepwise.module, ids)
        for index, replica in zip(ids, replicas, strict=True):
            assert {weight.device for weight in replica._flat_weights} == {device(index)}
            assert all(map(operator.is_, replica._flat_weights, replica.parameters()))

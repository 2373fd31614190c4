"""Contract 9: what a wrapper cannot take is named, where it comes in or where towers give it back."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers import SEVERAL, batch, mlp, twins, wrap
from torchtower import TowerParallel, current_tower

# ---- outputs that differ


class Differing(nn.Module):
    def __init__(self, first: Any, other: Any) -> None:
        super().__init__()
        self.first, self.other = first, other

    def forward(self, x: Tensor) -> Any:
        return (self.other if current_tower() == 1 else self.first)(x)


DIFFERENCES = {
    "tensor or not": (lambda x: x, lambda x: "text", r"the output .*tensor.*tower 1.*str"),
    "not or tensor": (lambda x: None, lambda x: x, r"the output .*tower 1"),
    "number": (lambda x: (x, x), lambda x: (x,), r"the output .*tower 1"),
    "type": (lambda x: (x, x), lambda x: [x, x], r"the output .*tuple.*tower 1.*list"),
    "keys": (lambda x: {"a": x}, lambda x: {"b": x}, r"the output .*'a'.*tower 1.*'b'"),
    "more keys": (lambda x: {"a": x}, lambda x: {"b": x, "a": x}, r"the output .*tower 1"),
    "deep inside": (lambda x: {"a": [x, (x,)]}, lambda x: {"a": [x, (x, x)]}, r"the output\['a'\]\[1\] .*tower 1"),
    "values": (lambda x: (x, 1), lambda x: (x, 2), r"the output\[1\] .*1 .*tower 1.*2"),
    "columns": (lambda x: x, lambda x: x[:, :2], r"the output .*tower 1.*\(2, 2\); .*total_length"),
    "dimensions": (lambda x: [x], lambda x: [x[:, 0]], r"the output\[0\] .*tower 1.*\(2,\)"),
    "0-d or not": (lambda x: x.sum(), lambda x: x, r"the output .*tower 1.*\(2, 3\)"),
}


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_outputs_that_differ_between_towers_are_named(kind: str) -> None:
    first, other, words = DIFFERENCES[kind]
    with pytest.raises(ValueError, match=words):
        wrap(Differing(first, other), 3)(batch(6))


@pytest.mark.parametrize(("first", "other"), [(float("nan"), 1.0), (1.0, float("nan"))])
def test_what_is_no_number_in_some_towers_alone_is_a_difference(first: float, other: float) -> None:
    with pytest.raises(ValueError, match=rf"the output\[1\] .*{first} .*tower 1.*{other}"):
        wrap(Differing(lambda x: (x, first), lambda x: (x, other)), 3)(batch(6))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (lambda x: x, r"tower_loss: expected .*one element.*tower 0's returned torch.float64 of shape \(2, 3\)"),
        (lambda x: x.sum().long(), r"tower_loss: expected .*floating.*tower 0's returned torch.int64"),
        (lambda x: x.sum().to([torch.float64, torch.float32][current_tower() % 2]), r"of one dtype.*tower 1's is .*32"),
        (lambda x: (x.sum(), 1.0) if current_tower() else x.sum(), "a weight in every tower or in none"),
        (lambda x: None, r"tower_loss: .*tower 0's returned NoneType"),
        (lambda x: 1.5, r"tower_loss: .*tower 0's returned float"),
        (lambda x: (x.sum(), -1.0), "not negative"),
        (lambda x: (x.sum(), float("nan")), "nan"),
        (lambda x: (x.sum(), float("inf")), "inf"),
        (lambda x: (x.sum(), 0.0), "above 0"),
    ],
)
def test_bad_results_of_a_loss_function_are_named(output: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrap(mlp(), 3).tower_loss(lambda net, x: output(x), batch(6))


@pytest.mark.parametrize("num_towers", [1, 2])
@pytest.mark.parametrize("weight", ["2", 1j, [1.0], {"hits": 3}])
def test_a_second_value_that_is_no_number_is_named(weight: Any, num_towers: int) -> None:
    words = rf"the tower's weight.*tower 0's is a {type(weight).__name__}; return the loss alone.*current_tower"
    with pytest.raises(TypeError, match=rf"^TowerParallel\.tower_loss: expected .*{words}"):
        wrap(mlp(), num_towers).tower_loss(lambda net, x: (net(x).sum(), weight), batch(4))


@pytest.mark.parametrize("num_towers", [1, 2])
def test_a_forgotten_loss_function_is_named(num_towers: int) -> None:
    with pytest.raises(TypeError, match=r"TowerParallel\.tower_loss: expected loss_fn to be callable, but got Tensor"):
        wrap(mlp(), num_towers).tower_loss(batch(4), batch(4))  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_single_towers_weight_is_checked_as_any(weight: float) -> None:
    with pytest.raises(ValueError, match=r"TowerParallel\.tower_loss: expected .*weight"):
        wrap(mlp(), 1).tower_loss(lambda net, x: (net(x).sum(), weight), batch(4))


def test_an_output_without_the_dimension_to_join_along_is_named() -> None:
    with pytest.raises(ValueError, match=r"the output\[1\] to have dimension 1.*shape is \(3,\)"):
        wrap(Differing(*[lambda x: (x, x[:, 0])] * 2), 2, dim=1)(batch(3, 2))


# ---- bad calls


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"device_ids": []}, ValueError, r"TowerParallel: expected device_ids to name at least one device"),
        ({"device_ids": ["cpu", "meta"]}, ValueError, "device_ids"),
        ({"device_ids": ["nonsense"]}, ValueError, "device_ids.*'nonsense'"),
        ({"device_ids": [0]}, ValueError, r"no accelerator; name CPU towers as device_ids=\['cpu', 'cpu'\]"),
        ({"device_ids": 2}, TypeError, r"list a device for each tower, but got 2.*\['cpu'\] \* 2"),
        ({"device_ids": np.int64(2)}, TypeError, "list a device for each tower, but got"),
        ({"device_ids": [np.arange(2)]}, TypeError, "of type ndarray"),
        ({"device_ids": ["cuda:0"]}, ValueError, "does not exist here"),
        ({"device_ids": [1.5]}, TypeError, "1.5 of type float"),
        ({"device_ids": [True]}, TypeError, "of type bool"),
        ({"output_device": "nonsense"}, ValueError, "expected output_device .*nonsense"),
        ({"output_device": 0}, ValueError, "expected output_device among .* there is no accelerator; the CPU is 'cpu'"),
        ({"max_concurrency": 0}, ValueError, "max_concurrency"),
        ({"max_concurrency": 1.5}, TypeError, "expected max_concurrency to be an int, but got 1.5"),
        ({"max_concurrency": True}, TypeError, "expected max_concurrency to be an int, but got True"),
        ({"dim": True}, TypeError, "expected dim to be an int, but got True"),
        ({"dim": "a"}, TypeError, "expected dim to be an int, but got 'a'"),
    ],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="names devices that this machine has")
def test_bad_arguments_are_named_at_construction(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        TowerParallel(mlp(), **{"device_ids": ["cpu", "cpu"], **arguments})


def test_an_unknown_buffers_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"TowerParallel: expected buffers to be one of .* but got 'sum'"):
        TowerParallel(mlp(), ["cpu", "cpu"], buffers="sum")


def test_something_that_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"TowerParallel: expected an nn\.Module, but got function"):
        TowerParallel(lambda x: x, ["cpu"])
    with pytest.raises(TypeError, match=r"but got the class Linear; make one"):
        TowerParallel(nn.Linear, ["cpu"])


@pytest.mark.parametrize("error", [ValueError, RuntimeError])  # the second is nn.DataParallel's, and so are the words
def test_parameters_on_another_device_are_named_at_the_call(error: type[Exception]) -> None:
    with pytest.raises(error, match=r"on device cpu \(device_ids\[0\]\) but found one of them on device: meta"):
        wrap(nn.Linear(3, 2, device="meta"), 2)(torch.ones(4, 3))


def test_a_missing_argument_is_the_modules_own_type_error() -> None:
    with pytest.raises(TypeError, match="positional"):
        wrap(mlp(), 2)(batch(4), batch(4))
    with pytest.raises(TypeError, match=r"positional|argument"):
        wrap(mlp(), 2)()


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_a_loss_of_the_module_itself_in_place_of_its_replica_is_refused(num_towers: int) -> None:
    _, wrapped = twins(mlp(), num_towers)

    def wrong(replica: nn.Module, x: Tensor) -> Tensor:
        return wrapped.module(x).square().mean()

    def penalty(replica: nn.Module, x: Tensor) -> Tensor:
        return replica(x).square().mean() + wrapped.module[2].weight.square().sum()

    for loss_fn, name in ((wrong, r"\d\.\w+"), (penalty, "2.weight")):
        with pytest.raises(ValueError, match=f"to use the replica that it is given, but .* own parameter '{name}'"):
            wrapped.tower_loss(loss_fn, batch(8))

    def late(replica: nn.Module, x: Tensor) -> Tensor:
        return penalty(replica, x)

    with torch.no_grad():  # which tells nothing
        wrapped.tower_loss(late, batch(8))
    with pytest.raises(ValueError, match="to use the replica that it is given"):
        wrapped.tower_loss(late, batch(8))

    for loss_fn in (wrong, penalty):  # what a partial is of counts, not that it is one
        wrapped.tower_loss(functools.partial(lambda replica, x: replica(x).sum()), batch(8))
        with pytest.raises(ValueError, match="to use the replica that it is given"):
            wrapped.tower_loss(functools.partial(loss_fn), batch(8))

    temperature = nn.Parameter(torch.ones((), dtype=torch.float64))
    with pytest.warns(UserWarning, match=r"leads to 1 trainable parameters that are not the module's.*shape \(\)"):
        wrapped.tower_loss(lambda replica, x: (replica(x) * temperature).sum(), batch(8))

    def right(replica: Any, x: Tensor) -> Tensor:
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(replica(z).sum(), z, create_graph=True)
        return slope.square().sum() + replica[2].weight.square().sum()

    wrapped.tower_loss(right, batch(8)).backward()
    wrapped.tower_loss(lambda replica, x: replica(x).sum() + wrapped(x).sum(), batch(8)).backward()


def test_a_training_step_within_loss_fn_is_warned_of() -> None:
    _, wrapped = twins(mlp(), 2)

    def step(replica: nn.Module, x: Tensor) -> Tensor:
        loss = replica(x).square().mean()
        loss.backward()
        return loss.detach()

    with pytest.warns(UserWarning, match="loss_fn went backward in the towers.* summed over towers, not averaged"):
        wrapped.tower_loss(step, batch(8))


def test_a_second_value_that_cannot_be_a_weight_is_named() -> None:
    _, wrapped = twins(mlp(), 2)

    def loss_and_output(replica: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        out = replica(x)
        return out.square().mean(), out

    with pytest.raises(TypeError, match=r"the tower's weight.*tower 0's is a Tensor of shape \(4, \d\); return the"):
        wrapped.tower_loss(loss_and_output, batch(8))


def test_a_sparse_parameter_is_refused_and_a_sparse_buffer_is_not() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.weight, x.T).T

    net, weight = Net().double(), torch.eye(3).double().to_sparse()
    net.weight = nn.Parameter(weight)
    with pytest.raises(ValueError, match="expected dense parameters, but got one of layout"):
        wrap(net, 2)(batch(4))
    assert torch.equal(wrap(net, 1)(batch(4)), batch(4))
    del net.weight
    net.register_buffer("weight", weight)
    wrapped = wrap(net, 2)
    assert torch.equal(wrapped(batch(4)), batch(4))
    net.more = nn.Parameter(weight)
    for _ in range(2):
        with pytest.raises(ValueError, match="expected dense parameters"):
            wrapped(batch(4))
    del net.more
    assert torch.equal(wrapped(batch(4)), batch(4))


def test_a_module_on_another_device_is_refused_at_every_call() -> None:
    wrapped = wrap(nn.Linear(3, 2), 2)
    wrapped(torch.ones(4, 3))
    wrapped.to("meta")
    for _ in range(2):
        with pytest.raises(ValueError, match="on device: meta"):
            wrapped(torch.ones(4, 3))

"""Subclasses with a ``scatter`` or ``gather`` of their own, as they were written for nn.DataParallel."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    EVERY_COUNT,
    SEVERAL,
    STYLES,
    assert_close,
    assert_go_backward_alike,
    assert_same_gradients,
    batch,
    mlp,
)
from tests.modules import OneLayer
from torchtower import TowerParallel, current_tower


class LessForTheMain(TowerParallel):
    """The main tower gets one row alone, the others share the rest, which their slices of the batch are."""

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
        (x,) = inputs
        shards = [x[:1], *x[1:].chunk(len(device_ids) - 1)] if len(x) > 1 else [x]
        return [(shard,) for shard in shards], [kwargs] * len(shards)


def both(kind: type[TowerParallel], net: nn.Module, num_towers: int) -> tuple[nn.Module, TowerParallel]:
    net = net.double()
    return net, kind(copy.deepcopy(net), device_ids=["cpu"] * num_towers)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_uneven_shards_of_an_own_scatter_give_the_same_gradients(num_towers: int, rows: int) -> None:
    plain, wrapped = both(LessForTheMain, mlp(), num_towers)
    for requires_grad in (False, True):
        assert_go_backward_alike(plain, wrapped, batch(rows, requires_grad=requires_grad))


def test_every_tower_gets_what_scatter_has_made_for_it() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, name: str, scale: float = 1.0) -> Tensor:
            assert name == "abc"[int(current_tower() or 0)]
            return x * scale

    class Named(TowerParallel):
        def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
            assert device_ids == ["cpu"] * 3
            return list(zip(inputs[0].split(2), "abc", strict=True)), [{"scale": float(t)} for t in range(3)]

    assert_close(Named(Net(), device_ids=["cpu"] * 3)(torch.ones(6)), torch.tensor([0.0, 0, 1, 1, 2, 2]))


@dataclasses.dataclass(eq=False)
class Graph:
    """Of a class that nobody knows how to cut."""

    nodes: Tensor
    graph_of: Tensor
    num_graphs: int


class OfGraphs(TowerParallel):
    """Takes a list of graphs of different sizes; each tower gets some, as one."""

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
        (graphs,) = inputs
        count = -(-len(graphs) // len(device_ids))
        return [joined(graphs[i : i + count]) for i in range(0, len(graphs), count)], None


def joined(graphs: list[Tensor]) -> Graph:
    sizes = torch.tensor([len(nodes) for nodes in graphs])
    return Graph(torch.cat(graphs), torch.repeat_interleave(torch.arange(len(graphs)), sizes), len(graphs))


class Readout(OneLayer):
    def forward(self, graph: Graph) -> Tensor:
        zeros = graph.nodes.new_zeros(graph.num_graphs, 2)
        return zeros.index_add(0, graph.graph_of, torch.tanh(self.fc(graph.nodes)))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_graphs_are_batched_for_each_tower(num_towers: int, count: int) -> None:
    plain, wrapped = both(OfGraphs, Readout(), num_towers)
    graphs = [batch(size, seed=size, requires_grad=size == 2) for size in range(1, count + 1)]
    for _ in range(2):
        out, expected = wrapped(graphs), plain(joined(graphs))
        assert_close(out, expected)
        for result in (out, expected):
            result.square().sum().backward()
        assert_same_gradients(wrapped, plain)


def test_a_tower_loss_over_an_own_scatter_weighs_by_the_rows_of_each_shard() -> None:
    plain, wrapped = both(LessForTheMain, mlp(), 3)
    x = batch(8, requires_grad=True)
    loss = wrapped.tower_loss(lambda replica, x: replica(x).square().mean(), x)
    loss.backward()
    ours, x.grad = x.grad, None
    expected = plain(x).square().mean()
    expected.backward()
    assert_close(loss, expected)
    assert_close(ours, x.grad)
    assert_same_gradients(wrapped, plain)
    assert len(wrapped.tower_losses) == 3


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("make", "dim", "expected"),
    [
        (lambda: [torch.ones(2, 5), torch.full((2, 3), 9.0)], 1, 4.0),
        (lambda: [torch.tensor(1.0), torch.tensor(2.0)], 0, 1.5),
        (lambda: [torch.nested.nested_tensor([torch.full((2,), float(i))] * i) for i in (1, 4)], 0, 3.4),
    ],
    ids=["rows along another dimension", "no rows", "nested tensors"],
)
def test_a_tower_loss_weighs_shards_of_every_kind_of_tensor(
    make: Callable[[], list[Tensor]], dim: int, expected: float
) -> None:
    class Own(TowerParallel):
        def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
            return [(shard,) for shard in inputs[0]], None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (torch.stack(x.unbind()) if x.is_nested else x).mean()

    wrapped = Own(Net(), device_ids=["cpu", "cpu"], dim=dim)
    loss = wrapped.tower_loss(lambda replica, x: replica(x), make())
    loss.backward()
    for value in (loss, wrapped.module.weight.grad):
        assert_close(value, torch.tensor(expected), rtol=1e-6)


def test_an_error_over_an_own_scatter_is_the_modules_own() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        LessForTheMain(Net(), device_ids=["cpu", "cpu"])(batch(4))


def test_a_gradient_penalty_goes_through_an_own_scatter() -> None:
    plain, wrapped = both(LessForTheMain, mlp(), 3)
    results = []
    for net in (plain, wrapped):
        x = batch(7, requires_grad=True)
        out = net(x.tanh())
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (out.sum() + slope.norm(dim=1).square().sum()).backward()
        results.append(x.grad)
    assert_close(*results)
    assert_same_gradients(wrapped, plain)


def test_one_tensor_that_all_shards_hold_is_one_input() -> None:
    class Sharing(TowerParallel):
        def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
            x, scale = inputs
            return [(part, scale) for part in x.chunk(len(device_ids))], ()

    class Net(OneLayer):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.fc(x) * scale

    plain, wrapped = both(Sharing, Net(), 3)
    assert_go_backward_alike(plain, wrapped, batch(6, requires_grad=True), batch(1, 2, requires_grad=True))


def test_a_forward_may_write_into_its_slice_whatever_others_have_saved_of_theirs() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            if current_tower() == 1:
                x.mul_(2)
            out: Tensor = self.fc(x)
            return out

    class Sliced(TowerParallel):
        def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
            return [(part,) for part in inputs[0].chunk(len(device_ids))], [kwargs] * len(device_ids)

    plain, x = OneLayer().double(), batch(4)
    doubled = x.clone()
    doubled[2:] *= 2
    wrapped = Sliced(Net(), device_ids=["cpu", "cpu"], max_concurrency=1)  # tower 0 has saved its slice by then
    wrapped.module.load_state_dict(plain.state_dict())
    wrapped.double()
    out = wrapped(x)
    assert torch.equal(x, doubled) and x._version
    for result in (out, plain.fc(doubled)):
        result.square().sum().backward()
    assert_same_gradients(wrapped, plain)
    out = wrapped(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("buffers", ["main", "mean"])
def test_shards_without_rows_count_alike(buffers: str) -> None:
    class Halves(TowerParallel):
        def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
            return [(half,) for half in inputs[0].tensor_split(2)], None

    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().eval()
    wrapped = Halves(copy.deepcopy(net), device_ids=["cpu", "cpu"], buffers=buffers)
    for x in (batch(0), batch(5)):
        assert_close(wrapped(x), net(x))
    for ours, theirs in zip(wrapped.module.buffers(), net.buffers(), strict=True):
        assert torch.equal(ours, theirs)


# ---- gather


class Apart(TowerParallel):
    """Leaves the towers' outputs apart."""

    def gather(self, outputs: Any, output_device: Any) -> Any:
        assert output_device == torch.device("cpu")
        return outputs


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_outputs_that_an_own_gather_leaves_apart_are_in_the_graph_one_by_one(num_towers: int, rows: int) -> None:
    plain, wrapped = both(Apart, mlp(), num_towers)
    x = batch(rows, requires_grad=True)
    outputs = wrapped(x)
    assert len(outputs) == min(rows, num_towers)
    assert_close(torch.cat(outputs), plain(x))
    outputs[0].square().sum().backward(retain_graph=True)
    ours, x.grad = x.grad, None
    plain(x[: len(outputs[0])]).square().sum().backward()
    assert_close(ours, x.grad)
    assert_same_gradients(wrapped, plain)
    for net in (plain, wrapped):
        net.zero_grad()
    x.grad = None
    sum(out.exp().sum() for out in outputs).backward()
    ours, x.grad = x.grad, None
    plain(x).exp().sum().backward()
    assert_close(ours, x.grad)
    assert_same_gradients(wrapped, plain)


def test_an_own_gather_may_join_what_torch_cannot() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Any:
            return {"width": x.new_zeros(len(x), 1 + int(current_tower() or 0)) + self.fc(x).sum(), "name": "any"}

    class Padding(TowerParallel):
        def gather(self, outputs: Any, output_device: Any) -> Any:
            widest = max(out["width"].shape[1] for out in outputs)
            return torch.cat([nn.functional.pad(o["width"], (0, widest - o["width"].shape[1])) for o in outputs])

    _, wrapped = both(Padding, Net(), 3)
    out = wrapped(batch(6))
    assert out.shape == (6, 3) and not out[0, 1] and out[5].all()
    out.sum().backward()
    assert wrapped.module.fc.weight.grad.abs().sum() > 0


class Opaque:
    def __init__(self, value: Any) -> None:
        self.value = value


HOLDERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "object": (Opaque, lambda held: held.value),
    "in a list in an object": (lambda x: Opaque([x]), lambda held: held.value[0]),
    "set": (lambda x: {x}, lambda held: next(iter(held))),
    "distribution": (lambda x: torch.distributions.Normal(x, 1.0), lambda held: held.mean),
    "function": (lambda x: lambda: x, lambda held: held()),
    "packed": (lambda x: nn.utils.rnn.pack_sequence([x]), lambda held: held.data),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_an_own_gather_finds_tensors_in_the_graph_whatever_holds_them(kind: str) -> None:
    hold, take = HOLDERS[kind]

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Any:
            return hold(self.fc(x))

    class Taking(TowerParallel):
        def gather(self, outputs: Any, output_device: Any) -> Any:
            return torch.cat([take(output) for output in outputs])

    plain, wrapped = both(Taking, Net(), 3)
    for _ in range(2):
        x = batch(7)
        wrapped(x).square().sum().backward()
        plain.fc(x).square().sum().backward()
        assert_same_gradients(wrapped, plain)


def test_a_scatter_that_goes_with_a_forward_of_its_own_is_not_tower_losses() -> None:
    class Listed(TowerParallel):  # as PyTorch Geometric's
        def forward(self, rows: Any) -> Any:
            return super().parallel_apply([self.module], self.scatter(rows, self.device_ids), None)

        def scatter(self, rows: Any, device_ids: Any) -> Any:  # type: ignore[override]
            return [(torch.stack(rows),)]

    plain, wrapped = both(Listed, mlp(), 2)
    assert_close(wrapped(list(batch(4)))[0], plain(batch(4)))
    loss = wrapped.tower_loss(lambda replica, x: replica(x).square().mean(), batch(4))
    assert_close(loss, plain(batch(4)).square().mean())


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_own_steps_may_call_those_they_override(num_towers: int) -> None:
    class Scaled(TowerParallel):
        def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
            return super().scatter(tuple(value / 2 for value in inputs), kwargs, device_ids)

        def gather(self, outputs: Any, output_device: Any) -> Any:
            return super().gather(outputs, output_device) * 2

    plain, wrapped = both(Scaled, nn.Sequential(nn.Linear(3, 2, bias=False)), num_towers)
    for net in (wrapped, copy.deepcopy(wrapped)):
        plain.zero_grad()
        assert_go_backward_alike(plain, net, batch(5, requires_grad=True))


def test_a_step_put_on_a_wrapper_is_its_own() -> None:
    wrapped = TowerParallel(mlp(), device_ids=["cpu", "cpu"])
    own = wrapped.gather
    wrapped.gather = lambda outputs, output_device: len(outputs)
    assert wrapped(batch(4)) == 2
    wrapped.gather = own
    wrapped.replicate = wrapped.replicate  # the class's own, put back by hand: nothing that a forward would not call
    assert_close(wrapped(batch(4)), wrapped.module(batch(4)))


# ---- one tower, and what cannot be


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_an_empty_scatter_calls_the_module_without_inputs(num_towers: int) -> None:
    class Empty(TowerParallel):
        def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
            return [], []

    class Net(nn.Module):
        def forward(self) -> Tensor:
            return torch.ones(2)

    assert_close(Empty(Net(), device_ids=["cpu"] * num_towers)(), torch.ones(2))


@pytest.mark.parametrize(
    ("scattered", "error", "words"),
    [
        ([(1,)] * 3, TypeError, r"Mine\.scatter: expected to return each tower's inputs and .* but got list"),
        (None, TypeError, r"Mine\.scatter: .* but got NoneType"),
        (([(1,)] * 3, None), ValueError, r"Mine\.scatter: expected inputs for at most 2 towers, .* got 3 and 0"),
        (([(1,)] * 2, [{}]), ValueError, "got 2 and 1"),
    ],
)
def test_what_scatter_may_not_return_is_named(scattered: Any, error: type[Exception], words: str) -> None:
    kind = type("Mine", (TowerParallel,), {"scatter": lambda self, *args: scattered})
    with pytest.raises(error, match=words):
        kind(mlp(), device_ids=["cpu", "cpu"])(batch(4))


class Uncut(TowerParallel):
    def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
        raise AssertionError("one CPU tower's batch is not cut")


@pytest.mark.parametrize("style", STYLES)
def test_one_cpu_tower_gives_the_module_the_very_objects_that_it_is_given(style: str) -> None:
    seen: list[Any] = []

    class Net(nn.Module):
        def forward(self, x: Tensor, options: dict[str, Any]) -> Tensor:
            seen.extend([x, options])
            return x.sum()

    x, options = batch(4), {"mask": batch(4, seed=1), "names": ["a", "b"]}
    wrapped = Uncut(Net(), device_ids=["cpu"])
    if style == "drop-in":
        wrapped(x, options=options)
    else:
        wrapped.tower_loss(lambda net, x, options: net(x, options), x, options=options)
    assert seen[0] is x and seen[1] is options

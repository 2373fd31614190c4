"""Contract 4: modules that torch has compiled, scripted or traced work in towers, and so do those made of a wrapper."""

from __future__ import annotations

import copy
import io
import threading
import time
import warnings
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from tests.helpers import (
    EVERY_COUNT,
    assert_close,
    assert_same_gradients,
    batch,
    mean_of_squares_by,
    mlp,
    steps_follow,
    twins,
    wrap,
)
from torchtower import TowerParallel

# ---- torch.compile


class Body(nn.Module):  # torch compiles no nn.Sequential called as such
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.fixture
def counting_backend() -> Any:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    backend.graphs = graphs
    yield backend
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["torch.compile", "module.compile", "submodule", "compiled forward"])
def test_a_compiled_inner_module_is_compiled_once_for_all_towers(how: str, counting_backend: Any) -> None:
    plain = Body()
    net = copy.deepcopy(plain)
    if how == "torch.compile":
        inner: nn.Module = torch.compile(net, backend=counting_backend, dynamic=False)
    elif how == "module.compile":
        net.compile(backend=counting_backend, dynamic=False)
        inner = net
    elif how == "compiled forward":
        net.forward = torch.compile(net.forward, backend=counting_backend, dynamic=False)
        inner = net
    else:
        inner = nn.Sequential(torch.compile(net, backend=counting_backend, dynamic=False))
    wrapped = wrap(inner, 3)
    for step in range(3):
        x = batch(6, seed=step)
        for module in (plain, wrapped):
            module.zero_grad()
            module(x).square().sum().backward()
        for got, expected in zip(wrapped.parameters(), plain.parameters(), strict=True):
            assert_close(got.grad, expected.grad)
        with torch.no_grad():
            for p, q in zip(wrapped.parameters(), plain.parameters(), strict=True):
                p.sub_(p.grad, alpha=0.1)
                q.sub_(q.grad, alpha=0.1)
    assert len(counting_backend.graphs) == 1


def test_torch_compile_of_the_wrapper_gives_the_same_gradients(counting_backend: Any) -> None:
    plain, wrapped = twins(mlp(), 2)
    compiled = torch.compile(wrapped, backend=counting_backend)
    for step in range(2):
        plain.zero_grad()
        plain(batch(5, seed=step)).square().sum().backward()
        compiled.zero_grad()
        with pytest.warns(UserWarning, match=r"leaves what its towers do as it is; .* call the wrapper's compile\(\)"):
            out = compiled(batch(5, seed=step))
        out.square().sum().backward()
        assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", (1, 3))
def test_compile_of_the_wrapper_compiles_the_module_once_for_all_towers(num_towers: int, counting_backend: Any) -> None:
    plain, wrapped = twins(Body(), num_towers)
    steps_follow(plain, wrapped, lambda step: batch(6, seed=step))
    wrapped.compile(backend=counting_backend, dynamic=False)
    steps_follow(plain, wrapped, lambda step: batch(6, seed=step))
    assert len(counting_backend.graphs) == 1


@pytest.mark.filterwarnings("ignore:TowerParallel. expected to be called outside of what torch.compile compiles")
def test_torch_compile_of_a_step_around_the_wrapper_works(counting_backend: Any) -> None:
    plain, wrapped = twins(mlp(), 2)

    @torch.compile(backend=counting_backend)
    def loss_of(net: nn.Module, x: Tensor) -> Tensor:
        return net(x * 2).square().sum()

    loss_of(wrapped, batch(5)).backward()
    plain(batch(5) * 2).square().sum().backward()
    assert_same_gradients(wrapped, plain)


class SlowCompiler:
    """Counts graphs, and takes long enough over each for all towers to have come by then."""

    def __init__(self) -> None:
        self.num_forwards = self.num_backwards = 0

    def compile_forward(self, graph: Any, inputs: Any) -> Any:
        self.num_forwards += 1
        time.sleep(0.05)
        return make_boxed_func(graph.forward)

    def compile_backward(self, graph: Any, inputs: Any) -> Any:
        self.num_backwards += 1
        time.sleep(0.05)
        return make_boxed_func(graph.forward)

    def of(self, function: Any) -> Any:
        backend = aot_autograd(fw_compiler=self.compile_forward, bw_compiler=self.compile_backward)
        return torch.compile(function, backend=backend, fullgraph=True)


def go_through_epochs(model: nn.Module) -> None:
    """The last batch is shorter, evaluation needs no gradients; twice."""
    for epoch in range(2):
        for rows, is_training in ((16, True), (16, True), (12, True), (16, False), (12, False)):
            model.train(is_training)
            with torch.set_grad_enabled(is_training):
                out = model(batch(rows, seed=epoch))
            if is_training:
                out.square().sum().backward()


def test_what_a_new_size_or_state_needs_is_compiled_once_for_all_towers() -> None:
    compilers = []
    for num_towers in (1, 4):
        torch._dynamo.reset()
        compilers.append(SlowCompiler())
        model = TowerParallel(compilers[-1].of(Body().double()), ["cpu"] * num_towers, max_concurrency=num_towers)
        go_through_epochs(model)
    plain, towers = compilers
    assert plain.num_forwards > 2
    assert (towers.num_forwards, towers.num_backwards) == (plain.num_forwards, plain.num_backwards)


def test_once_graphs_serve_all_sizes_towers_run_at_once() -> None:
    torch._dynamo.reset()
    meet = threading.Barrier(2, timeout=10)
    meets = False

    class Meeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.compile(Body(), backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            if meets:
                meet.wait()
            return self.body(x)

    model = TowerParallel(Meeting().double(), ["cpu"] * 2, max_concurrency=2)
    for rows in (8, 6, 10, 12):
        model(batch(rows))
    meets = True
    for rows in (8, 14, 18):  # the last two are new
        model(batch(rows))


def test_a_compiled_loss_function_is_compiled_once_for_all_towers() -> None:
    compiler = SlowCompiler()
    torch._dynamo.reset()

    @compiler.of
    def loss_fn(replica: nn.Module, x: Tensor) -> Tensor:
        return replica(x).square().mean()

    model = TowerParallel(Body().double(), ["cpu"] * 4, max_concurrency=4)
    for seed in range(2):
        model.tower_loss(loss_fn, batch(8, seed=seed)).backward()
    assert (compiler.num_forwards, compiler.num_backwards) == (1, 1)


# ---- TorchScript


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda net: torch.jit.trace(net, batch(4))], ids=["script", "trace"]
)
@pytest.mark.parametrize("nested", [True, False])
def test_scripted_modules_work(make: Any, nested: bool) -> None:
    plain = mlp()
    scripted = make(copy.deepcopy(plain))
    wrapped = wrap(nn.Sequential(scripted) if nested else scripted, 2)
    for step in range(2):
        assert_close(wrapped(batch(5, seed=step)), plain(batch(5, seed=step)))
        for net in (plain, wrapped):
            net.zero_grad()
            net(batch(5, seed=step)).square().sum().backward()
        grads = [p.grad for p in wrapped.parameters()]
        for got, p in zip(grads, plain.parameters(), strict=True):
            assert_close(got, p.grad)


class Counted(nn.Module):
    """Tied parameters, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.tied = self.first
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.last(self.norm(self.tied(self.first(x))))


def from_file(net: nn.Module) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [torch.jit.script, from_file], ids=["script", "file"])
def test_a_scripted_module_is_followed(make: Any) -> None:
    scripted = make(Counted().double())
    wrapped = wrap(scripted, 2)
    wrapped(batch(4))
    assert float(scripted.seen) == 1 and bool(scripted.norm.running_mean.any())
    scripted.eval()
    frozen = scripted.norm.running_mean.clone()
    assert_close(wrapped(batch(4)), scripted(batch(4)))
    assert torch.equal(scripted.norm.running_mean, frozen)
    for p in scripted.last.parameters():
        p.requires_grad_(False)
    scripted.first.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    out = wrapped(batch(4))
    assert_close(out, scripted(batch(4)))
    out.sum().backward()
    assert scripted.last.weight.grad is None and scripted.first.weight.grad is not None
    wrapped.float()
    assert wrapped(batch(4).float()).dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
def test_a_frozen_scripted_module_works() -> None:
    plain = mlp().eval()
    assert_close(wrap(torch.jit.freeze(torch.jit.script(plain)), 3)(batch(7)), plain(batch(7)))


# ---- tracing and exporting


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("way", ["trace", "export"])
def test_a_wrapper_is_traced_and_exported_as_its_module(num_towers: int, way: str) -> None:
    plain, wrapped = twins(mlp(), num_towers)
    x = batch(6)
    if way == "trace":
        program: Any = torch.jit.trace(wrapped, x)
    else:
        program = torch.export.export(wrapped, (x,)).module()
    assert_close(program(x), plain(x))


def test_a_tower_loss_within_a_compiled_step_is_the_same_and_warns(counting_backend: Any) -> None:
    plain, wrapped = twins(mlp(), 2)

    @torch.compile(backend=counting_backend)
    def loss_of(x: Tensor) -> Any:
        return wrapped.tower_loss(mean_of_squares_by, x * 2)

    with pytest.warns(UserWarning, match="leaves what its towers do as it is"):
        loss = loss_of(batch(5))
    expected = mean_of_squares_by(plain, batch(5) * 2)
    for each in (loss, expected):
        each.backward()
    assert_close(loss, expected)
    assert_same_gradients(wrapped, plain)


def test_a_tower_loss_of_a_compiled_function_within_a_compiled_step_does_not_warn(counting_backend: Any) -> None:
    plain, wrapped = twins(mlp(), 2)

    def mean_of_squares(net: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = net(x)
        return out.square().mean()

    loss_fn = torch.compile(mean_of_squares, backend=counting_backend)

    @torch.compile(backend=counting_backend)
    def loss_of(x: Tensor) -> Any:
        return wrapped.tower_loss(loss_fn, x * 2)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = loss_of(batch(5))
    assert not [each for each in caught if "leaves what its towers do" in str(each.message)]
    assert_close(loss, mean_of_squares(plain, batch(5) * 2))

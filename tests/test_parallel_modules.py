"""Contract 4 and the issue's list of modules: whatever an nn.Module does, its towers do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, rnn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.helpers import (
    EVERY_COUNT,
    assert_close,
    assert_same_gradients,
    assert_same_parameters,
    assert_trains_alike,
    batch,
    mlp,
    steps_follow,
    twins,
    wrap,
)
from torchtower import TowerParallel, current_tower

# ---- recurrent, embeddings, attention


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        return self.rnn(x)[0]


@pytest.mark.parametrize("num_towers", (1, 3))
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_modules_follow_the_plain_ones(kind: type[nn.Module], options: Any, num_towers: int) -> None:
    plain, wrapped = twins(Recurrent(kind, **options), num_towers)
    steps_follow(plain, wrapped, lambda step: batch(5, 4 * 3, seed=step).view(5, 4, 3))
    with torch.no_grad():
        assert_close(wrapped(torch.ones(5, 4, 3).double()), plain(torch.ones(5, 4, 3).double()))


def test_an_lstm_with_hidden_state_splits_along_dim_1() -> None:
    plain, wrapped = twins(nn.LSTM(3, 4), 2, dim=1)
    for net in (plain, wrapped):
        x, state = batch(4, 5 * 3).view(4, 5, 3), (torch.zeros(1, 5, 4).double(), torch.ones(1, 5, 4).double())
        out, (h, c) = net(x, state)
        assert out.shape == (4, 5, 4) and h.shape == (1, 5, 4)
        (out.sum() + h.square().sum() + c.sum()).backward()
    assert_same_gradients(wrapped, plain)


def test_an_lstm_trains_its_new_weights_after_a_move_to_another_dtype() -> None:
    net = Recurrent(nn.LSTM)
    wrapped = wrap(net, 2)
    wrapped(torch.randn(4, 2, 3)).sum().backward()
    wrapped.double()
    plain = copy.deepcopy(net)
    plain.zero_grad()
    wrapped.zero_grad()
    steps_follow(plain, wrapped, lambda step: batch(4, 2 * 3, seed=step).view(4, 2, 3))


def test_packed_sequences_made_inside_the_module_work() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            out, _ = rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
            return out

    assert_trains_alike(Net(), 3, batch(5, 4 * 3).view(5, 4, 3), torch.tensor([4, 1, 3, 2, 4]))


def test_a_packed_sequence_as_input_says_what_to_do() -> None:
    packed = rnn.pack_sequence([torch.ones(3, 3), torch.ones(2, 3)])
    with pytest.raises(ValueError, match="PackedSequence"):
        wrap(nn.GRU(3, 4), 2)(packed)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_stay_sparse(kind: type[nn.Module], num_towers: int) -> None:
    plain, wrapped = twins(kind(10, 3, sparse=True), num_towers)
    index = torch.randint(10, (7, 4), generator=torch.Generator().manual_seed(0))
    for net in (plain, wrapped):
        optimizer = torch.optim.SparseAdam(list(net.parameters()), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            net(index).square().sum().backward()
            optimizer.step()
    assert wrapped.module.weight.grad.is_sparse
    assert_same_gradients(wrapped, plain)
    assert_same_parameters(wrapped, plain)


def test_sparse_gradients_accumulate_and_average_in_tower_loss() -> None:
    plain, wrapped = twins(nn.Embedding(10, 3, sparse=True), 3)
    for step in range(2):
        index = torch.randint(10, (7, 4), generator=torch.Generator().manual_seed(step))
        plain(index).square().mean().backward()
        wrapped.tower_loss(lambda net, i: net(i).square().mean(), index).backward()
    assert_same_gradients(wrapped, plain)


def test_an_embedding_that_renormalises_its_weight_works() -> None:
    plain, wrapped = twins(nn.Embedding(10, 3, max_norm=1.0), 3)
    index = torch.arange(9).view(9, 1)
    for net in (plain, wrapped):
        net(index).square().sum().backward()
    assert_same_gradients(wrapped, plain)
    assert_same_parameters(wrapped, plain)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.decoder = nn.Linear(4, 10, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, index: Tensor) -> Tensor:
        assert self.decoder.weight is self.embedding.weight
        return self.decoder(self.embedding(index))


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_tied_parameters_stay_tied_and_sum_their_gradients(num_towers: int) -> None:
    plain, wrapped = twins(Tied(), num_towers)
    steps_follow(plain, wrapped, lambda step: torch.arange(7).view(7, 1) + step)
    assert wrapped.module.decoder.weight is wrapped.module.embedding.weight
    assert len(list(wrapped.parameters())) == 1


def test_a_submodule_used_in_two_places_is_one_submodule() -> None:
    shared = nn.Linear(3, 3)
    plain, wrapped = twins(nn.Sequential(shared, nn.Tanh(), shared), 3)
    steps_follow(plain, wrapped, lambda step: batch(7, seed=step))


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_works_with_masks(training: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype).isinf()
            return self.encoder(x, mask=causal, src_key_padding_mask=padding)

    net = Net().train(training)
    padding = torch.zeros(5, 6, dtype=torch.bool)
    padding[2, 4:] = True
    assert_trains_alike(net, 3, batch(5, 6 * 4).view(5, 6, 4), padding, loss=lambda out: out.sin().sum())
    plain, wrapped = twins(net, 3)
    with torch.no_grad():
        x = batch(5, 6 * 4).view(5, 6, 4)
        assert_close(wrapped(x, padding), plain(x, padding))


# ---- parameters of every kind


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([torch.randn(3), torch.randn(3)])
        self.dict = nn.ParameterDict({"a": torch.randn(3), "b": torch.randn(3)})
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.named = nn.ModuleDict({"x": nn.Linear(3, 3)})

    def forward(self, x: Tensor) -> Tensor:
        assert len(self.list) == 2 and sorted(self.dict) == ["a", "b"]
        for p in self.list:
            x = x * p
        for name in self.dict:
            x = x + self.dict[name]
        for layer in (*self.layers, *self.named.values()):
            x = layer(x).tanh()
        return x


def test_parameter_and_module_containers_work() -> None:
    plain, wrapped = twins(Lists(), 3)
    steps_follow(plain, wrapped, lambda step: batch(7, seed=step))


PARAMETRIZATIONS = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(3, 3)),
    "two of them": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 3)), parametrizations.weight_norm(nn.Linear(3, 3))
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_parametrized_modules_follow_the_plain_ones(kind: str) -> None:
    module = PARAMETRIZATIONS[kind]().double()
    state = module.state_dict()
    plain = PARAMETRIZATIONS[kind]().double()
    plain.load_state_dict(state)
    steps_follow(plain, wrap(module, 3), lambda step: batch(7, seed=step))


@pytest.mark.parametrize("apply", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_keeps_the_main_towers_iterations(apply: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    net = apply(nn.Linear(3, 3)).double()
    before = {name: b.clone() for name, b in net.named_buffers()}
    wrapped = wrap(net, 3)
    for step in range(3):
        wrapped(batch(7, seed=step)).sum().backward()
    assert any(not torch.equal(b, before[name]) for name, b in net.named_buffers())
    assert all(p.grad is not None for p in net.parameters())


def test_a_parametrization_registered_or_removed_after_wrapping_counts() -> None:
    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + weight.T

    plain, wrapped = twins(nn.Sequential(nn.Linear(3, 3)), 2)
    x = batch(5)
    wrapped(x)
    for net in (plain, wrapped.module):
        parametrize.register_parametrization(net[0], "weight", Symmetric())
    assert_close(wrapped(x), plain(x))
    for net in (plain, wrapped.module):
        parametrize.remove_parametrizations(net[0], "weight")
    assert_close(wrapped(x), plain(x))
    for net in (plain, wrapped):
        net(x).square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_a_lazy_module_says_to_run_a_batch_first_and_works_then() -> None:
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    wrapped = wrap(net, 2)
    with pytest.raises(ValueError, match="lazy"):
        wrapped(torch.ones(4, 3))
    net(torch.ones(4, 3))
    wrapped(torch.randn(4, 3)).sum().backward()
    assert net[0].weight.grad is not None


def test_complex_parameters_get_complex_gradients() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))
            self.real = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex128) @ self.weight).abs() + self.real(x)

    plain, wrapped = Net(), None
    plain.real.double()
    wrapped = wrap(copy.deepcopy(plain), 3)
    steps_follow(plain, wrapped, lambda step: batch(7, seed=step))
    assert wrapped.module.weight.grad.dtype == torch.complex128


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_modules_of_lower_precision_keep_their_dtype(dtype: torch.dtype) -> None:
    plain = nn.Linear(3, 2).to(dtype)
    wrapped = wrap(copy.deepcopy(plain), 2)
    x = torch.randn(4, 3).to(dtype)
    for net in (plain, wrapped):
        out = net(x)
        assert out.dtype == dtype
        out.sum().backward()
    assert wrapped.module.weight.grad.dtype == dtype
    assert torch.allclose(wrapped.module.weight.grad.float(), plain.weight.grad.float(), rtol=2e-2, atol=1e-2)


def test_parameters_of_different_dtypes_live_in_one_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3).double(), nn.Linear(3, 3).float()
            self.c = nn.Linear(3, 3).bfloat16()
            self.register_parameter("number", nn.Parameter(torch.tensor([2]), requires_grad=False))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).float()).bfloat16()).float() * self.number

    wrapped = wrap(Net(), 2)
    wrapped(batch(4)).sum().backward()
    assert [p.grad.dtype for p in wrapped.parameters() if p.requires_grad] == [
        *[torch.float64] * 2, *[torch.float32] * 2, *[torch.bfloat16] * 2
    ]  # fmt: skip


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_keep_the_memory_format_of_their_parameters(
    num_towers: int, memory_format: torch.memory_format
) -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 2), nn.Conv2d(8, 4, 2)).to(memory_format=memory_format)
    x = batch(5, 4 * 6 * 6).view(5, 4, 6, 6).contiguous(memory_format=memory_format)
    plain, wrapped = twins(net, num_towers)
    for net in (plain, wrapped):
        for _ in range(2):
            net(x).square().sum().backward()
            out = net(x)
    assert_same_gradients(wrapped, plain)
    for layer in wrapped.module:
        assert layer.weight.grad.is_contiguous(memory_format=memory_format)
        assert layer.weight.is_contiguous(memory_format=memory_format)
    assert out.is_contiguous(memory_format=memory_format)


def test_a_buffer_that_requires_grad_gets_gradients() -> None:
    class Net(nn.Module):
        def __init__(self, t: Tensor) -> None:
            super().__init__()
            self.register_buffer("wanted", t)
            self.register_buffer("plain", t.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return x * self.wanted + self.plain

    net = Net(torch.randn(3, dtype=torch.float64, requires_grad=True))
    wrapped = wrap(net, 2)
    x = batch(4)
    assert torch.autograd.gradcheck(lambda t: wrapped(x), (net.wanted,))


def test_a_tensor_in_a_plain_attribute_trains_as_in_the_plain_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.extra = [torch.ones(3, dtype=torch.float64, requires_grad=True)]

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.extra[0]

    plain, wrapped = twins(Net(), 3)
    for net in (plain, wrapped):
        net(batch(7)).square().sum().backward()
    assert_same_gradients(wrapped, plain)
    assert_close(wrapped.module.extra[0].grad, plain.extra[0].grad)


def test_a_parameter_subclass_stays_one_in_every_tower() -> None:
    class Special(nn.Parameter):
        pass

    seen = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = Special(torch.ones(3, dtype=torch.float64))
            self.weight.tag = "kept"

        def forward(self, x: Tensor) -> Tensor:
            seen.append((type(self.weight), self.weight.tag))
            return x * self.weight

    wrapped = wrap(Net(), 2)
    wrapped(batch(4)).sum().backward()
    assert seen == [(Special, "kept")] * 2
    assert_close(wrapped.module.weight.grad, batch(4).sum(0))


# ---- hooks


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_of_submodules_run_in_every_tower_with_that_towers_modules() -> None:
    seen: list[tuple[str, int | None, bool]] = []
    net = mlp()
    layer = net[0]

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *rest: Any) -> None:
            seen.append((name, current_tower(), type(module) is nn.Linear))

        return hook

    layer.register_forward_pre_hook(note("pre"))
    layer.register_forward_hook(note("forward"))
    layer.register_full_backward_pre_hook(note("backward pre"))
    layer.register_full_backward_hook(note("backward"))
    wrapped = wrap(net, 2)
    wrapped(batch(4)).sum().backward()
    names = ("pre", "forward", "backward pre", "backward")
    assert sorted(seen) == sorted((name, tower, True) for name in names for tower in (0, 1))


def test_hooks_that_change_values_change_the_gradients_as_in_the_plain_module() -> None:
    plain, wrapped = twins(mlp(), 3)
    for net in (plain, wrapped.module):
        net[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        net[0].register_forward_hook(lambda module, args, out: out + 1)
        net[2].register_forward_hook(lambda module, args, kwargs, out: out * 3, with_kwargs=True)
        net[2].register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 0.5,))
    for net in (plain, wrapped):
        net(batch(7)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_hooks_added_and_removed_after_the_first_forward_count() -> None:
    wrapped = wrap(nn.Identity(), 2)
    x = batch(4)
    wrapped(x)
    handle = wrapped.module.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(wrapped(x), x + 1)
    handle.remove()
    assert torch.equal(wrapped(x), x)


def test_hooks_of_the_wrapper_itself_see_the_whole_batch_once() -> None:
    wrapped = wrap(mlp(), 2)
    seen = []
    wrapped.register_forward_pre_hook(lambda module, args: seen.append(("pre", len(args[0]), module)))
    wrapped.register_forward_hook(lambda module, args, out: seen.append(("post", len(out), module)))
    wrapped.register_full_backward_hook(lambda module, gi, go: seen.append(("back", len(go[0]), module)))
    wrapped(batch(5, requires_grad=True)).sum().backward()
    assert seen == [("pre", 5, wrapped), ("post", 5, wrapped), ("back", 5, wrapped)]


def test_a_hook_bound_to_a_parent_acts_on_the_towers_own_parent() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.scale = nn.Linear(3, 2), nn.Parameter(torch.tensor(2.0))
            self.fc.register_forward_hook(self.rescale)

        def rescale(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
            assert module is self.fc
            return out * self.scale

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    assert_trains_alike(Net(), 3, batch(7))


def test_tensor_hooks_inside_forward_run_in_every_tower() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = self.fc(x)
            if out.requires_grad:
                out.register_hook(lambda grad: grad * 3)
            return out

    assert_trains_alike(Net(), 3, batch(7))


# ---- checkpointing


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, times: int = 1) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(3, 4), mlp(4, 4), nn.Linear(4, 2)
        self.reentrant, self.times = reentrant, times

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.times):
            x = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.last(x)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool, times: int, num_towers: int) -> None:
    plain, wrapped = twins(Checkpointed(reentrant, times), num_towers)
    steps_follow(plain, wrapped, lambda step: batch(7, seed=step))


@pytest.mark.parametrize("with_more", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_the_wrapper_works(reentrant: bool, with_more: bool) -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        x = batch(5, requires_grad=True)
        part = nn.Sequential(nn.Tanh(), net, nn.Tanh()) if with_more else net
        checkpoint(part, x, use_reentrant=reentrant).square().sum().backward()
    assert_same_gradients(wrapped, plain)


def test_checkpoint_sequential_works_inside() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.body, 2, x, use_reentrant=False)

    assert_trains_alike(Net(), 3, batch(7))


def test_checkpointing_with_attributes_changed_between_forward_and_backward_recomputes_this_towers_part() -> None:
    towers = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def part(self, x: Tensor) -> Tensor:
            towers.append(current_tower())
            return self.fc(x).tanh()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.part, x, use_reentrant=False)

    plain, wrapped = twins(Net(), 2)
    out = wrapped(batch(4))
    assert sorted(towers) == [0, 1]
    out.square().sum().backward()
    assert sorted(towers) == [0, 0, 1, 1]
    plain(batch(4)).square().sum().backward()
    assert_same_gradients(wrapped, plain)


# ---- compilation


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
    class Net(nn.Module):  # torch compiles no nn.Sequential called as such
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    plain = Net()
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
        for net in (plain, compiled):
            net.zero_grad()
            net(batch(5, seed=step)).square().sum().backward()
        assert_same_gradients(wrapped, plain)


def test_torch_compile_of_a_step_around_the_wrapper_works(counting_backend: Any) -> None:
    plain, wrapped = twins(mlp(), 2)

    @torch.compile(backend=counting_backend)
    def loss_of(net: nn.Module, x: Tensor) -> Tensor:
        return net(x * 2).square().sum()

    loss_of(wrapped, batch(5)).backward()
    plain(batch(5) * 2).square().sum().backward()
    assert_same_gradients(wrapped, plain)


# ---- wrappers in and beside other modules


def test_two_wrappers_in_one_program_work() -> None:
    plain = nn.Sequential(mlp(3, 3), mlp(3, 2))
    wrapped = nn.Sequential(wrap(copy.deepcopy(plain[0]), 2), wrap(copy.deepcopy(plain[1]), 3))
    for net in (plain, wrapped):
        net(batch(7)).square().sum().backward()
    for ours, theirs in zip(wrapped, plain, strict=True):
        assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("outer", (1, 2))
@pytest.mark.parametrize("inner", (1, 2))
def test_a_wrapper_inside_a_wrapper_works(outer: int, inner: int) -> None:
    plain = nn.Sequential(mlp(3, 3), mlp(3, 2))
    nested = wrap(nn.Sequential(wrap(copy.deepcopy(plain[0]), inner), copy.deepcopy(plain[1])), outer)
    for net in (plain, nested):
        net(batch(7)).square().sum().backward()
    for got, expected in zip(nested.parameters(), plain.parameters(), strict=True):
        assert_close(got.grad, expected.grad)


def test_one_module_in_two_wrappers_accumulates_from_both() -> None:
    plain = mlp()
    net = copy.deepcopy(plain)
    a, b = wrap(net, 2), wrap(net, 3)
    (a(batch(5)).square().sum() + b(batch(7)).sum()).backward()
    (plain(batch(5)).square().sum() + plain(batch(7)).sum()).backward()
    assert_same_gradients(net, plain)


def test_a_wrapper_as_part_of_a_larger_model_trains_with_it() -> None:
    class Whole(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(3, 3).double(), body, nn.Linear(2, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.stem(x)))

    plain = Whole(mlp())
    whole = copy.deepcopy(plain)
    whole.body = wrap(whole.body, 3)
    for net in (plain, whole):
        optimizer = torch.optim.Adam(net.parameters())
        for step in range(3):
            optimizer.zero_grad()
            net(batch(7, seed=step)).square().sum().backward()
            optimizer.step()
    for got, expected in zip(whole.parameters(), plain.parameters(), strict=True):
        assert_close(got, expected)


def test_data_parallel_functions_of_torch_still_work_on_cpu_modules() -> None:
    wrapped = wrap(mlp(), 2)
    assert torch.equal(wrapped.module(batch(4)), wrapped.module(batch(4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(batch(4))


def test_convolutional_networks_train_alike() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                nn.Conv2d(4, 4, 3), nn.LayerNorm([4, 1, 1]), nn.SiLU(inplace=True), nn.Flatten(), nn.Linear(4, 2),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return F.log_softmax(self.body(x), dim=1)

    plain, wrapped = twins(Net(), 3)
    steps_follow(plain, wrapped, lambda step: batch(7, 3 * 6 * 6, seed=step).view(7, 3, 6, 6))


def test_an_unknown_buffers_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"TowerParallel: expected buffers to be one of .* but got 'sum'"):
        TowerParallel(mlp(), ["cpu", "cpu"], buffers="sum")

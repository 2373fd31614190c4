"""Contract 4 and the issue's list of modules: whatever an nn.Module does, its towers do."""

from __future__ import annotations

import collections
import copy
import functools
import io
import threading
import types
import warnings
import weakref
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
    SEVERAL,
    assert_close,
    assert_same_gradients,
    assert_same_parameters,
    assert_trains_alike,
    batch,
    mlp,
    twins,
    wrap,
)
from torchtower import TowerParallel, convert_sync_batchnorm, current_tower, tower_sum


def steps_follow(plain: nn.Module, wrapped: nn.Module, make: Callable[[int], Tensor], steps: int = 3) -> None:
    """Both take the same few optimizer steps, and stay together."""
    for net in (plain, wrapped):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(steps):
            optimizer.zero_grad()
            net(make(step)).square().mean().backward()
            optimizer.step()
    assert_same_gradients(wrapped, plain)
    assert_same_parameters(wrapped, plain)


# ---- batch normalisation

EVERY_NORM = {
    "1d": (lambda **o: nn.BatchNorm1d(3, **o), lambda rows: batch(rows)),
    "2d": (lambda **o: nn.BatchNorm2d(3, **o), lambda rows: batch(rows, 3 * 4 * 4).view(rows, 3, 4, 4)),
    "3d": (lambda **o: nn.BatchNorm3d(3, **o), lambda rows: batch(rows, 3 * 8).view(rows, 3, 2, 2, 2)),
}


@pytest.mark.parametrize("num_towers", SEVERAL)
@pytest.mark.parametrize("kind", EVERY_NORM)
def test_running_statistics_are_the_main_towers(kind: str, num_towers: int) -> None:
    make, rows = EVERY_NORM[kind]
    plain, wrapped = twins(make(), num_towers)
    for _ in range(3):
        x = rows(4 * num_towers)
        wrapped(x)
        plain(x[:4])
    inner = wrapped.module
    assert_close(inner.running_mean, plain.running_mean)
    assert_close(inner.running_var, plain.running_var)
    assert inner.num_batches_tracked == 3


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_evaluation_uses_the_running_statistics_in_every_tower(num_towers: int) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    for step in range(2):
        net(batch(8, seed=step))
    net.eval()
    before = copy.deepcopy(net.state_dict())
    assert_trains_alike(net, num_towers, batch(9))
    plain, wrapped = twins(net, num_towers)
    assert_close(wrapped(batch(9)), plain(batch(9)))
    assert all(torch.equal(wrapped.module.state_dict()[k], v) for k, v in before.items())


def test_buffers_mean_pools_the_towers_statistics_by_rows() -> None:
    net = nn.BatchNorm1d(3).double()
    wrapped = wrap(net, 3, buffers="mean")
    x = batch(10)
    parts = torch.split(x, [4, 3, 3])
    wrapped(x)
    mean = sum(0.1 * part.mean(0) * len(part) / 10 for part in parts)
    var = sum((0.9 + 0.1 * part.var(0)) * len(part) / 10 for part in parts)
    assert_close(net.running_mean, mean)
    assert_close(net.running_var, var)
    assert net.num_batches_tracked == 1


def test_train_and_eval_take_effect_at_the_next_forward() -> None:
    flags = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            flags.append((self.training, self.inner.training))
            return x

    wrapped = wrap(Net(), 2)
    for mode in (True, False, True):
        wrapped.train(mode)
        wrapped(batch(4))
        assert flags == [(mode, mode)] * 2
        flags.clear()
    wrapped.module.inner.eval()
    wrapped(batch(4))
    assert flags == [(True, False)] * 2


NORM_OPTIONS: list[dict[str, Any]] = [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}]


@pytest.mark.parametrize("style", ["drop-in", "tower loss"])
@pytest.mark.parametrize("rows", [3, 7, 12])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
def test_synchronised_batch_norm_is_batch_norm_over_the_whole_batch(
    num_towers: int, rows: int, options: dict[str, Any], style: str
) -> None:
    plain = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, **options), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    wrapped = wrap(convert_sync_batchnorm(copy.deepcopy(plain)), num_towers)
    for step in range(3):
        results = []
        y = batch(rows, 2, seed=100 + step)
        for net in (plain, wrapped):
            x = batch(rows, seed=step, requires_grad=True)
            if style == "tower loss" and net is wrapped:
                loss = wrapped.tower_loss(lambda net, x, y: F.mse_loss(net(x), y), x, y)
            else:
                loss = F.mse_loss(net(x), y)
            loss.backward()
            results.append((loss, x.grad))
        assert_close(results[1][0], results[0][0])
        assert_close(results[1][1], results[0][1], 1e-11)
    assert_same_gradients(wrapped, plain, 1e-11)
    if options.get("track_running_stats", True):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            got, expected = getattr(wrapped.module[1], name), getattr(plain[1], name)
            assert_close(got.double(), expected.double())


def test_synchronised_batch_norm_takes_images_and_channels_last() -> None:
    plain = (
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).double().to(memory_format=torch.channels_last)
    )
    wrapped = wrap(convert_sync_batchnorm(copy.deepcopy(plain)), 3)
    x = batch(7, 3 * 5 * 5).view(7, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    for net in (plain, wrapped):
        net(x).sin().sum().backward()
    assert_same_gradients(wrapped, plain, 1e-11)
    assert_close(wrapped.module[1].running_var, plain[1].running_var)


@pytest.mark.parametrize("style", ["drop-in", "tower loss"])
def test_synchronised_batch_norm_differentiates_twice(style: str) -> None:
    plain = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    wrapped = wrap(convert_sync_batchnorm(copy.deepcopy(plain)), 2)
    for net in (plain, wrapped):
        x = batch(7, requires_grad=True)
        if style == "tower loss" and net is wrapped:
            loss = wrapped.tower_loss(lambda net, x: net(x).square().mean(), x)
        else:
            loss = net(x).square().mean()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.square().sum().backward()
    assert_same_gradients(wrapped, plain, 1e-9)


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_synchronised_batch_norm_works_where_towers_take_turns(at_once: int) -> None:
    plain = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4)).double()
    wrapped = wrap(convert_sync_batchnorm(copy.deepcopy(plain)), 4, max_concurrency=at_once)
    for net in (plain, wrapped):
        net(batch(9)).sin().sum().backward()
    assert_same_gradients(wrapped, plain, 1e-11)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_tower_that_fails_before_the_others_meet_it_leaves_nobody_waiting(at_once: int, error: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fails = convert_sync_batchnorm(nn.BatchNorm1d(3)).double(), True

        def forward(self, x: Tensor) -> Tensor:
            if self.fails and current_tower() == 1:
                raise error("told to fail")
            return self.norm(x)

    wrapped = wrap(Net(), 3, max_concurrency=at_once)
    with pytest.raises(error, match="told to fail"):
        wrapped(batch(6))
    wrapped.module.fails = False
    assert wrapped(batch(6)).mean(0).abs().max() < 1e-12


def test_towers_that_meet_unequally_often_are_told() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if current_tower() == 1 else x + tower_sum(x.sum())

    with pytest.raises(RuntimeError, match="expected every tower to come"):
        wrap(Net(), 3)(batch(6))


@pytest.mark.parametrize("style", ["drop-in", "tower loss"])
def test_a_sum_over_towers_is_that_of_the_whole_batch_with_its_gradients(style: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = self.fc(x)
            return out / tower_sum(out.exp().sum(0))

    plain, wrapped = twins(Net(), 3)
    plain(batch(7)).square().mean().backward()
    if style == "drop-in":
        wrapped(batch(7)).square().mean().backward()
    else:
        wrapped.tower_loss(lambda net, x: net(x).square().mean(), batch(7)).backward()
    assert_same_gradients(wrapped, plain)


def test_conversion_keeps_parameters_statistics_and_state_dict() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4)), nn.BatchNorm2d(4).eval()).double()
    before, parameters = copy.deepcopy(net.state_dict()), list(net.parameters())
    converted = convert_sync_batchnorm(net)
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    assert all(torch.equal(converted.state_dict()[k], v) for k, v in before.items())
    assert converted[2].training is False and converted[1].training is True
    assert not isinstance(converted[1][0], nn.BatchNorm1d)


def test_synchronised_batch_norm_with_an_idle_tower_and_a_single_row_names_the_trouble() -> None:
    wrapped = wrap(convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3))).double(), 2)
    with pytest.raises(ValueError, match="more than 1 value"):
        wrapped(batch(1))
    wrapped(batch(4))


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("silent", [0, 1])
def test_a_tower_of_weight_zero_still_hears_of_the_others_through_shared_statistics(
    num_towers: int, silent: int
) -> None:
    def loss_fn(net: Any, x: Tensor) -> tuple[Tensor, float]:
        tower = current_tower() or 0
        ignored = tower == silent and num_towers > 1
        labels = torch.full((len(x),), -100 if ignored else 1)  # the mean of no losses is not a number
        return F.cross_entropy(net(x), labels), 0.0 if ignored else 1.0

    plain = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    wrapped = wrap(convert_sync_batchnorm(copy.deepcopy(plain)), num_towers)
    rows = 4 * num_towers
    x, ours = batch(rows, requires_grad=True), batch(rows, requires_grad=True)
    heard = [r for r in range(rows) if r // 4 != silent or num_towers == 1]
    expected = F.cross_entropy(plain(x)[heard], torch.ones(len(heard), dtype=torch.int64))
    got = wrapped.tower_loss(loss_fn, ours)
    assert_close(got, expected)
    expected.backward()
    got.backward()
    assert_same_gradients(wrapped, plain, 1e-11)
    assert_close(ours.grad, x.grad, 1e-11)


def test_a_batch_norm_in_two_places_is_converted_once_and_in_both() -> None:
    norm = nn.BatchNorm1d(3)
    plain = nn.Sequential(norm, nn.Linear(3, 3), norm).double()
    converted = convert_sync_batchnorm(copy.deepcopy(plain))
    assert converted[0] is converted[2] and not isinstance(converted[2], nn.BatchNorm1d)
    assert_close(wrap(converted, 2)(batch(8)), plain(batch(8)))


def test_a_lazy_batch_norm_is_not_converted() -> None:
    with pytest.raises(ValueError, match="convert_sync_batchnorm: expected every parameter to have a shape"):
        convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()))


def test_synchronised_batch_norm_takes_an_empty_batch() -> None:
    wrapped = wrap(convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()), 2)
    assert wrapped(batch(4)[:0]).shape == (0, 4)


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


# ---- what forward leaves behind


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(()))
        self.register_buffer("none", None)
        self.calls, self.log, self.table = 0, [], {}
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.in_place.add_(1)
        self.assigned = self.assigned + 1
        self.calls += 1
        self.log.append(len(x))
        self.table[self.calls] = "seen"
        self.last_input = x
        return self.fc(x)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_the_main_towers_forward_leaves_behind_is_kept(num_towers: int) -> None:
    net = Counting().double()
    wrapped = wrap(net, num_towers)
    x = batch(4 * num_towers)
    for _ in range(3):
        wrapped(x).sum().backward()
    assert net.in_place == 3 and net.assigned == 3 and net.calls == 3
    assert net.log == [4, 4, 4] and net.table == {1: "seen", 2: "seen", 3: "seen"}
    assert torch.equal(net.last_input, x[:4])
    assert "assigned" in net._buffers and isinstance(net.assigned, Tensor)


def test_other_towers_start_each_forward_from_the_main_towers_state() -> None:
    seen: dict[int, list[Any]] = {0: [], 1: []}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("step", torch.zeros(()))
            self.count = 0

        def forward(self, x: Tensor) -> Tensor:
            seen[current_tower()].append((self.step.item(), self.count))
            if current_tower() == 0:
                self.step += 1
                self.count += 1
            return x

    wrapped = wrap(Net(), 2)
    for _ in range(3):
        wrapped(batch(4))
    wrapped.module.step.fill_(7)
    wrapped.module.count = 9
    wrapped(batch(4))
    assert seen[0] == seen[1] == [(0, 0), (1, 1), (2, 2), (7, 9)]


def test_what_other_towers_leave_behind_is_forgotten() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if current_tower() == 1:
                self.mine = True
            assert current_tower() == 1 or not hasattr(self, "mine")
            return x

    wrapped = wrap(Net(), 2)
    for _ in range(2):
        wrapped(batch(4))
    assert not hasattr(wrapped.module, "mine")


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_buffer_that_is_assigned_and_then_written_to_follows_the_plain_module(num_towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.state.mul_(3)
            self.state = self.state + 1
            self.state.mul_(2)
            return x * self.state

    plain, wrapped = twins(Net(), num_towers)
    for step in range(4):
        assert_close(wrapped(batch(9, seed=step)), plain(batch(9, seed=step)))
    assert wrapped.module.state == plain.state


def test_an_attribute_that_forward_deletes_is_gone_and_a_new_buffer_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once = 1

        def forward(self, x: Tensor) -> Tensor:
            if hasattr(self, "once"):
                del self.once
                self.register_buffer("late", torch.zeros(()))
            self.late += 1
            return x

    wrapped = wrap(Net(), 2)
    for _ in range(3):
        wrapped(batch(4))
    assert not hasattr(wrapped.module, "once") and wrapped.module.late == 3


def test_a_submodule_made_in_the_first_forward_is_trained() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = None

        def forward(self, x: Tensor) -> Tensor:
            if self.head is None:
                self.head = nn.Linear(x.shape[1], 2).double()
            return self.head(x)

    wrapped = wrap(Net(), 2)
    with torch.no_grad():
        wrapped(batch(4))
    assert isinstance(wrapped.module.head, nn.Linear)
    wrapped(batch(4)).sum().backward()
    assert_close(wrapped.module.head.weight.grad, batch(4).sum(0).expand(2, 3).contiguous())


def test_attributes_changed_on_the_wrapped_module_reach_every_tower() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.options = 1.0, {"shift": 0.0}

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale + self.options["shift"]

    net = Net()
    wrapped = wrap(net, 3)
    x = batch(6)
    assert torch.equal(wrapped(x), x)
    net.scale = 2.0
    assert torch.equal(wrapped(x), 2 * x)
    net.options["shift"] = 1.0
    assert torch.equal(wrapped(x), 2 * x + 1)
    net.forward = lambda x: -x
    assert torch.equal(wrapped(x), -x)
    del net.forward
    assert torch.equal(wrapped(x), 2 * x + 1)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_an_auxiliary_loss_left_in_an_attribute_trains_through_the_main_tower(num_towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.trunk(x).tanh()
            self.auxiliary = hidden.square().mean()
            return self.head(hidden)

    plain, wrapped = twins(Net(), num_towers)
    x = batch(3 * num_towers)
    for step in range(2):
        plain(x[:3])
        auxiliary = plain.auxiliary
        (plain(x).square().mean() + auxiliary).backward()
        (wrapped(x).square().mean() + wrapped.module.auxiliary).backward()
        assert_same_gradients(wrapped, plain)
        assert wrapped.module.auxiliary.requires_grad, step


def test_an_auxiliary_loss_in_tower_loss_carries_its_full_weight() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = self.fc(x)
            self.auxiliary = out.square().mean()
            return out

    plain, wrapped = twins(Net(), 2)
    x = batch(6)
    loss = wrapped.tower_loss(lambda net, x: net(x).mean(), x)
    (loss + wrapped.module.auxiliary).backward()
    (plain(x).mean() + plain.fc(x[:3]).square().mean()).backward()
    assert_same_gradients(wrapped, plain)


def test_losses_collected_in_a_list_train_through_the_main_tower() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.losses = nn.Linear(3, 2), []

        def forward(self, x: Tensor) -> Tensor:
            self.losses = [self.fc(x).square().mean()]
            return self.fc(x)

    plain, wrapped = twins(Net(), 2)
    x = batch(6)
    (wrapped(x).sum() + wrapped.module.losses[0]).backward()
    (plain(x).sum() + plain.fc(x[:3]).square().mean()).backward()
    assert_same_gradients(wrapped, plain)


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


# ---- traps for replication


class SelfReferring(nn.Module):
    """Leads back to itself in every way that Python offers."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0, 4.0]))
        self.fc = nn.Linear(3, 3)
        self.way = way
        self.by_method = self.scaled
        self.by_partial = functools.partial(SelfReferring.scaled, self)
        self.by_closure = lambda x: self.scaled(x)
        self.by_list = [self.fc]
        self.by_dict = {"fc": self.fc}
        self.by_tuple = (("fc", self.fc),)
        self.by_set = {self.fc}
        self.by_reference = weakref.ref(self)
        self.by_default = lambda x, net=self: net.scaled(x)
        self.by_parent = [self]
        self.by_weight = [self.weight]

        def recursive(x: Tensor, depth: int = 2) -> Tensor:
            return recursive(x, depth - 1) if depth else self.scaled(x)

        self.by_recursion = recursive
        visitors: dict[str, Any] = {}
        visitors["leaf"] = lambda x: self.scaled(x)
        visitors["node"] = lambda x: visitors["leaf"](x)
        self.by_each_other = visitors["node"]
        self.by_builtin = {"scaled": self.scaled}.get
        self.by_weak_method = weakref.WeakMethod(self.scaled)
        self.by_defaultdict = collections.defaultdict(list, scaled=[self.scaled])
        self.by_record = types.SimpleNamespace(scaled=self.scaled)
        self.by_cycle: list[Any] = [self.scaled]
        self.by_cycle.append((self.by_cycle,))

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        way = getattr(self, f"by_{self.way}")
        if self.way in CALLABLE:
            return way(x)
        if self.way in HOLDING:
            return HOLDING[self.way](way)(x)
        if self.way == "reference":
            return way().scaled(x)
        if self.way == "parent":
            return way[0].scaled(x)
        if self.way == "weight":
            return x * way[0]
        (fc,) = [pair[1] for pair in way] if self.way == "tuple" else way.values() if self.way == "dict" else way
        assert fc is self.fc
        return self.scaled(fc(x))


CALLABLE = ["method", "partial", "closure", "default", "recursion", "each_other"]
HOLDING: dict[str, Callable[[Any], Any]] = {
    "builtin": lambda way: way("scaled"),
    "weak_method": lambda way: way(),
    "defaultdict": lambda way: way["scaled"][0],
    "record": lambda way: way.scaled,
    "cycle": lambda way: way[1][0][0],
}
WAYS = [*CALLABLE, *HOLDING, "list", "dict", "tuple", "set", "reference", "parent", "weight"]


@pytest.mark.parametrize("way", WAYS)
def test_attributes_that_lead_back_to_the_module_lead_to_the_towers_own(way: str) -> None:
    plain, wrapped = SelfReferring(way).double(), SelfReferring(way).double()
    wrapped.load_state_dict(plain.state_dict())
    steps_follow(plain, wrap(wrapped, 3), lambda step: batch(7, seed=step))


@pytest.mark.parametrize("way", WAYS)
def test_derivatives_through_attributes_that_lead_back_to_the_module_are_the_plain_modules(way: str) -> None:
    # A tower that used the original's parameters would leave their gradients there itself, and return none.
    plain, wrapped = SelfReferring(way).double(), wrap(SelfReferring(way).double(), 3)
    wrapped.module.load_state_dict(plain.state_dict())
    grads = [torch.autograd.grad(net(batch(7)).square().mean(), list(net.parameters())) for net in (plain, wrapped)]
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        assert_close(ours, theirs)
    assert all(parameter.grad is None for parameter in wrapped.parameters())


def test_lists_of_submodules_outside_of_module_lists_are_trained() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [[nn.Linear(3, 3).double()], {"last": nn.Linear(3, 2).double()}]

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden[1]["last"](self.hidden[0][0](x))

    plain = Net()
    wrapped = wrap(copy.deepcopy(plain), 3)
    for net in (plain, wrapped):
        net(batch(7)).square().sum().backward()
    for ours, theirs in (
        (wrapped.module.hidden[0][0], plain.hidden[0][0]),
        (wrapped.module.hidden[1]["last"], plain.hidden[1]["last"]),
    ):
        assert_same_gradients(ours, theirs)


def test_a_child_that_knows_its_parent_works() -> None:
    class Child(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            self.parent = [parent]

        def forward(self, x: Tensor) -> Tensor:
            return self.parent[0].fc(x)

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.child = Child(self)

        def forward(self, x: Tensor) -> Tensor:
            assert self.child.parent[0] is self
            return self.child(x)

    assert_trains_alike(Parent(), 3, batch(7))


def test_modules_that_call_parameters_in_forward_see_leaves() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            assert next(self.parameters()).device == x.device
            assert all(p.is_leaf and isinstance(p, nn.Parameter) for p in self.parameters())
            assert [name for name, _ in self.named_parameters()] == ["fc.weight", "fc.bias"]
            penalty = sum(p.square().sum() for p in self.parameters())
            return self.fc(x) + penalty

    assert_trains_alike(Net(), 3, batch(7))


def test_a_forward_may_zero_gradients_and_read_the_state_dict() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.zero_grad()
            assert len(self.state_dict()) == 2
            return self.fc(x)

    assert_trains_alike(Net(), 2, batch(5))


def test_replicas_are_instances_of_the_modules_class_with_its_methods() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        @property
        def width(self) -> int:
            return self.fc.out_features

        def encode(self, x: Tensor) -> Tensor:
            return self.fc(x).tanh()

    plain, wrapped = twins(Net(), 3)

    def loss_fn(net: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(net, Net) and net.width == 2
        return net.encode(x).square().mean()

    wrapped.tower_loss(loss_fn, batch(7)).backward()
    plain.encode(batch(7)).square().mean().backward()
    assert_same_gradients(wrapped, plain)


def test_modules_with_unusual_classes_can_be_replicated() -> None:
    class Odd(nn.Module):
        def __new__(cls, *args: Any) -> Odd:
            return super().__new__(cls)

        def __init__(self, required: int) -> None:
            super().__init__()
            self.fc, self.lock, self.numbers = nn.Linear(3, required), threading.Lock(), (n for n in range(3))

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)

        def __getattr__(self, name: str) -> Any:
            return 5.0 if name == "made_up" else super().__getattr__(name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) * self.made_up

        def forward(self, x: Tensor) -> Tensor:
            with self.lock:
                return self.fc(x)

    net = Odd(2).double()
    assert_close(wrap(net, 3)(batch(7)), net(batch(7)))


def test_a_forward_redirected_to_another_method_and_back_works() -> None:
    """As Lightning does: forward is replaced for the length of a call."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def training_step(self, x: Tensor) -> Tensor:
            return self.fc(x).square().sum()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    plain, wrapped = twins(Net(), 2)
    inner = wrapped.module
    original = inner.forward

    def redirected(*args: Any) -> Any:
        inner.forward = original
        return inner.training_step(*args)

    inner.forward = redirected
    total = wrapped(batch(4)).sum()
    total.backward()
    plain.training_step(batch(4)).backward()
    assert_same_gradients(wrapped, plain)
    inner.forward = original
    assert wrapped(batch(4)).shape == (4, 2)


def test_functional_transforms_and_gradients_inside_forward_work() -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                energy = self.net(x)
                (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
            jacobian = torch.func.vmap(torch.func.jacrev(self.net))(x)
            return force, jacobian.squeeze(1)

    assert_trains_alike(Energy(), 3, batch(7), loss=lambda out: out[0].square().sum() + out[1].pow(3).sum())


def test_custom_autograd_functions_work() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x**3 * weight

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return grad * 3 * x**2 * weight, (grad * x**3).sum(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.weight = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return Cube.apply(self.fc(x), self.weight)

    assert_trains_alike(Net(), 3, batch(7))


def test_data_dependent_control_flow_may_differ_between_towers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([(self.a if row[0] > 0 else self.b)(row) for row in x])

    assert_trains_alike(Net(), 3, batch(9))


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


# ---- parameters that a forward gives other data


class Clamped(nn.Module):
    """Assigns to a parameter's data whenever it runs, as some constraints do."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.last.weight.data = self.last.weight.data.clamp(-0.3, 0.3)
        return self.last(x)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_data_that_a_forward_assigns_are_kept_and_trained(num_towers: int) -> None:
    plain, wrapped = twins(Clamped(), num_towers)
    for net in (plain, wrapped):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
        for step in range(6):
            optimizer.zero_grad()
            net(batch(8, seed=step)).square().sum().backward()
            optimizer.step()
    assert_same_parameters(wrapped, plain)
    assert_close(wrapped(batch(7)), plain(batch(7)))


def test_data_that_only_another_tower_assigns_are_dropped() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = self.last(x)
            if current_tower() == 1:
                self.last.weight.data = torch.zeros(2, 3, dtype=torch.float64)
            return out

    plain, wrapped = twins(Net(), 2)
    for _ in range(2):
        assert_close(wrapped(batch(7)), plain(batch(7)))


# ---- attributes elsewhere, and unusual classes


def test_an_ensemble_with_a_skeleton_on_the_meta_device_works() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList([nn.Linear(3, 2) for _ in range(3)])
            self.skeleton = [copy.deepcopy(self.members[0]).to("meta")]

        def forward(self, x: Tensor) -> Tensor:
            stacked = {
                name: torch.stack([getattr(member, name) for member in self.members]) for name in ("weight", "bias")
            }
            one = self.skeleton[0]
            return torch.func.vmap(lambda p: torch.func.functional_call(one, p, (x,)))(stacked).mean(0)

    assert_trains_alike(Ensemble(), 3, batch(7))


def test_a_class_with_a_constructor_of_its_own_is_replicated() -> None:
    class Net(nn.Module):
        def __new__(cls, width: int) -> Any:
            return super().__new__(cls)

        def __init__(self, width: int) -> None:
            super().__init__()
            self.last = nn.Linear(3, width)

        def __deepcopy__(self, memo: Any) -> Any:
            twin = Net(2)
            twin.load_state_dict(self.state_dict())
            return twin.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x)

    assert_trains_alike(Net(2), 2, batch(7))


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_forward_that_enables_gradients_gives_them_under_no_grad(num_towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 2)

        @torch.enable_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.last(x)

    plain, wrapped = twins(Net(), num_towers)
    for net in (plain, wrapped):
        with torch.no_grad():
            out = net(batch(7))
        out.square().sum().backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_module_made_in_inference_mode_is_evaluated(num_towers: int) -> None:
    with torch.inference_mode():
        plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval().double()
        wrapped = wrap(plain, num_towers)
        assert_close(wrapped(batch(7)), plain(batch(7)))
    with torch.no_grad():
        assert_close(wrapped(batch(7)), plain(batch(7)))


# ---- buffers that change their shape


class Resizing(nn.Module):
    """As observers of quantisation-aware training do."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.register_buffer("seen", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.seen.numel() == 0:
            self.seen.resize_(3).fill_(1)
        self.seen.mul_(2)
        return self.last(x * self.seen)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_buffer_may_change_its_shape_and_dtype(num_towers: int) -> None:
    plain, wrapped = twins(Resizing(), num_towers)
    for rows in (1, 8, 8, 1, 8):
        assert_close(wrapped(batch(rows)), plain(batch(rows)))
        assert_close(wrapped.module.seen, plain.seen)
    for value in (torch.ones(1), torch.ones(1, 3, dtype=torch.int64)):
        for net in (plain, wrapped.module):
            net.seen.data = value.clone()
        assert_close(wrapped(batch(8)), plain(batch(8)))


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


# ---- backward within the forward


class Inner(nn.Module):
    """Trains one of its layers while it goes forward."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.last = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            self.trained(x).square().sum().backward()
        return self.last(x)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_backward_within_the_forward_reaches_the_parameters_with_the_forward(num_towers: int) -> None:
    plain, wrapped = twins(Inner(), num_towers)
    for step in range(2):
        for net in (plain, wrapped):
            with torch.no_grad():
                net(batch(7, seed=step))
        assert_same_gradients(wrapped, plain)
        for net in (plain, wrapped):
            net(batch(7, seed=step)).sum().backward()
        assert_same_gradients(wrapped, plain)
    plain.zero_grad()
    wrapped.zero_grad()
    for net in (plain, wrapped):
        net(batch(7)).sum().backward()
    assert_same_gradients(wrapped, plain)


def test_modules_in_keyword_defaults_of_functions_are_the_replicas() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

            def call(x: Tensor, *, layer: nn.Module = self.layer, times: int = 2) -> Tensor:
                return layer(x) * times

            self.call = call

        def forward(self, x: Tensor) -> Tensor:
            return self.call(x)

    plain, net = Net().double(), Net().double()  # a copy would refer to the first one's layer
    net.load_state_dict(plain.state_dict())
    wrapped = wrap(net, 2)
    F.mse_loss(plain(batch(7)), batch(7, 2)).backward()
    wrapped.tower_loss(lambda net, x, y: F.mse_loss(net(x), y), batch(7), batch(7, 2)).backward()
    assert_same_gradients(wrapped, plain)

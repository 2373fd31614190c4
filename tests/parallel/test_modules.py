"""Contract 4: networks of every kind that torch has train in towers as by themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import rnn

from tests.helpers import (
    EVERY_COUNT,
    assert_close,
    assert_go_backward_alike,
    assert_same_gradients,
    assert_same_parameters,
    assert_trains_alike,
    batch,
    steps_follow,
    twins,
    wrap,
)
from tests.modules import Recurrent


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
    assert_go_backward_alike(plain, wrapped, index)
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

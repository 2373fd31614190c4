"""Each tower draws its own random numbers, repeatably from ``torch.manual_seed``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import (
    EVERY_COUNT,
    SEVERAL,
    assert_go_backward_alike,
    assert_same_gradients,
    batch,
    in_threads,
    mlp,
    take_steps,
    twins,
    wrap,
)
from tests.modules import calling
from torchtower import current_tower

ROWS = 24


def draws_of(draw: Any, num_towers: int, seed: int = 0, **options: Any) -> list[Tensor]:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return draw(x)

    wrapped = wrap(Net(), num_towers, **options)
    torch.manual_seed(seed)
    return [*torch.split(wrapped(torch.ones(ROWS * num_towers, 8)), ROWS)]


DRAWS = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout in place": lambda x: F.dropout(x.clone(), 0.5, inplace=True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "feature dropout": lambda x: F.dropout1d(x, 0.5),
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(x.shape),
    "randint": lambda x: torch.randint(1000, x.shape).float(),
    "randperm": lambda x: torch.stack([torch.randperm(8).float() for _ in range(len(x))]),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "uniform_": lambda x: torch.empty_like(x).uniform_(),
    "bernoulli": lambda x: torch.bernoulli(x * 0.5),
    "multinomial": lambda x: torch.multinomial(x, 8).float(),
    "normal": lambda x: torch.normal(x, 1.0),
    "poisson": lambda x: torch.poisson(x * 50),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "rrelu": lambda x: F.rrelu(-x, training=True),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "init": lambda x: nn.init.xavier_uniform_(torch.empty_like(x)),
    "distribution": lambda x: torch.distributions.Normal(0.0, 1.0).sample(x.shape),
    "attention": lambda x: F.scaled_dot_product_attention(
        x.view(1, 1, -1, 8), x.view(1, 1, -1, 8), torch.eye(len(x), 8).view(1, 1, -1, 8), dropout_p=0.5
    ).view(-1, 8),
}


@pytest.mark.parametrize("name", DRAWS)
def test_towers_draw_different_numbers_that_a_seed_reproduces(name: str) -> None:
    first, again = draws_of(DRAWS[name], 3), draws_of(DRAWS[name], 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    assert not torch.equal(first[0], first[2])
    other = draws_of(DRAWS[name], 3, seed=1)
    assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ["dropout", "randn", "randperm"])
def test_whichever_tower_runs_first_draws_the_same(name: str) -> None:
    found = [draws_of(DRAWS[name], 4, max_concurrency=n) for n in (1, 2, 4)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_the_main_tower_draws_what_the_plain_module_would() -> None:
    (first, *_) = draws_of(DRAWS["randn"], 3)
    torch.manual_seed(0)
    assert torch.equal(first, torch.randn(ROWS, 8))


def test_a_dropout_mask_keeps_its_share_and_scale_in_every_tower() -> None:
    for part in draws_of(lambda x: F.dropout(x, 0.25), 4):
        kept = part != 0
        assert 0.55 < kept.float().mean() < 0.95
        assert torch.allclose(part[kept], torch.tensor(1 / 0.75))


def test_successive_forwards_draw_anew() -> None:
    wrapped = wrap(nn.Dropout(0.5), 2)
    x = torch.ones(8, 8)
    torch.manual_seed(0)
    first, second = wrapped(x), wrapped(x)
    assert not torch.equal(first[:4], second[:4]) and not torch.equal(first[4:], second[4:])
    torch.manual_seed(0)
    assert torch.equal(wrapped(x), first) and torch.equal(wrapped(x), second)


def test_forwards_draw_anew_even_where_only_other_towers_draw() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if current_tower() == 0 else torch.rand_like(x)

    wrapped = wrap(Net(), 2)
    x = torch.ones(4, 8)
    assert not torch.equal(wrapped(x)[2:], wrapped(x)[2:])


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_forward_that_draws_nothing_consumes_nothing(num_towers: int) -> None:
    wrapped = wrap(mlp(), num_towers)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    wrapped(batch(7)).square().sum().backward()
    wrapped.eval()
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_draws_nothing() -> None:
    wrapped = wrap(nn.Dropout(0.5), 2).eval()
    before = torch.get_rng_state()
    assert torch.equal(wrapped(torch.ones(4, 3)), torch.ones(4, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_own_generator_is_left_alone() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.rand(x.shape, generator=torch.Generator().manual_seed(5))

    out = wrap(Net(), 2)(torch.ones(4, 3))
    assert torch.equal(out[:2], out[2:])
    assert torch.equal(out[:2], torch.rand(2, 3, generator=torch.Generator().manual_seed(5)))


def test_the_callers_generator_is_not_disturbed_by_other_towers() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.rand_like(x) if current_tower() else x

    wrapped = wrap(Net(), 3)
    wrapped(torch.ones(6, 3))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draws = torch.rand(3)
    assert torch.equal(draws, expected)


def test_threads_beside_the_towers_draw_as_ever() -> None:
    wrap(nn.Dropout(0.5), 2)(torch.ones(4, 3))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    found: list[Tensor] = []
    in_threads(lambda: found.append(torch.rand(3)))
    assert torch.equal(found[0], expected)


def test_the_default_generator_still_looks_like_one() -> None:
    wrap(nn.Dropout(0.5), 2)(torch.ones(4, 3))
    state = torch.random.get_rng_state()
    first = torch.rand(2)
    torch.random.set_rng_state(state)
    assert torch.equal(torch.rand(2), first)
    assert torch.default_generator.device.type == "cpu"
    assert torch.initial_seed() == torch.random.initial_seed()
    with torch.random.fork_rng():
        torch.manual_seed(7)
    torch.rand(2, generator=torch.default_generator)


def test_torch_random_default_generator_can_still_be_handed_to_an_operator() -> None:
    wrap(nn.Dropout(0.5), 2)(torch.ones(4, 3))
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2, generator=torch.random.default_generator), expected)


@pytest.mark.parametrize("num_towers", SEVERAL)
@pytest.mark.parametrize("generator_of", [lambda: torch.default_generator, lambda: torch.random.default_generator])
def test_the_default_generator_handed_to_an_operator_in_a_tower_is_that_towers(
    num_towers: int, generator_of: Callable[[], torch.Generator]
) -> None:
    class Draw(nn.Module):
        def __init__(self, names_it: bool) -> None:
            super().__init__()
            self.names_it = names_it

        def forward(self, x: Tensor) -> Tensor:
            generator = generator_of() if self.names_it else None
            return torch.rand(x.shape, generator=generator) + torch.empty_like(x).normal_(generator=generator)

    drawn = []
    for names_it in (True, False):
        wrapped = wrap(Draw(names_it), num_towers)
        torch.manual_seed(0)
        drawn.append(wrapped(torch.ones(num_towers, 3)))
    assert torch.equal(*drawn)
    assert len(drawn[0].unique()) == 3 * num_towers


@pytest.mark.parametrize("num_towers", SEVERAL)
def test_fork_rng_and_manual_seed_inside_a_tower_stay_in_that_tower(num_towers: int) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            before = torch.rand_like(x)
            with torch.random.fork_rng():
                torch.rand_like(x)
            state = torch.get_rng_state()
            after = torch.rand_like(x)
            torch.set_rng_state(state)
            assert torch.equal(torch.rand_like(x), after)
            return before + after

    wrapped = wrap(Net(), num_towers)
    torch.manual_seed(3)
    first = wrapped(torch.ones(2 * num_towers, 4))
    torch.manual_seed(3)
    assert torch.equal(wrapped(torch.ones(2 * num_towers, 4)), first)


class CheckpointedDropout(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.last = nn.Linear(3, 16).double(), nn.Linear(16, 2).double()

    def body(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.reentrant is None:
            return self.last(self.body(x))
        return self.last(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_with_each_towers_own_masks(reentrant: bool, num_towers: int) -> None:
    whole = CheckpointedDropout(None)
    parts = copy.deepcopy(whole)
    parts.reentrant = reentrant
    for net in (whole, parts):
        wrapped = wrap(net, num_towers)
        torch.manual_seed(0)
        for step in range(2):
            wrapped(batch(3 * num_towers, seed=step)).square().sum().backward()
    assert_same_gradients(parts, whole)


@pytest.mark.parametrize("reentrant", [True, False])
def test_draws_after_a_checkpointed_step_are_those_of_an_unchecked_one(reentrant: bool) -> None:
    ends = []
    for kind in (None, reentrant):
        wrapped = wrap(CheckpointedDropout(kind), 2)
        torch.manual_seed(0)
        for step in range(2):
            wrapped(batch(6, seed=step)).square().sum().backward()
        ends.append(torch.get_rng_state())
    assert torch.equal(ends[0], ends[1])


def test_a_seeded_training_run_with_dropout_is_reproducible_to_the_bit() -> None:
    net = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 2))
    runs = []
    for _ in range(2):
        wrapped = wrap(copy.deepcopy(net), 3)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        torch.manual_seed(1)
        take_steps(wrapped, optimizer, lambda step: batch(9, seed=step).float(), steps=5)
        runs.append(list(wrapped.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_recurrent_dropout_differs_between_towers_and_reproduces() -> None:
    net = nn.LSTM(3, 8, num_layers=2, dropout=0.5, batch_first=True)
    wrapped = wrap(nn.Sequential(net, _First()), 2)
    x = torch.ones(4, 5, 3)
    torch.manual_seed(0)
    first = wrapped(x)
    torch.manual_seed(0)
    assert torch.equal(wrapped(x), first)
    assert not torch.equal(first[:2], first[2:])


class _First(nn.Module):
    def forward(self, pair: Any) -> Tensor:
        return pair[0]


def test_random_numbers_in_a_backward_are_the_towers_own() -> None:
    seen: dict[int | None, Tensor] = {}

    def draw(phase: str) -> None:
        if phase == "backward":
            seen[current_tower()] = torch.rand(4)

    wrapped = wrap(calling(draw), 2)
    torch.manual_seed(0)
    wrapped(batch(4)).sum().backward()
    first = dict(seen)
    torch.manual_seed(0)
    wrapped(batch(4)).sum().backward()
    assert set(seen) == {0, 1} and not torch.equal(seen[0], seen[1])
    assert all(torch.equal(first[t], seen[t]) for t in (0, 1))


def test_drawing_in_forward_and_backward_gives_different_numbers() -> None:
    seen: dict[tuple[int | None, str], Tensor] = {}

    def draw(phase: str) -> None:
        seen[current_tower(), phase] = torch.rand(4)

    wrap(calling(draw), 2)(batch(4)).sum().backward()
    for tower in (0, 1):
        assert not torch.equal(seen[tower, "forward"], seen[tower, "backward"])


class _Squared(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class _Transforming(nn.Linear):
    """torch.func over an autograd function goes through an operator that dispatches in Python."""

    def forward(self, x: Tensor) -> Tensor:
        def energy(row: Tensor) -> Tensor:
            return _Squared.apply(F.linear(F.dropout(row, 0.0), self.weight, self.bias)).sum()

        return torch.func.vmap(torch.func.grad(energy), randomness="different")(x)


class _Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (super().forward(x),))


@pytest.mark.parametrize("kind", [_Transforming, _Branching])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_operators_that_dispatch_in_python_run_in_towers(kind: type[nn.Linear], num_towers: int) -> None:
    # torch.cond traces its branches, which torch does in one thread at a time.
    plain, wrapped = twins(kind(3, 3), num_towers, max_concurrency=1)
    x = torch.ones(8, 3, dtype=torch.float64)
    assert_go_backward_alike(plain, wrapped, x)


def test_operators_that_are_registered_once_towers_exist_run_in_them() -> None:
    wrap(nn.Dropout(0.5), 2)(torch.ones(4, 3))

    class Double(torch._ops.HigherOrderOperator):
        def __call__(self, x: Tensor) -> Any:
            return super().__call__(x)

    double: Any = Double("torchtower_test_double")
    double.py_impl(torch._C.DispatchKey.CompositeExplicitAutograd)(lambda x: x * 2)
    double.py_impl(torch._C.DispatchKey.AutogradCPU)(lambda x: x * 2)

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return double(x)  # type: ignore[no-any-return]

    assert torch.equal(wrap(Net(), 2)(torch.ones(4, 3)), torch.full((4, 3), 2.0))

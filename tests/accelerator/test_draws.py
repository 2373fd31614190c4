"""Random numbers on devices: each tower's own, the main tower's as the plain module's, all from one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.accelerator.towers import assert_same_values, device, every_layout, mlp, rows, twins
from torchtower import TowerParallel, current_tower
from torchtower.threads.generators import real_states

dropouts = pytest.mark.parametrize(
    "drop",
    [
        F.dropout,
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
        lambda x: x * (torch.rand_like(x) > 0.5),
        lambda x: x * (torch.rand(x.shape, device=x.device) > 0.5),
        lambda x: x * (torch.rand(x.shape) > 0.5).to(x.device),
        lambda x: F.alpha_dropout(x, training=True),
    ],
    ids=["dropout", "bernoulli", "rand_like", "rand", "rand on the cpu", "alpha"],
)


@pytest.fixture(params=["named", "unnamed", "late"], autouse=True)
def generators(request: pytest.FixtureRequest, simulated: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the device module gives its default generators.

    As torch.cuda does; not at all (torch.mps, torch_openreg); or as torch.cuda does to a program that has used CPU
    towers before: the device's initialisation gives the name its meaning.
    """
    if request.param == "unnamed":
        monkeypatch.delattr(simulated, "default_generators")
    elif request.param == "late":
        real = [torch.ops.simulated.default_generator(index) for index in range(simulated.device_count())]
        monkeypatch.setattr(simulated, "default_generators", ())
        TowerParallel(Drop(F.dropout), device_ids=["cpu", "cpu"])(torch.ones(2, 3))
        simulated.default_generators = tuple(real)
    return str(request.param)


class Drop(nn.Module):
    def __init__(self, drop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


@dropouts
@pytest.mark.parametrize("devices", [[0, 1], [1, 0], [0, 1, 0, 1], [0, 0]])
def test_towers_draw_different_masks_that_a_seed_reproduces(
    devices: list[int], drop: Callable[[Tensor], Tensor]
) -> None:
    wrapped = TowerParallel(Drop(drop), device_ids=devices)
    x = torch.ones(len(devices), 64)
    torch.manual_seed(7)
    first, second = wrapped(x), wrapped(x)
    torch.manual_seed(7)
    assert torch.equal(wrapped(x), first)
    assert torch.equal(wrapped(x), second)
    masks = {tuple(row) for row in [*first.tolist(), *second.tolist()]}
    assert len(masks) == 2 * len(devices)


def test_a_devices_default_generator_handed_to_an_operator_in_a_tower_is_that_towers(generators: str) -> None:
    if generators == "unnamed":
        pytest.skip("nothing tells which generator is the default one")

    def drop(x: Tensor) -> Tensor:
        generator = torch.ops.simulated.default_generator(x.device.index)
        return x * torch.bernoulli(torch.full_like(x, 0.5), generator=generator)

    wrapped = TowerParallel(Drop(drop), device_ids=[0, 1, 0, 1])
    torch.manual_seed(7)
    named = wrapped(torch.ones(4, 64))
    wrapped = TowerParallel(Drop(lambda x: x * torch.bernoulli(torch.full_like(x, 0.5))), device_ids=[0, 1, 0, 1])
    torch.manual_seed(7)
    assert torch.equal(wrapped(torch.ones(4, 64)), named)


@dropouts
def test_the_main_tower_draws_as_the_plain_module_would(drop: Callable[[Tensor], Tensor]) -> None:
    wrapped = TowerParallel(Drop(drop), device_ids=[0, 1])
    torch.manual_seed(7)
    whole = wrapped(torch.ones(2, 64))
    torch.manual_seed(7)
    assert torch.equal(whole[:1], drop(torch.ones(1, 64, device=device(0))))


def test_masks_depend_on_the_tower_and_not_on_how_towers_lie() -> None:
    outs = []
    for devices in ([0, 1, 0], [0, 0, 0], [0, 1, 1]):
        torch.manual_seed(7)
        outs.append(TowerParallel(Drop(F.dropout), device_ids=devices)(torch.ones(3, 64)).cpu())
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_forwards_draw_anew_even_where_only_other_towers_draw() -> None:
    wrapped = TowerParallel(Drop(lambda x: F.dropout(x) if current_tower() else x), device_ids=[0, 1])
    x = torch.ones(2, 64)
    assert not torch.equal(wrapped(x), wrapped(x))


def test_a_forward_that_draws_nothing_consumes_nothing() -> None:
    _, wrapped = twins(mlp(), [0, 1])
    before = [torch.simulated.get_rng_state(index) for index in (0, 1)]
    wrapped(rows(4)).sum().backward()
    assert all(torch.equal(before[index], torch.simulated.get_rng_state(index)) for index in (0, 1))


def test_other_towers_leave_their_devices_default_generator_alone() -> None:
    wrapped = TowerParallel(Drop(F.dropout), device_ids=[0, 1])
    before = torch.simulated.get_rng_state(1)
    wrapped(torch.ones(2, 8))
    assert torch.equal(before, torch.simulated.get_rng_state(1))


@every_layout
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_with_each_towers_own_mask(devices: list[int], use_reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            out = checkpoint(lambda x: F.dropout(x * self.scale), x, use_reentrant=use_reentrant)
            assert isinstance(out, Tensor)
            return out

    wrapped = TowerParallel(Net().to(device(devices[0])), device_ids=devices)
    out = wrapped(torch.ones(len(devices), 64, dtype=torch.float64).requires_grad_())
    out.sum().backward()
    assert_same_values(wrapped.module.scale.grad, out.sum(0))  # the same masks, or these differ


def test_the_device_modules_default_generators_are_a_towers_own_in_a_tower(generators: str) -> None:
    if generators == "unnamed":
        pytest.skip("the module gives none")

    def drop(x: Tensor) -> Tensor:
        generator = torch.simulated.default_generators[x.device.index]
        assert len(torch.simulated.default_generators[:]) == 2
        state = generator.get_state()
        mask = torch.bernoulli(torch.full_like(x, 0.5), generator=generator)
        generator.set_state(state)
        assert torch.equal(torch.bernoulli(torch.full_like(x, 0.5)), mask)
        return x * mask

    drawn = []
    for draw in (drop, lambda x: x * torch.bernoulli(torch.full_like(x, 0.5))):
        wrapped = TowerParallel(Drop(draw), device_ids=[0, 1, 0, 1])
        torch.manual_seed(7)
        drawn.append(wrapped(torch.ones(4, 64)))
    assert torch.equal(*drawn)
    assert len({tuple(row) for row in drawn[0].tolist()}) == 4


def test_outside_of_towers_a_devices_state_is_the_devices() -> None:
    TowerParallel(Drop(F.dropout), device_ids=[0, 1])(torch.ones(2, 8))
    for index in (0, 1):
        state = torch.simulated.get_rng_state(index)
        first = torch.rand(8, device=device(index))
        torch.simulated.set_rng_state(state, index)
        assert torch.equal(torch.rand(8, device=device(index)), first)


def test_a_device_whose_module_asks_for_no_device_gives_towers_masks_of_their_own(
    generators: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if generators != "unnamed":
        pytest.skip("the module gives its generators")
    wrapped = TowerParallel(Drop(F.dropout), device_ids=[0, 0])
    wrapped(torch.ones(2, 64))
    get, set_ = real_states["simulated"]
    no_device: Any = (lambda: get(0), lambda new_state: set_(new_state, 0))  # as torch.mps
    monkeypatch.setitem(real_states, "simulated", no_device)
    torch.manual_seed(7)
    first = wrapped(torch.ones(2, 64))
    torch.manual_seed(7)
    assert torch.equal(wrapped(torch.ones(2, 64)), first)
    assert not torch.equal(first[0], first[1])


WAYS = {"none": lambda d: (), "index": lambda d: (d.index,), "device": lambda d: (d,), "name": lambda d: (str(d),)}


@pytest.mark.parametrize("way", WAYS)
def test_a_tower_names_its_device_as_it_likes_when_it_sets_its_state_back(way: str) -> None:
    def drop(x: Tensor) -> Tensor:
        which = WAYS[way](x.device)
        state = torch.simulated.get_rng_state(*which)
        first = F.dropout(x)
        torch.simulated.set_rng_state(state, *which)
        assert torch.equal(F.dropout(x), first)
        return first

    out = TowerParallel(Drop(drop), device_ids=[0, 1, 0, 1])(torch.ones(4, 64))
    assert len({tuple(row) for row in out.tolist()}) == 4


def test_a_tower_may_draw_on_another_device_and_set_that_state_back() -> None:
    def drop(x: Tensor) -> Tensor:
        other = device(1 - x.device.index)
        state = torch.simulated.get_rng_state(other)
        first = F.dropout(torch.ones(64, device=other))
        torch.simulated.set_rng_state(state, other)
        assert torch.equal(F.dropout(torch.ones(64, device=other)), first)
        return x * first.to(x.device)

    out = TowerParallel(Drop(drop), device_ids=[0, 1])(torch.ones(2, 64))
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("then", [F.dropout, torch.rand_like])
def test_what_other_towers_draw_after_a_dropout_leaves_their_devices_generator_alone_too(then: Any) -> None:
    wrapped = TowerParallel(Drop(lambda x: then(F.dropout(x))), device_ids=[0, 1])
    before = torch.simulated.get_rng_state(1)
    wrapped(torch.ones(2, 8))
    assert torch.equal(before, torch.simulated.get_rng_state(1))


@pytest.fixture
def drawn_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Operators leave random numbers to the CPU's, as torch_openreg's do, and take no generator of the device's own."""
    torch.ops.simulated.draw_on_cpu(True)
    monkeypatch.setattr("torchtower.threads.generators._taken", {})
    yield
    torch.ops.simulated.draw_on_cpu(False)


@pytest.mark.usefixtures("drawn_on_cpu")
@dropouts
@pytest.mark.parametrize("devices", [[0, 1], [1, 0], [0, 1, 0, 1], [0, 0]])
def test_where_the_cpu_draws_for_a_device_towers_masks_are_their_own_and_a_seed_reproduces_them(
    devices: list[int], drop: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator"):
        torch.rand(1, device=device(0), generator=torch.Generator(device(0)))
    test_towers_draw_different_masks_that_a_seed_reproduces(devices, drop)
    test_the_main_tower_draws_as_the_plain_module_would(drop)


@pytest.mark.usefixtures("drawn_on_cpu")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_where_the_cpu_draws_for_a_device_a_checkpoint_draws_the_same_masks_again(use_reentrant: bool) -> None:
    x = torch.ones(8, 16, device=device(0), requires_grad=True)
    wrapped = TowerParallel(
        Drop(lambda x: checkpoint(F.dropout, x, use_reentrant=use_reentrant)), device_ids=[0, 1, 0, 1]
    )
    out = wrapped(x)
    out.sum().backward()
    assert torch.equal(x.grad, out)


@pytest.fixture
def unseen(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device module tells of no default generator, and of no state."""
    for name in ("default_generators", "get_rng_state", "set_rng_state"):
        monkeypatch.delattr(simulated, name, raising=False)
    monkeypatch.delitem(real_states, "simulated", raising=False)


@pytest.mark.usefixtures("unseen")
@dropouts
@pytest.mark.parametrize("devices", [[0, 1], [1, 0], [0, 1, 0, 1], [0, 0]])
def test_where_no_default_generator_can_be_had_towers_masks_are_their_own_and_a_seed_reproduces_them(
    devices: list[int], drop: Callable[[Tensor], Tensor]
) -> None:
    if drop is F.dropout:
        pytest.skip("a fused one draws from its device's generator, whichever tower asks")
    test_towers_draw_different_masks_that_a_seed_reproduces(devices, drop)
    test_the_main_tower_draws_as_the_plain_module_would(drop)


@pytest.mark.usefixtures("unseen")
@dropouts
def test_where_operators_take_no_generator_towers_draw_from_their_devices(
    drop: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchtower.threads.generators._taken", {"simulated": "nobody"})
    out = TowerParallel(Drop(drop), device_ids=[0, 0])(torch.ones(4, 64))
    first, second = out.chunk(2)
    assert out.count_nonzero() and not torch.equal(first, second)


def test_operators_are_looked_at_on_a_towers_own_device(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchtower.threads.generators._taken", {})
    simulated.reset_peak_memory_stats(0)
    before = simulated.memory_allocated(0)
    TowerParallel(Drop(F.dropout).to(device(1)), device_ids=[1, 1])(torch.ones(4, 3, device=device(1)))
    assert simulated.max_memory_allocated(0) == before

"""Contract 4: parameters of every kind, and tensors in attributes, train in towers as by themselves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing._internal.two_tensor import TwoTensor

from tests.helpers import (
    EVERY_COUNT,
    assert_close,
    assert_go_backward_alike,
    assert_same_gradients,
    batch,
    steps_follow,
    twins,
    wrap,
)


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
    assert_go_backward_alike(plain, wrapped, x)


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


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_buffer_that_requires_grad_is_no_statistic_whose_mean_is_taken(num_towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gain", torch.ones(3, dtype=torch.float64, requires_grad=True))
            self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = x.detach().mean(0)
            return x * self.gain

    plain, wrapped = twins(Net(), num_towers, buffers="mean")
    gain = wrapped.module.gain
    for seed in range(2):
        for net in (plain, wrapped):
            net(batch(7, seed=seed)).square().sum().backward()
    assert wrapped.module.gain is gain
    assert_close(gain.grad, plain.gain.grad)
    assert_close(wrapped.module.mean, plain.mean)


def test_a_tensor_in_a_plain_attribute_trains_as_in_the_plain_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.extra = [torch.ones(3, dtype=torch.float64, requires_grad=True)]

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.extra[0]

    plain, wrapped = twins(Net(), 3)
    assert_go_backward_alike(plain, wrapped, batch(7))
    assert_close(wrapped.module.extra[0].grad, plain.extra[0].grad)


def two_tensor(tensor: Tensor) -> Tensor:
    return TwoTensor(tensor, tensor.clone()).requires_grad_()


def of_inference_mode(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone().requires_grad_()


@pytest.mark.parametrize("kind", [nn.Parameter, Tensor.requires_grad_, Tensor.detach, two_tensor, of_inference_mode])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_tensors_in_attributes_have_their_own_attributes_in_every_tower(num_towers: int, kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.extra = nn.Linear(3, 3), kind(torch.ones(3))
            self.extra.scale = 3.0

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.extra, nn.Parameter) is (kind is nn.Parameter)
            return self.fc(x) * getattr(self.extra, "scale", 2.0)  # a tensor that is made of others has none in towers

    plain, inner = Net().double(), Net().double()  # copy.deepcopy makes another kind of an inference tensor
    inner.fc.load_state_dict(plain.fc.state_dict())
    wrapped = wrap(inner, num_towers)
    plain.extra.scale = wrapped.module.extra.scale = 2.0
    assert_go_backward_alike(plain, wrapped, batch(7))


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


def test_a_module_that_is_a_dataclass_trains_in_a_list() -> None:
    @dataclasses.dataclass(eq=False)
    class Block(nn.Module):
        outputs: int

        def __post_init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, self.outputs, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [Block(2)]

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    plain, wrapped = twins(Net(), 3)
    for net in (plain, wrapped):
        net(batch(7)).square().sum().backward()
    assert_same_gradients(wrapped.module.blocks[0], plain.blocks[0])


def test_a_frozen_parameter_in_a_list_stays_a_parameter_in_every_tower() -> None:
    seen = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = [nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)]

        def forward(self, x: Tensor) -> Tensor:
            seen.append((type(self.frozen[0]), self.frozen[0].requires_grad))
            return x * self.frozen[0]

    wrap(Net(), 2)(batch(4))
    assert seen == [(nn.Parameter, False)] * 2


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_a_buffer_that_is_made_of_other_tensors_is_written_to_by_the_main_tower_alone(num_towers: int) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", TwoTensor(torch.zeros(3), torch.zeros(3)))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x + self.count.a

    plain, wrapped = twins(Counting(), num_towers)
    for _ in range(3):
        assert_close(wrapped(batch(8)), plain(batch(8)))
    assert_close(wrapped.module.count.a, plain.count.a)
    assert_close(wrapped.module.count.b, plain.count.b)


def test_what_a_module_hides_among_its_parameters_may_lie_anywhere() -> None:
    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.template = nn.Linear(3, 2), nn.Linear(3, 2, device="meta")

        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            named = super().named_parameters(*args, **kwargs)
            return ((name, parameter) for name, parameter in named if not name.startswith("template"))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x)
            return out

    net = Hiding().double()
    assert_close(wrap(net, 2)(batch(5)), net.fc(batch(5)))

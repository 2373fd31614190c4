"""Contract 7: the wrapper is saved, loaded, copied and taken apart as nn.DataParallel is."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    assert_close,
    assert_same_parameters,
    batch,
    both_go_backward,
    mlp,
    run_python,
    twins,
    wrap,
)
from tests.modules import OneLayer
from torchtower import TowerParallel, convert_sync_batchnorm

# ---- saved and loaded


def test_state_dict_keys_stand_under_module_as_data_parallels_do() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    wrapped = wrap(net, 2)
    assert list(wrapped.state_dict()) == [f"module.{key}" for key in net.state_dict()]
    assert list(wrapped.state_dict()) == list(nn.DataParallel(net).state_dict())
    wrapped(torch.randn(4, 3)).sum().backward()
    assert list(wrapped.state_dict()) == [f"module.{key}" for key in net.state_dict()]
    assert next(iter(wrapped.named_parameters()))[0] == "module.0.weight"
    assert next(iter(wrapped.named_buffers()))[0] == "module.1.running_mean"
    assert [name for name, _ in wrapped.named_modules()] == ["", "module", "module.0", "module.1"]


def test_the_wrapped_module_is_the_users_own() -> None:
    net = mlp()
    parameters = list(net.parameters())
    wrapped = wrap(net, 3)
    wrapped(batch(6)).sum().backward()
    assert wrapped.module is net
    assert all(a is b for a, b in zip(wrapped.parameters(), parameters, strict=True))
    assert all(p.is_leaf for p in parameters)


@pytest.mark.parametrize("called_before", [True, False])
def test_a_state_dict_loaded_into_the_wrapper_is_used_at_the_next_forward(called_before: bool) -> None:
    plain, wrapped = twins(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), 3)
    plain.eval()
    wrapped.eval()
    if called_before:
        wrapped(batch(6)).sum().backward()
    with torch.no_grad():
        for tensor in (*plain.parameters(), *plain.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.5)
    wrapped.load_state_dict({f"module.{key}": value for key, value in plain.state_dict().items()})
    both_go_backward(plain, wrapped)


def test_state_dicts_go_between_wrapper_data_parallel_and_module() -> None:
    first, second = mlp(), mlp()
    wrap(second, 2).load_state_dict(nn.DataParallel(first).state_dict())
    assert_same_parameters(second, first)
    third = mlp()
    nn.DataParallel(third).load_state_dict(wrap(second, 2).state_dict())
    assert_same_parameters(third, first)


def test_load_state_dict_with_assign_replaces_the_parameters() -> None:
    plain, wrapped = twins(mlp(), 2)
    wrapped(batch(4)).sum().backward()
    other = mlp()
    plain.load_state_dict(other.state_dict())
    wrapped.load_state_dict({f"module.{k}": v.clone() for k, v in other.state_dict().items()}, assign=True)
    both_go_backward(plain, wrapped)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": lambda net: _saved_and_loaded(net),
}


def _saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("called_before", [True, False])
@pytest.mark.parametrize("way", COPIES)
def test_a_copied_or_pickled_wrapper_trains_on_its_own(way: str, called_before: bool) -> None:
    wrapped = wrap(mlp(), 2, buffers="mean", max_concurrency=1)
    if called_before:
        wrapped(batch(4)).sum().backward()
        wrapped.tower_loss(lambda net, x: net(x).mean(), batch(4))
    copied = COPIES[way](wrapped)
    assert type(copied) is TowerParallel and copied.module is not wrapped.module
    assert copied.num_towers == 2 and copied.buffer_policy == "mean" and copied.max_concurrency == 1
    plain = copy.deepcopy(wrapped.module)
    both_go_backward(plain, copied)
    with torch.no_grad():
        copied.module[0].weight.zero_()
    assert wrapped.module[0].weight.abs().sum() > 0


def test_a_copy_of_a_model_that_contains_wrappers_works() -> None:
    net = nn.Sequential(wrap(mlp(3, 3), 2), mlp())
    net(batch(4)).sum().backward()
    twin = copy.deepcopy(net)
    both_go_backward(net, twin)


def test_a_module_taken_out_of_the_wrapper_is_as_it_was() -> None:
    plain, wrapped = twins(mlp(), 2)
    wrapped(batch(4)).sum().backward()
    net = wrapped.module
    del wrapped
    both_go_backward(plain, net)
    both_go_backward(plain, copy.deepcopy(net))


def test_a_replica_may_be_saved_from_within_a_forward() -> None:
    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            torch.save(self.state_dict(), io.BytesIO())
            twin = copy.deepcopy(self.fc)
            return twin(x)

    plain, wrapped = twins(Net(), 2)
    assert_close(wrapped(batch(4)), plain(batch(4)))


def test_a_checkpoint_of_module_and_optimizer_resumes_to_the_bit() -> None:
    def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        net(batch(7, seed=seed)).square().mean().backward()
        optimizer.step()

    wrapped = wrap(mlp(), 3)
    optimizer = torch.optim.Adam(wrapped.parameters())
    for seed in range(3):
        step(wrapped, optimizer, seed)
    saved = _saved_and_loaded({"model": wrapped.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = wrap(mlp(), 3)
    resumed.load_state_dict(saved["model"])
    again = torch.optim.Adam(resumed.parameters())
    again.load_state_dict(saved["optimizer"])
    for seed in range(3, 6):
        step(wrapped, optimizer, seed)
        step(resumed, again, seed)
    assert all(torch.equal(a, b) for a, b in zip(wrapped.parameters(), resumed.parameters(), strict=True))


def test_a_pickled_wrapper_is_loaded_by_another_process(tmp_path: Any) -> None:
    wrapped = wrap(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), 2)
    out = wrapped(torch.ones(4, 3))
    torch.save(wrapped, tmp_path / "wrapped.pt")
    done = run_python(f"""
import torch
model = torch.load({str(tmp_path / "wrapped.pt")!r}, weights_only=False)
out = model(torch.ones(4, 3))
out.sum().backward()
print(model.num_towers, model.module[0].weight.grad is not None, out.sum().item())
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["2", "True"]
    assert float(done.stdout.split()[2]) == pytest.approx(out.sum().item(), rel=1e-6)


def test_a_synchronised_norm_survives_copies_and_state_dicts() -> None:
    net = convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).double()
    wrapped = wrap(net, 2)
    wrapped(batch(6)).sum().backward()
    twin = pickle.loads(pickle.dumps(wrapped))
    assert_close(twin(batch(5)), wrapped(batch(5)))
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    plain.load_state_dict(net.state_dict())
    assert_close(plain.eval()(batch(5)), wrapped.eval()(batch(5)))

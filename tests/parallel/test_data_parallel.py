"""Contract 7: the wrapper stands where nn.DataParallel stood: its class, signature, steps and subclasses."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import (
    EVERY_COUNT,
    SEVERAL,
    Stepwise,
    assert_close,
    assert_go_backward_alike,
    assert_same_gradients,
    batch,
    mlp,
    wrap,
)
from torchtower import TowerParallel


def test_wrapped_is_a_data_parallel_with_its_signature() -> None:
    wrapped = TowerParallel(mlp(), ["cpu", "cpu"], "cpu", 0)
    assert isinstance(wrapped, nn.DataParallel)
    assert wrapped.device_ids == ["cpu", "cpu"] and wrapped.dim == 0
    assert wrapped.output_device == torch.device("cpu")
    assert isinstance(wrapped.module, nn.Sequential)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_the_wrapper_prints_and_reports_as_data_parallel_does(num_towers: int) -> None:
    wrapped = wrap(mlp(), num_towers)
    assert repr(wrapped).startswith("TowerParallel(") and "(module): Sequential(" in repr(wrapped)
    assert f"devices={['cpu'] * num_towers}" in repr(wrapped)
    assert wrapped.num_towers == num_towers and wrapped.device_ids == ["cpu"] * num_towers
    assert wrapped.training


def test_without_devices_there_is_one_tower_that_costs_nothing() -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator, whose devices are the default")
    net = mlp()
    wrapped = TowerParallel(net)
    x = batch(4)
    assert wrapped.num_towers == 1
    assert torch.equal(wrapped(x), net(x))
    assert wrapped._towers is None


def test_data_parallel_functions_of_torch_still_work_on_cpu_modules() -> None:
    wrapped = wrap(mlp(), 2)
    assert torch.equal(wrapped.module(batch(4)), wrapped.module(batch(4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(batch(4))


def test_a_session_cell_by_cell_works() -> None:
    """Each cell compiled and run by itself in one namespace, definitions repeated, errors in between."""
    cells = [
        "import torch\nfrom torch import nn\nfrom torchtower import TowerParallel",
        "class Net(nn.Module):\n  def __init__(self):\n    super().__init__()\n    self.fc = nn.Linear(3, 2)\n"
        "  def forward(self, x):\n    return self.fc(x)",
        "model = TowerParallel(Net(), ['cpu'] * 2)\nout = model(torch.ones(4, 3))",
        "model(torch.ones(4, 7))",
        "class Net(nn.Module):\n  def __init__(self):\n    super().__init__()\n    self.fc = nn.Linear(3, 1)\n"
        "  def forward(self, x):\n    return self.fc(x).tanh()",
        "model = TowerParallel(Net(), ['cpu'] * 3)\nmodel(torch.ones(4, 3)).sum().backward()",
        "Net.forward = lambda self, x: self.fc(x) * 0 + 7\nout = model(torch.ones(4, 3))",
        "out.sum().backward()",
    ]
    space: dict[str, Any] = {}
    errors = 0
    for cell in cells:
        try:
            exec(compile(cell, "<cell>", "exec"), space)
        except RuntimeError:
            errors += 1
    assert errors == 1
    assert torch.equal(space["out"], torch.full((4, 1), 7.0))


# ---- subclasses, and the steps that they call


def test_subclasses_may_add_attributes_and_reach_the_module() -> None:
    class Mine(TowerParallel):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.module, name)

    net = mlp()
    net.extra = 5
    wrapped = Mine(net, ["cpu", "cpu"])
    assert wrapped.extra == 5
    assert wrapped(batch(4)).shape == (4, 2)
    wrapped.mine = 3
    assert copy.deepcopy(wrapped).mine == 3


def test_a_subclass_may_find_its_module_in_its_own_way() -> None:
    class Holding(TowerParallel):
        def __getattribute__(self, name: str) -> Any:
            return super().__getattribute__("_holder")[0] if name == "module" else super().__getattribute__(name)

    net = mlp()
    wrapped = Holding.__new__(Holding)
    object.__setattr__(wrapped, "_holder", [net])
    TowerParallel.__init__(wrapped, net, ["cpu", "cpu"])
    del wrapped._modules["module"]
    wrapped(batch(4)).sum().backward()
    towers = wrapped._towers
    wrapped(batch(4)).sum().backward()
    assert wrapped._towers is towers, "the module was replicated anew"
    other = mlp()
    wrapped._holder[0] = other
    wrapped(batch(4)).sum().backward()
    assert wrapped._towers is not towers and other[0].weight.grad is not None


def test_a_subclass_may_hear_of_its_towers_losses() -> None:
    class Hearing(TowerParallel):
        @property
        def tower_losses(self) -> Any:
            return self.heard[-1]

        @tower_losses.setter
        def tower_losses(self, losses: Any) -> None:
            self.__dict__.setdefault("heard", []).append(losses)

    wrapped = Hearing(mlp(), ["cpu", "cpu"])
    wrapped.tower_loss(lambda net, x: net(x).mean(), batch(4))
    assert wrapped.heard[0] == [] and [loss.shape for loss in wrapped.tower_losses] == [(), ()]


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_the_steps_of_data_parallel_work_one_by_one(num_towers: int, rows: int) -> None:
    plain = mlp()
    stepwise = Stepwise(copy.deepcopy(plain), device_ids=["cpu"] * num_towers)
    shards, keywords = stepwise.scatter((batch(7),), {"scale": 2, "y": batch(7, 2)}, stepwise.device_ids)
    assert len(shards) == len(keywords) == num_towers
    assert torch.equal(torch.cat([k["y"] for k in keywords]), batch(7, 2)) and keywords[-1]["scale"] == 2
    assert_go_backward_alike(plain, stepwise, batch(rows, requires_grad=True))


@pytest.mark.parametrize("step", ["replicate", "parallel_apply"])
def test_a_step_overridden_without_the_forward_is_refused(step: str) -> None:
    kind = type("Mine", (TowerParallel,), {step: lambda self, *args: None})
    with pytest.raises(TypeError, match=f"Mine: expected a subclass that overrides {step} to override forward, too"):
        kind(mlp(), device_ids=["cpu", "cpu"])


def test_a_step_put_on_a_wrapper_that_it_never_takes_is_refused() -> None:
    wrapped = wrap(mlp(), 2)
    wrapped.replicate = lambda module, device_ids: [module] * len(device_ids)  # as callbacks of replication do
    with pytest.raises(TypeError, match=r"TowerParallel: expected .* overrides replicate .*convert_sync_batchnorm"):
        wrapped(batch(4))


def test_the_class_is_generic_as_nn_data_parallel_is() -> None:
    kind: Any = TowerParallel[nn.Sequential]
    assert isinstance(kind(mlp(), ["cpu", "cpu"]), TowerParallel)


@pytest.mark.parametrize("towers", EVERY_COUNT)
def test_a_larger_model_is_traced_through_the_wrapper(towers: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3).double(), wrap(mlp(), towers))
    traced = torch.fx.symbolic_trace(model)
    assert_close(traced(batch(5)), model(batch(5)))


def test_gather_knows_minus_one_for_the_cpu() -> None:
    wrapped = wrap(mlp(), 2)
    assert torch.equal(wrapped.gather([batch(2), batch(3)], -1), torch.cat([batch(2), batch(3)]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_the_steps_keep_the_first_replicas_buffers_as_data_parallel_does(num_towers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3).double()
            self.layers = nn.Sequential(self.norm, nn.Linear(3, 2).double())
            self.scripted, self.nothing = torch.jit.script(nn.Linear(2, 2).double()), None
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.scripted(self.layers(x))

    stepwise, wrapped = (kind(Net(), ["cpu"] * num_towers) for kind in (Stepwise, TowerParallel))
    stepwise.load_state_dict(wrapped.state_dict())
    for _ in range(2):
        out, expected = stepwise(batch(9)), wrapped(batch(9))
        assert_close(out, expected)
        for result in (out, expected):
            result.square().sum().backward()
    assert_same_gradients(stepwise, wrapped.module)
    for ours, theirs in zip(stepwise.module.buffers(), wrapped.module.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert stepwise.module.calls == 0


def test_the_steps_leave_compiled_modules_as_they_are() -> None:
    compiled: Any = torch.compile(nn.Linear(3, 2).double(), backend="eager")
    net = nn.Sequential(compiled, nn.Tanh())
    stepwise = Stepwise(net, ["cpu", "cpu"])
    assert_close(stepwise(batch(5)), net(batch(5)))
    assert len(list(net.parameters())) == 2


def test_there_are_as_many_replicas_as_devices_are_named_with_tensors_of_any_kind() -> None:
    net = nn.BatchNorm1d(3)
    net.register_buffer("template", torch.empty(2, device="meta"))
    replicas = wrap(net, 2).replicate(net, ["cpu"] * 3)
    assert len(replicas) == 3 and all(replica.template.is_meta for replica in replicas)

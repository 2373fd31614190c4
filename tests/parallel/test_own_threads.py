"""What rests on each tower's having a thread of its own, the main tower too: the caller's stays the caller's.

Each failed, in one case at least, when the main tower was tried in the thread that calls (docs/drop-in.md, "How fast it
is").
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tests.helpers import assert_close, assert_same_gradients, batch, in_threads, mlp, twins, wrap
from tests.modules import OneLayer, calling
from tests.programs import passes
from torchtower import convert_sync_batchnorm, current_tower

_PATIENCE_S = 20


def test_a_turn_is_passed_on_while_the_main_tower_works() -> None:
    has_come = threading.Event()

    class Net(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            if current_tower() == 2:
                has_come.set()
            assert current_tower() != 0 or has_come.wait(_PATIENCE_S)
            return self.fc(x)

    wrap(Net().double(), 3, max_concurrency=2)(batch(6))


LEAVES: dict[str, Callable[[], Any]] = {
    "grad mode": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "autocast's dtype": lambda: torch.set_autocast_dtype("cpu", torch.float16),
    "autocast's cache": lambda: torch.set_autocast_cache_enabled(False),
    "intra-op threads": lambda: torch.set_num_threads(7),
    "saved-tensor hooks": lambda: saved_tensors_hooks(lambda t: t, lambda t: t).__enter__(),
}


def state_here() -> list[Any]:
    """What torch keeps for this thread."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
    return [torch.is_grad_enabled(), *autocast, torch.get_num_threads(), hooks]


@pytest.mark.parametrize("what", LEAVES)
def test_what_a_forward_leaves_of_its_threads_state_never_reaches_the_caller(what: str) -> None:
    net = OneLayer().double()
    net.register_forward_hook(lambda *_: LEAVES[what]())
    wrapped, before = wrap(net, 2), state_here()
    wrapped(batch(4))
    assert state_here() == before


def test_a_thread_that_starts_during_a_call_has_all_intra_op_threads() -> None:
    inside, found = threading.Event(), []

    def first_use() -> None:
        assert inside.wait(_PATIENCE_S)
        found.append(torch.get_num_threads())
        has_looked.set()

    def forward(phase: str) -> None:
        if armed:
            inside.set()
            assert has_looked.wait(_PATIENCE_S)

    has_looked, armed = threading.Event(), False
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        wrapped = wrap(calling(forward), 2)
        wrapped(batch(4))
        armed = True
        in_threads(first_use, lambda: wrapped(batch(4)))
        assert found == [4]
    finally:
        torch.set_num_threads(before)


def test_hooks_around_a_checkpoint_of_the_wrapper_see_what_they_see_of_the_plain_module() -> None:
    plain, wrapped = twins(mlp(), 2)

    def count(module: nn.Module) -> int:
        packed = []

        def pack(tensor: Tensor) -> Tensor:
            packed.append(tensor.shape)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = checkpoint(module, batch(4), use_reentrant=False)
        out.sum().backward()
        return len(packed)

    assert count(wrapped) == count(plain)
    assert_same_gradients(wrapped, plain)


def test_reentrant_checkpoints_around_the_wrapper_do_not_add_to_those_within() -> None:
    # The engine hands on to yet another thread what lies more than 60 deep.
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))

        def forward(self, x: Tensor) -> Tensor:
            return within(self.layers, 30, x)

    def within(module: nn.Module, depth: int, x: Tensor) -> Any:
        return module(x) if depth == 0 else checkpoint(lambda x: within(module, depth - 1, x), x, use_reentrant=True)

    plain, wrapped = twins(convert_sync_batchnorm(Deep().double()), 2)
    grads = []
    for module in (plain, wrapped):
        x = batch(6, requires_grad=True)
        within(module, 40, x).exp().sum().backward()
        grads.append(x.grad)
    assert_close(*grads)
    assert_same_gradients(wrapped, plain)


def test_a_tower_that_fails_leaves_the_callers_forward_mode_alone() -> None:
    def fail(phase: str) -> None:
        if phase == "backward" and current_tower() == 0:
            raise ArithmeticError

    loss = wrap(calling(fail), 2)(batch(4)).sum()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.full((2,), 3.0))
        with pytest.raises(ArithmeticError):
            loss.backward()
        assert forward_ad.unpack_dual(dual * 2).tangent.tolist() == [6, 6]


MEETING = """
from torchtower import convert_sync_batchnorm
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
    def forward(self, x):
        global armed
        if armed == "late" and current_tower() > 0:
            time.sleep(1)
        if armed == "handler" and current_tower() == 0:
            armed = None
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            time.sleep(0.2)
        try:
            return self.norm(self.fc(x))
        finally:
            if armed == "late" and current_tower() == 0:
                time.sleep(1)
armed, x = None, torch.randn(8, 3)
model = towers(convert_sync_batchnorm(Net()))
model(x)
"""


def test_what_a_handler_raises_at_a_meeting_reaches_the_caller() -> None:
    passes(f"""
{MEETING}
def handler(*_):
    raise TimeoutError
signal.signal(signal.SIGALRM, handler)
armed = "late"
signal.setitimer(signal.ITIMER_REAL, 0.5)
try:
    model(x)
    sys.exit("no error")
except TimeoutError:
    armed = None
model(x)
""", 30)  # fmt: skip


def test_a_handler_may_use_a_model_whose_towers_meet() -> None:
    passes(f"""
{MEETING}
expected = model(x)
signal.signal(signal.SIGUSR1, lambda *_: seen.append(model(x[:4])))
seen, armed = [], "handler"
torch.testing.assert_close(model(x), expected)
torch.testing.assert_close(seen[0], model.module(x[:4]))
""", 30)  # fmt: skip


def test_a_compiled_step_around_a_wrapper_with_checkpoints_ends() -> None:
    passes("""
from torch.utils.checkpoint import checkpoint
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)
    def forward(self, x):
        return self.b(checkpoint(lambda x: nn.functional.dropout(self.a(x), 0.5), x, use_reentrant=True))
model = towers(Net())
@torch.compile(backend="eager")
def step(x):
    model(x).square().sum().backward()
import warnings
warnings.simplefilter("ignore")
for _ in range(3):
    step(torch.randn(8, 16, requires_grad=True))
""")

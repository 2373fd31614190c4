"""Contract 6: towers end with their wrapper and with their process, and leave no thread behind."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import pytest

from tests.helpers import assert_go_backward_alike, assert_same_gradients, batch, mlp, run_python, twins, wrap
from tests.programs import HEAD, passes


def tower_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("torchtower tower")}


# ---- threads come and go


def test_no_thread_runs_before_the_first_call_and_none_after_close() -> None:
    before = tower_threads()
    wrapped = wrap(mlp(), 3)
    assert not tower_threads() - before
    wrapped(batch(6))
    assert len(tower_threads() - before) == 3
    wrapped.close()
    assert not tower_threads() - before
    wrapped.close()


def test_a_closed_wrapper_starts_anew() -> None:
    plain, wrapped = twins(mlp(), 2)
    wrapped(batch(4))
    wrapped.close()
    assert_go_backward_alike(plain, wrapped, batch(5))


def test_a_backward_after_close_still_gives_the_gradients() -> None:
    plain, wrapped = twins(mlp(), 2)
    loss = wrapped(batch(5)).square().sum()
    wrapped.close()
    loss.backward()
    plain(batch(5)).square().sum().backward()
    assert_same_gradients(wrapped, plain)
    wrapped.close()


@pytest.mark.parametrize("ending", ["close", "new module", "gone"])
def test_a_backward_after_its_wrapper_leaves_no_thread(ending: str) -> None:
    before = tower_threads()
    wrapped: Any = wrap(mlp(), 2)
    module = wrapped.module
    out = wrapped(batch(4))
    if ending == "close":
        wrapped.close()
    elif ending == "new module":
        wrapped.module = mlp()
        wrapped(batch(4))
        wrapped.close()
    else:
        del wrapped
        gc.collect()
    out.sum().backward()
    assert module[0].weight.grad is not None
    assert not tower_threads() - before


def test_a_backward_after_the_wrapper_is_gone_still_gives_the_gradients() -> None:
    plain, wrapped = twins(mlp(), 2)
    net = wrapped.module
    loss = wrapped(batch(5)).square().sum()
    del wrapped
    gc.collect()
    loss.backward()
    plain(batch(5)).square().sum().backward()
    assert_same_gradients(net, plain)


def test_garbage_collection_ends_the_threads_without_cycles() -> None:
    before = tower_threads()
    gc.collect()
    gc.disable()
    try:
        wrapped = wrap(mlp(), 3)
        wrapped(batch(6)).sum().backward()
        del wrapped
        assert not tower_threads() - before
    finally:
        gc.enable()


# ---- exits


def test_a_system_exit_raised_in_a_tower_ends_the_program_with_its_code() -> None:
    done = run_python(
        HEAD
        + """
class Leave(nn.Module):
    def forward(self, x):
        sys.exit(3)
towers(Leave())(torch.ones(4, 3))
"""
    )
    assert done.returncode == 3, done.stderr


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "import atexit; atexit.register(lambda: model(torch.ones(4, 3)).sum().backward())",
        "model.cycle = model",
        "out = model(torch.ones(4, 3))",
        "keep = threading.Thread(target=lambda: model(torch.ones(4, 3))); keep.start()",
    ],
)
def test_an_interpreter_exits_cleanly_whatever_is_left(ending: str) -> None:
    passes("model = towers(nn.Linear(3, 2), 3)\nmodel(torch.ones(6, 3)).sum().backward()\n" + ending, 30)


def test_an_interpreter_exits_after_an_error_in_a_tower() -> None:
    done = run_python(
        HEAD
        + """
class Bad(nn.Module):
    def forward(self, x):
        raise ValueError("told to fail")
towers(Bad())(torch.ones(4, 3))
""",
        30,
    )
    assert done.returncode == 1 and "in tower 0 on device cpu" in done.stderr
    assert "in forward" in done.stderr, "the traceback leads to the user's own line"


def test_an_interpreter_ends_while_a_daemon_thread_is_in_a_forward() -> None:
    # How it ends is torch's affair: a daemon thread in the plain module aborts it too.
    done = run_python(
        HEAD
        + """
model = towers(Slow(0.5))
threading.Thread(target=lambda: model(torch.ones(4, 3)), daemon=True).start()
time.sleep(0.1)
""",
        30,
    )
    assert "Error" not in done.stderr, done.stderr


def test_a_forward_while_the_interpreter_shuts_down_is_the_plain_modules() -> None:
    done = run_python(
        HEAD
        + """
model, x = towers(nn.Linear(3, 2)), torch.ones(4, 3)
expected = model(x).sum().item()
class Late:
    def __del__(self):
        print(model(x).sum().item() == expected)
late = Late()
""",
        30,
    )
    assert done.returncode == 0 and done.stdout.split() == ["True"], done.stderr + done.stdout


# ---- forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_towers_of_its_own() -> None:
    passes("""
torch.set_num_threads(1)
model = towers(nn.Linear(3, 2))
model(torch.ones(4, 3)).sum().backward()
child = os.fork()
if child == 0:
    try:
        model.zero_grad()
        model(torch.ones(4, 3)).sum().backward()
        ok = model.module.weight.grad is not None
    finally:
        os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
model(torch.ones(4, 3)).sum().backward()
""", 30)  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_first_towers_of_a_forked_child_may_start_at_the_same_moment() -> None:
    passes("""
class Meet(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
    def forward(self, x):
        gate.wait()
        return x * self.weight

sys.setswitchinterval(1e-6)
torch.set_num_threads(1)
gate = threading.Barrier(2)
model = towers(Meet())
model(torch.ones(4, 2)).sum().backward()
for _ in range(300):  # one in a hundred crashed
    child = os.fork()
    if child == 0:
        gate = threading.Barrier(2)
        model(torch.ones(4, 2))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
""")


def test_a_child_forked_while_another_thread_is_in_a_forward_has_towers_of_its_own() -> None:
    passes("""
model = towers(Slow(0.0))
model(torch.ones(4, 3))
model.module.seconds = 1.0
forward = threading.Thread(target=lambda: model(torch.ones(4, 3)))
forward.start()
time.sleep(0.3)
child = os.fork()
if child == 0:
    model.module.seconds = 0.0
    model(torch.ones(4, 3)).sum().backward()
    os._exit(0 if model.module.fc.weight.grad is not None else 1)
assert os.waitpid(child, 0)[1] == 0
forward.join()  # torch has errors of its own for a forward while the interpreter goes
""")


def test_data_loader_workers_live_beside_the_towers() -> None:
    passes("""
from torch.utils.data import DataLoader, TensorDataset
model = towers(nn.Linear(3, 2))
model(torch.ones(4, 3)).sum().backward()
data = TensorDataset(torch.ones(16, 3))
for _ in range(2):
    for (x,) in DataLoader(data, batch_size=4, num_workers=2):
        model(x).sum().backward()
loader = DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True)
for (x,) in loader:
    model(x).sum().backward()
""", 60)  # fmt: skip


def test_towers_of_a_forked_worker_do_not_disturb_the_parent() -> None:
    passes("""
import torch.multiprocessing as mp
torch.set_num_threads(1)
model = towers(nn.Linear(3, 2))
def work(queue):
    queue.put(float(model(torch.ones(4, 3)).sum()))
if __name__ == "__main__":
    expected = float(model(torch.ones(4, 3)).sum())
    context = mp.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=work, args=(queue,)) for _ in range(2)]
    [w.start() for w in workers]
    assert [queue.get(), queue.get()] == [expected] * 2
    [w.join() for w in workers]
    assert [w.exitcode for w in workers] == [0, 0]
    assert float(model(torch.ones(4, 3)).sum()) == expected
""", 60)  # fmt: skip


def test_long_rounds_in_data_loader_workers_wait_for_no_thread_of_the_parents() -> None:
    passes("""
from torch.utils.data import DataLoader

class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.01)
        return super().forward(x)

class Features(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        with torch.no_grad():
            return model(torch.full((4, 3), float(index)))

model = towers(Slow(3, 2))
torch.set_num_threads(2)
torch.rand(1 << 22).add_(1)  # on two threads of OpenMP
loader = DataLoader(Features(), batch_size=1, num_workers=2, timeout=20, multiprocessing_context="fork")
assert sum(len(batch) for batch in loader) == 4
""", 60)  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "held", ["torchtower.threads.tower_random._install_lock", "torchtower.threads.forward_mode._turn"]
)
def test_a_child_forked_while_another_thread_holds_a_lock_of_the_towers_has_it_free(held: str) -> None:
    passes(f"""
import os
import torchtower.threads.tower_random, torchtower.threads.forward_mode

holds, may_go = threading.Event(), threading.Event()
def hold():
    with {held}:
        holds.set()
        may_go.wait(0.2)
holder = threading.Thread(target=hold)
holder.start()
holds.wait()
others = [threading.Thread(target=may_go.wait, args=(0.2,)) for _ in range(4)]  # whose names a child's towers may get
for other in others:
    other.start()
child = os.fork()
if child == 0:
    class Curved(nn.Linear):
        def forward(self, x):
            return torch.func.jvp(super().forward, (x,), (x,))[1]
    towers(Curved(3, 2))(torch.ones(4, 3)).sum().backward()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
holder.join()
""", 60)  # fmt: skip


# ---- closing while something else goes on


def test_a_wrapper_that_another_thread_closes_as_a_call_begins_answers_it() -> None:
    passes(
        """
model, x = towers(nn.Linear(3, 2)), torch.ones(4, 3)
model(x)
at_end, go_on = threading.Event(), threading.Event()

def pause_closer(frame, event, arg):  # when it has seen that no round is running
    if frame.f_code.co_name in ("_end_threads", "_stop"):
        at_end.set()
        go_on.wait()

def close():
    sys.setprofile(pause_closer)
    model.close()

def let_closer_go_on(frame, event, arg):  # when the threads have been chosen
    if event == "call" and frame.f_code.co_name == "__init__" and frame.f_code.co_filename.endswith("rounds.py"):
        sys.setprofile(None)
        go_on.set()
        closer.join()

closer = threading.Thread(target=close, daemon=True)
closer.start()
at_end.wait()
sys.setprofile(let_closer_go_on)
assert model(x).shape == (4, 2)
"""
    )


def test_threads_end_though_a_signal_breaks_off_the_waiting_for_one_of_them() -> None:
    passes(
        """
model, x = towers(nn.Linear(3, 2), 4), torch.ones(8, 3)

def strike(frame, event, arg):
    if event == "call" and frame.f_code.co_name == "join" and frame.f_code.co_filename.endswith("threading.py"):
        sys.setprofile(None)
        raise KeyboardInterrupt

for _ in range(5):
    model(x)
    sys.setprofile(strike)
    try:
        model.close()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
end = time.monotonic() + 30
while threading.active_count() > 1 and time.monotonic() < end:
    time.sleep(0.01)
assert threading.active_count() == 1
"""
    )


def test_a_wrapper_closed_over_and_over_by_other_threads_goes_on() -> None:
    passes(
        """
sys.setswitchinterval(1e-6)
model, x, done = towers(nn.Linear(3, 2)), torch.ones(4, 3), threading.Event()

def close():
    while not done.is_set():
        model.close()

closers = [threading.Thread(target=close) for _ in range(2)]
for closer in closers:
    closer.start()
try:
    for _ in range(100):
        model(x).sum().backward()
finally:
    done.set()
assert torch.equal(model.module.bias.grad, torch.full((2,), 400.0))
"""
    )


def test_a_wrapper_is_called_when_the_interpreter_ends_by_who_came_before_torch() -> None:
    done = run_python(
        """
import atexit
atexit.register(lambda: print(*[model(x).shape for _ in range(2)], model(x).sum().backward(), flush=True))
import torch
from torchtower import TowerParallel
x, model = torch.ones(4, 3), TowerParallel(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout()), ["cpu"] * 2)
model(x)
"""
    )
    assert done.stdout == "torch.Size([4, 2]) torch.Size([4, 2]) None\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_while_another_thread_is_in_a_forward_may_go_backward_from_an_earlier_one() -> None:
    passes("""
model = towers(Slow(0.0))
out = model(torch.ones(4, 3)).sum()
model.module.seconds = 1.0
forward = threading.Thread(target=lambda: model(torch.ones(4, 3)))
forward.start()
time.sleep(0.3)
child = os.fork()
if child == 0:
    signal.alarm(20)
    out.backward()
    os._exit(0 if model.module.fc.weight.grad is not None else 1)
assert os.waitpid(child, 0)[1] == 0
forward.join()
""")

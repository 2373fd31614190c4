"""Contract 6: towers end with their wrapper, with their process and at a signal, and leave no thread behind."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import pytest

from tests.helpers import assert_go_backward_alike, assert_same_gradients, batch, mlp, run_python, twins, wrap


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


# ---- programs of their own

HEAD = """
import os, signal, sys, threading, time, torch
from torch import nn
from torchtower import TowerParallel, current_tower

class Slow(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.fc, self.seconds = nn.Linear(3, 2), seconds
    def forward(self, x):
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(0.01)
        return self.fc(x)

def towers(net, n=2, **options):
    return TowerParallel(net, ["cpu"] * n, **options)
"""


def passes(program: str, timeout_s: float = 60) -> None:
    done = run_python(HEAD + program, timeout_s)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "Fatal" not in done.stderr and "Traceback" not in done.stderr, done.stderr


# ---- signals


def test_a_keyboard_interrupt_reaches_the_caller_and_the_next_call_works() -> None:
    passes("""
model = towers(Slow(1.0), 3, max_concurrency=2)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    model(torch.ones(6, 3))
except KeyboardInterrupt:
    pass
else:
    sys.exit("no interrupt")
assert time.monotonic() - start < 1.8, "the tower whose turn had not come has run"
model.module.seconds = 0.0
model(torch.ones(6, 3)).sum().backward()
assert model.module.fc.weight.grad is not None
""")


def test_a_keyboard_interrupt_in_the_middle_of_a_backward_reaches_the_caller() -> None:
    passes("""
class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.6)
        return grad
class Net(Slow):
    def forward(self, x):
        return SlowBackward.apply(self.fc(x))
model = towers(Net(0))
out = model(torch.ones(4, 3)).sum()
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    out.backward()
except KeyboardInterrupt:
    pass
else:
    sys.exit("no interrupt")
model.zero_grad()
model(torch.ones(4, 3)).sum().backward()
assert model.module.fc.weight.grad is not None
""")


def test_an_interrupt_ends_towers_that_wait_for_each_other_for_ever() -> None:
    passes("""
from torchtower import convert_sync_batchnorm
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.lock, self.locks = nn.BatchNorm1d(3), threading.Lock(), True
    def forward(self, x):
        if not self.locks:
            return self.norm(x)
        with self.lock:  # the tower that has it waits in the norm for the others, and they for the lock
            return self.norm(x)
model = towers(convert_sync_batchnorm(Net()), 3)
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    model(torch.ones(6, 3))
    sys.exit("no interrupt")
except KeyboardInterrupt:
    pass
model.module.locks = False
model(torch.ones(6, 3))
""", 30)  # fmt: skip


@pytest.mark.parametrize("sync", [False, True])
def test_what_a_signals_handler_raises_waits_for_the_towers(sync: bool) -> None:
    passes(f"""
from torchtower import convert_sync_batchnorm
class Net(nn.Module):
    working = 0
    def __init__(self):
        super().__init__()
        self.norm, self.seconds = nn.BatchNorm1d(3), 0.0
    def forward(self, x):
        Net.working += 1
        time.sleep(self.seconds * (1 + (current_tower() or 0)))
        Net.working -= 1
        return self.norm(x)
def stop(*args):
    raise TimeoutError("too long")
signal.signal(signal.SIGALRM, stop)
net = Net()
model = towers(convert_sync_batchnorm(net) if {sync} else net, 2)
model.module.seconds = 0.3
signal.setitimer(signal.ITIMER_REAL, 0.1)
try:
    model(torch.ones(6, 3))
    sys.exit("no error")
except TimeoutError:
    assert Net.working == 0
model.module.seconds = 0.0
model(torch.ones(6, 3))
""", 30)  # fmt: skip


def test_interrupts_at_any_moment_lose_no_tower() -> None:
    # Many, at random moments of rounds that are as short as can be: one lost report would be waited for, for ever.
    passes("""
import random
model = towers(nn.Linear(3, 2), 2)
x = torch.ones(4, 3)
model(x)
main, stopped = threading.main_thread().ident, False
def interrupt():
    while not stopped:
        ready.wait(1)
        ready.clear()
        time.sleep(random.uniform(0.0, 0.004))
        signal.pthread_kill(main, signal.SIGINT)
ready, seen = threading.Event(), 0
thread = threading.Thread(target=interrupt, daemon=True)
thread.start()
while seen < 300:
    try:
        ready.set()  # within the try: an interrupt outside of it would be nobody's
        while True:
            model(x).sum()
    except KeyboardInterrupt:
        seen += 1
signal.signal(signal.SIGINT, signal.SIG_IGN)
stopped = True
ready.set()
thread.join()
assert torch.equal(model(x), model.module(x))
""", 120)  # fmt: skip


def test_interrupting_again_and_again_never_hangs() -> None:
    passes("""
class Net(Slow):
    def forward(self, x):
        time.sleep(self.seconds)  # which nothing breaks into
        return self.fc(x)
model = towers(Net(0), 3, max_concurrency=3)
model(torch.ones(6, 3))
model.module.seconds = 0.3
def interrupt():
    for _ in range(3):
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    model(torch.ones(6, 3))
    sys.exit("no interrupt")
except KeyboardInterrupt:
    pass
model.module.seconds = 0
model(torch.ones(6, 3))
""", 30)  # fmt: skip


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_second_interrupt_breaks_into_towers_that_would_never_end(where: str) -> None:
    passes(f"""
class Spin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, where):
        ctx.where = where
        while where == "forward":
            time.sleep(0.01)
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        while ctx.where == "backward":
            time.sleep(0.01)
        return grad, None
class Net(Slow):
    where = ""
    def forward(self, x):
        return Spin.apply(self.fc(x), self.where)
model = towers(Net(0), 3, max_concurrency=2)
model(torch.ones(6, 3)).sum().backward()
model.module.where = "{where}"
def interrupt():
    for _ in range(2):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    model(torch.ones(6, 3)).sum().backward()
    sys.exit("no interrupt")
except KeyboardInterrupt:
    pass
assert not [t for t in threading.enumerate() if t.name.startswith("torchtower tower")], "those broken into are gone"
model.module.where = ""
model.zero_grad()
model(torch.ones(6, 3)).sum().backward()
torch.testing.assert_close(model.module.fc.weight.grad, torch.full((2, 3), 6.0))
""", 30)  # fmt: skip


def test_two_interrupts_at_any_moment_lose_no_tower() -> None:
    # What breaks into a tower may strike between any two of its steps, or when it has done its part already.
    program = """
import random
sys.setswitchinterval(1e-5)
def handler(number, frame):
    while frame is not None:  # anywhere else an interrupt would be nobody's
        if frame.f_code.co_name == "run" and frame.f_code.co_filename.endswith("rounds.py"):
            raise KeyboardInterrupt
        frame = frame.f_back
signal.signal(signal.SIGINT, handler)
class Net(Slow):
    def forward(self, x):
        for _ in range(random.randrange(20000)):
            pass
        return self.fc(x)
model = towers(Net(0), 2)
x = torch.ones(4, 3)
model(x)
main, stopped = threading.main_thread().ident, False
def interrupt():
    while not stopped:
        time.sleep(random.uniform(0.0, 0.003))
        for _ in range(3):
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(random.uniform(0.0, 0.0002))
thread = threading.Thread(target=interrupt, daemon=True)
thread.start()
seen = broken = 0
while seen < 1000:
    try:
        model(x).sum().backward()
    except KeyboardInterrupt:
        seen += 1
        broken += not model._towers.pool._threads
stopped = True
thread.join()
assert broken > 20, "too few were struck to tell"
assert torch.equal(model(x), model.module(x))
"""
    # Python itself prints what strikes in the midst of a destructor.
    done = run_python(HEAD + program, 120)
    assert done.returncode == 0, done.stderr + done.stdout


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

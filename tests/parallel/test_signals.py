"""Contract 6: what a signal's handler raises reaches the caller, at whatever moment, and towers end."""

from __future__ import annotations

import pytest

from tests.helpers import run_python
from tests.programs import HEAD, passes


def test_a_keyboard_interrupt_reaches_the_caller_and_the_next_call_works() -> None:
    passes("""
model = towers(Slow(1.0), 3, max_concurrency=2)
interrupt_after(0.3)
start = time.monotonic()
expect_interrupt(lambda: model(torch.ones(6, 3)))
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
interrupt_after(0.2)
expect_interrupt(out.backward)
model.zero_grad()
model(torch.ones(4, 3)).sum().backward()
assert model.module.fc.weight.grad is not None
""")


@pytest.mark.parametrize("also_fails", [False, True])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_what_an_interrupted_call_has_worked_on_goes_with_the_interrupt(phase: str, also_fails: bool) -> None:
    # Without the collector: on a device that memory is needed for the next try.
    passes(f"""
import gc, weakref
class Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        seen.append(weakref.ref(ctx))
        wait("forward")
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        wait("backward")
        return grad
def wait(phase):
    if phase == armed:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            time.sleep(0.01)
        if {also_fails} and current_tower() == 1:
            raise ArithmeticError
class Net(Slow):
    def forward(self, x):
        return Wait.apply(self.fc(x))
def call():
    model(x).sum().backward()
armed, seen, x = None, [], torch.ones(4, 3)
model = towers(Net(0))
call()
armed, seen = {phase!r}, [weakref.ref(x)]
gc.collect()
gc.disable()
interrupt_after(0.2)
expect_interrupt(call)
del x
assert len(seen) == 3 and not any(one() is not None for one in seen)
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
interrupt_after(0.5)
expect_interrupt(lambda: model(torch.ones(6, 3)))
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
interrupt_after(0.05, 0.05, 0.05)
expect_interrupt(lambda: model(torch.ones(6, 3)))
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
interrupt_after(0.3, 0.3)
expect_interrupt(lambda: model(torch.ones(6, 3)).sum().backward())
assert not [t for t in threading.enumerate() if t.name.startswith("torchtower tower")], "those broken into are gone"
model.module.where = ""
model.zero_grad()
model(torch.ones(6, 3)).sum().backward()
torch.testing.assert_close(model.module.fc.weight.grad, torch.full((2, 3), 6.0))
""", 30)  # fmt: skip


def test_towers_that_hold_out_are_broken_into_at_every_interrupt() -> None:
    passes("""
class Stubborn(Slow):
    goes_on = True
    def forward(self, x):
        held_out = 0
        while self.goes_on:
            try:
                time.sleep(0.01)
            except KeyboardInterrupt:
                held_out += 1
                if held_out == 2:
                    raise
        return self.fc(x)
model = towers(Stubborn(0), 2)
interrupt_after(0.3, 0.3, 0.3)
expect_interrupt(lambda: model(torch.ones(4, 3)))
model.module.goes_on = False
model(torch.ones(4, 3))
""", 30)  # fmt: skip


def test_a_profiler_may_run_after_towers_were_broken_into() -> None:
    passes("""
class Endless(Slow):
    goes_on = True
    def forward(self, x):
        while self.goes_on:
            pass
        return self.fc(x)
model = towers(Endless(0), 2)
interrupt_after(0.3, 0.3)
expect_interrupt(lambda: model(torch.ones(4, 3)))
model.module.goes_on = False
for watch in (sys.setprofile, sys.settrace):
    watch(lambda *event: None)
    model(torch.ones(4, 3)).sum().backward()
    watch(None)
""", 30)  # fmt: skip


def test_towers_that_are_broken_into_give_back_the_turn_of_forward_mode() -> None:
    passes("""
from torch.func import jvp
class Net(Slow):
    goes_on = True
    def forward(self, x):
        def function(x):
            while self.goes_on:
                time.sleep(0.005)
            return self.fc(x).sin()
        return jvp(function, (x,), (torch.ones_like(x),))[1]
model = towers(Net(0), 3, max_concurrency=3)
interrupt_after(0.3, 0.3)
expect_interrupt(lambda: model(torch.ones(6, 3)))
model.module.goes_on = False
assert model(torch.ones(6, 3)).shape == (6, 2)
assert len([t for t in threading.enumerate() if t.name.startswith("torchtower tower")]) == 3, "the module ran alone"
""", 30)  # fmt: skip


def test_two_signals_at_the_same_moment_wait_for_the_towers() -> None:
    passes("""
class Net(nn.Module):
    working, seconds = 0, 0.0
    def forward(self, x):
        Net.working += 1
        try:
            time.sleep(self.seconds)
        finally:
            Net.working -= 1
        return x
def stop(*args):
    raise TimeoutError
signal.signal(signal.SIGTERM, stop)
model = towers(Net(), 2)
model(torch.ones(4, 3))
Net.seconds = 0.3
def interrupt():
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
for _ in range(5):
    threading.Thread(target=interrupt).start()
    try:
        model(torch.ones(4, 3))
        sys.exit("no interrupt")
    except (KeyboardInterrupt, TimeoutError):
        assert Net.working == 0
""", 60)  # fmt: skip


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

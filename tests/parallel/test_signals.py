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


# ---- handlers that use the model, and interrupts where Python runs on behalf of the wrapper


HANDLER = """
class Signalling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        strike("forward")
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        strike("backward")
        return grad
def strike(where):
    if where == armed and len(seen) < 2:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        time.sleep(0.2)
def handler(*_):
    with torch.set_grad_enabled(train):
        out = model(x)
        seen.append(torch.autograd.grad(out.sum(), net[0].weight)[0] if train else out)
seen, armed = [], None
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
net[0].register_forward_hook(lambda module, args, out: Signalling.apply(out) if current_tower() is not None else None)
model, x = towers(net), torch.ones(8, 3)
model(x).sum().backward()
expected = [p.grad.clone() for p in model.parameters()]
signal.signal(signal.SIGUSR1, handler)
"""


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_signals_handler_may_use_the_model(where: str, train: bool) -> None:
    passes(
        f"where, train = {where!r}, {train}\n{HANDLER}"
        + """
for _ in range(2):
    model.zero_grad()
    armed = where
    model(x).sum().backward()
    armed = None
    for p, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, grad)
assert seen
for one in seen:
    torch.testing.assert_close(one, expected[0] if train else net(x))
"""
    )


INJECTED = """
def interrupted(call, within, points):
    \"\"\"Raise KeyboardInterrupt at each of these of Python's steps within a function; keep what was raised.\"\"\"
    for point in points:
        count = 0
        def strike(frame, event, arg):
            nonlocal count
            while frame is not None and frame.f_code.co_name != within:
                frame = frame.f_back
            if frame is not None and event in ("call", "c_return"):
                count += 1
                if count == point:
                    sys.setprofile(None)
                    raise KeyboardInterrupt
        sys.setprofile(strike)
        try:
            call()
        except (KeyboardInterrupt, RuntimeError) as error:  # what threading's own locks make of it
            yield error
        finally:
            sys.setprofile(None)
"""


@pytest.mark.parametrize("point", [30, 3000, 6000])
def test_an_interrupt_of_the_first_call_in_a_process_leaves_the_next_call_working(point: int) -> None:
    passes(
        INJECTED
        + f"""
model, x = towers(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))), torch.ones(4, 3)
kept = list(interrupted(lambda: model(x), "_intercept_draws_once", [{point}]))
assert kept
torch.manual_seed(0)
first = model(x)
torch.manual_seed(0)
assert torch.equal(first, model(x))
"""
    )


def test_an_interrupt_leaves_the_callers_grad_mode_as_it_was() -> None:
    passes(
        INJECTED
        + """
model, x = towers(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))), torch.ones(4, 3)
model(x)
for count, _ in enumerate(interrupted(lambda: model(x), "refresh_buffers", range(1, 30))):
    assert torch.is_grad_enabled()
assert count > 10
model(x).sum().backward()
"""
    )


def test_an_interrupt_while_threads_start_leaves_none_behind() -> None:
    passes(
        INJECTED
        + """
x = torch.ones(4, 3)
model = towers(nn.Linear(3, 2))
model(x)
model.close()
def call():
    model = towers(nn.Linear(3, 2))
    try:
        model(x)
    finally:
        model.close()
assert len(list(interrupted(call, "_started", range(1, 120, 3)))) > 20
end = time.monotonic() + 10
# But for those that Python itself has lost, whose start was broken off within threading.
while any("tower" in thread.name and thread.is_alive() for thread in threading.enumerate()):
    assert time.monotonic() < end, threading.enumerate()
    time.sleep(0.05)
"""
    )


def test_a_signals_handler_may_take_a_tower_loss() -> None:
    passes("""
found = []
def handle(*_):
    found.append(model.tower_loss(lambda net, x: net(x).square().mean(), torch.ones(4, 3)))
    found.append(model.module(torch.ones(4, 3)).square().mean())
signal.signal(signal.SIGALRM, handle)
model = towers(Slow(0.3))
model.module.seconds = 0.5
signal.setitimer(signal.ITIMER_REAL, 0.2)
model(torch.ones(4, 3))
assert len(found) == 2 and torch.equal(*found)
""", 30)  # fmt: skip

"""Contract 6: signals' handlers that use the model, and interrupts where Python runs on behalf of the wrapper."""

from __future__ import annotations

import pytest

from tests.programs import passes

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

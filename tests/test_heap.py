import platform

import pytest
import torch

from tests.helpers import run_python
from torchtower.threads.heap import keep_freed_memory

STEPS = """
import resource, torch
from torchtower import TowerParallel

torch.set_num_threads(2)
net = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(4)])
model = TowerParallel(net, ["cpu"] * 2)
x = torch.randn(8, 1024)

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    net.zero_grad()
    model(x).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(10):
    faults_of_a_step()
print(sorted(faults_of_a_step() for _ in range(10))[5] * resource.getpagesize())
"""
GRADIENT_BYTES = 4 * 1024 * 1024 * 4


def mapped_by_a_step(**environment: str) -> int:
    done = run_python(STEPS, **environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


@needs_glibc
def test_a_step_takes_memory_that_the_last_one_has_freed():
    assert mapped_by_a_step() < GRADIENT_BYTES / 8


@needs_glibc
def test_thresholds_of_the_users_own_stay():
    assert mapped_by_a_step(MALLOC_TRIM_THRESHOLD_="131072") > GRADIENT_BYTES


def test_where_there_is_no_memory_to_free_nothing_happens(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "UntypedStorage", refuse)
    keep_freed_memory.__wrapped__()

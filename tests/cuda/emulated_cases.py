"""Calls of the real launcher over ptxcheck, one process a case.

    python -m tests.cuda.emulated_cases RUNTIME LIBRARY CASE

Fails on a wrong bit; prints ptxcheck's findings and the PTX lines that no launch reached as JSON.
"""

import json
import sys

import numpy as np

from . import reference_bits
from .emulator import BFLOAT16, BITS, FLOAT16, FLOAT32, FLOAT64, Emulator, Rule

PAIRS = {
    "float32": (FLOAT32, FLOAT32),
    "float64": (FLOAT64, FLOAT64),
    "float16": (FLOAT16, FLOAT16),
    "float16-to-float32": (FLOAT16, FLOAT32),
    "bfloat16": (BFLOAT16, BFLOAT16),
    "bfloat16-to-float32": (BFLOAT16, FLOAT32),
}


class Call:
    """Parameters that are uploaded one by one, called together and compared bit by bit."""

    def __init__(self, emulator, pair, num_towers, seed):
        self.emulator, self.num_towers, self.seed = emulator, num_towers, seed
        self.dtype, self.out_dtype = pair
        self.random = np.random.default_rng([num_towers, seed, *pair])
        self.weights = 0.1 + self.random.random(num_towers)
        self.grads, self.host_grads, self.outs = [], [], []

    def add(self, numel, misaligned=None, by=0, aliased=None):
        """misaligned: the one tower whose gradient lies `by` bytes off, or "out"."""
        host = [self.values(numel) for _ in range(self.num_towers)]
        grads = [
            self.emulator.upload(bits, self.dtype, by if tower == misaligned else 0) for tower, bits in enumerate(host)
        ]
        shift = by if misaligned == "out" else 0
        fresh = aliased is None
        out = self.emulator.empty(numel, self.out_dtype, shift) if fresh else grads[aliased]
        self.grads.append(grads)
        self.host_grads.append(host)
        self.outs.append(out)

    def values(self, numel):
        wide = self.random.normal(size=numel) * 10.0 ** self.random.integers(-3, 4, numel)
        wide[self.random.random(numel) < 0.05] = -0.0
        single = wide if self.dtype == FLOAT64 else wide.astype(np.float32)
        return reference_bits.narrow(single, self.dtype)

    def run(self, rule, **options):
        statistics = self.emulator.tower_mean(self.outs, self.grads, rule, self.weights, seed=self.seed, **options)
        for index, (out, grads) in enumerate(zip(self.outs, self.host_grads, strict=True)):
            sums = reference_bits.mean(grads, self.dtype, rule, self.weights)
            expected = reference_bits.narrow(sums, self.out_dtype)
            result = self.emulator.download(out)
            if not np.array_equal(result, expected):
                wrong = np.flatnonzero(result != expected)
                raise AssertionError(f"parameter {index}: {wrong.size} wrong from {wrong[0]} on")
            reference_bits.check_against_float64(result, self.out_dtype, grads, self.dtype, rule, self.weights)
        return statistics

    def add_shapes(self, every=1):
        """Every tail; every alignment of each one tower and of out; out as a tower's gradient."""
        bytes_each, out_bytes = (np.dtype(BITS[d]).itemsize for d in (self.dtype, self.out_dtype))
        for tail in range(0, 16, every):
            self.add(tail if tail % 2 else 16 + tail)
        for step, places in ((bytes_each, range(self.num_towers)), (out_bytes, ["out"])):
            for by in range(step, 16, step * every):
                place = places[(by // step + self.seed) % len(places)]
                self.add(17 + by, misaligned=place, by=by)
        if self.dtype == self.out_dtype:
            self.add(33, aliased=0)
            self.add(16, aliased=self.num_towers - 1)


def check_shapes(emulator, pair):
    """Every count of towers, and every rule under every schedule."""
    full = ((1, 0, Rule.WEIGHTED), (2, 1, Rule.WEIGHTED), (3, 2, Rule.MEAN), (8, 0, Rule.MEAN))
    for num_towers, seed, rule in (*full, (17, 1, Rule.WEIGHTED)):
        call = Call(emulator, pair, num_towers, seed)
        call.add_shapes()
        call.run(rule)
    for seed in range(3):
        for rule in Rule:
            call = Call(emulator, pair, 3, seed)
            call.add_shapes(every=5)
            call.run(rule)


def check_paths(emulator, pair):
    """Whole chunks, vectorised and not, in every kernel."""
    element = np.dtype(BITS[pair[0]]).itemsize
    for num_towers, statistics in ((2, False), (4, False), (8, False), (3, False), (2, True)):
        # Empty parameters cost nothing and make the launcher take the large argument.
        for empty in (0, 101 if num_towers == 2 else 90):
            call = Call(emulator, pair, num_towers, empty % 7)
            call.add(4096 + 3)
            call.add(4096 + 5, misaligned=num_towers - 1, by=element)
            for _ in range(empty):
                call.add(0)
            call.run(Rule.MEAN, statistics=statistics)


def check_statistics(emulator, pair):
    """The same bits under every schedule, and float64's sums to a thread's float32 rounding."""
    for num_towers, seeds in ((1, 3), (3, 3), (17, 1)):
        runs = []
        for seed in range(seeds):
            call = Call(emulator, pair, num_towers, seed)
            call.random = np.random.default_rng(num_towers)
            call.add(2100)
            call.add(0)
            call.add(261, misaligned=0, by=np.dtype(BITS[pair[0]]).itemsize)
            runs.append((call, call.run(Rule.MEAN, statistics=True)))
        for _, statistics in runs[1:]:
            for first, other in zip(runs[0][1], statistics, strict=True):
                assert first.tobytes() == other.tobytes(), "the schedule changes the statistics"
        check_sums(*runs[0])
    # More entries than one small argument holds, nearly all of them empty.
    several = Call(emulator, pair, 1, 0)
    for index in range(130):
        several.add(9 if index % 60 == 1 else 0)
    check_sums(several, several.run(Rule.SUM, statistics=True, driver=12000))


def check_sums(call, statistics):
    squares, non_finite, out_squares = statistics
    for index, grads in enumerate(call.host_grads):
        wide = [reference_bits.widen(bits, call.dtype).astype(np.float64) for bits in grads]
        expected = np.array([np.square(values).sum() for values in wide])
        np.testing.assert_allclose(squares[:, index], expected, rtol=4e-7)
        out = call.emulator.download(call.outs[index])
        mean = reference_bits.widen(out, call.out_dtype).astype(np.float64)
        rounding = {FLOAT16: 1.1e-3, BFLOAT16: 9e-3}.get(call.out_dtype, 4e-7)
        np.testing.assert_allclose(out_squares[index], np.square(mean).sum(), rtol=rounding)
    assert not non_finite.any()


def check_non_finite(emulator, pair):
    """Counts are exact, and squares beyond float32 are summed in float64."""
    dtype, out_dtype = pair
    single = np.random.default_rng(5).normal(size=5000).astype(np.float32)
    values = np.stack([single, single, np.zeros_like(single)])
    values[0, [3, 700, 4099]] = np.inf, -np.inf, np.nan
    if dtype != FLOAT16:
        values[1, ::7] = 2e30
        values[2] = 3e-25
    host = [reference_bits.narrow(row.astype(np.float64) if dtype == FLOAT64 else row, dtype) for row in values]
    grads = [[emulator.upload(bits, dtype) for bits in host]]
    outs = [emulator.empty(5000, out_dtype)]
    for empty in (0, 90):
        nothing = emulator.empty(0, dtype)
        outs += [emulator.empty(0, out_dtype)] * empty
        grads += [[nothing] * 3] * empty
        check_non_finite_of_first(emulator, outs, grads, host)


def check_non_finite_of_first(emulator, outs, grads, host):
    dtype = grads[0][0].dtype
    squares, non_finite, _ = emulator.tower_mean(outs, grads, Rule.SUM, [1] * 3, statistics=True)
    assert non_finite[:, 0].tolist() == [3, 0, 0]
    assert np.isnan(squares[0, 0])
    for tower in (1, 2):
        expected = np.square(reference_bits.widen(host[tower], dtype).astype(np.float64)).sum()
        np.testing.assert_allclose(squares[tower, 0], expected, rtol=4e-7)


def check_many(emulator):
    """Thousands of parameters, half of them empty: two large launches, three small ones."""
    for driver, count in ((13000, 2000), (12000, 600)):
        call = Call(emulator, PAIRS["float32"], 2, driver % 7)
        for index in range(count):
            call.add(index % 2 * 4)
        call.run(Rule.MEAN, driver=driver)


def check_pair(emulator, pair):
    if pair[0] == pair[1]:
        check_shapes(emulator, pair)
        check_statistics(emulator, pair)
        check_non_finite(emulator, pair)
    else:
        # Loads and sums are those of the same dtype's other case; only the stores differ.
        call = Call(emulator, pair, 3, 0)
        call.add_shapes()
        call.run(Rule.WEIGHTED)
    check_paths(emulator, pair)


CASES = {name: lambda emulator, pair=pair: check_pair(emulator, pair) for name, pair in PAIRS.items()}
CASES["many"] = check_many

if __name__ == "__main__":
    runtime, library, case = sys.argv[1:]
    emulator = Emulator(runtime, library)
    CASES[case](emulator)
    report = {
        "findings": emulator.findings(),
        "never_run": emulator.never_run(),
        "instructions": emulator.runtime.runtime_instructions(),
    }
    print(json.dumps(report))

"""Seeded bugs: each change of the source must be caught by a check that the source passes."""

import functools
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from .cuda.toolchain import (
    CSRC,
    build_entry_library,
    build_host_program,
    emulator_runtime,
    require_gxx,
    require_ptxcheck,
    scratch_folder,
)
from .test_cuda_ptx import run_case

ALIGNMENT = ["-fsanitize=alignment", "-fno-sanitize-recover=all"]


@dataclass
class Mutation:
    """`old` becomes `new` in csrc/cuda/`file`, where it stands exactly once."""

    name: str
    file: str
    old: str
    new: str


BODY = "tower_mean_body.cuh"
HOST_MUTATIONS = [
    Mutation(
        "tail-dropped",
        "arguments.h",
        "return (vectorised + chunk - 1) / chunk + (numel - vectorised + chunk - 1) / chunk;",
        "return (vectorised + chunk - 1) / chunk + (aligned ? 0 : (numel + chunk - 1) / chunk);",
    ),
    Mutation(
        "tail-one-short",
        "arguments.h",
        "(is_vectorised ? vectorised : numel) - begin",
        "(is_vectorised ? vectorised : numel - (aligned ? 1 : 0)) - begin",
    ),
    Mutation("chunk-off-by-one", "arguments.h", "is_vectorised ? index * chunk", "is_vectorised ? index * (chunk - 1)"),
    Mutation(
        "index-in-32-bits",
        "arguments.h",
        "is_vectorised ? index * chunk",
        "is_vectorised ? static_cast<int32_t>(index * chunk)",
    ),
    Mutation("wrong-entry", "arguments.h", "entry(middle).first_chunk <= block", "entry(middle).first_chunk < block"),
    Mutation(
        "wrong-tower-stride",
        "arguments.h",
        "kEntryWords + tower]",
        "kEntryWords + (tower ^ (header.num_towers > 2 ? 1 : 0)) % header.num_towers]",
    ),
    Mutation("tower-order", BODY, "arguments.grad(index, tower)", "arguments.grad(index, num_towers - 1 - tower)"),
    Mutation(
        "last-tower-dropped",
        BODY,
        "tower < num_towers; ++tower",
        "tower < (num_towers == 17 ? 16 : num_towers); ++tower",
    ),
    Mutation("weight-dropped", BODY, "multiply(weight, values[i])", "values[i]"),
    Mutation("weight-of-tower-0", BODY, "&arguments.words[tower]", "&arguments.words[0]"),
    Mutation("starts-at-plus-zero", BODY, "Sum(-0.0)", "Sum(0)"),
    Mutation(
        "half-accumulation",
        BODY,
        "sums[i] = add(sums[i], multiply(weight, values[i]));",
        "sums[i] = Numerics<kDType>::widen(Numerics<kDType>::narrow(add(sums[i], multiply(weight, values[i]))));",
    ),
    Mutation(
        "reciprocal-for-division", BODY, "return divide(sum, count);", "return multiply(sum, divide(Sum(1), count));"
    ),
    Mutation("misaligned-out-missed", "packing.h", "reinterpret_cast<uint64_t>(parameter.out);", "0;"),
    Mutation(
        "misaligned-tower-missed",
        "packing.h",
        "tower < num_towers; ++tower) {\n    bits |=",
        "tower + 1 < num_towers; ++tower) {\n    bits |=",
    ),
    Mutation(
        "parameter-lost-between-launches",
        "packing.h",
        "  return index;",
        "  return index + (arguments->header.num_entries == capacity ? 1 : 0);",
    ),
    Mutation("wide-out-by-narrow-lanes", BODY, "vector_numel(sizeof(OutBits));", "kLanes;"),
    Mutation("bfloat16-truncated", "numerics.cuh", "0x7fffu + ((bits >> 16) & 1u)", "0u"),
    Mutation("bfloat16-ties-up", "numerics.cuh", "0x7fffu + ((bits >> 16) & 1u)", "0x8000u"),
    Mutation("overflowing-squares", "squares.cuh", "sum <= kLargestFloat", "sum == sum"),
    Mutation("vanishing-squares", "squares.cuh", "sum >= kSmallestSafeSum", "sum >= 0"),
    Mutation("non-finite-not-counted", "squares.cuh", "<= kLargestDouble ? 0 : 1", ">= 0 ? 0 : 1"),
]
# What the host's stand-ins cannot show: contraction by nvcc, the reduction over threads.
PTX_MUTATIONS = [
    Mutation(
        "contraction",
        BODY,
        "add(sums[i], multiply(weight, values[i]))",
        "sums[i] + weight * values[i]",
    ),
    Mutation("missing-barrier", "statistics.cuh", "    __syncthreads();\n    for (", "    for ("),
    Mutation("lanes-dropped", "statistics.cuh", "kWarpSize / 2; distance", "kWarpSize / 4; distance"),
]


def mutated(mutation, folder):
    shutil.copytree(CSRC / "cuda", folder / "cuda")
    shutil.copy(CSRC / "tower_mean.h", folder)
    path = folder / "cuda" / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.old!r} stands {text.count(mutation.old)} times"
    path.write_text(text.replace(mutation.old, mutation.new))
    return folder


def run_on_host(mutation):
    folder = mutated(mutation, scratch_folder() / mutation.name)
    flags = ALIGNMENT if "misaligned" in mutation.name else []
    program = build_host_program(folder, folder / "program", flags)
    return subprocess.run([program], capture_output=True, text=True)


def run_on_ptxcheck(mutation):
    folder = mutated(mutation, scratch_folder() / mutation.name)
    return run_case(build_entry_library(folder, folder / "libentry.so"), "float32")


def run_all(run, mutations):
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(run, mutations)
        return {m.name: outcome for m, outcome in zip(mutations, done, strict=True)}


@functools.cache
def outcomes_on_host():
    return run_all(run_on_host, HOST_MUTATIONS)


@functools.cache
def outcomes_on_ptxcheck():
    emulator_runtime()
    return run_all(run_on_ptxcheck, PTX_MUTATIONS)


def test_unmutated_the_host_program_passes():
    require_gxx()
    program = build_host_program(CSRC, scratch_folder() / "unmutated")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [mutation.name for mutation in HOST_MUTATIONS])
def test_the_host_program_catches(name):
    require_gxx()
    done = outcomes_on_host()[name]
    assert done.returncode != 0
    assert "host_program: " in done.stderr or "misaligned address" in done.stderr


# Unmutated, test_cuda_ptx.py runs the same case.
@pytest.mark.parametrize("name", [mutation.name for mutation in PTX_MUTATIONS])
def test_ptxcheck_catches(name):
    require_ptxcheck()
    done = outcomes_on_ptxcheck()[name]
    assert done.returncode != 0
    assert "AssertionError" in done.stderr or "[ptxcheck] race" in done.stderr

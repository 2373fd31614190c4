"""The compile gate: nvcc alone, every architecture, spills as errors."""

import shutil
import subprocess

import pytest

from .cuda.toolchain import CSRC, gate_cubins, require_nvcc, scratch_folder

ARCHITECTURES = {f"sm_{number}" for number in (75, 80, 86, 89, 90, 100, 120)}


def test_the_kernels_compile_for_every_architecture_without_spills_or_warnings():
    assert set(gate_cubins()) == ARCHITECTURES


def test_the_gate_refuses_a_kernel_that_spills(tmp_path):
    nvcc = require_nvcc()
    shutil.copytree(CSRC / "cuda", tmp_path / "cuda")
    shutil.copy(CSRC / "tower_mean.h", tmp_path)
    kernel = tmp_path / "cuda" / "tower_mean_kernel.cuh"
    text = kernel.read_text()
    assert "kBlocksPerMultiprocessor = 4;" in text
    kernel.write_text(text.replace("kBlocksPerMultiprocessor = 4;", "kBlocksPerMultiprocessor = 8;"))
    command = ["-std=c++17", "-O3", f"-I{tmp_path}", "-arch=sm_80", "-cubin"]
    gate = ["-Xptxas=-warn-spills,-warn-lmem-usage,-Werror", "-o", scratch_folder() / "spills"]
    done = subprocess.run([nvcc, *command, *gate, tmp_path / "cuda" / "tower_mean.cu"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "Registers are spilled to local memory" in done.stderr


def test_kernels_and_launcher_are_free_of_torch():
    sources = [path for path in (CSRC / "cuda").iterdir() if path.suffix != ".cmake"]
    assert len(sources) > 8
    with_torch = {path.name for path in sources if "torch/" in path.read_text()}
    assert with_torch == {"tower_mean_cuda.cpp"}


@pytest.mark.parametrize("path", sorted((CSRC / "cuda").iterdir()), ids=lambda path: path.name)
def test_the_cuda_backend_includes_nothing_of_the_cpu_backend(path):
    assert "cpu/" not in path.read_text()

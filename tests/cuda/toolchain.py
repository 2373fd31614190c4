"""What the CUDA proofs are built with: nvcc, g++ and ptxcheck, or the reason why a proof is skipped."""

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CSRC = REPOSITORY / "csrc"
PTXCHECK = REPOSITORY.parent / "shared" / "tools" / "ptxcheck"

# -ffp-contract=off: the host's stand-ins for __fmul_rn and __fadd_rn are plain operators.
HOST_FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas"]
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@functools.cache
def scratch_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="torchtower-cuda-")
    # Lives as long as the process: the finaliser of the object removes it.
    scratch_folder.keep = folder
    return Path(folder.name)


def run(command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def find_nvcc() -> str | None:
    if "CUDACXX" in os.environ:
        return os.environ["CUDACXX"]
    if "CUDA_HOME" in os.environ:
        return shutil.which("nvcc", path=Path(os.environ["CUDA_HOME"], "bin"))
    return shutil.which("nvcc")


def require_nvcc() -> str:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc on PATH, in CUDACXX or in CUDA_HOME")
    return nvcc


def require_gxx() -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")


def require_ptxcheck() -> Path:
    require_nvcc()
    if not PTXCHECK.is_dir():
        pytest.skip(f"needs ptxcheck in {PTXCHECK}")
    return PTXCHECK


def require_nvdisasm() -> str:
    places = [Path(place) for place in sys.path if place.endswith("site-packages")]
    wheels = [path for place in places for path in place.glob("nvidia/*/bin/nvdisasm")]
    found = shutil.which("nvdisasm") or next(map(str, wheels), None)
    if found is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    return found


def toolkit_include(nvcc: str) -> str:
    """Asked of nvcc, which may be a wrapper script far from its toolkit."""
    asked = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True)
    return re.search(r'INCLUDES="-I([^"]+)"', asked.stderr).group(1)


@functools.cache
def gate_cubins() -> dict[str, Path]:
    """Build the compile gate, by the same command as the CI, and return a cubin for each sm_*."""
    require_nvcc()
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": scripts}
    build = REPOSITORY / "build" / "cuda-gate"
    configure = ["cmake", "-S", REPOSITORY, "-B", build, "-G", "Ninja"]
    run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], env=environment)
    run(["cmake", "--build", build, "--target", "cuda_gate"], env=environment)
    return {path.stem: path for path in sorted((build / "cuda_gate").glob("sm_*.cubin"))}


def build_host_program(csrc: Path, output: Path, flags=()) -> Path:
    sources = [f"-I{csrc}", HERE / "host_program.cpp"]
    run(["g++", *HOST_FLAGS, *flags, *sources, "-o", output])
    return output


def build_entry_library(csrc: Path, output: Path) -> Path:
    nvcc = require_nvcc()
    device = ["-gencode", "arch=compute_80,code=compute_80", "--compress-mode", "none"]
    shared = ["-cudart", "none", "-Xcompiler", "-fPIC", "-shared"]
    sources = [f"-I{csrc}", HERE / "launcher_entry.cu"]
    run([nvcc, "-std=c++17", "-O3", "-lineinfo", *device, *shared, *sources, "-o", output])
    return output


@functools.cache
def emulator_runtime() -> Path:
    """Build ptxcheck's CUDA runtime with the few functions that we add."""
    ptxcheck = require_ptxcheck()
    output = scratch_folder() / "libcudart_ptxcheck.so"
    includes = [f"-I{ptxcheck}", f"-I{toolkit_include(require_nvcc())}"]
    flags = ["-std=c++17", "-O2", "-w", "-frounding-math", "-fPIC", "-shared"]
    name = "-Wl,-soname,libcudart_ptxcheck.so"
    run(["g++", *flags, *includes, name, HERE / "ptxcheck_runtime.cpp", "-o", output])
    return output

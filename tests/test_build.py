"""The build gives a package that imports and computes wherever it is put, and never builds anything twice."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPUTE = (
    "import torch, torchtower; print(torchtower.__file__);"
    "(mean, _), = torchtower.average_gradients([[(torch.tensor([1.0]), 0)], [(torch.tensor([3.0]), 0)]]);"
    "assert mean.item() == 2.0"
)

pytestmark = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").exists(), reason="needs a checkout, not an installed package"
)


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the repository tracks, so that its own build is left alone."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("torchtower", "csrc"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """Built from an unpacked source distribution, so that one build proves both."""
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", dist, cwd=source)
    (sdist,) = dist.glob("*.tar.gz")
    run(sys.executable, "-m", "tarfile", "--extract", sdist, dist / "unpacked", cwd=dist)
    (unpacked,) = (dist / "unpacked").iterdir()
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, cwd=unpacked)
    (built,) = dist.glob("*.whl")
    return built


def test_a_wheel_built_from_the_sdist_computes_from_another_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "torchtower/py.typed" in names
    assert "torchtower/training/__init__.py" in names
    assert not [name for name in names if name.startswith(("tests", "csrc", "benchmarks"))]
    # -P keeps the current folder off the path, PYTHONPATH goes before the editable install's finder.
    printed = run(sys.executable, "-c", COMPUTE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert str(tmp_path / "site") in printed


def test_building_twice_builds_nothing_and_an_edit_builds_its_own_file(source):
    def build() -> str:
        return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source)

    first = build()
    assert "Building CXX object" in first
    assert "ninja: no work to do" in build()
    bindings = source / "csrc" / "bindings.cpp"
    bindings.write_text(bindings.read_text() + "\n")
    again = build()
    compiled = [line for line in again.splitlines() if "Building" in line]
    assert len(compiled) == 1
    assert "bindings.cpp" in compiled[0]
    run(sys.executable, "-c", COMPUTE, cwd=source)


def test_an_import_without_the_extension_names_the_command_that_builds_it(source, tmp_path):
    ignore = shutil.ignore_patterns("*.so")
    shutil.copytree(source / "torchtower", tmp_path / "torchtower", ignore=ignore)
    # An editable install's finder would lend its extension.
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]; import torchtower"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip install --no-build-isolation" in done.stderr.splitlines()[-1]


def test_setup_py_imports_no_torch_and_stays_a_driver():
    text = (ROOT / "setup.py").read_text()
    assert len(text.splitlines()) < 100
    assert "import torch" not in text.replace("Imports no torch", "")
    assert ".cpp" not in text


def test_demanding_cuda_without_nvcc_is_an_error_that_says_so(source, tmp_path):
    # A PATH without nvcc; CMake also looks at CUDACXX and CUDA_HOME.
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cmake", "ninja", "g++", "gcc", "c++", "cc", "ld", "as", "sh", "ar", "ranlib"):
        found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if found:
            (tools / name).symlink_to(found)
    done = subprocess.run(
        [tools / "cmake", "-S", source, "-B", tmp_path / "b", "-G", "Ninja", "-DTORCHTOWER_CUDA=ON",
         f"-DPython_EXECUTABLE={sys.executable}"],
        env={"PATH": str(tools), "HOME": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "no CUDA compiler was found" in " ".join(done.stderr.split())

"""Build cpu_kernel_main, once for each set of options; kept under build/ until a source changes."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
KERNELS = {"baseline": [], "avx2": ["-mavx2", "-mfma", "-mf16c"], "neon": []}
# As CMakeLists.txt has them; -O1 because every operation is exact or rounded alone, whatever the optimiser does.
OPTIONS = ["-std=gnu++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-pthread"]


@dataclass(frozen=True)
class Variant:
    """A compiler, its further options, and what the program is called."""

    name: str
    compiler: str = "g++"
    options: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ("baseline", "avx2")
    link: tuple[str, ...] = field(default=())

    def build(self) -> Path:
        """Skip the test where the compiler or what it needs is missing; fail it where the code does not compile."""
        if shutil.which(self.compiler) is None:
            pytest.skip(f"{self.compiler} is not installed")
        sources = [
            *sorted((ROOT / "csrc").glob("*.h")),
            *sorted(CPU.iterdir()),
            ROOT / "tests/native/cpu_kernel_main.cpp",
        ]
        text = repr((self, OPTIONS)).encode() + b"".join(source.read_bytes() for source in sources)
        folder = ROOT / "build" / "native-tests" / f"{self.name}-{hashlib.sha256(text).hexdigest()[:16]}"
        program = folder / "cpu_kernel_main"
        if not program.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._probe(folder)
            self._compile(folder, program)
        return program

    def _probe(self, folder: Path) -> None:
        probe = folder / "probe.cpp"
        probe.write_text("int main() {}\n")
        command = [self.compiler, *self.options, *self.link, str(probe), "-o", str(folder / "probe")]
        tried = subprocess.run(command, capture_output=True, text=True)
        if tried.returncode != 0:
            pytest.skip(f"{self.compiler} {' '.join(self.options)} does not link here: {tried.stderr.strip()[-200:]}")

    def _compile(self, folder: Path, program: Path) -> None:
        common = [self.compiler, *OPTIONS, *self.options]
        objects = {name: folder / f"kernel_{name}.o" for name in self.kernels}

        def compile_kernels(name: str) -> None:
            source = CPU / f"kernel_{name}.cpp"
            subprocess.run([*common, *KERNELS[name], "-c", source, "-o", objects[name]], check=True)

        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_kernels, self.kernels))
        rest = [CPU / "kernels.cpp", CPU / "executor.cpp", ROOT / "tests/native/cpu_kernel_main.cpp"]
        subprocess.run([*common, *self.link, *rest, *objects.values(), "-o", program], check=True)


NATIVE = Variant("native")
ADDRESS = Variant("address", options=("-fsanitize=address,undefined", "-fno-sanitize-recover=all"))
THREAD = Variant("thread", options=("-fsanitize=thread",))
AARCH64 = Variant("aarch64", "aarch64-linux-gnu-g++", kernels=("baseline", "neon"), link=("-static",))

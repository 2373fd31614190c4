"""Drive the CMake build; CMakeLists.txt is the only description of the native code.

Imports no torch: CMake asks the interpreter that runs this file where torch lies.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configure, build and install the ``torchtower._C`` target."""

    def build_extension(self, ext: Extension) -> None:
        """Leave the compiled module where setuptools expects it.

        Raises:
            SystemExit: CMake is missing, or torch is not installed in this environment.
        """
        # A persistent folder of ours, never setuptools' temporary one: it is what makes a second build a no-op.
        abi = f"{sys.implementation.cache_tag}{sysconfig.get_config_var('abiflags')}"  # 't' of a Python without a GIL
        build = ROOT / "build" / f"{abi}-{'debug' if self.debug else 'release'}"
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parent.parent
        environment = self._environment()
        configure = [
            *("cmake", "-S", ROOT, "-B", build, "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCHTOWER_VERSION={self.distribution.get_version()}",
            f"-DTORCHTOWER_CUDA={environment.get('TORCHTOWER_CUDA', 'AUTO')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        try:
            subprocess.run(configure, check=True, env=environment)
            subprocess.run(["cmake", "--build", build], check=True, env=environment)
            subprocess.run(["cmake", "--install", build, "--prefix", prefix], check=True, env=environment)
        except FileNotFoundError:
            sys.exit("torchtower: expected cmake on PATH to build the extension: pip install cmake ninja pybind11")
        except subprocess.CalledProcessError as error:
            sys.exit(f"torchtower: the native build stopped (exit status {error.returncode}); the reason stands above")

    @staticmethod
    def _environment() -> dict[str, str]:
        # `.venv/bin/pip` puts no scripts folder on PATH, so PyPI's cmake and ninja would not be found.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        return {**os.environ, "PATH": path}


setup(ext_modules=[Extension("torchtower._C", sources=[])], cmdclass={"build_ext": CMakeBuild})

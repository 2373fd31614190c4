"""Compile the simulated accelerator, once for each state of its sources and of torch."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

_SOURCES = Path(__file__).parent / "csrc"
_CACHE = Path(__file__).parents[2] / "build" / "accelerator"
_FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
_TIMEOUT_S = 300


def build() -> Path:
    """The shared library, compiled now if it is not in the cache.

    Raises:
        RuntimeError: the compiler failed; says what it said.
    """
    target = _CACHE / f"simulated-{_fingerprint()}.so"
    if target.exists():
        return target
    _CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}")
    command = [os.environ.get("CXX", "g++"), *_FLAGS, str(_SOURCES / "simulated.cpp"), "-o", str(unfinished)]
    for folder in cpp_extension.include_paths():
        command += ["-isystem", folder]  # torch's own headers are not ours to warn about
    for folder in cpp_extension.library_paths():
        command += ["-L", folder]
    command += ["-lc10", "-ltorch_cpu", "-ltorch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"the simulated accelerator does not compile:\n{done.stderr}")
    unfinished.replace(target)  # whoever looks meanwhile sees all of it or nothing
    return target


def _fingerprint() -> str:
    digest = hashlib.sha256(f"{torch.__version__} {_FLAGS} {os.environ.get('CXX')}".encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]

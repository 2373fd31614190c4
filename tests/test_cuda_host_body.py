"""The kernel body and the packing, compiled by g++ over stand-ins and watched by ASan and UBSan."""

import subprocess

from .cuda.toolchain import CSRC, SANITIZERS, build_host_program, require_gxx, scratch_folder


def test_the_kernel_body_is_right_and_clean_under_asan_and_ubsan():
    require_gxx()
    program = build_host_program(CSRC, scratch_folder() / "host_sanitized", SANITIZERS)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""The AVX-512 kernels on any processor with AVX2: their intrinsics in plain C++ (tools/stand_in), all kernel tests over
them. A run of its own, since a process has one library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral.kernels.native import library as native
from tools.stand_in.build import ROOT, STAND_IN, build_stand_in

TESTS = ("tests/kernels/native", "tests/engine/test_native_runner.py")
FAULT = f"""#include "{STAND_IN}"
#undef _mm512_srli_epi16
#define _mm512_srli_epi16(x, count) stand_in::shift_right_16(x, (count) - 1)
"""


def run_over(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # those of the other instruction sets run over the library itself
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *options, *TESTS]
    environment = os.environ | {"MIXTRAL_NATIVE": str(folder)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def has_avx2() -> bool:
    return not native.available() and not native.library().mx_set_isa(b"avx2") and not native.library().mx_set_isa(None)


@pytest.mark.skipif(not has_avx2(), reason="the stand-in is compiled for processors with AVX2")
def test_every_kernel_test_over_the_stand_in(tmp_path: Path) -> None:
    build_stand_in(tmp_path)
    done = run_over(tmp_path, "-k", "avx512 or not (portable or avx2)")
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.rpartition(" passed")[0].split()[-1]) > 300


@pytest.mark.skipif(not has_avx2(), reason="the stand-in is compiled for processors with AVX2")
def test_a_fault_in_it_is_caught(tmp_path: Path) -> None:
    (tmp_path / "fault.h").write_text(FAULT)
    build_stand_in(tmp_path, tmp_path / "fault.h")
    done = run_over(tmp_path, "-k", "avx512 and int4")
    assert done.returncode == 1 and "1 failed" in done.stdout

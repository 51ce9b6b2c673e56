"""The package installs without a compiler. That it builds with one is what tests/kernels/test_native.py needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NATIVE = Path("mixtral/kernels/native")


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` in a folder that holds what it reads of the checkout."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "mixtral/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / NATIVE, folder / NATIVE, ignore=shutil.ignore_patterns("*.so"))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


def test_an_install_without_a_compiler_succeeds_without_the_library(tmp_path: Path) -> None:
    done = build(tmp_path, CC="/nowhere/cc", CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    assert "libmixtral" in done.stderr and "failed" in done.stderr
    assert not (tmp_path / NATIVE / "libmixtral.so").exists()


def test_a_compiler_that_fails_is_as_none(tmp_path: Path) -> None:
    done = build(tmp_path, CC="false", CXX="false")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / NATIVE / "libmixtral.so").exists()

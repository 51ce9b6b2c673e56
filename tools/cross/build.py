"""Wheels for Linux on x86-64 and, cross-compiled, on aarch64: `python tools/cross/build.py dist`.

The second wants Debian's g++-aarch64-linux-gnu. Each is built from a copy of what git tracks, so that nothing of one
finds its way into the other. The library in them needs no Python version; torch and the rest come from pip as ever.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TARGETS = {"x86_64": "", "aarch64": "aarch64-linux-gnu-"}  # the compiler's prefix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheels are written")
    parser.add_argument("--target", choices=TARGETS, action="append", help="one of them alone; both by default")
    options = parser.parse_args()
    for target in options.target or TARGETS:
        print(build(target, options.folder))


def build(target: str, folder: Path) -> Path:
    """The wheel for one target. Exits with a line where its compiler is missing."""
    prefix = TARGETS[target]
    if shutil.which(f"{prefix}g++") is None:
        sys.exit(f"wheel for {target}: no {prefix}g++; Debian has it as g++-aarch64-linux-gnu" if prefix else "no g++")
    environment = os.environ | {
        "_PYTHON_HOST_PLATFORM": f"linux-{target}", "CC": f"{prefix}gcc", "CXX": f"{prefix}g++",
        "LDSHARED": f"{prefix}g++ -shared", "LDCXXSHARED": f"{prefix}g++ -shared",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob("*.whl"))
    with tempfile.TemporaryDirectory() as copy:
        copy_tracked(Path(copy))
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
        command += ["-w", str(folder.absolute()), copy]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"wheel for {target}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    made = set(folder.glob(f"*{target}.whl")) - before or set(folder.glob(f"*{target}.whl"))
    return max(made, key=lambda path: path.stat().st_mtime)


def copy_tracked(to: Path) -> None:
    """What git tracks here, as it lies in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


if __name__ == "__main__":
    main()

"""The native library built for tests: with a sanitizer, or with AVX-512 that runs on any processor with AVX2.

    python tools/stand_in/build.py FOLDER    # then MIXTRAL_NATIVE=FOLDER: avx512.h stands in for the intrinsics

Compiled with little optimisation, which takes a fifth of the time; numbers do not depend on it (setup.py).
"""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCES = ROOT / "mixtral/kernels/native/src"
FLAGS = "-std=c++17 -O1 -fPIC -pthread -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
STAND_IN = Path(__file__).parent / "avx512.h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where libmixtral.so is written")
    build_stand_in(parser.parse_args().folder)


def build_stand_in(folder: Path, header: Path = STAND_IN) -> None:
    """The library, its AVX-512 form with the intrinsics of `header`."""
    link(compile_all(folder, [], header), folder)


def compile_all(
    folder: Path, flags: Sequence[str], stand_in: Path | None = None, compiler: str = "g++", only: str | None = None
) -> list[str]:  # fmt: skip
    """Every source, those of each instruction set (or of `only` one) once for each -> the object files."""
    from mixtral.native_file import headers_hash

    folder.mkdir(parents=True, exist_ok=True)
    sets: dict[str, list[str]] = runpy.run_path(str(ROOT / "setup.py"))["INSTRUCTION_SETS"]
    sets = {name: own for name, own in sets.items() if only in (None, name)}
    macros = [f"-DMX_HAVE_{name.upper()}" for name in sets] + [f'-DMX_HEADERS="{headers_hash(SOURCES.parent)}"']
    if stand_in:
        macros += ["-DMX_STAND_IN"]
        sets = sets | {"avx512": [*sets["avx2"], "-include", str(stand_in), "-Wno-psabi"]}
    jobs = []
    for source in sorted(SOURCES.glob("*.cpp")):
        for name, own in sets.items() if source.name.endswith(".isa.cpp") else (("", []),):
            isa = [f"-DMX_ISA={name}", *own] if name else []
            output = str(folder / f"{source.stem}{name}.o")
            jobs.append([compiler, *FLAGS, *flags, *macros, *isa, "-c", str(source), "-o", output])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, jobs))
    return [job[-1] for job in jobs]


def link(objects: Sequence[str], folder: Path, *flags: str) -> None:
    """The library in `folder`, where MIXTRAL_NATIVE finds it."""
    _run(["g++", "-shared", "-pthread", *flags, *objects, "-o", str(folder / "libmixtral.so")])
    if not (folder / "src").exists():
        (folder / "src").symlink_to(SOURCES)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()

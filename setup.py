"""Builds the C++ library of mixtral/kernels/native; all else about the package stands in pyproject.toml.

The library is one file with plain C functions, loaded by mixtral/kernels/native/library.py. Sources named *.isa.cpp are
compiled once for each instruction set that the compiler knows, with its flags and MX_ISA set to its name. Where there
is no compiler the package installs without the library: `mixtral doctor` tells what is missing.
"""

from __future__ import annotations

import hashlib
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

FOLDER = Path("mixtral/kernels/native")
SOURCES = sorted((FOLDER / "src").glob("*.cpp"))
HEADERS = sorted((FOLDER / "src").glob("*.h"))

# Products and sums are fused only where the sources say so (-ffp-contract): no result may depend on the compiler.
# -fno-tree-ter: GCC would otherwise put off the additions of a tile to its end, and run out of registers.
FLAGS = """-std=c++17 -O3 -g0 -fPIC -pthread -ffp-contract=off -fno-math-errno -fno-trapping-math -fno-tree-ter
    -Wextra -Wno-maybe-uninitialized""".split()  # GCC 12 warns about its own header of AVX-512
AVX2 = "-mavx2 -mfma -mf16c".split()
AVX512 = [*AVX2, *"-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16".split()]
# The processor to build for; another than this machine's when tools/cross/build.py says so, in setuptools' own way.
MACHINE = os.environ.get("_PYTHON_HOST_PLATFORM", "").rpartition("-")[2] or platform.machine().lower()
X86 = MACHINE in ("x86_64", "amd64")
INSTRUCTION_SETS = {"portable": [], "avx2": AVX2, "avx512": AVX512} if X86 else {"portable": []}


class BuildNative(build_ext):
    """Compiles each source as its name says, and links one library without Python's own names."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        built, target = FOLDER / "libmixtral.so", self.get_ext_fullpath(ext.name)
        if built.exists() and not newer_group([*ext.sources, *ext.depends], str(built)):
            self.copy_file(str(built), target)  # tools/bootstrap builds before pip asks
            return
        sets = self._known_sets()
        macros = [(f"MX_HAVE_{name.upper()}", None) for name in sets] + [("MX_HEADERS", f'"{_headers_hash()}"')]
        jobs = [(source, macros, FLAGS, "common") for source in SOURCES if not source.name.endswith(".isa.cpp")]
        for name, flags in sets.items():  # portable first: of what two objects define the linker takes the first
            own = [source for source in SOURCES if source.name.endswith(".isa.cpp")]
            jobs += [(source, [*macros, ("MX_ISA", name)], [*FLAGS, *flags], name) for source in own]
        with ThreadPoolExecutor(self.parallel or 1) as pool:
            objects = list(pool.map(self._compile, *zip(*jobs, strict=True)))
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread"], target_lang="c++")

    def _known_sets(self) -> dict[str, list[str]]:
        """The instruction sets whose flags the compiler takes. Raises CompileError when it takes none, or is none."""
        probe = Path(self.build_temp, "probe.cpp")
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("int main() {}\n")
        known: dict[str, list[str]] = {}
        for name, flags in INSTRUCTION_SETS.items():
            try:
                self._compile(probe, [], [*FLAGS, *flags], "probe")
                known[name] = flags
            except CompileError:
                if name == "portable":
                    raise
        return known

    def _compile(self, source: Path, macros: list[Any], flags: list[str], folder: str) -> str:
        """-> the object file's path."""
        return str(self.compiler.compile([str(source)], str(Path(self.build_temp, folder)), macros,
                                         extra_postargs=flags)[0])


class Wheel(bdist_wheel):
    """The library knows no Python version: one wheel a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _headers_hash() -> str:
    """As mixtral/kernels/native/library.py has it, which compares: the headers declare its structures."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in HEADERS)).hexdigest()[:16]


if __name__ == "__main__":  # tools/stand_in/build.py takes the flags from here
    library = Extension("mixtral.kernels.native.libmixtral", [str(s) for s in SOURCES],
                        depends=[str(h) for h in [*HEADERS, Path("setup.py")]], language="c++", optional=True)
    setup(ext_modules=[library], cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel})

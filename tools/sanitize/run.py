"""The native library under the compiler's sanitizers: `make sanitize`.

    python tools/sanitize/run.py thread --seconds 60    # pool and step, driven by threads.cpp, under ThreadSanitizer
    python tools/sanitize/run.py address --seconds 600  # the kernels' tests, then stress.py, under AddressSanitizer

Builds into build/sanitize; exits with 1 when something is reported.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCES = ROOT / "mixtral/kernels/native/src"
BUILD = ROOT / "build/sanitize"
FLAGS = "-std=c++17 -O1 -g -fPIC -pthread -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *"-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16".split()]
SETS = {"portable": [], "avx2": AVX2, "avx512": AVX512}  # the library takes the best that the processor has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizer", choices=("thread", "address"))
    parser.add_argument("--seconds", type=int, default=60, help="of driving threads (60)")
    options = parser.parse_args()
    shutil.rmtree(BUILD / options.sanitizer, ignore_errors=True)
    check = threads if options.sanitizer == "thread" else address
    check(BUILD / options.sanitizer, options.seconds)
    print(f"{options.sanitizer} sanitizer: nothing reported")


def threads(folder: Path, seconds: int) -> None:
    """pool.cpp and step.cpp under ThreadSanitizer, from several threads."""
    objects = compile_all(folder, "thread")
    program = folder / "threads"
    source = Path(__file__).parent / "threads.cpp"
    run("g++", *FLAGS, "-fsanitize=thread", f"-I{SOURCES}", str(source), *objects, "-o", str(program))
    run(str(program), str(seconds), TSAN_OPTIONS="exitcode=66")


def address(folder: Path, seconds: int) -> None:
    """The library in Python under AddressSanitizer: its tests, then threads that share a model."""
    objects = compile_all(folder, "address")
    run("g++", "-shared", "-pthread", "-fsanitize=address", *objects, "-o", str(folder / "libmixtral.so"))
    (folder / "src").symlink_to(SOURCES)
    runtime = subprocess.check_output(["g++", "-print-file-name=libasan.so"], text=True).strip()
    # Python and torch leak by design, and import their libraries before the runtime's checks would allow it.
    environment = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:abort_on_error=1",
                   "MIXTRAL_NATIVE": str(folder), "OMP_NUM_THREADS": "2"}  # fmt: skip
    tests = ("tests/kernels/native", "tests/engine/test_native_runner.py")
    run(sys.executable, "-m", "pytest", "-q", "-x", *tests, **environment)
    for n_threads in (2, 8):
        stress = str(Path(__file__).parent / "stress.py")
        run(sys.executable, stress, "--threads", str(n_threads), "--seconds", str(seconds // 2), **environment)


def compile_all(folder: Path, sanitizer: str) -> list[str]:
    """Every source, those of each instruction set once for each -> the object files."""
    sys.path.insert(0, str(ROOT))
    from mixtral.kernels.native.library import headers_hash

    folder.mkdir(parents=True)
    macros = ["-DMX_HAVE_AVX2", "-DMX_HAVE_AVX512", f'-DMX_HEADERS="{headers_hash(SOURCES.parent)}"']
    jobs = []
    for source in sorted(SOURCES.glob("*.cpp")):
        for name, flags in SETS.items() if source.name.endswith(".isa.cpp") else (("", []),):
            own = [f"-DMX_ISA={name}", *flags] if name else []
            output = str(folder / f"{source.stem}{name}.o")
            jobs.append(["g++", *FLAGS, f"-fsanitize={sanitizer}", *macros, *own, "-c", str(source), "-o", output])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: run(*job), jobs))
    return [job[-1] for job in jobs]


def run(*command: str, **environment: str) -> None:
    """Run a command; exits with 1, naming it, when it fails."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} ...: exit status {done.returncode}")


if __name__ == "__main__":
    main()

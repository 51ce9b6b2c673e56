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
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from tools.stand_in.build import FLAGS, SOURCES, compile_all, link  # noqa: E402 (the line above finds it)

BUILD = ROOT / "build/sanitize"


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
    objects = compile_all(folder, ["-g", "-fsanitize=thread"])
    program = folder / "threads"
    source = Path(__file__).parent / "threads.cpp"
    run("g++", *FLAGS, "-g", "-fsanitize=thread", f"-I{SOURCES}", str(source), *objects, "-o", str(program))
    run(str(program), str(seconds), TSAN_OPTIONS="exitcode=66")


def address(folder: Path, seconds: int) -> None:
    """The library in Python under AddressSanitizer: its tests, then threads that share a model."""
    link(compile_all(folder, ["-g", "-fsanitize=address"]), folder, "-fsanitize=address")
    runtime = subprocess.check_output(["g++", "-print-file-name=libasan.so"], text=True).strip()
    # Python and torch leak by design, and import their libraries before the runtime's checks would allow it.
    environment = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:abort_on_error=1",
                   "MIXTRAL_NATIVE": str(folder), "OMP_NUM_THREADS": "2"}  # fmt: skip
    tests = ("tests/kernels/native", "tests/engine/test_native_runner.py")
    run(sys.executable, "-m", "pytest", "-q", "-x", *tests, **environment)
    for n_threads in (2, 8):
        stress = str(Path(__file__).parent / "stress.py")
        run(sys.executable, stress, "--threads", str(n_threads), "--seconds", str(seconds // 2), **environment)


def run(*command: str, **environment: str) -> None:
    """Run a command; exits with 1, naming it, when it fails."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} ...: exit status {done.returncode}")


if __name__ == "__main__":
    main()

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtral import cores as module
from mixtral.errors import UsageError
from tests.machines import machine

REAL_CPU_COUNT = module.cpu_count


@pytest.fixture(autouse=True)
def _as_if_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_chosen", None)
    monkeypatch.setattr(module, "cpu_count", lambda: 3)
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever the test sets
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "250000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000"}, 8),
        (
            {
                "proc/self/cgroup": "2:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            8,
        ),
    ],
)
def test_cores_respect_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert REAL_CPU_COUNT(machine(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("running", "cores", "free"),
    [
        ("1 1 1 1 1", 3, 3),  # nobody but us
        ("2 2 2 2 2", 3, 2),
        ("1 9 1 9 1", 3, 3),  # some moments only
        ("9 9 9 9 9", 3, 1),
        ("9 9 9 9 9", 64, 3),  # there are other cores for them
        ("0 0 0 0 0", 3, 3),  # a system that does not count
    ],
)
def test_cores_that_others_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: str, cores: int, free: int
) -> None:
    looks = iter(running.split())

    def look(_: float = 0.0) -> None:
        machine(tmp_path, {"proc/loadavg": f"7.12 3.1 2.0 {next(looks, 0)}/135 27461\n"})

    look()
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert module.free_cores(tmp_path, look) == free


@pytest.mark.parametrize("text", [None, "", "1 2 3", "1 2 3 x/y"])
def test_a_system_that_does_not_tell_who_runs(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        machine(tmp_path, {"proc/loadavg": text})
    assert module.free_cores(tmp_path) == 3


@pytest.mark.parametrize(
    ("given", "environment", "want"),
    [(None, None, None), ("auto", None, None), (None, "2", 2), ("auto", "4,2", 4), ("5", "2", 5), (7, None, 7),
     (1024, None, 1024)],
)  # fmt: skip
def test_what_the_user_asked_for(
    monkeypatch: pytest.MonkeyPatch, given: int | str | None, environment: str | None, want: int | None
) -> None:
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    assert module.asked_threads(given) == want


@pytest.mark.parametrize("given", [0, -1, 1025, "0", "many", "2.5", "", "99999999999999999999", 1.5, True])
def test_no_number_of_threads(monkeypatch: pytest.MonkeyPatch, given: Any) -> None:
    wanted = f"a number from 1 to 1024 is wanted, or auto, not {given}".rstrip()
    with pytest.raises(UsageError, match=f"^threads: {wanted}$"):
        module.asked_threads(given)
    if given != "":  # a variable that is empty is as good as none
        monkeypatch.setenv("OMP_NUM_THREADS", str(given))
        with pytest.raises(UsageError, match=f"^OMP_NUM_THREADS: {wanted}$"):
            module.asked_threads()


def test_libraries_use_what_was_chosen_else_asked_for_else_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert module.threads() == 2
    module.use_threads(5)
    assert module.threads() == 5 and os.environ["RAYON_NUM_THREADS"] == "5"
    module.use_threads(1)  # as a worker process does, which finds its parent's number there
    assert module.threads() == 1 and os.environ["RAYON_NUM_THREADS"] == "1"
    module.use_threads(4)
    assert os.environ["RAYON_NUM_THREADS"] == "1"


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)


def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise() -> None:
    told = "import sys, os, mixtral.cores; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    assert in_a_process(told).stdout == "10000 False\n"
    assert in_a_process(told, GOMP_SPINCOUNT="7").stdout == "7 False\n"
    assert in_a_process(told, OMP_WAIT_POLICY="ACTIVE").stdout == "None False\n"  # which a count would override


@pytest.mark.skipif(sys.platform != "linux", reason="only libgomp tells what it has read")
def test_the_policy_is_set_before_torch_loads_openmp() -> None:
    said = in_a_process("import mixtral.runtime", OMP_DISPLAY_ENV="VERBOSE").stderr
    assert "GOMP_SPINCOUNT = '10000'" in said

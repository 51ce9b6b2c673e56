from __future__ import annotations

import os
from pathlib import Path

from mixtral import system
from tests.machines import machine

GIB = 2**30


def test_memory_is_what_the_system_has_left(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {3 * 2**20} kB\n"})
    assert system.available_memory_bytes(root) == 3 * GIB


def test_memory_respects_cgroup_2_and_the_groups_above(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/a"
    files = {
        "proc/meminfo": f"MemAvailable: {64 * 2**20} kB\n",
        "proc/self/cgroup": "0::/a/b\n",
        f"{group}/b/memory.max": "max",
        f"{group}/memory.max": str(8 * GIB),
        f"{group}/memory.current": str(5 * GIB),
        f"{group}/memory.stat": f"anon 1\ninactive_file {GIB}\n",
    }
    assert system.available_memory_bytes(machine(tmp_path, files)) == 4 * GIB


def test_memory_respects_cgroup_1_seen_from_inside_a_container(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": f"MemAvailable: {64 * 2**20} kB\n",
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GIB),
    }
    assert system.available_memory_bytes(machine(tmp_path, files)) == 0
    files["sys/fs/cgroup/memory/memory.limit_in_bytes"] = str(2**63 - 4096)  # how version 1 says "no limit"
    assert system.available_memory_bytes(machine(tmp_path, files)) == 64 * GIB


def test_memory_of_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert system.available_memory_bytes(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_gpu_shows_by_its_driver(tmp_path: Path) -> None:
    assert not system.may_have_gpu(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert system.may_have_gpu(tmp_path)

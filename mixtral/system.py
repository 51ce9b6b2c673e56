"""What the system says of this machine without torch, which takes seconds to load: free memory, a GPU or none."""

from __future__ import annotations

import math
import os
from pathlib import Path

from mixtral.cores import cgroup_folders, read_number

_GPUS = ("dev/nvidiactl", "dev/kfd", "dev/dxg")  # NVIDIA's driver, AMD's, either under Windows


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes that can still be allocated without swapping: what the system has, or the cgroup's limit leaves.

    Where neither is known (macOS), all physical memory, which is an upper bound.
    """
    bounds = [_meminfo_available(root)]
    for controller, limit, usage in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for folder in cgroup_folders(controller, root):
            most = read_number(folder / limit)
            if most < math.inf:
                bounds.append(max(0, most - (read_number(folder / usage) - _reclaimable(folder))))
    best = min(bounds)
    return int(best) if best < math.inf else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def may_have_gpu(root: Path = Path("/")) -> bool:
    """Whether torch might find a GPU: asking it is worth the time."""
    return any((root / name).exists() for name in _GPUS)


# -- what Linux reports ------------------------------------------------------------------------------------------------


def _reclaimable(folder: Path) -> float:
    """Bytes of cached files that count as used by the group but are given up on demand."""
    try:
        stat = dict(line.split()[:2] for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0.0
    return float(stat.get("inactive_file", 0))


def _meminfo_available(root: Path) -> float:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return float(found[0][1]) * 1024 if found else math.inf

"""The cores that are ours, and how many threads may work on them.

Loads no torch: worker processes that never need it ask here too.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from mixtral.errors import UsageError

MOST_THREADS = 1024  # a larger number is taken for a slip

_chosen: int | None = None  # what use_threads was given


def cpu_count(root: Path = Path("/")) -> int:
    """Cores this process may use: the affinity mask and the cgroup's quota, whichever is smaller; at least 1.

    `root` stands for the file system's root, so that tests can show another machine's /proc and /sys.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota_v2(folder) for folder in cgroup_folders("", root)]
    quotas += [_quota_v1(folder) for folder in cgroup_folders("cpu", root)]
    return max(1, min(cores, *(math.floor(quota) for quota in quotas)) if quotas else cores)


def free_cores(root: Path = Path("/"), pause: Callable[[float], None] = time.sleep) -> int:
    """How many of our cores are free of other work just now: what short work begins with; at least 1.

    The median of some looks at how many threads run or wait to run in the whole machine, 10 ms in all. Threads that
    wait for each other at every product are slower than one where another process holds one of their cores. Where
    the system does not tell, all our cores.
    """
    looks = []
    for _ in range(5):
        try:
            looks.append(int((root / "proc/loadavg").read_text().split()[3].partition("/")[0]))
        except (OSError, ValueError, IndexError):
            return cpu_count()
        pause(0.002)
    others = statistics.median_low(looks) - 1  # we run too, while we look
    return max(1, min(cpu_count(), (os.cpu_count() or 1) - others))


def asked_threads(threads: int | str | None = None) -> int | None:
    """The number that the user asked for: the one given, or for None or "auto" OMP_NUM_THREADS; None: neither.

    Raises UsageError for what is no number of threads.
    """
    name = "threads"
    if threads is None or (isinstance(threads, str) and threads == "auto"):
        name, threads = "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        if not threads:
            return None
    count = threads if type(threads) is int else 0  # not True, and no fraction cut off
    if isinstance(threads, str) and re.fullmatch("[0-9]{1,9}", threads):
        count = int(threads)
    if not 1 <= count <= MOST_THREADS:
        raise UsageError(f"{name}: a number from 1 to {MOST_THREADS} is wanted, or auto, not {threads}")
    return count


def use_threads(count: int) -> None:
    """Let what asks `threads` use as many, and the tokenizers library no more.

    That library looks at RAYON_NUM_THREADS once, when it is first given several texts; a smaller number there stays.
    """
    global _chosen
    _chosen = count
    known = os.environ.get("RAYON_NUM_THREADS", "")
    os.environ["RAYON_NUM_THREADS"] = known if known.isdigit() and 0 < int(known) < count else str(count)


def threads() -> int:
    """How many threads a library is to use: as many as use_threads was given, else as asked for, else our cores."""
    return _chosen or asked_threads() or cpu_count()


# -- what Linux reports ------------------------------------------------------------------------------------------------


def cgroup_folders(controller: str, root: Path) -> list[Path]:
    """Folders of this process's control group and of all above it; `controller` is "" for version 2.

    A container may see its group's path without seeing the folders on the way, so missing ones are left out.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    mount = root / "sys/fs/cgroup" / controller
    for line in lines:  # such as 4:memory:/a/b or, in version 2, 0::/a/b
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            inner = mount / path.lstrip("/")
            return [folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount) and folder.is_dir()]
    return []


def read_number(path: Path) -> float:
    """A file's first number; infinity where there is no file, or it says "max" or, as version 1 does, about 2^63."""
    try:
        value = float(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return math.inf
    return value if 0 <= value < 2**62 else math.inf


def _quota_v2(folder: Path) -> float:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # no file, or "max 100000"
        return 1e9


def _quota_v1(folder: Path) -> float:
    quota, period = read_number(folder / "cpu.cfs_quota_us"), read_number(folder / "cpu.cfs_period_us")
    return quota / period if quota < math.inf and 0 < period < math.inf else 1e9

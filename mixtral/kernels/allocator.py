"""Setting the C library's allocator: to keep what a training step frees, or to give back what loading frees."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # mallopt's names for them in glibc's malloc.h
_kept = False  # keep_freed_memory was called


def _mallopt() -> Callable[[int, int], int] | None:
    try:
        return ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return None


def keep_freed_memory() -> bool:
    """Keep freed memory in this process from now on; -> whether the C library can be set so (glibc can).

    glibc maps every large tensor anew and unmaps it when it is freed, so that each step of a training run takes a page
    fault for every 4 KiB it writes: 110,000 a step at the benchmark's width, a twentieth of its time.
    """
    global _kept
    mallopt = _mallopt()
    _kept = bool(mallopt and mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
    return _kept


@contextmanager
def giving_back_freed_memory() -> Iterator[None]:
    """Inside the block what is freed goes back to the system at once, where glibc allocates and keeps nothing else.

    By default it maps large memory anew only up to the first such free; then tensors that come and go leave holes
    between those that stay: 0.29 GiB more than a model of 2.15 GiB. Afterwards the limits are those it ends at itself.
    """
    mallopt = None if _kept else _mallopt()
    if mallopt:
        mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        if mallopt and not _kept:
            mallopt(_MMAP_THRESHOLD, 32 << 20)
            mallopt(_TRIM_THRESHOLD, 64 << 20)

"""Telling how far reading or writing has come."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # "reading" or "writing", bytes done, bytes in all


def counter(progress: Progress | None, what: str, total: int) -> Callable[[int], None]:
    """A function that takes each piece's bytes and passes their sum to `progress`, where there is one."""
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(what, done, total)

    return add

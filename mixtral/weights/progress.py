"""Telling how far reading or writing has come."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # "reading" or "writing", bytes done, bytes in all


def counter(progress: Progress | None, what: str, total: int) -> Callable[[int], None]:
    """A function to be told of each piece's bytes; it tells `progress`, where there is one, their sum."""
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(what, done, total)

    return add

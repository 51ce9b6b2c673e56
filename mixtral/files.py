"""Writing so that what is on disk is always whole: into a temporary sibling first, then renamed into place.

And opening what is to be read: regular files alone, as a pipe or a device might never end.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mixtral.errors import MixtralError

_serial = itertools.count()  # two threads writing the same path must not share a temporary name
_in_use: set[str] = set()  # temporary names; others with this process's id were left by an earlier one with that id


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Write a file, replacing an old one only once the new one is safely on disk; text is written as UTF-8.

    Raises MixtralError when that fails (disk full, no permission): the old file is then intact, and nothing left over.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield the name of a temporary file to write; it takes the place of `path` when the block ends without an error.

    Raises MixtralError when writing fails; any other error inside the block passes through. In both cases an old file
    is intact, and nothing left over.
    """
    with _replacing(Path(path)) as temporary:
        yield temporary
        sync(temporary)


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; it takes the place of `path` when the block ends without an error.

    An old folder at `path` is replaced as a whole: renamed aside, then removed. A kill in the instant between the two
    renames leaves it under the name `.NAME.old`, and the next atomic_folder for the same path puts it back first.
    Raises MixtralError when writing fails; the old folder is then intact and nothing is left over. Any other error
    inside the block passes through, with the same clean-up.
    """
    path = Path(path)
    with _replacing(path) as temporary:
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                sync(Path(folder) / name)
            sync(Path(folder))


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill on the way leaves it whole, or gone from under its name.

    Raises MixtralError when the system refuses, and leaves it whole then.
    """
    clear_leftovers(path.parent, path.name)
    temporary = _temporary(path)
    try:
        os.replace(path, temporary)
    except OSError as error:
        raise MixtralError(f"cannot remove {path}: {_one_line(error)}") from error
    _remove(temporary)


def clear_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what processes that were killed left half-written or half-removed of `name` in `folder`."""
    for left in folder.glob(f".{name}.*-*.tmp"):
        pid = left.name.removesuffix(".tmp").rpartition(".")[2].partition("-")[0]
        gone = left.name not in _in_use if pid == str(os.getpid()) else pid.isdigit() and not _alive(int(pid))
        if gone:
            _remove(left)


def _temporary(path: Path) -> Path:
    """A name beside `path` that only this process uses, and that tells whose it is."""
    return path.parent / f".{path.name}.{os.getpid()}-{next(_serial)}.tmp"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed over it if the block succeeds and removed if not."""
    temporary = _temporary(path)
    try:
        new_folders = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path)
        _in_use.add(temporary.name)  # only now: a killed process with our id may have left the same name
        yield temporary
        _swap_in(temporary, path)
        for folder in (path.parent, *(new.parent for new in new_folders)):
            sync(folder)
    except Exception as error:
        if is_write_failure(error):
            raise MixtralError(f"cannot write {path}: {_one_line(error)}") from error
        raise
    finally:
        _remove(temporary)
        _in_use.discard(temporary.name)


def is_write_failure(error: Exception) -> bool:
    """Whether the system refused to write: libraries wrap that in errors of their own, known by their text alone."""
    wrapped = ("os error", "file write failed", "unexpected pos")  # safetensors, torch.save, torch.save when closing
    if isinstance(error, MixtralError):  # already said in our own words
        return False
    return isinstance(error, OSError) or any(text in str(error) for text in wrapped)


def _one_line(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]


def _swap_in(new: Path, path: Path) -> None:
    """Rename `new` to `path`. A folder cannot be renamed over a filled one, so an old one steps aside first."""
    if not (new.is_dir() and path.is_dir()):
        os.replace(new, path)
        return
    old = _old(path)
    os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(old, path)
        raise
    _remove(old)


def _old(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


def _tidy(path: Path) -> None:
    """Clear up after a process that was killed while it wrote `path`."""
    if _old(path).exists():
        if path.exists():
            _remove(_old(path))
        else:
            os.replace(_old(path), path)
    clear_leftovers(path.parent, path.name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and belongs to someone else
        return True
    return True


def sync(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # a folder that was never there, or went read-only: nothing more to do
            path.unlink()


def open_regular(path: Path | str) -> BinaryIO:
    """Open a regular file for reading. OSError, at once, for a folder, a pipe, a device, an impossible name."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # else a pipe would wait for a writer
    except ValueError as error:  # a zero in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")

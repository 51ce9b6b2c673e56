"""Writing so that what is on disk is always whole, and that nothing is destroyed which was not written here.

New content goes into a temporary sibling, `.NAME.mixtral-RANDOM.tmp`, which takes its name at the end. Its process
holds a lock on it, which the system gives back when the process ends: a sibling of that form that nobody holds was left
by a process that was killed, and may be removed.

What is to be read is opened here too: regular files alone, as a pipe or a device might never end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mixtral.errors import MixtralError, UsageError

T = TypeVar("T")
_locked: dict[Path, int | None] = {}  # folders that this process holds, and the descriptor that holds the lock
_kept: ContextVar[dict[Any, Any] | None] = ContextVar("mixtral_read_once", default=None)


@contextmanager
def read_once() -> Iterator[None]:
    """Inside the block a small file that several readers want is read once (`once`): its content is kept until the end.

    For the files of one model, which configuration, tokenizer and generation defaults share.
    """
    token = _kept.set({} if _kept.get() is None else _kept.get())
    try:
        yield
    finally:
        _kept.reset(token)


def once(key: Any, make: Callable[[], T]) -> T:
    """What `make` returns; inside `read_once` what it returned for that key before. The value must not be changed."""
    kept = _kept.get()
    if kept is None:
        return make()
    if key not in kept:
        kept[key] = make()
    found: T = kept[key]
    return found


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Write a file, replacing an old one only once the new one is safely on disk; text is written as UTF-8.

    Raises MixtralError when that fails (disk full, no permission): the old file is then intact, and nothing left over.
    """
    with atomic_file(path, replace=True) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_file(path: Path | str, replace: bool = False) -> Iterator[Path]:
    """Yield the name of an empty temporary file to write; it becomes `path` when the block ends without an error.

    What is at `path` already is kept, and MixtralError raised, unless `replace`. Raises MixtralError when writing fails
    too; any other error inside the block passes through. In all cases an old file is intact, and nothing left over.
    """
    with _replacing(Path(path), folder=False) as (temporary, target):
        yield temporary
        sync(temporary)
        if not replace and target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.replace(temporary, target)


@contextlib.contextmanager
def atomic_folder(path: Path | str, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; it becomes `path` when the block ends without an error.

    There must be nothing at `path` by then but an empty folder. With `replace` the files of an old folder give way to
    the new ones of the same names, all at once, and what else lies in it is kept; a kill in the instant between the two
    renames leaves it under the name `.NAME.mixtral-RANDOM.old`, and the next write of the same path goes on from there.

    Raises MixtralError when writing fails, or there is something; the old folder is then intact and nothing is left
    over. Any other error inside the block passes through, with the same clean-up.
    """
    with _replacing(Path(path), folder=True) as (temporary, target):
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                sync(Path(folder) / name)
            sync(Path(folder))
        if replace and target.is_dir() and any(target.iterdir()):
            _swap(temporary, target)
        else:
            os.replace(temporary, target)  # which the system refuses over a folder that is not empty


def check_writable(path: Path) -> None:
    """Raise MixtralError unless a file or folder can be made at `path`; to be asked before long work."""
    target = Path(os.path.realpath(path))
    try:
        parent = next(folder for folder in target.parents if folder.exists())
        temporary, descriptor = _make(parent / target.name, folder=False)
        _remove(temporary)
        _close(descriptor)
    except OSError as error:
        raise MixtralError(f"cannot write {path}: {_one_line(error)}") from error
    if target.is_dir() and os.path.ismount(target):
        raise UsageError(f"{path}: is a mount point, which no folder can take the place of; name a new folder in it")


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill on the way leaves it whole, or gone from under its name.

    Raises MixtralError when the system refuses, and leaves it whole then.
    """
    clear_leftovers(path.parent, path.name)
    temporary = _beside(path, "tmp")
    try:
        os.replace(path, temporary)
    except OSError as error:
        raise MixtralError(f"cannot remove {path}: {_one_line(error)}") from error
    _remove(temporary)


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what processes that were killed left half-written or half-removed of `name` in `folder`; None: of all."""
    for left in _siblings(folder, name, "tmp"):
        with contextlib.suppress(OSError):  # it is held, or gone meanwhile, or there are no locks on this file system
            descriptor = _lock(left)
            _remove(left)
            os.close(descriptor)


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is one that a kill may have left, and that writing again clears up."""
    return _NAME.fullmatch(name) is not None


def lock_folder(folder: Path) -> None:
    """Keep other processes out of a folder, which is made when missing, until unlock_folder or the process's end.

    Raises UsageError when another process has locked it, MixtralError when it cannot be made. Where the file system
    knows no locks, nothing is kept out.
    """
    key = Path(os.path.realpath(folder))
    if key in _locked:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MixtralError(f"cannot write {folder}: {_one_line(error)}") from error
    try:
        _locked[key] = _lock(folder)
    except BlockingIOError:
        raise UsageError(f"{folder}: another process works in it; wait for its end, or name another folder") from None
    except OSError:
        _locked[key] = None


def unlock_folder(folder: Path) -> None:
    """Let others in again; nothing happens when this process has not locked it."""
    _close(_locked.pop(Path(os.path.realpath(folder)), None))


def is_write_failure(error: Exception) -> bool:
    """Whether the system refused to write: libraries wrap that in errors of their own, known by their text alone."""
    wrapped = ("os error", "file write failed", "unexpected pos")  # safetensors, torch.save, torch.save when closing
    if isinstance(error, MixtralError):  # already said in our own words
        return False
    return isinstance(error, OSError) or any(text in str(error) for text in wrapped)


def sync(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- temporary siblings ------------------------------------------------------------------------------------------------

_NAME = re.compile(r"\.(?P<of>.+)\.mixtral-[0-9a-f]{8}\.(?P<kind>tmp|old)", re.DOTALL)


def _beside(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.mixtral-{secrets.token_hex(4)}.{kind}"


def _siblings(folder: Path, name: str | None, kind: str) -> list[Path]:
    """What lies in `folder` under names that `_beside` gives, for `name` or for all names."""
    try:
        found = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    except OSError:
        return []
    return [path for path, match in found if match and match["kind"] == kind and name in (None, match["of"])]


@contextlib.contextmanager
def _replacing(path: Path, folder: bool) -> Iterator[tuple[Path, Path]]:
    """(a temporary file or folder, where it is to be renamed to): beside `path`, or beside what a link there points to.

    The temporary one is removed when the block did not rename it.
    """
    with contextlib.ExitStack() as stack:
        try:
            target = Path(os.path.realpath(path))
            new_folders = [parent for parent in target.parents if not parent.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            _tidy(target)
            temporary, descriptor = _make(target, folder)
            stack.callback(_close, descriptor)
            stack.callback(_remove, temporary)
            yield temporary, target
            for changed in (target.parent, *(new.parent for new in new_folders)):
                sync(changed)
        except Exception as error:
            if is_write_failure(error):
                raise MixtralError(f"cannot write {path}: {_one_line(error)}") from error
            raise


def _make(path: Path, folder: bool) -> tuple[Path, int | None]:
    """An empty temporary file or folder beside `path`, and the descriptor that holds it (None: there are no locks)."""
    while True:
        temporary = _beside(path, "tmp")
        if folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        try:
            descriptor = _lock(temporary)
        except BlockingIOError:  # another process has found it before it was held, and is about to remove it
            continue
        except OSError:
            return temporary, None
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


def _lock(path: Path) -> int:
    """A descriptor that holds the lock of a file or folder; BlockingIOError when another holds it.

    Two descriptors of one process exclude each other too. Any other OSError: there are no locks here.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)) from None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _swap(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`, where one is that is not empty: it steps aside first."""
    old = _beside(path, "old")
    os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(old, path)
        raise
    _take_over(old, path)


def _take_over(old: Path, path: Path) -> None:
    """Move to `path` what only the replaced folder `old` holds, and remove the rest; after a kill it is done again."""
    for other in old.iterdir():
        if not os.path.lexists(path / other.name):
            os.replace(other, path / other.name)
    _remove(old)


def _tidy(path: Path) -> None:
    """Clear up after a process that was killed while it wrote `path`."""
    for old in _siblings(path.parent, path.name, "old"):
        if path.exists():
            _take_over(old, path)
        else:
            os.replace(old, path)
    clear_leftovers(path.parent, path.name)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _one_line(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]


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

"""The folder of a training run: claimed by one process, known by the record that is written first (record.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mixtral.cores import asked_threads
from mixtral.errors import Interrupted, MixtralError, UsageError
from mixtral.files import atomic_write, is_temporary, lock_folder, remove_folder, unlock_folder
from mixtral.runtime import environment, set_threads
from mixtral.tokenizer import load_tokenizer
from mixtral.tokenizer.side_files import TEMPLATES, is_side_file
from mixtral.train.checks import check_run
from mixtral.train.config import PretrainConfig
from mixtral.train.display import Display
from mixtral.train.record import is_record, run_above
from mixtral.train.threads import choose_threads

_BEFORE_TRAINING = {"config.json", "tokenizer", "data"}  # what a run writes before its first checkpoint
_TOKENIZER_FILES = re.compile(r"tekken\.json|tokenizer(_config)?\.json|[^/]+\.model\.v\w+")  # and side files


def begin(config: PretrainConfig, out: Path, threads: int | str | None = None, display: Display | None = None) -> None:
    """Claim a new run's folder and record what it is to do, and with how many threads: None or "auto" as measured.

    A run that failed before its first checkpoint, on bad data perhaps, is begun anew. Raises UsageError when the folder
    holds anything else, when another process trains in it, and as `check_run` does, before the folder is made.
    """
    check_run(config)
    asked = asked_threads(threads)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; choose another --out, a folder")
    lock_folder(out)
    try:
        _check_failed(out)
        if (out / "tokenizer").exists():
            remove_folder(out / "tokenizer")  # it may be of other data
        set_threads(asked or choose_threads(config, display or Display()))
        record = {"train": config.to_dict(), "environment": environment()}
        atomic_write(out / "config.json", json.dumps(record, indent=1))
    except BaseException as error:
        unlock_folder(out)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted("stopped before the run had begun; begin anew with the same --out") from None
        raise


def _check_failed(out: Path) -> None:
    """Raise UsageError unless a folder is empty, or holds what a run that failed before its first checkpoint wrote.

    The run wrote config.json before all else, so the other names count as a run's only beside such a file.
    """
    try:
        names = {path.name for path in out.iterdir() if not is_temporary(path.name)}
        if names - _BEFORE_TRAINING or (names and not is_record(out / "config.json")):
            raise _taken(out)
        if "tokenizer" in names:
            _check_tokenizer(out / "tokenizer")
    except OSError as error:
        raise MixtralError(f"cannot read {out}: {error.strerror}") from error


def _check_tokenizer(folder: Path) -> None:
    """Raise UsageError, naming the file, unless a folder, to be removed, holds only what Tokenizer.save writes."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    files = {name: path for name, path in found.items() if name != TEMPLATES}
    for name, path in {".": folder, **found}.items():
        regular = path.is_file() and (_TOKENIZER_FILES.fullmatch(name) or is_side_file(name))
        if path.is_symlink() or not (path.is_dir() if name in (".", TEMPLATES) else regular):
            raise _foreign(path)
    if not files:
        return
    try:
        saved = load_tokenizer(folder).files()
    except MixtralError as error:
        raise UsageError(f"{folder}: no run has written this; move it, or choose another --out ({error})") from error
    for name, path in files.items():
        if name not in saved:  # such as another vocabulary beside ours
            raise _foreign(path)


def _foreign(path: Path) -> UsageError:
    return UsageError(f"{path}: no run has written this; move it, or choose another --out")


def _taken(out: Path) -> UsageError:
    if is_record(out / "config.json"):
        return UsageError(f"{out} is not empty; choose another --out, or go on with: mixtral train --resume {out}")
    return UsageError(f"{out} is not empty; choose another --out, as it is no training run{run_above(out)}")

"""The folder of a training run: claimed by one process, known by the record that is written first.

The record, `config.json`, holds the resolved configuration, versions, hardware and the number of threads.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mixtral.cores import MOST_THREADS, asked_threads
from mixtral.errors import ConfigError, Interrupted, MixtralError, UsageError, shown
from mixtral.files import atomic_write, is_temporary, lock_folder, remove_folder, unlock_folder
from mixtral.json_files import SMALL, parse_object, read_object, read_regular
from mixtral.runtime import environment, set_threads
from mixtral.tokenizer import load_tokenizer
from mixtral.tokenizer.side_files import TEMPLATES, is_side_file
from mixtral.train.checkpoint import checkpoints
from mixtral.train.checks import check_run
from mixtral.train.config import PretrainConfig
from mixtral.train.display import Display
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
        if names - _BEFORE_TRAINING or (names and not _is_record(out / "config.json")):
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
    if _is_record(out / "config.json"):
        return UsageError(f"{out} is not empty; choose another --out, or go on with: mixtral train --resume {out}")
    return UsageError(f"{out} is not empty; choose another --out, as it is no training run{_run_above(out)}")


def _run_above(path: Path) -> str:
    """Which run a path lies in, such as its model or the folder of its checkpoints; nothing for any other path."""
    runs = (folder for folder in path.absolute().parents[:3] if _is_record(folder / "config.json"))
    return f"; it lies in the run {os.path.relpath(run)}" if (run := next(runs, None)) else ""


def _is_record(path: Path) -> bool:
    """Whether a file is what `begin` writes, of this version or another."""
    try:
        record = read_object(path)
    except ConfigError:
        return False
    environment = record.get("environment")
    return record.keys() == {"train", "environment"} and isinstance(environment, dict) and "mixtral" in environment


def split_checkpoint(path: Path) -> tuple[Path, Path | None]:
    """(the run's folder, the checkpoint) for RUN/checkpoints/step_N, and (path, None) for a run's folder itself."""
    path = path.resolve() if path.name in ("", ".") else path
    return (path.parents[1], path) if path.parent.name == "checkpoints" else (path, None)


def recorded_config(out: Path) -> PretrainConfig:
    """The configuration of the run in `out`, or of the run that the checkpoint `out` is of; UsageError without one."""
    path, record = _read_record(out)
    if "train" not in record and "architectures" in record:
        raise UsageError(f"{path.parent} is a model, not a training run{_run_above(path.parent)}")
    if not isinstance(values := record.get("train"), dict):
        raise ConfigError(f"{path} is not a training configuration: train must be an object, not {shown(values)}")
    try:
        return PretrainConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def recorded_threads(out: Path) -> int:
    """How many threads the run in `out` computes with: its bits depend on that, so it keeps them when it goes on."""
    path, record = _read_record(out)
    environment = record.get("environment")
    threads = environment.get("threads") if isinstance(environment, dict) else None
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        most = f"a number of threads from 1 to {MOST_THREADS}"
        raise ConfigError(f"{path}: environment.threads must be {most}, not {shown(threads)}")
    return threads


def record_threads(out: Path, threads: int) -> None:
    """Let the run in `out`, whose folder is locked, go on with another number of threads: from there on other bits."""
    path, record = _read_record(out)
    record["environment"]["threads"] = threads
    atomic_write(path, json.dumps(record, indent=1))


def _read_record(out: Path) -> tuple[Path, dict[str, Any]]:
    """-> (the run's config.json, what it says); UsageError where there is none, or not the checkpoint asked for."""
    out, checkpoint = split_checkpoint(out)
    path = out / "config.json"
    if not os.path.isfile(path):
        what = "it is a file" if os.path.isfile(out) else "no such folder"
        what = "it has no config.json" if os.path.isdir(out) else what
        raise UsageError(f"{out} is not a training run: {what}{_run_above(out)}")
    if checkpoint and not os.path.isdir(checkpoint):
        names = ", ".join(found.name for found in checkpoints(out))
        raise UsageError(f"{checkpoint}: no such checkpoint; there {f'are {names}' if names else 'is none yet'}")
    return path, parse_object(read_regular(path, ConfigError, SMALL), f"{path} is not a training configuration")

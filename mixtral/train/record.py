"""The record of a training run, which is written first, and where its checkpoints lie. Loads no torch.

The record, `config.json` in the run's folder, holds the resolved configuration, versions, hardware and the number of
threads.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mixtral.cores import MOST_THREADS
from mixtral.errors import ConfigError, UsageError, shown
from mixtral.files import atomic_write
from mixtral.json_files import SMALL, parse_object, read_object, read_regular
from mixtral.train.config import PretrainConfig

_NAME = re.compile(r"step_(\d+)")


def split_checkpoint(path: Path) -> tuple[Path, Path | None]:
    """(the run's folder, the checkpoint) for RUN/checkpoints/step_N, and (path, None) for a run's folder itself."""
    path = path.resolve() if path.name in ("", ".") else path
    return (path.parents[1], path) if path.parent.name == "checkpoints" else (path, None)


def recorded_config(out: Path) -> PretrainConfig:
    """The configuration of the run in `out`, or of the run that the checkpoint `out` is of; UsageError without one."""
    path, record = _read_record(out)
    if "train" not in record and "architectures" in record:
        raise UsageError(f"{path.parent} is a model, not a training run{run_above(path.parent)}")
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
        raise UsageError(f"{out} is not a training run: {what}{run_above(out)}")
    if checkpoint and not os.path.isdir(checkpoint):
        names = ", ".join(found.name for found in checkpoints(out))
        raise UsageError(f"{checkpoint}: no such checkpoint; there {f'are {names}' if names else 'is none yet'}")
    return path, parse_object(read_regular(path, ConfigError, SMALL), f"{path} is not a training configuration")


def is_record(path: Path) -> bool:
    """Whether a file is what `begin` writes, of this version or another."""
    try:
        record = read_object(path)
    except ConfigError:
        return False
    environment = record.get("environment")
    return record.keys() == {"train", "environment"} and isinstance(environment, dict) and "mixtral" in environment


def run_above(path: Path) -> str:
    """Which run a path lies in, such as its model or the folder of its checkpoints; nothing for any other path."""
    runs = (folder for folder in path.absolute().parents[:3] if is_record(folder / "config.json"))
    return f"; it lies in the run {os.path.relpath(run)}" if (run := next(runs, None)) else ""


# -- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run's folder."""
    return folder / "checkpoints" / f"step_{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = (p for p in (folder / "checkpoints").glob("step_*") if _NAME.fullmatch(p.name))
    return sorted((p for p in found if p == checkpoint_path(folder, step_of(p))), key=step_of)  # no copy named step_4


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder; None before the first one is whole."""
    return max(checkpoints(folder), key=step_of, default=None)


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.removeprefix("step_"))

"""Checkpoints: everything needed to go on as if nothing had happened, in one folder that is always whole.

    checkpoints/step_000200/
        model.safetensors       fp32 weights, by our names
        optimizer.safetensors   moments and step counts
        state.json              step, best validation loss, and the sizes of the two files
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral.errors import MixtralError, UsageError
from mixtral.files import atomic_folder
from mixtral.train.optim import Optimizer

FILES = ("model.safetensors", "optimizer.safetensors")
_NAME = re.compile(r"step_(\d+)")


def save_checkpoint(folder: Path, optimizer: Optimizer, state: dict[str, Any], keep: int) -> Path:
    """Write `checkpoints/step_N` under the run's `folder`, then drop all but the last `keep` and the best.

    `state` is JSON with at least `step` and `best_step` (None before the first validation). Raises MixtralError when the
    disk is full or unwritable; earlier checkpoints are then untouched.
    """
    path = folder / "checkpoints" / f"step_{state['step']:06d}"
    with atomic_folder(path) as temporary:
        for name, tensors in zip(FILES, (optimizer.params, optimizer.state()), strict=True):
            _save(tensors, temporary / name)
        sizes = {name: (temporary / name).stat().st_size for name in FILES}
        (temporary / "state.json").write_text(json.dumps({**state, "sizes": sizes}, indent=1))
    for old in checkpoints(folder)[:-keep]:
        if _step(old) != state["best_step"]:
            shutil.rmtree(old)
    return path


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def load_checkpoint(path: Path, optimizer: Optimizer) -> dict[str, Any]:
    """Put a checkpoint's weights and optimiser state in place; -> its `state`. Raises MixtralError when it is not whole."""
    try:
        state = json.loads((path / "state.json").read_text())
        for name, size in state.pop("sizes").items():
            found = (path / name).stat().st_size
            if found != size:
                raise MixtralError(f"checkpoint {path}: {name} has {found} bytes, {size} were written; use an earlier one")
        optimizer.load(*(load_file(path / name) for name in FILES))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise MixtralError(f"checkpoint {path} cannot be read: {error}; use an earlier one") from error
    return state


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = (folder / "checkpoints").glob("step_*")
    return sorted((p for p in found if _NAME.fullmatch(p.name)), key=_step)


def latest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run's folder; UsageError when there is none."""
    if not (found := checkpoints(folder)):
        raise UsageError(f"{folder} has no checkpoint to resume from (looked for checkpoints/step_*)")
    return found[-1]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))

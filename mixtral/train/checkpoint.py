"""Checkpoints: everything needed to go on as if nothing had happened, in one folder that is always whole.

    checkpoints/step_000200/
        model/        fp32 weights and buffers, by our names
        optimizer/    moments and step counts, `KIND/NAME`, and what balancing keeps, `balance/NAME`
        state.json    where the run is, and the size of every file

Tensors go through torch.distributed.checkpoint with its safetensors storage, so several ranks can share a checkpoint
and nothing in it is a pickle.
"""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mixtral.config.specs import check_value
from mixtral.errors import MixtralError, WeightsError
from mixtral.files import atomic_folder, clear_leftovers, remove_folder, sync
from mixtral.json_files import LARGE, read_object
from mixtral.train.record import checkpoint_path, checkpoints, step_of
from mixtral.train.state import BALANCE, TrainState
from mixtral.weights.safetensors_file import SafetensorsFile

_PARTS = ("model", "optimizer")
_REMEDY = "resume from an earlier one"


class CheckpointWriter:
    """Writes checkpoints of a run in the background: training waits only for the copy of the tensors.

    One is written at a time. A failure (a full disk) is kept for `failure`, never raised from the thread: the run can
    go on, and earlier checkpoints are whole.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def save(self, trained: TrainState, state: dict[str, Any]) -> None:
        """Copy everything, and write it as `checkpoints/step_N`; then drop all but the last `keep` and the best.

        `state` is JSON with at least `step` and `best_step` (None before the first validation).
        """
        self.wait()
        tensors = {part: _copies(found) for part, found in trained.state_dict().items()}
        self._thread = threading.Thread(target=self._write, args=(tensors, state))
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failure(self) -> str | None:
        """Why the last checkpoint could not be written, returned once; None when it was, or still is being, written."""
        failure, self._failure = self._failure, None
        return failure

    def _write(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        try:
            for log in self.folder.glob("*.jsonl"):  # or a crash of the machine loses lines of steps before this one
                sync(log)
            write_checkpoint(checkpoint_path(self.folder, state["step"]), tensors, state)
            found = checkpoints(self.folder)
            best = _best_step(found)
            for old in found[: -self.keep]:
                if step_of(old) != best:
                    remove_folder(old)
        except Exception as error:  # whatever it is, it must reach the run, not die with the thread
            self._failure = str(error)


def _best_step(found: list[Path]) -> int | None:
    """The best step of which there is a checkpoint: the save of a better one since may have failed."""
    steps = {step_of(path) for path in found}
    named = (_state(path)["best_step"] for path in reversed(found))
    return next((step for step in named if step in steps), None)


def write_checkpoint(path: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write one checkpoint folder, or nothing: MixtralError when the disk is full or unwritable."""
    with atomic_folder(path) as temporary:
        for part in _PARTS:
            if tensors[part]:  # an optimiser has no state before its first step
                _quietly(dcp.save, tensors[part], storage_writer=HuggingFaceStorageWriter(str(temporary / part)))
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        sizes = {str(p.relative_to(temporary)): p.stat().st_size for p in files}
        (temporary / "state.json").write_text(json.dumps({**state, "sizes": sizes}, indent=1))


def load_checkpoint(path: Path, trained: TrainState) -> dict[str, Any]:
    """Put a checkpoint's weights and optimiser state in place; -> its `state`.

    Raises MixtralError when it is not whole, or of another model.
    """
    state = _state(path)
    try:
        for name, size in state.pop("sizes").items():
            found = (path / name).stat().st_size
            if found != size:
                raise MixtralError(f"checkpoint {path}: {name} has {found} bytes, not {size}; {_REMEDY}")
        trained.load_state_dict(_read(path, trained))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError,
            AssertionError, WeightsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MixtralError(f"checkpoint {path} cannot be read ({reason}); {_REMEDY}") from error
    return state


def _state(path: Path) -> dict[str, Any]:
    """What a checkpoint's state.json holds, the steps and sizes checked; MixtralError for a damaged one."""
    try:
        state = read_object(path / "state.json", MixtralError, LARGE)
        for name, kind in {"step": int, "best_step": int | None, "sizes": dict[str, int]}.items():
            check_value(name, state.get(name), kind)
    except MixtralError as error:
        raise MixtralError(f"checkpoint {path} cannot be read ({error}); {_REMEDY}") from error
    return state


def drop_later(folder: Path, step: int) -> None:
    """Remove the checkpoints after `step`, which a run that goes on from there makes anew, and what kills left."""
    clear_leftovers(folder / "checkpoints")
    for path in checkpoints(folder):
        if step_of(path) > step:
            remove_folder(path)


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, sharded as they are."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def _read(path: Path, trained: TrainState) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's tensors, each sharded as the state's own; nothing of a part that was never written."""
    stored = {part: _stored(path / part) for part in _PARTS}
    moments = [name for name in stored["optimizer"] if not name.startswith(BALANCE)]
    found = trained.empty_state_dict(moments)
    for name, entry in stored["optimizer"].items():
        if name.startswith(BALANCE):
            found["optimizer"][name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    for part, entries in stored.items():
        for name in entries.keys() ^ found[part].keys():
            what = "is missing" if name in found[part] else "is not part of this model"
            raise WeightsError(f"{part}: {name} {what}")
        for name, entry in entries.items():
            wanted = found[part][name]
            if entry.size != wanted.shape or entry.properties.dtype != wanted.dtype:
                have, want = _shown(entry.properties.dtype, entry.size), _shown(wanted.dtype, wanted.shape)
                raise WeightsError(f"{part}: {name} is {have}, the model has {want}")
        if entries:
            reader = HuggingFaceStorageReader(str(path / part))
            _quietly(dcp.load, found[part], storage_reader=reader)
    return found


def _shown(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    """What lies in the files of one part, by name."""
    if not folder.exists():
        return {}
    for file in folder.glob("*.safetensors"):
        SafetensorsFile(file)  # raises for a header that claims what the file has not: the reader would allocate it
    found: dict[str, TensorStorageMetadata] = {}
    for name, entry in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), name
        found[name] = entry
    return found


def _quietly(function: Any, tensors: dict[str, Tensor], **options: Any) -> None:
    """Save or load in this process alone, without the warning that it is alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            function(tensors, no_dist=True, **options)
        except CheckpointException as error:  # not an Exception, and its text is a traceback: tell what lies under it
            raise next(iter(error.failures.values()))[0] from error

"""What a run has to show that is finished already, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mixtral.errors import MixtralError
from mixtral.train.config import PretrainConfig
from mixtral.train.lines import read_lines
from mixtral.train.record import checkpoint_path, latest_checkpoint, recorded_config, split_checkpoint
from mixtral.train.step import Validation


class Finished(NamedTuple):
    """The end of a run: all its steps are done and its model is written."""

    folder: Path  # the model
    config: PretrainConfig
    start_loss: float  # validation cross-entropy before the first step, nats a token
    validation: Validation


def finished(out: Path) -> Finished | None:
    """The run in `out`, or of which `out` is the last checkpoint; None while there is work left.

    A model older than the last checkpoint, or of another record, is of an earlier end: it is to be written again.
    """
    config = recorded_config(out)
    out, checkpoint = split_checkpoint(out)
    last, final = checkpoint_path(out, config.steps), out / "final"
    if latest_checkpoint(out) != last or (checkpoint and checkpoint.name != last.name):
        return None
    try:
        training, state = final / "training.json", last / "state.json"
        whole = (final / "config.json").is_file() and training.read_bytes() == (out / "config.json").read_bytes()
        if not whole or training.stat().st_mtime_ns < state.stat().st_mtime_ns:
            return None
    except OSError:
        return None
    validations = logged_validations(out)
    return Finished(final, config, validations[0].cross_entropy, validations[-1])


def logged_validations(out: Path) -> list[Validation]:
    """The validations in the log of a run that is finished; MixtralError when there is none."""
    path = out / "metrics.jsonl"
    wanted = {"val_cross_entropy", "val_bits_per_byte", "val_loads"}
    found = [
        Validation(line["val_cross_entropy"], line["val_bits_per_byte"], line["val_loads"])
        for line in read_lines(path)
        if wanted <= line.keys()
    ]
    if not found:
        raise MixtralError(f"{path}: no validation is in it, though the run is finished")
    return found

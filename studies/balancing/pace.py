"""How long a training step takes, kind against kind: a few steps of each in turn, alone on the machine.

The runs' own times will not do for loss against time: they run side by side, and at other hours than the others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from plan import Run

from mixtral.data.loader import Loader
from mixtral.data.store import TokenData
from mixtral.files import atomic_write
from mixtral.model import Mixtral, initialise
from mixtral.runtime import set_threads
from mixtral.tokenizer import load_tokenizer
from mixtral.train.objective import next_token
from mixtral.train.state import TrainState
from mixtral.train.step import train_step

ROUNDS, STEPS = 5, 6  # of steps in turn; the first step of each is not counted


def measure_pace(out: Path, runs: Sequence[Run]) -> None:
    """Write OUT/pace.json, seconds of a step by kind, unless it is there; for kinds with a finished run in OUT."""
    path = out / "pace.json"
    kinds = {run.kind.label: run for run in runs if (out / "runs" / run.name / "summary.json").exists()}
    if path.exists() or not kinds:
        return
    set_threads()
    steppers = {label: Stepper(run, out / "runs" / run.name) for label, run in kinds.items()}
    times: dict[str, list[float]] = {label: [] for label in kinds}
    for _ in range(ROUNDS):
        for label, stepper in steppers.items():
            times[label] += stepper.run(STEPS)
    atomic_write(path, json.dumps({label: median(seconds) for label, seconds in times.items()}, indent=1) + "\n")


class Stepper:
    """A fresh model of a run's configuration, on the run's data."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.config = run.config
        tokenizer = load_tokenizer(folder / "tokenizer")
        self.loader = Loader(TokenData(folder / "data", tokenizer), run.config.rows, run.config.context)
        self.model = initialise(Mixtral(run.config.model), torch.Generator().manual_seed(0))
        self.train_state = TrainState.of(self.model, run.config, torch.float32)
        self.step = 0

    def run(self, steps: int) -> list[float]:
        """Seconds of each of `steps` steps, after one that is not counted."""
        return [self._one() for _ in range(steps + 1)][1:]

    def _one(self) -> float:
        parts = self.config.accumulation
        started = time.perf_counter()
        batch = [self.loader.batch(self.step, part, parts) for part in range(parts)]
        train_step(self.train_state, batch, next_token, self.config, self.step, stats=False)
        self.step += 1
        return time.perf_counter() - started

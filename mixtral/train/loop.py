"""The loop: batches, steps, validations, checkpoints, metrics, in that order."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mixtral.config.specs import check_fields
from mixtral.data.loader import Loader, TrainBatch
from mixtral.errors import ConfigError, Interrupted, MixtralError
from mixtral.model import Mixtral
from mixtral.train.checkpoint import CheckpointWriter, drop_later, load_checkpoint
from mixtral.train.config import PretrainConfig
from mixtral.train.diagnose import first_bad_layer, keep_batch
from mixtral.train.display import Display
from mixtral.train.finished import logged_validations
from mixtral.train.metrics import MetricsLog, PeakMatmul, Speed, bits_per_byte
from mixtral.train.objective import LossFn, next_token
from mixtral.train.record import checkpoint_path, latest_checkpoint
from mixtral.train.sinks import Trackers
from mixtral.train.state import TrainState
from mixtral.train.step import NonFiniteLoss, StepResult, Validation, train_step, validate
from mixtral.train.threads import ThreadWatch


@dataclass
class Progress:
    """How far a run has come: all the state there is besides weights and optimiser. Data order follows from `step`."""

    step: int = 0
    best_step: int | None = None  # the saved step with the lowest validation loss
    best_loss: float = math.inf
    start_loss: float | None = None  # validation before the first step

    def to_dict(self) -> dict[str, float | int | None]:
        return {**self.__dict__, "best_loss": self.best_loss if math.isfinite(self.best_loss) else None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """The inverse. Raises ConfigError for what is none."""
        if values.get("best_loss", math.inf) is None:
            values = {**values, "best_loss": math.inf}
        return cls(**check_fields("progress", values, cls))


@dataclass
class Run:
    """A training run in its folder."""

    folder: Path
    config: PretrainConfig
    state: TrainState
    loader: Loader
    val_batches: list[TrainBatch]
    byte_lengths_V: torch.Tensor
    display: Display
    peak_matmul: PeakMatmul | None = None  # None: steps are not reported as a share of it
    watch: ThreadWatch | None = None  # None: nobody looks whether the run becomes slow
    progress: Progress = field(default_factory=Progress)
    loss_fn: LossFn = next_token

    @property
    def model(self) -> Mixtral:
        return self.state.model

    def __post_init__(self) -> None:
        self.writer = CheckpointWriter(self.folder, self.config.keep)

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; later ones are removed."""
        state = load_checkpoint(checkpoint, self.state)
        try:
            self.progress = Progress.from_dict(state)
        except ConfigError as error:
            raise MixtralError(f"checkpoint {checkpoint} cannot be read ({error})") from None
        drop_later(self.folder, self.progress.step)

    def train(self) -> Validation:
        """Run to `config.steps`; -> the last validation.

        Raises Interrupted after the step at which Ctrl-C arrived, with a checkpoint of it written. Whatever is raised,
        no checkpoint is being written any more when it arrives.
        """
        begun = self.progress.start_loss is not None
        start = self.progress.step if begun else -1  # -1: the first validation comes again
        with contextlib.ExitStack() as stack:
            trackers = Trackers(self.folder, self.config, start, self.display.say)
            stack.callback(trackers.close)
            stack.callback(self._finish_saving)
            log = MetricsLog(self.folder, start, trackers)
            stack.enter_context(self.display.live(self.config, self.progress.step))
            interrupted = stack.enter_context(_deferred_interrupt())
            last = self._loop(log, interrupted)
        return last or logged_validations(self.folder)[-1]

    def _loop(self, log: MetricsLog, interrupted: threading.Event) -> Validation | None:
        """Steps, validations and checkpoints until the end; -> the last validation, None when nothing was left."""
        config, last = self.config, None
        if self.peak_matmul:
            rate = self.peak_matmul
            ceiling = {"peak_matmul": rate.flops, "peak_matmul_dtype": rate.dtype, "threads": torch.get_num_threads()}
            log.write("timings", {"step": self.progress.step, **ceiling})
        if self.progress.start_loss is None:
            last = self._validate(log)
            self.progress.start_loss = last.cross_entropy
            self._save()
            self._stop_if(interrupted)
        while self.progress.step < config.steps:
            self._step(log)
            step, end = self.progress.step, self.progress.step == config.steps
            save = end or step % config.save_every == 0 or interrupted.is_set()
            if end or step % config.val_every == 0:
                last = self._validate(log)
                save = self._is_best(last, save) or save
            if save:
                self._save()
            if not end:
                self._stop_if(interrupted)
        self._finish_saving()
        return last

    def _step(self, log: MetricsLog) -> None:
        begin = time.perf_counter()
        config, step = self.config, self.progress.step
        micro_batches = [self.loader.batch(step, i, config.accumulation) for i in range(config.accumulation)]
        stats = (step + 1) % config.stats_every == 0 or step + 1 == config.steps
        try:
            result = train_step(self.state, micro_batches, self.loss_fn, config, step, stats)
        except NonFiniteLoss as error:
            kept = keep_batch(micro_batches, self.folder, step + 1)
            where = first_bad_layer(self.model, micro_batches)
            raise NonFiniteLoss(f"{error}; first seen in {where}; batch: {kept}") from error
        seconds = time.perf_counter() - begin
        speed = Speed.of(seconds, config, self.peak_matmul, self.model.embedding.device)
        bits = bits_per_byte(result.cross_entropy, micro_batches, self.byte_lengths_V)
        self.progress.step += 1
        log.write("metrics", {**_metrics_line(self.progress.step, result, config), "bits_per_byte": bits})
        log.write("timings", {"step": self.progress.step, **speed.line()})
        self._tell_failure()
        self.display.step(self.progress.step, result, bits, speed)
        if self.watch:
            self.watch.step(speed.tokens_per_second)

    def _validate(self, log: MetricsLog) -> Validation:
        result = validate(self.model, self.val_batches, self.byte_lengths_V)
        step = self.progress.step
        if not math.isfinite(result.cross_entropy):
            where = first_bad_layer(self.model, self.val_batches)
            loss = f"the cross_entropy of the validation is {result.cross_entropy}"
            raise NonFiniteLoss(f"step {step}: {loss}; lower the learning rate; first seen in {where}")
        log.write("metrics", {"step": step, "val_cross_entropy": result.cross_entropy,
                              "val_bits_per_byte": result.bits_per_byte, "val_loads": result.loads})  # fmt: skip
        self.display.validation(step, result)
        return result

    def _is_best(self, result: Validation, saved: bool) -> bool:
        """Whether this step is the best one so far and `saved` anyway, or far enough from the last best one to be.

        Half of `save_every` is far enough: no best step is missed where validations are as far apart, and where they
        come more often, the best ones add at most two checkpoints in `save_every` steps.
        """
        step = self.progress.step
        near = step - (self.progress.best_step or 0) < self.config.save_every / 2
        if result.cross_entropy >= self.progress.best_loss or (near and not saved):
            return False
        self.progress.best_loss, self.progress.best_step = result.cross_entropy, step
        return True

    def _save(self) -> None:
        """Raises NonFiniteLoss rather than write weights that no run goes on from, and remove others for them."""
        if bad := next((name for name, w in self.state.weights.items() if not w.isfinite().all()), None):
            step = self.progress.step
            raise NonFiniteLoss(f"step {step}: {bad} is not finite, and not saved; lower the learning rate")
        self.writer.save(self.state, dict(self.progress.to_dict()))

    def _finish_saving(self) -> None:
        self.writer.wait()
        self._tell_failure()

    def _tell_failure(self) -> None:
        if failure := self.writer.failure():
            self.display.say(f"no checkpoint this time: {failure}; earlier ones are whole")

    def _stop_if(self, interrupted: threading.Event) -> None:
        """Raise Interrupted once Ctrl-C has come and what was saved is on disk."""
        if interrupted.is_set():
            self._finish_saving()
            raise Interrupted(self._stopped())

    def _stopped(self) -> str:
        """What to tell who pressed Ctrl-C: where the run stopped, and from where it can go on."""
        step, found = self.progress.step, latest_checkpoint(self.folder)
        where = f"stopped after step {step}" if step else "stopped before the first step"
        if found is None:
            where += ", with no checkpoint"
        elif found != checkpoint_path(self.folder, step):
            where += f", which is not saved; the last whole checkpoint is {found.name}"
        return f"{where}; go on with: mixtral train --resume {self.folder}"


def _metrics_line(step: int, result: StepResult, config: PretrainConfig) -> dict[str, object]:
    line: dict[str, object] = {"step": step, "tokens": step * config.tokens_per_step}
    line |= {"cross_entropy": result.cross_entropy, **result.aux, "grad_norm": result.grad_norm, "lr": result.lr}
    if result.layers:
        line["layers"] = [layer._asdict() for layer in result.layers]
    return line


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Inside the block the first Ctrl-C sets the event, so that a step is never torn; the second one raises at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield event
        return

    def handler(signum: int, frame: types.FrameType | None) -> None:
        if event.is_set():
            signal.default_int_handler(signum, frame)
        event.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)

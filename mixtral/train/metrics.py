"""Metrics as JSON lines: results in `metrics.jsonl`, times in `timings.jsonl`.

They stand apart so that the results of two runs, or of an interrupted and an uninterrupted one, compare byte by byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixtral.data.loader import TrainBatch
from mixtral.data.store import NO_TARGET
from mixtral.errors import MixtralError
from mixtral.files import atomic_write
from mixtral.hardware import measure_matmul, used_memory_bytes
from mixtral.train.config import PretrainConfig
from mixtral.train.lines import json_line, read_lines
from mixtral.train.sinks import Trackers, flatten


class PeakMatmul(NamedTuple):
    """The measured peak matmul throughput, of which a step's speed is a share."""

    flops: float  # a second
    dtype: str

    @classmethod
    def measure(cls, dtype: torch.dtype, device: torch.device) -> PeakMatmul:
        """Of `dtype` or of fp32, whichever is faster: a machine that emulates bf16 is no slower for being asked to."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the run's stay what they were
            rates = {kind: measure_matmul(kind, device) for kind in {dtype, torch.float32}}
        best = max(rates, key=rates.__getitem__)
        return cls(rates[best], str(best).removeprefix("torch."))


class Speed(NamedTuple):
    """What a step took of the machine."""

    seconds: float
    tokens_per_second: float
    share_of_peak: float | None  # the model's FLOPs a second as a share of peak matmul, where measured
    memory_bytes: int  # of the process, or the most that tensors have taken on a GPU

    @classmethod
    def of(cls, seconds: float, config: PretrainConfig, rate: PeakMatmul | None, device: torch.device) -> Speed:
        """Of one step of a run; what it computes a second time in the backward pass does not count."""
        tokens = config.tokens_per_step
        flops = tokens * config.model.flops_per_token(config.context, backward=True)
        share = flops / seconds / rate.flops if rate else None
        return cls(seconds, tokens / seconds, share, used_memory_bytes(device))

    def line(self) -> dict[str, float]:
        """As it is logged."""
        figures = {"seconds": round(self.seconds, 4), "tokens_per_second": round(self.tokens_per_second, 1)}
        if self.share_of_peak is not None:
            figures["share_of_peak"] = round(self.share_of_peak, 4)
        return {**figures, "memory_bytes": self.memory_bytes}


def bits_per_byte(cross_entropy: float, parts: Iterable[TrainBatch], byte_lengths_V: Tensor) -> float:
    """A batch's mean nats a token, as bits for each byte of the text that its targets stand for."""
    targets = torch.cat([part.targets_T[part.targets_T != NO_TARGET] for part in parts])
    return cross_entropy * len(targets) / math.log(2) / max(1, int(byte_lengths_V[targets].sum()))


class MetricsLog:
    """Appends to both files of a run's folder, and sends the trackers the same numbers.

    Opened at `step`, it first drops the lines of later steps.
    """

    def __init__(self, folder: Path, step: int, trackers: Trackers | None = None) -> None:
        self.trackers = trackers
        self.paths = {name: folder / f"{name}.jsonl" for name in ("metrics", "timings")}
        for path in self.paths.values():
            if path.exists():
                kept = [line for line in read_lines(path) if line["step"] <= step]
                atomic_write(path, "".join(f"{json.dumps(line)}\n" for line in kept))

    def write(self, name: str, line: dict[str, Any]) -> None:
        """Append one line to `metrics` or `timings`; it carries a `step`."""
        try:
            with open(self.paths[name], "a") as file:
                file.write(json_line(line) + "\n")
        except OSError as error:
            raise MixtralError(f"cannot write {self.paths[name]}: {error.strerror}") from error
        if self.trackers:
            prefix = "timing" if name == "timings" else ""
            self.trackers.log(line["step"], flatten(line, prefix, self.trackers.layers))

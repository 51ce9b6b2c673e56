"""What the benchmarks share: timing in turn, ceilings of the machine, and how a result is shown and kept."""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mixtral.files import atomic_write
from mixtral.hardware import hardware_name, measure_matmul
from mixtral.runtime import environment

PEERS = {"GOMP_SPINCOUNT": None}  # a peer's environment: without what mixtral sets, which its users do not have
RESULTS = Path(__file__).parent.parent / "results"


class PeerError(Exception):
    """An engine in a process of its own failed."""


class Apart:
    """A run in a process of its own; calling it makes one run and returns its result.

    `make(*args)` is called in that process and returns the run. Peers are measured so: settings that ours makes for its
    process (threads, allocator) are not theirs, and theirs are not ours.

    Args:
        patience: seconds that making it, or a run, may take; then, and when the process dies, PeerError is raised.
        environment: variables of that process that are other than here, from before torch is loaded; None: not set.
    """

    def __init__(
        self, make: Callable[..., Callable[..., object]], args: tuple[Any, ...], patience: float | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:  # fmt: skip
        context = multiprocessing.get_context("spawn")
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, args, environment or {}), daemon=True)
        self.patience = patience
        with other_environment(environment or {}):
            self.process.start()
        theirs.close()
        self._answer()  # it is made

    def __call__(self, *args: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # then there is no answer
            self.ours.send(args)
        return self._answer()

    def _answer(self) -> Any:
        try:
            if self.ours.poll(self.patience):
                return self.ours.recv()
        except (EOFError, ConnectionResetError):
            raise PeerError("its process ended; the reason stands above") from None
        self.process.terminate()
        raise PeerError(f"no answer in {self.patience:.0f} s")

    def close(self) -> None:
        """End the process; its memory is free again."""
        self.ours.close()
        self.process.join()


def _serve(
    pipe: Connection, make: Callable[..., Callable[..., object]], args: tuple[Any, ...],
    environment: Mapping[str, str | None],
) -> None:  # fmt: skip
    with other_environment(environment):  # importing mixtral has set its own again
        run = make(*args)
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(run(*pipe.recv()))


@contextlib.contextmanager
def other_environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """The process's environment with these variables while the block runs; None: not set."""
    before = {name: os.environ.get(name) for name in variables}
    _set_variables(variables)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, to the end of its work on a GPU."""
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleave(runs: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each run, taken in turn (A B A B): a neighbour's load falls on all of them alike."""
    for _ in range(warm_up):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: statistics.median(taken) for name, taken in times.items()}


def peak_matmul(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP/s of matrix products for work in `dtype`: its own rate, or fp32's where the processor only emulates it."""
    return max(measure_matmul(dtype, device), measure_matmul(torch.float32, device))


def publish(topic: str, result: dict[str, Any], keep: bool, device: str = "cpu") -> Path | None:
    """Print `result` as one JSON line, with all that it depends on; with `keep`, write it and return where."""
    now = datetime.datetime.now(datetime.UTC)
    head = {"benchmark": topic, "date": now.isoformat(timespec="seconds"), "environment": environment(device)}
    whole = {**head, **result}
    print(json.dumps(whole))
    if not keep:
        return None
    hardware = re.sub(r"[^a-z0-9]+", "-", hardware_name(device).lower()).strip("-")
    path = RESULTS / f"{topic}_{hardware}_{now.date()}.json"
    atomic_write(path, json.dumps(whole, indent=1) + "\n")
    return path

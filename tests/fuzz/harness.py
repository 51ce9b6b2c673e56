"""Loads damaged files in a process of its own, with hard limits on time and memory, and judges what comes of it."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import random
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from mixtral.errors import MixtralError
from tests.fuzz.mutate import damaged
from tests.fuzz.samples import Sample

LONGEST = 5.0  # seconds of processor time for one file
MOST_MEMORY = 1 << 30  # bytes beyond what the process has before it loads a file
LONGEST_LINE = 600  # characters of an error
_PATIENCE = 30.0  # seconds of a clock, on a machine that does other things too


class Outcome(NamedTuple):
    """What came of one damaged file."""

    number: int
    format: str
    verdict: str  # "accepted", "refused", or what is wrong
    seconds: float
    memory: int  # bytes that the process grew by at most, in real memory
    message: str


def run(samples: dict[str, Sample], seed: int, numbers: Iterable[int], work: Path) -> Iterator[Outcome]:
    """The outcome of each case. A case follows from `seed` and its number alone; a worker that dies is replaced."""
    names = list(samples)
    waiting = list(numbers)
    while waiting:
        ours, theirs = multiprocessing.Pipe()
        worker = multiprocessing.get_context("fork").Process(
            target=_work, args=(theirs, samples, seed, waiting, work), daemon=True
        )
        worker.start()
        theirs.close()
        try:
            while waiting:
                outcome = _next(ours, worker, names, waiting[0])
                waiting.pop(0)
                yield outcome
                if outcome.verdict in ("hangs", "dies"):
                    break
        finally:
            worker.kill()
            worker.join()


def case(samples: dict[str, Sample], seed: int, number: int) -> tuple[str, bytes]:
    """The format, and the damaged content, of a case."""
    name = list(samples)[number % len(samples)]
    sample = samples[name]
    return name, damaged((sample.folder / sample.file).read_bytes(), sample.kind, random.Random(f"{seed}/{number}"))


def _next(ours: Connection, worker: multiprocessing.process.BaseProcess, names: list[str], number: int) -> Outcome:
    name = names[number % len(names)]
    try:
        if not ours.poll(_PATIENCE):
            return Outcome(number, name, "hangs", _PATIENCE, 0, "")
        outcome: Outcome = ours.recv()
    except EOFError:
        worker.join()
        return Outcome(number, name, "dies", 0.0, 0, f"exit code {worker.exitcode}")
    return outcome


def _work(theirs: Connection, samples: dict[str, Sample], seed: int, numbers: list[int], work: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.disable()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _status("VmSize") + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in numbers:
        name, content = case(samples, seed, number)
        sample, folder = samples[name], work / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sample.folder, folder)
        (folder / sample.file).write_bytes(content)
        theirs.send(_judge(number, name, sample, folder))


def _judge(number: int, name: str, sample: Sample, folder: Path) -> Outcome:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = _status("VmRSS"), time.process_time()
    verdict, message = "accepted", ""
    try:
        with _quiet(folder.parent / "stderr"):
            sample.load(folder)
    except _Noise as error:
        verdict, message = "writes to standard error", str(error)
    except MixtralError as error:
        verdict, message = "refused", str(error)
        if len(message) >= LONGEST_LINE or not message.isprintable():
            verdict = "says no short line"
    except BaseException as error:  # a panic of Rust is no Exception
        where = "".join(traceback.format_tb(error.__traceback__)[-4:])
        verdict, message = f"raises {type(error).__name__}", f"{str(error)[:200]!r}\n{where}"
    seconds, memory = time.process_time() - start, _status("VmHWM") - before
    if seconds > LONGEST:
        verdict = f"takes {seconds:.1f} s"
    if memory > MOST_MEMORY:
        verdict = f"takes {memory:,} bytes"
    return Outcome(number, name, verdict, seconds, memory, message)


class _Noise(Exception):
    """What a library wrote to the process's standard error, past Python."""


@contextlib.contextmanager
def _quiet(path: Path) -> Iterator[None]:
    """Raise _Noise when the block, whether or not it fails, writes anything to file descriptor 2."""
    kept = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        if written := path.read_bytes():
            raise _Noise(repr(written[:200]))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))

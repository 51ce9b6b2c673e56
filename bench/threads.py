"""Training and decoding on one and on all threads, alone and beside busy processes, by how torch's threads wait.

Training steps are those of the recipe `tiny`; decoding is of mixtral-nano, by torch in fp32 and by the native step in
bf16, whose pool of threads waits by itself. Each setting has a process of its own, and runs in turn with the others:
beside no busy process, then beside as many as there are cores, or as --busy says. Tokens a second, and processor time
for 1,000 tokens: what waiting threads burn is in it.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from lib.common import Apart, publish
from rich.console import Console
from rich.table import Table

import mixtral
from mixtral.cores import cpu_count
from mixtral.data.loader import TrainBatch
from mixtral.kernels.allocator import keep_freed_memory
from mixtral.model import Mixtral, Ragged, initialise
from mixtral.recipes import recipe
from mixtral.runtime import set_threads
from mixtral.shipped import SHIPPED
from mixtral.train.objective import next_token
from mixtral.train.state import TrainState
from mixtral.train.step import train_step

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # what libgomp, torch's OpenMP, reads when it is loaded
WAITS: dict[str, dict[str, str]] = {  # how long an idle thread spins before it sleeps
    "libgomp's": {"GOMP_SPINCOUNT": "300000"},  # its number where nothing is set: some milliseconds
    "10,000": {"GOMP_SPINCOUNT": "10000"},  # what `import mixtral` sets
    "3,000": {"GOMP_SPINCOUNT": "3000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}


class Setting(NamedTuple):
    work: str  # of WORK
    threads: int
    wait: str  # of WAITS


class Cost(NamedTuple):
    """Of one token."""

    seconds: float
    processor_seconds: float


def cost(work: Callable[[], object], tokens: int, seconds: float) -> Cost:
    """Of some tokens' work, again and again for so long.

    A third of that goes before and is not counted: the system's scheduler prefers who has slept, for a while.
    """
    for share in (1 / 3, 1.0):
        began, processor, times = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - began < share * seconds:
            work()
            times += 1
    count = times * tokens
    return Cost((time.perf_counter() - began) / count, (time.process_time() - processor) / count)


def training(threads: int, seconds: float) -> Callable[[], Cost]:
    """Steps as `mixtral train` makes them."""
    config = recipe("tiny")
    set_threads(threads)
    keep_freed_memory()
    model = initialise(Mixtral(config.model), torch.Generator().manual_seed(0))
    train_state = TrainState.of(model, config, torch.float32)
    ids_BS = torch.randint(config.model.vocab_size, (config.rows, config.context))
    batch = TrainBatch(Ragged.of(ids_BS.tolist()), ids_BS.roll(-1, 1).flatten(), torch.zeros(ids_BS.numel()).long())

    step = partial(train_step, train_state, [batch], next_token, config, 0, stats=False)
    return lambda: cost(step, config.tokens_per_step, seconds)


def decoding(native: bool, threads: int, seconds: float) -> Callable[[], Cost]:
    """A short prompt continued, as `mixtral generate` does it."""
    set_threads(threads)
    lm = mixtral.load(SHIPPED, dtype="bf16" if native else "fp32", runner="native" if native else "torch")
    text = partial(lm.generate, list(range(300, 332)), max_tokens=32, temperature=0.0, ignore_eos=True)
    return lambda: cost(text, 32, seconds)


WORK: dict[str, Callable[[int, float], Callable[[], Cost]]] = {
    "training": training,
    "decoding, torch": partial(decoding, False),
    "decoding, native": partial(decoding, True),
}


def apart(setting: Setting, seconds: float) -> Apart:
    """A process whose OpenMP waits as the setting says: it inherits the variables, and loads torch after that."""
    variables = {name: WAITS[setting.wait].get(name) for name in VARIABLES}
    return Apart(WORK[setting.work], (setting.threads, seconds), environment=variables)


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """That many processes that compute without a pause while the block runs."""
    context = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = [context.Process(target=_spin, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _spin() -> None:
    os.setsid()  # as another user's: within a session, Linux gives more of the cores to who has more threads
    parent = os.getppid()
    while os.getppid() == parent:  # whatever ends the benchmark ends this
        sum(range(100_000))


def measure(work: str, loads: list[int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each number of neighbours and setting: medians over the rounds."""
    settings = [Setting(work, 1, "passive")]  # one thread waits for nobody
    settings += [Setting(work, n, wait) for n in sorted({2, cpu_count()}) for wait in WAITS]
    runs = {setting: apart(setting, seconds) for setting in settings}
    for run in runs.values():
        run()
    costs: dict[tuple[int, Setting], list[Cost]] = {(load, setting): [] for load in loads for setting in settings}
    for _ in range(rounds):
        for load in loads:
            with neighbours(load):
                for setting, run in runs.items():
                    costs[load, setting].append(run())
    for run in runs.values():
        run.close()
    return [
        {
            "busy": load, **setting._asdict(),
            "tokens_per_second": 1 / statistics.median(c.seconds for c in taken),
            "tokens_per_second_by_round": [1 / c.seconds for c in taken],
            "processor_seconds_per_1000": 1000 * statistics.median(c.processor_seconds for c in taken),
        }
        for (load, setting), taken in costs.items()
    ]  # fmt: skip


def card(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    for column in ("busy processes", "threads", "waiting", "tokens/s", "slowest, fastest round", "processor s"):
        table.add_column(column, justify="left" if column == "waiting" else "right")
    for i, row in enumerate(rows):
        rates = row["tokens_per_second_by_round"]
        last = i + 1 < len(rows) and rows[i + 1]["busy"] != row["busy"]
        table.add_row(
            str(row["busy"]), str(row["threads"]), row["wait"] if row["threads"] > 1 else "",
            f"{row['tokens_per_second']:,.0f}", f"{min(rates):,.0f}, {max(rates):,.0f}",
            f"{row['processor_seconds_per_1000']:.2f}", end_section=last,
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each setting (default 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a timed run (default 3)")
    parser.add_argument("--work", choices=WORK, nargs="+", default=list(WORK), help="by default all")
    parser.add_argument("--busy", type=int, nargs="+", help="numbers of busy processes (default 0 and the cores)")
    parser.add_argument("--quick", action="store_true", help="one round of a moment: does it run?")
    parser.add_argument("--json-out", action="store_true", help="write bench/results/threads_<hardware>_<date>.json")
    args = parser.parse_args()
    loads = sorted({0, cpu_count()}) if args.busy is None else args.busy
    rounds, seconds = (1, 0.01) if args.quick else (args.rounds, args.seconds)
    rows = []
    for work in args.work:
        rows += (some := measure(work, loads, rounds, seconds))
        title = f"{work}: tokens/s, and processor time for 1,000 tokens; medians of {rounds} rounds in turn"
        Console(width=110).print(card(some, title))
    publish("threads", {"rows": rows, "rounds": rounds, "seconds": seconds, "waits": WAITS}, args.json_out)


if __name__ == "__main__":
    main()

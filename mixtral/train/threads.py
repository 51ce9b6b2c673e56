"""How many threads a run computes with: measured before it begins, recorded with it, watched while it runs.

The bits of a run depend on the number: it is never changed while the run goes on.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mixtral.cores import cpu_count
from mixtral.data.loader import TrainBatch
from mixtral.model import Mixtral, Ragged, initialise
from mixtral.runtime import choose_device, choose_dtype
from mixtral.train.config import PretrainConfig
from mixtral.train.display import Display
from mixtral.train.optim.optimizer import Optimizer

Rates = dict[int, float]  # tokens a second by number of threads

BUDGET_SECONDS = 1.0  # no round of trials starts later
TRIAL_SECONDS = 0.15  # one trial gets as many tokens as take about so long, at most a part of a step
MOST_ROUNDS = 9
MOST_PARAMETERS = 64_000_000  # of the model tried; a larger one takes too long to make, and has work for all cores
ENOUGH = 0.95  # of the fastest rate: then fewer threads are preferred, which leave cores to others
WINDOW = 8  # steps over whose median a run's pace is looked at
SLOW, RECOVERED = 0.5, 0.8  # of the best pace


def choose_threads(config: PretrainConfig, display: Display) -> int:
    """The number of threads that trains fastest now, with a line on it; all cores where that is no question."""
    cores, on_cpu = cpu_count(), choose_device(config.device).type == "cpu"
    if cores == 1 or not on_cpu or _one_layer(config).model.n_params() > MOST_PARAMETERS:
        return cores
    rates = measure_training(config, counts_to_try(cores))
    threads = fewest_of_the_fastest(rates)
    display.say(f"threads: {threads}; measured now on one layer: {rates_text(rates)}")
    return threads


def counts_to_try(cores: int) -> list[int]:
    """One, some and all."""
    return sorted({1, (cores + 1) // 2, cores})


def fewest_of_the_fastest(rates: Rates) -> int:
    fastest = max(rates.values())
    return min(count for count, rate in rates.items() if rate >= ENOUGH * fastest)


def rates_text(rates: Rates) -> str:
    """Such as "1 thread 5,300 tok/s, 2 threads 9,100"."""
    parts = [f"{count} thread{'s' * (count > 1)} {rate:,.0f}" for count, rate in sorted(rates.items())]
    return ", ".join([f"{parts[0]} tok/s", *parts[1:]])


def measure_rates(
    piece: Callable[[int], int], counts: Sequence[int], clock: Callable[[], float] = time.perf_counter
) -> Rates:
    """Median rates of a piece of work, each number of threads in turn; the first round warms up and is not counted.

    `piece` works with so many threads and returns how many tokens it has worked on.
    """
    taken: dict[int, list[float]] = {count: [] for count in counts}
    ends = clock() + BUDGET_SECONDS
    for _ in range(1 + MOST_ROUNDS):
        for count, rates in taken.items():
            began = clock()
            tokens = piece(count)
            rates.append(tokens / (clock() - began))
        if clock() >= ends:
            break
    return {count: statistics.median(rates[1:] or rates) for count, rates in taken.items()}


def measure_training(config: PretrainConfig, counts: Sequence[int]) -> Rates:
    """Of forward and backward through one layer of a run's model; torch's state is then what it was."""
    before = torch.get_num_threads()
    with torch.random.fork_rng([]):
        try:
            return measure_rates(_training_piece(config, max(counts)), counts)
        finally:
            torch.set_num_threads(before)


def _one_layer(config: PretrainConfig) -> PretrainConfig:
    return config.replace(model=config.model.replace(n_layers=1), balance=())


def _training_piece(config: PretrainConfig, most_threads: int) -> Callable[[int], int]:
    config = _one_layer(config)
    model = initialise(Mixtral(config.model), torch.Generator().manual_seed(0))
    optimizer = Optimizer(model, config, choose_dtype(config.dtype, "cpu"))
    part = config.tokens_per_step // config.accumulation

    def work(tokens: int, threads: int) -> int:
        torch.set_num_threads(threads)
        batch = _batch(config, tokens)
        loss = model(batch.batch, targets=batch.targets_T, loss_weights="mean").loss
        assert loss is not None
        loss.backward()
        optimizer.collect_gradients()
        for weight in optimizer.params.values():
            weight.grad = None
        return tokens

    tokens, seconds = min(256, part), 0.0
    work(tokens, most_threads)  # the first time takes longer
    while tokens < part and seconds < TRIAL_SECONDS / 2:
        began = time.perf_counter()
        work(tokens, most_threads)
        seconds = time.perf_counter() - began
        if seconds < TRIAL_SECONDS / 2:
            tokens = min(2 * tokens, part)
    return lambda threads: work(tokens, threads)


def _batch(config: PretrainConfig, tokens: int) -> TrainBatch:
    ids_T = torch.randint(config.model.vocab_size, (tokens,), generator=torch.Generator().manual_seed(tokens))
    return TrainBatch(Ragged.of([row.tolist() for row in ids_T.split(config.context)]), ids_T, torch.zeros_like(ids_T))


class Pace:
    """Notices when a run has become far slower than it was: other processes have come, perhaps."""

    def __init__(self) -> None:
        self.best = 0.0  # median of WINDOW steps, tokens a second
        self.now = 0.0
        self.slow = False
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, rate: float) -> bool:
        """A step's tokens a second -> whether the run has just become slow."""
        self._recent.append(rate)
        if len(self._recent) < WINDOW:
            return False
        self.now = statistics.median(self._recent)
        self.best = max(self.best, self.now)
        was, self.slow = self.slow, self.now < (RECOVERED if self.slow else SLOW) * self.best
        return self.slow and not was


class ThreadWatch:
    """Notices when a run has become slow, and whether another number of threads would be faster now.

    Args:
        threads: the run's.
        measure: the rates now; None: not to be measured in this run.
    """

    def __init__(
        self, folder: Path, threads: int, measure: Callable[[], Rates] | None, say: Callable[[str], None]
    ) -> None:
        self.folder, self.threads, self.measure, self.say = folder, threads, measure, say
        self.pace = Pace()

    def step(self, rate: float) -> None:
        """A step has been made, at so many tokens a second."""
        if self.pace.add(rate):
            self.say(f"slow: {self.pace.now:,.0f} tok/s, after {self.pace.best:,.0f} before; {self._advice()}")

    def _advice(self) -> str:
        if self.measure is None:
            return "other processes may have the cores"
        rates = self.measure()
        faster, measured = fewest_of_the_fastest(rates), f"measured now on one layer: {rates_text(rates)}"
        if rates[faster] * ENOUGH <= rates[self.threads]:
            return f"{measured}; another number of threads would be no faster"
        return (
            f"{measured}; to go on with {faster}: Ctrl-C, then mixtral train --resume {self.folder} --threads {faster} "
            "(from there on the bits are no longer those of the run as it was begun)"
        )

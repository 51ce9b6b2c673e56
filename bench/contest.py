"""Engines run in turn, A B A B, each beside a ceiling of the machine measured the moment before."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from common import Apart
from engines import Engine, Task


@dataclass(frozen=True)
class Entry:
    """An engine with a model in it. `format`: of ours, or the one of ours that a peer is set against."""

    engine: Engine
    format: str
    told_format: str  # what the engine's own world calls it
    ideal: Callable[[Task], float]  # what a token needs of the ceiling: bytes, or FLOPs
    ours: bool = False

    def can(self, task: Task) -> bool:
        return getattr(self.engine, "can", lambda _: True)(task)


@dataclass
class Series:
    """All rounds of one entry at one task."""

    entry: Entry
    task: Task
    rates: list[float] = field(default_factory=list)  # tokens/s
    ceilings: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def of_ceiling(self) -> float:
        """The fraction of the ceiling, median of the rounds'."""
        need = self.entry.ideal(self.task)
        return statistics.median(rate * need / top for rate, top in zip(self.rates, self.ceilings, strict=True))


def take_turns(
    entries: Sequence[Entry], tasks: Sequence[Task], rounds: int, ceiling: Callable[[], float]
) -> list[Series]:
    """Every entry at every task it can do, one after the other, `rounds` times; before that once, to warm up."""
    series = [Series(entry, task) for task in tasks for entry in entries if entry.can(task)]
    for entry in entries:
        entry.engine(tasks[0]._replace(tokens=min(4, tasks[0].tokens)))
    for number in range(rounds):
        for one in series:
            one.ceilings.append(ceiling())
            run = one.entry.engine(one.task)
            one.rates.append(run.rate)
            one.peak = max(one.peak, run.peak)
            told = f"{one.entry.engine.title} {one.entry.told_format}, {one.task}"
            print(f"round {number + 1}, {told}: {run.rate:.1f} tokens/s", file=sys.stderr)
    return series


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of two engines' rates, the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def row(one: Series, series: Sequence[Series]) -> dict[str, Any]:
    """What is kept of a series; `series` has the one of ours that a peer is set against."""
    ours = [s for s in series if s.entry.ours and (s.entry.format, s.task) == (one.entry.format, one.task)]
    return {
        "engine": one.entry.engine.title, "format": one.entry.told_format, "settings": one.entry.engine.settings,
        **one.task._asdict(), "tokens_per_second": statistics.median(one.rates), "lowest": min(one.rates),
        "highest": max(one.rates), "of_ceiling": one.of_ceiling, "ceiling": statistics.median(one.ceilings),
        "needed_a_token": one.entry.ideal(one.task), "peak_bytes": one.peak,
        "ratio": None if one.entry.ours or not ours else ratio(ours[0].rates, one.rates),
        "rates": one.rates, "ceilings": one.ceilings,
    }  # fmt: skip


def close(entries: Sequence[Entry], ceiling: Apart) -> None:
    for entry in entries:
        entry.engine.close()
    ceiling.close()

"""Damaged files of every format, loaded as a user loads them: `python -m tests.fuzz --files 10000 --seed 0`.

Each has to load, or to be refused with one short line, within 5 seconds and 1 GiB. `--first N` goes on from case N;
a failure names the case that repeats it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.fuzz.harness import Outcome, case, run
from tests.fuzz.samples import make_samples


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", default="", help="a format")
    parser.add_argument("--keep", type=Path, help="a folder for the files that fail")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = defaultdict[str, list[Outcome]](list)
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        samples = make_samples(Path(folder))
        names = list(samples)
        numbers = range(asked.first, asked.first + asked.files)
        if asked.only:
            numbers = [n for n in numbers if names[n % len(names)] == asked.only]
        err = Console(stderr=True, markup=False, highlight=False)
        outcomes = run(samples, asked.seed, numbers, Path(folder))
        for outcome in track(outcomes, "loading", total=len(numbers), console=err, disable=not err.is_terminal):
            found[outcome.format].append(outcome)
            if outcome.verdict not in ("accepted", "refused"):
                print(f"case {outcome.number} ({outcome.format}) {outcome.verdict}: {outcome.message}", flush=True)
                if asked.keep:
                    asked.keep.mkdir(parents=True, exist_ok=True)
                    _, content = case(samples, asked.seed, outcome.number)
                    (asked.keep / f"{asked.seed}-{outcome.number}").write_bytes(content)
    _print(found)
    failed = sum(o.verdict not in ("accepted", "refused") for outcomes in found.values() for o in outcomes)
    if failed:
        print(f"{failed} failed; repeat one with --seed {asked.seed} --first CASE --files 1")
    return 1 if failed else 0


def _print(found: dict[str, list[Outcome]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("format")
    for name in ("damaged", "accepted", "refused", "failed", "longest", "memory"):
        table.add_column(name, justify="right")
    for name, outcomes in found.items():
        counts = [sum(o.verdict == verdict for o in outcomes) for verdict in ("accepted", "refused")]
        row = [len(outcomes), *counts, len(outcomes) - sum(counts)]
        longest, memory = max(o.seconds for o in outcomes), max(o.memory for o in outcomes)
        table.add_row(name, *map(str, row), f"{longest:.2f} s", f"{memory / 2**20:.0f} MiB")
    Console(width=100, highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())

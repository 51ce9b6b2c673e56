"""The study of balancing and routing: every run, its measurements, tables and plots, by one command.

    python studies/balancing/run.py [--out runs/balancing] [--budget-minutes 80] [--only objectives dense k failure]
    python studies/balancing/run.py --quick        a few steps of each, to see that everything works

Runs are single-threaded, as many side by side as there are cores: models this small gain little from a second thread.
What is finished is not done again, and what was interrupted goes on. No run is started that would not end within the
budget, by the pace of those that are done; the report then covers what there is. docs/studies/balancing.md has the
questions and the method.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes

from corpus import DOMAINS, build
from measure import prepare_held_out
from pace import measure_pace
from perform import finished, perform
from plan import GROUPS, Run, planned
from report import report

from mixtral.cores import cpu_count
from mixtral.data.readers import BadInput
from mixtral.data.sources import Source, documents
from mixtral.errors import MixtralError
from mixtral.files import atomic_folder
from mixtral.presets import tiny
from mixtral.tokenizer import Tokenizer, load_tokenizer, train_bpe


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    steps: int  # of 1,024 tokens
    domain_bytes: int
    held_out_bytes: int  # a domain
    tokens: int  # a domain and checkpoint that is measured


FULL = Scale(500, 1_200_000, 60_000, 4096)
QUICK = Scale(4, 60_000, 12_000, 512)


@dataclass
class Pace:
    """How long runs take, learnt from those that are done."""

    deadline: float  # on time.monotonic's clock
    seconds: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    def add(self, run: Run, seconds: float) -> None:
        self.seconds.append(seconds)
        self.costs.append(run.cost)

    def allows(self, run: Run) -> bool:
        """Whether the run would end in time; unknown before the first one is done, and then yes."""
        expected = run.cost * sum(self.seconds) / sum(self.costs) if self.costs else 0
        return time.monotonic() + expected < self.deadline


def prepare_corpus(out: Path, scale: Scale) -> Path:
    """The corpus and a tokenizer in `out`, both made once -> the corpus."""
    corpus, folder = out / "corpus", out / "tokenizer"
    build(corpus, scale.domain_bytes, scale.held_out_bytes)
    if not folder.exists():
        with atomic_folder(folder) as new:
            _learn(corpus).save(new)
    prepare_held_out(corpus, load_tokenizer(folder))
    return corpus


def _learn(corpus: Path) -> Tokenizer:
    sources = [Source(str(corpus / "train" / f"{domain}.jsonl")) for domain in DOMAINS]
    texts = [document.text for source in sources for document in documents(source, BadInput())]
    return train_bpe(texts, tiny().vocab_size)


def perform_all(runs: list[Run], out: Path, corpus: Path, scale: Scale, jobs: int, budget: float) -> None:
    """Perform what is not done yet, `jobs` runs at a time, while the budget (seconds) allows it."""
    waiting = [run for run in runs if finished(out / "runs" / run.name, run) is None]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done", flush=True)
    pace = Pace(time.monotonic() + budget)
    context = multiprocessing.get_context("spawn")  # a fork of a process whose libraries have threads can hang
    with ProcessPoolExecutor(jobs, context) as pool:
        going: dict[Future[dict[str, Any]], tuple[Run, float]] = {}
        while waiting or going:
            while waiting and len(going) < jobs:
                run = waiting.pop(0)
                if pace.allows(run):
                    future = pool.submit(perform, run, out / "runs" / run.name, corpus, scale.tokens)
                    going[future] = run, time.monotonic()
                else:
                    print(f"{run.name}: left out, the budget is spent", flush=True)
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                run, started = going.pop(future)
                pace.add(run, time.monotonic() - started)
                final = future.result()["final"]
                print(f"{run.name}: {time.monotonic() - started:.0f} s, loss {final['loss']:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of everything (runs/balancing; with --quick, -quick after it)")
    parser.add_argument("--budget-minutes", type=float, default=80, help="of all runs together")
    parser.add_argument("--only", nargs="+", type=str.lower, choices=GROUPS, default=list(GROUPS), help="questions")
    parser.add_argument("--jobs", type=int, default=cpu_count(), help="runs side by side (the number of cores)")
    parser.add_argument("--quick", action="store_true", help="a few steps of each run")
    options = parser.parse_args()
    try:
        print(study(options))
    except MixtralError as error:
        raise SystemExit(str(error)) from None


def study(options: argparse.Namespace) -> Path:
    """All of it -> the folder of the report."""
    scale = QUICK if options.quick else FULL
    out = (options.out or Path("runs/balancing-quick" if options.quick else "runs/balancing")).resolve()
    corpus = prepare_corpus(out, scale)
    runs = planned(corpus, out / "tokenizer", scale.steps, tuple(options.only))
    perform_all(runs, out, corpus, scale, options.jobs, 60 * options.budget_minutes)
    if "dense" in options.only:
        measure_pace(out, [run for run in runs if "dense" in run.kind.groups])
    return report(out)


if __name__ == "__main__":
    main()

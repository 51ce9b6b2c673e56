"""Engines run in turn, A B A B, each beside a ceiling of the machine measured the moment before."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lib import transformers_engine
from lib.common import Apart
from lib.engines import Engine, LlamaCpp, Task, find_llama_cpp, ours, vllm
from lib.model_files import FORMATS, GGUF_TYPES, ModelFiles, gguf_step_bytes, our_step_bytes, plain_step_bytes


@dataclass(frozen=True)
class Entry:
    """An engine with a model in it.

    `format` is of ours, or the one of ours that a peer is set against; `many` says whether it is asked to serve several
    requests at once.
    """

    engine: Engine
    format: str
    format_title: str  # what the engine's own world calls it
    ideal: Callable[[Task], float]  # what a token needs of the ceiling: bytes, or FLOPs
    ours: bool = False
    many: bool = False


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
    """Every entry at every task it can do, one after the other, `rounds` times; first once to warm up."""
    series = [Series(entry, task) for task in tasks for entry in entries if entry.many or task.batch == 1]
    for number in range(rounds + 1):
        for one in series:
            top, run = ceiling(), one.entry.engine(one.task)
            text = f"{one.entry.engine.title} {one.entry.format_title}, {one.task}"
            print(f"round {number or 'to warm up'}, {text}: {run.rate:.1f} tokens/s", file=sys.stderr)
            if number:
                one.ceilings.append(top)
                one.rates.append(run.rate)
            one.peak = max(one.peak, run.peak)
    return series


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of two engines' rates, the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def row(one: Series, series: Sequence[Series]) -> dict[str, Any]:
    """What is kept of a series; `series` has the one of ours that a peer is set against."""
    ours = [s for s in series if s.entry.ours and (s.entry.format, s.task) == (one.entry.format, one.task)]
    return {
        "engine": one.entry.engine.title, "format": one.entry.format_title, "settings": one.entry.engine.settings,
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


# -- who takes part ----------------------------------------------------------------------------------------------------

Ideal = Callable[[float, int, Task], float]  # (bytes of a step's weights, bits of the cache, task) -> need of a token


def entries(
    args: argparse.Namespace, files: ModelFiles, ideal: Ideal, trial: Task
) -> tuple[list[Entry], dict[str, float]]:
    """Every engine that is there; transformers' settings, and their tokens/s at the trial."""
    config, threads = files.config, args.threads
    found, tried = [], {}
    for format in args.formats:
        need = partial(ideal, our_step_bytes(config, format), 16)
        found.append(Entry(ours(files.ours(format), threads), format, format, need, ours=True, many=True))
    if (llama := find_llama_cpp(args.llama_cpp)) is not None:
        for format in args.formats:
            file = files.gguf(format)
            need = partial(ideal, gguf_step_bytes(file, config), 16)
            engine = LlamaCpp(llama, file, threads)
            found.append(Entry(engine, format, GGUF_TYPES[format], need, many=engine.batched.exists()))
    if "bf16" in args.formats and not args.no_transformers:
        setting, tried = transformers_engine.best(files.ours("bf16"), threads, trial, args.setting)
        size = transformers_engine.DTYPES[setting.dtype].itemsize
        need = partial(ideal, plain_step_bytes(config, size), 8 * size)
        peer = transformers_engine.engine(files.ours("bf16"), threads, setting)
        found.append(Entry(peer, "bf16", setting.dtype, need))
    if "bf16" in args.formats and importlib.util.find_spec("vllm"):
        need = partial(ideal, plain_step_bytes(config, 2), 16)
        found.append(Entry(vllm(files.ours("bf16"), threads), "bf16", "bf16", need, many=True))
    return found, tried


def head(args: argparse.Namespace, files: ModelFiles, tried: dict[str, float]) -> dict[str, Any]:
    """What every result begins with."""
    return {
        "config": files.config.to_dict(), "rounds": args.rounds, "threads": args.threads,
        "transformers": version("transformers"), "settings_tried": tried, "missing": missing(args),
    }  # fmt: skip


def remarks(result: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    settings = dict.fromkeys(f"{r['engine']}: {r['settings']}" for r in result["rows"])
    missing = [f"{name}: not installed" for name in result["missing"]]
    return [*settings, *missing]


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of decode.py and prefill.py alike."""
    home = Path(tempfile.gettempdir()) / "mixtral-bench"
    parser.add_argument("--preset", default="default", help="the model's shape: default, or a preset such as tiny")
    parser.add_argument("--folder", type=Path, default=home, help=f"where the model's files are kept (default {home})")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each engine (default 5)")
    parser.add_argument("--threads", type=int, help="of every engine; by default all cores that are ours")
    parser.add_argument("--llama-cpp", metavar="DIR", help="folder of llama-bench, if it is not on the path")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--setting", metavar="TITLE", help="transformers' setting, instead of a trial of all")
    parser.add_argument("--json-out", action="store_true", help="write bench/results/<...>.json and .png")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the plot here as well")
    formats = parser.add_argument("--formats", type=names_of(FORMATS), default=list(FORMATS), metavar="NAMES")
    formats.help = "of bf16,int8,int4 (default: all)"


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: names between commas."""

    def names(text: str) -> list[str]:
        if unknown := set(found := text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        return found

    return names


def missing(args: argparse.Namespace) -> list[str]:
    """Peers that are not here."""
    found = {"llama.cpp": find_llama_cpp(args.llama_cpp), "vLLM": importlib.util.find_spec("vllm")}
    return [name for name, here in found.items() if here is None]

"""Decoding: tokens/s against the speed of memory, and against llama.cpp, transformers and vLLM.

One random Mixtral, 1.15 B parameters of which a token reads 329 M, in each format. All engines run in turn (A B A B),
each in a process of its own, and before every run the read kernel (native.measure_read) says how fast memory is in that
moment. A step reads the active weights once and the cache: its fraction of the bandwidth is tokens/s times these bytes
over what the read kernel reached. Ratios are medians of the rounds' ratios.

With --context over 128 each engine also runs at 128, and the slowdown stands beside the one that the added bytes of the
cache explain. With --batches several requests run at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import transformers
import transformers_engine
from common import Apart, publish
from contest import Entry, Series, close, row, take_turns
from decode_plot import plot
from engines import LlamaCpp, Task, find_llama_cpp, ours, vllm
from model_files import (
    FORMATS,
    GGUF_TYPES,
    ModelFiles,
    find_config,
    gguf_step_bytes,
    our_step_bytes,
    plain_step_bytes,
)
from quality import distances
from rich.console import Console
from rich.table import Table

from mixtral.config import ModelConfig
from mixtral.kernels.native import measure_read
from mixtral.runtime import set_threads

SHORT = 128  # the context that longer ones are compared with
COLUMNS = (
    "engine", "format", "context", "requests", "tokens/s", "spread", "GB/s", "of bandwidth", "ours / it", "memory",
)  # fmt: skip
TRIAL = Task(context=16, tokens=8)  # of transformers' settings


def reader(threads: int) -> Callable[[], float]:
    """The ceiling, in a process of its own, so that this one stays small."""
    set_threads(threads)
    return measure_read


def needed(weights: float, config: ModelConfig, cache_bits: int, task: Task) -> float:
    """Bytes that a step for one token reads: weights, and the cache at the mean length it has while tokens are made.

    Of several requests at once it is the bytes of one; they share weights, as routing has it.
    """
    return weights + config.kv_bytes(task.context + (task.tokens + 1) // 2, cache_bits)


def entries(args: argparse.Namespace, files: ModelFiles, tried: dict[str, float]) -> list[Entry]:
    """Every engine that is there; `tried` gets transformers' settings and their tokens/s."""
    config, threads = files.config, args.threads
    found = []
    for format in args.formats:
        need = partial(needed, our_step_bytes(config, format), config, 16)
        found.append(Entry(ours(files.ours(format), threads), format, format, need, ours=True))
    if (llama := find_llama_cpp(args.llama_cpp)) is not None:
        for format in args.formats:
            file = files.gguf(format)
            need = partial(needed, gguf_step_bytes(file, config), config, 16)
            found.append(Entry(LlamaCpp(llama, file, threads), format, GGUF_TYPES[format], need))
    if "bf16" in args.formats and not args.no_transformers:
        every = [*transformers_engine.PLAIN, *transformers_engine.COMPILED]
        setting, rates = transformers_engine.best(files.ours("bf16"), threads, TRIAL, every)
        tried |= rates
        size = transformers_engine.DTYPES[setting.dtype].itemsize
        need = partial(needed, plain_step_bytes(config, size), config, 8 * size)
        engine = transformers_engine.engine(files.ours("bf16"), threads, setting)
        found.append(Entry(engine, "bf16", setting.dtype, need))
    if "bf16" in args.formats and importlib.util.find_spec("vllm"):
        need = partial(needed, plain_step_bytes(config, 2), config, 16)
        found.append(Entry(vllm(files.ours("bf16"), threads), "bf16", "bf16", need))
    return found


def slowdowns(series: Sequence[Series], context: int) -> list[dict[str, Any]]:
    """Of each entry at `context` against SHORT: seconds a token over seconds a token, and bytes over bytes."""
    found = []
    for one in (s for s in series if s.task.context == context):
        short = next(s for s in series if s.entry is one.entry and s.task == one.task._replace(context=SHORT))
        rates = sorted(a / b for a, b in zip(short.rates, one.rates, strict=True))
        found.append({
            "engine": one.entry.engine.title, "format": one.entry.told_format, "slowdown": rates[len(rates) // 2],
            "explained": one.entry.ideal(one.task) / one.entry.ideal(short.task),
            "cache_bytes": one.entry.ideal(one.task) - one.entry.ideal(one.task._replace(context=0, tokens=0)),
        })  # fmt: skip
    return found


# -- the card ----------------------------------------------------------------------------------------------------------


def card(result: dict[str, Any]) -> None:
    out = Console(width=130)
    runs = f"{result['threads']} threads, medians of {result['rounds']} rounds in turn"
    table = Table(title=f"decoding {result['tokens']} tokens, {runs}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("engine", "format") else "right")
    for r in result["rows"]:
        one = r["batch"] == 1
        table.add_row(
            r["engine"], r["format"], f"{r['context']:,}", str(r["batch"]), f"{r['tokens_per_second']:.1f}",
            f"{r['lowest']:.1f} to {r['highest']:.1f}",
            f"{r['tokens_per_second'] * r['needed_a_token'] / 1e9:.1f}" if one else "",
            f"{r['of_ceiling']:.0%}" if one else "", f"{r['ratio']:.2f}" if r["ratio"] else "",
            f"{r['peak_bytes'] / 2**30:.2f} GiB" if r["peak_bytes"] else "?",
        )  # fmt: skip
    out.print(table)
    for line in remarks(result):
        out.print(line, highlight=False)
    for r in result["slowdowns"]:
        told = f"context {result['context']:,} against {SHORT}, {r['engine']} {r['format']}: {r['slowdown']:.2f} times"
        explained = f"the cache's {r['cache_bytes'] / 1e6:.1f} MB a token explain {r['explained']:.2f}"
        out.print(f"{told} the time a token; {explained}", highlight=False)
    for r in result["quality"]:
        out.print(f"{r['what']}: KL {r['kl']:.2e} nats, same choice {r['agreement']:.1%}", highlight=False)


def remarks(result: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    settings = dict.fromkeys(f"{r['engine']}: {r['settings']}" for r in result["rows"])
    missing = [f"{name}: not installed" for name in result["missing"]]
    tops = [top / 1e9 for r in result["rows"] for top in r["ceilings"]]
    read = f"memory by the read kernel, before each run: {min(tops):.1f} to {max(tops):.1f} GB/s"
    return [read, *settings, *missing]


# -- the command -------------------------------------------------------------------------------------------------------


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of decode.py and prefill.py alike."""
    home = Path(tempfile.gettempdir()) / "mixtral-bench"
    parser.add_argument("--preset", default="default", help="the model's shape: default, or a preset such as tiny")
    parser.add_argument("--folder", type=Path, default=home, help=f"where the model's files are kept (default {home})")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each engine (default 5)")
    parser.add_argument("--threads", type=int, help="of every engine; by default all cores that are ours")
    parser.add_argument("--llama-cpp", metavar="DIR", help="folder of llama-bench, if it is not on the path")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--context", type=int, default=SHORT, help=f"tokens of the prompt (default {SHORT})")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are timed (default 64)")
    parser.add_argument("--batches", default="1", help="requests at once, such as 1,8,32 (default 1)")
    parser.add_argument("--quality-tokens", type=int, default=512, help="random tokens for KL; 0: leave it out")
    parser.add_argument("--json-out", action="store_true", help="write bench/results/decode_<...>.json and .png")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the plot here as well")
    args = parser.parse_args()
    args.threads = set_threads(args.threads)
    files = ModelFiles(args.folder, args.preset, find_config(args.preset))
    tried: dict[str, float] = {}
    found, batches = entries(args, files, tried), [int(n) for n in args.batches.split(",")]
    tasks = [Task(context, args.tokens) for context in dict.fromkeys((min(SHORT, args.context), args.context))]
    tasks += [Task(args.context, args.tokens, batch) for batch in batches if batch > 1]
    ceiling = Apart(reader, (args.threads,))
    series = take_turns(found, tasks, args.rounds, ceiling)
    close(found, ceiling)
    result = {
        "config": files.config.to_dict(), "context": args.context, "tokens": args.tokens, "rounds": args.rounds,
        "threads": args.threads, "transformers": transformers.__version__, "settings_tried": tried,
        "missing": missing(args), "rows": [row(one, series) for one in series],
        "slowdowns": slowdowns(series, args.context) if args.context > SHORT else [],
        "quality": quality(args, files) if args.quality_tokens else [],
    }  # fmt: skip
    card(result)
    topic = "decode" + (f"-context-{args.context}" if args.context != SHORT else "")
    topic += "-batches" if max(batches) > 1 else ""
    path = publish(topic, result, args.json_out)
    for file in filter(None, (path and path.with_suffix(".png"), args.plot)):
        plot(result, file)


def quality(args: argparse.Namespace, files: ModelFiles) -> list[dict[str, Any]]:
    """distances of all formats, in a process of its own: it holds fp32 weights."""
    ggufs = {}
    if find_llama_cpp(args.llama_cpp) is not None:
        ggufs = {GGUF_TYPES[f]: files.gguf(f) for f in args.formats if f != "bf16"}
    own = {format: files.ours(format) for format in args.formats}
    measure = Apart(_quality, (files.ours("bf16"), own, ggufs, args.quality_tokens, args.threads))
    rows: list[dict[str, Any]] = measure()
    measure.close()
    return rows


def _quality(*args: Any) -> Callable[[], list[dict[str, Any]]]:
    return partial(distances, *args)


if __name__ == "__main__":
    main()

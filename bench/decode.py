"""Decoding: tokens/s against the speed of memory, and against llama.cpp, transformers and vLLM.

One random Mixtral, 1.15 B parameters of which a token reads 329 M, in each format. All engines run in turn (A B A B),
each in a process of its own, and before every run the read kernel (native.measure_read) says how fast memory is in that
moment. A step reads the active weights once and the cache: its fraction of the bandwidth is tokens/s times these bytes
over what the read kernel reached. Ratios are medians of the rounds' ratios.

With --context over 128 each engine also runs at 128, and the slowdown stands beside the one that the added bytes of the
cache explain. With --batches several requests run at once, where the engine is made for it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lib.bars import plot
from lib.common import Apart, publish
from lib.contest import Series, add_common, close, entries, head, remarks, row, take_turns
from lib.engines import Task, find_llama_cpp
from lib.model_files import GGUF_TYPES, ModelFiles, find_config
from lib.quality import distances
from rich.console import Console
from rich.table import Table

from mixtral.config import ModelConfig
from mixtral.kernels.native.library import measure_read
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


def needed(config: ModelConfig, weights: float, cache_bits: int, task: Task) -> float:
    """Bytes that a step for one token reads: weights, and the cache at the mean length it has while tokens are made.

    Of several requests at once it is the bytes of one; they share weights, as routing has it.
    """
    return weights + config.kv_bytes(task.context + (task.tokens + 1) // 2, cache_bits)


def slowdowns(series: Sequence[Series], context: int) -> list[dict[str, Any]]:
    """Of each entry at `context` against SHORT: seconds a token over seconds a token, and bytes over bytes."""
    found = []
    for one in (s for s in series if s.task.context == context and s.task.batch == 1):
        short = next(s for s in series if s.entry is one.entry and s.task == one.task._replace(context=SHORT))
        slower = statistics.median(a / b for a, b in zip(short.rates, one.rates, strict=True))
        found.append({
            "engine": one.entry.engine.title, "format": one.entry.format_title, "slowdown": slower,
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
    tops = [top / 1e9 for r in result["rows"] for top in r["ceilings"]]
    out.print(f"memory by the read kernel, before each run: {min(tops):.1f} to {max(tops):.1f} GB/s", highlight=False)
    for line in remarks(result):
        out.print(line, highlight=False)
    for r in result["slowdowns"]:
        text = f"context {result['context']:,} against {SHORT}, {r['engine']} {r['format']}: {r['slowdown']:.2f} times"
        explained = f"the cache's {r['cache_bytes'] / 1e6:.1f} MB a token explain {r['explained']:.2f}"
        out.print(f"{text} the time a token; {explained}", highlight=False)
    for r in result["quality"]:
        out.print(f"{r['what']}: KL {r['kl']:.2e} nats, same choice {r['agreement']:.1%}", highlight=False)


# -- the command -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--context", type=int, default=SHORT, help=f"tokens of the prompt (default {SHORT})")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are timed (default 64)")
    parser.add_argument("--batches", default="1", help="requests at once, such as 1,8,32 (default 1)")
    parser.add_argument("--quality-tokens", type=int, default=512, help="random tokens for KL; 0: leave it out")
    args = parser.parse_args()
    args.threads = set_threads(args.threads)
    files = ModelFiles(args.folder, args.preset, find_config(args.preset))
    batches = [int(n) for n in args.batches.split(",")]
    found, tried = entries(args, files, partial(needed, files.config), TRIAL)
    tasks = [Task(context, args.tokens) for context in dict.fromkeys((min(SHORT, args.context), args.context))]
    tasks += [Task(args.context, args.tokens, batch) for batch in batches if batch > 1]
    ceiling = Apart(reader, (args.threads,))
    series = take_turns(found, tasks, args.rounds, ceiling)
    close(found, ceiling)
    result = {
        **head(args, files, tried), "context": args.context, "tokens": args.tokens,
        "rows": [row(one, series) for one in series],
        "slowdowns": slowdowns(series, args.context) if args.context > SHORT else [],
        "quality": quality(args, files) if args.quality_tokens else [],
    }  # fmt: skip
    card(result)
    topic = "decode" + (f"-context-{args.context}" if args.context != SHORT else "")
    topic += "-batches" if max(batches) > 1 else ""
    path = publish(topic, result, args.json_out)
    for file in filter(None, (path and path.with_suffix(".png"), args.plot)):
        plot(result, file, "the black line is where the speed of memory ends")


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

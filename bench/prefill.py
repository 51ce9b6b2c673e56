"""Prefill: tokens/s as a share of peak matmul throughput, and against llama.cpp, transformers and vLLM.

The model, the engines and their turns are those of bench/decode.py. Before every run the rate of matrix products is
measured: for bf16 the better of bf16 and fp32, as some processors only emulate bf16. The work of a prompt is every
matrix product of every token, the output's of the last token alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lib.bars import plot
from lib.common import Apart, peak_matmul, publish
from lib.contest import add_common, close, entries, head, remarks, row, take_turns
from lib.engines import Task
from lib.model_files import ModelFiles, find_config
from rich.console import Console
from rich.table import Table

from mixtral.config import ModelConfig
from mixtral.runtime import set_threads

TRIAL = Task(context=128, tokens=0)  # of transformers' settings
COLUMNS = ("engine", "format", "tokens/s", "spread", "GFLOP/s", "of peak matmul", "ours / it", "memory")


def rate(threads: int) -> Callable[[], float]:
    """The ceiling, in a process of its own."""
    set_threads(threads)
    return partial(peak_matmul, torch.bfloat16)


def flops(config: ModelConfig, weights: float, cache_bits: int, task: Task) -> float:
    """FLOPs a token of the prompt, on average: logits are wanted after the last one alone."""
    del weights, cache_bits
    output = 2 * config.vocab_size * config.dim
    return config.flops_per_token(task.context) - output * (task.context - 1) / task.context


def card(result: dict[str, Any]) -> None:
    out = Console(width=130)
    runs = f"{result['threads']} threads, medians of {result['rounds']} rounds in turn"
    table = Table(title=f"reading a prompt of {result['context']} tokens, {runs}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("engine", "format") else "right")
    for r in result["rows"]:
        table.add_row(
            r["engine"], r["format"], f"{r['tokens_per_second']:.1f}", f"{r['lowest']:.1f} to {r['highest']:.1f}",
            f"{r['tokens_per_second'] * r['needed_a_token'] / 1e9:.1f}", f"{r['of_ceiling']:.0%}",
            f"{r['ratio']:.2f}" if r["ratio"] else "",
            f"{r['peak_bytes'] / 2**30:.2f} GiB" if r["peak_bytes"] else "?",
        )  # fmt: skip
    out.print(table)
    tops = [top / 1e9 for r in result["rows"] for top in r["ceilings"]]
    out.print(f"peak matmul throughput, before each run: {min(tops):.1f} to {max(tops):.1f} GFLOP/s", highlight=False)
    for line in remarks(result):
        out.print(line, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompt (default 512)")
    args = parser.parse_args()
    args.threads = set_threads(args.threads)
    files = ModelFiles(args.folder, args.preset, find_config(args.preset))
    found, tried = entries(args, files, partial(flops, files.config), TRIAL)
    ceiling = Apart(rate, (args.threads,))
    series = take_turns(found, [Task(args.context, 0)], args.rounds, ceiling)
    close(found, ceiling)
    rows = [row(one, series) for one in series]
    result = {**head(args, files, tried), "context": args.context, "rows": rows}
    card(result)
    path = publish("prefill", result, args.json_out)
    for file in filter(None, (path and path.with_suffix(".png"), args.plot)):
        plot(result, file, "the black line is where the peak matmul throughput ends")


if __name__ == "__main__":
    main()

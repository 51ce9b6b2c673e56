"""A full training step against transformers with the same weights: forward, router losses, backward, clipping, AdamW.

Width 512, ffn 1792, 8 layers, 8 experts top-2, vocabulary 8,192, a batch of 8 x 512, in fp32 and bf16. transformers
runs in each of its settings once and is then measured, in its fastest, in turn with ours, each side in a process of its
own. Both keep fp32 weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from lib.common import PEERS, Apart, interleave, peak_matmul, publish, seconds
from lib.peer import EXPERTS, peer
from model import DTYPES, make_ours, pack
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mixtral.cores import cpu_count
from mixtral.data.loader import TrainBatch
from mixtral.kernels.allocator import keep_freed_memory
from mixtral.presets import small
from mixtral.runtime import set_threads
from mixtral.train.config import PretrainConfig
from mixtral.train.objective import next_token
from mixtral.train.state import TrainState
from mixtral.train.step import train_step

LENGTH = 512
SLOW_SECONDS = 60  # a peer's step longer than this is timed once, without a warm-up
COEFFICIENT = 0.01  # of the load-balancing loss, on both sides


def sequences(config: PretrainConfig, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.model.vocab_size, (rows, LENGTH), generator=generator)


def our_step(config: PretrainConfig, dtype: str) -> Callable[[], None]:
    """Our step as `mixtral train` sets up its process."""
    set_threads()
    keep_freed_memory()
    model = make_ours(config.model, "fp32")
    train_state = TrainState.of(model, config, DTYPES[dtype])
    batch = TrainBatch(*pack(sequences(config, config.rows)))


    def step() -> None:
        train_step(train_state, [batch], next_token, config, 0, stats=False)

    return step


def their_step(config: PretrainConfig, experts: str, dtype: str, rows: int) -> Callable[[], object]:
    """transformers' step as its users write it, on as many threads; bf16 by autocast."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(cpu_count())
    model: nn.Module = peer(make_ours(config.model, "fp32"), torch.float32, experts)
    model.router_aux_loss_coef = COEFFICIENT / config.model.experts_per_token  # type: ignore[assignment]  # K at balance
    adamw = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=config.betas, fused=True)
    ids_BS = sequences(config, rows)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False, output_router_logits=True).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        adamw.step()
        adamw.zero_grad()

    return step


def trials(config: PretrainConfig, dtype: str) -> dict[str, float]:
    """Seconds of one step on a quarter of the rows in each of transformers' settings."""
    tried: dict[str, float] = {}
    for experts in EXPERTS:
        step = Apart(their_step, (config, experts, dtype, max(1, config.rows // 4)), environment=PEERS)
        if dtype == "fp32":
            step()  # bf16 steps are too long, where they are emulated, for a warm-up to matter
        tried[experts] = seconds(step)
        step.close()
        print(f"trial, {dtype}: {experts} {tried[experts]:.2f} s", file=sys.stderr)
    return tried


def contest(config: PretrainConfig, dtype: str, repeats: int) -> dict[str, Any]:
    """Tokens/s of both sides in one dtype."""
    tried = trials(config, dtype)
    fastest = min(tried, key=lambda name: tried[name])
    slow = 4 * tried[fastest] > SLOW_SECONDS
    ours = Apart(our_step, (config, dtype))
    theirs = Apart(their_step, (config, fastest, dtype, config.rows), environment=PEERS)
    rate = peak_matmul(DTYPES[dtype])
    medians = interleave({"ours": ours, "theirs": theirs}, 1 if slow else repeats, warm_up=0 if slow else 1)
    rate = max(rate, peak_matmul(DTYPES[dtype]))
    for side in (ours, theirs):
        side.close()
    tokens = config.tokens_per_step
    flops = config.model.flops_per_token(LENGTH, backward=True) * tokens
    return {
        "dtype": dtype, "setting": fastest, "settings_tried": tried, "runs": 1 if slow else repeats,
        "ours": tokens / medians["ours"], "theirs": tokens / medians["theirs"],
        "ratio": medians["theirs"] / medians["ours"], "of_peak_matmul": flops / medians["ours"] / rate,
        "theirs_of_peak_matmul": flops / medians["theirs"] / rate, "peak_matmul": rate,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default 3)")
    parser.add_argument("--rows", type=int, default=8, help="sequences of 512 in a step (default 8)")
    parser.add_argument("--quick", action="store_true", help="two layers and one repeat: does it run?")
    parser.add_argument("--json-out", action="store_true", help="write bench/results/train_<hardware>_<date>.json")
    args = parser.parse_args()
    set_threads()
    shape = small().replace(n_layers=2) if args.quick else small()
    balance = (f"micro_batch?weight={COEFFICIENT}",)
    config = PretrainConfig(model=shape, rows=args.rows, context=LENGTH, lr=1e-5, warmup=0.0, balance=balance)
    rows = [contest(config, dtype, 1 if args.quick else args.repeats) for dtype in DTYPES]
    title = f"training step, {args.rows} x {LENGTH}, against transformers {transformers.__version__}: tokens/s"
    table = Table(title=title)
    for column in ("dtype", "mixtral", "transformers", "ratio", "of peak matmul", "its best setting"):
        table.add_column(column)
    for row in rows:
        share = f"{row['of_peak_matmul']:.0%} ({row['theirs_of_peak_matmul']:.0%})"
        speeds = (f"{row['ours']:,.0f}", f"{row['theirs']:,.0f}", f"{row['ratio']:.2f}", share)
        table.add_row(row["dtype"], *speeds, row["setting"])
    Console(width=110).print(table)
    result = {"config": config.to_dict(), "rows": rows, "transformers": transformers.__version__}
    publish("train", result, args.json_out)


if __name__ == "__main__":
    main()

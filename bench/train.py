"""A full training step against transformers with the same weights: forward, router losses, backward, clipping, AdamW.

Width 512, ffn 1792, 8 layers, 8 experts top-2, vocabulary 8,192, a batch of 8 x 512, in fp32 and bf16. transformers
runs in each of its settings once and is then measured, in its fastest, in turn with ours. Both keep fp32 weights.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from common import interleave, matrix_rate, publish, seconds
from model import DTYPES, make_ours, pack
from peer import EXPERTS, peer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mixtral.data.loader import TrainBatch
from mixtral.presets import small
from mixtral.runtime import set_threads
from mixtral.train.config import TrainConfig
from mixtral.train.optim import Optimizer
from mixtral.train.step import train_step

LENGTH = 512
COEFFICIENT = 0.01  # of the load-balancing loss, on both sides


def our_step(config: TrainConfig, dtype: str, ids_BS: Tensor) -> Callable[[], object]:
    model = make_ours(config.model, "fp32")
    optimizer = Optimizer(model, config, DTYPES[dtype])
    batch = TrainBatch(*pack(ids_BS))
    return lambda: train_step(model, optimizer, [batch], config, 0, stats=False)


def their_step(config: TrainConfig, experts: str, autocast: bool, ids_BS: Tensor) -> Callable[[], object]:
    model: nn.Module = peer(make_ours(config.model, "fp32"), torch.float32, experts)
    settings: Any = model.config
    settings.router_aux_loss_coef = COEFFICIENT
    adamw = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=config.betas, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False, output_router_logits=True).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        adamw.step()
        adamw.zero_grad()

    return step


def contest(config: TrainConfig, dtype: str, ids_BS: Tensor, repeats: int) -> dict[str, Any]:
    """Tokens/s of both sides in one dtype."""
    tried: dict[str, float] = {}
    for experts in EXPERTS:
        step = their_step(config, experts, dtype == "bf16", ids_BS[:2])
        step()
        tried[experts] = seconds(step)
        print(f"trial, {dtype}: {experts} {tried[experts]:.2f} s", file=sys.stderr)
        del step
        gc.collect()
    fastest = min(tried, key=lambda name: tried[name])
    theirs = their_step(config, fastest, dtype == "bf16", ids_BS)
    medians = interleave({"ours": our_step(config, dtype, ids_BS), "theirs": theirs}, repeats)
    tokens = ids_BS.numel()
    flops = config.model.flops_per_token(LENGTH, backward=True) * tokens
    rate = matrix_rate(DTYPES[dtype])
    return {
        "dtype": dtype, "setting": fastest, "settings_tried": tried,
        "ours": tokens / medians["ours"], "theirs": tokens / medians["theirs"],
        "ratio": medians["theirs"] / medians["ours"], "of_matrix_rate": flops / medians["ours"] / rate,
        "theirs_of_matrix_rate": flops / medians["theirs"] / rate,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default 3)")
    parser.add_argument("--rows", type=int, default=8, help="sequences of 512 in a step (default 8)")
    parser.add_argument("--quick", action="store_true", help="two layers and one repeat: does it run?")
    parser.add_argument("--json-out", action="store_true", help="write bench/results/train_<hardware>_<date>.json")
    args = parser.parse_args()
    set_threads()
    transformers.logging.set_verbosity_error()
    shape = small().replace(n_layers=2) if args.quick else small()
    balance = (f"micro_batch?weight={COEFFICIENT}",)
    config = TrainConfig(model=shape, rows=args.rows, context=LENGTH, lr=1e-5, warmup=0.0, balance=balance)
    ids_BS = torch.randint(shape.vocab_size, (args.rows, LENGTH), generator=torch.Generator().manual_seed(1))
    rows = [contest(config, dtype, ids_BS, 1 if args.quick else args.repeats) for dtype in DTYPES]
    title = f"training step, {args.rows} x {LENGTH}, against transformers {transformers.__version__}: tokens/s"
    table = Table(title=title)
    for column in ("dtype", "mixtral", "transformers", "ratio", "of matrix rate", "its best setting"):
        table.add_column(column)
    for row in rows:
        share = f"{row['of_matrix_rate']:.0%} ({row['theirs_of_matrix_rate']:.0%})"
        speeds = (f"{row['ours']:,.0f}", f"{row['theirs']:,.0f}", f"{row['ratio']:.2f}", share)
        table.add_row(row["dtype"], *speeds, row["setting"])
    Console(width=110).print(table)
    result = {"config": config.to_dict(), "rows": rows, "transformers": transformers.__version__}
    publish("train", result, args.json_out)


if __name__ == "__main__":
    main()

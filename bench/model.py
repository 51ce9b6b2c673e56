"""Forward pass and training step of the whole model against transformers with the same weights, in bf16 and fp32.

transformers runs at its best here: each of its settings (experts loop or grouped products; bf16 weights or autocast) is
tried on a part of the batch, and the fastest is measured in turn with ours. A training step is forward, loss, backward
and fused AdamW; ours is that of `mixtral train`, which in bf16 keeps fp32 master weights, as autocast does and bf16
weights alone do not. bench/train.py has the whole step, with router losses and clipping.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from lib.common import interleave, peak_matmul, publish, seconds
from lib.peer import EXPERTS, peer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mixtral.config import ModelConfig
from mixtral.model import Mixtral, Ragged, initialise
from mixtral.presets import small
from mixtral.runtime import set_threads
from mixtral.train.config import PretrainConfig
from mixtral.train.state import TrainState

LENGTH = 512
LR = 1e-5
TRIAL = {"fp32": 512, "bf16": 128}  # tokens that each of transformers' settings is tried on; bf16 can be very slow
SLOW = 30.0  # seconds of a run from which on it is neither warmed up nor repeated
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[Tensor], Any]  # from token ids [B, S] to the loss, or to logits


@dataclass(frozen=True)
class Contest:
    """One row of the result: the same work by us and by transformers."""

    task: str
    dtype: str
    setting: str  # of transformers, the fastest
    tokens: int
    ours: float  # tokens/s
    theirs: float  # tokens/s
    ratio: float
    of_peak_matmul: float  # ours
    theirs_of_peak_matmul: float
    settings_tried: dict[str, float]  # seconds on the trial batch
    repeats: int  # timed runs of each side


def pack(ids_BS: Tensor) -> tuple[Ragged, Tensor]:
    """Our form of a rectangular batch, and the targets that transformers derives from labels = ids."""
    batch = Ragged.of(ids_BS.tolist())
    targets_BS = torch.full_like(ids_BS, -100)
    targets_BS[:, :-1] = ids_BS[:, 1:]
    return batch, targets_BS.flatten()


# -- ours ------------------------------------------------------------------------------------------------------------


def our_forward(model: Mixtral) -> Step:
    @torch.no_grad()
    def step(ids_BS: Tensor) -> Tensor | None:
        return model(pack(ids_BS)[0]).logits

    return step


def our_training(model: Mixtral, dtype: str) -> Step:
    """`model` holds fp32 weights; the optimiser gives it bf16 copies of them where `dtype` says so."""
    train_state = TrainState.of(model, PretrainConfig(model=model.config, lr=LR), DTYPES[dtype])

    def step(ids_BS: Tensor) -> Tensor:
        batch, targets = pack(ids_BS)
        loss = model(batch, targets=targets, loss_weights="mean").loss
        loss.backward()
        train_state.optimizer.collect_gradients()
        train_state.optimizer.step(LR)
        return loss.detach()

    return step


# -- transformers ----------------------------------------------------------------------------------------------------


def their_forward(model: nn.Module, autocast: bool) -> Step:
    @torch.no_grad()
    def step(ids_BS: Tensor) -> Tensor:
        with _autocast(autocast):
            return model(input_ids=ids_BS, use_cache=False).logits

    return step


def their_training(model: nn.Module, autocast: bool) -> Step:
    adamw = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step(ids_BS: Tensor) -> Tensor:
        with _autocast(autocast):
            loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        return loss.detach()

    return step


def _autocast(on: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if on else contextlib.nullcontext()


def their_settings(dtype: str) -> list[tuple[str, str, bool]]:
    """(dtype of the weights, experts implementation, autocast) to try."""
    weights = [("fp32", False)] if dtype == "fp32" else [("bf16", False), ("fp32", True)]
    return [(kept, experts, autocast) for kept, autocast in weights for experts in EXPERTS]


def _title(kept: str, experts: str, autocast: bool) -> str:
    return f"{experts}, {kept} weights" + (", bf16 autocast" if autocast else "")


# -- the contest -----------------------------------------------------------------------------------------------------


def make_ours(config: ModelConfig, dtype: str) -> Mixtral:
    return initialise(Mixtral(config), torch.Generator().manual_seed(0)).to(DTYPES[dtype])


def loss_difference(config: ModelConfig, dtype: str, ids_BS: Tensor) -> float:
    """Our loss minus theirs on the same weights and tokens, before anything is timed."""
    ours = make_ours(config, dtype)
    theirs = peer(ours, DTYPES[dtype], "eager")
    batch, targets = pack(ids_BS)
    with torch.no_grad():
        loss = ours(batch, targets=targets, loss_weights="mean").loss
        return (loss - theirs(input_ids=ids_BS, labels=ids_BS).loss).item()


def contest(config: ModelConfig, task: str, dtype: str, ids_BS: Tensor, repeats: int) -> Contest:
    training = task == "training step"
    ours = make_ours(config, "fp32" if training else dtype)
    make = their_training if training else their_forward
    tried: dict[str, float] = {}
    for kept, experts, autocast in their_settings(dtype):
        step = make(peer(ours, DTYPES[kept], experts), autocast)
        tried[_title(kept, experts, autocast)] = _trial(step, ids_BS[:1, : TRIAL[dtype]])
        print(f"trial, {dtype} {task}: {list(tried.items())[-1]}", file=sys.stderr)
        del step
        gc.collect()
    fastest = min(tried, key=lambda name: tried[name])
    kept, experts, autocast = next(s for s in their_settings(dtype) if _title(*s) == fastest)
    their_step = make(peer(ours, DTYPES[kept], experts), autocast)
    our_step = our_training(ours, dtype) if training else our_forward(ours)
    runs = {"ours": lambda: our_step(ids_BS), "theirs": lambda: their_step(ids_BS)}
    tokens = ids_BS.numel()
    slow = tried[fastest] * tokens / TRIAL[dtype] > SLOW
    repeats = 1 if slow else repeats
    medians = interleave(runs, repeats, warm_up=0 if slow else 1)
    print(f"{dtype} {task}: {medians}", file=sys.stderr)
    ideal = config.flops_per_token(LENGTH, backward=training) * tokens / peak_matmul(DTYPES[dtype])  # s
    fractions = {name: ideal / taken for name, taken in medians.items()}
    return Contest(
        task, dtype, fastest, tokens, tokens / medians["ours"], tokens / medians["theirs"],
        medians["theirs"] / medians["ours"], fractions["ours"], fractions["theirs"], tried, repeats,
    )  # fmt: skip


def _trial(step: Step, ids_BS: Tensor) -> float:
    """Seconds of a run: the best of three more when the first is quick, else the first."""
    first = seconds(lambda: step(ids_BS))
    return first if first > SLOW / 10 else min(seconds(lambda: step(ids_BS)) for _ in range(3))


def card(contests: list[Contest], losses: dict[str, float]) -> Table:
    table = Table(title=f"mixtral against transformers {transformers.__version__}, same weights, tokens/s")
    for column in ("task", "dtype", "tokens", "mixtral", "transformers", "ratio", "of peak matmul", "its best setting"):
        table.add_column(column, justify="left" if column in ("task", "dtype", "its best setting") else "right")
    for c in contests:
        share = f"{c.of_peak_matmul:.0%} ({c.theirs_of_peak_matmul:.0%})"
        speeds = (f"{c.ours:,.0f}", f"{c.theirs:,.0f}", f"{c.ratio:.2f}", share)
        table.add_row(c.task, c.dtype, f"{c.tokens:,}", *speeds, c.setting)
    table.caption = "our loss minus theirs: " + ", ".join(f"{dtype} {value:+.1e}" for dtype, value in losses.items())
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers and one repeat: does it run?")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default 3)")
    parser.add_argument("--train-batch", type=int, default=4, help="sequences of 512 in a training step (default 4)")
    parser.add_argument("--json-out", action="store_true", help="write bench/results/model_<hardware>_<date>.json")
    args = parser.parse_args()
    set_threads()
    transformers.logging.set_verbosity_error()
    config = small().replace(n_layers=2) if args.quick else small()
    repeats = 1 if args.quick else args.repeats
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(config.vocab_size, (max(4, args.train_batch), LENGTH), generator=generator)
    losses = {dtype: loss_difference(config, dtype, ids_BS[:1]) for dtype in DTYPES}
    contests = []
    for dtype in DTYPES:
        contests.append(contest(config, "forward", dtype, ids_BS[:4], repeats))
        contests.append(contest(config, "training step", dtype, ids_BS[: args.train_batch], repeats))
    Console(width=140).print(card(contests, losses))
    result = {
        "config": config.to_dict(), "length": LENGTH, "repeats": repeats, "transformers": transformers.__version__,
        "loss_difference": losses, "rows": [vars(c) for c in contests],
    }  # fmt: skip
    publish("model", result, args.json_out)


if __name__ == "__main__":
    main()

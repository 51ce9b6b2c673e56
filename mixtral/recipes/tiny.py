"""The demo's recipe: a small Mixtral on the standard library, in minutes on two cores."""

from __future__ import annotations

from mixtral.presets import preset
from mixtral.train.config import PretrainConfig


def tiny() -> PretrainConfig:
    """1.2 M tokens in small batches: so short a run needs many updates more than it needs quiet gradients."""
    return PretrainConfig(
        model=preset("tiny"), data=("stdlib?max_bytes=3500000",), steps=1175, rows=4, context=256, lr=4e-3,
        final_lr=0.02, balance=("micro_batch?weight=0.02", "z_loss?weight=0.001"),
        val_every=400, val_tokens=32768, save_every=400,
    )  # fmt: skip

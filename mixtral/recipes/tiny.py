"""The demo's recipe: a small Mixtral on the standard library, in minutes on two cores."""

from __future__ import annotations

from mixtral.presets import preset
from mixtral.train.config import TrainConfig


def tiny() -> TrainConfig:
    return TrainConfig(
        model=preset("tiny"), data=("stdlib",), steps=600, rows=8, context=256, lr=3e-3,
        load_balance=0.02, val_every=100, val_tokens=32768, save_every=200,
    )  # fmt: skip

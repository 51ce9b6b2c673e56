"""The learning rate of each step."""

from __future__ import annotations

import math

from mixtral.train.config import PretrainConfig


def learning_rate(step: int, config: PretrainConfig) -> float:
    """The rate for step `step` (0 is the first): a linear rise over `warmup`, then one of

    - cosine: half a cosine from `lr` down to `final_lr * lr` at the last step (arXiv 1608.03983);
    - wsd: `lr` until the last `cooldown` share of the steps, then linearly to `final_lr * lr` (arXiv 2404.06395).
    """
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, config.steps - 1 - warmup)
        shape = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        cooldown = max(1, round(config.cooldown * config.steps))
        shape = min(1.0, (config.steps - 1 - step) / cooldown)
    return config.lr * (config.final_lr + (1 - config.final_lr) * shape)

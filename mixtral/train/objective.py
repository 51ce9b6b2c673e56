"""What training minimises: next-token cross-entropy plus weighted router losses, each kept apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixtral.model import Output
from mixtral.moe.balance import load_balance, z_loss
from mixtral.train.config import TrainConfig


class Objective(NamedTuple):
    """The total to differentiate and its parts, unweighted; a part whose coefficient is 0 is not computed."""

    total: Tensor
    cross_entropy: Tensor
    load_balance: Tensor | None  # mean over layers, 1 at balance
    z_loss: Tensor | None  # mean over layers


def objective(output: Output, config: TrainConfig) -> Objective:
    """Cross-entropy + load_balance * its coefficient + z_loss * its coefficient."""
    assert output.loss is not None, "the model was run without targets"
    total = output.loss
    parts: dict[str, Tensor | None] = {}
    for name, function in (("load_balance", load_balance), ("z_loss", z_loss)):
        coefficient = getattr(config, name)
        parts[name] = None
        if coefficient > 0 and output.routing:
            parts[name] = part = torch.stack([function(r) for r in output.routing]).mean()
            total = total + coefficient * part
    return Objective(total, output.loss, **parts)

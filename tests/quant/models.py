"""A small random model, large enough for its norms and gates not to count, and its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mixtral.config import ModelConfig
from mixtral.lm import LM
from mixtral.model import Mixtral, initialise

CONFIG = ModelConfig(
    vocab_size=320, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, n_experts=4,
    experts_per_token=2, context=64, init_std=0.08,
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "sparse": {},
    "dense": {"n_experts": 1, "experts_per_token": 1},
    "tied": {"tie_embeddings": True},
    "shared, own router": {"shared_experts": 1, "router": "sigmoid"},
    "odd widths": {"dim": 40, "ffn_dim": 24, "head_dim": 6},
}


def make_folder(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Logits have a standard deviation of 1, so that a token's probability is far from uniform."""
    model = initialise(Mixtral(CONFIG.replace(**changes)), torch.Generator().manual_seed(0))
    model.output_weight.data.mul_(10)
    LM(model.to(dtype)).save(folder)
    return folder


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, CONFIG.vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()

"""Small models with weights large enough for every part to matter."""

from __future__ import annotations

from typing import Any

import torch

from mixtral.config import ModelConfig
from mixtral.model import Mixtral, Ragged

SHAPES: dict[str, dict[str, Any]] = {
    "sparse": {},
    "dense": {"n_experts": 1, "experts_per_token": 1},
    "tied": {"tie_embeddings": True},
    "windowed": {"sliding_window": 3},
    "one key head, odd widths": {
        "dim": 15, "n_heads": 3, "n_kv_heads": 1, "head_dim": 6, "ffn_dim": 11, "vocab_size": 37,
    },
}  # fmt: skip


def config(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "ffn_dim": 12,
        "n_experts": 4, "experts_per_token": 2, "rope_theta": 1e4,
    }  # fmt: skip
    return ModelConfig(**{**base, **changes})


def model(shape: ModelConfig, std: float = 0.3) -> Mixtral:
    torch.manual_seed(0)
    made = Mixtral(shape)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=std)
    return made


def batch(vocab: int, *lengths: int) -> Ragged:
    generator = torch.Generator().manual_seed(3)
    return Ragged.of([torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths])


def targets(packed: Ragged, vocab: int) -> torch.Tensor:
    """Random targets, the second of them ignored."""
    made = torch.randint(vocab, packed.tokens_T.shape, generator=torch.Generator().manual_seed(4))
    made[1:2] = -100
    return made

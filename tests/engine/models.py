"""A tiny random model, and a tokenizer of any bytes, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mixtral import engine
from mixtral.config import ModelConfig
from mixtral.model import Mixtral
from mixtral.tokenizer import Tokenizer

CONFIG = ModelConfig(
    vocab_size=97, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, n_experts=4,
    experts_per_token=2, rope_theta=1e4, context=128,
)  # fmt: skip
WINDOW = 8


def make_model(seed: int = 0, **changes: Any) -> Mixtral:
    """Weights at scale 0.2: attention and routing far from uniform, so that a wrong position or mask shows."""
    model = Mixtral(CONFIG.replace(**changes)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        spread = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.copy_(spread if parameter.dim() > 1 else 1 + spread)
    return model


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, CONFIG.vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def generate(model: Mixtral, *args: Any, **options: Any) -> list[engine.Generation]:
    """By the model itself, on torch."""
    return engine.generate(engine.TorchRunner(model), *args, **options)


def stream(model: Mixtral, *args: Any, **options: Any) -> engine.Stream:
    return engine.stream(engine.TorchRunner(model), *args, **options)


class Pieces(Tokenizer):
    """Tokens of any bytes: what a text was cut into, as no real vocabulary would cut it."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        super().__init__("test", pieces, {}, 0, 0, dummy_prefix=False)

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _files(self) -> dict[str, bytes]:
        raise NotImplementedError

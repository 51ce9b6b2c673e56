"""Presets: the published models, and two small ones of ours. A name is looked up in `PRESETS`, at the bottom."""

from __future__ import annotations

from collections.abc import Callable

from mixtral.config import ModelConfig
from mixtral.errors import ConfigError, did_you_mean


def tiny() -> ModelConfig:
    """2.2 M parameters (0.9 M active): the demo's model, trained on two cores in minutes."""
    return ModelConfig(
        vocab_size=1024, dim=128, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=64, ffn_dim=192,
        n_experts=8, experts_per_token=2, rope_theta=1e4, context=512, init_std=0.06,
    )  # fmt: skip


def small() -> ModelConfig:
    """190 M parameters (58 M active): large enough for speed to mean something, small enough for one machine."""
    return ModelConfig(
        vocab_size=8192, dim=512, n_layers=8, n_heads=8, n_kv_heads=2, head_dim=64, ffn_dim=1792,
        n_experts=8, experts_per_token=2, rope_theta=1e4, context=2048,
    )  # fmt: skip


def mistral_7b() -> ModelConfig:
    """Mistral 7B v0.1: dense, and the only published preset with a sliding window."""
    return ModelConfig(
        vocab_size=32000, dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, ffn_dim=14336,
        rope_theta=1e4, context=32768, sliding_window=4096,
    )  # fmt: skip


def mistral_7b_v0_3() -> ModelConfig:
    """Mistral 7B v0.3: a larger vocabulary, a slower rotation, no window."""
    return mistral_7b().replace(vocab_size=32768, rope_theta=1e6, sliding_window=None)


def mixtral_8x7b() -> ModelConfig:
    """Mixtral 8x7B v0.1 (arXiv 2401.04088): the 7B's shape with eight experts, two a token, and no window."""
    return mistral_7b().replace(n_experts=8, experts_per_token=2, rope_theta=1e6, sliding_window=None)


def mixtral_8x22b() -> ModelConfig:
    """Mixtral 8x22B v0.1."""
    return mixtral_8x7b().replace(dim=6144, n_layers=56, n_heads=48, ffn_dim=16384, context=65536)


def mixtral_8x22b_v0_3() -> ModelConfig:
    """Mixtral 8x22B v0.3: the vocabulary of the v3 tokenizer."""
    return mixtral_8x22b().replace(vocab_size=32768)


def preset(name: str) -> ModelConfig:
    """The preset called `name`; an unknown name raises ConfigError with the nearest known one."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; {did_you_mean(name, PRESETS)}")
    return PRESETS[name]()


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "small": small,
    "mistral-7b": mistral_7b,
    "mistral-7b-v0.3": mistral_7b_v0_3,
    "mixtral-8x7b": mixtral_8x7b,
    "mixtral-8x22b": mixtral_8x22b,
    "mixtral-8x22b-v0.3": mixtral_8x22b_v0_3,
}

"""One dial: a whole training configuration from a single number.

With size s (2 is twice the demo's model, 8 near the `small` preset, 16 a model for a GPU):

    width          64 s, in heads of 64, so s heads; key/value heads: the largest divisor of s that is at most s / 4
    layers         max(4, s): width and depth grow together, as in the models of the Mixtral family
    expert width   3.5 times the width, as in Mixtral; 8 experts, 2 a token
    vocabulary     512 s, at most 32,768: the embedding stays a small part
    context        128 s, at most 2,048; 4 rows a batch, so that batches grow with the model
    learning rate  0.004 sqrt(2 / s): wider sums want smaller steps (measured at s = 2 and 3 alone)
    steps          until 20 tokens for each active parameter have been seen (arXiv 2203.15556)
"""

from __future__ import annotations

from mixtral.config import ModelConfig
from mixtral.errors import ConfigError
from mixtral.train.config import PretrainConfig

SIZES = range(1, 65)
TOKENS_PER_PARAMETER = 20


def sized(size: int) -> PretrainConfig:
    """The configuration of a size; ConfigError for one out of range."""
    if size not in SIZES:
        raise ConfigError(f"size must lie in {SIZES.start}..{SIZES.stop - 1}, not {size}")
    width, context = 64 * size, min(2048, 128 * size)
    model = ModelConfig(
        vocab_size=min(32768, max(1024, 512 * size)), dim=width, n_layers=max(4, size), n_heads=size,
        n_kv_heads=max(d for d in range(1, max(1, size // 4) + 1) if size % d == 0), head_dim=64,
        ffn_dim=7 * width // 2, n_experts=8, experts_per_token=2, rope_theta=1e4, context=2 * context,
        init_std=round(0.5 / width**0.5, 4),
    )  # fmt: skip
    rows = 4
    return PretrainConfig(
        model=model, rows=rows, context=context, lr=round(4e-3 * (2 / size) ** 0.5, 6),
        steps=round(TOKENS_PER_PARAMETER * model.n_active_params() / (rows * context)),
        balance=("micro_batch?weight=0.02", "z_loss?weight=0.001"),
    )  # fmt: skip

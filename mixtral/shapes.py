"""Shapes of published models that are not run here, for `mixtral info`: enough of each to count what its paper counts.

Sizes are those of the papers and of the published configurations; where a layer has another form than ours (two
matrices in an expert, latent attention, an encoder and a decoder), it says so. Left out: biases, scales of norms inside
attention, and what else is far below one parameter in a thousand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mixtral.config import ModelConfig
from mixtral.errors import ConfigError


@dataclass(frozen=True)
class Layers:
    """Layers that are alike."""

    count: int
    attention: int  # parameters of a layer's attention
    cached: int  # numbers that a token adds to the cache; 0 in an encoder
    scored: int  # multiply-adds for each position that a token sees: of queries by keys, and of weights by values
    ffn: int  # parameters of one expert, or of the dense feed-forward network
    experts: int = 1
    k: int = 1
    always: int = 0  # parameters that every token meets beside its experts: the router, shared experts


@dataclass(frozen=True)
class Shape:
    """A model as far as it can be counted."""

    vocab_size: int
    dim: int
    layers: tuple[Layers, ...]
    context: int
    tied: bool = False
    note: str = ""  # what differs from Mixtral

    @property
    def is_sparse(self) -> bool:
        return any(part.experts > 1 for part in self.layers)

    @property
    def experts(self) -> str:
        """Of a sparse layer, such as "2 of 8"; "" when dense."""
        return next((f"{part.k} of {part.experts}" for part in self.layers if part.experts > 1), "")

    def n_params(self) -> int:
        """All parameters."""
        return self._matrices([part.experts for part in self.layers]) + self._others()

    def n_active_params(self) -> int:
        """Parameters that a token meets; of an encoder with a decoder, those of both."""
        return self._matrices([part.k for part in self.layers]) + self._others()

    def _matrices(self, experts: list[int]) -> int:
        """Parameters of the products of the layers, with so many experts of each, and of the output."""
        parts = zip(self.layers, experts, strict=True)
        layers = sum(part.count * (part.attention + n * part.ffn + part.always) for part, n in parts)
        return layers + self.vocab_size * self.dim

    def _others(self) -> int:
        """Of norms, and of an embedding of its own."""
        norms = (1 + 2 * sum(part.count for part in self.layers)) * self.dim
        return norms + (0 if self.tied else self.vocab_size * self.dim)

    def flops_per_token(self, context: int, backward: bool = False) -> int:
        """See ModelConfig.flops_per_token."""
        products = self._matrices([part.k for part in self.layers])
        attention = sum(part.count * part.scored for part in self.layers) * (context + 1) / 2
        return round((6 if backward else 2) * (products + attention))

    def weight_bytes(self, bits: float = 16) -> int:
        """See ModelConfig.weight_bytes."""
        return round(self.n_params() * bits / 8)

    def kv_bytes(self, context: int, bits: float = 16) -> int:
        """See ModelConfig.kv_bytes."""
        return round(context * sum(part.count * part.cached for part in self.layers) * bits / 8)


def shape_of(config: ModelConfig) -> Shape:
    """The same of a model of ours."""
    c, parts = config, []
    scored = 2 * c.n_heads * c.head_dim
    for i in range(c.n_layers):
        n_experts, ffn_dim = c.layer(i)
        common = (c.attention_params, 2 * c.n_kv_heads * c.head_dim, scored, 3 * c.dim * ffn_dim)
        always = c.dim * n_experts + c.shared_experts * c.expert_params if n_experts > 1 else 0
        parts.append(Layers(1, *common, n_experts, c.experts_per_token if n_experts > 1 else 1, always))
    return Shape(c.vocab_size, c.dim, tuple(parts), c.context, c.tie_embeddings)


def _llama_2_70b() -> Shape:
    return shape_of(ModelConfig(
        vocab_size=32000, dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, head_dim=128, ffn_dim=28672, rope_theta=1e4,
        context=4096,
    ))  # fmt: skip


def _grok_1() -> Shape:
    return shape_of(ModelConfig(
        vocab_size=131072, dim=6144, n_layers=64, n_heads=48, n_kv_heads=8, head_dim=128, ffn_dim=32768,
        n_experts=8, experts_per_token=2, rope_theta=1e4, context=8192, tie_embeddings=True,
    ))  # fmt: skip


def _deepseek_moe_16b() -> Shape:
    """arXiv 2401.06066: 64 small experts and two that every token takes; the first layer is dense."""
    return shape_of(ModelConfig(
        vocab_size=102400, dim=2048, n_layers=28, n_heads=16, n_kv_heads=16, head_dim=128, ffn_dim=1408,
        n_experts=64, experts_per_token=6, shared_experts=2, experts_by_layer=(1, *[64] * 27), dense_ffn_dim=10944,
        rope_theta=1e4, context=4096,
    ))  # fmt: skip


def _qwen1_5_moe() -> Shape:
    """Four of its experts' width are one that every token takes."""
    return shape_of(ModelConfig(
        vocab_size=151936, dim=2048, n_layers=24, n_heads=16, n_kv_heads=16, head_dim=128, ffn_dim=1408,
        n_experts=60, experts_per_token=4, shared_experts=4, rope_theta=1e6, context=8192,
    ))  # fmt: skip


def _olmoe() -> Shape:
    """arXiv 2409.02060."""
    return shape_of(ModelConfig(
        vocab_size=50304, dim=2048, n_layers=16, n_heads=16, n_kv_heads=16, head_dim=128, ffn_dim=1024,
        n_experts=64, experts_per_token=8, rope_theta=1e4, context=4096,
    ))  # fmt: skip


def _latent(dim: int, n_heads: int, query_rank: int, rank: int, plain: int, rotary: int, value: int) -> int:
    """Parameters of DeepSeek's latent attention (arXiv 2405.04434): queries, keys and values through low ranks."""
    queries = query_rank * (dim + n_heads * (plain + rotary))
    keys_values = dim * (rank + rotary) + rank * n_heads * (plain + value)
    return queries + keys_values + n_heads * value * dim


def _deepseek_v3(n_heads: int = 128, n_experts: int = 256, dense: int = 3, vocab_size: int = 129280) -> Shape:
    """arXiv 2412.19437, without the layer that predicts a second token."""
    dim, width, rank, rotary = 7168, 2048, 512, 64
    attention = _latent(dim, n_heads, 1536, rank, 128, rotary, 128)
    common = (attention, rank + rotary, n_heads * (128 + rotary + 128))
    sparse = Layers(61 - dense, *common, 3 * dim * width, n_experts, 8, 3 * dim * width + dim * n_experts)
    return Shape(vocab_size, dim, (Layers(dense, *common, 3 * dim * 18432), sparse), 131072,
                 note="latent attention; one shared expert; the first layers are dense")  # fmt: skip


def _kimi_k2() -> Shape:
    """arXiv 2507.20534: DeepSeek-V3 with more experts and half the heads."""
    return _deepseek_v3(n_heads=64, n_experts=384, dense=1, vocab_size=163840)


def _glam() -> Shape:
    """arXiv 2112.06905, 64B/64E: every other layer is sparse, its experts of two matrices; the dense ones are gated."""
    dim, ffn, heads = 8192, 32768, 128 * 128
    common = (4 * dim * heads, 2 * heads, 2 * heads)
    sparse, dense = Layers(32, *common, 2 * dim * ffn, 64, 2, dim * 64), Layers(32, *common, 3 * dim * ffn)
    return Shape(256000, dim, (dense, sparse), 1024, tied=True, note="every other layer dense")


def _switch_base(n_experts: int) -> Shape:
    """arXiv 2101.03961, as its checkpoints are: T5's encoder and decoder of 12 layers, every other one sparse."""
    dim, heads, ffn = 768, 12 * 64, 2 * 768 * 3072
    encoder, decoder = (4 * dim * heads, 0, 2 * heads), (8 * dim * heads, 2 * heads, 4 * heads)
    layers = [Layers(6, *stack, ffn) for stack in (encoder, decoder)]
    layers += [Layers(6, *stack, ffn, n_experts, 1, dim * n_experts) for stack in (encoder, decoder)]
    return Shape(32128, dim, tuple(layers), 512, note="encoder and decoder; every other layer dense")


def _st_moe() -> Shape:
    """arXiv 2202.08906: encoder and decoder of 27 layers, every fourth one sparse, with gated experts."""
    dim, heads, ffn = 5120, 64 * 128, 3 * 5120 * 20480
    encoder, decoder = (4 * dim * heads, 0, 2 * heads), (8 * dim * heads, 2 * heads, 4 * heads)
    layers = [Layers(21, *stack, ffn) for stack in (encoder, decoder)]
    layers += [Layers(6, *stack, ffn, 64, 2, dim * 64) for stack in (encoder, decoder)]
    return Shape(250112, dim, tuple(layers), 512, tied=True, note="encoder and decoder; three of four layers dense")


SHAPES: dict[str, Callable[[], Shape]] = {
    "llama-2-70b": _llama_2_70b,
    "switch-base-8": lambda: _switch_base(8),
    "switch-base-16": lambda: _switch_base(16),
    "switch-base-32": lambda: _switch_base(32),
    "switch-base-64": lambda: _switch_base(64),
    "switch-base-128": lambda: _switch_base(128),
    "switch-base-256": lambda: _switch_base(256),
    "glam-64b-64e": _glam,
    "st-moe-32b": _st_moe,
    "grok-1": _grok_1,
    "deepseek-moe-16b": _deepseek_moe_16b,
    "qwen1.5-moe-a2.7b": _qwen1_5_moe,
    "olmoe-1b-7b": _olmoe,
    "deepseek-v3": _deepseek_v3,
    "kimi-k2": _kimi_k2,
}


def shape(name: str) -> Shape:
    """The shape called `name`; an unknown name raises ConfigError."""
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    return SHAPES[name]()

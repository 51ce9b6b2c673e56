"""Small random models with packed weights, their cache pools, and the oracle of the native step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixtral import kernels
from mixtral.config import ModelConfig
from mixtral.engine.native_runner import step_weights
from mixtral.kernels.native.step import Pages, Result, Span, Step
from mixtral.kernels.packing import DTYPES, pack
from mixtral.model import Mixtral, Output, Ragged
from mixtral.model.linear import Linear
from mixtral.model.rope import rotary_angles
from mixtral.moe import Experts, FeedForward
from mixtral.quant.formats import FORMATS, PLAIN, Format, QuantFormat, quantise
from mixtral.quant.layers import PackedEmbedding, PackedExperts, PackedFeedForward, PackedLinear

SHAPES: dict[str, dict[str, Any]] = {
    "sparse": {},
    "dense": {"n_experts": 1, "experts_per_token": 1},
    "window": {"sliding_window": 11},
    "tied, one expert a token": {"tie_embeddings": True, "experts_per_token": 1},
    "odd widths, seven queries a key": {
        "dim": 43, "n_heads": 7, "n_kv_heads": 1, "head_dim": 6, "ffn_dim": 21, "vocab_size": 37, "n_experts": 5,
        "experts_per_token": 3,
    },
}  # fmt: skip


def config(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "vocab_size": 50, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 96,
        "n_experts": 8, "experts_per_token": 2, "rope_theta": 1e4, "context": 4096,
    }  # fmt: skip
    return ModelConfig(**{**base, **changes})


def packed_model(shape: ModelConfig, name: str, seed: int = 0) -> Mixtral:
    """Activations in fp32, all matrices packed in the format `name`; weights large enough for every part to matter."""
    model = Mixtral(shape).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        spread = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.copy_(spread if parameter.dim() > 1 else 1 + spread)
    return pack_parts(model, name)


def pack_parts(model: Mixtral, name: str) -> Mixtral:
    """All matrices packed in the format `name`, in place."""
    fmt = FORMATS.get(name, Format(name))
    for path, module in list(model.named_modules()):
        if (new := _packed(module, fmt)) is not None:
            model.set_submodule(path, new)
    if model.output is None:
        tied = PLAIN[DTYPES.get(name, torch.bfloat16)]
        packed = PackedEmbedding(tied, *model.embedding.weight.shape, torch.float32)
        packed.weight_packed.copy_(pack(model.embedding.weight.to(DTYPES[tied.name]), tied.name))
        model.set_submodule("embedding", packed)
    return model


def _packed(module: nn.Module, fmt: Format) -> nn.Module | None:
    if isinstance(module, Linear):
        new: nn.Module = PackedLinear(fmt, *reversed(module.weight.shape))
    elif isinstance(module, Experts):
        new = PackedExperts(fmt, len(module.w2), *module.w2.shape[1:])
    elif isinstance(module, FeedForward):
        new = PackedFeedForward(fmt, *module.w2.shape)
    else:
        return None
    for name, parameter in module.named_parameters():
        matrices = parameter.reshape(-1, *parameter.shape[-2:])
        quantised = isinstance(fmt, QuantFormat)
        whole = [quantise(w, fmt) if quantised else pack(w.to(DTYPES[fmt.name]), fmt.name) for w in matrices]
        buffer = new.get_buffer(name + "_packed")
        buffer.copy_(torch.stack(whole).view(buffer.shape))
    return new


def oracle(model: Mixtral, sequences: Sequence[Sequence[int]]) -> Output:
    """Whole sequences at once on the reference ops: the products' own arithmetic, everything else in fp32."""
    with torch.no_grad(), kernels.use_backend("reference"):
        return model(Ragged.of(sequences))


def tokens(n: int, seed: int = 0, vocab: int = 37) -> list[int]:
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


class Cached:
    """Some sequences on a native step, with a pool of which each has so many blocks, in a shuffled order.

    The pool's slots lie one behind the other, or those of one head after those of another.
    """

    def __init__(self, model: Mixtral, n: int, blocks: int = 1, size: int = 64, dtype: torch.dtype = torch.float32,
                 by_head: bool = False) -> None:  # fmt: skip
        shape = self.config = model.config
        self.step, self.size = Step(shape, step_weights(model)), size
        slots = n * blocks * size
        inner = (shape.n_kv_heads, slots) if by_head else (slots, shape.n_kv_heads)
        pool = torch.full((shape.n_layers, 2, *inner, shape.head_dim), float("nan"), dtype=dtype)
        self.pool = pool if by_head else pool.transpose(2, 3)
        self.tables = torch.randperm(n * blocks, generator=torch.Generator().manual_seed(n)).view(n, blocks)
        self.lengths = [0] * n
        self.angles = rotary_angles(torch.arange(512), shape.head_dim, shape.rope_theta)

    def pages(self, *sequences: int) -> Pages:
        return Pages(self.pool, self.size, self.tables[list(sequences)])

    def run(self, chunks: dict[int, list[int]], k: int | Tensor | None = None, wanted: Tensor | None = None,
            **options: Any) -> Result:  # fmt: skip
        """The next tokens of some sequences, by number; all rows' logits by default."""
        spans, rows = [], 0
        for i, chunk in chunks.items():
            spans.append(Span(rows, len(chunk), self.lengths[i]))
            self.lengths[i], rows = self.lengths[i] + len(chunk), rows + len(chunk)
        source = torch.tensor([t for chunk in chunks.values() for t in chunk], dtype=torch.int64)
        wanted = torch.arange(rows) if wanted is None else wanted
        return self.step.run(source, spans, self.pages(*chunks), self.angles, wanted, k, **options)

"""Grouped-query attention (arXiv 2305.13245) with rotary embedding, and the contract of a KV cache.

Legend: T tokens, D model width, H query heads, G key/value heads, C head width, S keys of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from mixtral import kernels
from mixtral.config import ModelConfig
from mixtral.model.batch import Ragged
from mixtral.model.linear import Linear


class KeysValues(NamedTuple):
    """What one sequence's new tokens may look at. Positions need not be in order: a rolling buffer's are not."""

    keys_SGC: Tensor  # rotated
    values_SGC: Tensor
    positions_S: Tensor  # int64


class KVCache(Protocol):
    """Keys and values of earlier tokens, one entry a sequence of the batch, in the batch's order."""

    def extend(self, layer: int, keys_TGC: Tensor, values_TGC: Tensor, batch: Ragged) -> Sequence[KeysValues]:
        """Keep the new tokens' keys and values; return, for each sequence, all that its new tokens may see."""
        ...


class Attention(nn.Module):
    """Query, key and value in one projection, its rows grouped by key/value head: H/G query heads, a key, a value."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.queries_per_kv, self.head_dim = config.queries_per_kv, config.head_dim
        self.window = config.sliding_window
        self.wqkv = Linear(config.dim, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)

    def forward(
        self, x_TD: Tensor, angles: tuple[Tensor, Tensor], batch: Ragged, layer: int, cache: KVCache | None
    ) -> Tensor:
        """x [T, D] -> [T, D]. `angles` are the rotary cos and sin of the batch's positions; `layer` is the cache's."""
        qkv = self.wqkv(x_TD).unflatten(1, (-1, self.queries_per_kv + 2, self.head_dim))
        q_THC = kernels.rotary(qkv[:, :, :-2].flatten(1, 2), *angles)
        k_TGC = kernels.rotary(qkv[:, :, -2], *angles)
        v_TGC = qkv[:, :, -1]
        if cache is None:
            out_THC = kernels.attention(q_THC, k_TGC, v_TGC, batch.cu_seqlens, self.window)
        else:
            kv = cache.extend(layer, k_TGC, v_TGC, batch)
            out_THC = kernels.cached_attention(q_THC, batch.positions_T, batch.cu_seqlens, kv, self.window)
        return self.wo(out_THC.flatten(1))
